//! What is known of the directory: its last reading, kept up by a watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use diorama_topology::EnvironmentName;
use serde::de::DeserializeOwned;

use super::backend::{Entry, Revision};
use super::record::{EnvironmentRecord, HostStatus, LockRecord, RemovedRecord, Revised, TokenRecord};
use crate::identity::{HostId, Member, Members};

/// Whether a view is up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freshness {
    /// The directory has been read, and its changes arrive.
    Fresh,
    /// The directory cannot be reached: this is the last that was known.
    Stale {
        /// Since when.
        since: jiff::Timestamp,
        /// Why.
        reason: String,
    },
}

/// All that the directory holds, at one revision.
#[derive(Debug, Clone)]
pub struct View {
    /// Whether it is up to date.
    pub freshness: Freshness,
    /// Of the directory as it was read.
    pub revision: Revision,
    /// Who belongs to the cluster.
    pub members: Arc<Members>,
    /// Since which revision each is a member.
    pub(crate) member_since: BTreeMap<HostId, Revision>,
    /// The hosts that are there: those of which this has nothing are lost, or not there yet. In a stale view, those that
    /// were there.
    pub hosts: BTreeMap<HostId, Revised<Arc<HostStatus>>>,
    /// The environments.
    pub environments: BTreeMap<EnvironmentName, Revised<Arc<EnvironmentRecord>>>,
    /// The locks that are held. The revision is the fencing token.
    pub locks: BTreeMap<EnvironmentName, Revised<Arc<LockRecord>>>,
    /// Hosts that were taken out and have not heard of it.
    pub removed: BTreeMap<HostId, Revised<Arc<RemovedRecord>>>,
    /// The join tokens, by id.
    pub tokens: BTreeMap<String, Revised<Arc<TokenRecord>>>,
    /// Keys whose values this version cannot read.
    pub unreadable: Vec<String>,
}

impl View {
    pub(super) fn unknown() -> Self {
        Self {
            freshness: Freshness::Stale {
                since: jiff::Timestamp::now(),
                reason: "the directory has not been read yet".to_owned(),
            },
            revision: 0,
            members: Arc::default(),
            member_since: BTreeMap::new(),
            hosts: BTreeMap::new(),
            environments: BTreeMap::new(),
            locks: BTreeMap::new(),
            removed: BTreeMap::new(),
            tokens: BTreeMap::new(),
            unreadable: Vec::new(),
        }
    }

    /// Whether it is up to date.
    pub fn is_fresh(&self) -> bool {
        self.freshness == Freshness::Fresh
    }

    /// Whether the host is a member and there.
    pub fn is_alive(&self, host: HostId) -> bool {
        self.members.get(host).is_some() && self.hosts.contains_key(&host)
    }

    /// The hosts that machines can be placed on. The memory of the machines that the environment has now is not counted:
    /// `machine_bytes` says what it has on each host.
    pub fn candidates(&self, machine_bytes: &BTreeMap<HostId, u64>) -> Vec<crate::placement::Candidate> {
        let candidates = self.members.iter().map(|member| {
            let status = self.hosts.get(&member.id).map(|status| &status.value);
            let own_bytes = machine_bytes.get(&member.id).copied().unwrap_or(0);
            crate::placement::Candidate {
                id: member.id,
                name: member.name.clone(),
                labels: status.map(|status| status.labels.clone()).unwrap_or_default(),
                free_memory_bytes: status
                    .map_or(0, |status| status.free_memory_bytes)
                    .saturating_add(own_bytes),
                alive: status.is_some(),
                draining: member.draining,
            }
        });
        candidates.collect()
    }

    pub(super) fn of(revision: Revision, entries: &[Entry]) -> Self {
        let mut view = Self { freshness: Freshness::Fresh, revision, ..Self::unknown() };
        for entry in entries {
            view.put(entry);
        }
        view
    }

    pub(super) fn put(&mut self, entry: &Entry) {
        if self.read(entry).is_none() {
            tracing::warn!(key = entry.key, "the directory holds something that cannot be read");
            self.delete(&entry.key);
            self.unreadable.push(entry.key.clone());
        } else {
            self.unreadable.retain(|key| *key != entry.key);
        }
    }

    fn read(&mut self, entry: &Entry) -> Option<()> {
        let (kind, name) = entry.key.split_once('/')?;
        match kind {
            "members" => {
                let member: Member = serde_json::from_str(&entry.value).ok()?;
                (member.id == name.parse().ok()?).then_some(())?;
                self.member_since.insert(member.id, entry.create_revision);
                Arc::make_mut(&mut self.members).insert(member);
            }
            "hosts" => {
                self.hosts.insert(name.parse().ok()?, revised(entry, entry.mod_revision)?);
            }
            "environments" => {
                let record: Revised<Arc<EnvironmentRecord>> = revised(entry, entry.mod_revision)?;
                (record.value.name().as_str() == name).then_some(())?;
                self.environments.insert(record.value.name().clone(), record);
            }
            "locks" => {
                self.locks.insert(name.parse().ok()?, revised(entry, entry.create_revision)?);
            }
            "removed" => {
                self.removed.insert(name.parse().ok()?, revised(entry, entry.mod_revision)?);
            }
            "tokens" => {
                self.tokens.insert(name.to_owned(), revised(entry, entry.mod_revision)?);
            }
            // `names` says nothing that `members` does not; the rest is a newer version's.
            _ => {}
        }
        Some(())
    }

    pub(super) fn delete(&mut self, key: &str) {
        self.unreadable.retain(|unreadable| unreadable != key);
        let Some((kind, name)) = key.split_once('/') else { return };
        match kind {
            "members" => {
                if let Ok(id) = name.parse() {
                    self.member_since.remove(&id);
                    Arc::make_mut(&mut self.members).remove(id);
                }
            }
            "hosts" => {
                if let Ok(id) = name.parse() {
                    self.hosts.remove(&id);
                }
            }
            "environments" => {
                self.environments.remove(name);
            }
            "locks" => {
                self.locks.remove(name);
            }
            "removed" => {
                if let Ok(id) = name.parse() {
                    self.removed.remove(&id);
                }
            }
            "tokens" => {
                self.tokens.remove(name);
            }
            _ => {}
        }
    }
}

fn revised<T: DeserializeOwned>(entry: &Entry, revision: Revision) -> Option<Revised<Arc<T>>> {
    let value = serde_json::from_str(&entry.value).ok()?;
    Some(Revised { value: Arc::new(value), revision })
}
