//! The cache of files that snapshots hold in pieces: disks' layers, kernels, initrds.
//!
//! `HOME/files/<root>` is such a file, whole; `<root>` is the root of its tree in the store. QEMU needs them whole and
//! as files, and environments give them a second name in their own folders. What an environment still has costs
//! nothing here; of what none has, [`UNUSED_BYTES_MAX`] is kept, the latest used, so that the next restore or fork copies
//! nothing.
//!
//! Invariant: everything here can be had from the store again. Nothing is handed out whose contents have not been checked.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use diorama_api::ApiError;
use diorama_store::{Address, Store, StoreError};

use crate::problem::{io_error, store_error};

/// How much of what no environment has is kept, in bytes on disk.
const UNUSED_BYTES_MAX: u64 = 4 << 30;
const NEW: &str = ".new-";

/// See the module.
#[derive(Debug)]
pub(crate) struct FileCache {
    folder: PathBuf,
    /// One file is loaded at a time: whoever else wants it finds it then.
    loading: Mutex<u64>,
    /// Read by those who have been handed a file and have not linked it yet; written to evict.
    using: RwLock<()>,
}

impl FileCache {
    /// Opens the cache and clears what an agent before left unfinished.
    pub(crate) fn open(home: &Path) -> Result<Self, ApiError> {
        let folder = home.join("files");
        fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        for entry in fs::read_dir(&folder).map_err(|error| io_error(&folder, &error))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(NEW) {
                remove(&entry.path());
            }
        }
        Ok(Self { folder, loading: Mutex::new(0), using: RwLock::new(()) })
    }

    /// While this is held, nothing that [`FileCache::get`] returns is evicted.
    pub(crate) fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.using.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file with these contents: checked, or loaded by `load`, which checks. Nobody may write to it.
    pub(crate) fn get(
        &self,
        store: &Store,
        root: &Address,
        bytes: u64,
        load: impl FnOnce(&File) -> Result<(), StoreError>,
    ) -> Result<PathBuf, ApiError> {
        let path = self.folder.join(root.to_string());
        let mut number = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if path.is_file() {
            match store.is_intact(&path, bytes, root) {
                Ok(true) => return Ok(path),
                Ok(false) => {
                    tracing::warn!(file = %path.display(), "a cached file has changed; it is loaded again")
                }
                Err(error) => tracing::warn!(%error, "a cached file cannot be read; it is loaded again"),
            }
            remove(&path);
        }
        *number += 1;
        let new = self.folder.join(format!("{NEW}{number}"));
        let file = File::create_new(&new).map_err(|error| io_error(&new, &error))?;
        let loaded = load(&file)
            .map_err(store_error)
            .and_then(|()| fs::rename(&new, &path).map_err(|error| io_error(&path, &error)));
        if loaded.is_err() {
            remove(&new);
        }
        loaded.map(|()| path)
    }

    /// Takes in a file that a snapshot has just stored, where that costs nothing.
    pub(crate) fn offer(&self, root: &Address, file: &Path) {
        // Not on another file system, or not with hard links, or there already: then it is loaded when it is needed.
        if let Err(error) = fs::hard_link(file, self.folder.join(root.to_string())) {
            tracing::debug!(file = %file.display(), %error, "not taken into the file cache");
        }
    }

    /// Evicts what nobody has used for longest, until what is left of it is within its bound.
    pub(crate) fn trim(&self) {
        // Somebody is restoring just now: the next time, then.
        let Ok(_evicting) = self.using.try_write() else { return };
        let _loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unused: Vec<(i64, u64, PathBuf)> = fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let found = entry.metadata().ok().filter(|found| found.nlink() == 1)?;
                // The time of its last linking or unlinking.
                Some((found.ctime(), found.blocks() * 512, entry.path()))
            })
            .collect();
        unused.sort();
        let mut total: u64 = unused.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in unused {
            if total <= UNUSED_BYTES_MAX {
                break;
            }
            remove(&path);
            total -= bytes;
        }
    }

    /// Forgets files that only this cache has.
    pub(crate) fn forget(&self, roots: impl Iterator<Item = Address>) {
        let Ok(_evicting) = self.using.try_write() else { return };
        for root in roots {
            let path = self.folder.join(root.to_string());
            if fs::symlink_metadata(&path).is_ok_and(|found| found.nlink() == 1) {
                remove(&path);
            }
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(file = %path.display(), %error, "cannot remove");
    }
}
