//! `diorama snapshot create`.

use clap::{Args, ValueEnum};
use diorama_api::{CaptureMode, CreateSnapshotRequest, InFlightPolicy, SnapshotReport};

use crate::arguments::not_empty;
use crate::environment_choice::choose;
use crate::failure::Failure;
use crate::output::printable;
use crate::quantity::{bytes, count, microseconds, milliseconds, short_id};
use crate::session::Session;

/// Snapshot the whole environment while it runs
///
/// Each machine pauses for milliseconds. When this returns, the snapshot is complete and durable; if anything fails,
/// or you press Ctrl-C, there is none, and the machines run on as if nothing had been.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot create
  diorama snapshot create before-upgrade -m 'all green'
  diorama snapshot create --capture stop --in-flight drop     to compare: the paper's way
  diorama snapshot create --json | jq '[.machines[].pause_us] | max'")]
pub struct Arguments {
    /// Its name; one is chosen when it is left out
    #[arg(value_parser = not_empty)]
    name: Option<String>,

    /// A note for people
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,

    /// How memory is captured; `live` where this computer can, else `precopy`
    #[arg(long, value_name = "HOW")]
    capture: Option<Capture>,

    /// What becomes of frames in flight
    #[arg(long, value_name = "WHAT", default_value = "record")]
    in_flight: InFlight,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Capture {
    /// Milliseconds of pause; memory follows while the machines run
    Live,
    /// Memory is copied first, while the machines run; they stop for the rest
    Precopy,
    /// The machines stand still while their memory is copied
    Stop,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum InFlight {
    /// Recorded in the snapshot, and delivered
    Record,
    /// Dropped, as if the wire had lost them
    Drop,
}

/// Takes it.
///
/// # Errors
/// When the cut failed and was undone.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let name = choose(session).await?;
    let request = CreateSnapshotRequest {
        name: arguments.name,
        message: arguments.message,
        capture: arguments.capture.map(|capture| match capture {
            Capture::Live => CaptureMode::Live,
            Capture::Precopy => CaptureMode::Precopy,
            Capture::Stop => CaptureMode::Stop,
        }),
        in_flight: match arguments.in_flight {
            InFlight::Record => InFlightPolicy::Record,
            InFlight::Drop => InFlightPolicy::Drop,
        },
    };
    let mut progress = session.operation();
    let report =
        session.client().create_snapshot(name.as_ref(), &request, |notice| progress.show(notice)).await?;
    drop(progress);
    let output = session.output();
    output.result(&report, || text(&report))?;
    if report.frames.unaccounted != 0 {
        output.warn(&format!(
            "{} frames are unaccounted for: a defect of Diorama; please report it with `diorama snapshot show {}`",
            report.frames.unaccounted,
            short_id(&report.id),
        ));
    }
    Ok(0)
}

fn text(report: &SnapshotReport) -> String {
    let pause_us = report.machines.iter().map(|machine| machine.pause_us).max().unwrap_or(0);
    format!(
        "snapshot {} ({}) of {}\n  {}, paused {} at most, skew {}, {} in flight\n  {} new, durable after {}\n",
        printable(&report.name),
        printable(short_id(&report.id)),
        printable(&report.environment),
        count(report.machines.len() as u64, "machine"),
        microseconds(pause_us),
        microseconds(report.cut.skew_us),
        count(report.frames.in_flight, "frame"),
        bytes(report.bytes.new),
        milliseconds(report.create_ms),
    )
}
