//! `diorama store check`.

use clap::Args;
use diorama_api::{ApiError, ErrorKind, StoreCheckReport, StoreCheckRequest};

use crate::failure::Failure;
use crate::output::{Output, printable};
use crate::quantity::{bytes, count};
use crate::session::Session;

/// Look whether the store is whole, and which snapshots are not if it is not
///
/// Without options: every pack's table, every manifest and every tree of hashes, which is quick. Snapshots may be taken
/// meanwhile.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store check
  diorama store check --read-data        also every byte of every pack, as for a disk that may be failing
  diorama store check --repair

What is lost cannot be made again here. The next snapshot that has the same contents stores them anew; a copy of the
damaged file from a backup, put in its place, mends it too.

Exit status: 0 nothing is wrong (any more); 1 something is, or it could not be read.")]
pub struct Arguments {
    /// Read and hash every byte, not only what describes it
    #[arg(long)]
    read_data: bool,

    /// Mend what can be made again from the rest: names of snapshots
    #[arg(long)]
    repair: bool,
}

/// Checks.
///
/// # Errors
/// When the store cannot be read. Damage is reported, with exit status 1.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let request = StoreCheckRequest { read_data: arguments.read_data, repair: arguments.repair };
    let mut progress = session.operation();
    let report = session.client().check_store(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    let wrong = (!report.ok).then(|| {
        let number = count(report.problems.len() as u64, "problem");
        ApiError::new(ErrorKind::Corrupt, format!("the store has {number}")).hint(
            "snapshots that are not named are whole; `diorama snapshot rm` removes one that cannot be mended",
        )
    });
    session.output().verdict(&report, wrong, || text(&report, session.output()))
}

fn text(report: &StoreCheckReport, output: &Output) -> String {
    let colour = output.colour();
    let verdict = if report.ok { colour.good("whole") } else { colour.bad("damaged") };
    let mut text = format!(
        "the store is {verdict}: {}, {}, {} checked, {} read\n",
        count(report.snapshots, "snapshot"),
        count(report.packs, "pack"),
        count(report.chunks, "chunk"),
        bytes(report.checked_bytes),
    );
    for (problems, what) in [(&report.problems, ""), (&report.repaired, "mended: ")] {
        for problem in problems {
            let (object, problem) = (printable(&problem.object), printable(&problem.problem));
            text.push_str(&format!("  {what}{object}: {problem}\n"));
        }
    }
    text
}
