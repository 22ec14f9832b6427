//! `diorama validate`.

use std::path::PathBuf;

use clap::Args;
use diorama_topology::Environment;
use serde::Serialize;

use crate::environment_file;
use crate::failure::Failure;
use crate::output::Output;
use crate::quantity::count;

/// Check an environment file
///
/// Says everything that is wrong with it, each with line, column and what would be right. Starts nothing. With `--json`
/// it prints the environment with every default filled in.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama validate lab.yaml
  diorama validate lab.yaml --json | jq .environment.machines
  generate-lab | diorama validate -

Exit status: 0 it is in order; 2 it is not.")]
pub struct Arguments {
    /// The environment file; `-` reads standard input
    #[arg(default_value = environment_file::DEFAULT, value_hint = clap::ValueHint::FilePath)]
    file: PathBuf,
}

#[derive(Serialize)]
struct Document {
    file: String,
    environment: Environment,
}

/// Checks.
///
/// # Errors
/// When it is wrong or cannot be read.
pub fn run(arguments: &Arguments, output: &Output) -> Result<u8, Failure> {
    let environment = environment_file::read(&arguments.file)?;
    let document = Document { file: arguments.file.display().to_string(), environment };
    output.result(&document, || {
        format!(
            "{}: environment {} with {} and {}\n",
            document.file,
            document.environment.name,
            count(document.environment.machines.len() as u64, "machine"),
            count(document.environment.networks.len() as u64, "network"),
        )
    })?;
    Ok(0)
}
