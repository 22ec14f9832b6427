//! `diorama store pull`.

use clap::Args;

use crate::arguments::not_empty;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::session::Session;

/// Copy snapshots from another store
///
/// Only what this store lacks is moved, and each snapshot is here completely or not at all. A copy that was interrupted
/// goes on where it was. Snapshots keep their ids and names.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store pull before --from /mnt/backup/store
  diorama store pull pair/before --from /mnt/backup/store --name theirs

See also: diorama store push, diorama import")]
pub struct Arguments {
    /// Their names, their ids, or unique beginnings of their ids, in the other store
    #[arg(required = true, value_parser = not_empty)]
    snapshots: Vec<String>,

    /// The other store: a folder, or s3://BUCKET/PREFIX
    #[arg(long, value_name = "LOCATION", value_parser = not_empty, value_hint = clap::ValueHint::DirPath)]
    from: String,

    /// What to call it here, instead of by its own name: for a single one
    #[arg(long, value_parser = not_empty)]
    name: Option<String>,

    #[command(flatten)]
    secret: super::OtherSecret,
}

/// Copies.
///
/// # Errors
/// When there is no such snapshot, its name is taken here, or a store cannot be used.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let Arguments { snapshots, from, name, secret } = arguments;
    let request = super::transfer_request(snapshots, scope(session), &from, name, &secret)?;
    let mut progress = session.operation();
    let report = session.client().pull_snapshots(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || super::push::text(&report, "copied here"))?;
    Ok(0)
}
