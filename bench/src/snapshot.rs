//! What a snapshot costs running machines, against the ways that stop them longer.
//!
//! The three ways take turns on the same guests in one run, so that whatever else the computer does falls on all.

use std::time::Duration;

use clap::Args;
use diorama_api::{RestoreReport, SnapshotReport};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, Summary, ms, table, times};
use crate::lab::{self, Lab, say};
use crate::load::{self, Load};
use crate::standstill::Beats;

const ENVIRONMENT: &str = "bench";
const CAPTURES: [&str; 3] = ["live", "stop", "precopy"];

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Snapshots of each kind under each load
    #[arg(long, default_value_t = 20)]
    count: u32,
    /// Only machines that were booted, not restored ones
    #[arg(long)]
    booted_only: bool,
    /// Only live snapshots
    #[arg(long)]
    live_only: bool,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { count: 20, booted_only: false, live_only: false }
    }
}

/// One way under one load.
#[derive(Debug, Serialize)]
struct Row {
    load: &'static str,
    memory: &'static str,
    cores_used: f64,
    capture: &'static str,
    pause_us: Summary,
    stall_us: Summary,
    stall_beyond_pause_us: Summary,
    skew_us: Summary,
    create_ms: Summary,
    /// The longest time that a program in a guest stood still, from the command's start until after its end.
    standstill_ms: Summary,
    in_flight: u64,
    unaccounted: i64,
    drain_incomplete: u32,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let count = if common.quick { 3 } else { arguments.count };
    let captures = if arguments.live_only { &CAPTURES[..1] } else { &CAPTURES[..] };
    let mut rows = Vec::new();
    for (load, name) in [(Load::Light, "light"), (Load::Busy, "busy")] {
        let lab = Lab::new()?;
        say(format!("snapshot: starting four machines, {name}"));
        load::start(&lab, ENVIRONMENT, common.memory, load)?;
        let beats = Beats::start(&lab, ENVIRONMENT)?;
        rows.extend(measure(&lab, &beats, (name, "booted"), count, captures)?);
        if !arguments.booted_only {
            let base: SnapshotReport = lab.run(&["-e", ENVIRONMENT, "snapshot", "create", "base"])?;
            let _: RestoreReport = lab.run(&["-e", ENVIRONMENT, "restore", &base.id])?;
            rows.extend(measure(&lab, &beats, (name, "restored"), count, captures)?);
        }
    }
    let violations = rows
        .iter()
        .filter(|row| row.unaccounted != 0)
        .map(|row| {
            format!("snapshot: {} frames unaccounted ({}, {})", row.unaccounted, row.load, row.capture)
        })
        .collect();
    let json = serde_json::json!({ "memory_mib": common.memory, "rows": rows });
    Ok(Outcome { name: "snapshot", json, text: text(&rows, count, common.memory), violations })
}

fn measure(
    lab: &Lab,
    beats: &Beats,
    (load, memory): (&'static str, &'static str),
    count: u32,
    captures: &'static [&'static str],
) -> Result<Vec<Row>, Failure> {
    let cores_used = load::cores_used(lab, ENVIRONMENT)?;
    say(format!("snapshot: {load}, {memory}: machines use {cores_used:.2} cores"));
    let quiet_ms = beats.longest_gap(|| lab::sleep(Duration::from_secs(5)))?.1;
    say(format!("snapshot: without snapshots, programs stand still for {} ms at most", ms(quiet_ms * 1e3)));
    let mut taken: Vec<(Vec<SnapshotReport>, Sample)> = vec![Default::default(); captures.len()];
    for _ in 0..count {
        for (capture, (reports, standstills)) in captures.iter().zip(&mut taken) {
            let (report, gap_ms) = beats.longest_gap(|| {
                lab.run::<SnapshotReport>(&["-e", ENVIRONMENT, "snapshot", "create", "--capture", capture])
            })?;
            remove(lab, ENVIRONMENT, &report.id)?;
            reports.push(report);
            standstills.push(gap_ms);
        }
    }
    Ok(captures
        .iter()
        .zip(&taken)
        .map(|(capture, taken)| row(load, memory, cores_used, capture, taken))
        .collect())
}

fn row(
    load: &'static str,
    memory: &'static str,
    cores_used: f64,
    capture: &'static str,
    (reports, standstills): &(Vec<SnapshotReport>, Sample),
) -> Row {
    let machines = || reports.iter().flat_map(|report| &report.machines);
    let sample = |values: &mut dyn Iterator<Item = u64>| values.map(|value| value as f64).collect::<Sample>();
    let beyond =
        machines().map(|machine| machine.stall_us as f64 - machine.pause_us as f64).collect::<Sample>();
    Row {
        load,
        memory,
        cores_used,
        capture,
        pause_us: sample(&mut machines().map(|machine| machine.pause_us)).summary(),
        stall_us: sample(&mut machines().map(|machine| machine.stall_us)).summary(),
        stall_beyond_pause_us: beyond.summary(),
        skew_us: sample(&mut reports.iter().map(|report| report.cut.skew_us)).summary(),
        create_ms: sample(&mut reports.iter().map(|report| report.create_ms)).summary(),
        standstill_ms: standstills.summary(),
        in_flight: reports.iter().map(|report| report.frames.in_flight).sum(),
        unaccounted: reports.iter().map(|report| report.frames.unaccounted.abs()).sum(),
        drain_incomplete: machines().map(|machine| u32::from(machine.drain_incomplete)).sum(),
    }
}

fn text(rows: &[Row], count: u32, memory_mib: u64) -> String {
    let header = [
        "machines",
        "capture",
        "pause",
        "max",
        "stall",
        "max",
        "skew",
        "max",
        "create",
        "standstill",
        "max",
        "in flight",
        "unacc.",
        "undrained",
        "pause / live",
    ];
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let live = rows
                .iter()
                .find(|other| (other.load, other.memory, other.capture) == (row.load, row.memory, "live"));
            vec![
                format!("{}, {}", row.load, row.memory),
                row.capture.to_owned(),
                ms(row.pause_us.median),
                ms(row.pause_us.max),
                ms(row.stall_us.median),
                ms(row.stall_us.max),
                ms(row.skew_us.median),
                ms(row.skew_us.max),
                format!("{:.0}", row.create_ms.median),
                format!("{:.0}", row.standstill_ms.median),
                format!("{:.0}", row.standstill_ms.max),
                row.in_flight.to_string(),
                row.unaccounted.to_string(),
                row.drain_incomplete.to_string(),
                times(row.pause_us.median, live.map_or(0.0, |live| live.pause_us.median)),
            ]
        })
        .collect();
    let used: Vec<String> = rows
        .iter()
        .filter(|row| row.capture == "live")
        .map(|row| format!("{}, {}: {:.2} cores", row.load, row.memory, row.cores_used))
        .collect();
    format!(
        "Snapshots of four machines of {memory_mib} MiB, {count} of each kind, taken in turn. Milliseconds; medians, and\n\
         maxima beside them. Before the snapshots the machines used: {}. Standstill: the longest that a program in a\n\
         guest, which writes memory and the console 100 times a second, was not seen at work.\n\n{}\n",
        used.join("; "),
        table(&header, &lines)
    )
}

/// Deletes a snapshot.
pub(crate) fn remove(lab: &Lab, environment: &str, id: &str) -> Result<(), Failure> {
    let _: serde_json::Value = lab.run(&["-e", environment, "snapshot", "rm", id])?;
    Ok(())
}
