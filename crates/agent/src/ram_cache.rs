//! The cache of snapshots' memory: RAM files that restored machines map.
//!
//! `RUNTIME/ram/ID/MACHINE` holds each machine's RAM as one sparse file; on tmpfs, so that restore and fork copy
//! nothing and a restored machine can be snapshotted live again. Files are written once, in a folder
//! `RUNTIME/ram/new-N`, and renamed when their snapshot is committed. Removing a file does not disturb a machine
//! that maps it.
//!
//! On tmpfs the cache takes what machines and others would have of the computer's memory, and no kernel takes it back. So it is
//! at most half of the memory, leaves an eighth of it available whenever it grows, and shrinks when others leave
//! less than a sixteenth.
//!
//! Invariant: everything here can be had from the store again, except in `new-N` folders, which nobody misses.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diorama_api::ApiError;
use diorama_store::{MachineRecord, SnapshotId, Store, Stored};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::memory::HostMemory;
use crate::operation::Operation;
use crate::problem::io_error;

/// How much of the file system the cache leaves to others: a sixteenth.
const RESERVE_FRACTION: u64 = 16;
/// How much of the computer's memory it takes at most: half.
const MEMORY_FRACTION: u64 = 2;
/// How much of the computer's memory it leaves available: an eighth.
const MEMORY_RESERVE_FRACTION: u64 = 8;
/// With how much available it begins to shrink: a sixteenth.
const SHORTAGE_FRACTION: u64 = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct RamCache {
    folder: PathBuf,
    /// Where files go that do not fit: on disk.
    spill: PathBuf,
    next: AtomicU64,
    /// Held while files are evicted: how many have a snapshot's files in their hands, which stay therefore.
    pins: Arc<Mutex<Pins>>,
}

type Pins = BTreeMap<SnapshotId, usize>;

/// Keeps a snapshot's files from being evicted.
#[derive(Debug)]
struct Pin {
    pins: Arc<Mutex<Pins>>,
    id: SnapshotId,
}

/// A snapshot's RAM files, ready to be mapped.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) folder: PathBuf,
    _pin: Pin,
    /// Files that did not fit the cache: removed once they are mapped and this is dropped.
    _uncached: Option<NewFiles>,
}

/// New RAM files on their way to becoming a snapshot's. Dropping it removes them.
#[derive(Debug)]
pub(crate) struct NewFiles {
    folder: PathBuf,
    in_memory: bool,
}

impl RamCache {
    /// Opens the cache and clears what an agent before left unfinished.
    pub(crate) fn open(runtime: &Path, home: &Path) -> Result<Self, ApiError> {
        let folder = cache_folder(runtime);
        let spill = home.join("spill");
        std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        for entry in std::fs::read_dir(&folder).map_err(|error| io_error(&folder, &error))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("new-") {
                remove_folder(&entry.path());
            }
        }
        remove_folder(&spill);
        Ok(Self { folder, spill, next: AtomicU64::new(1), pins: Arc::default() })
    }

    /// A folder for new RAM files that will need about `bytes`: in memory when they fit, else on disk.
    pub(crate) fn begin(&self, bytes: u64, keep: &[SnapshotId]) -> Result<NewFiles, ApiError> {
        let in_memory = self.make_room(bytes, keep);
        let name = format!("new-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let folder = if in_memory { self.folder.join(name) } else { self.spill.join(name) };
        std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        Ok(NewFiles { folder, in_memory })
    }

    /// Makes finished files those of a committed snapshot.
    pub(crate) fn commit(&self, files: NewFiles, id: &SnapshotId) {
        if !files.in_memory {
            return;
        }
        if let Err(error) = merge_folder(&files.folder, &self.folder.join(id.to_string())) {
            tracing::warn!(%error, "a snapshot's memory is not cached");
        }
    }

    /// Whether a snapshot's memory is here.
    pub(crate) fn holds(&self, id: &SnapshotId) -> bool {
        self.folder.join(id.to_string()).is_dir()
    }

    /// Whether the memory of all of a snapshot's machines is here.
    pub(crate) fn holds_all(&self, stored: &Stored) -> bool {
        let folder = self.folder.join(stored.id.to_string());
        stored.manifest.machines.iter().all(|machine| folder.join(&machine.name).is_file())
    }

    /// The folder with the RAM files of a snapshot's wanted machines, loaded from the store (and checked) when it is not here yet.
    /// When memory does not suffice, the store's own files serve.
    pub(crate) fn load(
        &self,
        store: &Store,
        stored: &Stored,
        wanted: &dyn Fn(&str) -> bool,
        keep: &[SnapshotId],
        operation: &Operation,
    ) -> Result<Loaded, ApiError> {
        let id = &stored.id;
        let pin = self.pin(*id);
        let folder = self.folder.join(id.to_string());
        // Where an environment spans hosts, each has the memory of the machines that it has had.
        let missing: Vec<&MachineRecord> = stored
            .manifest
            .machines
            .iter()
            .filter(|machine| wanted(&machine.name) && !folder.join(&machine.name).is_file())
            .collect();
        if missing.is_empty() {
            return Ok(Loaded { folder, _pin: pin, _uncached: None });
        }
        let used: u64 = missing.iter().map(|machine| machine.ram.used_bytes).sum();
        let files = self.begin(used, keep)?;
        let total = used;
        std::thread::scope(|scope| {
            let loads: Vec<_> = missing
                .iter()
                .map(|machine| {
                    let path = files.folder.join(&machine.name);
                    scope.spawn(move || {
                        let file = File::create_new(&path).map_err(|error| io_error(&path, &error))?;
                        store
                            .copy_ram(stored, &machine.name, &file, &mut |done, _| {
                                operation.bytes("loading memory", done, total);
                            })
                            .map_err(crate::problem::store_error)
                    })
                })
                .collect();
            loads.into_iter().try_for_each(|load| load.join().expect("loading does not panic"))
        })?;
        operation.check()?;
        if files.in_memory {
            self.commit(files, id);
            Ok(Loaded { folder, _pin: pin, _uncached: None })
        } else {
            operation.warn(
                "the memory of this snapshot does not fit the RAM cache: the machines run from disk, and cannot be \
                 snapshotted live until memory is free (`diorama doctor` shows the cache)",
            );
            Ok(Loaded { folder: files.folder.clone(), _pin: pin, _uncached: Some(files) })
        }
    }

    fn pin(&self, id: SnapshotId) -> Pin {
        *self.lock().entry(id).or_default() += 1;
        Pin { pins: Arc::clone(&self.pins), id }
    }

    fn lock(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the memory of snapshots that are not there any more: another host may have removed them.
    pub(crate) fn forget_removed(&self, exists: impl Fn(&SnapshotId) -> bool) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let id: Option<SnapshotId> = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if id.is_some_and(|id| !exists(&id)) {
                remove_folder(&entry.path());
            }
        }
    }

    /// Forgets a snapshot's memory.
    pub(crate) fn remove(&self, id: &SnapshotId) {
        remove_folder(&self.folder.join(id.to_string()));
    }

    /// Evicts the longest unused snapshots until `bytes` fit. False when they cannot fit.
    fn make_room(&self, bytes: u64, keep: &[SnapshotId]) -> bool {
        let pins = self.lock();
        while self.free_bytes().is_none_or(|free| free < bytes) {
            if !self.evict(&pins, keep) {
                return false;
            }
        }
        true
    }

    /// Evicts the longest unused snapshots while the computer is short of memory, or until new machines with that
    /// much of it fit.
    pub(crate) fn yield_memory(&self, machine_bytes: u64, keep: impl FnOnce() -> Vec<SnapshotId>) {
        let is_short = |memory: HostMemory| {
            memory.available < machine_bytes.saturating_add(memory.total / SHORTAGE_FRACTION)
        };
        if !HostMemory::now().is_some_and(is_short) || !is_in_memory(&self.folder) {
            return;
        }
        let keep = keep();
        let pins = self.lock();
        while HostMemory::now().is_some_and(is_short) && self.evict(&pins, &keep) {}
    }

    /// False when there is nothing to evict.
    fn evict(&self, pins: &Pins, keep: &[SnapshotId]) -> bool {
        let Some(oldest) = self.oldest(pins, keep) else { return false };
        tracing::info!(folder = %oldest.display(), "evicting a snapshot's memory from the cache");
        remove_folder(&oldest);
        // What cannot be removed would be found again.
        !oldest.exists()
    }

    /// How many bytes may be added, in all the bounds that there are.
    fn free_bytes(&self) -> Option<u64> {
        Some(Room::of(&self.folder, &self.folder)?.free_bytes)
    }

    fn oldest(&self, pins: &Pins, keep: &[SnapshotId]) -> Option<PathBuf> {
        let keep: Vec<String> = keep.iter().chain(pins.keys()).map(ToString::to_string).collect();
        std::fs::read_dir(&self.folder)
            .ok()?
            .flatten()
            .filter(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                !name.starts_with("new-") && !keep.contains(&name)
            })
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .min()
            .map(|(_, path)| path)
    }
}

/// How much room a cache has, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) used_bytes: u64,
    /// What may be added, in all the bounds that there are.
    pub(crate) free_bytes: u64,
}

impl Room {
    /// That of the cache of an agent with this runtime folder, whether or not there is one; `there` is what exists of its path.
    pub(crate) fn beside(runtime: &Path, there: &Path) -> Option<Self> {
        Self::of(&cache_folder(runtime), there)
    }

    fn of(cache: &Path, there: &Path) -> Option<Self> {
        let (free, used) = (free_bytes(there)?, used_bytes(cache));
        let memory = if is_in_memory(there) { HostMemory::now() } else { None };
        let free = memory.map_or(free, |memory| free.min(allowance(memory, used)));
        Some(Self { used_bytes: used, free_bytes: free })
    }
}

fn cache_folder(runtime: &Path) -> PathBuf {
    runtime.join("ram")
}

/// How much a cache in memory may grow.
fn allowance(memory: HostMemory, used: u64) -> u64 {
    let unreserved = memory.available.saturating_sub(memory.total / MEMORY_RESERVE_FRACTION);
    unreserved.min((memory.total / MEMORY_FRACTION).saturating_sub(used))
}

/// What the files of a cache take, in bytes.
fn used_bytes(folder: &Path) -> u64 {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries(folder).flat_map(|snapshot| entries(&snapshot.path()));
    // As stat(2) counts them, whatever the file system's blocks are.
    files.filter_map(|file| file.metadata().ok()).map(|found| found.blocks() * 512).sum()
}

/// Whether files there are held by memory alone.
pub(crate) fn is_in_memory(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

impl NewFiles {
    /// The folder that the RAM files go to.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = pins.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.id);
            }
        }
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        // Committed files have been renamed and are not here any more.
        remove_folder(&self.folder);
    }
}

/// What may still be written to the file system of `folder`, in bytes, less the reserve.
pub(crate) fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(folder).ok()?;
    let block = stat.fragment_size();
    let reserve = stat.blocks() * block / RESERVE_FRACTION;
    Some((stat.blocks_available() * block).saturating_sub(reserve))
}

/// Moves what is in a folder to another, which may be there already.
fn merge_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    if !to.is_dir() {
        return std::fs::rename(from, to);
    }
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::rename(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn remove_folder(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(folder = %folder.display(), %error, "cannot remove");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_leaves_memory_to_others() {
        let memory =
            |total: u64, available: u64| HostMemory { total: total << 30, available: available << 30 };
        // Of 16 GiB half, as long as 2 are left.
        assert_eq!(allowance(memory(16, 15), 0), 8 << 30);
        assert_eq!(allowance(memory(16, 15), 6 << 30), 2 << 30);
        assert_eq!(allowance(memory(16, 15), 9 << 30), 0);
        assert_eq!(allowance(memory(16, 5), 0), 3 << 30);
        assert_eq!(allowance(memory(16, 1), 0), 0);
    }
}
