//! Snapshots on their way from one store to another.
//!
//! ```text
//! from: trace what it needs ──> read what the other lacks, checked ──┐
//! to:   begin a session ──> look up ──> chunks into new packs <──────┘──> publish ──> look for all of it ──> manifest
//! ```
//!
//! Chunks are what moves; packs are made anew, so that nothing comes along that the snapshot does not need, and no
//! pack's key is ever used twice. [`Store::export`](crate::Store::export) and [`Store::import`](crate::Store::import)
//! do the same by way of a file.
//!
//! Invariants:
//! * A chunk is checked against its address before it is handed on.
//! * The manifest comes last, after every chunk of the snapshot has been found in the store that it goes to.
//! * What has been published stays when a transfer is interrupted: the next one does not move it again, and `store gc`
//!   gives it back if there is none.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::Progress;
use crate::address::Address;
use crate::catalog::{alias_key, name_key};
use crate::collect::Needed;
use crate::error::{Damage, StoreError};
use crate::fetch::NodeCache;
use crate::id::SnapshotId;
use crate::index::{ChunkSet, Found, Pack};
use crate::ingest::{Chunks, Target};
use crate::manifest::{BaseRecord, Manifest, check_snapshot_name};
use crate::pack::{Opener, PackKind};
use crate::root::{Store, pack_key};
use crate::tree::{self, Place, Shape, Visitor};

/// Adjacent groups are read together up to about this length...
const RUN_BYTES: u64 = 1 << 20;
/// ... and this many: a few bytes can be the whole of a group.
const RUN_GROUPS: usize = 16;
/// How many runs are read ahead at least, by as many threads; where each request takes time of its own, more.
const AHEAD_MIN: usize = 4;
/// The most: each takes some MiB of memory.
const AHEAD_MAX: usize = 16;
/// What has been copied is made durable after this much, so that an interrupted transfer goes on from there.
const PUBLISH_BYTES: u64 = 64 << 20;

/// A snapshot that has come into a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// Its id, the same as where it came from.
    pub id: SnapshotId,
    /// What it is called here.
    pub name: String,
    /// Its environment.
    pub environment: String,
    /// It was there already.
    pub was_there: bool,
    /// All of its parts' lengths.
    pub logical_bytes: u64,
    /// Chunks that it has.
    pub chunks: u64,
    /// Of those, the ones that were not there.
    pub new_chunks: u64,
    /// What those take.
    pub new_bytes: u64,
    /// The user's images under its disks, which it needs and which did not come along.
    pub bases: Vec<BaseRecord>,
}

/// Takes a chunk that has been checked.
pub(crate) type Take<'a> = &'a mut dyn FnMut(PackKind, &Address, &[u8]) -> Result<(), StoreError>;

/// A manifest and the bytes that its id is the hash of.
#[derive(Debug)]
pub(crate) struct Copied {
    pub(crate) id: SnapshotId,
    pub(crate) bytes: Vec<u8>,
    pub(crate) manifest: Manifest,
    /// Who vouches for it; comes along.
    pub(crate) signature: Option<Vec<u8>>,
}

impl Store {
    /// Copies a snapshot to another store, as `name` or by the name it has here: what is there already is not moved.
    /// Whenever `stop` says so, it ends. `progress` counts stored bytes.
    ///
    /// # Errors
    /// When something of it is damaged, its name is taken there, a store cannot be read or written, or it is stopped.
    pub fn copy_to(
        &self,
        id: &SnapshotId,
        to: &Store,
        name: Option<&str>,
        stop: &dyn Fn() -> bool,
        progress: Progress<'_>,
    ) -> Result<Arrived, StoreError> {
        let copied = self.copied(id)?;
        let name = match name {
            Some(name) => name.to_owned(),
            None => self.alias(id)?.unwrap_or_else(|| copied.manifest.name.clone()),
        };
        let intake = Intake::begin(to, &copied, &name)?;
        let needed = self.needed(&copied.manifest)?;
        let wanted = {
            let there = to.index();
            self.select(&needed, |address| !there.is_usable(address))
        };
        let mut chunks = Chunks::new(&intake.target);
        let mut published = 0;
        self.each_chunk(
            &wanted,
            &mut |kind, address, bytes| {
                if stop() {
                    return Err(StoreError::Stopped);
                }
                intake.take(&mut chunks, kind, address, bytes)?;
                if intake.target.staged_bytes() >= published + PUBLISH_BYTES {
                    intake.target.publish_staged()?;
                    published = intake.target.staged_bytes();
                }
                Ok(())
            },
            progress,
        )?;
        chunks.flush()?;
        drop(chunks);
        intake.settle(&copied, &name, needed.len(), |part| StoreError::NotWritten { part })
    }

    /// A snapshot's manifest, checked, with its bytes.
    pub(crate) fn copied(&self, id: &SnapshotId) -> Result<Copied, StoreError> {
        let bytes = self.manifest_bytes(id)?;
        let manifest = self.parse_manifest(id, &bytes)?;
        // Another process may have taken it.
        self.refresh()?;
        Ok(Copied { id: *id, bytes, manifest, signature: self.sound_signature(id)? })
    }

    /// The chunks that a snapshot needs.
    pub(crate) fn needed(&self, manifest: &Manifest) -> Result<ChunkSet, StoreError> {
        let mut needed = Needed::new(self);
        for part in manifest.parts() {
            tree::walk(&part.shape, &part.root, &mut needed)
                .map_err(|error| error.within(&part.name, None))?;
        }
        Ok(needed.chunks)
    }

    /// Those of a set's chunks whose address is wanted.
    pub(crate) fn select(&self, of: &ChunkSet, wanted: impl Fn(&Address) -> bool) -> ChunkSet {
        let mut selected = ChunkSet::default();
        for (pack, _) in self.index().packs() {
            for (number, address) in (pack.first..).zip(&pack.table.addresses) {
                if of.contains(number) && wanted(address) {
                    selected.insert(number);
                }
            }
        }
        selected
    }

    /// Hands on every chunk of a set once, checked, data before nodes. `progress` counts the stored bytes of the groups
    /// that they are in.
    pub(crate) fn each_chunk(
        &self,
        wanted: &ChunkSet,
        take: Take<'_>,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let runs = self.runs_of(wanted);
        let total: u64 = runs.iter().flatten().map(Run::group_bytes).sum();
        let mut done = 0;
        progress(0, total);
        for runs in runs {
            self.each_run(wanted, &runs, &mut |batch| {
                for (address, range) in &batch.chunks {
                    take(batch.kind, address, &batch.raw[range.clone()])?;
                }
                done += batch.stored_bytes;
                progress(done, total);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Where the chunks of a set are: data, then nodes.
    fn runs_of(&self, wanted: &ChunkSet) -> [Vec<Run>; 2] {
        let mut runs = [Vec::new(), Vec::new()];
        for (pack, _) in self.index().packs() {
            let runs: &mut Vec<Run> = &mut runs[usize::from(pack.table.kind == PackKind::Tree)];
            for (group, at) in pack.table.groups.iter().enumerate() {
                if !at.chunk_range().any(|chunk| wanted.contains(pack.first + chunk as u32)) {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.takes(pack, group) => run.groups.end = group + 1,
                    _ => runs.push(Run { pack: Arc::clone(pack), groups: group..group + 1 }),
                }
            }
        }
        runs
    }

    /// Reads runs ahead, and hands on what is in them.
    fn each_run(
        &self,
        wanted: &ChunkSet,
        runs: &[Run],
        take: &mut dyn FnMut(Batch) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let ahead = self.backend().reading().at_once.clamp(AHEAD_MIN, AHEAD_MAX);
        thread::scope(|scope| {
            let (sender, batches) = mpsc::sync_channel(ahead);
            for _ in 0..ahead.min(runs.len()) {
                let (sender, next, stop) = (sender.clone(), &next, &stop);
                scope.spawn(move || {
                    let mut opener = Opener::new();
                    while !stop.load(Ordering::Relaxed)
                        && let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let batch = self.read_run(wanted, run, &mut opener);
                        // After an error nobody receives any more.
                        if sender.send(batch).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            let result = batches.iter().try_for_each(|batch| take(batch?));
            stop.store(true, Ordering::Relaxed);
            // Whoever waits to send learns of it.
            drop(batches);
            result
        })
    }

    fn read_run(&self, wanted: &ChunkSet, run: &Run, opener: &mut Opener) -> Result<Batch, StoreError> {
        // For this run alone: whoever collects waits for it.
        let _held = self.hold_packs();
        let table = &run.pack.table;
        let (first, last) = (&table.groups[run.groups.start], &table.groups[run.groups.end - 1]);
        let mut stored = vec![0; (last.end() - first.offset) as usize];
        let read = self.backend().read_range(&pack_key(&run.pack.id), first.offset.into(), &mut stored);
        let mut batch =
            Batch { kind: table.kind, raw: Vec::new(), chunks: Vec::new(), stored_bytes: run.group_bytes() };
        let whole = match read {
            Ok(()) => true,
            // Perhaps only a part of it cannot be read: each group by itself.
            Err(error) if error.is_damage() => {
                self.refresh_if_gone(&error)?;
                false
            }
            Err(error) => return Err(error),
        };
        let (mut raw, mut cache) = (Vec::new(), NodeCache::default());
        for group in run.groups.clone() {
            let at = &table.groups[group];
            let opened = if whole {
                let range = (at.offset - first.offset) as usize..(at.end() - first.offset) as usize;
                self.open_group(&run.pack, group, &stored[range], opener, &mut raw)
            } else {
                self.read_group(&run.pack, group, opener, &mut raw)
            };
            let is_open = match opened {
                Ok(()) => true,
                Err(error) if error.is_damage() => false,
                Err(error) => return Err(error),
            };
            let mut offset = 0;
            for chunk in at.chunk_range() {
                let range = offset..offset + table.chunk_bytes(chunk);
                offset = range.end;
                if !wanted.contains(run.pack.first + chunk as u32) {
                    continue;
                }
                let address = table.addresses[chunk];
                let found = Found { pack: Arc::clone(&run.pack), chunk, group };
                if is_open && self.check_chunk(&found, &address, &raw[range.clone()]).is_ok() {
                    batch.push(address, &raw[range]);
                } else {
                    // From wherever it is now, if it is: the pack may be damaged, or repacked by another process.
                    batch.push(address, &self.chunk(&address, &mut cache)?);
                }
            }
        }
        Ok(batch)
    }
}

/// Adjacent groups of a pack, each with something that is wanted.
#[derive(Debug)]
struct Run {
    pack: Arc<Pack>,
    groups: Range<usize>,
}

impl Run {
    fn takes(&self, pack: &Arc<Pack>, group: usize) -> bool {
        self.pack.id == pack.id
            && self.groups.end == group
            && self.groups.len() < RUN_GROUPS
            && self.group_bytes() + u64::from(pack.table.groups[group].stored_bytes) <= RUN_BYTES
    }

    fn group_bytes(&self) -> u64 {
        self.pack.table.groups[self.groups.clone()].iter().map(|group| u64::from(group.stored_bytes)).sum()
    }
}

/// Chunks that have been read and checked.
#[derive(Debug)]
struct Batch {
    kind: PackKind,
    raw: Vec<u8>,
    chunks: Vec<(Address, Range<usize>)>,
    stored_bytes: u64,
}

impl Batch {
    fn push(&mut self, address: Address, bytes: &[u8]) {
        let start = self.raw.len();
        self.raw.extend_from_slice(bytes);
        self.chunks.push((address, start..self.raw.len()));
    }
}

/// A snapshot on its way into a store.
#[derive(Debug)]
pub(crate) struct Intake {
    store: Store,
    pub(crate) target: Target,
    was_there: bool,
    new_chunks: AtomicUsize,
}

impl Intake {
    /// Begins to take in a snapshot that is to be called `name`, unless another is.
    pub(crate) fn begin(store: &Store, copied: &Copied, name: &str) -> Result<Self, StoreError> {
        check_snapshot_name(name)
            .map_err(|problem| StoreError::BadName { name: name.to_owned(), problem })?;
        // The session first: from here on nothing that the index holds can go.
        let session = store.backend().begin()?;
        store.refresh()?;
        let was_there = store.exists(&copied.id)?;
        let environment = &copied.manifest.environment;
        if !was_there && let Some(id) = store.find_name(environment, name)? {
            return Err(StoreError::NameInUse {
                environment: environment.clone(),
                name: name.to_owned(),
                id,
            });
        }
        let target = Target::new(store.clone(), session);
        Ok(Self { store: store.clone(), target, was_there, new_chunks: AtomicUsize::new(0) })
    }

    /// Stores a chunk, which has been checked, unless it is there.
    pub(crate) fn take(
        &self,
        chunks: &mut Chunks<'_>,
        kind: PackKind,
        address: &Address,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        if self.store.index().is_usable(address) || !self.target.claim(address) {
            return Ok(());
        }
        self.new_chunks.fetch_add(1, Ordering::Relaxed);
        chunks.push(kind, *address, bytes)
    }

    /// Makes it a snapshot of the store: all of it, durably, or (on an error) nothing. `lacking` makes the error when a
    /// part of it did not come.
    pub(crate) fn settle(
        self,
        copied: &Copied,
        name: &str,
        chunks: u64,
        lacking: impl Fn(String) -> StoreError,
    ) -> Result<Arrived, StoreError> {
        self.target.publish()?;
        for part in copied.manifest.parts() {
            let mut look = Look {
                store: &self.store,
                nodes: NodeCache::default(),
                shape: part.shape,
                followed: Vec::new(),
            };
            match tree::walk(&part.shape, &part.root, &mut look) {
                Ok(()) => {}
                Err(error) if error.is_damage() => return Err(lacking(part.name)),
                Err(error) => return Err(error),
            }
        }
        let name = if self.was_there {
            // Whoever vouches for it here already goes on doing so.
            if let Some(signature) = &copied.signature
                && self.store.sound_signature(&copied.id)?.is_none()
            {
                self.store.put_signature(&copied.id, signature)?;
            }
            self.store.alias(&copied.id)?.unwrap_or_else(|| copied.manifest.name.clone())
        } else {
            self.enter(copied, name)?;
            name.to_owned()
        };
        if let Err(error) = self.target.end() {
            // It is a snapshot all the same; recovery removes what is left.
            tracing::warn!(id = %copied.id, %error, "cannot remove what was staged");
        }
        let disks = copied.manifest.machines.iter().flat_map(|machine| &machine.disks);
        Ok(Arrived {
            id: copied.id,
            name,
            environment: copied.manifest.environment.clone(),
            was_there: self.was_there,
            logical_bytes: copied
                .manifest
                .parts()
                .iter()
                .fold(0, |sum: u64, part| sum.saturating_add(part.shape.bytes)),
            chunks,
            new_chunks: self.new_chunks.load(Ordering::Relaxed) as u64,
            new_bytes: self.target.staged_bytes(),
            bases: disks.filter_map(|disk| disk.base.clone()).collect(),
        })
    }

    /// Takes the name and writes the manifest, which is what makes it a snapshot.
    fn enter(&self, copied: &Copied, name: &str) -> Result<(), StoreError> {
        let (backend, id) = (self.store.backend(), &copied.id);
        let environment = &copied.manifest.environment;
        crate::write::take_name(&self.store, environment, name, id)?;
        let alias_key = alias_key(id);
        if name == copied.manifest.name {
            // One that is left of an earlier time.
            backend.remove(&alias_key, None)?;
        } else {
            backend.replace(&alias_key, name.as_bytes())?;
        }
        let (key, signature) = (name_key(environment, name), copied.signature.as_deref());
        let created =
            crate::write::create_manifest(&self.store, &self.target, id, &copied.bytes, &key, signature);
        if created.is_err()
            && let Err(undo) = backend.remove(&alias_key, None)
        {
            tracing::error!(%id, error = %undo, "cannot take back a snapshot's other name");
        }
        // Where somebody else was faster, it is the same manifest.
        created.map(drop)
    }
}

/// Looks whether all of a tree is there, each chunk of its place's length.
struct Look<'a> {
    store: &'a Store,
    nodes: NodeCache,
    shape: Shape,
    /// By level; whole nodes alone: what is below the last one of a level may be shorter.
    followed: Vec<ChunkSet>,
}

impl Look<'_> {
    fn usable(&self, address: &Address) -> Result<Found, StoreError> {
        if self.store.index().is_usable(address) {
            return self.store.find(address);
        }
        let packs = self.store.backend().locate(crate::root::PACKS);
        Err(StoreError::corrupt(&packs, Damage::NoChunk { address: *address }))
    }
}

impl Visitor for Look<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.usable(address)?;
        let level = place.level as usize;
        if self.followed.len() <= level {
            self.followed.resize_with(level + 1, ChunkSet::default);
        }
        let span = Shape::span(place.level).saturating_mul(tree::FANOUT as u64);
        let is_whole = place.first_leaf.saturating_add(span) < self.shape.leaves();
        if is_whole && !self.followed[level].insert(found.pack.first + found.chunk as u32) {
            return Ok(None);
        }
        self.store.node(address, place.children, &mut self.nodes).map(Some)
    }

    fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), StoreError> {
        let found = self.usable(address)?;
        if found.pack.table.chunk_bytes(found.chunk) as u64 == self.shape.leaf_length(leaf) {
            return Ok(());
        }
        Err(self.store.misfit(&found.pack, address))
    }
}
