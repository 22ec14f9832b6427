//! The snapshot store as a whole.

use serde::{Deserialize, Serialize};

/// Look whether the store is whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCheckRequest {
    /// Read and hash every byte.
    #[serde(default)]
    pub read_data: bool,
    /// Mend what can be made again from the rest.
    #[serde(default)]
    pub repair: bool,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCheckReport {
    /// Whether nothing is wrong (any more).
    pub ok: bool,
    /// Snapshots that were traced.
    pub snapshots: u64,
    /// Packs that were looked at.
    pub packs: u64,
    /// Chunks that they hold.
    pub chunks: u64,
    /// Bytes whose hash was computed, beyond packs' tables.
    pub checked_bytes: u64,
    /// What is wrong.
    pub problems: Vec<StoreProblem>,
    /// What was wrong and is mended.
    pub repaired: Vec<StoreProblem>,
}

/// One thing wrong with the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreProblem {
    /// The damaged object: a file, where the store is a folder.
    pub object: String,
    /// What is wrong.
    pub problem: String,
}

/// Give back the space of what no snapshot needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreGcRequest {
    /// Only say what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// Packs of which more than this share is not needed are written again without it.
    #[serde(default)]
    pub max_unused_percent: Option<u8>,
}

/// What collecting did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreGcReport {
    /// Nothing was done.
    pub dry_run: bool,
    /// Snapshots that were traced.
    pub snapshots: u64,
    /// About what they need, before anything was done.
    pub needed_bytes: u64,
    /// About what nobody needed, before anything was done.
    pub unused_bytes: u64,
    /// Packs that nobody needs.
    pub packs_to_remove: u64,
    /// Packs to be written again without what nobody needs.
    pub packs_to_repack: u64,
    /// Packs removed.
    pub removed_packs: u64,
    /// Bytes given back; in a dry run, about what would be.
    pub freed_bytes: u64,
    /// Somebody is writing: packs are marked, and removed by the next run.
    pub deferred: bool,
}

/// What the store holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStats {
    /// Snapshots.
    pub snapshots: u64,
    /// Snapshots whose manifest cannot be read.
    pub damaged_snapshots: u64,
    /// All machines' memory and disks in all snapshots.
    pub logical_bytes: u64,
    /// What they take in the store.
    pub stored_bytes: u64,
    /// Of that, trees of hashes.
    pub tree_bytes: u64,
    /// About what no snapshot needs; null when damage keeps it from being known.
    pub unused_bytes: Option<u64>,
    /// Packs.
    pub packs: u64,
    /// Different pages, clusters and nodes.
    pub chunks: u64,
    /// What the index takes in the agent's memory.
    pub index_bytes: u64,
}

/// Remove the snapshots that no rule keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneRequest {
    /// Only those of this environment; else each environment's by itself.
    #[serde(default)]
    pub environment: Option<String>,
    /// Only say what would be removed.
    #[serde(default)]
    pub dry_run: bool,
    /// Keep this many of the latest.
    #[serde(default)]
    pub keep_last: u32,
    /// Keep the latest of this many hours that have one.
    #[serde(default)]
    pub keep_hourly: u32,
    /// The same of days.
    #[serde(default)]
    pub keep_daily: u32,
    /// The same of weeks.
    #[serde(default)]
    pub keep_weekly: u32,
    /// The same of months.
    #[serde(default)]
    pub keep_monthly: u32,
    /// The same of years.
    #[serde(default)]
    pub keep_yearly: u32,
    /// Keep all that are at most this much older than the latest, in seconds.
    #[serde(default)]
    pub keep_within_s: u64,
}

/// What pruning did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneReport {
    /// Nothing was done.
    pub dry_run: bool,
    /// Snapshots that stay.
    pub kept: Vec<PrunedSnapshot>,
    /// Snapshots that went, or would go.
    pub removed: Vec<PrunedSnapshot>,
    /// Bytes given back.
    pub freed_bytes: u64,
}

/// A snapshot that a policy was applied to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrunedSnapshot {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its environment.
    pub environment: String,
    /// When it was taken (RFC 3339, UTC).
    pub created: String,
    /// The rules that keep it: `last`, `hourly`, …; empty for one that goes.
    pub kept_by: Vec<String>,
}

/// `diorama store init`: a store that has been made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreInitReport {
    /// Where it is.
    pub store: String,
    /// Whether everything in it is encrypted.
    pub encrypted: bool,
    /// What opens it.
    pub key: Option<StoreKey>,
}

/// One way into an encrypted store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreKey {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: StoreKeyKind,
    /// What whoever added it called it; may be empty.
    pub label: String,
    /// When (RFC 3339, UTC).
    pub created: String,
}

/// What opens a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKeyKind {
    /// Something that somebody remembers.
    Passphrase,
    /// A file of random bytes.
    KeyFile,
}

/// `diorama store key list`: who can open the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreKeyList {
    /// Oldest first.
    pub keys: Vec<StoreKey>,
    /// What is wrong with those that are damaged.
    pub damaged: Vec<String>,
}

/// `diorama store key add`: a key that has been added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreKeyAdded {
    /// The key.
    pub added: StoreKey,
}

/// `diorama store key rm`: a key that has been removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreKeyRemoved {
    /// Its id.
    pub removed: String,
}

/// `diorama store key new`: a key file that has been made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKeyFileReport {
    /// Where it is.
    pub file: String,
}

/// `diorama store signer`: a pair of keys that has been made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewSignerReport {
    /// Where the private key is.
    pub file: String,
    /// Where the public key is.
    pub public_file: String,
    /// The public key, in hexadecimal digits.
    pub key: String,
}
