//! `diorama store`.

mod check;
mod gc;
mod init;
mod key;
mod stats;

use clap::Subcommand;

use crate::failure::Failure;
use crate::output::Output;
use crate::session::Session;

/// Look after the snapshot store: check it, give space back, count
///
/// The store keeps every page of memory and every piece of a disk once, whichever snapshots have it, compressed and in
/// packs of some MiB. It is in the folder `store` of DIORAMA_HOME, or where DIORAMA_STORE says.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  diorama store stats
  diorama store check --read-data
  diorama store gc --dry-run
  diorama store init --encrypt     before the first snapshot

See also: diorama snapshot prune, diorama snapshot verify")]
pub enum Command {
    Check(check::Arguments),
    Gc(gc::Arguments),
    Init(init::Arguments),
    #[command(subcommand)]
    Key(key::Command),
    Stats(stats::Arguments),
}

/// Runs those that need no agent.
///
/// # Errors
/// When it fails.
pub fn run_alone(command: &Command, output: &Output) -> Option<Result<u8, Failure>> {
    match command {
        Command::Init(arguments) => Some(init::run(arguments, output)),
        Command::Key(command) => Some(key::run(command, output)),
        _ => None,
    }
}

/// Runs one of the others.
///
/// # Errors
/// When it fails.
pub async fn run(command: Command, session: &Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Check(arguments) => check::run(arguments, session).await,
        Command::Gc(arguments) => gc::run(arguments, session).await,
        Command::Stats(arguments) => stats::run(arguments, session).await,
        Command::Init(_) | Command::Key(_) => unreachable!("they run without an agent"),
    }
}
