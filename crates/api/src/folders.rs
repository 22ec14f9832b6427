//! Where Diorama keeps things.
//!
//! - The **home** holds all durable state: `DIORAMA_HOME`, else `$XDG_DATA_HOME/diorama`, else
//!   `~/.local/share/diorama`.
//! - The **runtime folder** holds what lives no longer than the computer is on: sockets, and the cache of
//!   snapshots' memory, which must be on tmpfs so that a restored machine can be snapshotted live again.
//!   `DIORAMA_RUNTIME_DIR`, else `/dev/shm/diorama-UID-HASH` (HASH is of the home, so that several homes do
//!   not meet). It belongs to the user alone (mode 0700).
//!
//! - The **store** of snapshots: `DIORAMA_STORE`, else `store` in the home. Hosts of a cluster share one. It is a folder,
//!   or a place on a server (`s3://BUCKET/PREFIX`).
//!
//! Nothing is written anywhere else, except where the user said.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{ApiError, ErrorKind};

/// The two folders, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    home: PathBuf,
    runtime: PathBuf,
    store: OsString,
}

impl Folders {
    /// The folders that the process's environment variables choose.
    ///
    /// # Errors
    /// When no home can be found (neither `DIORAMA_HOME`, `XDG_DATA_HOME` nor `HOME` is set).
    pub fn from_process() -> Result<Self, ApiError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = variable("DIORAMA_HOME")
            .or_else(|| variable("XDG_DATA_HOME").map(|folder| folder.join("diorama")))
            .or_else(|| variable("HOME").map(|folder| folder.join(".local/share/diorama")))
            .ok_or_else(|| {
                ApiError::new(ErrorKind::Invalid, "no folder for Diorama's state: HOME is not set")
                    .hint("set DIORAMA_HOME to a folder of yours")
            })?;
        let home = std::path::absolute(&home)
            .map_err(|error| ApiError::new(ErrorKind::Io, format!("{}: {error}", home.display())))?;
        let runtime = match variable("DIORAMA_RUNTIME_DIR") {
            Some(folder) => std::path::absolute(&folder)
                .map_err(|error| ApiError::new(ErrorKind::Io, format!("{}: {error}", folder.display())))?,
            None => default_runtime(&home),
        };
        let store = match variable("DIORAMA_STORE") {
            Some(place) if is_url(place.as_os_str()) => place.into_os_string(),
            Some(folder) => std::path::absolute(&folder)
                .map_err(|error| ApiError::new(ErrorKind::Io, format!("{}: {error}", folder.display())))?
                .into_os_string(),
            None => home.join("store").into_os_string(),
        };
        Ok(Self { home, runtime, store })
    }

    /// Two given folders.
    pub fn new(home: impl Into<PathBuf>, runtime: impl Into<PathBuf>) -> Self {
        let home = home.into();
        Self { store: home.join("store").into_os_string(), home, runtime: runtime.into() }
    }

    /// Durable state.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Sockets and memory.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("agent.sock")
    }

    /// What the agent prints.
    pub fn agent_log(&self) -> PathBuf {
        self.home.join("agent.log")
    }

    /// Held while an agent starts or runs.
    pub fn agent_lock(&self) -> PathBuf {
        self.home.join("agent.lock")
    }

    /// Held by a client while it starts an agent, so that two commands do not start two.
    pub fn agent_start_lock(&self) -> PathBuf {
        self.home.join("agent-start.lock")
    }

    /// Environments' durable state and disks.
    pub fn environments(&self) -> PathBuf {
        self.home.join("environments")
    }

    /// The snapshot store: an absolute path, or an URL.
    pub fn store(&self) -> &OsStr {
        &self.store
    }

    /// Where built-in images are looked for, in this order: the home, beside the program
    /// (`../share/diorama/images`).
    pub fn image_folders(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.home.join("images")];
        if let Some(prefix) =
            std::env::current_exe().ok().as_deref().and_then(Path::parent).and_then(Path::parent)
        {
            folders.push(prefix.join("share/diorama/images"));
        }
        folders
    }

    /// Creates both folders, the user's alone.
    ///
    /// # Errors
    /// When a folder cannot be created, or belongs to somebody else.
    pub fn create(&self) -> Result<(), ApiError> {
        for folder in [&self.home, &self.runtime] {
            let failed = |error: std::io::Error| {
                ApiError::new(ErrorKind::Io, format!("cannot use {}: {error}", folder.display()))
                    .hint("set DIORAMA_HOME and DIORAMA_RUNTIME_DIR to folders that you may write")
            };
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
            let owner = std::fs::metadata(folder).map_err(failed)?.uid();
            let user = nix::unistd::geteuid().as_raw();
            if owner != user {
                return Err(ApiError::new(
                    ErrorKind::Io,
                    format!("{} belongs to user {owner}, not to you ({user})", folder.display()),
                )
                .hint("somebody else made this folder; set DIORAMA_RUNTIME_DIR to another one"));
            }
        }
        Ok(())
    }
}

fn is_url(place: &OsStr) -> bool {
    place.to_str().is_some_and(|place| place.contains("://"))
}

fn default_runtime(home: &Path) -> PathBuf {
    let user = nix::unistd::geteuid().as_raw();
    // FNV-1a: short, stable, and only to keep homes apart.
    let hash = home.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    PathBuf::from(format!("/dev/shm/diorama-{user}-{:08x}", hash >> 32))
}
