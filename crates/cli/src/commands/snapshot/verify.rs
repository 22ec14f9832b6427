//! `diorama snapshot verify`.

use clap::Args;
use diorama_api::{ApiError, ErrorKind, VerifyReport};

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, printable};
use crate::quantity::{bytes, count, short_id};
use crate::session::Session;

/// Prove a snapshot: read everything in it, and check every hash and the frame accounting
///
/// Says which part is damaged, where, and how.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot verify before-upgrade
  diorama snapshot verify 3f9a --json | jq .problems

Exit status: 0 nothing is wrong; 1 something is, or it could not be read.")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,
}

/// Proves it.
///
/// # Errors
/// When there is no such snapshot. Damage is reported, with exit status 1.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let mut progress = session.operation();
    let report = session
        .client()
        .verify_snapshot(&arguments.snapshot, scope.as_ref().map(AsRef::as_ref), |notice| {
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
    for problem in &report.problems {
        let place = problem.offset.map(|offset| format!(" at byte {offset}")).unwrap_or_default();
        text.push_str(&format!("  {}{place}: {}\n", printable(&problem.file), printable(&problem.problem)));
    }
    text
}
