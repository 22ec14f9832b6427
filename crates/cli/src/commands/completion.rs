//! `diorama completion`.

use clap::Args;
use clap_complete::env::Shells;
use diorama_api::ErrorKind;
use serde::Serialize;

use crate::completion::VARIABLE;
use crate::failure::Failure;
use crate::output::Output;

/// Print a script that lets a shell complete commands, flags and names
///
/// Names of environments, machines and snapshots are completed too, when an agent runs.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bash, in ~/.bashrc:                       source <(diorama completion bash)
  zsh, in ~/.zshrc:                         source <(diorama completion zsh)
  fish, in ~/.config/fish/config.fish:      diorama completion fish | source")]
pub struct Arguments {
    /// The shell
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(Shells::builtins().names()))]
    shell: String,
}

#[derive(Serialize)]
struct Document<'a> {
    shell: &'a str,
    script: String,
}

/// Prints it.
///
/// # Errors
/// When there is no such shell, or standard output cannot be written.
pub fn run(arguments: &Arguments, output: &Output) -> Result<u8, Failure> {
    let shells = Shells::builtins();
    let shell = shells.completer(&arguments.shell).ok_or_else(|| {
        Failure::new(ErrorKind::Invalid, format!("no shell called {}", arguments.shell), "see --help")
    })?;
    let mut script = Vec::new();
    shell
        .write_registration(VARIABLE, "diorama", "diorama", "diorama", &mut script)
        .map_err(|error| Failure::io(format!("cannot write the script: {error}")))?;
    let script = String::from_utf8_lossy(&script).into_owned();
    let document = Document { shell: &arguments.shell, script };
    output.result(&document, || document.script.clone())?;
    Ok(0)
}
