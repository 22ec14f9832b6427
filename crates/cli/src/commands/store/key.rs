//! `diorama store key`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use diorama_agent::store_keys::{add_key, list_keys, new_key_file, remove_key};
use diorama_api::{ApiError, ErrorKind, Folders, StoreKeyAdded, StoreKeyKind, StoreKeyList, StoreKeyRemoved};

use crate::arguments::not_empty;
use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::timestamp;
use crate::secret::{self, NewSecret};

/// Say who can open an encrypted store
///
/// Each passphrase or key file that opens it has a key of its own in the store, which can be removed without the others.
/// Whoever has opened the store before may have kept what is behind the key: removing it shuts out who learns the passphrase
/// later, and nobody else.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  diorama store key list
  diorama store key add --label laptop      asks for a new passphrase
  diorama store key add --key-file backup.key
  diorama store key rm 3f9a
  diorama store key new store.key           a new key file; opens nothing yet

What opens the store already is in the file that DIORAMA_STORE_PASSPHRASE_FILE or
DIORAMA_STORE_KEY_FILE names, or is asked for.")]
pub enum Command {
    Add(AddArguments),
    List(ListArguments),
    Rm(RmArguments),
    New(NewArguments),
}

/// Let another passphrase or key file open the store
#[derive(Debug, Args)]
pub struct AddArguments {
    #[command(flatten)]
    secret: NewSecret,

    /// What to call it in the list
    #[arg(long, value_name = "TEXT", default_value = "")]
    label: String,
}

/// Show what opens the store
#[derive(Debug, Args)]
pub struct ListArguments {}

/// Remove a key: its passphrase or file opens the store no more
#[derive(Debug, Args)]
pub struct RmArguments {
    /// Its id, or a unique beginning of it
    #[arg(value_name = "ID", value_parser = not_empty)]
    id: String,
}

/// Make a key file: 32 random bytes
#[derive(Debug, Args)]
pub struct NewArguments {
    /// Where; it must not be there
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs one of them.
///
/// # Errors
/// When it fails.
pub fn run(command: &Command, output: &Output) -> Result<u8, Failure> {
    let folders = Folders::from_process()?;
    match command {
        Command::Add(arguments) => {
            let present = secret::present()?;
            let new = match arguments.secret.given()? {
                Some(new) => new,
                None => secret::typed_twice()?,
            };
            let added = add_key(&folders, present, &new, &arguments.label)?;
            output.result(&StoreKeyAdded { added: added.clone() }, || {
                format!("added {}: {}\n", added.id, kind(added.kind))
            })?;
            Ok(0)
        }
        Command::List(_) => {
            let list = list_keys(&folders, secret::present()?)?;
            let wrong = (!list.damaged.is_empty()).then(|| {
                ApiError::new(ErrorKind::Corrupt, format!("damaged: {}", list.damaged.join("; ")))
                    .hint("`diorama store key rm` removes a damaged one; `add` makes another")
            });
            output.verdict(&list, wrong, || text(&list, output))
        }
        Command::Rm(arguments) => {
            let removed = remove_key(&folders, secret::present()?, &arguments.id)?;
            output
                .result(&StoreKeyRemoved { removed: removed.clone() }, || format!("removed {removed}\n"))?;
            Ok(0)
        }
        Command::New(arguments) => {
            let report = new_key_file(&arguments.file)?;
            output.result(&report, || {
                format!("{} is a key file now; keep a copy elsewhere\n", printable(&report.file))
            })?;
            Ok(0)
        }
    }
}

fn kind(kind: StoreKeyKind) -> &'static str {
    match kind {
        StoreKeyKind::Passphrase => "a passphrase",
        StoreKeyKind::KeyFile => "a key file",
    }
}

fn text(list: &StoreKeyList, output: &Output) -> String {
    let mut table = output.table();
    table.set_header(["ID", "WHAT", "ADDED", "LABEL"]);
    for key in &list.keys {
        table.add_row([
            key.id.clone(),
            kind(key.kind).to_owned(),
            timestamp(&key.created).to_string(),
            printable(&key.label).into_owned(),
        ]);
    }
    lines(&table, "")
}
