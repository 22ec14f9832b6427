//! The initiator's lock: who may change an environment, or take its snapshot, at a time.
//!
//! A key under the holder's lease. Its create revision is the **fencing token**: it only grows, so that whoever comes later
//! has a greater one. Three things keep two from acting at once:
//! 1. the holder asks [`InitiatorLock::check`] before it acts: it fails once the lease *could* have ended;
//! 2. what is written to the directory under a lock is guarded by the token, in etcd;
//! 3. other hosts that are asked to act under a lock refuse a token smaller than one they have seen: [`Fence`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use diorama_topology::EnvironmentName;
use serde::{Deserialize, Serialize};

use super::backend::{Change, Guard, Revision};
use super::record::{LockRecord, Revised};
use super::session::{LeaseState, boot_time};
use super::{Directory, DirectoryError, Freshness, json};

/// Orders the holders of a lock. Greater is later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FencingToken(pub Revision);

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The lock is not held any more: what was done under it must be undone or left to the next holder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the lock of the environment `{environment}` was lost: this host could not reach the cluster's directory in time"
)]
pub struct LockLost {
    /// The environment.
    pub environment: EnvironmentName,
}

/// A lock that this host holds, until it is dropped or lost.
#[derive(Debug)]
pub struct InitiatorLock {
    directory: Directory,
    environment: EnvironmentName,
    key: String,
    value: String,
    token: FencingToken,
    lease_number: u64,
    lost: AtomicBool,
    released: bool,
}

impl Directory {
    /// Takes the lock of an environment, whether it exists or not. Does not wait for another holder.
    ///
    /// # Errors
    /// `Held` with who holds it; `Unavailable` when the directory cannot be reached or this host has no lease.
    pub async fn lock(
        &self,
        environment: &EnvironmentName,
        purpose: &str,
    ) -> Result<InitiatorLock, DirectoryError> {
        let lease = self.0.lease.borrow().clone();
        if !lease.is_held() {
            let view = self.view();
            let problem = match &view.freshness {
                Freshness::Stale { reason, .. } => reason.clone(),
                Freshness::Fresh => "this host has no lease yet".to_owned(),
            };
            return Err(DirectoryError::Unavailable { problem, perhaps_done: false });
        }
        let nonce =
            crate::identity::random_text().map_err(|error| DirectoryError::Refused(error.to_string()))?;
        let record = LockRecord {
            holder: self.host(),
            purpose: purpose.chars().take(100).collect(),
            nonce,
            since: jiff::Timestamp::now(),
        };
        let (key, value) = (format!("locks/{environment}"), json(&record));
        let changes = [Change::Put { key: key.clone(), value: value.clone(), lease: lease.lease }];
        for _ in 0..super::RETRIES {
            let committed = match self.commit_seen(&[Guard::Absent(key.clone())], &changes).await {
                Ok(committed) => committed,
                Err(error) => {
                    // It may be ours all the same. By the value nobody else's is given back.
                    let _ = self.0.returned.send((key, value));
                    return Err(error);
                }
            };
            if committed.succeeded {
                return Ok(InitiatorLock {
                    directory: self.clone(),
                    environment: environment.clone(),
                    key,
                    value,
                    token: FencingToken(committed.revision),
                    lease_number: lease.number,
                    lost: AtomicBool::new(false),
                    released: false,
                });
            }
            if let Some(held) = self.view().locks.get(environment) {
                let lock = Arc::clone(&held.value);
                return Err(DirectoryError::Held { environment: environment.clone(), lock });
            }
            // Given back between the attempt and the view: again.
        }
        Err(DirectoryError::Conflict { what: format!("the lock of the environment `{environment}`") })
    }
}

impl InitiatorLock {
    /// The environment.
    pub fn environment(&self) -> &EnvironmentName {
        &self.environment
    }

    /// Its token, for others to check ([`Fence`]).
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// Whether it is held for certain. To be asked before each step that others must not take at the same time. Once lost,
    /// it stays lost.
    ///
    /// # Errors
    /// When the lease has ended, or could have ended, or the lock was taken away.
    pub fn check(&self) -> Result<FencingToken, LockLost> {
        if !self.lost.load(Ordering::Acquire) {
            let lease = self.directory.0.lease.borrow();
            if lease.number == self.lease_number && lease.is_held() && !self.taken_away() {
                return Ok(self.token);
            }
        }
        self.lost.store(true, Ordering::Release);
        Err(LockLost { environment: self.environment.clone() })
    }

    fn taken_away(&self) -> bool {
        let view = self.directory.0.view.borrow();
        let in_view: Option<&Revised<Arc<LockRecord>>> = view.locks.get(&self.environment);
        view.revision >= self.token.0 && in_view.is_none_or(|lock| lock.revision != self.token.0)
    }

    /// Returns when the lock is lost.
    pub async fn lost(&self) -> LockLost {
        let mut lease = self.directory.0.lease.clone();
        let mut view = self.directory.watch();
        loop {
            if let Err(lost) = self.check() {
                return lost;
            }
            let good_until = LeaseState::clone(&lease.borrow_and_update()).good_until;
            view.borrow_and_update();
            let left = good_until.saturating_sub(boot_time()).min(Duration::from_secs(3600));
            tokio::select! {
                _ = lease.changed() => {}
                _ = view.changed() => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    /// Gives it back, and waits until that is done. Dropping it does the same in the background.
    ///
    /// # Errors
    /// When the directory cannot be reached: it is given back later then.
    pub async fn release(mut self) -> Result<(), DirectoryError> {
        let guards = [Guard::Value(self.key.clone(), self.value.clone())];
        self.directory.commit(&guards, &[Change::Delete { key: self.key.clone() }]).await?;
        self.released = true;
        Ok(())
    }

    pub(super) fn guard(&self) -> Guard {
        Guard::CreatedAt(self.key.clone(), self.token.0)
    }
}

impl Drop for InitiatorLock {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        // When the session has ended, the lease ends as well, and the lock with it.
        let _ = self.directory.0.returned.send((self.key.clone(), self.value.clone()));
    }
}

/// A token is older than one that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lock with token {token} was followed by one with token {seen}: its holder may not act any more")]
pub struct Superseded {
    /// What was shown.
    pub token: FencingToken,
    /// The greatest that was seen.
    pub seen: FencingToken,
}

/// The greatest fencing token that this host has seen of each environment.
#[derive(Debug, Clone, Default)]
pub struct Fence(BTreeMap<EnvironmentName, FencingToken>);

impl Fence {
    /// Lets a holder act, unless a later one has been seen.
    ///
    /// # Errors
    /// When a later one has.
    pub fn admit(&mut self, environment: &EnvironmentName, token: FencingToken) -> Result<(), Superseded> {
        match self.0.get_mut(environment) {
            Some(seen) if *seen > token => Err(Superseded { token, seen: *seen }),
            Some(seen) => {
                *seen = token;
                Ok(())
            }
            None => {
                self.0.insert(environment.clone(), token);
                Ok(())
            }
        }
    }

    /// Forgets tokens that the directory, at this revision, has not given: it was restored from a backup, and gives them
    /// again from there.
    pub fn forget_beyond(&mut self, revision: Revision) {
        self.0.retain(|_, token| token.0 <= revision);
    }

    /// Forgets environments that are gone. Tokens grow over all environments, so that one of the same name has greater ones.
    pub fn retain(&mut self, there: impl Fn(&EnvironmentName) -> bool) {
        self.0.retain(|environment, _| there(environment));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_lets_nobody_back() {
        let mut fence = Fence::default();
        let (a, b): (EnvironmentName, EnvironmentName) = ("a".parse().unwrap(), "b".parse().unwrap());
        assert_eq!(fence.admit(&a, FencingToken(5)), Ok(()));
        assert_eq!(fence.admit(&a, FencingToken(5)), Ok(()), "its holder acts more than once");
        assert_eq!(fence.admit(&a, FencingToken(9)), Ok(()));
        let superseded = Superseded { token: FencingToken(5), seen: FencingToken(9) };
        assert_eq!(fence.admit(&a, FencingToken(5)), Err(superseded));
        assert_eq!(fence.admit(&b, FencingToken(5)), Ok(()), "each environment by itself");
        fence.retain(|name| *name != a);
        assert_eq!(fence.admit(&a, FencingToken(5)), Ok(()));
        assert_eq!(fence.admit(&a, FencingToken(9)), Ok(()));
        fence.forget_beyond(9);
        assert_eq!(fence.admit(&a, FencingToken(5)), Err(superseded));
        fence.forget_beyond(8);
        assert_eq!(fence.admit(&a, FencingToken(5)), Ok(()), "the directory has gone back before it");
    }
}
