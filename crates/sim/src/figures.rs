//! What a run has measured. All times are of the simulation.

use std::{collections::BTreeMap, fmt::Write};

use serde::Serialize;

/// One attempt at a snapshot. Times are nanoseconds since the run began.
#[derive(Clone, Debug, Default, Serialize)]
pub struct AttemptFigures {
    /// Its number.
    pub number: u32,
    /// When the user asked for it.
    pub started_ns: u64,
    /// When the initiator sent the first `Take`.
    pub take_ns: Option<u64>,
    /// When it had everybody's `Taken`.
    pub all_taken_ns: Option<u64>,
    /// When the last host had all frames in flight, and stopped recording.
    pub closed_ns: Option<u64>,
    /// When the initiator had everybody's `Report`.
    pub reported_ns: Option<u64>,
    /// When the initiator was done.
    pub done_ns: Option<u64>,
    /// The first machine's cut instant.
    pub first_cut_ns: Option<u64>,
    /// The last one's.
    pub last_cut_ns: Option<u64>,
    /// The longest that a host's ports were held.
    pub slowest_local_cut_ns: u64,
    /// Messages sent, repetitions included.
    pub messages: u64,
    /// Their bytes as JSON.
    pub bytes: u64,
    /// Frames recorded.
    pub in_flight: u64,
    /// Copies owed before the cut, in all networks.
    pub sent_before: u64,
    /// Of these, lost on the wire.
    pub wire_loss: u64,
    /// Hosts that had not confirmed the outcome.
    pub unsettled: usize,
}

impl AttemptFigures {
    /// From the first `Take` until every machine is cut and the initiator knows.
    pub fn cut_time_ns(&self) -> Option<u64> {
        Some(self.all_taken_ns? - self.take_ns?)
    }

    /// From the first `Take` until the last host has all frames in flight.
    pub fn closing_time_ns(&self) -> Option<u64> {
        Some(self.closed_ns? - self.take_ns?)
    }

    /// Latest minus earliest machine's cut instant, by the one true clock.
    pub fn skew_ns(&self) -> Option<u64> {
        Some(self.last_cut_ns? - self.first_cut_ns?)
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// What decided everything.
    pub seed: u64,
    /// Hosts.
    pub hosts: usize,
    /// Machines.
    pub machines: usize,
    /// Networks.
    pub networks: usize,
    /// Frames that machines received.
    pub frames: u64,
    /// Packets between hosts.
    pub packets: u64,
    /// Snapshots that came to exist.
    pub snapshots: u32,
    /// Agents that died.
    pub crashes: u64,
    /// Partitions.
    pub partitions: u64,
    /// Local cuts begun by a frame of the new colour, not by a message.
    pub begun_by_frame: u64,
    /// What participants were doing when their agents died.
    pub states_at_crash: BTreeMap<&'static str, u64>,
    /// The longest round trip between the initiator and a host, in nanoseconds.
    pub round_trip_ns: u64,
    /// How long the run was, in simulated nanoseconds.
    pub simulated_ns: u64,
    /// Events in it.
    pub events: u64,
    /// Equal in equal runs.
    pub digest: u64,
    /// Each attempt.
    pub attempts: Vec<AttemptFigures>,
}

/// How one number of hosts did: medians over runs. The rows of the table and the plot's points.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Hosts.
    pub hosts: usize,
    /// Machines.
    pub machines: usize,
    /// Protocol messages.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// See [`AttemptFigures::cut_time_ns`], in microseconds.
    pub cut_us: u64,
    /// See [`AttemptFigures::closing_time_ns`], in microseconds.
    pub closing_us: u64,
    /// Two round trips and the slowest local cut, in microseconds: what `closing_us` is to stay below.
    pub bound_us: u64,
    /// See [`AttemptFigures::skew_ns`], in microseconds.
    pub skew_us: u64,
    /// The longest stall of a machine, in microseconds.
    pub stall_us: u64,
    /// Frames recorded as in flight.
    pub in_flight: u64,
    /// Whether every run stayed below its bound.
    pub within_bound: bool,
}

impl Row {
    /// The medians over runs of equal size; None without a snapshot in any.
    pub fn of(runs: &[Figures]) -> Option<Self> {
        let found: Vec<_> = runs
            .iter()
            .filter_map(|run| Some((run, run.attempts.iter().find(|a| a.done_ns.is_some())?)))
            .collect();
        let (first, _) = found.first()?;
        let median = |value: &dyn Fn(&Figures, &AttemptFigures) -> u64| {
            let mut values: Vec<_> = found.iter().map(|(run, attempt)| value(run, attempt)).collect();
            values.sort_unstable();
            values[values.len() / 2]
        };
        let us = |ns: Option<u64>| ns.unwrap_or(0) / 1000;
        let bound =
            |run: &Figures, attempt: &AttemptFigures| 2 * run.round_trip_ns + attempt.slowest_local_cut_ns;
        Some(Self {
            hosts: first.hosts,
            machines: first.machines,
            messages: median(&|_, a| a.messages),
            bytes: median(&|_, a| a.bytes),
            cut_us: median(&|_, a| us(a.cut_time_ns())),
            closing_us: median(&|_, a| us(a.closing_time_ns())),
            bound_us: median(&|run, a| bound(run, a) / 1000),
            skew_us: median(&|_, a| us(a.skew_ns())),
            stall_us: median(&|_, a| a.slowest_local_cut_ns / 1000),
            in_flight: median(&|_, a| a.in_flight),
            within_bound: found
                .iter()
                .all(|(run, a)| a.closing_time_ns().is_some_and(|t| t <= bound(run, a))),
        })
    }
}

/// The rows as text.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| hosts | machines | messages | per host | bytes | per host | cut | closed | bound | skew | stall | in flight |\n\
         | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for row in rows {
        let hosts = row.hosts as f64;
        let ms = |us: u64| us as f64 / 1000.0;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.1} | {} | {:.0} | {:.2} ms | {:.2} ms | {:.2} ms{} | {:.2} ms | {:.2} ms | {} |",
            row.hosts,
            row.machines,
            row.messages,
            row.messages as f64 / hosts,
            row.bytes,
            row.bytes as f64 / hosts,
            ms(row.cut_us),
            ms(row.closing_us),
            ms(row.bound_us),
            if row.within_bound { "" } else { " MISSED" },
            ms(row.skew_us),
            ms(row.stall_us),
            row.in_flight,
        );
    }
    text
}
