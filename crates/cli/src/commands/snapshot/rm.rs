//! `diorama snapshot rm`.

use clap::Args;
use diorama_api::{ApiError, RemoveReport};
use serde::Serialize;

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::printable;
use crate::quantity::{bytes, short_id};
use crate::session::Session;

/// Delete snapshots
///
/// What other snapshots and running environments need stays; the space of the rest is given back (as `diorama store gc`
/// does). A deleted snapshot cannot be brought back.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot rm before-upgrade
  diorama snapshot rm 3f9a 71c0 old")]
pub struct Arguments {
    /// Their names, ids, or unique beginnings of ids
    #[arg(required = true, value_name = "SNAPSHOT", value_parser = not_empty, add = completion::snapshots())]
    snapshots: Vec<String>,
}

#[derive(Serialize)]
struct Document {
    removed: Vec<RemoveReport>,
}

/// Deletes them, one after another.
///
/// # Errors
/// When one cannot be deleted; the message says which were before it.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let scope = scope.as_ref().map(AsRef::as_ref);
    let mut removed: Vec<RemoveReport> = Vec::new();
    for query in &arguments.snapshots {
        match session.client().remove_snapshot(query, scope).await {
            Ok(report) => removed.push(report),
            Err(error) => {
                let mut error = ApiError::from(error);
                if !removed.is_empty() {
                    let names: Vec<&str> = removed.iter().map(|report| report.name.as_str()).collect();
                    error.message = format!("{} (deleted before that: {})", error.message, names.join(", "));
                }
                return Err(error.into());
            }
        }
    }
    let document = Document { removed };
    session.output().result(&document, || {
        document
            .removed
            .iter()
            .map(|report| {
                format!(
                    "deleted {} ({}), {} freed\n",
                    printable(&report.name),
                    printable(short_id(&report.id)),
                    bytes(report.freed_bytes)
                )
            })
            .collect()
    })?;
    Ok(0)
}
