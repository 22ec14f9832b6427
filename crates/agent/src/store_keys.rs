//! What opens an encrypted store, and who may: `diorama store init` and `diorama store key`.
//!
//! A passphrase is in a file or comes through a pipe, and never on a command line, in a variable or in the log. The
//! functions here run in the process of the command that calls them, not in the agent: keys are slots in the store, and
//! an agent that has opened it goes on whatever becomes of them.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use diorama_api::{
    ApiError, ErrorKind, Folders, NewKeyFileReport, StoreInitReport, StoreKey, StoreKeyKind, StoreKeyList,
};
use diorama_store::{KeySlot, Keyring, OpenOptions, PassphraseCost, SecretError, Store};

use crate::problem::{io_error, store_error};
use crate::store_location;

/// What opens an encrypted store: a passphrase, or the contents of a key file.
pub use diorama_store::Secret;

/// Names the file that holds the passphrase, in its first line.
pub const PASSPHRASE_FILE: &str = "DIORAMA_STORE_PASSPHRASE_FILE";
/// Names the key file.
pub const KEY_FILE: &str = "DIORAMA_STORE_KEY_FILE";

/// Where a passphrase or a key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A file with a passphrase.
    PassphraseFile(PathBuf),
    /// A file of random bytes.
    KeyFile(PathBuf),
}

impl SecretSource {
    /// What the process's variables name, if they do.
    ///
    /// # Errors
    /// When they name two.
    pub fn from_process() -> Result<Option<Self>, ApiError> {
        match (variable(PASSPHRASE_FILE), variable(KEY_FILE)) {
            (Some(_), Some(_)) => Err(ApiError::new(
                ErrorKind::Invalid,
                format!("{PASSPHRASE_FILE} and {KEY_FILE} are both set"),
            )
            .hint("one of them opens the store: unset the other")),
            (Some(path), None) => Ok(Some(Self::PassphraseFile(path))),
            (None, path) => Ok(path.map(Self::KeyFile)),
        }
    }

    /// The variable that names it, and what it says, from whatever folder it is read.
    ///
    /// # Errors
    /// When there is no current folder.
    pub fn variable(&self) -> Result<(&'static str, PathBuf), ApiError> {
        let (name, path) = match self {
            Self::PassphraseFile(path) => (PASSPHRASE_FILE, path),
            Self::KeyFile(path) => (KEY_FILE, path),
        };
        Ok((name, std::path::absolute(path).map_err(|error| io_error(path, &error))?))
    }

    /// Reads it.
    ///
    /// # Errors
    /// When it cannot be read, or is too short to be one.
    pub fn read(&self) -> Result<Secret, ApiError> {
        match self {
            Self::PassphraseFile(path) => Secret::passphrase_file(path),
            Self::KeyFile(path) => Secret::key_file(path),
        }
        .map_err(secret_error)
    }
}

/// A passphrase that somebody has typed.
///
/// # Errors
/// When it is too short to be one.
pub fn passphrase(text: Vec<u8>) -> Result<Secret, ApiError> {
    Secret::passphrase(text.into()).map_err(secret_error)
}

fn secret_error(error: SecretError) -> ApiError {
    let kind = match error {
        SecretError::Read { .. } => ErrorKind::Io,
        _ => ErrorKind::Invalid,
    };
    ApiError::new(kind, error.to_string())
        .hint("a key file has 32 random bytes or more: `diorama store key new FILE` makes one")
}

/// Makes the store: encrypted when there is a secret.
///
/// # Errors
/// When there is something already, or it cannot be made.
pub fn init_store(
    folders: &Folders,
    secret: Option<&Secret>,
    label: &str,
) -> Result<StoreInitReport, ApiError> {
    let location = store_location(folders)?;
    let store = match secret {
        Some(secret) => Store::create_encrypted(&location, secret, PassphraseCost::default(), label),
        None => Store::open(&location),
    }
    .map_err(store_error)?;
    let key = match store.keyring() {
        Some(keyring) => keyring.slots().map_err(store_error)?.0.first().map(shown),
        None => None,
    };
    Ok(StoreInitReport { store: location.to_string(), encrypted: key.is_some(), key })
}

/// Who can open the store.
///
/// # Errors
/// When it is not encrypted, or cannot be opened.
pub fn list_keys(folders: &Folders, secret: Secret) -> Result<StoreKeyList, ApiError> {
    let (slots, damaged) = keyring(folders, secret)?.slots().map_err(store_error)?;
    Ok(StoreKeyList {
        keys: slots.iter().map(shown).collect(),
        damaged: damaged.iter().map(ToString::to_string).collect(),
    })
}

/// Lets another secret open the store, too.
///
/// # Errors
/// When it is not encrypted, or cannot be opened or written.
pub fn add_key(folders: &Folders, secret: Secret, new: &Secret, label: &str) -> Result<StoreKey, ApiError> {
    let added = keyring(folders, secret)?.add(new, PassphraseCost::default(), label);
    added.map(|slot| shown(&slot)).map_err(store_error)
}

/// Removes a key by its id or a unique beginning of it; gives its id.
///
/// # Errors
/// When there is no such key, or no other.
pub fn remove_key(folders: &Folders, secret: Secret, id: &str) -> Result<String, ApiError> {
    keyring(folders, secret)?.remove(id).map_err(store_error)
}

/// Makes a key file: 32 random bytes, in a new file of the user's alone.
///
/// # Errors
/// When it is there, or cannot be written.
pub fn new_key_file(path: &Path) -> Result<NewKeyFileReport, ApiError> {
    write_new(path, 0o600, &*diorama_store::random_key())?;
    let path = fs::canonicalize(path).map_err(|error| io_error(path, &error))?;
    Ok(NewKeyFileReport { file: path.display().to_string() })
}

/// Writes a file that is not there yet, durably.
pub(crate) fn write_new(path: &Path, mode: u32, content: &[u8]) -> Result<(), ApiError> {
    let created = File::options().write(true).create_new(true).mode(mode).open(path);
    created
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .map_err(|error| io_error(path, &error))
}

/// The file that a variable of the process names, if it does.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn keyring(folders: &Folders, secret: Secret) -> Result<Keyring, ApiError> {
    let options = OpenOptions { secret: Some(secret), signer: None };
    let store = Store::open_with(&store_location(folders)?, &options).map_err(store_error)?;
    Ok(store.keyring().cloned().expect("only an encrypted store opens with a secret"))
}

fn shown(slot: &KeySlot) -> StoreKey {
    StoreKey {
        id: slot.id.clone(),
        kind: if slot.passphrase { StoreKeyKind::Passphrase } else { StoreKeyKind::KeyFile },
        label: slot.label.clone(),
        created: slot.created.clone(),
    }
}
