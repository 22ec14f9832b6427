//! Single files and folders: opened without being led astray, created once, made durable, linked.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::blocks::{self, SparseWriter};
use crate::error::{Damage, StoreError};

/// How [`link_file`] did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linked {
    /// The two names share one file.
    Hard,
    /// The destination is a sparse copy: the file system is another one, or has no hard links.
    Copied,
}

/// Gives an immutable file a second name, by a hard link where that is possible, else by a sparse copy.
///
/// An environment that restores a snapshot takes the layers into its own folder with this, so that the snapshot can
/// be removed under it. Neither name may ever be written through.
pub fn link_file(source: &Path, destination: &Path) -> Result<Linked, StoreError> {
    // linkat does not follow a symbolic link: it would give the link itself a second name.
    let real = fs::canonicalize(source).map_err(|e| StoreError::io("find", source, e))?;
    match fs::hard_link(&real, destination) {
        Ok(()) => return Ok(Linked::Hard),
        Err(error) if is_unlinkable(&error) => {}
        Err(error) => return Err(StoreError::io("link", destination, error)),
    }
    let from = open_source(&real)?;
    let bytes = metadata(&from, &real)?.len();
    let to = create_new(destination)?;
    let copied = copy_sparse(&from, &real, &to, destination, bytes);
    removing_on_error(destination, copied)?;
    Ok(Linked::Copied)
}

/// Whether a hard link cannot be, although the file could be copied.
pub(crate) fn is_unlinkable(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EXDEV | libc::EPERM | libc::EMLINK | libc::EOPNOTSUPP | libc::ENOSYS)
    )
}

fn copy_sparse(
    from: &File,
    from_path: &Path,
    to: &File,
    to_path: &Path,
    bytes: u64,
) -> Result<(), StoreError> {
    let mut writer = SparseWriter::new(to, to_path, bytes)?;
    blocks::walk(
        from,
        bytes,
        |_, e| StoreError::io("read", from_path, e),
        |block| writer.write(&block).map(drop),
    )?;
    fsync(to, to_path)
}

/// Opens a file that the store holds. Whatever is there instead of a regular file is damage, and is not opened
/// in a way that could block or lead elsewhere.
pub(crate) fn open_stored(path: &Path) -> Result<File, StoreError> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let damage = match opened {
        Ok(file) if metadata(&file, path)?.is_file() => return Ok(file),
        Ok(_) => Damage::NotAFile,
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Damage::Missing,
            Some(libc::ELOOP | libc::ENXIO) => Damage::NotAFile,
            Some(libc::EIO) => unreadable(None, &error),
            _ => return Err(StoreError::io("open", path, error)),
        },
    };
    Err(StoreError::corrupt(path, damage))
}

/// A stored file's bytes were promised; not getting them is damage, whatever the reason.
pub(crate) fn read_failed(path: &Path, offset: Option<u64>, error: &io::Error) -> StoreError {
    StoreError::corrupt(path, unreadable(offset, error))
}

fn unreadable(offset: Option<u64>, error: &io::Error) -> Damage {
    Damage::Unreadable { offset, kind: error.kind() }
}

/// Opens a file that the store is asked to take in.
pub(crate) fn open_source(path: &Path) -> Result<File, StoreError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| StoreError::io("open", path, e))?;
    if !metadata(&file, path)?.is_file() {
        return Err(StoreError::NotAFile { path: path.to_owned() });
    }
    Ok(file)
}

/// A new file for this user alone: guests' memory is nobody else's business.
pub(crate) fn create_new(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| StoreError::io("create", path, e))
}

/// Passes the result on; where it is an error, removes the partial file first.
pub(crate) fn removing_on_error<T>(path: &Path, result: Result<T, StoreError>) -> Result<T, StoreError> {
    if result.is_err()
        && let Err(error) = fs::remove_file(path)
        && error.kind() != ErrorKind::NotFound
    {
        // The first error is the one to report; the folder as a whole is removed later.
        tracing::warn!(path = %path.display(), %error, "cannot remove a partial file");
    }
    result
}

pub(crate) fn create_folders(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| StoreError::io("create", path, e))
}

pub(crate) fn metadata(file: &File, path: &Path) -> Result<Metadata, StoreError> {
    file.metadata().map_err(|e| StoreError::io("examine", path, e))
}

/// What a file takes on disk: holes are not counted.
pub(crate) fn allocated_bytes(metadata: &Metadata) -> u64 {
    metadata.blocks().saturating_mul(512)
}

pub(crate) fn fsync(file: &File, path: &Path) -> Result<(), StoreError> {
    file.sync_all().map_err(|e| StoreError::io("make durable", path, e))
}

pub(crate) fn fsync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = File::open(path).map_err(|e| StoreError::io("open", path, e))?;
    fsync(&folder, path)
}

pub(crate) fn list(folder: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    fs::read_dir(folder).and_then(Iterator::collect).map_err(|e| StoreError::io("list", folder, e))
}

/// Removes a tree, which somebody else may be removing too. Returns what that gave back to the file system: a file
/// that has other names gives nothing.
pub(crate) fn remove_tree(path: &Path) -> Result<u64, StoreError> {
    let freed = freed_by_removal(path)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::io("remove", path, error)),
        _ => Ok(freed),
    }
}

fn freed_by_removal(path: &Path) -> Result<u64, StoreError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(StoreError::io("examine", path, error)),
    };
    if !found.is_dir() {
        return Ok(if found.nlink() == 1 { allocated_bytes(&found) } else { 0 });
    }
    let children = match fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
        Ok(children) => children,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(StoreError::io("list", path, error)),
    };
    children.iter().map(|child| freed_by_removal(&child.path())).sum()
}
