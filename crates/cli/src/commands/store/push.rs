//! `diorama store push`.

use clap::Args;
use diorama_api::TransferReport;

use crate::arguments::not_empty;
use crate::commands::import::describe;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::session::Session;

/// Copy snapshots to another store
///
/// Only what the other store lacks is moved, and each snapshot is there completely or not at all. A copy that was
/// interrupted goes on where it was. Snapshots keep their ids and names.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store push before after --to /mnt/backup/store
  diorama store push before --to s3://lab/diorama
  diorama store push 3f9a --to ../other/store --name theirs

See also: diorama store pull, diorama export")]
pub struct Arguments {
    /// Their names, their ids, or unique beginnings of their ids
    #[arg(required = true, value_parser = not_empty, add = completion::snapshots())]
    snapshots: Vec<String>,

    /// The other store: a folder, which is made if it is not there, or s3://BUCKET/PREFIX
    #[arg(long, value_name = "LOCATION", value_parser = not_empty, value_hint = clap::ValueHint::DirPath)]
    to: String,

    /// What to call it there, instead of by its own name: for a single one
    #[arg(long, value_parser = not_empty)]
    name: Option<String>,

    #[command(flatten)]
    secret: super::OtherSecret,
}

/// Copies.
///
/// # Errors
/// When there is no such snapshot, its name is taken there, or a store cannot be used.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let Arguments { snapshots, to, name, secret } = arguments;
    let request = super::transfer_request(snapshots, scope(session), &to, name, &secret)?;
    let mut progress = session.operation();
    let report = session.client().push_snapshots(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || text(&report, "copied there"))?;
    Ok(0)
}

/// What was copied, for people.
pub fn text(report: &TransferReport, how: &str) -> String {
    report.snapshots.iter().map(|snapshot| describe(snapshot, how)).collect()
}
