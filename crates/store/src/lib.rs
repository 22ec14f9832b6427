//! Snapshots in a store: how they are written, found, proved, read back, removed, and what they share.
//!
//! docs/store-format.md describes every byte. In short, a store is objects under keys, in a folder or in a bucket of a
//! server that speaks S3 ([`backend`]):
//!
//! ```text
//! format                       names the layout; refused when unknown
//! keys/<slot>                  of an encrypted store: who can open it
//! packs/<hash of its table>    many chunks: pages, clusters, nodes of trees
//! snapshots/<id>.json          a manifest; its BLAKE3 hash is the snapshot's id
//! names/<environment>/<name>   which snapshot has this name
//! aliases/<id>                 the name of one that came from elsewhere, where it is not its manifest's
//! signatures/<id>              who vouches for it, if anybody does
//! receipts/<id>.json           how long it took; not covered by the id
//! doomed/<pack>                a mark: this pack is about to go
//! cache/summaries              what lists say; can be made again
//! ```
//!
//! Contents (a machine's memory, its device state, a disk's layer, a kernel, the frames in flight) are cut into leaves;
//! a leaf is stored once, whoever has it, and zeros not at all. Above the leaves stands a tree of hashes ([`tree`]),
//! whose root the manifest names: the manifest's hash covers every byte.
//!
//! # Who does what
//!
//! | module | does |
//! | --- | --- |
//! | `tree`, `pack`, `index`, `frames`, `manifest`, `archive`, `retention` | pure: shapes, bytes, rules |
//! | `backend` | objects by key, durable and whole; `sealed`: the same, encrypted |
//! | `seal`, `keys` | encryption: what a sealed object is, and who can open it |
//! | `write`, `ingest` | a snapshot in the making |
//! | `fetch`, `read`, `part_reader` | from addresses back to contents |
//! | `catalog`, `remove`, `diff`, `verify`, `signature` | one snapshot, or two |
//! | `transfer`, `export` | a snapshot from store to store, or by way of a file |
//! | `collect`, `check`, `stats` | the store as a whole |
//!
//! # Invariants
//!
//! * A snapshot is there when its manifest is, and not before; everything that it needs is durable by then.
//! * An encrypted store is so from its first object on: what is below its backend is sealed but `format` and `keys/`
//!   (and in a bucket `sessions/` and `cache/clock`, which hold nothing of snapshots).
//! * No object is changed in place, and no key of a pack is ever used twice.
//! * What is in the store is hostile until its hash has been checked, and its claims until they are in bounds:
//!   nothing is handed out or allocated before.

mod address;
mod archive;
pub mod backend;
mod blocks;
mod catalog;
mod check;
mod collect;
mod concurrent;
mod diff;
mod error;
mod export;
mod fetch;
mod files;
mod foreign;
mod frames;
mod id;
mod index;
mod ingest;
mod keys;
mod known;
mod lazy;
mod location;
mod manifest;
mod pack;
mod part_reader;
mod read;
mod remove;
mod retention;
mod root;
mod seal;
mod signature;
mod stats;
mod transfer;
mod tree;
mod verify;
mod write;

pub use address::{Address, ParseAddressError};
pub use archive::ArchiveProblem;
pub use catalog::{Entry, Stored, Summary};
pub use check::{CheckOptions, CheckProblem, CheckProblemKind, CheckReport};
pub use collect::{CollectOptions, CollectPlan, Collected};
pub use diff::{Diff, DiskDiff, FramesDiff, MachineDiff};
pub use error::{Damage, RemoteProblem, StoreError};
pub use export::Exported;
pub use files::{Linked, link_file};
pub use frames::{FramesError, MAX_FRAME_BYTES, MAX_FRAMES, MAX_FRAMES_FILE_BYTES, StoredFrame};
pub use id::{ParseIdError, SnapshotId};
pub use keys::{KeySlot, Keyring, PassphraseCost, Secret, SecretError};
pub use lazy::{LazyMemory, LostPage, PageSink};
pub use location::{AsLocation, Location};
pub use manifest::{
    Accounting, BaseRecord, Bytes, Capture, CutRecord, DiskRecord, Dropped, FORMAT, FileRecord, Hardware,
    InFlightPolicy, LayerFormat, LayerRecord, LearnedRecord, MachineRecord, MachineState, Manifest,
    ManifestProblem, NameProblem, NetworkRecord, Part, RamRecord, Receipt, check_snapshot_name,
};
pub use pack::{PackError, PackId};
pub use part_reader::{PartReader, Sink};
pub use retention::{Policy, Verdict};
pub use root::{OpenOptions, Store};
pub use seal::random_key;
pub use signature::{KeyFileError, PublicKey, Signature, SigningKey};
pub use stats::Stats;
pub use transfer::Arrived;
pub use tree::{CLUSTER_BYTES, PAGE_BYTES, Shape};
pub use verify::{AccountingCheck, Problem, ProblemKind, VerifyReport};
pub use write::{Piece, Writer};

/// Called with (done, in all), in bytes where nothing else is said, while a long operation runs.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);
