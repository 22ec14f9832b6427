//! Reading a snapshot back. What is handed out has been checked against the manifest, which has been checked against
//! the id.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::Progress;
use crate::catalog::{Stored, manifest_key, receipt_key};
use crate::error::{Damage, StoreError};
use crate::files;
use crate::frames::{self, StoredFrame};
use crate::id::SnapshotId;
use crate::manifest::{
    FORMAT, FRAMES_PART, FileRecord, LayerRecord, MAX_MANIFEST_BYTES, MachineRecord, Manifest,
    ManifestProblem, Part, Receipt, Unreadable, blob_part, layer_part, state_part,
};
use crate::root::Store;
use crate::tree::Shape;

/// A receipt is a line; whatever is longer is not one.
const MAX_RECEIPT_BYTES: u64 = 64 << 10;

impl Store {
    /// Fills `destination` (emptied first; on tmpfs if the machine is to be snapshotted again) with a machine's
    /// memory. Each page's hash is checked before it is written; after an error the contents mean nothing.
    pub fn copy_ram(
        &self,
        stored: &Stored,
        machine: &str,
        destination: &File,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let part = stored.machine(machine)?.ram.part(machine);
        self.copy_part(&part, destination, progress)
    }

    /// Fills a file with a layer of a disk, durably. Zeros become holes.
    pub fn copy_layer(
        &self,
        layer: &LayerRecord,
        destination: &File,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let name = format!("disk layer {}", layer.root.short());
        let part = Part { name, shape: Shape::file(layer.bytes), root: layer.root };
        self.copy_part(&part, destination, progress)?;
        files::fsync(destination, &path_of(destination, &part.name))
    }

    /// Fills a file with a kernel or initrd, durably.
    pub fn copy_blob(&self, blob: &FileRecord, destination: &File) -> Result<(), StoreError> {
        let part = blob.part(blob_part(&blob.root));
        self.copy_part(&part, destination, &mut |_, _| {})?;
        files::fsync(destination, &path_of(destination, &part.name))
    }

    /// A machine's device state.
    pub fn read_state(&self, stored: &Stored, machine: &str) -> Result<Vec<u8>, StoreError> {
        let record = &stored.machine(machine)?.device_state;
        self.fetch_bytes(&record.part(state_part(machine)))
    }

    /// The frames in flight, in the order in which they were delivered.
    pub fn read_frames(&self, stored: &Stored) -> Result<Vec<StoredFrame>, StoreError> {
        let bytes = self.fetch_bytes(&stored.manifest.frames.part(FRAMES_PART.to_owned()))?;
        frames::decode(&bytes).map_err(|error| {
            let file = self.backend().locate(&manifest_key(&stored.id));
            StoreError::corrupt(&file, Damage::Frames(error)).within(FRAMES_PART, None)
        })
    }

    /// Whether a file has exactly the contents that a tree over clusters says.
    ///
    /// A file that this process has hashed before, and that has not been written since, is not read again.
    pub fn is_intact(&self, path: &Path, bytes: u64, root: &crate::Address) -> Result<bool, StoreError> {
        let file = files::open_source(path)?;
        if files::metadata(&file, path)?.len() != bytes {
            return Ok(false);
        }
        Ok(crate::verify::root_of(self, &file, path, bytes)? == *root)
    }

    /// Writes down what was only known once the snapshot was durable.
    pub fn put_receipt(&self, id: &SnapshotId, receipt: &Receipt) -> Result<(), StoreError> {
        if !self.exists(id)? {
            return Err(StoreError::Missing { id: *id });
        }
        let mut bytes = serde_json::to_vec(receipt).expect("a receipt is plain data");
        bytes.push(b'\n');
        self.backend().replace(&receipt_key(id), &bytes)
    }

    fn copy_part(&self, part: &Part, destination: &File, progress: Progress<'_>) -> Result<(), StoreError> {
        let path = path_of(destination, &part.name);
        let total = part.shape.bytes;
        destination
            .set_len(0)
            .and_then(|()| destination.set_len(total))
            .map_err(|e| StoreError::io("size", &path, e).needing(total))?;
        self.pour(part, &path, &|offset, bytes| destination.write_all_at(bytes, offset), progress)
            .map_err(|error| error.needing(total))
    }

    /// A snapshot's manifest, once its hash is found to be the id, and all its rules kept.
    pub(crate) fn read_manifest(&self, id: &SnapshotId) -> Result<Manifest, StoreError> {
        let bytes = self.manifest_bytes(id)?;
        self.parse_manifest(id, &bytes)
    }

    /// The bytes that a snapshot's id is the hash of: its manifest, in JSON.
    ///
    /// # Errors
    /// When there is none, or its hash is another.
    pub fn manifest_bytes(&self, id: &SnapshotId) -> Result<Vec<u8>, StoreError> {
        let key = manifest_key(id);
        let bytes = self.backend().read(&key, MAX_MANIFEST_BYTES)?.ok_or(StoreError::Missing { id: *id })?;
        if SnapshotId::of_manifest(&bytes) != *id {
            return Err(StoreError::corrupt(&self.backend().locate(&key), Damage::Contents { offset: None }));
        }
        Ok(bytes)
    }

    /// What a manifest's bytes say, once all its rules are found kept.
    pub(crate) fn parse_manifest(&self, id: &SnapshotId, bytes: &[u8]) -> Result<Manifest, StoreError> {
        Manifest::parse(bytes).map_err(|problem| {
            let damage = match problem {
                Unreadable::Rules(ManifestProblem::Format { found }) => {
                    return StoreError::UnsupportedSnapshot { id: *id, found, expected: FORMAT };
                }
                Unreadable::NotOne { line, column } => Damage::NotAManifest { line, column },
                Unreadable::Rules(problem) => Damage::Manifest(problem),
            };
            StoreError::corrupt(&self.backend().locate(&manifest_key(id)), damage)
        })
    }

    /// A snapshot's receipt, if there is one. It is not covered by the id, so a damaged one is no more than a missing
    /// one.
    pub(crate) fn read_receipt(&self, id: &SnapshotId) -> Option<Receipt> {
        let bytes = self.backend().read(&receipt_key(id), MAX_RECEIPT_BYTES).ok()??;
        serde_json::from_slice(&bytes).ok()
    }
}

impl Stored {
    /// The machine of this name.
    pub fn machine(&self, name: &str) -> Result<&MachineRecord, StoreError> {
        self.manifest
            .machine(name)
            .ok_or_else(|| StoreError::NoSuchMachine { id: self.id, machine: name.to_owned() })
    }
}

impl MachineRecord {
    /// What messages call a layer of this machine's.
    pub fn layer_part(&self, disk: &crate::DiskRecord, index: usize) -> String {
        layer_part(&self.name, &disk.name, index, disk.layers[index].format)
    }
}

/// An open file's path, for errors; a name for what it is to hold where it has none.
fn path_of(file: &File, otherwise: &str) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_else(|_| otherwise.into())
}
