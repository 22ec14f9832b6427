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
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama restore before-upgrade
  diorama restore 3f9a               any unique beginning of an id
  diorama restore base -e scratch    make the environment `scratch` what the snapshot `base` holds
  diorama restore base --json | jq .ready_ms")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,
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
    text.push('\n');
    text
}

async fn restore(
    arguments: &Arguments,
    environment: Option<&str>,
    session: &Session<'_>,
) -> Result<RestoreReport, ClientError> {
    let mut progress = session.operation();
    let request = RestoreRequest { snapshot: arguments.snapshot.clone(), elapsed_us: session.elapsed_us() };
    session.client().restore(environment, &request, |notice| progress.show(notice)).await
}
