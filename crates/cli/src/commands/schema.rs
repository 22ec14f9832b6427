//! `diorama schema`.

use clap::Args;

use crate::failure::Failure;
use crate::output::Output;

/// Print the JSON Schema of the environment file
///
/// Editors that know the schema complete and check the file while it is written.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama schema > diorama.schema.json
  then, as the first line of diorama.yaml (for editors with a YAML language server):
    # yaml-language-server: $schema=./diorama.schema.json")]
pub struct Arguments {}

/// Prints it: with and without `--json`, it is a JSON document.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(_arguments: &Arguments, output: &Output) -> Result<u8, Failure> {
    let schema = diorama_topology::schema();
    output.result(&schema, || format!("{schema:#}\n"))?;
    Ok(0)
}
