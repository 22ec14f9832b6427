//! How two snapshots differ.
//!
//! Memory is compared by block hashes first; only blocks that differ are read, checked, and compared page by page.
//! Disks are compared by layer: layers are immutable, so that one is in both snapshots or in one.

use std::collections::{BTreeMap, BTreeSet};

use crate::blocks::{self, BLOCK_BYTES, BlockHashes, PAGE_BYTES};
use crate::catalog::Stored;
use crate::error::{Damage, StoreError};
use crate::files;
use crate::frames::StoredFrame;
use crate::id::SnapshotId;
use crate::manifest::{DiskRecord, MachineRecord};
use crate::read::open_ram;
use crate::root::Store;

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
        /// Pages of [`PAGE_BYTES`] whose contents differ; pages that only the larger memory has count if not zero.
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
                    (Some(in_a), Some(in_b)) => diff_machine(&a, in_a, &b, in_b),
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

fn diff_machine(
    a: &Stored,
    in_a: &MachineRecord,
    b: &Stored,
    in_b: &MachineRecord,
) -> Result<MachineDiff, StoreError> {
    Ok(MachineDiff::Both {
        name: in_a.name.clone(),
        pages_differing: diff_ram(a, in_a, b, in_b)?,
        pages: in_a.ram.bytes.max(in_b.ram.bytes) / PAGE_BYTES,
        state_differs: in_a.device_state.blake3 != in_b.device_state.blake3,
        disks: diff_disks(&in_a.disks, &in_b.disks),
    })
}

fn diff_ram(a: &Stored, in_a: &MachineRecord, b: &Stored, in_b: &MachineRecord) -> Result<u64, StoreError> {
    if in_a.ram.root == in_b.ram.root && in_a.ram.bytes == in_b.ram.bytes {
        return Ok(0);
    }
    let mut a = Side::open(a, in_a)?;
    let mut b = Side::open(b, in_b)?;
    let mut differing = 0;
    for index in 0..blocks::block_count(a.bytes.max(b.bytes)) {
        // A short last block and a full one never have the same hash, so equal hashes mean equal contents.
        if a.hashes.get(index) == b.hashes.get(index) {
            continue;
        }
        a.read(index)?;
        b.read(index)?;
        differing += a
            .buffer
            .chunks(PAGE_BYTES as usize)
            .zip(b.buffer.chunks(PAGE_BYTES as usize))
            .filter(|(a, b)| a != b)
            .count() as u64;
    }
    Ok(differing)
}

/// One machine's memory.
struct Side {
    file: std::fs::File,
    path: std::path::PathBuf,
    bytes: u64,
    hashes: BlockHashes,
    /// A block, filled up with zeros.
    buffer: Vec<u8>,
}

impl Side {
    fn open(stored: &Stored, machine: &MachineRecord) -> Result<Self, StoreError> {
        let (file, path, hashes) = open_ram(&stored.folder, &machine.ram)?;
        Ok(Self { file, path, bytes: machine.ram.bytes, hashes, buffer: Vec::new() })
    }

    fn read(&mut self, index: u64) -> Result<(), StoreError> {
        let offset = index * BLOCK_BYTES;
        if let Some(expected) = self.hashes.get(index) {
            blocks::read_block(&self.file, self.bytes, index, &mut self.buffer)
                .map_err(|e| files::read_failed(&self.path, Some(offset), &e))?;
            if blake3::hash(&self.buffer).as_bytes() != expected {
                let offset = Some(offset);
                return Err(StoreError::corrupt(&self.path, Damage::Contents { offset }));
            }
        } else {
            self.buffer.clear();
        }
        self.buffer.resize(BLOCK_BYTES as usize, 0);
        Ok(())
    }
}

fn diff_disks(a: &[DiskRecord], b: &[DiskRecord]) -> Vec<DiskDiff> {
    let names: BTreeSet<&str> = a.iter().chain(b).map(|disk| disk.name.as_str()).collect();
    let layers = |disks: &[DiskRecord], name: &str| -> BTreeMap<String, u64> {
        disks
            .iter()
            .filter(|disk| disk.name == name)
            .flat_map(|disk| &disk.layers)
            .map(|layer| (layer.blake3.clone(), layer.bytes))
            .collect()
    };
    let bytes_without = |layers: &BTreeMap<String, u64>, others: &BTreeMap<String, u64>| -> u64 {
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
