//! The store's folder: its format, its lock, and what crashes have left in it.
//!
//! Locks are flocks, so that a crash releases them. Two kinds:
//!
//! * `<root>/lock`, held for moments: while a folder in `incoming/` is made and locked, while a snapshot's name is
//!   checked and its folder moved, and while leftovers are looked for. Hence whoever holds it knows that a folder in
//!   `incoming/` whose own lock is free has no owner.
//! * `<root>/incoming/<random>/lock`, held by a [`Writer`] for its life.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::StoreError;
use crate::files;
use crate::id::SnapshotId;
use crate::known::KnownHashes;
use crate::write::Writer;

const FORMAT: &str = "diorama-store/0";
const FORMAT_FILE: &str = "format";
const LOCK_FILE: &str = "lock";
const FOLDERS: [&str; 3] = ["snapshots", "incoming", "blobs"];
/// The lock that a writer holds, in its folder.
pub(crate) const WRITER_LOCK_FILE: &str = "lock";

/// A folder of snapshots. Cheap to clone; usable from several threads, and by several processes at once.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    known: KnownHashes,
}

/// What [`Store::recover`] did.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Half-written and half-removed snapshots that were removed.
    pub snapshots: usize,
    /// Blobs that no snapshot used and that were removed.
    pub blobs: usize,
    /// What that gave back to the file system.
    pub bytes: u64,
    /// What could not be removed, and why. Tried again next time.
    pub failed: Vec<StoreError>,
}

impl Store {
    /// Opens the store in this folder, makes it where there is none, and removes what a crash has left.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        files::create_folders(root)?;
        let root = fs::canonicalize(root).map_err(|e| StoreError::io("find", root, e))?;
        let store = Self { inner: Arc::new(Inner { root, known: KnownHashes::default() }) };
        store.check_format()?;
        let recovered = store.recover()?;
        for error in &recovered.failed {
            tracing::warn!(%error, "cannot remove what a crash has left in the store");
        }
        Ok(store)
    }

    /// Removes half-written and half-removed snapshots that nobody is working on, and blobs that nobody uses.
    pub fn recover(&self) -> Result<Recovered, StoreError> {
        let mut recovered = Recovered::default();
        // The locks are kept until the folders are gone, so that no second recovery counts them too.
        for (folder, _lock) in self.abandoned(&mut recovered.failed)? {
            match files::remove_tree(&folder) {
                Ok(bytes) => {
                    recovered.snapshots += 1;
                    recovered.bytes += bytes;
                }
                Err(error) => recovered.failed.push(error),
            }
        }
        for blob in files::list(&self.blobs())? {
            match self.remove_blob_if_unused(&blob.path()) {
                Ok(None) => {}
                Ok(Some(bytes)) => {
                    recovered.blobs += 1;
                    recovered.bytes += bytes;
                }
                Err(error) => recovered.failed.push(error),
            }
        }
        Ok(recovered)
    }

    /// Starts writing a snapshot.
    pub fn begin(&self) -> Result<Writer, StoreError> {
        let _guard = self.lock()?;
        let folder = self.new_incoming()?;
        let path = folder.join(WRITER_LOCK_FILE);
        let lock = files::create_new(&path)?;
        lock.lock().map_err(|e| StoreError::io("lock", &path, e))?;
        Ok(Writer::new(self.clone(), folder, lock))
    }

    /// How much an unprivileged user may still write to the store's file system, in bytes.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        let found = nix::sys::statvfs::statvfs(self.root())
            .map_err(|e| StoreError::io("examine", self.root(), e.into()))?;
        Ok(found.blocks_available().saturating_mul(found.fragment_size()))
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    pub(crate) fn known(&self) -> &KnownHashes {
        &self.inner.known
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root().join("snapshots")
    }

    pub(crate) fn incoming(&self) -> PathBuf {
        self.root().join("incoming")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root().join("blobs")
    }

    pub(crate) fn folder(&self, id: &SnapshotId) -> PathBuf {
        self.snapshots().join(id.to_string())
    }

    /// Holds the store's lock until the file is dropped.
    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        let path = self.root().join(LOCK_FILE);
        // A file description of its own for each caller: flock excludes threads of one process too.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| StoreError::io("open", &path, e))?;
        file.lock().map_err(|e| StoreError::io("lock", &path, e))?;
        Ok(file)
    }

    /// An empty folder in `incoming/`. Without a lock in it, it belongs to whoever recovers next.
    pub(crate) fn new_incoming(&self) -> Result<PathBuf, StoreError> {
        let incoming = self.incoming();
        tempfile::Builder::new()
            .prefix("")
            .rand_bytes(16)
            .tempdir_in(&incoming)
            .map(tempfile::TempDir::keep)
            .map_err(|e| StoreError::io("create a folder in", &incoming, e))
    }

    /// Removes a name in `blobs/` that is the file's only one. Returns what that freed.
    ///
    /// A writer that takes the blob just now either has its own link already, and keeps the contents, or does not
    /// find the name, and stores the contents again.
    pub(crate) fn remove_blob_if_unused(&self, blob: &Path) -> Result<Option<u64>, StoreError> {
        let found = match fs::symlink_metadata(blob) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("examine", blob, error)),
        };
        if !found.is_file() || found.nlink() > 1 {
            return Ok(None);
        }
        match fs::remove_file(blob) {
            Ok(()) => Ok(Some(files::allocated_bytes(&found))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("remove", blob, error)),
        }
    }

    fn check_format(&self) -> Result<(), StoreError> {
        let path = self.root().join(FORMAT_FILE);
        if !path.exists() {
            // Looked at before the lock is made, so that nothing is left in a folder that is not ours.
            self.check_is_new()?;
        }
        let _guard = self.lock()?;
        match read_short(&path) {
            Ok(found) if found.trim_end() == FORMAT => {}
            Ok(found) => {
                return Err(StoreError::UnsupportedStore {
                    path: self.root().to_owned(),
                    found: found.trim_end().to_owned(),
                    expected: FORMAT,
                });
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.make_folders()?;
                return files::replace(&path, format!("{FORMAT}\n").as_bytes());
            }
            Err(error) => return Err(StoreError::io("read", &path, error)),
        }
        // Somebody may have removed an empty folder.
        self.make_folders()
    }

    fn make_folders(&self) -> Result<(), StoreError> {
        FOLDERS.iter().try_for_each(|folder| files::create_folders(&self.root().join(folder)))
    }

    /// Making a store may have been interrupted at any step; anything else than its traces is not ours.
    fn check_is_new(&self) -> Result<(), StoreError> {
        for entry in files::list(self.root())? {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let ours = FOLDERS.contains(&&*name)
                || [LOCK_FILE, FORMAT_FILE].contains(&&*name)
                || name.starts_with(".tmp");
            if !ours {
                return Err(StoreError::NotAStore { path: self.root().to_owned() });
            }
        }
        Ok(())
    }

    /// The folders in `incoming/` that nobody is working on, with their locks where they have one.
    fn abandoned(&self, failed: &mut Vec<StoreError>) -> Result<Vec<(PathBuf, Option<File>)>, StoreError> {
        let _guard = self.lock()?;
        let mut abandoned = Vec::new();
        for entry in files::list(&self.incoming())? {
            let folder = entry.path();
            let path = folder.join(WRITER_LOCK_FILE);
            match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)
            {
                Ok(lock) => match lock.try_lock() {
                    Ok(()) => abandoned.push((folder, Some(lock))),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(e)) => failed.push(StoreError::io("lock", &path, e)),
                },
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    abandoned.push((folder, None));
                }
                Err(error) => failed.push(StoreError::io("open", &path, error)),
            }
        }
        Ok(abandoned)
    }
}

/// The start of a file that should be one line.
fn read_short(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(256).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
