//! `diorama store gc`.

use clap::Args;
use diorama_api::{StoreGcReport, StoreGcRequest};

use crate::failure::Failure;
use crate::quantity::{bytes, count};
use crate::session::Session;

/// Give back the space of what no snapshot needs
///
/// `snapshot rm` and `snapshot prune` do this by themselves. By hand it is of use after a snapshot or a removal was
/// interrupted, or to pack more tightly. Snapshots may be taken meanwhile: then what can go is marked, and goes the
/// next time.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store gc --dry-run
  diorama store gc --max-unused 0        leave nothing, however much has to be written again for it")]
pub struct Arguments {
    /// Only say what would be done
    #[arg(long, short = 'n')]
    dry_run: bool,

    /// Write packs again of which more than this percentage is not needed (default: 30)
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    max_unused: Option<u8>,
}

/// Collects.
///
/// # Errors
/// When it cannot be known what is needed, or something cannot be written or removed.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let request = StoreGcRequest { dry_run: arguments.dry_run, max_unused_percent: arguments.max_unused };
    let mut progress = session.operation();
    let report = session.client().collect_store(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || text(&report))?;
    Ok(0)
}

fn text(report: &StoreGcReport) -> String {
    let mut text = format!(
        "{} need about {}; about {} is needed by none\n",
        count(report.snapshots, "snapshot"),
        bytes(report.needed_bytes),
        bytes(report.unused_bytes),
    );
    let to_do = format!(
        "{} to remove, {} to write again",
        count(report.packs_to_remove, "pack"),
        report.packs_to_repack
    );
    text.push_str(&if report.dry_run {
        format!("{to_do}: would free about {}\n", bytes(report.freed_bytes))
    } else if report.deferred {
        format!("{to_do}: marked, to be removed by the next `diorama store gc`\n")
    } else {
        format!("{} removed, {} freed\n", count(report.removed_packs, "pack"), bytes(report.freed_bytes))
    });
    text
}
