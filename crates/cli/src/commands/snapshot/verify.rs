//! `diorama snapshot verify`.

use std::path::PathBuf;

use clap::Args;
use diorama_api::{ApiError, ErrorKind, VerifyReport, VerifyRequest};

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, printable};
use crate::quantity::{bytes, count, short_id};
use crate::session::Session;

/// Prove a snapshot: read everything in it, and check every hash and the frame accounting
///
/// Says which part is damaged, where, and how. Nothing but the store is needed. A signature that is there has to be right;
/// with --signed-by, or where DIORAMA_TRUSTED_KEYS was set when the agent was started, there has to be one.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot verify before-upgrade
  diorama snapshot verify 3f9a --json | jq .problems
  diorama snapshot verify before-upgrade --signed-by alice.pub

Exit status: 0 nothing is wrong; 1 something is, or it could not be read.")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,

    /// A file of public keys, one of which must have signed it; may be given several times
    #[arg(long, value_name = "FILE")]
    signed_by: Vec<PathBuf>,
}

/// Proves it.
///
/// # Errors
/// When there is no such snapshot. Damage is reported, with exit status 1.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path)
            .map_err(|error| Failure::io(format!("cannot read {}: {error}", path.display())))
    };
    let signed_by = arguments.signed_by.iter().map(read).collect::<Result<_, _>>()?;
    let request = VerifyRequest { signed_by };
    let mut progress = session.operation();
    let report = session
        .client()
        .verify_snapshot(&arguments.snapshot, scope.as_ref().map(AsRef::as_ref), &request, |notice| {
            progress.show(notice);
        })
        .await?;
    drop(progress);
    let wrong = (!report.ok).then(|| {
        let number = count(report.problems.len() as u64, "problem");
        ApiError::new(ErrorKind::Corrupt, format!("snapshot {} has {number}", report.name))
            .hint("it can no longer be trusted; restore another, or remove it with `diorama snapshot rm`")
    });
    session.output().verdict(&report, wrong, || text(&report, session.output()))
}

fn text(report: &VerifyReport, output: &Output) -> String {
    let colour = output.colour();
    let verdict = if report.ok { colour.good("sound") } else { colour.bad("damaged") };
    let mut text = format!(
        "{} ({}) is {verdict}: {} checked, {} in flight, {} unaccounted\n",
        printable(&report.name),
        printable(short_id(&report.id)),
        bytes(report.checked_bytes),
        count(report.frames.in_flight, "frame"),
        report.frames.unaccounted,
    );
    if let Some(key) = &report.signature.key {
        text.push_str(&format!("  signed with key {}\n", printable(key)));
    }
    for problem in &report.problems {
        let place = problem.offset.map(|offset| format!(" at byte {offset}")).unwrap_or_default();
        text.push_str(&format!("  {}{place}: {}\n", printable(&problem.file), printable(&problem.problem)));
    }
    text
}
