//! `diorama fork`.

use clap::Args;
use diorama_api::ForkRequest;
use diorama_topology::EnvironmentName;

use crate::arguments::{environment_name, not_empty};
use crate::commands::restore;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::session::Session;

/// Start new environments from a snapshot
///
/// Each is a running copy of the whole: same machines, same addresses inside, isolated from the others and from the one
/// that the snapshot was taken of. Copies share memory and disks until they write.
///
/// With `--lazy` they run before their memory is there, as with `diorama restore --lazy`. Several copies then read the store
/// once, but each has memory of its own.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama fork base                        one copy, under a name that Diorama chooses
  diorama fork base --name trial           one copy called trial
  diorama fork base --count 4 --name run   run-1, run-2, run-3 and run-4
  diorama fork base --lazy                 one copy, running before its memory is there
  diorama fork base --json | jq -r '.environments[].environment'")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,

    /// How many
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,

    /// Call the new environment NAME; several become NAME-1, NAME-2 and so on
    #[arg(long, value_name = "NAME", value_parser = environment_name)]
    name: Option<EnvironmentName>,

    #[command(flatten)]
    memory: restore::MemoryArguments,
}

/// Forks.
///
/// # Errors
/// When the snapshot cannot be found, or a copy cannot be started; then there is none.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let mut progress = session.operation();
    let request = ForkRequest {
        snapshot: arguments.snapshot,
        environment: scope(session).map(|name| name.to_string()),
        count: Some(arguments.count),
        name: arguments.name.map(|name| name.to_string()),
        lazy: arguments.memory.lazy(),
        elapsed_us: session.elapsed_us(),
    };
    let report = session.client().fork(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || report.environments.iter().map(restore::describe).collect())?;
    Ok(0)
}
