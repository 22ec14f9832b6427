//! What a directory needs of what it is kept in: ordered keys with revisions, guarded transactions, leases, watches.
//!
//! Two keep it: [`Etcd`] for a cluster, [`Local`] for one host. Everything above this module is the same for both.

use serde::{Deserialize, Serialize};

use super::etcd::{Etcd, EtcdWatch};
use super::local::{Local, LocalWatch};

/// Counts the changes of the whole directory. A key's is that of its last change.
pub type Revision = i64;

/// A key and what it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub key: String,
    pub value: String,
    pub create_revision: Revision,
    pub mod_revision: Revision,
    /// The key goes when its lease ends; 0 when it has none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lease: i64,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// What must hold for a transaction to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Guard {
    /// There is no such key.
    Absent(String),
    /// The key's last change was this one.
    Unchanged(String, Revision),
    /// The key is there since this revision, changed or not.
    CreatedAt(String, Revision),
    /// The key has this value.
    Value(String, String),
}

impl Guard {
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::Unchanged(key, _) | Self::CreatedAt(key, _) | Self::Value(key, _) => {
                key
            }
        }
    }
}

/// What a transaction does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Put { key: String, value: String, lease: i64 },
    Delete { key: String },
}

/// What came of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Committed {
    pub revision: Revision,
    /// Every guard held, and every change was made; else none was.
    pub succeeded: bool,
}

/// What a watch saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Of the last of the changes: none before it is missing. 0 when there are none.
    pub revision: Revision,
    /// Deleted keys have no entry.
    pub changes: Vec<(String, Option<Entry>)>,
}

/// The directory cannot be reached, or does not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BackendError {
    /// It was not reached, or did not answer.
    #[error("{problem}")]
    Unavailable {
        problem: String,
        /// The request may have been carried out, without an answer.
        perhaps_done: bool,
    },
    /// It answered that it will not.
    #[error("{0}")]
    Refused(String),
    /// A watch cannot go on from where it was: all must be read again.
    #[error("{0}")]
    WatchEnded(String),
}

#[derive(Debug)]
pub(crate) enum Backend {
    Local(Local),
    Etcd(Etcd),
}

pub(crate) enum Watch {
    Local(LocalWatch),
    Etcd(Box<EtcdWatch>),
}

impl Backend {
    /// All entries, and the revision at which they were read.
    pub async fn read_all(&self) -> Result<(Revision, Vec<Entry>), BackendError> {
        match self {
            Self::Local(local) => Ok(local.read_all()),
            Self::Etcd(etcd) => etcd.read_all().await,
        }
    }

    pub async fn commit(&self, guards: &[Guard], changes: &[Change]) -> Result<Committed, BackendError> {
        match self {
            Self::Local(local) => local.commit(guards, changes),
            Self::Etcd(etcd) => etcd.commit(guards, changes).await,
        }
    }

    /// A new lease, and for how many seconds it lasts without being kept alive.
    pub async fn grant(&self, ttl_seconds: i64) -> Result<(i64, i64), BackendError> {
        match self {
            Self::Local(local) => Ok((local.grant(), ttl_seconds)),
            Self::Etcd(etcd) => etcd.grant(ttl_seconds).await,
        }
    }

    /// For how many seconds more the lease lasts; `None` when it has ended.
    pub async fn keep_alive(&self, lease: i64, ttl_seconds: i64) -> Result<Option<i64>, BackendError> {
        match self {
            Self::Local(local) => Ok(local.has_lease(lease).then_some(ttl_seconds)),
            Self::Etcd(etcd) => etcd.keep_alive(lease).await,
        }
    }

    /// Ends a lease, and what hangs on it.
    pub async fn revoke(&self, lease: i64) -> Result<(), BackendError> {
        match self {
            Self::Local(local) => local.revoke(lease),
            Self::Etcd(etcd) => etcd.revoke(lease).await,
        }
    }

    /// All changes from this revision on.
    pub async fn watch(&self, from: Revision) -> Result<Watch, BackendError> {
        match self {
            Self::Local(local) => local.watch(from).map(Watch::Local),
            Self::Etcd(etcd) => Ok(Watch::Etcd(Box::new(etcd.watch(from).await?))),
        }
    }

    /// The connection has failed: the next request makes a new one, where there are several to another address.
    pub fn disconnect(&self) {
        if let Self::Etcd(etcd) = self {
            etcd.disconnect();
        }
    }

    /// Whether requests go over a network.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Etcd(_))
    }
}

impl Watch {
    /// The next changes. Safe to drop half-way.
    pub async fn next(&mut self) -> Result<Seen, BackendError> {
        match self {
            Self::Local(watch) => watch.next().await,
            Self::Etcd(watch) => watch.next().await,
        }
    }
}
