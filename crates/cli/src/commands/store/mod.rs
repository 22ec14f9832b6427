//! `diorama store`.

mod check;
mod gc;
mod init;
mod key;
mod pull;
mod push;
mod signer;
mod stats;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use diorama_api::{ErrorKind, SecretFile, TransferRequest};
use diorama_topology::EnvironmentName;

use crate::failure::Failure;
use crate::output::Output;
use crate::session::Session;

/// Look after the snapshot store: check it, give space back, count, copy to others
///
/// The store keeps every page of memory and every piece of a disk once, whichever snapshots have it, compressed and in
/// packs of some MiB. It is in the folder `store` of DIORAMA_HOME, or where DIORAMA_STORE says.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  diorama store stats
  diorama store check --read-data
  diorama store gc --dry-run
  diorama store init --encrypt     before the first `diorama up`
  diorama store push before --to /mnt/backup/store

See also: diorama snapshot prune, diorama snapshot verify")]
pub enum Command {
    Check(check::Arguments),
    Gc(gc::Arguments),
    Init(init::Arguments),
    #[command(subcommand)]
    Key(key::Command),
    Signer(signer::Arguments),
    Stats(stats::Arguments),
    Push(push::Arguments),
    Pull(pull::Arguments),
}

/// Runs those that need no agent.
///
/// # Errors
/// When it fails.
pub fn run_alone(command: &Command, output: &Output) -> Option<Result<u8, Failure>> {
    match command {
        Command::Init(arguments) => Some(init::run(arguments, output)),
        Command::Key(command) => Some(key::run(command, output)),
        Command::Signer(arguments) => Some(signer::run(arguments, output)),
        _ => None,
    }
}

/// Runs one of the others.
///
/// # Errors
/// When it fails.
pub async fn run(command: Command, session: &Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Check(arguments) => check::run(arguments, session).await,
        Command::Gc(arguments) => gc::run(arguments, session).await,
        Command::Stats(arguments) => stats::run(arguments, session).await,
        Command::Init(_) | Command::Key(_) | Command::Signer(_) => unreachable!("they run without an agent"),
        Command::Push(arguments) => push::run(arguments, session).await,
        Command::Pull(arguments) => pull::run(arguments, session).await,
    }
}

/// What opens the other store.
#[derive(Debug, Args)]
#[group(multiple = false)]
struct OtherSecret {
    /// The key file that opens the other store, where it is encrypted
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    key_file: Option<PathBuf>,

    /// A file whose first line is the passphrase that opens the other store
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    passphrase_file: Option<PathBuf>,
}

impl OtherSecret {
    fn file(&self) -> Result<Option<SecretFile>, Failure> {
        Ok(match (&self.key_file, &self.passphrase_file) {
            (Some(path), _) => Some(SecretFile::Key(super::export::absolute(path)?)),
            (None, Some(path)) => Some(SecretFile::Passphrase(super::export::absolute(path)?)),
            (None, None) => None,
        })
    }
}

/// A request to copy snapshots; the other store is where it is from here.
fn transfer_request(
    snapshots: Vec<String>,
    environment: Option<EnvironmentName>,
    location: &str,
    name: Option<String>,
    secret: &OtherSecret,
) -> Result<TransferRequest, Failure> {
    let location = if location.contains("://") {
        location.to_owned()
    } else {
        let path = super::export::absolute(std::path::Path::new(location))?;
        path.into_os_string().into_string().map_err(|path| {
            Failure::new(
                ErrorKind::Invalid,
                format!("the path {} is not UTF-8", path.display()),
                "give the folder another name",
            )
        })?
    };
    Ok(TransferRequest {
        snapshots,
        environment: environment.map(|environment| environment.to_string()),
        location,
        name,
        secret: secret.file()?,
    })
}
