//! Where a store's objects are: a folder, or a bucket of a server that speaks S3.
//!
//! An object is a few bytes to some MiB under a key: `FOLDER/NAME`, or `FOLDER/FOLDER/NAME`. What a backend promises:
//!
//! * An object is there whole or not at all, whatever fails or dies when; it is never changed in place.
//! * What [`Backend::create`], [`Backend::replace`] and [`Session::publish`] return from is durable, and the next
//!   [`Backend::list`] or read by anybody sees it.
//! * Of several that [`Backend::create`] an object at the same time, one does.
//! * Once [`Session::confirm`] has returned, whatever was there when the session began, and whatever it has published,
//!   stays until the session ends: [`Backend::sessions`] counts it until then.
//! * Keys that the store passes are made of letters, digits, `.`, `_`, `-` and `/`: it checks whatever it makes keys of.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::SystemTime;

use crate::error::StoreError;

pub mod folder;
pub mod s3;
pub(crate) mod sealed;

/// An object in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its key without the folder.
    pub name: String,
    /// How long it is.
    pub bytes: u64,
    /// When it was written.
    pub modified: SystemTime,
}

/// What an abandoned session left that was removed.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Sessions whose process had died.
    pub sessions: usize,
    /// What they had staged, in bytes.
    pub bytes: u64,
    /// What could not be removed, and why. Tried again next time.
    pub failed: Vec<StoreError>,
}

/// Objects by key. Usable from several threads; several processes may use the same objects.
pub trait Backend: Debug + Send + Sync {
    /// What to call an object in messages.
    fn locate(&self, key: &str) -> PathBuf;

    /// All of an object; `None` when it is not there. One that is longer than `limit_bytes` is damaged.
    fn read(&self, key: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// Fills `buffer` from `offset` on. That the object is not there, or too short, is damage.
    fn read_range(&self, key: &str, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError>;

    /// The objects directly in a folder, in no order. A folder that is not there is empty.
    fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError>;

    /// How long an object is; `None` when it is not there.
    fn length(&self, key: &str) -> Result<Option<u64>, StoreError>;

    /// Writes an object that must not be there yet. `false`: it is there, and was left as it is.
    fn create(&self, key: &str, bytes: &[u8]) -> Result<bool, StoreError>;

    /// Writes an object in place of what may be there.
    fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError>;

    /// Removes an object, unless `only` is given and is not what it holds. `false`: it was not there, or is kept.
    fn remove(&self, key: &str, only: Option<&[u8]>) -> Result<bool, StoreError>;

    /// Begins writing. While the session lives, [`Backend::sessions`] counts it, in every process.
    fn begin(&self) -> Result<Box<dyn Session>, StoreError>;

    /// How many sessions there are whose processes live.
    fn sessions(&self) -> Result<usize, StoreError>;

    /// Removes what sessions of processes that died have left.
    fn recover(&self) -> Result<Recovered, StoreError>;

    /// How much may still be written, where that is known.
    fn free_bytes(&self) -> Result<Option<u64>, StoreError>;

    /// How to read well.
    fn reading(&self) -> Reading {
        Reading::default()
    }
}

/// How a backend is read well: where each request takes time of its own, in few large ones, many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// How many reads at once are faster than one after another; beyond what the processors need anyway.
    pub at_once: usize,
    /// What is adjacent is read together up to about this length, in bytes.
    pub run_bytes: u64,
    /// What is not wanted is read as well when it is shorter than this and saves a request, in bytes.
    pub gap_bytes: u64,
    /// How many bytes of nodes are read when one is needed: its neighbours mostly are, too.
    pub node_bytes: u64,
}

impl Default for Reading {
    /// For what has the latency of a local disk.
    fn default() -> Self {
        Self { at_once: 1, run_bytes: 1 << 20, gap_bytes: 0, node_bytes: 0 }
    }
}

/// One writer. Dropping it removes what it staged and has not published.
pub trait Session: Debug + Send + Sync {
    /// Writes an object aside: nobody sees it yet, and it need not be durable. The caller says the key only once.
    fn stage(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError>;

    /// Makes staged objects durable, and then visible, all before it returns; in which order is open. Some backends
    /// show them earlier.
    fn publish(&self, keys: &[String]) -> Result<(), StoreError>;

    /// Looks whether the session still counts, without asking anybody. Where it does not, nothing may be relied on any
    /// more that it relied on.
    fn check(&self) -> Result<(), StoreError>;

    /// The same for certain and for good, before something is made visible that needs what the session relies on. To
    /// be called once; whoever then does not learn what became of that drops the session and does not end it.
    fn confirm(&self) -> Result<(), StoreError>;

    /// Removes what is left, and says whether that worked; dropping does the same and logs.
    fn end(self: Box<Self>) -> Result<(), StoreError>;
}
