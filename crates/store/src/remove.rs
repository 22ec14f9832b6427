//! Removing a snapshot: out of the way in one step, then deleted. A crash in between leaves it to recovery.

use std::fs;

use crate::error::StoreError;
use crate::files;
use crate::id::SnapshotId;
use crate::root::Store;

/// What removing a snapshot did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// What it gave back to the file system: nothing for what others still use.
    pub bytes: u64,
}

impl Store {
    /// Removes a snapshot, damaged or not. Its children stay; their parent is then a snapshot that is not there.
    ///
    /// An error after it was moved out of the way leaves it gone all the same; recovery removes the rest of it.
    pub fn remove(&self, id: &SnapshotId) -> Result<Removed, StoreError> {
        let folder = self.folder(id);
        let aside = {
            let _guard = self.lock()?;
            if fs::symlink_metadata(&folder).is_err() {
                return Err(StoreError::Missing { id: *id });
            }
            let aside = self.new_incoming()?;
            let moved = fs::rename(&folder, &aside).map_err(|e| StoreError::io("move", &folder, e));
            if moved.is_err() {
                // Empty, and removed by the next recovery if not now.
                drop(fs::remove_dir(&aside));
            }
            moved?;
            aside
        };
        files::fsync_folder(&self.snapshots())?;
        files::fsync_folder(&self.incoming())?;
        // The names before the tree goes; the blobs after, when this snapshot no longer counts as a user of them.
        let blobs = match aside.join("blobs") {
            folder if folder.is_dir() => files::list(&folder)?,
            _ => Vec::new(),
        };
        let mut bytes = files::remove_tree(&aside)?;
        for blob in blobs {
            let indexed = self.blobs().join(blob.file_name());
            bytes += self.remove_blob_if_unused(&indexed)?.unwrap_or(0);
        }
        Ok(Removed { bytes })
    }
}
