//! The trees' roots of immutable files, remembered while the process lives.
//!
//! Each snapshot holds all layers of a disk, and only the newest is new: without this, every snapshot would read
//! every byte of every older one. [`crate::Store::verify`] never relies on it.
//!
//! Invariant: a root is remembered only if the file did not change while it was read, and had not changed for
//! [`SETTLED`] before: within the clock's granularity a later change would not show in its modification time.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::address::Address;

const SETTLED: Duration = Duration::from_secs(2);
/// Far more than the layers of one computer; past it, all is forgotten.
const ENTRIES_MAX: usize = 16_384;

#[derive(Default, Debug)]
pub(crate) struct KnownRoots {
    roots: Mutex<HashMap<Version, Address>>,
}

/// One file with one content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Version {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Version {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl KnownRoots {
    pub(crate) fn get(&self, version: &Version) -> Option<Address> {
        self.map().get(version).copied()
    }

    /// `before` and `after` were taken before and after the file was read.
    pub(crate) fn remember(&self, before: Version, after: &Metadata, root: Address) {
        let settled = after
            .modified()
            .ok()
            .and_then(|modified| SystemTime::now().duration_since(modified).ok())
            .is_some_and(|age| age >= SETTLED);
        if !settled || Version::of(after) != before {
            return;
        }
        let mut map = self.map();
        if map.len() >= ENTRIES_MAX {
            map.clear();
        }
        map.insert(before, root);
    }

    fn map(&self) -> std::sync::MutexGuard<'_, HashMap<Version, Address>> {
        // Nothing panics between two changes that belong together: there is only ever one.
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
