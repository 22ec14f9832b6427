//! The directory of a host that is alone: in memory, and in one file that is replaced at every change.
//!
//! A lease lasts as long as the process: what hangs on one is not in the file. Revisions go on from where they were, so
//! that fencing tokens never repeat.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::backend::{BackendError, Change, Committed, Entry, Guard, Revision, Seen};
use crate::private_file::{self, FileError};

/// The largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// How many changes a slow watch may be behind before it has to read all again.
const WATCH_CHANGES_MAX: usize = 1024;

#[derive(Debug)]
pub(crate) struct Local {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    revision: Revision,
    entries: BTreeMap<String, Entry>,
    leases: BTreeSet<i64>,
    last_lease: i64,
    seen: broadcast::Sender<Seen>,
}

/// Entries in a file: the local directory, and what is remembered of a remote one.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct StoredEntries {
    pub revision: Revision,
    pub entries: Vec<Entry>,
}

impl StoredEntries {
    /// `None` when there is no file.
    pub fn read(path: &Path) -> Result<Option<Self>, FileError> {
        let Some(bytes) = private_file::read(path, FILE_BYTES_MAX)? else { return Ok(None) };
        let stored = serde_json::from_slice(&bytes).map_err(|error| {
            FileError::new(path, std::io::Error::new(std::io::ErrorKind::InvalidData, error))
        })?;
        Ok(Some(stored))
    }

    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        private_file::write(path, &serde_json::to_vec(self).expect("strings and numbers serialise"))
    }
}

impl Local {
    pub fn open(path: PathBuf) -> Result<Self, FileError> {
        let stored = StoredEntries::read(&path)?.unwrap_or_default();
        let entries = stored.entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        let state = State {
            revision: stored.revision,
            entries,
            leases: BTreeSet::new(),
            last_lease: 0,
            seen: broadcast::channel(WATCH_CHANGES_MAX).0,
        };
        Ok(Self { path, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn read_all(&self) -> (Revision, Vec<Entry>) {
        let state = self.state();
        (state.revision, state.entries.values().cloned().collect())
    }

    pub fn commit(&self, guards: &[Guard], changes: &[Change]) -> Result<Committed, BackendError> {
        let mut state = self.state();
        if !guards.iter().all(|guard| state.holds(guard)) {
            return Ok(Committed { revision: state.revision, succeeded: false });
        }
        self.apply(&mut state, changes)?;
        Ok(Committed { revision: state.revision, succeeded: true })
    }

    fn apply(&self, state: &mut State, changes: &[Change]) -> Result<(), BackendError> {
        let revision = state.revision + 1;
        let mut entries = state.entries.clone();
        let mut seen = Vec::new();
        for change in changes {
            match change {
                Change::Put { lease, .. } if *lease != 0 && !state.leases.contains(lease) => {
                    return Err(BackendError::Refused(format!("there is no lease {lease}")));
                }
                Change::Put { key, value, lease } => {
                    let create_revision = entries.get(key).map_or(revision, |entry| entry.create_revision);
                    let entry = Entry {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision,
                        mod_revision: revision,
                        lease: *lease,
                    };
                    entries.insert(key.clone(), entry.clone());
                    seen.push((key.clone(), Some(entry)));
                }
                Change::Delete { key } => {
                    if entries.remove(key).is_some() {
                        seen.push((key.clone(), None));
                    }
                }
            }
        }
        let durable = entries.values().filter(|entry| entry.lease == 0).cloned().collect();
        let stored = StoredEntries { revision, entries: durable };
        stored.write(&self.path).map_err(|error| BackendError::Refused(error.to_string()))?;
        state.revision = revision;
        state.entries = entries;
        // Without a watch there is no receiver.
        let _ = state.seen.send(Seen { revision, changes: seen });
        Ok(())
    }

    pub fn grant(&self) -> i64 {
        let mut state = self.state();
        state.last_lease += 1;
        let lease = state.last_lease;
        state.leases.insert(lease);
        lease
    }

    pub fn has_lease(&self, lease: i64) -> bool {
        self.state().leases.contains(&lease)
    }

    pub fn revoke(&self, lease: i64) -> Result<(), BackendError> {
        let mut state = self.state();
        state.leases.remove(&lease);
        let hanging = state.entries.values().filter(|entry| entry.lease == lease);
        let changes: Vec<Change> = hanging.map(|entry| Change::Delete { key: entry.key.clone() }).collect();
        self.apply(&mut state, &changes)
    }

    pub fn watch(&self, from: Revision) -> Result<LocalWatch, BackendError> {
        let state = self.state();
        if from <= state.revision {
            return Err(BackendError::WatchEnded(format!("the directory is at {} already", state.revision)));
        }
        Ok(LocalWatch(state.seen.subscribe()))
    }
}

impl State {
    fn holds(&self, guard: &Guard) -> bool {
        let entry = self.entries.get(guard.key());
        match guard {
            Guard::Absent(_) => entry.is_none(),
            Guard::Unchanged(_, revision) => entry.is_some_and(|entry| entry.mod_revision == *revision),
            Guard::CreatedAt(_, revision) => entry.is_some_and(|entry| entry.create_revision == *revision),
            Guard::Value(_, value) => entry.is_some_and(|entry| entry.value == *value),
        }
    }
}

#[derive(Debug)]
pub(crate) struct LocalWatch(broadcast::Receiver<Seen>);

impl LocalWatch {
    pub async fn next(&mut self) -> Result<Seen, BackendError> {
        self.0.recv().await.map_err(|error| BackendError::WatchEnded(error.to_string()))
    }
}
