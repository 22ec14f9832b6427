//! `diorama store stats`.

use clap::Args;
use diorama_api::StoreStats;

use crate::failure::Failure;
use crate::output::{Output, lines};
use crate::quantity::bytes;
use crate::session::Session;

/// What the store holds, and what that takes
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store stats
  diorama store stats --json | jq '.logical_bytes / .stored_bytes'")]
pub struct Arguments {}

/// Counts.
///
/// # Errors
/// When the store cannot be read.
pub async fn run(_: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let stats = session.client().store_stats().await?;
    session.output().result(&stats, || text(&stats, session.output()))?;
    Ok(0)
}

fn text(stats: &StoreStats, output: &Output) -> String {
    let mut table = output.table();
    let mut row = |what: &str, value: String| {
        table.add_row([what.to_owned(), value]);
    };
    row("snapshots", stats.snapshots.to_string());
    if stats.damaged_snapshots > 0 {
        row("damaged snapshots", stats.damaged_snapshots.to_string());
    }
    row("their memory and disks", bytes(stats.logical_bytes));
    row("stored", bytes(stats.stored_bytes));
    row("of that, trees of hashes", bytes(stats.tree_bytes));
    let unused = stats.unused_bytes.map_or_else(|| "unknown: see `diorama store check`".to_owned(), bytes);
    row("of that, needed by none", unused);
    row("packs", stats.packs.to_string());
    row("different chunks", stats.chunks.to_string());
    row("index in the agent's memory", bytes(stats.index_bytes));
    lines(&table, "")
}
