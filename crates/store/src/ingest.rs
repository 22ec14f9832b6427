//! From contents to chunks, and from new chunks to packs.
//!
//! [`Ingest`] is one file being taken in, by one thread; [`Target`] is what all threads of a writer fill. Each leaf and
//! each node is looked up by itself, also below a node that is known: a look-up costs a twentieth of the hash, and so
//! what a damaged store has lost is stored again with the next snapshot that has it.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Progress;
use crate::address::Address;
use crate::backend::Session;
use crate::blocks::{self, is_zero};
use crate::error::StoreError;
use crate::fetch::NodeCache;
use crate::pack::{GroupBuilder, PackBuilder, PackId, PackKind, SealedGroup, Table};
use crate::root::{Store, pack_key};
use crate::seal::random_bytes;
use crate::tree::{self, Builder, Place, Shape, Visitor};

/// How many locks the set of claimed chunks has: more than there are threads.
const SHARDS: usize = 64;

/// What [`Ingest`] made of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    pub(crate) root: Address,
    /// In leaves that are not all zeros.
    pub(crate) used_bytes: u64,
}

/// Where new chunks go.
#[derive(Debug)]
pub(crate) struct Target {
    store: Store,
    session: Mutex<Option<Box<dyn Session>>>,
    /// New chunks that one of the threads has taken on.
    claimed: Vec<Mutex<HashSet<Address>>>,
    data: Packer,
    tree: Packer,
    staged_bytes: AtomicU64,
    /// A pack could not be staged, and others may rely on it.
    broken: AtomicBool,
}

#[derive(Debug)]
struct Packer {
    kind: PackKind,
    open: Mutex<Option<PackBuilder>>,
    staged: Mutex<Vec<(PackId, Table)>>,
}

impl Target {
    pub(crate) fn new(store: Store, session: Box<dyn Session>) -> Self {
        Self {
            store,
            session: Mutex::new(Some(session)),
            claimed: (0..SHARDS).map(|_| Mutex::default()).collect(),
            data: Packer::new(PackKind::Data),
            tree: Packer::new(PackKind::Tree),
            staged_bytes: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// Stages the packs that are not full yet.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        for packer in [&self.data, &self.tree] {
            let open = lock(&packer.open).take();
            if let Some(pack) = open {
                self.stage(packer, pack)?;
            }
        }
        Ok(())
    }

    /// The packs' length so far.
    pub(crate) fn staged_bytes(&self) -> u64 {
        self.staged_bytes.load(Ordering::Relaxed)
    }

    /// Makes all packs durable and known. Data before trees: whoever finds a node finds what is below it.
    pub(crate) fn publish(&self) -> Result<(), StoreError> {
        self.close()?;
        self.publish_staged()
    }

    /// The same for the packs that are full, while others are still being filled.
    pub(crate) fn publish_staged(&self) -> Result<(), StoreError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(StoreError::WriterFailed { part: "a pack".to_owned() });
        }
        for packer in [&self.data, &self.tree] {
            let staged = std::mem::take(&mut *lock(&packer.staged));
            let keys: Vec<String> = staged.iter().map(|(id, _)| pack_key(id)).collect();
            match &*lock(&self.session) {
                Some(session) => session.publish(&keys)?,
                None => assert!(keys.is_empty(), "nothing is staged after the end"),
            }
            let mut index = self.store.index_mut();
            for (id, table) in staged {
                index.add(id, table, false)?;
            }
        }
        Ok(())
    }

    /// See [`Session::check`].
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        lock(&self.session).as_ref().map_or(Ok(()), |session| session.check())
    }

    /// See [`Session::confirm`].
    pub(crate) fn confirm(&self) -> Result<(), StoreError> {
        lock(&self.session).as_ref().map_or(Ok(()), |session| session.confirm())
    }

    pub(crate) fn end(&self) -> Result<(), StoreError> {
        lock(&self.session).take().map_or(Ok(()), Session::end)
    }

    /// Whether every chunk of a tree is there to be relied on.
    pub(crate) fn has_tree(&self, shape: &Shape, root: &Address) -> Result<bool, StoreError> {
        let mut seen = Seen { store: &self.store, nodes: NodeCache::default(), missing: false };
        match tree::walk(shape, root, &mut seen) {
            Ok(()) => Ok(!seen.missing),
            // Then it is stored again.
            Err(error) if error.is_damage() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the caller is the one to store this chunk.
    pub(crate) fn claim(&self, address: &Address) -> bool {
        lock(&self.claimed[address.prefix() as usize % SHARDS]).insert(*address)
    }

    fn add(&self, kind: PackKind, group: SealedGroup) -> Result<(), StoreError> {
        let packer = if kind == PackKind::Data { &self.data } else { &self.tree };
        let full = {
            let mut open = lock(&packer.open);
            let mut pack = open.take().unwrap_or_else(|| PackBuilder::new(packer.kind, random_bytes()));
            pack.add(group);
            if !pack.is_full() {
                *open = Some(pack);
                return Ok(());
            }
            pack
        };
        self.stage(packer, full)
    }

    fn stage(&self, packer: &Packer, pack: PackBuilder) -> Result<(), StoreError> {
        let (id, bytes, table) = pack.finish();
        self.staged_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        // Written while the lock is held: one disk takes one pack at a time as fast as two.
        let staged = match &*lock(&self.session) {
            Some(session) => session.stage(&pack_key(&id), &bytes),
            None => unreachable!("nothing is written after the end"),
        };
        self.broken.fetch_or(staged.is_err(), Ordering::Relaxed);
        staged?;
        lock(&packer.staged).push((id, table));
        Ok(())
    }
}

impl Packer {
    fn new(kind: PackKind) -> Self {
        Self { kind, open: Mutex::default(), staged: Mutex::default() }
    }
}

/// One file being taken in.
pub(crate) struct Ingest<'a> {
    target: &'a Target,
    shape: Shape,
    builder: Builder,
    chunks: Chunks<'a>,
    used_bytes: u64,
    /// The addresses of a block's leaves, and which of them are new.
    addresses: Vec<(Address, bool)>,
}

/// New chunks on their way into groups.
pub(crate) struct Chunks<'a> {
    target: &'a Target,
    data: GroupBuilder,
    tree: GroupBuilder,
}

impl<'a> Chunks<'a> {
    pub(crate) fn new(target: &'a Target) -> Self {
        Self { target, data: GroupBuilder::new(PackKind::Data), tree: GroupBuilder::new(PackKind::Tree) }
    }

    pub(crate) fn push(&mut self, kind: PackKind, address: Address, chunk: &[u8]) -> Result<(), StoreError> {
        let group = if kind == PackKind::Data { &mut self.data } else { &mut self.tree };
        if !group.fits(chunk.len())
            && let Some(sealed) = group.seal()
        {
            self.target.add(kind, sealed)?;
        }
        group.push(address, chunk);
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), StoreError> {
        for (kind, group) in [(PackKind::Data, &mut self.data), (PackKind::Tree, &mut self.tree)] {
            if let Some(sealed) = group.seal() {
                self.target.add(kind, sealed)?;
            }
        }
        Ok(())
    }
}

impl<'a> Ingest<'a> {
    pub(crate) fn new(target: &'a Target, shape: Shape) -> Self {
        Self {
            target,
            shape,
            builder: Builder::new(&shape),
            chunks: Chunks::new(target),
            used_bytes: 0,
            addresses: Vec::new(),
        }
    }

    /// Takes in a file of the shape's length; `path` is for messages.
    pub(crate) fn file(
        mut self,
        file: &File,
        path: &Path,
        progress: Progress<'_>,
    ) -> Result<Stored, StoreError> {
        let total = self.shape.bytes;
        blocks::walk(
            file,
            total,
            |_, e| StoreError::io("read", path, e),
            |block| {
                self.block(block.bytes, block.is_zero())?;
                progress(block.end(), total);
                Ok(())
            },
        )?;
        self.finish()
    }

    /// Takes in bytes of the shape's length.
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Result<Stored, StoreError> {
        self.block(bytes, false)?;
        self.finish()
    }

    /// Whole leaves, but for the file's last.
    fn block(&mut self, bytes: &[u8], is_hole: bool) -> Result<(), StoreError> {
        let leaf_bytes = self.shape.leaf_bytes as usize;
        self.addresses.clear();
        for leaf in bytes.chunks(leaf_bytes) {
            let address = if is_hole || is_zero(leaf) { Address::ZERO } else { Address::of(leaf) };
            self.addresses.push((address, false));
        }
        {
            let index = self.target.store.index();
            for (address, new) in &mut self.addresses {
                *new = !address.is_zero() && !index.is_usable(address);
            }
        }
        for (leaf, (address, new)) in bytes.chunks(leaf_bytes).zip(&self.addresses) {
            if !address.is_zero() {
                self.used_bytes += leaf.len() as u64;
            }
            if *new && self.target.claim(address) {
                self.chunks.push(PackKind::Data, *address, leaf)?;
            }
            self.builder.leaf(*address, &mut |address, node| store_node(&mut self.chunks, address, node))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Stored, StoreError> {
        let root = self.builder.finish(&mut |address, node| store_node(&mut self.chunks, address, node))?;
        self.chunks.flush()?;
        Ok(Stored { root, used_bytes: self.used_bytes })
    }
}

fn store_node(chunks: &mut Chunks<'_>, address: Address, node: &[u8]) -> Result<(), StoreError> {
    let known = chunks.target.store.index().is_usable(&address);
    if !known && chunks.target.claim(&address) {
        chunks.push(PackKind::Tree, address, node)?;
    }
    Ok(())
}

/// Looks whether all of a tree is there.
struct Seen<'a> {
    store: &'a Store,
    nodes: NodeCache,
    missing: bool,
}

impl Visitor for Seen<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        if self.missing || !self.store.index().is_usable(address) {
            self.missing = true;
            return Ok(None);
        }
        self.store.node(address, place.children, &mut self.nodes).map(Some)
    }

    fn leaf(&mut self, _: u64, address: &Address) -> Result<(), StoreError> {
        self.missing |= !self.store.index().is_usable(address);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panicking thread left is not committed: its part is not in the ledger.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
