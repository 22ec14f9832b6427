//! `diorama store`.

mod check;
mod gc;
mod stats;

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;

/// Look after the snapshot store: check it, give space back, count
///
/// The store keeps every page of memory and every piece of a disk once, whichever snapshots have it, compressed and in
/// packs of some MiB. It is in the folder `store` of DIORAMA_HOME.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  diorama store stats
  diorama store check --read-data
  diorama store gc --dry-run

See also: diorama snapshot prune, diorama snapshot verify")]
pub enum Command {
    Check(check::Arguments),
    Gc(gc::Arguments),
    Stats(stats::Arguments),
}

/// Runs one of them.
///
/// # Errors
/// When it fails.
pub async fn run(command: Command, session: &Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Check(arguments) => check::run(arguments, session).await,
        Command::Gc(arguments) => gc::run(arguments, session).await,
        Command::Stats(arguments) => stats::run(arguments, session).await,
    }
}
