//! `diorama store init`.

use clap::Args;
use diorama_agent::store_keys::{SecretSource, init_store};
use diorama_api::Folders;

use crate::failure::Failure;
use crate::output::{Output, printable};
use crate::secret::{self, NewSecret};

/// Make the store, encrypted if wanted
///
/// A store that is not encrypted is made by itself when it is needed. One that is has to be made by this command, before
/// the first command that starts an agent (or elsewhere, with DIORAMA_STORE): a store is encrypted from its beginning or never. Everything in it then is, names too. What
/// machines have in memory and on their disks while they run is not in the store.
///
/// Whoever loses every passphrase and key file has lost the snapshots.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store init --encrypt                          asks for a passphrase
  diorama store key new ~/store.key
  diorama store init --encrypt --key-file ~/store.key
  export DIORAMA_STORE_KEY_FILE=~/store.key             for what comes after

Without arguments, the passphrase is in the file that DIORAMA_STORE_PASSPHRASE_FILE names, or the
key is the file that DIORAMA_STORE_KEY_FILE names, or it is asked for.")]
pub struct Arguments {
    /// Encrypt everything in it
    #[arg(long)]
    encrypt: bool,

    #[command(flatten)]
    secret: NewSecret,

    /// What to call the passphrase or key file in `diorama store key list`
    #[arg(long, value_name = "TEXT", default_value = "", requires = "encrypt")]
    label: String,
}

/// Makes it.
///
/// # Errors
/// When there is one, or it cannot be made.
pub fn run(arguments: &Arguments, output: &Output) -> Result<u8, Failure> {
    let folders = Folders::from_process()?;
    let secret = match arguments.secret.given()? {
        Some(_) if !arguments.encrypt => {
            return Err(Failure::new(
                diorama_api::ErrorKind::Invalid,
                "a passphrase or key file without --encrypt",
                "say `diorama store init --encrypt` for a store that it opens",
            ));
        }
        None if arguments.encrypt => Some(match SecretSource::from_process()? {
            Some(source) => source.read()?,
            None => secret::typed_twice()?,
        }),
        given => given,
    };
    let report = init_store(&folders, secret.as_ref(), &arguments.label)?;
    output.result(&report, || {
        let kind = if report.encrypted { "an encrypted store" } else { "a store" };
        format!("{} is {kind} now\n", printable(&report.store))
    })?;
    Ok(0)
}
