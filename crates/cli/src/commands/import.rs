//! `diorama import`.

use std::path::{Path, PathBuf};

use clap::Args;
use diorama_api::{ArrivalReport, ImportRequest, Stream};

use super::export::absolute;
use crate::arguments::not_empty;
use crate::failure::Failure;
use crate::output::printable;
use crate::pipe::{self, Pipe};
use crate::quantity::{bytes, short_id};
use crate::session::Session;

/// Take in a snapshot from a file that `diorama export` has written
///
/// Every byte is checked, and the snapshot is there completely or not at all. It keeps its id. What the store has
/// already takes no more space, and importing it again is no harm.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama import before-upgrade.diorama
  diorama import theirs.diorama --name theirs       where another snapshot has its name
  ssh other diorama export base -o - | diorama import -")]
pub struct Arguments {
    /// The file; `-` is standard input
    #[arg(value_hint = clap::ValueHint::FilePath)]
    file: PathBuf,

    /// What to call it here, instead of by its own name
    #[arg(long, value_parser = not_empty)]
    name: Option<String>,
}

/// Imports.
///
/// # Errors
/// When the file is damaged, or the snapshot's name is taken.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let Arguments { file, name } = arguments;
    let mut progress = session.operation();
    let report = if pipe::is_own(&file) {
        let pipe = Pipe::new(session.folders())?;
        let request = ImportRequest { from: pipe.stream(), name };
        let ask = async {
            let client = session.client();
            client.import_snapshot(&request, |notice| progress.show(notice)).await.map_err(Failure::from)
        };
        if file == Path::new(pipe::STANDARD) {
            tokio::try_join!(ask, pipe.pour_out_of(pipe::standard_input()?))?.0
        } else {
            let opened = tokio::fs::File::open(&file).await;
            let opened = opened.map_err(|error| Failure::io(format!("{}: {error}", file.display())))?;
            tokio::try_join!(ask, pipe.pour_out_of(opened))?.0
        }
    } else {
        let request = ImportRequest { from: Stream::File(absolute(&file)?), name };
        session.client().import_snapshot(&request, |notice| progress.show(notice)).await?
    };
    drop(progress);
    session.output().result(&report, || describe(&report, "imported"))?;
    Ok(0)
}

/// A snapshot that has come into a store, for people.
pub fn describe(report: &ArrivalReport, how: &str) -> String {
    let (name, id) = (printable(&report.name), printable(short_id(&report.id)));
    let environment = printable(&report.environment);
    if report.was_there && report.new_chunks == 0 {
        return format!("snapshot {name} ({id}) of {environment} was there already\n");
    }
    let there = if report.was_there { "was there already, and is mended" } else { how };
    format!(
        "snapshot {name} ({id}) of {environment} {there}: {} of {} chunks new, {}\n",
        report.new_chunks,
        report.chunks,
        bytes(report.new_bytes),
    )
}
