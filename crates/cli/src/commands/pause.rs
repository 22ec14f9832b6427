//! `diorama pause`.

use clap::Args;
use diorama_api::MachinesRequest;

use crate::commands::status;
use crate::completion;
use crate::environment_choice::choose;
use crate::failure::Failure;
use crate::session::Session;

/// Stop machines' virtual CPUs
///
/// Their memory stays; frames for them wait in the switch, as far as its queues go. A paused machine can be
/// snapshotted and restored like any other.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama pause             every machine
  diorama pause server      only this one")]
pub struct Arguments {
    /// Machines; all when none is named
    #[arg(value_name = "MACHINE", value_parser = crate::arguments::not_empty, add = completion::machines())]
    machines: Vec<String>,
}

/// Pauses them.
///
/// # Errors
/// When there is no such machine, or it is in no state for this.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let name = choose(session).await?;
    let request = MachinesRequest { machines: arguments.machines };
    let mut progress = session.operation();
    let report = session.client().pause(name.as_ref(), &request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || status::describe(&report, session.output()))?;
    Ok(0)
}
