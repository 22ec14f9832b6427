//! Splitting QEMU's migration stream into a flat RAM file and a residual stream.
//!
//! ```text
//! stream    = header configuration { live section | command } device state
//! live      = START/PART/END "ram": { block list | page | zero page } end-of-section footer
//! device state = FULL sections, end mark, description      (opaque here)
//! ```
//!
//! Pages of the machine's main memory block go to a [`Sink`] by guest offset; every other byte, in order, makes up the
//! residual. The residual is itself a valid migration stream for a QEMU that already has the pages, because a page
//! with the continue flag always follows, without a page of another block between, one that names its block:
//! removing all pages of one block leaves no dangling continuation.
//!
//! A page may come more than once (pre-copy rounds); the last version wins.

pub mod postcopy;
mod ram_file;
mod splitter;

pub use ram_file::RamFile;
pub use splitter::{PAGE_SIZE_BYTES, Sink, Splitter, StreamError, Summary};

/// What QEMU calls the thread of a live capture (`bg_migration_thread`).
pub const CAPTURE_THREAD: &str = "bg_snapshot";
