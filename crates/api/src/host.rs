//! Hosts: making a cluster of them, and looking at it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Make a cluster, of which this host is the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitHostRequest {
    /// This host's name in it.
    pub name: String,
    /// Where other hosts reach this one: TCP for its agent, UDP for its tunnels.
    pub address: SocketAddr,
    /// Where etcd is, such as `http://10.0.0.1:2379`.
    pub etcd: Vec<String>,
    /// Labels that machines can ask for.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Enter the cluster of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinHostRequest {
    /// What `diorama host token` printed.
    pub token: String,
    /// This host's name in the cluster.
    pub name: String,
    /// As in [`InitHostRequest`].
    pub address: SocketAddr,
    /// Labels that machines can ask for.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Make a token for hosts that are to join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// How long it is good, in seconds.
    pub valid_s: u64,
    /// For how many hosts.
    pub uses: u32,
}

/// A token; whoever has it can join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenReply {
    /// The token.
    pub token: String,
}

/// Let a host get no new machines, or get them again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainHostRequest {
    /// Which.
    pub name: String,
    /// Whether it gets none.
    pub drain: bool,
}

/// Take a host out of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveHostRequest {
    /// Which.
    pub name: String,
    /// Although it has machines.
    #[serde(default)]
    pub force: bool,
}

/// Whether a host takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// Its agent is there.
    Ready,
    /// It gets no new machines.
    Draining,
    /// Its agent does not answer.
    Lost,
}

/// One host of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub name: String,
    /// What names it for as long as it is a member.
    pub id: String,
    /// Whether it takes part.
    pub state: HostState,
    /// Whether it is the one that answers.
    pub this: bool,
    /// Where other hosts reach it.
    pub addresses: Vec<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The memory that machines may still take, in bytes.
    pub free_memory_bytes: u64,
    /// How many machines of the cluster's environments are on it.
    pub machines: u32,
    /// The version of Diorama that it runs.
    pub version: String,
}
