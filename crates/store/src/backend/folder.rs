//! A store in a folder.
//!
//! ```text
//! <root>/lock                        flock: held for moments
//! <root>/incoming/<random>/          one session: its `lock` is held as long as it lives
//!                          <n>       an object that it has staged
//! <root>/incoming/.tmp<random>       a small object on its way
//! <root>/<folder>/<name>             objects
//! ```
//!
//! # What is made durable when
//!
//! * A staged object is written, and the kernel asked to start writing it out; nothing is waited for.
//! * `publish` fsyncs each staged file, then renames each to its key, then fsyncs the folders that changed.
//! * `create` and `replace` write a new file, fsync it, rename it (`create` refuses what is there), fsync the folder.
//! * `remove` unlinks and fsyncs the folder.
//! * A folder is made durable when it is made.
//!
//! Hence a power cut leaves each object as it was before or after the call, and what was there before a call returned
//! is there whenever anything later is. Whoever dies within a call leaves at most files in `incoming/`, which
//! [`Backend::recover`] removes once their session's flock is free.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::{Backend, Object, Recovered, Session};
use crate::blocks::start_writing_out;
use crate::error::{Damage, StoreError};
use crate::files;

const LOCK_FILE: &str = "lock";
const INCOMING: &str = "incoming";

/// Objects as files below one folder.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// The folder must be there.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let root = fs::canonicalize(root).map_err(|e| StoreError::io("find", root, e))?;
        Ok(Self { root })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    fn incoming(&self) -> Result<PathBuf, StoreError> {
        let incoming = self.root.join(INCOMING);
        files::create_folders(&incoming)?;
        Ok(incoming)
    }

    /// Holds the store's lock until the file is dropped.
    fn lock(&self) -> Result<File, StoreError> {
        let path = self.root.join(LOCK_FILE);
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

    /// Writes an object aside, durably, and lets `place` give it its name. Under the lock, so that nobody takes the
    /// file for one that was left.
    fn put(
        &self,
        key: &str,
        bytes: &[u8],
        place: impl FnOnce(tempfile::TempPath, &Path) -> Result<bool, StoreError>,
    ) -> Result<bool, StoreError> {
        let path = self.path(key);
        let folder = parent(&path);
        create_durable_folder(&self.root, folder)?;
        let incoming = self.incoming()?;
        let _guard = self.lock()?;
        let temporary = tempfile::NamedTempFile::new_in(&incoming)
            .map_err(|e| StoreError::io("create a file in", &incoming, e))?;
        let needed = bytes.len() as u64;
        temporary
            .as_file()
            .write_all_at(bytes, 0)
            .map_err(|e| StoreError::io("write", &path, e).needing(needed))?;
        files::fsync(temporary.as_file(), &path).map_err(|e| e.needing(needed))?;
        let placed = place(temporary.into_temp_path(), &path)?;
        files::fsync_folder(folder)?;
        Ok(placed)
    }

    /// The sessions whose lock is free, and how many are not.
    fn abandoned(&self, failed: &mut Vec<StoreError>) -> Result<(Vec<Abandoned>, usize), StoreError> {
        let incoming = self.incoming()?;
        let _guard = self.lock()?;
        let (mut abandoned, mut alive) = (Vec::new(), 0);
        for entry in files::list(&incoming)? {
            let folder = entry.path();
            let path = folder.join(LOCK_FILE);
            match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path)
            {
                Ok(lock) => match lock.try_lock() {
                    Ok(()) => abandoned.push((folder, Some(lock))),
                    Err(TryLockError::WouldBlock) => alive += 1,
                    Err(TryLockError::Error(e)) => failed.push(StoreError::io("lock", &path, e)),
                },
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    abandoned.push((folder, None));
                }
                Err(error) => failed.push(StoreError::io("open", &path, error)),
            }
        }
        Ok((abandoned, alive))
    }
}

impl Backend for Folder {
    fn locate(&self, key: &str) -> PathBuf {
        self.path(key)
    }

    fn read(&self, key: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(key);
        let file = match files::open_stored(&path) {
            Err(StoreError::Corrupt { damage: Damage::Missing, .. }) => return Ok(None),
            opened => opened?,
        };
        let actual_bytes = files::metadata(&file, &path)?.len();
        if actual_bytes > limit_bytes {
            let damage = Damage::Length { expected_bytes: limit_bytes, actual_bytes };
            return Err(StoreError::corrupt(&path, damage));
        }
        let mut bytes = vec![0; actual_bytes as usize];
        file.read_exact_at(&mut bytes, 0).map_err(|error| files::read_failed(&path, None, &error))?;
        Ok(Some(bytes))
    }

    fn read_range(&self, key: &str, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let path = self.path(key);
        let file = files::open_stored(&path)?;
        file.read_exact_at(buffer, offset).map_err(|error| files::read_failed(&path, Some(offset), &error))
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError> {
        let path = self.path(folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::io("list", &path, error)),
        };
        let mut objects = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| StoreError::io("list", &path, e))?;
            // Relative to the open folder, so that it is cheap.
            let found = match entry.metadata() {
                Ok(found) => found,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(StoreError::io("examine", &entry.path(), error)),
            };
            let Ok(name) = entry.file_name().into_string() else { continue };
            let modified = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            objects.push(Object { name, bytes: found.len(), modified });
        }
        Ok(objects)
    }

    fn length(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let path = self.path(key);
        match fs::symlink_metadata(&path) {
            Ok(found) => Ok(Some(found.len())),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(StoreError::io("examine", &path, error)),
        }
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.put(key, bytes, |temporary, path| {
            if fs::symlink_metadata(path).is_ok() {
                return Ok(false);
            }
            match renameat2(AT_FDCWD, &*temporary, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) => {
                    // The name that it would remove is gone.
                    drop(temporary.keep());
                    Ok(true)
                }
                Err(nix::errno::Errno::EEXIST) => Ok(false),
                // A file system without that flag. Whoever else creates holds the lock first.
                Err(nix::errno::Errno::EINVAL) => {
                    temporary.persist(path).map_err(|e| StoreError::io("rename", path, e.error))?;
                    Ok(true)
                }
                Err(error) => Err(StoreError::io("rename", path, error.into())),
            }
        })
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let placed = self.put(key, bytes, |temporary, path| {
            temporary.persist(path).map_err(|e| StoreError::io("replace", path, e.error))?;
            Ok(true)
        });
        placed.map(drop)
    }

    fn remove(&self, key: &str, only: Option<&[u8]>) -> Result<bool, StoreError> {
        let path = self.path(key);
        let _guard = self.lock()?;
        if let Some(only) = only
            && self.read(key, only.len() as u64).ok().flatten().as_deref() != Some(only)
        {
            return Ok(false);
        }
        let removed = match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            // A folder in an object's place is damage; getting rid of it is what was asked.
            Err(error) if error.kind() == ErrorKind::IsADirectory => fs::remove_dir_all(&path),
            Err(error) => Err(error),
        };
        removed.map_err(|e| StoreError::io("remove", &path, e))?;
        files::fsync_folder(parent(&path))?;
        Ok(true)
    }

    fn begin(&self) -> Result<Box<dyn Session>, StoreError> {
        let incoming = self.incoming()?;
        let _guard = self.lock()?;
        let folder = tempfile::Builder::new()
            .prefix("")
            .rand_bytes(16)
            .tempdir_in(&incoming)
            .map(tempfile::TempDir::keep)
            .map_err(|e| StoreError::io("create a folder in", &incoming, e))?;
        let path = folder.join(LOCK_FILE);
        let lock = files::create_new(&path)?;
        lock.lock().map_err(|e| StoreError::io("lock", &path, e))?;
        let root = self.root.clone();
        let (next, staged) = (AtomicU64::new(0), Mutex::default());
        Ok(Box::new(FolderSession { root, folder, _lock: lock, next, staged, done: false }))
    }

    fn sessions(&self) -> Result<usize, StoreError> {
        let mut failed = Vec::new();
        let (_, alive) = self.abandoned(&mut failed)?;
        match failed.pop() {
            Some(error) => Err(error),
            None => Ok(alive),
        }
    }

    fn recover(&self) -> Result<Recovered, StoreError> {
        let mut recovered = Recovered::default();
        // The locks are kept until the folders are gone, so that no second recovery counts them too.
        let (abandoned, _) = self.abandoned(&mut recovered.failed)?;
        for (path, _lock) in abandoned {
            let removed = if path.is_dir() {
                files::remove_tree(&path)
            } else {
                // A file that was on its way is removed by its owner, who holds the lock; this one has none.
                fs::remove_file(&path).map(|()| 0).map_err(|e| StoreError::io("remove", &path, e))
            };
            match removed {
                Ok(bytes) => {
                    recovered.sessions += 1;
                    recovered.bytes += bytes;
                }
                Err(error) => recovered.failed.push(error),
            }
        }
        Ok(recovered)
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        let found = nix::sys::statvfs::statvfs(&self.root)
            .map_err(|e| StoreError::io("examine", &self.root, e.into()))?;
        Ok(Some(found.blocks_available().saturating_mul(found.fragment_size())))
    }
}

/// What a dead session has left, and its lock, if it had come so far as to have one.
type Abandoned = (PathBuf, Option<File>);

#[derive(Debug)]
struct FolderSession {
    root: PathBuf,
    folder: PathBuf,
    /// Released when the folder is gone; never read.
    _lock: File,
    next: AtomicU64,
    /// By key: the open file and where it is.
    staged: Mutex<BTreeMap<String, (File, PathBuf)>>,
    /// Nothing is left in `folder`.
    done: bool,
}

impl Session for FolderSession {
    fn stage(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.folder.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        let file = files::create_new(&path)?;
        let needed = bytes.len() as u64;
        let written =
            file.write_all_at(bytes, 0).map_err(|e| StoreError::io("write", &path, e).needing(needed));
        files::removing_on_error(&path, written)?;
        start_writing_out(&file, 0, needed);
        let mut staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        staged.insert(key.to_owned(), (file, path));
        Ok(())
    }

    fn publish(&self, keys: &[String]) -> Result<(), StoreError> {
        let taken: Vec<(PathBuf, File, PathBuf)> = {
            let mut staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
            let take = |key: &String| {
                let (file, path) = staged.remove(key).expect("only what was staged is published");
                (self.root.join(key), file, path)
            };
            keys.iter().map(take).collect()
        };
        for (destination, file, _) in &taken {
            create_durable_folder(&self.root, parent(destination))?;
            files::fsync(file, destination)?;
        }
        for (destination, _, path) in &taken {
            fs::rename(path, destination).map_err(|e| StoreError::io("rename", destination, e))?;
        }
        let folders: BTreeSet<&Path> = taken.iter().map(|(destination, ..)| parent(destination)).collect();
        folders.into_iter().try_for_each(files::fsync_folder)
    }

    /// The lock is held for as long as the process lives.
    fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn confirm(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn end(mut self: Box<Self>) -> Result<(), StoreError> {
        self.done = true;
        files::remove_tree(&self.folder).map(drop)
    }
}

impl Drop for FolderSession {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Err(error) = files::remove_tree(&self.folder) {
            // Recovery tries again.
            tracing::warn!(folder = %self.folder.display(), %error, "cannot remove what was staged");
        }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// Makes a folder below the root, and each new one's name durable in its parent.
fn create_durable_folder(root: &Path, folder: &Path) -> Result<(), StoreError> {
    if folder.is_dir() {
        return Ok(());
    }
    files::create_folders(folder)?;
    let mut at = folder;
    while at != root {
        at = parent(at);
        files::fsync_folder(at)?;
    }
    Ok(())
}
