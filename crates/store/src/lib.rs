//! Snapshots on disk: how they are written, found, proved, read back and removed.
//!
//! A store is one folder:
//!
//! ```text
//! <root>/format                       names the layout; refused when unknown
//! <root>/lock                         flock: begin, the last step of commit, remove, recover
//! <root>/blobs/<blake3>               kernels and initrds, an index of hard links
//! <root>/incoming/<random>/           being written (its `lock` is held), or being removed
//! <root>/snapshots/<id>/manifest.json the manifest; its BLAKE3 hash is the snapshot's id
//!                      /receipt.json  how long it took; not covered by the id
//!                      /ram/<machine>           sparse, flat: zero pages are holes
//!                      /ram/<machine>.blocks    BLAKE3 of each 1 MiB block, 32 bytes each
//!                      /state/<machine>         device state: the rest of the migration stream
//!                      /disks/<machine>/<disk>/<n>.{qcow2,raw}   immutable layers, lowest first
//!                      /blobs/<blake3>          links to the blobs it uses
//!                      /frames                  the frames in flight
//! ```
//!
//! # Life of a snapshot
//!
//! ```text
//! begin ──> incoming/<random>, lock held ──commit──> snapshots/<id> ──remove──> incoming/<random> ──> gone
//!                 │ drop, failure, crash + recover
//!                 └──> gone
//! ```
//!
//! # Order of durability
//!
//! 1. Every file is written and fsynced by the `put_…` call that makes it (so machines persist in parallel).
//! 2. `commit` fsyncs the folders, deepest first.
//! 3. `manifest.json.tmp` is written, fsynced, renamed to `manifest.json`, and the folder fsynced.
//! 4. Under the store's lock: the name is checked, the folder is renamed into `snapshots/`, both parents are
//!    fsynced. A failure here renames it back.
//!
//! # Invariants
//!
//! * A folder in `snapshots/` has been complete and durable: nothing there is ever written again, but `receipt.json`.
//! * A snapshot's folder holds a link of its own to every byte it needs. Removing a snapshot removes only its own
//!   links, so it breaks neither another snapshot nor an environment that linked the layers into its own folder.
//! * The manifest names each file by the one path that its role allows: no manifest can lead outside its folder.
//! * Nothing read back is handed out before its hash has been checked; [`Store::disk_files`]
//!   relies on what this process has hashed before.

mod blobs;
mod blocks;
mod catalog;
mod diff;
mod error;
mod files;
mod frames;
mod id;
mod known;
mod manifest;
mod read;
mod remove;
mod root;
mod verify;
mod write;

pub use blocks::{BLOCK_BYTES, PAGE_BYTES};
pub use catalog::{Entry, Stored, Summary};
pub use diff::{Diff, DiskDiff, FramesDiff, MachineDiff};
pub use error::{Damage, StoreError};
pub use files::{Linked, link_file};
pub use frames::{FramesError, MAX_FRAME_BYTES, MAX_FRAMES, MAX_FRAMES_FILE_BYTES, StoredFrame};
pub use id::{ParseIdError, SnapshotId};
pub use manifest::{
    Accounting, BaseRecord, BlobRecord, Bytes, Capture, CutRecord, DiskRecord, Dropped, FORMAT, FileRecord,
    Hardware, InFlightPolicy, LayerFormat, LayerRecord, LearnedRecord, MachineRecord, MachineState, Manifest,
    ManifestProblem, NameProblem, NetworkRecord, RamRecord, Receipt, check_snapshot_name,
};
pub use read::{DiskFiles, LayerFile};
pub use remove::Removed;
pub use root::{Recovered, Store};
pub use verify::{AccountingCheck, Problem, ProblemKind, VerifyReport};
pub use write::{Piece, Writer};

/// Called with (bytes done, bytes in all) while a long operation runs.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);
