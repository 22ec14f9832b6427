//! Giving back the space of what no snapshot needs: a plan, and then its execution.
//!
//! A pack is written once, so that space is given back by removing whole packs. One that holds too little that is
//! needed is *repacked* first: what is needed of it goes into a new pack.
//!
//! # Beside writers
//!
//! A writer that finds a chunk in the store relies on it until its manifest is there, and says so to nobody. So packs
//! are not just removed:
//!
//! 1. An empty object `doomed/<pack>` is made for each pack that is to go. A writer that begins later sees it, and
//!    stores again what it would have found there.
//! 2. The marks are listed, and only when no other session is alive then, the snapshots that have appeared since the
//!    plan are traced. A pack of that list that one of them needs is spared: its mark is removed.
//! 3. The other packs of that list are removed, and then their marks.
//!
//! A writer that began before step 1 holds its session until it has committed or given up; as long as there is one,
//! step 2 waits for the next time (`deferred`). Sessions are listed after the marks, and snapshots after the sessions:
//! who was missed by the one is seen by the other. What another collector marks after step 2 is not this one's to
//! remove: a writer may have begun in between.
//!
//! A collector has a session too. If it is stopped half-way and loses it (where sessions can be lost), another one may
//! do the same work beside it. Both remove only what, at one moment when no writer was alive, was doomed and not
//! needed; and what is so once is never needed again, since whoever begins later stores those chunks anew.
//!
//! # Crashes
//!
//! After each step the store is whole: a mark alone costs nothing but space, a pack that is there twice neither, and a
//! mark without its pack is removed by the next run. New packs are durable before old ones are doomed.
//!
//! Invariant: nothing is removed unless every manifest and every node could be read. What cannot be read may need
//! anything.

use std::collections::{BTreeMap, BTreeSet};

use crate::Progress;
use crate::address::Address;
use crate::error::{Damage, StoreError};
use crate::fetch::NodeCache;
use crate::id::SnapshotId;
use crate::index::{ChunkSet, Index, Pack};
use crate::ingest::{Chunks, Target};
use crate::pack::{Opener, PACK_BYTES, PackId};
use crate::root::{Store, doomed_key, pack_key};
use crate::signature::signature_key;
use crate::tree::{self, Place, Visitor};

/// From how many small packs on they are joined.
const SMALL_PACKS_MAX: usize = 64;
/// A pack below this length is small.
const SMALL_BYTES: u64 = PACK_BYTES as u64 / 8;

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectOptions {
    /// A pack of which more than this share is not needed is repacked.
    pub unused_percent_max: u8,
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self { unused_percent_max: 30 }
    }
}

/// What is needed, and what would be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectPlan {
    /// How many snapshots were traced.
    pub snapshots: usize,
    /// How many chunks they need.
    pub needed_chunks: u64,
    /// About how many stored bytes those take.
    pub needed_bytes: u64,
    /// About how many stored bytes nobody needs.
    pub unused_bytes: u64,
    /// Packs that nobody needs.
    pub remove: Vec<PackId>,
    /// Packs of which a part goes into new ones.
    pub repack: Vec<PackId>,
    /// Doomed packs that are needed after all.
    pub spare: Vec<PackId>,
    /// How long the packs are that would go, in bytes.
    pub remove_bytes: u64,
    /// About how long the new packs would be.
    pub repack_bytes: u64,
}

/// What [`Store::collect`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// What was to be done.
    pub plan: CollectPlan,
    /// Packs removed.
    pub removed_packs: usize,
    /// What that gave back, less what new packs took.
    pub freed_bytes: u64,
    /// Others were writing: packs are marked, and removed next time.
    pub deferred: bool,
}

/// A plan, and what it was made of.
struct Planned {
    plan: CollectPlan,
    traced: BTreeSet<SnapshotId>,
    needed: ChunkSet,
}

impl Store {
    /// What [`Store::collect`] would do now.
    pub fn plan_collection(
        &self,
        options: CollectOptions,
        progress: Progress<'_>,
    ) -> Result<CollectPlan, StoreError> {
        Ok(self.planned(options, progress)?.plan)
    }

    /// Gives back the space of what no snapshot needs. `progress` counts snapshots traced, then bytes repacked.
    pub fn collect(&self, options: CollectOptions, progress: Progress<'_>) -> Result<Collected, StoreError> {
        self.recover()?;
        let target = Target::new(self.clone(), self.backend().begin()?);
        let mut planned = self.planned(options, progress)?;
        for id in &planned.plan.spare {
            self.backend().remove(&doomed_key(id), None)?;
        }
        self.repack(&target, &mut planned, progress)?;
        target.publish()?;
        let going: Vec<PackId> = planned.plan.remove.iter().chain(&planned.plan.repack).copied().collect();
        for id in &going {
            self.backend().create(&doomed_key(id), b"")?;
        }
        self.refresh()?;
        // Before the sessions: whoever begins after they were counted may rely on what is doomed later.
        let doomed = self.doomed()?;
        let signed = self.signed()?;
        let mut collected =
            Collected { plan: planned.plan, removed_packs: 0, freed_bytes: 0, deferred: false };
        // This one is among them.
        if self.backend().sessions()? > 1 {
            collected.deferred = !going.is_empty();
            target.end()?;
            return Ok(collected);
        }
        // Those of writers that died before their manifest was there: nobody is about to write it.
        for id in signed {
            if !self.exists(&id)? {
                self.backend().remove(&signature_key(&id), None)?;
            }
        }
        let spared = self.needed_since(&planned.traced)?;
        let _nobody_reads = self.release_packs();
        let lengths: BTreeMap<PackId, u64> =
            self.index().packs().map(|(pack, _)| (pack.id, pack.table.pack_bytes())).collect();
        let mut freed = 0;
        for id in &doomed {
            target.check()?;
            if spared.contains(id) {
                self.backend().remove(&doomed_key(id), None)?;
                continue;
            }
            if self.backend().remove(&pack_key(id), None)? {
                collected.removed_packs += 1;
                freed += lengths.get(id).copied().unwrap_or(0);
            }
            self.backend().remove(&doomed_key(id), None)?;
        }
        collected.freed_bytes = freed.saturating_sub(target.staged_bytes());
        self.refresh()?;
        target.end()?;
        Ok(collected)
    }

    fn planned(&self, options: CollectOptions, progress: Progress<'_>) -> Result<Planned, StoreError> {
        let mut needed = Needed::new(self);
        let traced: BTreeSet<SnapshotId> = self.ids()?.into_iter().collect();
        // After the list: what those snapshots need was there before they were.
        self.refresh()?;
        for (done, id) in traced.iter().enumerate() {
            needed.snapshot(id)?;
            progress(done as u64 + 1, traced.len() as u64);
        }
        let needed = needed.chunks;
        let plan = plan(&self.index(), &needed, traced.len(), options);
        Ok(Planned { plan, traced, needed })
    }

    /// The doomed packs that snapshots need which were not traced before.
    fn needed_since(&self, traced: &BTreeSet<SnapshotId>) -> Result<BTreeSet<PackId>, StoreError> {
        let mut needed = Needed::new(self);
        let ids = self.ids()?;
        self.refresh()?;
        for id in ids {
            if !traced.contains(&id) {
                needed.snapshot(&id)?;
            }
        }
        let needed = needed.chunks;
        let index = self.index();
        let doomed = index.packs().filter(|(pack, doomed)| *doomed && uses(&needed, pack).0 > 0);
        Ok(doomed.map(|(pack, _)| pack.id).collect())
    }

    /// Copies what is needed of the packs to be repacked. A pack that is damaged is left as it is.
    fn repack(
        &self,
        target: &Target,
        planned: &mut Planned,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let packs: Vec<_> = {
            let index = self.index();
            let repack: BTreeSet<&PackId> = planned.plan.repack.iter().collect();
            let packs = index.packs().map(|(pack, _)| pack).filter(|pack| repack.contains(&pack.id));
            packs.cloned().collect()
        };
        let mut opener = Opener::new();
        let mut raw = Vec::new();
        let mut damaged = BTreeSet::new();
        let total = packs.iter().map(|pack| pack.table.pack_bytes()).sum();
        let mut done = 0;
        for pack in &packs {
            let mut chunks = Chunks::new(target);
            for (group, at) in pack.table.groups.iter().enumerate() {
                let wanted = |chunk: usize| planned.needed.contains(pack.first + chunk as u32);
                if !at.chunk_range().any(wanted) {
                    continue;
                }
                let read = self.read_group(pack, group, &mut opener, &mut raw).and_then(|()| {
                    pack.table.check_chunks(group, &raw).map_err(|problem| {
                        let file = self.backend().locate(&pack_key(&pack.id));
                        StoreError::corrupt(&file, Damage::Pack(problem))
                    })
                });
                match read {
                    Ok(()) => {}
                    Err(error) if error.is_damage() => {
                        tracing::warn!(%error, "a damaged pack is not repacked");
                        damaged.insert(pack.id);
                        break;
                    }
                    Err(error) => return Err(error),
                }
                let mut rest = &raw[..];
                for chunk in at.chunk_range() {
                    let (bytes, after) = rest.split_at(pack.table.chunk_bytes(chunk));
                    rest = after;
                    if wanted(chunk) {
                        chunks.push(pack.table.kind, pack.table.addresses[chunk], bytes)?;
                    }
                }
            }
            chunks.flush()?;
            done += pack.table.pack_bytes();
            progress(done, total);
        }
        planned.plan.repack.retain(|id| !damaged.contains(id));
        Ok(())
    }
}

/// How many chunks of a pack are needed, and about how many stored bytes those take: of each group, the same share as
/// of its raw bytes.
fn uses(needed: &ChunkSet, pack: &Pack) -> (u64, u64) {
    let table = &pack.table;
    let (mut chunks, mut stored) = (0, 0);
    for group in &table.groups {
        let needed = group.chunk_range().filter(|chunk| needed.contains(pack.first + *chunk as u32));
        let (count, raw) =
            needed.fold((0, 0), |(count, raw), chunk| (count + 1, raw + table.chunk_bytes(chunk)));
        chunks += count;
        stored += u64::from(group.stored_bytes) * raw as u64 / u64::from(group.raw_bytes);
    }
    (chunks, stored)
}

fn plan(index: &Index, needed: &ChunkSet, snapshots: usize, options: CollectOptions) -> CollectPlan {
    let mut plan = CollectPlan {
        snapshots,
        needed_chunks: 0,
        needed_bytes: 0,
        unused_bytes: 0,
        remove: Vec::new(),
        repack: Vec::new(),
        spare: Vec::new(),
        remove_bytes: 0,
        repack_bytes: 0,
    };
    let percent_max = u64::from(options.unused_percent_max.min(100));
    let mut small = Vec::new();
    for (pack, doomed) in index.packs() {
        let length = pack.table.pack_bytes();
        let (chunks, stored) = uses(needed, pack);
        // What frames the groups counts as they do.
        let groups: u64 = pack.table.groups.iter().map(|group| u64::from(group.stored_bytes)).sum();
        let used = (length * stored).checked_div(groups).unwrap_or(0);
        plan.needed_chunks += chunks;
        plan.needed_bytes += used;
        plan.unused_bytes += length - used;
        if chunks == 0 {
            plan.remove.push(pack.id);
            plan.remove_bytes += length;
        } else if (length - used) * 100 > length * percent_max {
            plan.repack.push(pack.id);
            plan.remove_bytes += length;
            plan.repack_bytes += used;
        } else if doomed {
            plan.spare.push(pack.id);
        } else if length < SMALL_BYTES {
            small.push((pack.id, length, used));
        }
    }
    if small.len() >= SMALL_PACKS_MAX {
        for (id, length, used) in small {
            plan.repack.push(id);
            plan.remove_bytes += length;
            plan.repack_bytes += used;
        }
    }
    plan
}

/// Traces snapshots.
pub(crate) struct Needed<'a> {
    store: &'a Store,
    nodes: NodeCache,
    pub(crate) chunks: ChunkSet,
    /// Nodes that have been followed, by level. Apart from `chunks`, and from other levels: a guest can write a leaf
    /// that is some node's bytes.
    followed: Vec<ChunkSet>,
}

impl<'a> Needed<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store, nodes: NodeCache::default(), chunks: ChunkSet::default(), followed: Vec::new() }
    }

    /// Adds what one snapshot needs. One that was removed meanwhile needs nothing.
    pub(crate) fn snapshot(&mut self, id: &SnapshotId) -> Result<(), StoreError> {
        let cannot = |source| StoreError::CannotCollect { source: Box::new(source) };
        let manifest = match self.store.read_manifest(id) {
            Ok(manifest) => manifest,
            Err(StoreError::Missing { .. }) => return Ok(()),
            Err(error @ (StoreError::Corrupt { .. } | StoreError::UnsupportedSnapshot { .. })) => {
                return Err(cannot(error));
            }
            Err(error) => return Err(error),
        };
        for part in manifest.parts() {
            match tree::walk(&part.shape, &part.root, self) {
                Ok(()) => {}
                Err(error) if error.is_damage() => {
                    // If it is gone, so may be what it needed.
                    if self.store.exists(id)? {
                        return Err(cannot(error.within(&part.name, None)));
                    }
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn number(&self, address: &Address) -> Result<u32, StoreError> {
        let found = self.store.index().find(address);
        found.ok_or_else(|| {
            let packs = self.store.backend().locate(crate::root::PACKS);
            StoreError::corrupt(&packs, Damage::NoChunk { address: *address })
        })
    }
}

impl Visitor for Needed<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        let number = self.number(address)?;
        self.chunks.insert(number);
        let level = place.level as usize;
        if self.followed.len() <= level {
            self.followed.resize_with(level + 1, ChunkSet::default);
        }
        if !self.followed[level].insert(number) {
            return Ok(None);
        }
        self.store.node(address, place.children, &mut self.nodes).map(Some)
    }

    fn leaf(&mut self, _: u64, address: &Address) -> Result<(), StoreError> {
        let number = self.number(address)?;
        self.chunks.insert(number);
        Ok(())
    }
}
