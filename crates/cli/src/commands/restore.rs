//! `diorama restore`.

use clap::Args;
use diorama_api::{ApiError, ClientError, ErrorKind, RestoreReport, RestoreRequest};

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::printable;
use crate::quantity::{count, milliseconds, short_id};
use crate::session::Session;

/// Take an environment back to a snapshot
///
/// Every machine's memory, devices and disks become what they were at the cut, the frames that were in flight are
/// delivered again, and all machines run on together. What has happened since is lost, unless it is in a snapshot. An
/// environment that is down is brought up. Without `--environment` it is the one that the snapshot was taken of.
///
/// With `--lazy` machines run at once, and their memory comes from the store as they touch it, and by itself: sooner to a
/// first answer where the store is far away or slow, and slower until all is there (`diorama status` says how far it is).
/// Until then the machines need this agent and the store. Memory that is in the cache is not loaded at all.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama restore before-upgrade
  diorama restore 3f9a               any unique beginning of an id
  diorama restore base -e scratch    make the environment `scratch` what the snapshot `base` holds
  diorama restore base --lazy        from a bucket far away: run at once, load meanwhile
  diorama restore base --json | jq .ready_ms")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,

    #[command(flatten)]
    memory: MemoryArguments,
}

/// When machines run, for `restore` and `fork`.
#[derive(Debug, Args)]
pub struct MemoryArguments {
    /// Let machines run before their memory is there
    #[arg(long, conflicts_with = "eager")]
    lazy: bool,

    /// Load all memory first (the default)
    #[arg(long)]
    eager: bool,
}

impl MemoryArguments {
    /// What was asked for, if anything.
    pub fn lazy(&self) -> Option<bool> {
        (self.lazy || self.eager).then_some(self.lazy)
    }
}

/// Restores.
///
/// # Errors
/// When the snapshot cannot be found or restored.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let report = match restore(&arguments, session.named().map(AsRef::as_ref), session).await {
        // Several environments have a snapshot of this name: in a folder with an environment file, its own is meant.
        Err(ClientError::Refused(ApiError { kind: ErrorKind::Ambiguous, message, hint })) => {
            match scope(session).filter(|_| session.named().is_none()) {
                Some(here) => restore(&arguments, Some(here.as_ref()), session).await?,
                None => return Err(Failure::Error(ApiError { kind: ErrorKind::Ambiguous, message, hint })),
            }
        }
        result => result?,
    };
    session.output().result(&report, || describe(&report))?;
    Ok(0)
}

/// A restored or forked environment, for people.
pub fn describe(report: &RestoreReport) -> String {
    let mut text = format!(
        "{} runs from snapshot {}: {} ready in {}",
        printable(&report.environment),
        printable(short_id(&report.snapshot)),
        count(report.machines.len() as u64, "machine"),
        milliseconds(report.ready_ms),
    );
    if report.in_flight_replayed > 0 {
        text.push_str(&format!(", {} in flight delivered", count(report.in_flight_replayed, "frame")));
    }
    if report.lazy {
        text.push_str("; memory is being loaded (`diorama status`)");
    }
    text.push('\n');
    text
}

async fn restore(
    arguments: &Arguments,
    environment: Option<&str>,
    session: &Session<'_>,
) -> Result<RestoreReport, ClientError> {
    let mut progress = session.operation();
    let request = RestoreRequest {
        snapshot: arguments.snapshot.clone(),
        lazy: arguments.memory.lazy(),
        elapsed_us: session.elapsed_us(),
    };
    session.client().restore(environment, &request, |notice| progress.show(notice)).await
}
