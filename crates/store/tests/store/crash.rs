//! A crash at each step of begin, commit and remove: recovery leaves whole snapshots and nothing else.
//!
//! A crash is a copy of the folder as the step leaves it, without the lock that the process held.

use std::fs;
use std::path::Path;

use diorama_store::*;

use crate::sample::*;

/// What a crash leaves of a snapshot's folder.
type Leave = fn(&Path);

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn at_each_step_of_commit_there_is_nothing_after_recovery() {
    let steps: [(&str, Leave); 6] = [
        ("folder made", |folder| {
            fs::remove_dir_all(folder).unwrap();
            fs::create_dir(folder).unwrap();
        }),
        ("files written", |_| {}),
        ("half a file", |folder| {
            fs::write(folder.join("ram/client"), b"half").unwrap();
        }),
        ("manifest half written", |folder| {
            fs::write(folder.join("manifest.json.tmp"), b"{").unwrap();
        }),
        ("manifest in place", |folder| {
            fs::write(folder.join("manifest.json"), b"{}").unwrap();
        }),
        ("lock file removed", |folder| {
            fs::write(folder.join("manifest.json"), b"{}").unwrap();
            fs::remove_file(folder.join("lock")).unwrap();
        }),
    ];
    for (step, leave) in steps {
        let sample = Sample::new();
        let whole = sample.commit("whole", 1);
        let writer = sample.store.begin().unwrap();
        sample.put_all(&writer, "partial", 2).unwrap();
        let partial = sample.names_in("incoming").remove(0);
        let incoming = sample.store.root().join("incoming");
        let left = incoming.join("left");
        copy_tree(&incoming.join(&partial), &left);
        leave(&left);

        let recovered = sample.store.recover().unwrap();
        assert_eq!(recovered.snapshots, 1, "{step}");
        assert!(recovered.failed.is_empty(), "{step}: {recovered:?}");
        // The writer that lives is left alone, and can still commit.
        assert_eq!(sample.names_in("incoming"), [partial], "{step}");
        assert_eq!(sample.store.list().unwrap().len(), 1, "{step}");
        assert!(sample.store.verify(&whole, &mut none).unwrap().is_sound());
        drop(writer);
        assert_eq!(sample.names_in("incoming"), [""; 0], "{step}");
    }
}

/// The last rename is the commit: before it there is no snapshot, after it there is all of it.
#[test]
fn the_rename_is_the_commit_and_the_removal() {
    let sample = Sample::new();
    let id = sample.commit("whole", 1);
    let folder = sample.file(&id, "");
    let left = sample.store.root().join("incoming/left");
    // A crash right before the rename, or right after the one of a removal.
    fs::rename(&folder, &left).unwrap();
    assert!(matches!(sample.store.load(&id), Err(StoreError::Missing { .. })));
    // Right after: nothing is missing but the receipt.
    fs::rename(&left, &folder).unwrap();
    assert!(sample.store.verify(&id, &mut none).unwrap().is_sound());
    assert_eq!(sample.store.load(&id).unwrap().receipt, None);
    // A removal interrupted half-way through deleting.
    fs::rename(&folder, &left).unwrap();
    fs::remove_dir_all(left.join("ram")).unwrap();
    let recovered = Store::open(sample.store.root()).unwrap().recover().unwrap();
    assert_eq!((recovered.snapshots, recovered.blobs), (0, 0), "open has done it");
    assert_eq!(sample.names_in("incoming"), [""; 0]);
    assert_eq!(sample.names_in("blobs"), [""; 0], "the blob had no other user");
}

#[test]
fn a_writer_dropped_or_aborted_leaves_nothing() {
    let sample = Sample::new();
    let writer = sample.store.begin().unwrap();
    sample.put_all(&writer, "partial", 2).unwrap();
    drop(writer);
    let writer = sample.store.begin().unwrap();
    sample.put_all(&writer, "partial", 2).unwrap();
    writer.abort().unwrap();
    assert_eq!(sample.names_in("incoming"), [""; 0]);
    assert_eq!(sample.store.list().unwrap().len(), 0);
    assert_eq!(sample.store.recover().unwrap().blobs, 1);
}

#[test]
fn a_store_half_made_is_finished_and_a_foreign_folder_refused() {
    let folder = tempfile::tempdir().unwrap();
    let half = folder.path().join("half");
    fs::create_dir_all(half.join("snapshots")).unwrap();
    fs::write(half.join("lock"), b"").unwrap();
    Store::open(&half).unwrap();
    Store::open(&half).unwrap();

    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), b"").unwrap();
    let refused = Store::open(&foreign);
    assert!(matches!(refused, Err(StoreError::NotAStore { .. })), "{refused:?}");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);

    fs::write(half.join("format"), "diorama-store/9\n").unwrap();
    let refused = Store::open(&half);
    assert!(
        matches!(&refused, Err(StoreError::UnsupportedStore { found, .. }) if found == "diorama-store/9"),
        "{refused:?}"
    );
}
