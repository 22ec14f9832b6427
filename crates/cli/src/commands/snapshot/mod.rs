//! `diorama snapshot`.

mod create;
mod diff;
mod extract;
mod list;
mod prune;
mod rm;
mod show;
mod verify;

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;

/// Take, look at, prove, compare, extract and delete snapshots
///
/// A snapshot holds a whole environment at one causally consistent cut: every machine's memory, devices and disks, and
/// every frame that was in flight. It is there completely or not at all.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  diorama snapshot create before-upgrade -m 'all green'
  diorama snapshot list
  diorama restore before-upgrade")]
pub enum Command {
    Create(create::Arguments),
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    Show(show::Arguments),
    Verify(verify::Arguments),
    Diff(diff::Arguments),
    Extract(extract::Arguments),
    Rm(rm::Arguments),
    Prune(prune::Arguments),
}

/// What can be refused without asking anybody.
///
/// # Errors
/// When the command line is wrong.
pub fn check(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Prune(arguments) => prune::check(arguments),
        _ => Ok(()),
    }
}

/// Runs one of them.
///
/// # Errors
/// When it fails.
pub async fn run(command: Command, session: &Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Create(arguments) => create::run(arguments, session).await,
        Command::List(arguments) => list::run(arguments, session).await,
        Command::Show(arguments) => show::run(arguments, session).await,
        Command::Verify(arguments) => verify::run(arguments, session).await,
        Command::Diff(arguments) => diff::run(arguments, session).await,
        Command::Extract(arguments) => extract::run(arguments, session).await,
        Command::Rm(arguments) => rm::run(arguments, session).await,
        Command::Prune(arguments) => prune::run(arguments, session).await,
    }
}
