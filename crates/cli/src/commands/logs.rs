//! `diorama logs`.

use clap::Args;
use diorama_api::ErrorKind;
use serde::Serialize;

use crate::completion;
use crate::environment_choice::choose;
use crate::failure::Failure;
use crate::output::Output;
use crate::session::Session;

/// The most that `--json` puts into one document.
const DOCUMENT_BYTES_MAX: usize = 64 << 20;

/// Show what a machine's serial console has printed
///
/// The bytes are the guest's own, unchanged.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama logs server           all of it
  diorama logs server -n 20     the last 20 lines
  diorama logs server -f        and what it prints from now on, until Ctrl-C")]
pub struct Arguments {
    /// The machine
    #[arg(value_parser = crate::arguments::not_empty, add = completion::machines())]
    machine: String,

    /// Go on with what it prints from now on
    #[arg(short, long)]
    follow: bool,

    /// Only the last LINES lines
    #[arg(short = 'n', long, value_name = "LINES")]
    lines: Option<u64>,
}

#[derive(Serialize)]
struct Document<'a> {
    environment: &'a str,
    machine: &'a str,
    /// What is no UTF-8 is replaced.
    log: String,
}

/// Refuses what cannot be done.
///
/// # Errors
/// When an endless log should become one document.
pub fn check(arguments: &Arguments, output: &Output) -> Result<(), Failure> {
    if arguments.follow && output.json() {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "a log that goes on is not one JSON document",
            "leave out --follow or --json",
        ));
    }
    Ok(())
}

/// Shows it.
///
/// # Errors
/// When there is no such machine.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let name = choose(session).await?;
    let mut log =
        session.client().log(name.as_ref(), &arguments.machine, arguments.follow, arguments.lines).await?;
    if !session.output().json() {
        while let Some(chunk) = log.chunk().await? {
            session.output().raw(&chunk)?;
        }
        return Ok(0);
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = log.chunk().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(Failure::new(
                ErrorKind::Invalid,
                format!("the log is longer than {DOCUMENT_BYTES_MAX} bytes"),
                "ask for fewer lines with -n, or leave out --json",
            ));
        }
    }
    let document = Document {
        environment: name.as_ref(),
        machine: &arguments.machine,
        log: String::from_utf8_lossy(&bytes).into_owned(),
    };
    session.output().result(&document, String::new)?;
    Ok(0)
}
