//! What the guests' own traffic sees of snapshots and restores.
//!
//! Four machines pass tokens round a ring as fast as they can (which keeps both cores busy), and carry two numbered
//! UDP streams and two checked TCP sessions. Counters live in the guests' memory, so a restore takes them back with
//! everything else; what is compared is always two readings of one timeline, the first from before the cut:
//!
//! ```text
//! reading --- snapshot --- reading --- reading           the continued timeline
//!                 \
//!                  restore --- reading --- reading       the restored one, which then is continued
//! ```
//!
//! Violations: frames unaccounted; a token missing or doubled; a bad byte or another connection; and, in the
//! snapshots' timelines, datagrams lost, doubled or reordered or segments sent again more often than in an equally
//! long run of the same guests without a snapshot.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clap::Args;
use diorama_api::{RestoreReport, SnapshotReport};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, ms, table};
use crate::lab::{self, Lab, say};
use crate::load::{self, Load, MACHINES, Reading, TOKENS};
use crate::snapshot::remove;

const ENVIRONMENT: &str = "bench";
/// Between two readings of the same timeline: every token passes every machine many times in it.
const SETTLE: Duration = Duration::from_millis(500);
/// How often the tokens are looked at again, when one has not moved: a machine may not have had its turn.
const TOKEN_TRIES: u32 = 20;

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Live snapshots
    #[arg(long, default_value_t = 100)]
    snapshots: u32,
    /// Restores among them
    #[arg(long, default_value_t = 20)]
    restores: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { snapshots: 100, restores: 20 }
    }
}

/// What the traffic of one timeline, or of several put together, suffered.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Suffered {
    seconds: f64,
    udp_received: u64,
    udp_lost: u64,
    udp_duplicated: u64,
    udp_reordered: u64,
    tcp_bytes: u64,
    tcp_retransmits: u64,
    token_hops: u64,
}

/// Everything of one run with snapshots.
#[derive(Debug, Default, Serialize)]
struct Findings {
    snapshots: u32,
    restores: u32,
    in_flight: u64,
    in_flight_replayed: u64,
    unaccounted: i64,
    drain_incomplete: u32,
    pause_median_us: f64,
    pause_max_us: f64,
    continued: Suffered,
    restored: Suffered,
    control: Suffered,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let (snapshots, restores) =
        if common.quick { (10, 3) } else { (arguments.snapshots, arguments.restores) };
    let mut violations = Vec::new();
    let mut findings = Findings::default();
    let lab = Lab::new()?;
    say("consistency: starting four machines");
    load::start(&lab, ENVIRONMENT, common.memory, Load::Ring)?;
    let started = Instant::now();
    with_snapshots(&lab, (snapshots, restores), &mut findings, &mut violations)?;
    let length = started.elapsed();
    load::stop(&lab, ENVIRONMENT)?;

    say(format!("consistency: the same without snapshots, {:.0} s", length.as_secs_f64()));
    load::start(&lab, ENVIRONMENT, common.memory, Load::Ring)?;
    without_snapshots(&lab, length, &mut findings, &mut violations)?;

    judge(&findings, &mut violations);
    let json = serde_json::json!({ "findings": findings, "violations": violations });
    Ok(Outcome { name: "consistency", json, text: text(&findings, violations.len()), violations })
}

fn with_snapshots(
    lab: &Lab,
    (snapshots, restores): (u32, u32),
    findings: &mut Findings,
    violations: &mut Vec<String>,
) -> Result<(), Failure> {
    let mut pauses = Sample::default();
    let mut before = Timed::take(lab)?;
    let mut previous: Option<String> = None;
    for n in 1..=snapshots {
        let report: SnapshotReport =
            lab.run(&["-e", ENVIRONMENT, "snapshot", "create", "--capture", "live"])?;
        findings.snapshots += 1;
        findings.in_flight += report.frames.in_flight;
        findings.unaccounted += report.frames.unaccounted.abs();
        for machine in &report.machines {
            pauses.push(machine.pause_us as f64);
            findings.drain_incomplete += u32::from(machine.drain_incomplete);
        }
        let what = format!("snapshot {n}");
        let after = check(lab, &before, &what, violations)?;
        findings.continued.add(&before, &after);

        // Spread evenly among the snapshots.
        if n * restores / snapshots > findings.restores {
            let restored: RestoreReport = lab.run(&["-e", ENVIRONMENT, "restore", &report.id])?;
            findings.restores += 1;
            findings.in_flight_replayed += restored.in_flight_replayed;
            if restored.in_flight_replayed != report.frames.in_flight {
                violations.push(format!(
                    "restore of {what}: {} of {} frames in flight delivered again",
                    restored.in_flight_replayed, report.frames.in_flight
                ));
            }
            // The restored timeline begins at the cut, and `before` is from before the cut.
            let after_restore = check(lab, &before, &format!("restore of {what}"), violations)?;
            findings.restored.add(&before, &after_restore);
            before = after_restore;
        } else {
            before = after;
        }
        if let Some(previous) = previous.replace(report.id) {
            remove(lab, ENVIRONMENT, &previous)?;
        }
        if n % 10 == 0 {
            say(format!(
                "consistency: {n} snapshots, {} restores, {} violations",
                findings.restores,
                violations.len()
            ));
        }
    }
    findings.pause_median_us = pauses.median();
    findings.pause_max_us = pauses.max();
    Ok(())
}

fn without_snapshots(
    lab: &Lab,
    length: Duration,
    findings: &mut Findings,
    violations: &mut Vec<String>,
) -> Result<(), Failure> {
    let end = Instant::now() + length;
    let mut before = Timed::take(lab)?;
    while Instant::now() < end {
        // About as long as a snapshot takes, and then the same look.
        lab::sleep(Duration::from_secs(1))?;
        let after = check(lab, &before, "control", violations)?;
        findings.control.add(&before, &after);
        before = after;
    }
    Ok(())
}

/// A reading and when it was taken.
#[derive(Debug, Clone)]
struct Timed {
    at: Instant,
    reading: Reading,
}

impl Timed {
    fn take(lab: &Lab) -> Result<Self, Failure> {
        Ok(Self { at: Instant::now(), reading: Reading::take(lab, ENVIRONMENT, MACHINES)? })
    }
}

/// Looks at the traffic now and again until every token has moved on at every machine; returns the last look.
fn check(lab: &Lab, before: &Timed, what: &str, violations: &mut Vec<String>) -> Result<Timed, Failure> {
    let first = Timed::take(lab)?;
    let mut last = first.clone();
    let mut standing = BTreeSet::new();
    for _ in 0..TOKEN_TRIES {
        lab::sleep(SETTLE)?;
        last = Timed::take(lab)?;
        standing = tokens_standing(&first.reading, &last.reading);
        if standing.is_empty() {
            break;
        }
    }
    if !standing.is_empty() {
        violations.push(format!("{what}: tokens lost: {standing:?}"));
    }
    let doubled: u64 = last.reading.of_kind("token-ring").map(|ring| ring.duplicates).sum();
    let doubled_before: u64 = before.reading.of_kind("token-ring").map(|ring| ring.duplicates).sum();
    if doubled > doubled_before {
        violations.push(format!("{what}: {} tokens doubled", doubled - doubled_before));
    }
    for (machine, (then, now)) in before.reading.0.iter().zip(&last.reading.0).enumerate() {
        for (then, now) in then.iter().zip(now) {
            if now.kind == "tcp-serve" && (now.connection != then.connection || now.state != "open") {
                violations
                    .push(format!("{what}: machine {machine}: the TCP session has changed ({})", now.state));
            }
            if now.bad_bytes > then.bad_bytes {
                violations
                    .push(format!("{what}: machine {machine}: {} bad bytes", now.bad_bytes - then.bad_bytes));
            }
        }
    }
    Ok(last)
}

/// The tokens that some machine has not seen between two readings.
fn tokens_standing(first: &Reading, last: &Reading) -> BTreeSet<String> {
    let mut standing = BTreeSet::new();
    for (first, last) in first.of_kind("token-ring").zip(last.of_kind("token-ring")) {
        standing.extend(
            first
                .last_hops
                .iter()
                .filter(|(token, hops)| last.last_hops.get(*token) <= Some(*hops))
                .map(|(token, _)| token.clone()),
        );
        if last.last_hops.len() != TOKENS {
            standing.insert(format!("only {} of {TOKENS} known", last.last_hops.len()));
        }
    }
    standing
}

impl Suffered {
    /// Adds what happened between two readings of one timeline.
    fn add(&mut self, before: &Timed, after: &Timed) {
        let grown = |kind: &str, field: fn(&load::Program) -> u64| {
            let sum = |timed: &Timed| timed.reading.of_kind(kind).map(field).sum::<u64>();
            sum(after).saturating_sub(sum(before))
        };
        self.seconds += after.at.duration_since(before.at).as_secs_f64();
        self.udp_received += grown("udp-recv", |program| program.received);
        // A gap that is filled later was reordering: `lost` goes down again then.
        self.udp_lost += grown("udp-recv", |program| program.lost);
        self.udp_duplicated += grown("udp-recv", |program| program.duplicated + program.too_old);
        self.udp_reordered += grown("udp-recv", |program| program.reordered);
        self.tcp_bytes += grown("tcp-serve", |program| program.bytes);
        self.tcp_retransmits += grown("tcp-send", |program| program.retransmits)
            + grown("tcp-serve", |program| program.retransmits);
        self.token_hops += grown("token-ring", |program| program.hops);
    }
}

fn judge(findings: &Findings, violations: &mut Vec<String>) {
    if findings.unaccounted != 0 {
        violations.push(format!("{} frames unaccounted", findings.unaccounted));
    }
    type Field = (&'static str, fn(&Suffered) -> u64);
    let fields: [Field; 4] = [
        ("datagrams lost", |suffered| suffered.udp_lost),
        ("datagrams doubled", |suffered| suffered.udp_duplicated),
        ("datagrams reordered", |suffered| suffered.udp_reordered),
        ("TCP segments sent again", |suffered| suffered.tcp_retransmits),
    ];
    for (what, field) in fields {
        for (timeline, suffered) in [("continued", &findings.continued), ("restored", &findings.restored)] {
            let (here, control) = (field(suffered), field(&findings.control));
            if here > control {
                violations.push(format!("{timeline} timeline: {here} {what}, {control} without snapshots"));
            }
        }
    }
}

fn text(findings: &Findings, violations: usize) -> String {
    let header = ["", "continued", "restored", "without snapshots"];
    let row = |name: &str, field: &dyn Fn(&Suffered) -> String| {
        vec![name.to_owned(), field(&findings.continued), field(&findings.restored), field(&findings.control)]
    };
    let rows = [
        row("seconds", &|suffered| format!("{:.0}", suffered.seconds)),
        row("token hops", &|suffered| suffered.token_hops.to_string()),
        row("UDP datagrams received", &|suffered| suffered.udp_received.to_string()),
        row("UDP lost", &|suffered| suffered.udp_lost.to_string()),
        row("UDP duplicated", &|suffered| suffered.udp_duplicated.to_string()),
        row("UDP reordered", &|suffered| suffered.udp_reordered.to_string()),
        row("TCP bytes checked", &|suffered| suffered.tcp_bytes.to_string()),
        row("TCP retransmissions", &|suffered| suffered.tcp_retransmits.to_string()),
    ];
    format!(
        "{} live snapshots and {} restores of four machines that pass {TOKENS} tokens, two UDP streams and two TCP\n\
         sessions: {} frames in flight recorded, {} delivered again by restores, {} unaccounted, {} machines cut\n\
         undrained; pause {} ms (median), {} ms (max). Violations: {violations}.\n\n{}\n",
        findings.snapshots,
        findings.restores,
        findings.in_flight,
        findings.in_flight_replayed,
        findings.unaccounted,
        findings.drain_incomplete,
        ms(findings.pause_median_us),
        ms(findings.pause_max_us),
        table(&header, &rows)
    )
}
