//! The power goes after each change that create, remove and collect make. What a disk has then, without what was only in
//! memory, is looked at by the next start: a check is clean, every committed snapshot restores, and going on works.
//!
//! The disk is a file with an ext4 file system. Nothing of what a program has written is in that file before it was written
//! through, by fsync or by the system in its own time; the latter is put off.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use diorama_store::*;
use nix::mount::{MntFlags, umount2};

use crate::faults::{COLLECT, CREATE, Case, REMOVE, assert_whole};
use crate::faulty::{Faulty, Switchboard};
use crate::sample::*;
use crate::scratch;

const DISK_BYTES: u64 = 32 * MIB;

/// Unmounted when it goes.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    /// An empty one. `None`, with the reason printed, where mounting is not permitted.
    fn new() -> Option<Self> {
        let folder = scratch::folder();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image).status();
        if !made.is_ok_and(|made| made.success()) {
            eprintln!("skipped: no mkfs.ext4");
            return None;
        }
        Self::mounted(folder)
    }

    /// Mounts the file `image` in a folder.
    fn mounted(folder: tempfile::TempDir) -> Option<Self> {
        let (image, root) = (folder.path().join("image"), folder.path().join("root"));
        fs::create_dir(&root).unwrap();
        // Nothing is written by itself within five minutes.
        let options = ["-t", "ext4", "-o", "loop,commit=300,noatime"];
        let output = Command::new("mount").args(options).args([&image, &root]).output().unwrap();
        if !output.status.success() {
            eprintln!("skipped: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(Self { folder })
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn sample(&self) -> Sample {
        Sample::in_place(Location::Folder(self.folder.path().join("root/store")))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount2(&self.folder.path().join("root"), MntFlags::MNT_DETACH).unwrap();
    }
}

/// What `look` finds on the disk when it is started again as it is now.
fn after_power_cut(image: &PathBuf, look: impl FnOnce(&Sample)) {
    let folder = scratch::folder();
    fs::copy(image, folder.path().join("image")).unwrap();
    let disk = Disk::mounted(folder).expect("one could be mounted before");
    look(&disk.sample());
}

fn after_every_change(Case { prepare, work }: Case, done: fn(&Sample)) {
    let Some(disk) = Disk::new() else { return };
    let sample = disk.sample();
    let before = Arc::new(prepare(&sample));
    let board = {
        let (image, before) = (disk.image(), Arc::clone(&before));
        Switchboard::watched(move |change| {
            after_power_cut(&image, |sample| {
                assert_whole(sample, &before, &format!("after change {change}"))
            });
        })
    };
    let store = Store::with_backend(Faulty::new(Arc::clone(&sample.backend), &board)).unwrap();
    work(&sample, &store).unwrap();
    // What has been said to be done is so from then on.
    after_power_cut(&disk.image(), done);
}

#[test]
fn create() {
    after_every_change(CREATE, |sample| {
        let id = sample.store.find_name("pair", "new").unwrap().expect("it was durable");
        sample.restores(&sample.store, &id, 9).unwrap();
    });
}

#[test]
fn remove() {
    after_every_change(REMOVE, |sample| assert_eq!(sample.store.find_name("pair", "old").unwrap(), None));
}

#[test]
fn collect() {
    after_every_change(COLLECT, |sample| assert_eq!(sample.names_in("doomed"), [""; 0]));
}
