//! Hosts: making a cluster of them, and looking at it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Make a cluster, of which this host is the first.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitHostRequest {
    /// This host's name in it.
    pub name: String,
    /// Where other hosts reach this one: TCP for its agent, UDP for its tunnels.
    pub address: SocketAddr,
    /// Where etcd is, such as `http://10.0.0.1:2379`.
    pub etcd: Vec<String>,
    /// User and password, where etcd asks for them.
    #[serde(default)]
    pub etcd_user: Option<(String, String)>,
    /// The certificate of the authority that etcd's own is by, PEM.
    #[serde(default)]
    pub etcd_authority_pem: Option<String>,
    /// Certificate and key to show to etcd, PEM.
    #[serde(default)]
    pub etcd_identity_pem: Option<(String, String)>,
    /// Labels that machines can ask for.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What the network between hosts carries, in bytes; none to ask this host's interface.
    #[serde(default)]
    pub underlay_mtu: Option<u16>,
}

/// Without secrets.
impl fmt::Debug for InitHostRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InitHostRequest")
            .field("name", &self.name)
            .field("address", &self.address)
            .field("etcd", &self.etcd)
            .field("labels", &self.labels)
            .finish_non_exhaustive()
    }
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
    /// As in [`InitHostRequest`].
    #[serde(default)]
    pub underlay_mtu: Option<u16>,
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

/// Take this host out of its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveHostRequest {
    /// Although it has machines, which are stopped, or although the cluster cannot be told.
    #[serde(default)]
    pub force: bool,
}

/// A host that has left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveHostReport {
    /// Its name in the cluster that it was in.
    pub name: String,
    /// How many of the cluster's machines it had and has stopped.
    pub machines_stopped: u32,
    /// Whether the cluster knows of it. If not, another host has to remove this one.
    pub told: bool,
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
    /// Whether it admits hosts and renews certificates.
    pub issuer: bool,
    /// Until when its certificate is good; it is renewed before. None when it is lost.
    pub certificate_until: Option<String>,
    /// What the network at its tunnels' end carries, in bytes.
    pub underlay_mtu: Option<u16>,
}
