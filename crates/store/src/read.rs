//! Reading a snapshot back. What is handed out has been checked against the manifest, which has been checked against
//! the id.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::Progress;
use crate::blocks::{self, BLOCK_BYTES, BlockHashes, SparseWriter};
use crate::catalog::Stored;
use crate::error::{Damage, StoreError};
use crate::files;
use crate::frames::{self, StoredFrame};
use crate::id::SnapshotId;
use crate::manifest::{
    BaseRecord, FORMAT, FileRecord, LayerFormat, MAX_MANIFEST_BYTES, MachineRecord, Manifest,
    ManifestProblem, RamRecord, Receipt,
};
use crate::root::Store;

pub(crate) const MANIFEST_FILE: &str = "manifest.json";
const RECEIPT_FILE: &str = "receipt.json";
/// A receipt is a line; whatever is longer is not one.
const MAX_RECEIPT_BYTES: u64 = 64 << 10;

/// Where one disk of a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFiles {
    /// The disk's name.
    pub name: String,
    /// The disk's size in the guest.
    pub virtual_bytes: u64,
    /// The image below the lowest layer, which is not in the snapshot.
    pub base: Option<BaseRecord>,
    /// Lowest first.
    pub layers: Vec<LayerFile>,
}

/// One layer of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// The file, in the snapshot's folder: give it to [`crate::link_file`], and never write to it.
    pub path: PathBuf,
    /// What it holds.
    pub format: LayerFormat,
    /// Its length.
    pub bytes: u64,
}

impl Store {
    /// Fills `destination` (emptied first; on tmpfs if the machine is to be snapshotted again) with a machine's
    /// memory. Each block's hash is checked before the block is written; after an error the contents mean nothing.
    pub fn copy_ram(
        &self,
        stored: &Stored,
        machine: &str,
        destination: &File,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let ram = &stored.machine(machine)?.ram;
        let (file, path, hashes) = open_ram(&stored.folder, ram)?;
        let out = path_of(destination, &path);
        let mut writer = SparseWriter::new(destination, &out, ram.bytes)?;
        blocks::walk(
            &file,
            ram.bytes,
            |offset, e| files::read_failed(&path, Some(offset), &e),
            |block| {
                if hashes.get(block.offset / BLOCK_BYTES) != Some(block.hash().as_bytes()) {
                    let offset = Some(block.offset);
                    return Err(StoreError::corrupt(&path, Damage::Contents { offset }));
                }
                writer.write(&block)?;
                progress(block.end(), ram.bytes);
                Ok(())
            },
        )
    }

    /// A machine's device state.
    pub fn read_state(&self, stored: &Stored, machine: &str) -> Result<Vec<u8>, StoreError> {
        read_checked(&stored.folder, &stored.machine(machine)?.device_state)
    }

    /// The frames in flight, in the order in which they were delivered.
    pub fn read_frames(&self, stored: &Stored) -> Result<Vec<StoredFrame>, StoreError> {
        let record = &stored.manifest.frames;
        let bytes = read_checked(&stored.folder, record)?;
        frames::decode(&bytes)
            .map_err(|error| StoreError::corrupt(&stored.folder.join(&record.file), Damage::Frames(error)))
    }

    /// Where a machine's disks are, after checking their contents. A layer that this process has hashed before, and
    /// that has not been written since, is not read again; [`Store::verify`] reads all of them.
    pub fn disk_files(&self, stored: &Stored, machine: &str) -> Result<Vec<DiskFiles>, StoreError> {
        let machine = stored.machine(machine)?;
        let disk = |disk: &crate::DiskRecord| {
            let layers = disk.layers.iter().map(|layer| {
                let path = stored.folder.join(&layer.file);
                let file = files::open_stored(&path, layer.bytes)?;
                if crate::write::hash_file(self, &file, &path)?.to_hex().as_str() != layer.blake3 {
                    return Err(StoreError::corrupt(&path, Damage::Contents { offset: None }));
                }
                Ok(LayerFile { path, format: layer.format, bytes: layer.bytes })
            });
            Ok(DiskFiles {
                name: disk.name.clone(),
                virtual_bytes: disk.virtual_bytes,
                base: disk.base.clone(),
                layers: layers.collect::<Result<_, StoreError>>()?,
            })
        };
        machine.disks.iter().map(disk).collect()
    }

    /// Where a kernel or initrd of this snapshot is, after checking its contents.
    pub fn blob_file(&self, stored: &Stored, blob: &crate::BlobRecord) -> Result<PathBuf, StoreError> {
        let path = stored.folder.join(&blob.file);
        let file = files::open_stored(&path, blob.bytes)?;
        if crate::write::hash_file(self, &file, &path)?.to_hex().as_str() != blob.blake3 {
            return Err(StoreError::corrupt(&path, Damage::Contents { offset: None }));
        }
        Ok(path)
    }

    /// Writes down what was only known once the snapshot was durable.
    pub fn put_receipt(&self, id: &SnapshotId, receipt: &Receipt) -> Result<(), StoreError> {
        let folder = self.folder(id);
        if !folder.is_dir() {
            return Err(StoreError::Missing { id: *id });
        }
        let mut bytes = serde_json::to_vec(receipt).expect("a receipt is plain data");
        bytes.push(b'\n');
        files::replace(&folder.join(RECEIPT_FILE), &bytes)
    }
}

impl Stored {
    fn machine(&self, name: &str) -> Result<&MachineRecord, StoreError> {
        self.manifest
            .machine(name)
            .ok_or_else(|| StoreError::NoSuchMachine { id: self.id, machine: name.to_owned() })
    }
}

/// A snapshot's manifest, once its hash is found to be the id, and all its rules kept.
pub(crate) fn read_manifest(folder: &Path, id: &SnapshotId) -> Result<Manifest, StoreError> {
    let path = folder.join(MANIFEST_FILE);
    if !folder.is_dir() {
        return Err(StoreError::Missing { id: *id });
    }
    let corrupt = |damage| StoreError::corrupt(&path, damage);
    let file = files::open_stored_of_any_length(&path)?;
    let bytes = files::metadata(&file, &path)?.len();
    if bytes > MAX_MANIFEST_BYTES {
        return Err(corrupt(Damage::Contents { offset: None }));
    }
    let bytes = files::read_stored(&path, bytes)?;
    if SnapshotId::of_manifest(&bytes) != *id {
        return Err(corrupt(Damage::Contents { offset: None }));
    }
    // The format first: another version's manifest need not look like ours.
    let format =
        serde_json::from_slice::<FormatOnly>(&bytes).map_err(|e| corrupt(not_a_manifest(&e)))?.format;
    if format != FORMAT {
        return Err(StoreError::UnsupportedSnapshot { id: *id, found: format, expected: FORMAT });
    }
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| corrupt(not_a_manifest(&e)))?;
    manifest.check().map_err(|problem: ManifestProblem| corrupt(Damage::Manifest(problem)))?;
    Ok(manifest)
}

/// A snapshot's receipt, if there is one. It is not covered by the id, so a damaged one is no more than a missing one.
pub(crate) fn read_receipt(folder: &Path) -> Option<Receipt> {
    let path = folder.join(RECEIPT_FILE);
    let bytes = fs::symlink_metadata(&path).ok()?.len();
    if bytes > MAX_RECEIPT_BYTES {
        return None;
    }
    let bytes = files::read_stored(&path, bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The memory file and its block hashes: lengths checked, hashes checked against the manifest, blocks not yet.
pub(crate) fn open_ram(folder: &Path, ram: &RamRecord) -> Result<(File, PathBuf, BlockHashes), StoreError> {
    let hashes = read_block_hashes(folder, ram)?;
    let path = folder.join(&ram.file);
    let file = files::open_stored(&path, ram.bytes)?;
    Ok((file, path, hashes))
}

pub(crate) fn read_block_hashes(folder: &Path, ram: &RamRecord) -> Result<BlockHashes, StoreError> {
    let path = folder.join(&ram.blocks);
    let bytes = files::read_stored(&path, blocks::block_hashes_bytes(ram.bytes))?;
    BlockHashes::from_stored(bytes, &ram.root, &path)
}

fn read_checked(folder: &Path, record: &FileRecord) -> Result<Vec<u8>, StoreError> {
    let path = folder.join(&record.file);
    let bytes = files::read_stored(&path, record.bytes)?;
    if blake3::hash(&bytes).to_hex().as_str() != record.blake3 {
        return Err(StoreError::corrupt(&path, Damage::Contents { offset: None }));
    }
    Ok(bytes)
}

#[derive(serde::Deserialize)]
struct FormatOnly {
    format: String,
}

fn not_a_manifest(error: &serde_json::Error) -> Damage {
    Damage::NotAManifest { line: error.line(), column: error.column() }
}

/// An open file's path, for errors; a name for what it is to hold where it has none.
fn path_of(file: &File, otherwise: &Path) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_else(|_| otherwise.to_owned())
}
