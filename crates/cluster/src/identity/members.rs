//! Who belongs to the cluster, as the last reading of the directory has it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use diorama_topology::HostName;
use serde::{Deserialize, Serialize};

use super::HostId;

/// The most addresses that one host is reached at.
pub const MAX_ADDRESSES: usize = 8;

/// One host that was admitted and not removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub id: HostId,
    /// Its name, unique in the cluster.
    pub name: HostName,
    /// Where it listens for other hosts, in the order in which they are tried.
    pub addresses: Vec<SocketAddr>,
    /// It holds the authority's key: it admits hosts and renews certificates.
    #[serde(default)]
    pub issuer: bool,
    /// It gets no new machines.
    #[serde(default)]
    pub draining: bool,
    /// When it was admitted.
    pub joined: jiff::Timestamp,
}

/// All members.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members(BTreeMap<HostId, Member>);

impl Members {
    /// The member of this id.
    pub fn get(&self, id: HostId) -> Option<&Member> {
        self.0.get(&id)
    }

    /// The member of this name.
    pub fn named(&self, name: &str) -> Option<&Member> {
        self.0.values().find(|member| member.name.as_str() == name)
    }

    /// All, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.0.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none: nobody is let in then.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds or replaces one.
    pub fn insert(&mut self, member: Member) {
        self.0.insert(member.id, member);
    }

    /// Takes one out.
    pub fn remove(&mut self, id: HostId) -> Option<Member> {
        self.0.remove(&id)
    }
}

impl FromIterator<Member> for Members {
    fn from_iter<I: IntoIterator<Item = Member>>(members: I) -> Self {
        Self(members.into_iter().map(|member| (member.id, member)).collect())
    }
}
