//! How two snapshots differ.
//!
//! Memory is compared tree by tree: a subtree that both have is passed over without being read, and pages themselves
//! are never read. Disks are compared by layer: layers are immutable, so that one is in both snapshots or in one.

use std::collections::{BTreeMap, BTreeSet};

use crate::address::Address;
use crate::error::StoreError;
use crate::fetch::NodeCache;
use crate::frames::StoredFrame;
use crate::id::SnapshotId;
use crate::manifest::{DiskRecord, MachineRecord, Part};
use crate::root::Store;
use crate::tree::{self, PAGE_BYTES, Place, Shape, Visitor};

/// How snapshot `b` differs from snapshot `a`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// The one.
    pub a: SnapshotId,
    /// The other.
    pub b: SnapshotId,
    /// Each machine of either, by name.
    pub machines: Vec<MachineDiff>,
    /// The frames in flight.
    pub frames: FramesDiff,
}

/// How a machine differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineDiff {
    /// It is in both.
    Both {
        /// Its name.
        name: String,
        /// Pages of [`PAGE_BYTES`](crate::PAGE_BYTES) whose contents differ; pages that only the larger memory has count if not zero.
        pages_differing: u64,
        /// Pages of the larger memory.
        pages: u64,
        /// Whether the device state differs.
        state_differs: bool,
        /// Each disk of either, by name.
        disks: Vec<DiskDiff>,
    },
    /// Only `a` has it.
    OnlyA {
        /// Its name.
        name: String,
    },
    /// Only `b` has it.
    OnlyB {
        /// Its name.
        name: String,
    },
}

/// How a disk differs, in bytes of layer files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskDiff {
    /// Its name.
    pub name: String,
    /// In layers that both have.
    pub shared_bytes: u64,
    /// In layers that only `a` has.
    pub only_a_bytes: u64,
    /// In layers that only `b` has.
    pub only_b_bytes: u64,
}

/// How the frames in flight differ. Two are the same if all but their times is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FramesDiff {
    /// In both.
    pub shared: u64,
    /// Only in `a`.
    pub only_a: u64,
    /// Only in `b`.
    pub only_b: u64,
}

impl Store {
    /// Compares two snapshots. What is read for it is verified.
    pub fn diff(&self, a: &SnapshotId, b: &SnapshotId) -> Result<Diff, StoreError> {
        let (a, b) = (self.load(a)?, self.load(b)?);
        let names: BTreeSet<&str> = [&a, &b]
            .iter()
            .flat_map(|stored| &stored.manifest.machines)
            .map(|machine| machine.name.as_str())
            .collect();
        let machines = names
            .into_iter()
            .map(|name| {
                let only = name.to_owned();
                match (a.manifest.machine(name), b.manifest.machine(name)) {
                    (Some(in_a), Some(in_b)) => self.diff_machine(in_a, in_b),
                    (Some(_), None) => Ok(MachineDiff::OnlyA { name: only }),
                    (None, _) => Ok(MachineDiff::OnlyB { name: only }),
                }
            })
            .collect::<Result<_, StoreError>>()?;
        Ok(Diff {
            a: a.id,
            b: b.id,
            machines,
            frames: diff_frames(self.read_frames(&a)?, self.read_frames(&b)?),
        })
    }
}

impl Store {
    fn diff_machine(&self, a: &MachineRecord, b: &MachineRecord) -> Result<MachineDiff, StoreError> {
        Ok(MachineDiff::Both {
            name: a.name.clone(),
            pages_differing: self.diff_ram(&a.ram.part(&a.name), &b.ram.part(&b.name))?,
            pages: a.ram.bytes.max(b.ram.bytes) / PAGE_BYTES,
            state_differs: a.device_state != b.device_state,
            disks: diff_disks(&a.disks, &b.disks),
        })
    }

    fn diff_ram(&self, a: &Part, b: &Part) -> Result<u64, StoreError> {
        if a.shape == b.shape {
            let mut nodes = [NodeCache::default(), NodeCache::default()];
            let pair = [a.root, b.root];
            return self
                .diff_nodes(&a.shape, a.shape.depth(), 0, &pair, &mut nodes)
                .map_err(|error| error.within(&a.name, None));
        }
        let (a, b) = (self.pages(a)?, self.pages(b)?);
        let in_b = |page: &&u64| a.get(page) != b.get(page);
        let all: BTreeSet<&u64> = a.keys().chain(b.keys()).collect();
        Ok(all.into_iter().filter(in_b).count() as u64)
    }

    /// How many leaves differ below two nodes of the same place.
    fn diff_nodes(
        &self,
        shape: &Shape,
        level: u32,
        first_leaf: u64,
        pair: &[Address; 2],
        nodes: &mut [NodeCache; 2],
    ) -> Result<u64, StoreError> {
        if pair[0] == pair[1] {
            return Ok(0);
        }
        if level == 0 {
            return Ok(1);
        }
        let expected = shape.children(level, first_leaf);
        let mut sides = [vec![Address::ZERO; expected], vec![Address::ZERO; expected]];
        for ((side, address), cache) in sides.iter_mut().zip(pair).zip(&mut *nodes) {
            if !address.is_zero() {
                let node = self.node(address, expected, cache)?;
                *side = tree::children(&node, expected).into_iter().flatten().collect();
            }
        }
        let span = Shape::span(level);
        let mut differing = 0;
        for (index, (a, b)) in sides[0].iter().zip(&sides[1]).enumerate() {
            let first = first_leaf + index as u64 * span;
            differing += self.diff_nodes(shape, level - 1, first, &[*a, *b], nodes)?;
        }
        Ok(differing)
    }

    /// Every page that is not all zeros.
    fn pages(&self, part: &Part) -> Result<BTreeMap<u64, Address>, StoreError> {
        let mut pages = Pages { store: self, nodes: NodeCache::default(), pages: BTreeMap::new() };
        tree::walk(&part.shape, &part.root, &mut pages).map_err(|error| error.within(&part.name, None))?;
        Ok(pages.pages)
    }
}

struct Pages<'a> {
    store: &'a Store,
    nodes: NodeCache,
    pages: BTreeMap<u64, Address>,
}

impl Visitor for Pages<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.node(address, place.children, &mut self.nodes).map(Some)
    }

    fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), StoreError> {
        self.pages.insert(leaf, *address);
        Ok(())
    }
}

fn diff_disks(a: &[DiskRecord], b: &[DiskRecord]) -> Vec<DiskDiff> {
    let names: BTreeSet<&str> = a.iter().chain(b).map(|disk| disk.name.as_str()).collect();
    let layers = |disks: &[DiskRecord], name: &str| -> BTreeMap<Address, u64> {
        disks
            .iter()
            .filter(|disk| disk.name == name)
            .flat_map(|disk| &disk.layers)
            .map(|layer| (layer.root, layer.bytes))
            .collect()
    };
    let bytes_without = |layers: &BTreeMap<Address, u64>, others: &BTreeMap<Address, u64>| -> u64 {
        let only = layers.iter().filter(|(hash, _)| !others.contains_key(*hash));
        only.fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    };
    names
        .into_iter()
        .map(|name| {
            let (in_a, in_b) = (layers(a, name), layers(b, name));
            let only_a_bytes = bytes_without(&in_a, &in_b);
            let all = in_a.values().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
            DiskDiff {
                name: name.to_owned(),
                shared_bytes: all - only_a_bytes,
                only_a_bytes,
                only_b_bytes: bytes_without(&in_b, &in_a),
            }
        })
        .collect()
}

fn diff_frames(a: Vec<StoredFrame>, b: Vec<StoredFrame>) -> FramesDiff {
    // Positive: more of them in `a`.
    let mut surplus: BTreeMap<StoredFrame, i64> = BTreeMap::new();
    let total = a.len() as u64;
    for (frames, step) in [(a, 1), (b, -1)] {
        for mut frame in frames {
            frame.after_cut_ns = 0;
            *surplus.entry(frame).or_insert(0) += step;
        }
    }
    let sum = |sign: i64| -> u64 {
        let counts = surplus.values().map(|count| count * sign);
        counts.filter(|count| *count > 0).sum::<i64>() as u64
    };
    let only_a = sum(1);
    FramesDiff { shared: total - only_a, only_a, only_b: sum(-1) }
}
