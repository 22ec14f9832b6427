//! Files of the user's that machines are made of: disk images, kernels and initrds, as they must be on each host.
//!
//! In a cluster a file is known by its path, its length and its hash. Reading a large image takes a while, so each is read
//! once, and again when its length, its time or the file itself has become another.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use diorama_api::{ApiError, ErrorKind};
use diorama_topology::{Boot, Environment, Machine};
use serde::{Deserialize, Serialize};

use crate::operation::Operation;
use crate::problem::io_error;

const CHUNK_BYTES: usize = 1 << 20;

/// A file as it was on the host that was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UserFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// BLAKE3, as hexadecimal digits.
    pub(crate) blake3: String,
}

/// The hashes of files that have been read.
#[derive(Debug, Default)]
pub(crate) struct UserFiles(Mutex<BTreeMap<PathBuf, Known>>);

#[derive(Debug, Clone)]
struct Known {
    stamp: Stamp,
    blake3: String,
}

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }
}

impl UserFiles {
    /// A file as it is on this host.
    pub(crate) fn look(&self, path: &Path, operation: &Operation) -> Result<UserFile, ApiError> {
        let failed = |error: std::io::Error| io_error(path, &error);
        let mut file = std::fs::File::open(path).map_err(failed)?;
        let stamp = Stamp::of(&file.metadata().map_err(failed)?);
        let of = |blake3: String| UserFile { path: path.to_owned(), bytes: stamp.bytes, blake3 };
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned();
        if let Some(known) = known
            && known.stamp == stamp
        {
            return Ok(of(known.blake3));
        }
        let mut hasher = blake3::Hasher::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut done = 0;
        loop {
            operation.check()?;
            let read = file.read(&mut chunk).map_err(failed)?;
            if read == 0 {
                break;
            }
            hasher.update(&chunk[..read]);
            done += read as u64;
            operation.bytes("reading images", done, stamp.bytes);
        }
        if Stamp::of(&file.metadata().map_err(failed)?) != stamp || done != stamp.bytes {
            return Err(ApiError::new(
                ErrorKind::Io,
                format!("{} changed while it was read", path.display()),
            )
            .hint("images must not be written while machines are made of them"));
        }
        let blake3 = hasher.finalize().to_hex().to_string();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(path.to_owned(), Known { stamp, blake3: blake3.clone() });
        Ok(of(blake3))
    }

    /// All files that an environment's machines are made of.
    pub(crate) fn look_at_all(
        &self,
        environment: &Environment,
        operation: &Operation,
    ) -> Result<Vec<UserFile>, ApiError> {
        let mut paths: Vec<&Path> = environment.machines.iter().flat_map(paths).collect();
        paths.sort_unstable();
        paths.dedup();
        paths.into_iter().map(|path| self.look(path, operation)).collect()
    }

    /// Whether this host has the files of these machines as another has them.
    pub(crate) fn check(
        &self,
        machines: &[Machine],
        wanted: &[UserFile],
        (here, there): (&str, &str),
        operation: &Operation,
    ) -> Result<(), ApiError> {
        for (machine, path) in
            machines.iter().flat_map(|machine| paths(machine).into_iter().map(move |path| (machine, path)))
        {
            let Some(wanted) = wanted.iter().find(|wanted| wanted.path == path) else { continue };
            let problem = match self.look(path, operation) {
                Ok(found) if found == *wanted => continue,
                Ok(found) if found.bytes != wanted.bytes => {
                    format!(
                        "is another file than on host {there}: {} bytes, and {} there",
                        found.bytes, wanted.bytes
                    )
                }
                Ok(_) => format!(
                    "is another file than on host {there}: its length is the same, and its hash is not"
                ),
                Err(error) if error.kind == ErrorKind::Cancelled => return Err(error),
                Err(error) => format!("cannot be read ({})", error.message),
            };
            return Err(ApiError::new(
                ErrorKind::WrongState,
                format!("host {here}: {} of machine {} {problem}", path.display(), machine.name),
            )
            .hint("copy the file to the same path on every host that may run the machine, or name its host with `host:` in the environment file"));
        }
        Ok(())
    }
}

/// The files of the user's that a machine is made of.
fn paths(machine: &Machine) -> Vec<&Path> {
    let boot: Vec<&Path> = match &machine.boot {
        Boot::BuiltIn { .. } | Boot::DiskImage { .. } => Vec::new(),
        Boot::Kernel { kernel, initrd, .. } => {
            std::iter::once(kernel.as_path()).chain(initrd.as_deref()).collect()
        }
    };
    boot.into_iter().chain(images(machine)).collect()
}

/// Those of them that are images of its disks.
fn images(machine: &Machine) -> impl Iterator<Item = &Path> {
    let root = match &machine.boot {
        Boot::DiskImage { path } => Some(path.as_path()),
        Boot::BuiltIn { .. } | Boot::Kernel { .. } => None,
    };
    root.into_iter().chain(machine.disks.iter().filter_map(|disk| disk.image.as_deref()))
}

/// The images of disks that were made before and are kept: they must not have changed meanwhile.
pub(crate) fn check_kept(
    environment: &Environment,
    before: &[UserFile],
    now: &[UserFile],
) -> Result<(), ApiError> {
    for image in environment.machines.iter().flat_map(images) {
        let find = |files: &[UserFile]| files.iter().find(|file| file.path == image).cloned();
        if let (Some(before), Some(now)) = (find(before), find(now))
            && before != now
        {
            return Err(ApiError::new(
                ErrorKind::WrongState,
                format!(
                    "the disk image {} has changed since the kept disks were made of it",
                    image.display()
                ),
            )
            .hint("put the image back as it was; or `diorama down --volumes` removes the kept disks"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(folder: &Path) -> Environment {
        struct All;
        impl diorama_topology::Files for All {
            fn is_file(&self, _: &Path) -> bool {
                true
            }
        }
        let text = "name: e\nmachines:\n  a: {kernel: ./k, initrd: ./i}\n  b: {image: ./d.raw}\n";
        let source = diorama_topology::SourceFile { name: "test", text, folder };
        diorama_topology::parse(&source, &All, &[]).unwrap()
    }

    #[test]
    fn a_file_that_is_missing_or_another_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let environment = environment(folder.path());
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        for name in ["k", "i", "d.raw"] {
            write(name, name);
        }
        let operation = Operation::unattended();
        let files = UserFiles::default();
        let wanted = files.look_at_all(&environment, &operation).unwrap();
        assert_eq!(wanted.len(), 3);
        let check = || {
            let result = files.check(&environment.machines, &wanted, ("h2", "h1"), &operation);
            result.map_err(|error| error.message)
        };
        assert_eq!(check(), Ok(()));
        write("d.raw", "D.raw");
        let error = check().unwrap_err();
        assert!(error.starts_with("host h2: ") && error.contains("d.raw of machine b"), "{error}");
        assert!(error.ends_with("on host h1: its length is the same, and its hash is not"), "{error}");
        let now = files.look_at_all(&environment, &operation).unwrap();
        assert!(check_kept(&environment, &wanted, &now).unwrap_err().message.contains("d.raw has changed"));
        write("d.raw", "d.raw");
        assert_eq!(check(), Ok(()), "the same bytes are the same file, whenever they were written");
        write("k", "longer");
        assert!(check().unwrap_err().contains("6 bytes, and 1 there"));
        std::fs::remove_file(folder.path().join("k")).unwrap();
        assert!(check().unwrap_err().contains("cannot be read"));
        // A kernel may be another one at the next start.
        assert!(check_kept(&environment, &wanted, &wanted[..1]).is_ok());
    }
}
