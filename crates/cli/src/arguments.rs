//! The command line's shape: what every command takes, and how a wrong command line is refused.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as Refused;
use diorama_api::{ApiError, ErrorBody, ErrorKind};
use diorama_topology::EnvironmentName;

use crate::commands::Command;
use crate::completion;

/// Run networks of virtual machines, and take causally consistent snapshots of the whole while it runs.
///
/// An environment is the machines and networks that one file describes. Start it, snapshot it without
/// stopping it, roll it back, and fork it into many running copies.
#[derive(Debug, Parser)]
#[command(
    name = "diorama",
    version,
    disable_help_subcommand = true,
    infer_subcommands = false,
    max_term_width = 100,
    after_long_help = "\
Examples:
  diorama up                         start the environment that ./diorama.yaml describes
  diorama exec server -- ip addr     run a command in a machine
  diorama snapshot create before     snapshot everything, live
  diorama restore before             roll everything back
  diorama fork before --count 4      four running copies, isolated from one another
  diorama doctor                     what this computer can do, and how to mend what is missing

Exit status: 0 done; 1 failed; 2 wrong command line or environment file; 130 interrupted.
Files: DIORAMA_HOME (default $XDG_DATA_HOME/diorama or ~/.local/share/diorama) holds all state,
DIORAMA_RUNTIME_DIR (default below /dev/shm) sockets and the cache of snapshots' memory."
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,

    /// The environment to act on
    ///
    /// May be left out inside a folder with a `diorama.yaml`, and where there is only one environment.
    #[arg(
        short,
        long,
        global = true,
        value_name = "NAME",
        env = "DIORAMA_ENVIRONMENT",
        hide_env_values = true,
        value_parser = environment_name,
        add = completion::environments()
    )]
    pub environment: Option<EnvironmentName>,

    /// Print exactly one JSON document on standard output
    ///
    /// Also when the command fails: {"error": {"kind": …, "message": …, "hint": …}}.
    #[arg(long, global = true)]
    pub json: bool,

    /// Say more on standard error
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Arguments {
    /// The process's own arguments.
    ///
    /// # Errors
    /// A [`Refusal`] when they are wrong, and when they ask for help or the version.
    pub fn from_process() -> Result<Self, Refusal> {
        let arguments: Vec<OsString> = std::env::args_os().collect();
        Self::try_parse_from(&arguments).map_err(|error| Refusal { error, json: wants_json(&arguments) })
    }
}

/// A command line that is not run.
#[derive(Debug)]
pub struct Refusal {
    error: clap::Error,
    json: bool,
}

impl Refusal {
    /// Prints help, version or what is wrong, and gives the exit status.
    pub fn exit(self) -> ExitCode {
        let is_wrong = self.error.use_stderr();
        if is_wrong && self.json {
            let text = self.error.to_string();
            let message = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default().trim();
            let message = match self.error.kind() {
                Refused::DisplayHelpOnMissingArgumentOrSubcommand | Refused::MissingSubcommand => {
                    "no command is named"
                }
                _ => message,
            };
            let error = ApiError::new(ErrorKind::Invalid, message).hint("see `diorama --help`");
            // Nobody to tell when standard output is closed; the exit status still says it.
            let _ = crate::output::write_document(&ErrorBody { error });
        } else {
            let _ = self.error.print();
        }
        // Asking for help is no failure; everything else here is a wrong command line.
        ExitCode::from(if is_wrong { 2 } else { 0 })
    }
}

/// A name that is not empty: an empty part would change a path's meaning.
pub fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// An environment's name.
pub fn environment_name(text: &str) -> Result<EnvironmentName, String> {
    text.parse().map_err(|error: diorama_topology::NameError| error.to_string())
}

/// Whether `--json` stands among the arguments that are Diorama's own (those before `--`).
fn wants_json(arguments: &[OsString]) -> bool {
    arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json")
}
