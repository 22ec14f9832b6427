//! What a store holds, in numbers.

use crate::collect::CollectOptions;
use crate::error::StoreError;
use crate::pack::PackKind;
use crate::root::Store;

/// What a store holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Intact snapshots.
    pub snapshots: u64,
    /// Snapshots whose manifest cannot be read.
    pub damaged_snapshots: u64,
    /// All parts of all snapshots.
    pub logical_bytes: u64,
    /// Chunks, each counted once.
    pub chunks: u64,
    /// Packs.
    pub packs: u64,
    /// All packs.
    pub stored_bytes: u64,
    /// Of those, packs of nodes.
    pub tree_bytes: u64,
    /// About what no snapshot needs; `None` where damage keeps it from being known.
    pub unused_bytes: Option<u64>,
    /// The index, in memory.
    pub index_bytes: u64,
}

impl Store {
    /// Counts. It traces every snapshot, as [`Store::collect`] does.
    pub fn stats(&self) -> Result<Stats, StoreError> {
        let plan = match self.plan_collection(CollectOptions::default(), &mut |_, _| {}) {
            Ok(plan) => Some(plan),
            Err(StoreError::CannotCollect { .. }) => None,
            Err(error) => return Err(error),
        };
        let list = self.list()?;
        let index = self.index();
        let (data_bytes, tree_bytes) =
            (index.stored_bytes(PackKind::Data), index.stored_bytes(PackKind::Tree));
        let intact: Vec<_> = list.iter().filter_map(crate::Summary::entry).collect();
        Ok(Stats {
            snapshots: intact.len() as u64,
            damaged_snapshots: (list.len() - intact.len()) as u64,
            logical_bytes: intact.iter().fold(0, |sum: u64, entry| sum.saturating_add(entry.bytes.logical)),
            chunks: index.chunks() as u64,
            packs: index.packs().count() as u64,
            stored_bytes: data_bytes + tree_bytes,
            tree_bytes,
            unused_bytes: plan.map(|plan| plan.unused_bytes),
            index_bytes: index.memory_bytes(),
        })
    }
}
