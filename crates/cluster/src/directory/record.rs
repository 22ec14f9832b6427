//! What the directory holds, as JSON under keys: members, hosts, environments, locks, tokens. (Not snapshots: those that
//! are in the hosts' store are those that there are, and a second list could only differ from it.)
//!
//! | key | value | written by |
//! | --- | --- | --- |
//! | `members/ID` | [`Member`](crate::Member) | the issuer that admitted it |
//! | `names/NAME` | the member's id: keeps names unique | the same, at once |
//! | `removed/ID` | [`RemovedRecord`] | who takes a member out; until it has heard of it |
//! | `hosts/ID` | [`HostStatus`], under the host's lease | the host |
//! | `environments/NAME` | [`EnvironmentRecord`] | its owner |
//! | `locks/NAME` | [`LockRecord`], under the holder's lease | who holds it |
//! | `tokens/ID` | [`TokenRecord`] | issuers |
//!
//! Unknown fields are passed over when read, so that an older version reads what a newer one has written.

use std::collections::BTreeMap;

use diorama_topology::{Environment, EnvironmentName, HostName, LabelName, LabelValue, MachineName};
use serde::{Deserialize, Serialize};

use super::backend::Revision;
use crate::identity::{Fingerprint, HostId};

/// The longest record, in bytes: etcd takes requests of 1.5 MiB.
pub const MAX_RECORD_BYTES: usize = 1 << 20;

/// A record and the revision of its last change, which a write gives back to say what it is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revised<T> {
    /// The record.
    pub value: T,
    /// Its last change.
    pub revision: Revision,
}

/// What a host says of itself while it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The labels that it carries.
    #[serde(default)]
    pub labels: BTreeMap<LabelName, LabelValue>,
    /// The memory that machines may still take, in bytes.
    pub free_memory_bytes: u64,
    /// The version of Diorama that it runs.
    pub version: String,
    /// What else its agent wants others to know, such as where its tunnels end.
    #[serde(default)]
    pub detail: serde_json::Value,
}

/// An environment of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentRecord {
    /// What it is.
    pub specification: Environment,
    /// Where each machine is.
    pub placement: BTreeMap<MachineName, HostId>,
    /// The host that looks after it: it answers for its whole, and takes its snapshots.
    pub owner: HostId,
    /// Which set of machine processes runs: each `up`, restore and fork has the next.
    pub generation: u64,
    /// What else agents agree on of it.
    #[serde(default)]
    pub detail: serde_json::Value,
}

impl EnvironmentRecord {
    /// Its name.
    pub fn name(&self) -> &EnvironmentName {
        &self.specification.name
    }

    /// The hosts that have a part of it.
    pub fn hosts(&self) -> std::collections::BTreeSet<HostId> {
        self.placement.values().copied().collect()
    }
}

/// Who may change an environment, or take its snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// The host.
    pub holder: HostId,
    /// What for, in a word.
    pub purpose: String,
    /// Tells this holding from any other.
    pub nonce: String,
    /// When it was taken, by the holder's clock. For people.
    pub since: jiff::Timestamp,
}

/// A host that was taken out of the cluster, for it to find. That it is not among the members would not do: a directory that
/// has lost its data has no members either.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedRecord {
    /// Its name while it was a member.
    pub name: HostName,
    /// When it was removed, by the clock of who did it. For people.
    pub since: jiff::Timestamp,
}

/// A join token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of the secret.
    pub secret: Fingerprint,
    /// Until when it is good, by the issuer's clock.
    pub expires: jiff::Timestamp,
    /// How many hosts more may join with it.
    pub uses_left: u32,
    /// The hosts that have: one that tries again takes no second use.
    #[serde(default)]
    pub used_by: Vec<HostId>,
}
