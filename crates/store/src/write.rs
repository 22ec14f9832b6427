//! Writing one snapshot.
//!
//! ```text
//! begin ──> put_… (packs are staged) ──seal──> commit: packs published ──> name taken, signed ──> manifest created
//!              │ drop, failure, crash + recover                   │ failure, crash
//!              └──> nothing                                       └──> packs that nobody needs, until collected
//! ```
//!
//! Every `put_…` takes `&self`: machines are stored in parallel, one thread each. Each cuts its contents into chunks,
//! hashes them, looks each up, and packs what is new (see [`crate::ingest`]).
//!
//! Invariants:
//! * The manifest is created last, when every pack that it needs is durable: those of this writer, by `publish`; those
//!   that were there, since they were published. The session keeps them from being collected meanwhile, and just
//!   before the manifest it is confirmed that it did.
//! * No other writer sees a chunk before it is durable, so none relies on one that is not.
//! * A writer of which any `put_…` failed half-way cannot commit: other threads may rely on chunks that it took on.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Progress;
use crate::address::Address;
use crate::backend::Session;
use crate::catalog::{NAME_BYTES_MAX, manifest_key, name_key};
use crate::error::StoreError;
use crate::files;
use crate::frames::{self, StoredFrame};
use crate::id::SnapshotId;
use crate::ingest::{Ingest, Stored, Target};
use crate::known::Version;
use crate::manifest::{
    Bytes, FRAMES_PART, FileRecord, LayerFormat, LayerRecord, MAX_FILE_BYTES, MAX_MANIFEST_BYTES,
    MAX_RAM_BYTES, MAX_STATE_BYTES, Manifest, RamRecord, blob_part, check_part_name, layer_part, ram_part,
    state_part,
};
use crate::root::Store;
use crate::signature::signature_key;
use crate::tree::Shape;

/// A snapshot being written. Dropped without [`Writer::commit`], it was never there.
#[derive(Debug)]
pub struct Writer {
    store: Store,
    target: Target,
    ledger: Mutex<Ledger>,
    /// One blob at a time: machines mostly share them, and the second should find the first's.
    blobs: Mutex<()>,
}

/// What a machine has besides memory and disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Piece {
    /// The rest of its migration stream.
    DeviceState,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// By the part's name; `None` while it is being written.
    pub(crate) parts: BTreeMap<String, Option<(u64, Address)>>,
    logical_bytes: u64,
    /// The first part that failed half-way.
    pub(crate) failed: Option<String>,
}

impl Writer {
    pub(crate) fn new(store: Store, session: Box<dyn Session>) -> Self {
        let target = Target::new(store.clone(), session);
        Self { store, target, ledger: Mutex::default(), blobs: Mutex::default() }
    }

    /// Stores a machine's memory: `bytes` bytes, which is the whole of `ram`. Holes and pages of zeros take nothing.
    pub fn put_ram(
        &self,
        machine: &str,
        ram: &File,
        bytes: u64,
        progress: Progress<'_>,
    ) -> Result<RamRecord, StoreError> {
        check_part(machine)?;
        check_limit("memory", bytes, MAX_RAM_BYTES)?;
        let part = ram_part(machine);
        let actual_bytes = files::metadata(ram, Path::new(&part))?.len();
        if actual_bytes != bytes {
            let machine = machine.to_owned();
            return Err(StoreError::RamLength { machine, expected_bytes: bytes, actual_bytes });
        }
        let stored = self.put(&part, bytes, || {
            Ingest::new(&self.target, Shape::memory(bytes)).file(ram, Path::new(&part), progress)
        })?;
        Ok(RamRecord { bytes, used_bytes: stored.used_bytes, root: stored.root })
    }

    /// Stores something of a machine that fits into memory.
    pub fn put_bytes(&self, piece: Piece, machine: &str, bytes: &[u8]) -> Result<FileRecord, StoreError> {
        check_part(machine)?;
        match piece {
            Piece::DeviceState => {
                check_limit("device state", bytes.len() as u64, MAX_STATE_BYTES)?;
                self.put_whole(&state_part(machine), bytes)
            }
        }
    }

    /// Stores the frames in flight, in the order in which they were delivered. Every snapshot has this, if empty.
    pub fn put_frames(&self, frames: &[StoredFrame]) -> Result<FileRecord, StoreError> {
        self.put_whole(FRAMES_PART, &frames::encode(frames)?)
    }

    /// Stores layer `index` (0 is the lowest) of a disk. From now on nobody may write to `source`: a layer that this
    /// process has stored before, and that has not been written since, is not read again.
    pub fn put_layer(
        &self,
        machine: &str,
        disk: &str,
        index: usize,
        format: LayerFormat,
        source: &Path,
    ) -> Result<LayerRecord, StoreError> {
        check_part(machine)?;
        check_part(disk)?;
        let from = files::open_source(source)?;
        let bytes = files::metadata(&from, source)?.len();
        check_limit("disk layer", bytes, MAX_FILE_BYTES)?;
        let part = layer_part(machine, disk, index, format);
        let root = self.put(&part, bytes, || self.immutable(&from, source, bytes))?.root;
        Ok(LayerRecord { format, bytes, root })
    }

    /// Stores a kernel or initrd. All snapshots that use it share it, and all machines of this one.
    pub fn put_blob(&self, source: &Path) -> Result<FileRecord, StoreError> {
        let from = files::open_source(source)?;
        let bytes = files::metadata(&from, source)?.len();
        check_limit("kernel or initrd", bytes, MAX_FILE_BYTES)?;
        let _one_at_a_time = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = self.immutable(&from, source, bytes);
        let root = self.failing(&source.display().to_string(), stored)?.root;
        let mut ledger = self.ledger();
        if ledger.parts.insert(blob_part(&root), Some((bytes, root))).is_none() {
            ledger.logical_bytes = ledger.logical_bytes.saturating_add(bytes);
        }
        Ok(FileRecord { bytes, root })
    }

    /// Packs all that has been put, and says what it takes: for the manifest. Nothing is put after this.
    pub fn seal(&self) -> Result<Bytes, StoreError> {
        self.target.close()?;
        Ok(Bytes { logical: self.ledger().logical_bytes, new: self.target.staged_bytes() })
    }

    /// Makes it a snapshot: all of it, durably, or (on an error) nothing.
    pub fn commit(self, manifest: Manifest) -> Result<SnapshotId, StoreError> {
        manifest.check()?;
        self.check_complete(&manifest)?;
        let bytes = manifest.to_bytes();
        check_limit("manifest", bytes.len() as u64, MAX_MANIFEST_BYTES)?;
        let id = SnapshotId::of_manifest(&bytes);
        // Before the packs are there; asked again, for good, once they are.
        let (environment, name) = (&manifest.environment, &manifest.name);
        if let Some(id) = self.store.find_name(environment, name)? {
            return Err(name_in_use(environment, name, id));
        }
        self.target.publish()?;
        let name_key = name_key(environment, name);
        take_name(&self.store, environment, name, &id)?;
        let signature = self.store.signer().map(|signer| signer.sign(&id));
        if !create_manifest(&self.store, &self.target, &id, &bytes, &name_key, signature.as_deref())? {
            if let Err(error) = self.target.end() {
                tracing::warn!(%id, %error, "cannot remove what was staged");
            }
            return Err(StoreError::AlreadyStored { id });
        }
        if let Err(error) = self.target.end() {
            // It is a snapshot all the same; recovery removes what is left.
            tracing::warn!(%id, %error, "cannot remove what was staged");
        }
        Ok(id)
    }

    /// Removes what was written, and says whether that worked; dropping does the same and logs.
    pub fn abort(self) -> Result<(), StoreError> {
        self.target.end()
    }

    /// Whether the manifest names exactly what was put.
    fn check_complete(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let ledger = self.ledger();
        if let Some(part) = &ledger.failed {
            return Err(StoreError::WriterFailed { part: part.clone() });
        }
        let named = manifest.parts();
        for part in &named {
            if ledger.parts.get(&part.name) != Some(&Some((part.shape.bytes, part.root))) {
                return Err(StoreError::NotWritten { part: part.name.clone() });
            }
        }
        let named: BTreeSet<&str> = named.iter().map(|part| part.name.as_str()).collect();
        if let Some(part) = ledger.parts.keys().find(|part| !named.contains(part.as_str())) {
            return Err(StoreError::NotInManifest { part: part.clone() });
        }
        Ok(())
    }

    fn put_whole(&self, part: &str, bytes: &[u8]) -> Result<FileRecord, StoreError> {
        let length = bytes.len() as u64;
        let stored =
            self.put(part, length, || Ingest::new(&self.target, Shape::file(length)).bytes(bytes))?;
        Ok(FileRecord { bytes: length, root: stored.root })
    }

    /// Stores an immutable file, or finds that the store has it.
    fn immutable(&self, from: &File, source: &Path, bytes: u64) -> Result<Stored, StoreError> {
        let before = Version::of(&files::metadata(from, source)?);
        let shape = Shape::file(bytes);
        if let Some(root) = self.store.known().get(&before)
            && self.target.has_tree(&shape, &root)?
        {
            return Ok(Stored { root, used_bytes: bytes });
        }
        let stored = Ingest::new(&self.target, shape).file(from, source, &mut |_, _| {})?;
        let after = files::metadata(from, source)?;
        if Version::of(&after) != before {
            return Err(StoreError::SourceChanged { path: source.to_owned() });
        }
        self.store.known().remember(before, &after, stored.root);
        Ok(stored)
    }

    /// Enters a part in the ledger around `make`.
    fn put(
        &self,
        part: &str,
        bytes: u64,
        make: impl FnOnce() -> Result<Stored, StoreError>,
    ) -> Result<Stored, StoreError> {
        match self.ledger().parts.entry(part.to_owned()) {
            Entry::Vacant(vacant) => vacant.insert(None),
            Entry::Occupied(_) => return Err(StoreError::WrittenTwice { part: part.to_owned() }),
        };
        let stored = self.failing(part, make())?;
        let mut ledger = self.ledger();
        ledger.parts.insert(part.to_owned(), Some((bytes, stored.root)));
        ledger.logical_bytes = ledger.logical_bytes.saturating_add(bytes);
        Ok(stored)
    }

    /// Remembers a failure: nothing can be committed after it.
    fn failing<T>(&self, part: &str, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if result.is_err() {
            self.ledger().failed.get_or_insert_with(|| part.to_owned());
        }
        result
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // A thread that panicked left its entry at `None`, which commit refuses.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a snapshot of what is there and has its name: signs it, if that is wanted, and last creates the manifest. When that
/// fails, all of it is taken back, the name too. Returns whether the manifest is new.
pub(crate) fn create_manifest(
    store: &Store,
    target: &Target,
    id: &SnapshotId,
    manifest: &[u8],
    name_key: &str,
    signature: Option<&[u8]>,
) -> Result<bool, StoreError> {
    let backend = store.backend();
    let signed = match signature {
        // In place of what may be left of an attempt at the same.
        Some(signature) => store.put_signature(id, signature),
        None => Ok(()),
    };
    let created =
        signed.and_then(|()| target.confirm()).and_then(|()| backend.create(&manifest_key(id), manifest));
    if created.is_err() {
        // It may be there all the same, perhaps not durable: whoever is told of an error has no snapshot.
        let undone = backend
            .remove(&manifest_key(id), None)
            .and_then(|_| backend.remove(&signature_key(id), None))
            .and_then(|_| backend.remove(name_key, Some(id.to_string().as_bytes())));
        if let Err(undo) = undone {
            tracing::error!(%id, error = %undo, "cannot take back a snapshot");
        }
    }
    created
}

/// Lets a snapshot that is about to be there have a name. Of several writers that want one, one gets it.
pub(crate) fn take_name(
    store: &Store,
    environment: &str,
    name: &str,
    id: &SnapshotId,
) -> Result<(), StoreError> {
    let backend = store.backend();
    let key = name_key(environment, name);
    let text = id.to_string();
    loop {
        if backend.create(&key, text.as_bytes())? {
            return Ok(());
        }
        let holder = match backend.read(&key, NAME_BYTES_MAX) {
            Ok(Some(holder)) => holder,
            Ok(None) => continue,
            Err(error) if error.is_damage() => {
                backend.remove(&key, None)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let other: Option<SnapshotId> = std::str::from_utf8(&holder).ok().and_then(|t| t.parse().ok());
        if let Some(other) = other {
            // Without its manifest, it is one that another writer commits just now, or one that never was. The sessions
            // are counted first: a writer that has ended its own by then has its manifest there, or never will.
            if (other != *id && backend.sessions()? > 1) || store.exists(&other)? {
                return Err(name_in_use(environment, name, other));
            }
        }
        backend.remove(&key, Some(&holder))?;
    }
}

fn name_in_use(environment: &str, name: &str, id: SnapshotId) -> StoreError {
    StoreError::NameInUse { environment: environment.to_owned(), name: name.to_owned(), id }
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
