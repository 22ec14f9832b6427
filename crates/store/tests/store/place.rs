//! Where this program's tests have their stores: in a folder.

use std::path::Path;

use diorama_store::Location;

use crate::sample::{Make, Sample};

/// Each so many operations one is made to fail.
pub const FAULT_STRIDE: usize = 1;
/// How many cases a property test tries.
pub const CASES: u32 = 48;
/// What a writer stages goes when it gives up, and is not left to a collection.
pub const STAGED_GOES: bool = true;

/// From what to what snapshots are moved.
pub const WAYS: [(Make, Make); 3] =
    [(Sample::new, Sample::new), (Sample::new, Sample::encrypted), (Sample::encrypted, Sample::new)];

/// Which operation is the first to fail, of each kind of fault.
pub fn first_fault(_: usize) -> usize {
    0
}

/// A place for a new store.
pub fn new(folder: &Path) -> Location {
    Location::Folder(folder.join("store"))
}

/// As much time has passed as it takes until whatever died is known to be dead: here none.
pub fn let_time_pass(_: &Sample) {}
