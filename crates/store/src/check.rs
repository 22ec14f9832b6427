//! Looking whether a store is whole, and mending what can be made again from the rest of it.
//!
//! What can be mended is what says nothing of its own: names, which every manifest says too. A chunk that is lost is
//! lost; the next snapshot that has it stores it again.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::Progress;
use crate::address::Address;
use crate::catalog::{manifest_key, name_key};
use crate::error::{Damage, StoreError};
use crate::fetch::NodeCache;
use crate::id::SnapshotId;
use crate::index::ChunkSet;
use crate::manifest::{Manifest, check_part_name, check_snapshot_name};
use crate::pack::{Opener, PackId};
use crate::root::{Store, pack_key};
use crate::signature::Signature;
use crate::tree::{self, Place, Visitor};

/// How far a check goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Read and hash every byte, not only tables, nodes and manifests.
    pub read_data: bool,
    /// Mend what can be mended.
    pub repair: bool,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Packs that were looked at.
    pub packs: usize,
    /// Chunks that they hold.
    pub chunks: u64,
    /// Snapshots that were traced.
    pub snapshots: usize,
    /// Bytes of packs whose hash was computed, beyond tables.
    pub checked_bytes: u64,
    /// What is wrong and was not mended.
    pub problems: Vec<CheckProblem>,
    /// What was wrong and is mended.
    pub repaired: Vec<CheckProblem>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckProblem {
    /// The damaged object.
    pub object: PathBuf,
    /// What is wrong.
    pub kind: CheckProblemKind,
}

/// What can be wrong with a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckProblemKind {
    /// An object is not what was written.
    #[error("{0}")]
    Damaged(Damage),
    /// A snapshot cannot be restored whole.
    #[error("snapshot {} needs what is lost: {part} at offset {offset}, and {} more", id.short(), places - 1)]
    Incomplete {
        /// The snapshot.
        id: SnapshotId,
        /// The first part that is not whole.
        part: String,
        /// Where in it.
        offset: u64,
        /// How many leaves and nodes are lost, in all its parts.
        places: usize,
    },
    /// A snapshot's name is not its own. `store check --repair` mends it.
    #[error("the name {environment}/{name} does not lead to snapshot {}", id.short())]
    Nameless {
        /// The snapshot.
        id: SnapshotId,
        /// Its environment.
        environment: String,
        /// Its name.
        name: String,
    },
}

impl Store {
    /// Looks at every pack's table, every manifest and every node; with `read_data`, at every byte.
    pub fn check(&self, options: CheckOptions, progress: Progress<'_>) -> Result<CheckReport, StoreError> {
        let mut report = CheckReport::default();
        // Snapshots before packs: what they need was there before them.
        let ids = self.ids()?;
        let mut lost = HashSet::new();
        if let Some(keyring) = self.keyring() {
            for damage in keyring.slots()?.1 {
                report.add(damage)?;
            }
        }
        self.check_packs(options, &mut report, &mut lost, progress)?;
        let mut manifests = Vec::new();
        for id in ids {
            match self.read_manifest(&id) {
                Ok(manifest) => manifests.push((id, manifest)),
                Err(StoreError::Missing { .. }) => {}
                Err(StoreError::Corrupt { file, damage }) => {
                    report
                        .problems
                        .push(CheckProblem { object: file, kind: CheckProblemKind::Damaged(damage) });
                }
                // Another version's may be whole; this one cannot tell.
                Err(StoreError::UnsupportedSnapshot { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        report.snapshots = manifests.len();
        self.trace(&manifests, &mut lost)?;
        if !lost.is_empty() {
            for (id, manifest) in &manifests {
                self.attribute(id, manifest, &lost, &mut report)?;
            }
        }
        for (id, _) in &manifests {
            if let Signature::Wrong { object, damage } = self.signature(id)? {
                report.problems.push(CheckProblem { object, kind: CheckProblemKind::Damaged(damage) });
            }
        }
        for (id, manifest) in &manifests {
            self.check_name(id, manifest, options, &mut report)?;
        }
        Ok(report)
    }

    /// Looks at the packs alone, and notes the chunks that cannot be had.
    fn check_packs(
        &self,
        options: CheckOptions,
        report: &mut CheckReport,
        lost: &mut HashSet<Address>,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        for bad in self.refresh()? {
            report.add(bad.error)?;
        }
        let packs: Vec<_> = self.index().packs().map(|(pack, _)| pack.clone()).collect();
        let total: u64 = packs.iter().map(|pack| pack.table.pack_bytes()).sum();
        let mut done = 0;
        let mut opener = Opener::new();
        let mut raw = Vec::new();
        let mut bad = Vec::new();
        for pack in &packs {
            report.packs += 1;
            report.chunks += pack.table.len() as u64;
            // The table that is known may have been read long ago.
            let known = self.backend().length(&pack_key(&pack.id))?;
            let again = match known {
                Some(bytes) => self.read_table(&pack.id, bytes).map(drop),
                None => {
                    let file = self.backend().locate(&pack_key(&pack.id));
                    Err(StoreError::corrupt(&file, Damage::Missing))
                }
            };
            let mut sound = again.is_ok();
            if let Err(error) = again {
                report.add(error)?;
                bad.extend(pack.table.addresses.iter().map(|address| (*address, pack.id)));
            } else if options.read_data {
                for (group, at) in pack.table.groups.iter().enumerate() {
                    let checked = self.read_group(pack, group, &mut opener, &mut raw).and_then(|()| {
                        pack.table.check_chunks(group, &raw).map_err(|problem| {
                            let file = self.backend().locate(&pack_key(&pack.id));
                            StoreError::corrupt(&file, Damage::Pack(problem))
                        })
                    });
                    report.checked_bytes += u64::from(at.stored_bytes);
                    if let Err(error) = checked {
                        // One problem a pack; what else it lost shows in what the snapshots lack.
                        if std::mem::take(&mut sound) {
                            report.add(error)?;
                        } else if !error.is_damage() {
                            return Err(error);
                        }
                        let chunks = &pack.table.addresses[at.chunk_range()];
                        bad.extend(chunks.iter().map(|address| (*address, pack.id)));
                    }
                }
            }
            done += pack.table.pack_bytes();
            progress(done, total);
        }
        // A chunk that another pack holds undamaged is not lost.
        let damaged: HashSet<(Address, PackId)> = bad.iter().copied().collect();
        let index = self.index();
        for (address, pack) in bad {
            let elsewhere = index.others(&address, &pack);
            if elsewhere.iter().all(|other| damaged.contains(&(address, other.pack.id))) {
                lost.insert(address);
            }
        }
        Ok(())
    }

    /// Follows every tree, each node once, and notes what is lost.
    fn trace(
        &self,
        manifests: &[(SnapshotId, Manifest)],
        lost: &mut HashSet<Address>,
    ) -> Result<(), StoreError> {
        let mut tracer = Tracer { store: self, nodes: NodeCache::default(), followed: Vec::new(), lost };
        for (_, manifest) in manifests {
            for part in manifest.parts() {
                tree::walk(&part.shape, &part.root, &mut tracer)?;
            }
        }
        Ok(())
    }

    /// Says what one snapshot lacks.
    fn attribute(
        &self,
        id: &SnapshotId,
        manifest: &Manifest,
        lost: &HashSet<Address>,
        report: &mut CheckReport,
    ) -> Result<(), StoreError> {
        let mut first = None;
        let mut places = 0;
        for part in manifest.parts() {
            let mut search =
                Search { store: self, nodes: NodeCache::default(), lost, first: None, places: 0 };
            tree::walk(&part.shape, &part.root, &mut search)?;
            places += search.places;
            if let Some(leaf) = search.first {
                first.get_or_insert_with(|| (part.name.clone(), part.shape.offset(leaf)));
            }
        }
        if let Some((part, offset)) = first {
            let kind = CheckProblemKind::Incomplete { id: *id, part, offset, places };
            report.problems.push(CheckProblem { object: self.backend().locate(&manifest_key(id)), kind });
        }
        Ok(())
    }

    fn check_name(
        &self,
        id: &SnapshotId,
        manifest: &Manifest,
        options: CheckOptions,
        report: &mut CheckReport,
    ) -> Result<(), StoreError> {
        let alias = self.alias(id)?;
        let (environment, name) = (&manifest.environment, alias.as_ref().unwrap_or(&manifest.name));
        // Checked with the manifest, and they become a key here.
        debug_assert!(check_part_name(environment).is_ok() && check_snapshot_name(name).is_ok());
        let holder = self.find_name(environment, name)?;
        if holder == Some(*id) || !self.exists(id)? {
            return Ok(());
        }
        let key = name_key(environment, name);
        let kind =
            CheckProblemKind::Nameless { id: *id, environment: environment.clone(), name: name.clone() };
        let problem = CheckProblem { object: self.backend().locate(&key), kind };
        // One that leads to another snapshot is not taken away from that, if it is that one's.
        let is_taken = holder.map_or(Ok(false), |holder| self.goes_by(&holder, environment, name))?;
        if options.repair && !is_taken {
            self.backend().replace(&key, id.to_string().as_bytes())?;
            report.repaired.push(problem);
        } else {
            report.problems.push(problem);
        }
        Ok(())
    }

    /// Whether a snapshot says that this is its name, as far as can be told.
    fn goes_by(&self, id: &SnapshotId, environment: &str, name: &str) -> Result<bool, StoreError> {
        match self.load(id) {
            Ok(stored) => Ok(stored.manifest.environment == environment && stored.name == name),
            Err(StoreError::Missing { .. }) => Ok(false),
            Err(error) if error.is_damage() => Ok(true),
            Err(StoreError::UnsupportedSnapshot { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

impl CheckReport {
    /// Whether nothing is wrong (any more).
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    /// Notes damage; other errors are passed on.
    fn add(&mut self, error: StoreError) -> Result<(), StoreError> {
        let StoreError::Corrupt { file, damage } = error else { return Err(error) };
        self.problems.push(CheckProblem { object: file, kind: CheckProblemKind::Damaged(damage) });
        Ok(())
    }
}

struct Tracer<'a> {
    store: &'a Store,
    nodes: NodeCache,
    /// By level; see `collect`.
    followed: Vec<ChunkSet>,
    lost: &'a mut HashSet<Address>,
}

impl Visitor for Tracer<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(number) = self.store.index().find(address) else {
            self.lost.insert(*address);
            return Ok(None);
        };
        let level = place.level as usize;
        if self.followed.len() <= level {
            self.followed.resize_with(level + 1, ChunkSet::default);
        }
        if !self.followed[level].insert(number) {
            return Ok(None);
        }
        match self.store.node(address, place.children, &mut self.nodes) {
            Ok(node) => Ok(Some(node)),
            Err(error) if error.is_damage() => {
                self.lost.insert(*address);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn leaf(&mut self, _: u64, address: &Address) -> Result<(), StoreError> {
        if self.store.index().find(address).is_none() {
            self.lost.insert(*address);
        }
        Ok(())
    }
}

struct Search<'a> {
    store: &'a Store,
    nodes: NodeCache,
    lost: &'a HashSet<Address>,
    first: Option<u64>,
    places: usize,
}

impl Visitor for Search<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        match self.store.node(address, place.children, &mut self.nodes) {
            Ok(node) if !self.lost.contains(address) => Ok(Some(node)),
            Err(error) if !error.is_damage() => Err(error),
            _ => {
                self.places += 1;
                self.first.get_or_insert(place.first_leaf);
                Ok(None)
            }
        }
    }

    fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), StoreError> {
        if self.lost.contains(address) {
            self.places += 1;
            self.first.get_or_insert(leaf);
        }
        Ok(())
    }
}
