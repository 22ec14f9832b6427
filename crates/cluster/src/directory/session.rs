//! The task that keeps the view up and the lease alive.
//!
//! ```text
//!             read all, watch, lease
//! unreached ------------------------> following --- changes, keep-alives, announcements --> following
//!     ^                                   |
//!     '------- any request fails ---------'   (the view turns stale; wait; try again)
//! ```
//!
//! Invariant: `LeaseState::good_until` is never later than when the directory will end the lease: it counts from
//! *before* the keep-alive was sent, by a clock that runs on while the computer sleeps, and ends a margin early.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::backend::{Backend, BackendError, Change, Entry, Guard, Revision};
use super::json;
use super::local::StoredEntries;
use super::record::{HostStatus, LockRecord, MAX_RECORD_BYTES};
use super::view::{Freshness, View};
use crate::identity::{HostId, Members};

/// Pauses between attempts to reach the directory: doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// How often the view is written down, at most.
const REMEMBER_INTERVAL: Duration = Duration::from_secs(1);
/// What locks' keys begin with.
const LOCKS: &str = "locks/";

/// This host's lease.
#[derive(Debug, Clone, Default)]
pub(crate) struct LeaseState {
    /// 0 when there is none.
    pub lease: i64,
    /// Counts the leases that this host has had: a lock belongs to one.
    pub number: u64,
    /// By [`boot_time`].
    pub good_until: Duration,
}

impl LeaseState {
    pub fn is_held(&self) -> bool {
        self.lease != 0 && boot_time() < self.good_until
    }
}

/// Time since the computer was started, sleep included. Never set.
pub(crate) fn boot_time() -> Duration {
    // The call fails only for clocks that do not exist; the monotonic one always does.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .or_else(|_| clock_gettime(ClockId::CLOCK_MONOTONIC))
        .expect("Linux has a monotonic clock");
    now.into()
}

pub(super) struct Session {
    pub host: HostId,
    pub backend: Arc<Backend>,
    pub lease_length: Duration,
    /// See [`super::Inner`].
    pub remembered: Arc<Mutex<Option<PathBuf>>>,
    pub view: watch::Sender<Arc<View>>,
    pub members: watch::Sender<Arc<Members>>,
    pub lease: watch::Sender<LeaseState>,
    pub announced: watch::Receiver<Option<HostStatus>>,
    pub to_return: mpsc::UnboundedReceiver<(String, String)>,
    /// Locks that could not be given back yet.
    pub kept: Vec<(String, String)>,
}

impl Session {
    pub async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.follow(&mut pause).await {
                Ok(()) => return,
                Err(error) => error,
            };
            self.backend.disconnect();
            self.turn_stale(&error);
            self.wait(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    fn turn_stale(&self, error: &BackendError) {
        self.view.send_modify(|view| match &mut Arc::make_mut(view).freshness {
            // Since when stays; why may change.
            Freshness::Stale { reason, .. } => *reason = error.to_string(),
            fresh @ Freshness::Fresh => {
                tracing::warn!(%error, "the cluster's directory cannot be reached");
                *fresh = Freshness::Stale { since: jiff::Timestamp::now(), reason: error.to_string() };
            }
        });
    }

    /// Collects locks that are given back meanwhile.
    async fn wait(&mut self, pause: Duration) {
        let end = Instant::now() + pause;
        while let Ok(Some(lock)) = tokio::time::timeout_at(end, self.to_return.recv()).await {
            self.kept.push(lock);
        }
        tokio::time::sleep_until(end).await;
    }

    /// Until something fails; `Ok` when nobody uses the directory any more.
    async fn follow(&mut self, pause: &mut Duration) -> Result<(), BackendError> {
        self.keep_lease().await?;
        let (revision, entries) = self.backend.read_all().await?;
        let mut watch = self.backend.watch(revision + 1).await?;
        let mut entries: BTreeMap<String, Entry> =
            entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        let view = View::of(revision, &entries.values().cloned().collect::<Vec<_>>());
        if !self.view.borrow().is_fresh() {
            tracing::info!(revision, members = view.members.len(), "the cluster's directory is read");
        }
        self.publish(view);
        *pause = FIRST_PAUSE;

        let mut changed = true;
        let mut remember = tokio::time::interval(REMEMBER_INTERVAL);
        remember.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut keep_alive = tokio::time::interval(self.lease_length / 4);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.announced.mark_unchanged();
        self.announce().await?;
        self.kept.extend(self.stale_locks(&entries));
        for lock in std::mem::take(&mut self.kept) {
            self.give_back(lock).await?;
        }
        loop {
            tokio::select! {
                seen = watch.next() => {
                    let seen = seen?;
                    changed |= !seen.changes.is_empty();
                    let mut view = View::clone(&self.view.borrow());
                    view.revision = view.revision.max(seen.revision);
                    for (key, entry) in seen.changes {
                        match entry {
                            Some(entry) => {
                                view.put(&entry);
                                entries.insert(key, entry);
                            }
                            None => {
                                view.delete(&key);
                                entries.remove(&key);
                            }
                        }
                    }
                    let missing = !view.hosts.contains_key(&self.host);
                    self.publish(view);
                    if missing && self.announced.borrow().is_some() {
                        self.announce().await?;
                    }
                }
                _ = keep_alive.tick() => {
                    let number = self.lease.borrow().number;
                    self.keep_lease().await?;
                    if self.lease.borrow().number != number {
                        self.announce().await?;
                    }
                }
                announced = self.announced.changed() => match announced {
                    Ok(()) => self.announce().await?,
                    Err(_) => return Ok(()),
                },
                lock = self.to_return.recv() => match lock {
                    Some(lock) => self.give_back(lock).await?,
                    None => return Ok(()),
                },
                _ = remember.tick(), if changed => {
                    changed = false;
                    self.remember(&entries).await;
                }
            }
        }
    }

    /// Locks of this host under an earlier lease, as of a process before this one: nobody can act under them any more, and
    /// others need not wait until that lease ends.
    fn stale_locks(&self, entries: &BTreeMap<String, Entry>) -> Vec<(String, String)> {
        let lease = self.lease.borrow().lease;
        let is_stale = |entry: &Entry| {
            entry.key.starts_with(LOCKS)
                && entry.lease != lease
                && serde_json::from_str::<LockRecord>(&entry.value).is_ok_and(|lock| lock.holder == self.host)
        };
        entries
            .values()
            .filter(|entry| is_stale(entry))
            .map(|entry| (entry.key.clone(), entry.value.clone()))
            .collect()
    }

    fn publish(&self, view: View) {
        let members = Arc::clone(&view.members);
        self.view.send_replace(Arc::new(view));
        self.members.send_if_modified(|known| {
            let changed = *known != members;
            *known = members;
            changed
        });
    }

    /// Keeps the lease alive, or takes a new one.
    async fn keep_lease(&mut self) -> Result<(), BackendError> {
        let before = boot_time();
        let state = self.lease.borrow().clone();
        let asked_seconds = i64::try_from(self.lease_length.as_secs()).unwrap_or(i64::MAX).max(2);
        let mut kept = None;
        if state.lease != 0 {
            kept = self.backend.keep_alive(state.lease, asked_seconds).await?.map(|ttl| (state.lease, ttl));
        }
        let (lease, ttl, number) = match kept {
            Some((lease, ttl)) => (lease, ttl, state.number),
            None => {
                if state.lease != 0 {
                    tracing::warn!("this host's lease has ended: it takes a new one, and its locks are lost");
                    self.lease.send_modify(|state| state.lease = 0);
                }
                let (lease, ttl) = self.backend.grant(asked_seconds).await?;
                (lease, ttl, state.number + 1)
            }
        };
        let ttl = Duration::from_secs(ttl.unsigned_abs());
        let good_until = match self.backend.is_remote() {
            true => before + ttl * 4 / 5,
            false => Duration::MAX,
        };
        self.lease.send_replace(LeaseState { lease, number, good_until });
        Ok(())
    }

    /// Writes this host's status under its lease. Not for a host that is not, or no longer, a member.
    async fn announce(&mut self) -> Result<(), BackendError> {
        let Some(status) = self.announced.borrow_and_update().clone() else { return Ok(()) };
        let lease = self.lease.borrow().lease;
        let Some(member_since) = self.member_key_revision() else { return Ok(()) };
        let value = json(&status);
        if value.len() > MAX_RECORD_BYTES {
            tracing::error!(bytes = value.len(), "this host's status is too long for the directory");
            return Ok(());
        }
        let member = format!("members/{}", self.host);
        let put = Change::Put { key: format!("hosts/{}", self.host), value, lease };
        // A status of a host that was removed in this moment would show until its lease ends.
        let guard = Guard::CreatedAt(member, member_since);
        match self.backend.commit(&[guard], &[put]).await {
            Ok(_) => Ok(()),
            Err(BackendError::Refused(problem)) => {
                // A lease that ended just now: the next keep-alive finds out.
                tracing::warn!(problem, "this host's status was not taken");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn member_key_revision(&self) -> Option<Revision> {
        self.view.borrow().member_since.get(&self.host).copied()
    }

    async fn give_back(&mut self, lock: (String, String)) -> Result<(), BackendError> {
        let (key, value) = lock.clone();
        let guards = [Guard::Value(key.clone(), value)];
        let given = self.backend.commit(&guards, &[Change::Delete { key }]).await;
        if matches!(given, Err(BackendError::Unavailable { .. })) {
            self.kept.push(lock);
        }
        given.map(drop)
    }

    async fn remember(&self, entries: &BTreeMap<String, Entry>) {
        // Held by whoever writes, also when this task ends meanwhile.
        let remembered = Arc::clone(&self.remembered).lock_owned().await;
        let Some(path) = remembered.clone() else { return };
        // What hangs on leases is of the moment.
        let entries: Vec<Entry> = entries.values().filter(|entry| entry.lease == 0).cloned().collect();
        let stored = StoredEntries { revision: self.view.borrow().revision, entries };
        let write = move || {
            let _held = remembered;
            stored.write(&path)
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the directory's view cannot be written down"),
            Err(error) => tracing::error!(%error, "writing down the directory's view failed"),
        }
    }
}
