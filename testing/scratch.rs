//! Folders of tests. Included by path; it belongs to no crate.
//!
//! A test that is killed removes nothing: whoever asks for a folder next removes what tests of dead processes left. So
//! a folder's name has the process that it goes with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use tempfile::TempDir;

/// Most are in memory: tests wait for a disk thousands of times otherwise.
const MEMORY: &str = "/dev/shm";
const PREFIX: &str = "diorama-test-";

/// A new folder, which goes with what is returned.
pub fn folder() -> TempDir {
    folder_in(Path::new(MEMORY))
}

/// The same on a disk.
#[allow(dead_code, reason = "not every program's tests need one")]
pub fn folder_on_disk() -> TempDir {
    folder_in(&std::env::temp_dir())
}

fn folder_in(root: &Path) -> TempDir {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(sweep);
    TempDir::with_prefix_in(format!("{PREFIX}{}-", std::process::id()), root).unwrap()
}

/// A new file without a name.
#[allow(dead_code, reason = "not every program's tests need one")]
pub fn file() -> File {
    tempfile::tempfile_in(MEMORY).unwrap()
}

/// Removes what tests of dead processes have left.
pub fn sweep() {
    for folder in dead() {
        unmount_in(&folder);
        // Whoever else sweeps now removes the same.
        if let Err(error) = fs::remove_dir_all(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("cannot remove {}: {error}", folder.display());
        }
    }
}

/// The folders that go with processes that are dead.
pub fn dead() -> Vec<PathBuf> {
    let is_dead = |folder: &PathBuf| {
        let name = folder.file_name().and_then(|name| name.to_str());
        let process = name.and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists())
    };
    let entries = [Path::new(MEMORY), &std::env::temp_dir()].map(|root| fs::read_dir(root).unwrap());
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_dead).collect()
}

/// Some tests mount small file systems.
fn unmount_in(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for point in points.filter(|point| point.starts_with(folder)) {
        let _ = Command::new("umount").arg("--lazy").arg(point).status();
    }
}

/// The folder in memory of this name that goes with a process.
#[allow(dead_code, reason = "not every program's tests need one")]
pub fn of_process(process: u32, name: &str) -> PathBuf {
    Path::new(MEMORY).join(format!("{PREFIX}{process}-{name}"))
}
