//! Comparing two snapshots: pages by their trees, disks as their guests see them, frames one by one.
//!
//! Nothing is read but tables and trees. A cluster of a disk is the same if both have the same contents at its place,
//! whichever layers those are in: its address in the store says so.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use diorama_api::{ApiError, DiffReport, DiskDiff, MachineDiff};
use diorama_store::{Address, DiskRecord, MachineRecord, PartReader};

use crate::Agent;
use crate::extract::{CLUSTER_BYTES, Mapped, at, map, open};
use crate::problem::store_error;

impl Agent {
    /// Compares two.
    pub(crate) fn diff_snapshots(
        &self,
        from: &str,
        to: &str,
        environment: Option<&str>,
    ) -> Result<DiffReport, ApiError> {
        let from = self.resolve_snapshot(from, environment)?;
        let to = self.resolve_snapshot(to, environment)?;
        let diff = self.store.diff(&from, &to).map_err(store_error)?;
        let stored_from = self.store.load(&from).map_err(store_error)?;
        let stored_to = self.store.load(&to).map_err(store_error)?;
        let mut report = DiffReport {
            from: from.to_string(),
            to: to.to_string(),
            machines: Vec::new(),
            only_from: Vec::new(),
            only_to: Vec::new(),
            in_flight_from: diff.frames.shared + diff.frames.only_a,
            in_flight_to: diff.frames.shared + diff.frames.only_b,
            in_flight_both: diff.frames.shared,
        };
        for machine in diff.machines {
            match machine {
                diorama_store::MachineDiff::Both { name, pages_differing, pages, state_differs, disks } => {
                    let pair = stored_from.manifest.machine(&name).zip(stored_to.manifest.machine(&name));
                    report.machines.push(MachineDiff {
                        pages_changed: pages_differing,
                        pages,
                        state_changed: state_differs,
                        disk_bytes_added: disks.iter().map(|disk| disk.only_b_bytes).sum(),
                        disks: pair.map_or(Ok(Vec::new()), |(a, b)| self.diff_disks(a, b))?,
                        name,
                    });
                }
                diorama_store::MachineDiff::OnlyA { name } => report.only_from.push(name),
                diorama_store::MachineDiff::OnlyB { name } => report.only_to.push(name),
            }
        }
        Ok(report)
    }

    fn diff_disks(&self, a: &MachineRecord, b: &MachineRecord) -> Result<Vec<DiskDiff>, ApiError> {
        let names: BTreeSet<&str> = a.disks.iter().chain(&b.disks).map(|disk| disk.name.as_str()).collect();
        let find =
            |machine: &'_ MachineRecord, name: &str| machine.disks.iter().position(|disk| disk.name == name);
        let clusters = |disk: &DiskRecord| disk.virtual_bytes.div_ceil(CLUSTER_BYTES);
        names
            .into_iter()
            .map(|name| {
                let in_a = find(a, name).map(|at| &a.disks[at]);
                let in_b = find(b, name).map(|at| &b.disks[at]);
                let changed = match in_a.zip(in_b) {
                    Some((in_a, in_b)) => Some(self.diff_disk((a, in_a), (b, in_b))?),
                    None => None,
                };
                Ok(DiskDiff {
                    name: name.to_owned(),
                    clusters_changed: changed,
                    clusters: in_a.into_iter().chain(in_b).map(clusters).max().unwrap_or(0),
                })
            })
            .collect()
    }

    /// How many of the guest's clusters differ. What lies in an image of the user's counts as one content of its own.
    fn diff_disk(
        &self,
        a: (&MachineRecord, &DiskRecord),
        b: (&MachineRecord, &DiskRecord),
    ) -> Result<u64, ApiError> {
        let shared = if a.1.base == b.1.base && a.1.virtual_bytes == b.1.virtual_bytes {
            let pairs = a.1.layers.iter().zip(&b.1.layers);
            pairs.take_while(|(a, b)| a.root == b.root && a.bytes == b.bytes).count()
        } else {
            0
        };
        let (in_a, in_b) = (self.contents_above(a, shared)?, self.contents_above(b, shared)?);
        let mut below = Below { agent: self, disk: a, shared, layers: BTreeMap::new() };
        let bare = |disk: &DiskRecord| if disk.base.is_some() { Contents::Image } else { Contents::Zero };
        let mut changed = 0;
        let all: BTreeSet<u32> = in_a.keys().chain(in_b.keys()).copied().collect();
        for cluster in all {
            let mut contents = [None, None];
            for ((side, disk), found) in contents.iter_mut().zip([a.1, b.1]).zip([&in_a, &in_b]) {
                *side = Some(match found.get(&cluster) {
                    Some(contents) => *contents,
                    None => below.contents(cluster)?.unwrap_or_else(|| bare(disk)),
                });
            }
            changed += u64::from(contents[0] != contents[1]);
        }
        Ok(changed)
    }

    /// What the layers from number `shared` on have.
    fn contents_above(
        &self,
        (machine, disk): (&MachineRecord, &DiskRecord),
        shared: usize,
    ) -> Result<HashMap<u32, Contents>, ApiError> {
        let mut contents = HashMap::new();
        for (index, layer) in disk.layers.iter().enumerate().skip(shared).rev() {
            let name = format!("disk {} of {}", disk.name, machine.name);
            let part = layer.part(&machine.name, &disk.name, index);
            let mut found = Vec::new();
            map(&name, layer, disk.virtual_bytes, self.store.reader(part.clone()), |cluster, mapped| {
                found.push((cluster, mapped));
            })?;
            let mut reader = self.store.reader(part);
            for (cluster, mapped) in found {
                if let std::collections::hash_map::Entry::Vacant(vacant) = contents.entry(cluster) {
                    vacant.insert(contents_at(&mut reader, mapped)?);
                }
            }
        }
        Ok(contents)
    }
}

/// What a guest's cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Zero,
    /// What the store knows by this address.
    At(Address),
    /// What the user's image has there.
    Image,
}

/// The layers that both disks have, looked into only where one of them differs.
struct Below<'a> {
    agent: &'a Agent,
    disk: (&'a MachineRecord, &'a DiskRecord),
    shared: usize,
    layers: BTreeMap<usize, (diorama_qemu::qcow2::Image<crate::extract::Layer>, PartReader)>,
}

impl Below<'_> {
    fn contents(&mut self, cluster: u32) -> Result<Option<Contents>, ApiError> {
        let (machine, disk) = self.disk;
        let name = format!("disk {} of {}", disk.name, machine.name);
        for index in (0..self.shared).rev() {
            if let std::collections::btree_map::Entry::Vacant(vacant) = self.layers.entry(index) {
                let part = disk.layers[index].part(&machine.name, &disk.name, index);
                let image = open(&name, disk.virtual_bytes, self.agent.store.reader(part.clone()))?;
                vacant.insert((image, self.agent.store.reader(part)));
            }
            let Some((image, reader)) = self.layers.get_mut(&index) else { continue };
            if let Some(mapped) = at(&name, image, cluster)? {
                return contents_at(reader, mapped).map(Some);
            }
        }
        Ok(None)
    }
}

fn contents_at(reader: &mut PartReader, mapped: Mapped) -> Result<Contents, ApiError> {
    let offset = match mapped {
        Mapped::Zero => return Ok(Contents::Zero),
        Mapped::At(at) => u64::from(at) * CLUSTER_BYTES,
    };
    // What lies past the file's end is zeros.
    if offset >= reader.bytes() {
        return Ok(Contents::Zero);
    }
    let address = reader.address_at(offset).map_err(store_error)?;
    Ok(if address.is_zero() { Contents::Zero } else { Contents::At(address) })
}
