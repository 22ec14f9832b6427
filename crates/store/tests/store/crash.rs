//! What dead processes leave.

use std::fs;

use diorama_store::*;

use crate::sample::*;

#[test]
fn what_a_dead_writer_staged_is_removed_and_a_living_one_left_alone() {
    let sample = Sample::new();
    let whole = sample.commit("whole", 1);
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "partial", 2).unwrap();
    let living = sample.names_in("incoming").remove(0);
    let incoming = sample.root().join("incoming");
    // A death is a copy of what the living one has, without the lock that a process holds.
    for (name, with_lock) in [("dead", true), ("stillborn", false)] {
        fs::create_dir(incoming.join(name)).unwrap();
        for entry in fs::read_dir(incoming.join(&living)).unwrap() {
            let entry = entry.unwrap();
            if with_lock || entry.file_name() != "lock" {
                fs::copy(entry.path(), incoming.join(name).join(entry.file_name())).unwrap();
            }
        }
    }
    fs::write(incoming.join(".tmpabc"), b"half a manifest").unwrap();
    let recovered = sample.store.recover().unwrap();
    assert_eq!(recovered.sessions, 3, "{recovered:?}");
    assert!(recovered.failed.is_empty() && recovered.bytes > 300_000, "{recovered:?}");
    assert_eq!(sample.names_in("incoming"), [living]);
    sample.restores(&sample.reopened(), &whole, 1).unwrap();
    let id = writer.commit(manifest).unwrap();
    assert_eq!(sample.names_in("incoming"), [""; 0]);
    sample.restores(&sample.reopened(), &id, 2).unwrap();
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
    for folder in ["incoming", "packs", "snapshots", "names"] {
        assert_eq!(sample.names_in(folder), [""; 0], "{folder}");
    }
    assert_eq!(sample.store.list().unwrap().len(), 0);
}

#[test]
fn a_store_half_made_is_finished_and_a_foreign_folder_refused() {
    let folder = tempfile::tempdir().unwrap();
    let half = folder.path().join("half");
    fs::create_dir_all(half.join("incoming")).unwrap();
    fs::write(half.join("lock"), b"").unwrap();
    Store::open(&half).unwrap();
    Store::open(&half).unwrap();

    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), b"").unwrap();
    let refused = Store::open(&foreign);
    assert!(matches!(refused, Err(StoreError::NotAStore { .. })), "{refused:?}");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);

    for other in ["diorama-store/0", "diorama-store/9"] {
        fs::write(half.join("format"), format!("{other}\n")).unwrap();
        let refused = Store::open(&half);
        assert!(
            matches!(&refused, Err(StoreError::UnsupportedStore { found, .. }) if found == other),
            "{refused:?}"
        );
    }
}
