//! Writing one snapshot.
//!
//! A [`Writer`] owns one folder in `incoming/`, and holds its lock. Every `put_…` takes `&self`: machines are
//! persisted in parallel, one thread each. Each call makes one file (RAM: two) durable, or removes it again.
//!
//! Invariant: after commit, the folder holds exactly the files that the manifest names, with the lengths and hashes
//! that it names; commit refuses anything else.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use blake3::{Hash, Hasher};

use crate::Progress;
use crate::blobs;
use crate::blocks::{self, BLOCK_BYTES, BlockHashes, SparseWriter};
use crate::error::StoreError;
use crate::files::{self, Linked, removing_on_error};
use crate::frames::{self, StoredFrame};
use crate::id::SnapshotId;
use crate::known::Version;
use crate::manifest::{
    BlobRecord, Bytes, FRAMES_PATH, FileRecord, LayerFormat, LayerRecord, MAX_MANIFEST_BYTES, MAX_RAM_BYTES,
    MAX_STATE_BYTES, Manifest, blob_path, blocks_path, check_part_name, layer_path, ram_path, state_path,
};
use crate::read::MANIFEST_FILE;
use crate::root::{Store, WRITER_LOCK_FILE};

/// A snapshot being written. Dropped without [`Writer::commit`], it was never there.
#[derive(Debug)]
pub struct Writer {
    store: Store,
    folder: PathBuf,
    /// Released when the folder is gone or moved; never read.
    _lock: File,
    ledger: Mutex<Ledger>,
    /// One blob at a time: machines mostly share them, and the second should find the first's.
    blobs: Mutex<()>,
    /// Nothing is left in `folder`.
    done: bool,
}

/// What a machine has besides memory and disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Piece {
    /// The rest of its migration stream.
    DeviceState,
}

#[derive(Debug, Default)]
struct Ledger {
    /// By path in the folder; `None` while it is being written.
    files: BTreeMap<String, Option<(u64, Hash)>>,
    bytes: Bytes,
}

impl Writer {
    pub(crate) fn new(store: Store, folder: PathBuf, lock: File) -> Self {
        Self { store, folder, _lock: lock, ledger: Mutex::default(), blobs: Mutex::default(), done: false }
    }

    /// Stores a machine's memory: `bytes` bytes, which is the whole of `ram`. Holes and pages of zeros become holes.
    pub fn put_ram(
        &self,
        machine: &str,
        ram: &File,
        bytes: u64,
        progress: Progress<'_>,
    ) -> Result<crate::RamRecord, StoreError> {
        check_part(machine)?;
        check_limit("memory", bytes, MAX_RAM_BYTES)?;
        let file = ram_path(machine);
        self.put(&file, |path| {
            let actual_bytes = files::metadata(ram, path)?.len();
            if actual_bytes != bytes {
                return Err(StoreError::RamLength {
                    machine: machine.to_owned(),
                    expected_bytes: bytes,
                    actual_bytes,
                });
            }
            let out = files::create_new(path)?;
            let written = write_ram(ram, bytes, &out, path, progress);
            let (hashes, used_bytes) = removing_on_error(path, written)?;
            let blocks = blocks_path(machine);
            let listed = files::write_new(&self.folder.join(&blocks), hashes.as_bytes());
            removing_on_error(path, listed)?;
            let root = hashes.root();
            let record = crate::RamRecord {
                file: file.clone(),
                bytes,
                used_bytes,
                blocks,
                block_bytes: BLOCK_BYTES,
                root: root.to_hex().to_string(),
            };
            let new = files::allocated_bytes(&files::metadata(&out, path)?);
            Ok((record, bytes, root, new))
        })
    }

    /// Stores something of a machine that fits into memory.
    pub fn put_bytes(&self, piece: Piece, machine: &str, bytes: &[u8]) -> Result<FileRecord, StoreError> {
        check_part(machine)?;
        match piece {
            Piece::DeviceState => {
                check_limit("device state", bytes.len() as u64, MAX_STATE_BYTES)?;
                self.put_file(state_path(machine), bytes)
            }
        }
    }

    /// Stores the frames in flight, in the order in which they were delivered. Every snapshot has this, if empty.
    pub fn put_frames(&self, frames: &[StoredFrame]) -> Result<FileRecord, StoreError> {
        self.put_file(FRAMES_PATH.to_owned(), &frames::encode(frames)?)
    }

    /// Takes in layer `index` (0 is the lowest) of a disk, by a hard link where possible, else by a sparse copy.
    /// From now on nobody may write to `source`.
    pub fn link_file(
        &self,
        machine: &str,
        disk: &str,
        index: usize,
        format: LayerFormat,
        source: &Path,
    ) -> Result<LayerRecord, StoreError> {
        check_part(machine)?;
        check_part(disk)?;
        let file = layer_path(machine, disk, index, format);
        self.put(&file, |path| {
            let was_stored =
                fs::metadata(source).map_err(|e| StoreError::io("examine", source, e))?.nlink() > 1;
            let linked = files::link_file(source, path)?;
            let held = files::open_stored_of_any_length(path).and_then(|out| {
                // What QEMU wrote may still be in memory only.
                files::fsync(&out, path)?;
                let hash = hash_file(&self.store, &out, path)?;
                Ok((hash, files::metadata(&out, path)?))
            });
            let (hash, found) = removing_on_error(path, held)?;
            let record = LayerRecord {
                file: file.clone(),
                format,
                bytes: found.len(),
                blake3: hash.to_hex().to_string(),
            };
            let new = match linked {
                Linked::Hard if was_stored => 0,
                _ => files::allocated_bytes(&found),
            };
            Ok((record, found.len(), hash, new))
        })
    }

    /// Takes in a kernel or initrd. All snapshots that use it share it, and all machines of this one.
    pub fn put_blob(&self, source: &Path) -> Result<BlobRecord, StoreError> {
        let from = files::open_source(source)?;
        let bytes = files::metadata(&from, source)?.len();
        let hash = hash_file(&self.store, &from, source)?;
        let hex = hash.to_hex().to_string();
        let file = blob_path(&hex);
        let _one_at_a_time = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.ledger().files.contains_key(&file) {
            self.put(&file, |path| {
                let new = self.take_or_copy_blob(&from, source, bytes, &hash, path)?;
                Ok(((), bytes, hash, new))
            })?;
        }
        Ok(BlobRecord { file, bytes, blake3: hex })
    }

    /// What has been put so far: for the manifest.
    pub fn bytes(&self) -> Bytes {
        self.ledger().bytes
    }

    /// Makes it a snapshot: all of it, durably, or (on an error) nothing.
    pub fn commit(mut self, manifest: Manifest) -> Result<SnapshotId, StoreError> {
        manifest.check()?;
        self.check_complete(&manifest)?;
        let bytes = manifest.to_bytes();
        check_limit("manifest", bytes.len() as u64, MAX_MANIFEST_BYTES)?;
        let id = SnapshotId::of_manifest(&bytes);

        files::fsync_folders(&self.folder)?;
        let temporary = self.folder.join("manifest.json.tmp");
        files::write_new(&temporary, &bytes)?;
        let path = self.folder.join(MANIFEST_FILE);
        fs::rename(&temporary, &path).map_err(|e| StoreError::io("rename", &path, e))?;
        files::fsync_folder(&self.folder)?;

        let store = self.store.clone();
        let _guard = store.lock()?;
        if let Some(id) = store.find_name(&manifest.environment, &manifest.name)? {
            return Err(StoreError::NameInUse { environment: manifest.environment, name: manifest.name, id });
        }
        self.publish(&store, &id)?;
        Ok(id)
    }

    /// Removes what was written, and says whether that worked; dropping does the same and logs.
    pub fn abort(mut self) -> Result<(), StoreError> {
        self.done = true;
        files::remove_tree(&self.folder).map(drop)
    }

    /// The last step. The caller holds the store's lock: without it, a folder whose `lock` file is gone is abandoned.
    fn publish(&mut self, store: &Store, id: &SnapshotId) -> Result<(), StoreError> {
        let destination = store.folder(id);
        if destination.exists() {
            return Err(StoreError::AlreadyStored { id: *id });
        }
        let lock = self.folder.join(WRITER_LOCK_FILE);
        fs::remove_file(&lock).map_err(|e| StoreError::io("remove", &lock, e))?;
        fs::rename(&self.folder, &destination).map_err(|e| StoreError::io("rename", &destination, e))?;
        let durable = files::fsync_folder(&destination)
            .and_then(|()| files::fsync_folder(&store.snapshots()))
            .and_then(|()| files::fsync_folder(&store.incoming()));
        match durable {
            Ok(()) => {
                self.done = true;
                Ok(())
            }
            Err(error) => {
                // A snapshot that a power cut could take back does not exist. If it cannot be moved back either,
                // it stays: whole, but perhaps not durable, and the caller has the error.
                match fs::rename(&destination, &self.folder) {
                    Ok(()) => {}
                    Err(undo) => {
                        tracing::error!(%id, error = %undo, "cannot take back a snapshot");
                        self.done = true;
                    }
                }
                Err(error)
            }
        }
    }

    /// Whether the manifest names exactly what was put.
    fn check_complete(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let ledger = self.ledger();
        let named = manifest.files();
        for file in &named {
            let same = matches!(
                ledger.files.get(file.file),
                Some(Some((bytes, hash)))
                    if *bytes == file.bytes && hash.to_hex().as_str() == file.blake3
            );
            if !same {
                return Err(StoreError::NotWritten { file: file.file.to_owned() });
            }
        }
        let named: BTreeSet<&str> = named.iter().map(|named| named.file).collect();
        if let Some(file) = ledger.files.keys().find(|file| !named.contains(file.as_str())) {
            return Err(StoreError::NotInManifest { file: file.clone() });
        }
        Ok(())
    }

    fn put_file(&self, file: String, bytes: &[u8]) -> Result<FileRecord, StoreError> {
        self.put(&file, |path| {
            files::write_new(path, bytes)?;
            let length = bytes.len() as u64;
            let hash = blake3::hash(bytes);
            let record = FileRecord { file: file.clone(), bytes: length, blake3: hash.to_hex().to_string() };
            Ok((record, length, hash, length))
        })
    }

    /// Enters a file in the ledger around `make`, which returns its own result and the file's length, hash and
    /// newly allocated bytes. A failure leaves neither entry nor file, so that it may be tried again.
    fn put<T>(
        &self,
        file: &str,
        make: impl FnOnce(&Path) -> Result<(T, u64, Hash, u64), StoreError>,
    ) -> Result<T, StoreError> {
        match self.ledger().files.entry(file.to_owned()) {
            Entry::Vacant(vacant) => vacant.insert(None),
            Entry::Occupied(_) => {
                return Err(StoreError::WrittenTwice { file: file.to_owned() });
            }
        };
        let path = self.folder.join(file);
        let made = path.parent().map_or(Ok(()), files::create_folders).and_then(|()| make(&path));
        let mut ledger = self.ledger();
        match made {
            Ok((result, bytes, hash, new)) => {
                ledger.files.insert(file.to_owned(), Some((bytes, hash)));
                ledger.bytes.logical = ledger.bytes.logical.saturating_add(bytes);
                ledger.bytes.new = ledger.bytes.new.saturating_add(new);
                Ok(result)
            }
            Err(error) => {
                ledger.files.remove(file);
                Err(error)
            }
        }
    }

    /// Returns how much of the disk it newly took.
    fn take_or_copy_blob(
        &self,
        from: &File,
        source: &Path,
        bytes: u64,
        hash: &Hash,
        path: &Path,
    ) -> Result<u64, StoreError> {
        if blobs::take(&self.store, hash, path)? {
            return Ok(0);
        }
        let out = files::create_new(path)?;
        let copied = copy_hashing(from, source, bytes, &out, path);
        let copied = removing_on_error(path, copied)?;
        if copied != *hash {
            let changed = Err(StoreError::SourceChanged { path: source.to_owned() });
            return removing_on_error(path, changed);
        }
        removing_on_error(path, blobs::offer(&self.store, hash, path))?;
        Ok(files::allocated_bytes(&files::metadata(&out, path)?))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // A thread that panicked left its entry at `None`, which commit refuses.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Err(error) = files::remove_tree(&self.folder) {
            // Recovery tries again.
            tracing::warn!(folder = %self.folder.display(), %error, "cannot remove a partial snapshot");
        }
    }
}

/// The hash of a whole file, remembered for immutable ones.
pub(crate) fn hash_file(store: &Store, file: &File, path: &Path) -> Result<Hash, StoreError> {
    let before = files::metadata(file, path)?;
    let version = Version::of(&before);
    if let Some(hash) = store.known().get(&version) {
        return Ok(hash);
    }
    let mut hasher = Hasher::new();
    blocks::walk(
        file,
        before.len(),
        |_, e| StoreError::io("read", path, e),
        |block| {
            hasher.update(block.bytes);
            Ok(())
        },
    )?;
    let hash = hasher.finalize();
    let after = files::metadata(file, path)?;
    if Version::of(&after) != version {
        return Err(StoreError::SourceChanged { path: path.to_owned() });
    }
    store.known().remember(version, &after, hash);
    Ok(hash)
}

fn write_ram(
    ram: &File,
    bytes: u64,
    out: &File,
    path: &Path,
    progress: Progress<'_>,
) -> Result<(BlockHashes, u64), StoreError> {
    let mut writer = SparseWriter::new(out, path, bytes)?;
    let mut hashes = BlockHashes::default();
    let mut used_bytes = 0;
    blocks::walk(
        ram,
        bytes,
        |_, e| StoreError::io("read the memory for", path, e),
        |block| {
            hashes.push(&block.hash());
            used_bytes += writer.write(&block)?;
            progress(block.end(), bytes);
            Ok(())
        },
    )?;
    files::fsync(out, path).map_err(|e| e.needing(bytes))?;
    Ok((hashes, used_bytes))
}

fn copy_hashing(from: &File, source: &Path, bytes: u64, out: &File, path: &Path) -> Result<Hash, StoreError> {
    let mut writer = SparseWriter::new(out, path, bytes)?;
    let mut hasher = Hasher::new();
    blocks::walk(
        from,
        bytes,
        |_, e| StoreError::io("read", source, e),
        |block| {
            hasher.update(block.bytes);
            writer.write(&block).map(drop)
        },
    )?;
    files::fsync(out, path)?;
    Ok(hasher.finalize())
}

fn check_part(name: &str) -> Result<(), StoreError> {
    check_part_name(name).map_err(|problem| StoreError::BadName { name: name.to_owned(), problem })
}

fn check_limit(what: &'static str, bytes: u64, limit_bytes: u64) -> Result<(), StoreError> {
    if bytes <= limit_bytes {
        return Ok(());
    }
    Err(StoreError::TooLarge { what, bytes, limit_bytes })
}
