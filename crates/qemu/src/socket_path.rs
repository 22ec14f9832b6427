//! The kernel's limit on the length of a unix socket's path, checked before anything is bound or handed to QEMU.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The longest unix socket path that Linux accepts, in bytes: `sun_path` holds 108 with the closing zero.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A socket path that no process can bind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("socket path is {length_bytes} bytes long, the kernel allows {MAX_SOCKET_PATH_BYTES}: {}", path.display())]
pub struct SocketPathTooLong {
    /// The path as given.
    pub path: PathBuf,
    /// Its length in bytes.
    pub length_bytes: usize,
}

/// Accepts `path` if a unix socket can be bound there as far as its length goes.
pub fn check(path: &Path) -> Result<(), SocketPathTooLong> {
    let bytes: &OsStr = path.as_os_str();
    let length_bytes = bytes.as_bytes().len();
    if length_bytes > MAX_SOCKET_PATH_BYTES {
        return Err(SocketPathTooLong { path: path.to_owned(), length_bytes });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_limit_is_the_kernels() {
        let folder = tempfile::tempdir().expect("folder");
        let base = folder.path().as_os_str().len() + 1;
        let longest = folder.path().join("s".repeat(MAX_SOCKET_PATH_BYTES - base));
        check(&longest).expect("107 bytes fit");
        UnixListener::bind(&longest).expect("the kernel agrees");

        let too_long = folder.path().join("s".repeat(MAX_SOCKET_PATH_BYTES - base + 1));
        let error = check(&too_long).expect_err("108 bytes do not fit");
        assert_eq!(error.length_bytes, MAX_SOCKET_PATH_BYTES + 1);
        assert!(UnixListener::bind(&too_long).is_err());
    }
}
