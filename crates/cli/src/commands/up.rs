//! `diorama up`.

use std::path::PathBuf;

use clap::Args;
use diorama_api::UpRequest;
use diorama_topology::{Environment, EnvironmentName};

use crate::arguments::environment_name;
use crate::commands::status;
use crate::environment_file;
use crate::failure::Failure;
use crate::session::Session;

/// Start an environment from a file
///
/// Returns when every machine runs. An environment that was stopped with `diorama down` keeps its disks, and starts
/// from them.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama up                     the environment that ./diorama.yaml describes
  diorama up lab.yaml --name b   the one that lab.yaml describes, under another name
  generate-lab | diorama up -    a description from another program

A first environment file:
  name: pair
  machines:
    server: {image: micro, memory: 256MiB, nics: [{network: lan, address: 10.0.0.1/24}]}
    client: {image: micro, memory: 256MiB, nics: [{network: lan, address: 10.0.0.2/24}]}
  networks:
    lan: {}

`diorama schema` prints everything that may stand in it, `diorama validate FILE` checks one.")]
pub struct Arguments {
    /// The environment file; `-` reads standard input
    #[arg(default_value = environment_file::DEFAULT, value_hint = clap::ValueHint::FilePath)]
    file: PathBuf,

    /// Call the environment NAME, whatever the file says
    #[arg(long, value_name = "NAME", value_parser = environment_name)]
    name: Option<EnvironmentName>,
}

/// Reads the file. `--name` and `--environment` both name the environment that is to be.
///
/// # Errors
/// When the file is wrong or cannot be read.
pub fn read(arguments: &Arguments, named: Option<&EnvironmentName>) -> Result<Environment, Failure> {
    let environment = environment_file::read(&arguments.file)?;
    Ok(match arguments.name.as_ref().or(named) {
        Some(name) => environment.renamed(name.clone()),
        None => environment,
    })
}

/// Starts it.
///
/// # Errors
/// When it does not start.
pub async fn run(environment: Environment, session: &Session<'_>) -> Result<u8, Failure> {
    let request = UpRequest { specification: environment };
    let mut progress = session.operation();
    let report = session.client().up(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || status::describe(&report, session.output()))?;
    Ok(0)
}
