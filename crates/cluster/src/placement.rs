//! Placement: which machine runs on which host. Pure.
//!
//! Rules, in this order:
//! 1. A machine that names a host, or labels, runs only where they are.
//! 2. A machine that has a place keeps it while that is still valid: a machine is not moved to balance memory.
//! 3. Machines that have the least choice are placed first, of these the largest; each goes to the host with the most
//!    memory left.
//!
//! Invariant: the same input gives the same result, in whatever order machines and hosts are given. No host is given
//! more machines than its free memory holds.

use std::collections::BTreeMap;
use std::fmt;

use diorama_topology::{HostName, LabelName, LabelValue, MachineName};

use crate::HostId;

/// A machine that wants a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub machine: MachineName,
    /// The memory that it takes, in bytes: its own and what QEMU needs besides.
    pub memory_bytes: u64,
    /// The host that it must run on.
    pub host: Option<HostName>,
    /// The labels that its host must carry.
    pub labels: BTreeMap<LabelName, LabelValue>,
}

impl Wanted {
    /// What this machine of an environment wants. `overhead_bytes` is what a QEMU process takes besides the machine's memory.
    pub fn of(machine: &diorama_topology::Machine, overhead_bytes: u64) -> Self {
        Self {
            machine: machine.name.clone(),
            memory_bytes: machine.memory_bytes.saturating_add(overhead_bytes),
            host: machine.host.clone(),
            labels: machine.labels.clone(),
        }
    }
}

/// A host that machines could run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: HostId,
    /// Its name.
    pub name: HostName,
    /// The labels that it carries.
    pub labels: BTreeMap<LabelName, LabelValue>,
    /// The memory that machines may still take, in bytes, **without** those machines of this environment that run on it
    /// now: what they take is not free.
    pub free_memory_bytes: u64,
    /// Whether it is there: its lease is held.
    pub alive: bool,
    /// Whether it is being emptied: it keeps no machine and gets none, also when one names it.
    pub draining: bool,
}

/// Why a host cannot have a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The machine names another.
    OtherHostNamed,
    /// It does not carry a label, or carries it with another value.
    Label {
        /// The label.
        name: LabelName,
        /// What the machine wants.
        wanted: LabelValue,
        /// What the host has.
        found: Option<LabelValue>,
    },
    /// It is not there.
    Lost,
    /// It is being emptied.
    Draining,
    /// It has too little memory left, after the machines that were placed before.
    Memory {
        /// What the machine takes, in bytes.
        needed_bytes: u64,
        /// What the host has left, in bytes.
        left_bytes: u64,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        match self {
            Self::OtherHostNamed => f.write_str("the machine names another host"),
            Self::Label { name, wanted, found: None } => {
                write!(f, "it has no label `{name}` (`{wanted}` is wanted)")
            }
            Self::Label { name, wanted, found: Some(found) } => {
                write!(f, "its label `{name}` is `{found}`, not `{wanted}`")
            }
            Self::Lost => f.write_str("it is lost: its agent does not answer"),
            Self::Draining => f.write_str("it is draining"),
            Self::Memory { needed_bytes, left_bytes } => {
                write!(
                    f,
                    "it has {} MiB of memory left, and {} MiB are needed",
                    mib(*left_bytes),
                    mib(*needed_bytes)
                )
            }
        }
    }
}

/// A machine that no host can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    /// The machine.
    pub machine: MachineName,
    /// The host that it names, when no host has that name.
    pub unknown_host: Option<HostName>,
    /// Why each host refuses it, in the order of their names.
    pub refusals: Vec<(HostName, Refusal)>,
}

impl fmt::Display for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no host can have the machine `{}`", self.machine)?;
        if let Some(host) = &self.unknown_host {
            return write!(f, ": there is no host `{host}`");
        }
        if self.refusals.is_empty() {
            return f.write_str(": there are no hosts");
        }
        for (index, (host, refusal)) in self.refusals.iter().enumerate() {
            write!(f, "{} `{host}`: {refusal}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// Some machines have no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct PlacementError(
    /// The machines, in the order of their names; never empty.
    pub Vec<Unplaced>,
);

/// Gives every machine a host. `current` is where they are now, if anywhere.
///
/// # Errors
/// When a machine has no place; all that have none are named, and nothing is placed.
pub fn place(
    machines: &[Wanted],
    hosts: &[Candidate],
    current: &BTreeMap<MachineName, HostId>,
) -> Result<BTreeMap<MachineName, HostId>, PlacementError> {
    let mut hosts: Vec<(&Candidate, u64)> = hosts.iter().map(|host| (host, host.free_memory_bytes)).collect();
    hosts.sort_by(|(a, _), (b, _)| (&a.name, a.id).cmp(&(&b.name, b.id)));
    let mut placed = BTreeMap::new();
    let mut unplaced = Vec::new();

    // Those with the least choice first: else a machine that could run anywhere takes the place of one that cannot.
    let mut order: Vec<(usize, &Wanted)> = machines
        .iter()
        .map(|machine| {
            let choice = hosts.iter().filter(|(host, _)| refusal(machine, host, u64::MAX).is_none()).count();
            (choice, machine)
        })
        .collect();
    order.sort_by(|(choice_a, a), (choice_b, b)| {
        choice_a.cmp(choice_b).then(b.memory_bytes.cmp(&a.memory_bytes)).then(a.machine.cmp(&b.machine))
    });

    // Machines that stay take their memory before any that is new.
    let mut rest = Vec::new();
    for (_, machine) in order {
        let here = current.get(&machine.machine);
        let kept = hosts
            .iter_mut()
            .find(|(host, left)| Some(&host.id) == here && refusal(machine, host, *left).is_none());
        match kept {
            Some((host, left)) => {
                *left -= machine.memory_bytes;
                placed.insert(machine.machine.clone(), host.id);
            }
            None => rest.push(machine),
        }
    }
    for machine in rest {
        let best = hosts
            .iter_mut()
            .filter(|(host, left)| refusal(machine, host, *left).is_none())
            // Of several with the same memory the first by name.
            .min_by_key(|(_, left)| std::cmp::Reverse(*left));
        match best {
            Some((host, left)) => {
                *left -= machine.memory_bytes;
                placed.insert(machine.machine.clone(), host.id);
            }
            None => {
                let refusals = hosts.iter().filter_map(|(host, left)| {
                    refusal(machine, host, *left).map(|refusal| (host.name.clone(), refusal))
                });
                let known = |name: &HostName| hosts.iter().any(|(host, _)| host.name == *name);
                unplaced.push(Unplaced {
                    machine: machine.machine.clone(),
                    unknown_host: machine.host.clone().filter(|name| !known(name)),
                    refusals: refusals.collect(),
                });
            }
        }
    }
    unplaced.sort_by(|a, b| a.machine.cmp(&b.machine));
    if unplaced.is_empty() { Ok(placed) } else { Err(PlacementError(unplaced)) }
}

fn refusal(machine: &Wanted, host: &Candidate, left_bytes: u64) -> Option<Refusal> {
    if machine.host.as_ref().is_some_and(|named| *named != host.name) {
        return Some(Refusal::OtherHostNamed);
    }
    for (name, wanted) in &machine.labels {
        let found = host.labels.get(name);
        if found != Some(wanted) {
            let (name, wanted, found) = (name.clone(), wanted.clone(), found.cloned());
            return Some(Refusal::Label { name, wanted, found });
        }
    }
    if !host.alive {
        return Some(Refusal::Lost);
    }
    if host.draining {
        return Some(Refusal::Draining);
    }
    let needed_bytes = machine.memory_bytes;
    (needed_bytes > left_bytes).then_some(Refusal::Memory { needed_bytes, left_bytes })
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
