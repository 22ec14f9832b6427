//! `diorama snapshot diff`.

use clap::Args;
use diorama_api::{DiffReport, DiskDiff};

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::bytes;
use crate::session::Session;

/// Bytes in a page of memory.
const PAGE_BYTES: u64 = 4096;
/// Bytes in a cluster of a disk.
const CLUSTER_BYTES: u64 = 65536;

/// Compare two snapshots: how much of each machine's memory and disks differs, and which frames were in flight
///
/// Disks are compared as the guests see them, in clusters of 64 KiB.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot diff before after
  diorama snapshot diff before after --json | jq '.machines[] | {name, pages_changed}'")]
pub struct Arguments {
    /// The first: its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    from: String,

    /// The second
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    to: String,
}

/// Compares.
///
/// # Errors
/// When one does not exist or cannot be read.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let report = session
        .client()
        .diff_snapshots(&arguments.from, &arguments.to, scope.as_ref().map(AsRef::as_ref))
        .await?;
    session.output().result(&report, || text(&report, session.output()))?;
    Ok(0)
}

fn text(report: &DiffReport, output: &Output) -> String {
    let mut text = String::new();
    if !report.machines.is_empty() {
        let mut table = output.table();
        table.set_header(["MACHINE", "MEMORY CHANGED", "OF", "DEVICES", "DISK", "CHANGED", "OF"]);
        for machine in &report.machines {
            let clusters = |count: u64| bytes(count.saturating_mul(CLUSTER_BYTES));
            let disk = |disk: &DiskDiff| {
                let changed = disk.clusters_changed.map_or_else(|| "all".to_owned(), clusters);
                [printable(&disk.name).into_owned(), changed, clusters(disk.clusters)]
            };
            let none = || ["-".to_owned(), "-".to_owned(), "-".to_owned()];
            let mut disks = machine.disks.iter().map(disk);
            let first = disks.next().unwrap_or_else(none);
            let devices = if machine.state_changed { "changed" } else { "same" };
            let own = [
                printable(&machine.name).into_owned(),
                bytes(machine.pages_changed.saturating_mul(PAGE_BYTES)),
                bytes(machine.pages.saturating_mul(PAGE_BYTES)),
                devices.to_owned(),
            ];
            table.add_row(own.into_iter().chain(first));
            for disk in disks {
                table.add_row(std::iter::repeat_n(String::new(), 4).chain(disk));
            }
        }
        text.push_str(&lines(&table, ""));
    }
    for (names, which) in [(&report.only_from, "first"), (&report.only_to, "second")] {
        if !names.is_empty() {
            text.push_str(&format!("only in the {which}: {}\n", printable(&names.join(", "))));
        }
    }
    text.push_str(&format!(
        "frames in flight: {} in the first, {} in the second, {} in both\n",
        report.in_flight_from, report.in_flight_to, report.in_flight_both
    ));
    text
}
