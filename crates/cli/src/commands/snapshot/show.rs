//! `diorama snapshot show`.

use std::fmt::Write as _;

use clap::Args;
use diorama_api::{CaptureMode, DroppedReport, FramesReport, InFlightPolicy, SignatureState, SnapshotReport};

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::{bytes, count, microseconds, milliseconds, short_id, timestamp};
use crate::session::Session;

/// Show everything known of a snapshot
///
/// When and how it was taken, what the cut cost each machine, and what became of every frame.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot show before-upgrade
  diorama snapshot show 3f9a --json | jq .frames

PAUSE: the machine's virtual CPUs stood still. STALL: no frame could reach it.
SENT BEFORE: what the network owed before the senders' cuts, a copy for each receiver. All of it was
delivered before the receivers' cuts, in flight, or dropped: UNACCOUNTED is 0, or Diorama has a
defect.")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,
}

/// Shows it.
///
/// # Errors
/// When there is no such snapshot.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let report = session.client().snapshot(&arguments.snapshot, scope.as_ref().map(AsRef::as_ref)).await?;
    session.output().result(&report, || text(&report, session.output()))?;
    Ok(0)
}

fn text(report: &SnapshotReport, output: &Output) -> String {
    let colour = output.colour();
    let mut text = format!("{}\n", colour.strong(&printable(&report.name)));
    let mut fact = |name: &str, value: &str| {
        let _ = writeln!(text, "  {:<12} {}", name, printable(value));
    };
    fact("id", &report.id);
    fact("environment", &report.environment);
    fact("parent", report.parent.as_deref().map_or("none", short_id));
    fact("created", &timestamp(&report.created));
    if let Some(message) = &report.message {
        fact("message", message);
    }
    let how = match report.capture {
        CaptureMode::Live => "live",
        CaptureMode::Precopy => "precopy",
        CaptureMode::Stop => "stop",
    };
    let in_flight = match report.in_flight_policy {
        InFlightPolicy::Record => "recorded",
        InFlightPolicy::Drop => "dropped",
    };
    fact("capture", &format!("{how}; frames in flight {in_flight}"));
    fact(
        "cut",
        &format!(
            "epoch {}, skew {}, {}",
            report.cut.epoch,
            microseconds(report.cut.skew_us),
            count(u64::from(report.cut.hosts), "host"),
        ),
    );
    fact(
        "size",
        &format!(
            "{} as the machines see it, {} new in the store",
            bytes(report.bytes.logical),
            bytes(report.bytes.new)
        ),
    );
    let trusted = match report.signature.trusted {
        Some(true) => ", which is trusted here",
        Some(false) => ", which is not trusted here",
        None => "",
    };
    let signed = match (report.signature.state, &report.signature.key) {
        (SignatureState::Valid, Some(key)) => format!("with key {key}{trusted}"),
        (SignatureState::Wrong, _) => "wrongly: see `diorama snapshot verify`".to_owned(),
        _ => "by nobody".to_owned(),
    };
    fact("signed", &signed);
    fact("durable", &format!("after {}", milliseconds(report.create_ms)));
    text.push('\n');
    text.push_str(&machines(report, output));
    text.push('\n');
    text.push_str(&frames(report, output));
    text
}

fn machines(report: &SnapshotReport, output: &Output) -> String {
    let mut table = output.table();
    table.set_header(["MACHINE", "HOST", "STATE", "PAUSE", "STALL", "MEMORY", "USED", "DISKS"]);
    for machine in &report.machines {
        let disks: Vec<String> = machine
            .disks
            .iter()
            .map(|disk| format!("{} {}", printable(&disk.name), bytes(disk.bytes)))
            .collect();
        table.add_row([
            printable(&machine.name).into_owned(),
            printable(&machine.host).into_owned(),
            printable(&machine.state).into_owned(),
            microseconds(machine.pause_us),
            microseconds(machine.stall_us),
            bytes(machine.ram_bytes),
            bytes(machine.ram_used_bytes),
            if disks.is_empty() { "-".to_owned() } else { disks.join(", ") },
        ]);
    }
    let mut text = lines(&table, "  ");
    for machine in report.machines.iter().filter(|machine| machine.drain_incomplete) {
        let _ = writeln!(
            text,
            "  {}: it had not read every frame before it was stopped (has the guest a network driver?)",
            printable(&machine.name)
        );
    }
    text
}

fn frames(report: &SnapshotReport, output: &Output) -> String {
    let mut table = output.table();
    table.set_header(["NETWORK", "SENT BEFORE", "DELIVERED", "IN FLIGHT", "DROPPED", "UNACCOUNTED"]);
    let mut add = |name: &str, frames: &FramesReport| {
        table.add_row([
            printable(name).into_owned(),
            frames.sent_before.to_string(),
            frames.delivered_before.to_string(),
            frames.in_flight.to_string(),
            drops(&frames.dropped),
            frames.unaccounted.to_string(),
        ]);
    };
    for network in &report.networks {
        add(&network.name, &network.frames);
    }
    if report.networks.len() != 1 {
        add("(all)", &report.frames);
    }
    lines(&table, "  ")
}

fn drops(dropped: &DroppedReport) -> String {
    let DroppedReport { queue_full, link_loss, wire_loss, no_receiver, cut_drop } = *dropped;
    let reasons: Vec<String> = [
        (queue_full, "queue full"),
        (link_loss, "link loss"),
        (wire_loss, "wire loss"),
        (no_receiver, "no receiver"),
        (cut_drop, "in flight at the cut"),
    ]
    .into_iter()
    .filter(|(number, _)| *number > 0)
    .map(|(number, reason)| format!("{number} {reason}"))
    .collect();
    if reasons.is_empty() { "-".to_owned() } else { reasons.join(", ") }
}
