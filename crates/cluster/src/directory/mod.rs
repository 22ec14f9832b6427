//! The directory: what the cluster agrees on. In etcd, or in a file where there is one host.
//!
//! Reads come from a [`View`] in memory, which a task ([`session`]) keeps up by a watch. When etcd cannot be reached, the view
//! stays and says that it is stale; it also outlives the agent, in a file. Writes go to etcd at once, each guarded by what
//! it is based on, and fail when etcd cannot be reached: nothing is queued (but the giving back of locks).
//!
//! Invariants:
//! - After a write has succeeded, [`Directory::view`] shows it, as long as etcd answers.
//! - What hangs on this host's lease (its [`HostStatus`], its locks) is gone for others within the lease's time after this
//!   host stopped keeping it alive. A lock says that it is lost *before* it can be another's ([`InitiatorLock::check`]).
//! - A lock that was lost is not held again, even if its key is still there.

mod backend;
mod etcd;
mod local;
mod lock;
mod record;
mod session;
mod view;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use diorama_topology::EnvironmentName;
use serde::Serialize;
use tokio::sync::{Mutex, mpsc, watch};

pub use backend::Revision;
pub use etcd::EtcdConfig;
pub use lock::{Fence, FencingToken, InitiatorLock, LockLost, Superseded};
pub use record::{
    EnvironmentRecord, HostStatus, LockRecord, MAX_RECORD_BYTES, RemovedRecord, Revised, TokenRecord,
};
pub use view::{Freshness, View};

use crate::identity::{Fingerprint, HostId, Member, Members};
use crate::private_file::FileError;
use backend::{Backend, BackendError, Change, Committed, Guard};
use session::{LeaseState, Session};

/// How long a lease lasts without being kept alive: a host that is gone is found out after this.
pub const LEASE: Duration = Duration::from_secs(10);

/// How long a write waits to be seen in the view.
const SEEN_LIMIT: Duration = Duration::from_secs(2);

/// Why the directory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// What etcd's configuration says cannot be.
    #[error("{0}")]
    Configuration(String),
}

/// Why the directory was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// It cannot be reached.
    #[error("the cluster's directory cannot be reached: {problem}")]
    Unavailable {
        /// What happened.
        problem: String,
        /// The change may have been made, without an answer: the view shows it when the directory can be reached again.
        perhaps_done: bool,
    },
    /// It was reached, and refuses.
    #[error("the cluster's directory refuses: {0}")]
    Refused(String),
    /// What the change was based on has changed meanwhile.
    #[error("{what} was changed by another host meanwhile")]
    Conflict {
        /// What was to be changed.
        what: String,
    },
    /// There is one already.
    #[error("there is {what} already")]
    Exists {
        /// What was to be made.
        what: String,
    },
    /// There is none.
    #[error("there is no {what}")]
    Missing {
        /// What was to be changed.
        what: String,
    },
    /// The record is longer than the directory takes.
    #[error("{what} takes {bytes} bytes in the directory; at most {MAX_RECORD_BYTES} fit")]
    TooLarge {
        /// What was to be written.
        what: String,
        /// How long it is.
        bytes: usize,
    },
    /// Another holds the lock.
    #[error("the environment `{environment}` is held by host {} for: {}", lock.holder, lock.purpose)]
    Held {
        /// The environment.
        environment: EnvironmentName,
        /// Who and what for.
        lock: Arc<LockRecord>,
    },
    /// The lock was lost.
    #[error(transparent)]
    LockLost(#[from] LockLost),
}

impl From<BackendError> for DirectoryError {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::Unavailable { problem, perhaps_done } => {
                Self::Unavailable { problem, perhaps_done }
            }
            BackendError::Refused(problem) => Self::Refused(problem),
            BackendError::WatchEnded(problem) => Self::Unavailable { problem, perhaps_done: false },
        }
    }
}

/// How the directory behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long this host's lease lasts; whole seconds, at least 2 (what etcd allows).
    pub lease: Duration,
    /// Where the last view is kept, so that an agent that starts while etcd is down knows its cluster. Only for etcd.
    pub remembered: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { lease: LEASE, remembered: None }
    }
}

/// The directory, as one host uses it. Cheap to clone. Dropping the last clone ends the session; the lease ends by itself,
/// or at once with [`Directory::leave`].
#[derive(Debug, Clone)]
pub struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    host: HostId,
    backend: Arc<Backend>,
    view: watch::Receiver<Arc<View>>,
    members: watch::Receiver<Arc<Members>>,
    lease: watch::Receiver<LeaseState>,
    status: watch::Sender<Option<HostStatus>>,
    /// Locks to be given back: key and value.
    returned: mpsc::UnboundedSender<(String, String)>,
    /// Where the view is kept; nowhere after the session's end. Held while it is written.
    remembered: Arc<Mutex<Option<PathBuf>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Directory {
    /// The directory of a host that is alone, in this file. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn local(path: &Path, host: HostId) -> Result<Self, OpenError> {
        let backend = Backend::Local(local::Local::open(path.to_owned())?);
        Ok(Self::open(backend, host, Options::default(), View::unknown()))
    }

    /// The directory of the cluster in etcd. Does not wait for etcd: see [`Directory::fresh`]. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the configuration is wrong, or the remembered view cannot be read.
    pub fn etcd(
        config: &EtcdConfig,
        cluster: Fingerprint,
        host: HostId,
        options: Options,
    ) -> Result<Self, OpenError> {
        let short = crate::identity::to_hex(&cluster.0[..8]);
        let etcd =
            etcd::Etcd::new(config, format!("/diorama/v1/{short}/")).map_err(OpenError::Configuration)?;
        let mut view = View::unknown();
        if let Some(path) = &options.remembered
            && let Some(stored) = local::StoredEntries::read(path)?
        {
            let freshness = view.freshness;
            view = View { freshness, ..View::of(stored.revision, &stored.entries) };
        }
        Ok(Self::open(Backend::Etcd(etcd), host, options, view))
    }

    fn open(backend: Backend, host: HostId, options: Options, view: View) -> Self {
        let backend = Arc::new(backend);
        let (status, announced) = watch::channel(None);
        let (returned, to_return) = mpsc::unbounded_channel();
        let (members_sender, members) = watch::channel(Arc::clone(&view.members));
        let (view_sender, view) = watch::channel(Arc::new(view));
        let (lease_sender, lease) = watch::channel(LeaseState::default());
        let remembered = Arc::new(Mutex::new(options.remembered));
        let session = Session {
            host,
            backend: Arc::clone(&backend),
            lease_length: options.lease,
            remembered: Arc::clone(&remembered),
            view: view_sender,
            members: members_sender,
            lease: lease_sender,
            announced,
            to_return,
            kept: Vec::new(),
        };
        let task = tokio::spawn(session.run());
        Self(Arc::new(Inner { host, backend, view, members, lease, status, returned, remembered, task }))
    }

    /// This host.
    pub fn host(&self) -> HostId {
        self.0.host
    }

    /// What is known now.
    pub fn view(&self) -> Arc<View> {
        self.0.view.borrow().clone()
    }

    /// Follows what is known.
    pub fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.0.view.clone()
    }

    /// Follows the members: changes only when they do.
    pub fn members(&self) -> watch::Receiver<Arc<Members>> {
        self.0.members.clone()
    }

    /// Waits until the view is up to date and this host has its lease.
    ///
    /// # Errors
    /// When that takes longer than the limit; says why the directory was not reached.
    pub async fn fresh(&self, limit: Duration) -> Result<Arc<View>, DirectoryError> {
        let mut view = self.watch();
        let mut lease = self.0.lease.clone();
        let waited = tokio::time::timeout(limit, async {
            // The sender lives as long as the session, and the session as long as `self`.
            let _ = lease.wait_for(LeaseState::is_held).await;
            let _ = view.wait_for(|view| view.is_fresh()).await;
        })
        .await;
        match (waited, &self.view().freshness) {
            (Ok(()), _) => Ok(self.view()),
            (Err(_), Freshness::Stale { reason, .. }) => {
                Err(DirectoryError::Unavailable { problem: reason.clone(), perhaps_done: false })
            }
            (Err(_), Freshness::Fresh) => {
                let problem = format!("no lease within {limit:?}");
                Err(DirectoryError::Unavailable { problem, perhaps_done: false })
            }
        }
    }

    /// Says what this host is, now and whenever its lease is taken anew. Written as soon as the directory can be reached.
    pub fn announce(&self, status: HostStatus) {
        self.0.status.send_if_modified(|announced| {
            let new = announced.as_ref() != Some(&status);
            *announced = Some(status);
            new
        });
    }

    /// Ends the session: nothing is written down here any more afterwards. The lease ends by itself, and the directory is of no
    /// use any more.
    pub async fn end(&self) {
        self.0.task.abort();
        // The task may wait for a thread that is writing, and that goes on without it.
        *self.0.remembered.lock().await = None;
    }

    /// Ends the session, and gives the lease back, so that others see at once that this host is gone.
    ///
    /// # Errors
    /// When the directory cannot be reached: the lease then ends by itself.
    pub async fn leave(&self) -> Result<(), DirectoryError> {
        self.end().await;
        let lease = self.0.lease.borrow().lease;
        if lease != 0 {
            self.0.backend.revoke(lease).await?;
        }
        Ok(())
    }

    /// Makes the first member: only in a directory that has none.
    ///
    /// # Errors
    /// See [`DirectoryError`]; so for all below. `Exists` when there are members already.
    pub async fn found(&self, member: &Member) -> Result<(), DirectoryError> {
        let view = self.fresh(crate::directory::SEEN_LIMIT * 3).await?;
        if !view.members.is_empty() {
            return Err(DirectoryError::Exists { what: "a cluster".to_owned() });
        }
        self.admit(member, None).await
    }

    /// Makes a member, and with it uses up a token, both or neither.
    pub(crate) async fn admit(
        &self,
        member: &Member,
        token: Option<(&str, Revision, &TokenRecord)>,
    ) -> Result<(), DirectoryError> {
        let (key, name) = (format!("members/{}", member.id), format!("names/{}", member.name));
        let mut guards = vec![Guard::Absent(key.clone()), Guard::Absent(name.clone())];
        let mut changes = vec![
            put(&key, "the member", member)?,
            put(&name, "the name", &member.id)?,
            Change::Delete { key: format!("removed/{}", member.id) },
        ];
        if let Some((id, revision, record)) = token {
            let key = format!("tokens/{id}");
            changes.push(put(&key, "the token", record)?);
            guards.push(Guard::Unchanged(key, revision));
        }
        if self.commit(&guards, &changes).await? {
            return Ok(());
        }
        // Which of the guards it was, the view shows.
        let view = self.view();
        if view.members.named(&member.name).is_some() || view.members.get(member.id).is_some() {
            return Err(DirectoryError::Exists { what: format!("a host `{}`", member.name) });
        }
        Err(DirectoryError::Conflict { what: "the join token".to_owned() })
    }

    /// Changes a member: its addresses, or whether it drains. Neither id nor name may change.
    pub async fn change_member(
        &self,
        host: HostId,
        change: impl Fn(&mut Member) + Send,
    ) -> Result<(), DirectoryError> {
        let what = || format!("host {host}");
        let key = format!("members/{host}");
        // The value guards itself: `change` is made anew on what is there.
        for _ in 0..RETRIES {
            let before = self.view().members.get(host).cloned();
            let before = before.ok_or_else(|| DirectoryError::Missing { what: what() })?;
            let mut after = before.clone();
            change(&mut after);
            debug_assert!(after.id == before.id && after.name == before.name);
            let guard = Guard::Value(key.clone(), json(&before));
            if self.commit(&[guard], &[put(&key, "the member", &after)?]).await? {
                return Ok(());
            }
        }
        Err(DirectoryError::Conflict { what: what() })
    }

    /// Takes a host out of the cluster. All others refuse it as soon as they see that, and it finds out itself
    /// ([`View::removed`]). Its environments stay in the directory, for others to take over.
    pub async fn remove_member(&self, host: HostId) -> Result<(), DirectoryError> {
        let view = self.view();
        let what = format!("host {host}");
        let member = view.members.get(host).ok_or(DirectoryError::Missing { what: what.clone() })?;
        let (key, name) = (format!("members/{host}"), format!("names/{}", member.name));
        let guards = [Guard::Value(name.clone(), json(&host))];
        let removed = RemovedRecord { name: member.name.clone(), since: jiff::Timestamp::now() };
        let changes = [
            Change::Delete { key },
            Change::Delete { key: name },
            Change::Delete { key: format!("hosts/{host}") },
            put(&format!("removed/{host}"), "the removal", &removed)?,
        ];
        if self.commit(&guards, &changes).await? { Ok(()) } else { Err(DirectoryError::Conflict { what }) }
    }

    /// A host that was removed has heard of it.
    pub async fn forget_removed(&self, host: HostId) -> Result<(), DirectoryError> {
        self.commit(&[], &[Change::Delete { key: format!("removed/{host}") }]).await.map(drop)
    }

    /// Writes an environment. `based_on` is the revision of the record that this one replaces; `None` makes a new one. The
    /// lock must be held: etcd itself checks that.
    pub async fn put_environment(
        &self,
        record: &EnvironmentRecord,
        based_on: Option<Revision>,
        lock: &InitiatorLock,
    ) -> Result<Revision, DirectoryError> {
        let name = record.name();
        let what = format!("the environment `{name}`");
        let key = format!("environments/{name}");
        self.write_under(lock, name, &what, based_on, put(&key, &what, record)?).await
    }

    /// Deletes an environment.
    pub async fn remove_environment(
        &self,
        name: &EnvironmentName,
        based_on: Revision,
        lock: &InitiatorLock,
    ) -> Result<Revision, DirectoryError> {
        let what = format!("the environment `{name}`");
        let change = Change::Delete { key: format!("environments/{name}") };
        self.write_under(lock, name, &what, Some(based_on), change).await
    }

    async fn write_under(
        &self,
        lock: &InitiatorLock,
        name: &EnvironmentName,
        what: &str,
        based_on: Option<Revision>,
        change: Change,
    ) -> Result<Revision, DirectoryError> {
        if lock.environment() != name {
            return Err(DirectoryError::LockLost(LockLost { environment: name.clone() }));
        }
        lock.check()?;
        let guards = [guard(&change, based_on), lock.guard()];
        let committed = self.commit_seen(&guards, &[change]).await?;
        if committed.succeeded {
            return Ok(committed.revision);
        }
        // Either the lock or the record: the view has seen all that made it fail.
        lock.check()?;
        Err(refused(what, based_on))
    }

    pub(crate) async fn put_token(&self, id: &str, record: &TokenRecord) -> Result<(), DirectoryError> {
        let change = put(&format!("tokens/{id}"), "the join token", record)?;
        self.write("the join token", None, change).await.map(drop)
    }

    /// Makes a join token worthless.
    pub async fn remove_token(&self, id: &str) -> Result<(), DirectoryError> {
        let what = format!("join token {id}");
        let key = format!("tokens/{id}");
        let Some(token) = self.view().tokens.get(id).map(|token| token.revision) else {
            return Err(DirectoryError::Missing { what });
        };
        self.write(&what, Some(token), Change::Delete { key }).await.map(drop)
    }

    async fn write(
        &self,
        what: &str,
        based_on: Option<Revision>,
        change: Change,
    ) -> Result<Revision, DirectoryError> {
        let committed = self.commit_seen(&[guard(&change, based_on)], &[change]).await?;
        if committed.succeeded { Ok(committed.revision) } else { Err(refused(what, based_on)) }
    }

    async fn commit(&self, guards: &[Guard], changes: &[Change]) -> Result<bool, DirectoryError> {
        Ok(self.commit_seen(guards, changes).await?.succeeded)
    }

    /// Carries it out, and waits until the view has got as far: also when it failed, so that the view shows why.
    async fn commit_seen(&self, guards: &[Guard], changes: &[Change]) -> Result<Committed, DirectoryError> {
        let committed = self.0.backend.commit(guards, changes).await?;
        let mut view = self.watch();
        let mut known = committed.revision;
        if !committed.succeeded {
            // etcd counts changes elsewhere as well, which the watch does not show: what the guards look at is enough.
            known = known.min(view.borrow().revision + 1);
        }
        let seen = tokio::time::timeout(SEEN_LIMIT, view.wait_for(|view| view.revision >= known));
        if !committed.succeeded {
            let _ = tokio::time::timeout(SEEN_AFTER_FAILURE, seen).await;
        } else {
            // Later than that, etcd is failing: the write is done all the same.
            let _ = seen.await;
        }
        Ok(committed)
    }
}

/// How often a change that others come between is tried.
const RETRIES: usize = 8;
/// How long a write that failed waits for the view to show why.
const SEEN_AFTER_FAILURE: Duration = Duration::from_millis(250);

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("records are plain data with text as keys")
}

fn put<T: Serialize>(key: &str, what: &str, value: &T) -> Result<Change, DirectoryError> {
    let value = json(value);
    if value.len() > MAX_RECORD_BYTES {
        return Err(DirectoryError::TooLarge { what: what.to_owned(), bytes: value.len() });
    }
    Ok(Change::Put { key: key.to_owned(), value, lease: 0 })
}

fn guard(change: &Change, based_on: Option<Revision>) -> Guard {
    let (Change::Put { key, .. } | Change::Delete { key }) = change;
    match based_on {
        Some(revision) => Guard::Unchanged(key.clone(), revision),
        None => Guard::Absent(key.clone()),
    }
}

fn refused(what: &str, based_on: Option<Revision>) -> DirectoryError {
    let what = what.to_owned();
    match based_on {
        Some(_) => DirectoryError::Conflict { what },
        None => DirectoryError::Exists { what },
    }
}
