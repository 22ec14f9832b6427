//! A full file system, for real: a tmpfs of a few MiB.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use diorama_store::*;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::sample::*;
use crate::scratch;

struct Mounted(tempfile::TempDir);

impl Mounted {
    /// `None`, with the reason printed, where mounting is not permitted.
    fn new(options: &str) -> Option<Self> {
        let folder = scratch::folder_on_disk();
        match mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(options)) {
            Ok(()) => Some(Self(folder)),
            Err(Errno::EPERM | Errno::EACCES) => {
                eprintln!("skipped: mounting a tmpfs is not permitted here");
                None
            }
            Err(error) => panic!("cannot mount a tmpfs: {error}"),
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(self.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

fn full_ram(bytes: u64) -> File {
    let file = scratch::file();
    file.write_all_at(&noise(5, bytes as usize), 0).unwrap();
    file
}

#[test]
fn no_space_is_said_and_the_partial_snapshot_removed() {
    let Some(mounted) = Mounted::new("size=4m") else {
        return;
    };
    let store = Store::open(&mounted.path().join("store")).unwrap();
    let free = store.free_bytes().unwrap();
    for bytes in [8 * MIB, 40 * MIB] {
        let writer = store.begin().unwrap();
        // Fails at once when a pack is full, else when the last one is closed.
        let put = writer.put_ram("large", &full_ram(bytes), bytes, &mut none);
        let refused = put.and_then(|_| writer.seal()).unwrap_err();
        assert!(matches!(&refused, StoreError::NoSpace { needed_bytes: Some(_), .. }), "{refused:?}");
        // And nothing that comes later makes it whole.
        writer.put_bytes(Piece::DeviceState, "large", b"fits").unwrap();
        drop(writer);
        assert_eq!(store.free_bytes().unwrap(), free);
    }
    assert_eq!(store.list().unwrap().len(), 0);
}

/// Not even the manifest fits.
#[test]
fn no_space_for_the_manifest_means_no_snapshot() {
    let Some(mounted) = Mounted::new("size=16m") else {
        return;
    };
    let mut sample = Sample::new();
    sample.store = Store::open(&mounted.path().join("store")).unwrap();
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "first", 1).unwrap();
    let filler = File::create(mounted.path().join("filler")).unwrap();
    let mut offset = 0;
    while filler.write_all_at(&[1; 4096], offset).is_ok() {
        offset += 4096;
    }
    let refused = writer.commit(manifest);
    assert!(matches!(refused, Err(StoreError::NoSpace { .. })), "{refused:?}");
    assert_eq!(sample.store.list().unwrap().len(), 0);
    assert_eq!(fs::read_dir(mounted.path().join("store/incoming")).unwrap().count(), 0);
    // And with space again, all works.
    drop(filler);
    fs::remove_file(mounted.path().join("filler")).unwrap();
    let id = sample.commit("first", 1);
    assert!(sample.store.verify(&id, &mut none).unwrap().is_sound());
}

#[test]
fn no_space_for_restored_memory() {
    let Some(mounted) = Mounted::new("size=8k") else {
        return;
    };
    let sample = Sample::new();
    let id = sample.commit("first", 1);
    let stored = sample.store.load(&id).unwrap();
    let path = mounted.path().join("ram");
    let refused = sample.store.copy_ram(&stored, "client", &File::create_new(&path).unwrap(), &mut none);
    assert!(
        matches!(&refused, Err(StoreError::NoSpace { path: named, .. }) if *named == path),
        "{refused:?}"
    );
}
