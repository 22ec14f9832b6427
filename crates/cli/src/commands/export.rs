//! `diorama export`.

use std::path::{Path, PathBuf};

use clap::Args;
use diorama_api::{ErrorKind, ExportReport, ExportRequest, Stream};

use crate::arguments::not_empty;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, printable};
use crate::pipe::{self, Pipe};
use crate::quantity::{bytes, short_id};
use crate::session::Session;

/// Write a snapshot into one file, for another computer or a safe place
///
/// The file holds all that the store holds of the snapshot and nothing else, and `diorama import` checks every byte of
/// it. Disk images of yours that machines were made of are not in it; the command names them. The file is not
/// encrypted: it holds the machines' memory, with whatever keys and passwords are in that.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama export before-upgrade                          into before-upgrade.diorama
  diorama export before-upgrade -o /backup/before.diorama
  diorama export before-upgrade -o - | ssh other diorama import -")]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,

    /// The file; `-` is standard output (default: the snapshot's name and `.diorama`, in this folder)
    #[arg(short, long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    output: Option<PathBuf>,

    /// Write over a file that is there
    #[arg(short, long)]
    force: bool,
}

/// Refuses what cannot be done.
///
/// # Errors
/// When standard output would be two things, or is a terminal.
pub fn check(arguments: &Arguments, output: &Output) -> Result<(), Failure> {
    if arguments.output.as_deref() != Some(Path::new(pipe::STANDARD)) {
        return Ok(());
    }
    if output.json() {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "standard output cannot be the export and a JSON document",
            "name a file with --output, or leave out --json",
        ));
    }
    pipe::refuse_terminal()
}

/// Exports.
///
/// # Errors
/// When there is no such snapshot, or the file cannot be written.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let scope = scope.as_ref().map(AsRef::as_ref);
    let path = match arguments.output {
        Some(path) => path,
        None => {
            let name = session.client().snapshot(&arguments.snapshot, scope).await?.name;
            PathBuf::from(format!("{name}.diorama"))
        }
    };
    if pipe::is_own(&path) {
        return run_through_pipe(&arguments.snapshot, scope, &path, session).await;
    }
    let path = absolute(&path)?;
    let request = ExportRequest { to: Stream::File(path), force: arguments.force };
    let mut progress = session.operation();
    let report = session
        .client()
        .export_snapshot(&arguments.snapshot, scope, &request, |notice| progress.show(notice))
        .await?;
    drop(progress);
    session.output().result(&report, || text(&report))?;
    Ok(0)
}

async fn run_through_pipe(
    snapshot: &str,
    scope: Option<&str>,
    path: &Path,
    session: &Session<'_>,
) -> Result<u8, Failure> {
    let pipe = Pipe::new(session.folders())?;
    let request = ExportRequest { to: pipe.stream(), force: false };
    let mut progress = session.operation();
    let ask = async {
        let client = session.client();
        client
            .export_snapshot(snapshot, scope, &request, |notice| progress.show(notice))
            .await
            .map_err(Failure::from)
    };
    let report = if path == Path::new(pipe::STANDARD) {
        tokio::try_join!(ask, pipe.pour_into(pipe::standard_output()?))?.0
    } else {
        let file = tokio::fs::File::options().write(true).open(path).await;
        let file = file.map_err(|error| Failure::io(format!("{}: {error}", path.display())))?;
        tokio::try_join!(ask, pipe.pour_into(file))?.0
    };
    drop(progress);
    session.output().detail(|| text(&report).trim_end().to_owned());
    Ok(0)
}

fn text(report: &ExportReport) -> String {
    let to = report.file.as_ref().map_or_else(String::new, |file| format!(" to {}", file.display()));
    format!(
        "snapshot {} ({}) exported{}: {}\n",
        printable(&report.name),
        printable(short_id(&report.id)),
        printable(&to),
        bytes(report.file_bytes)
    )
}

/// A path that means the same to the agent.
///
/// # Errors
/// When the current folder is gone.
pub fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::io(format!("{}: {error}", path.display())))
}
