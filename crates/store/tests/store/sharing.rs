//! Snapshots share what they have in common, and none needs another.

use std::fs;

use diorama_store::*;

use crate::sample::*;

#[test]
fn what_is_there_already_takes_nothing() {
    let sample = Sample::new();
    let a = sample.commit("a", 1);
    let b = sample.commit("b", 1);
    let c = sample.commit("c", 2);
    let bytes = |id| sample.store.load(id).unwrap().manifest.bytes;
    assert_eq!(bytes(&a).logical, bytes(&c).logical);
    // Two machines alike, each with a state of noise; layers of text.
    assert!(bytes(&a).new > 150_000 && bytes(&a).new < 170_000, "{:?}", bytes(&a));
    assert_eq!(bytes(&b).new, 0);
    assert!(bytes(&c).new > 150_000 && bytes(&c).new < 160_000, "{:?}", bytes(&c));
}

#[test]
fn removing_one_leaves_the_others_whole() {
    let sample = Sample::new();
    let a = sample.commit("a", 1);
    let b = sample.commit("b", 2);
    sample.store.remove(&a).unwrap();
    let missing = sample.store.remove(&a);
    assert!(matches!(missing, Err(StoreError::Missing { .. })));
    let collected = sample.store.collect(CollectOptions::default(), &mut none).unwrap();
    assert!(collected.freed_bytes > 140_000 && !collected.deferred, "{collected:?}");
    sample.restores(&sample.store, &b, 2).unwrap();
    sample.restores(&sample.reopened(), &b, 2).unwrap();
    sample.store.remove(&b).unwrap();
    sample.store.collect(CollectOptions::default(), &mut none).unwrap();
    for folder in ["packs", "doomed", "snapshots", "receipts", "names/pair", "incoming"] {
        assert_eq!(sample.names_in(folder), [""; 0], "{folder}");
    }
}

#[test]
fn children_stay_when_their_parent_goes() {
    let sample = Sample::new();
    let parent = sample.commit("parent", 1);
    let writer = sample.store.begin().unwrap();
    let mut manifest = sample.put_all(&writer, "child", 2).unwrap();
    manifest.parent = Some(parent);
    let child = writer.commit(manifest).unwrap();
    sample.store.remove(&parent).unwrap();
    let list = sample.store.list().unwrap();
    assert_eq!(list[0].entry().unwrap().parent, Some(parent));
    assert!(sample.store.verify(&child, &mut none).unwrap().is_sound());
}

/// The remembered root of a layer does not hide that the layer is another one now.
#[test]
fn a_layer_that_changed_is_read_again() {
    let sample = Sample::new();
    let path = layer(sample.folder.path(), "client", 0);
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    let put = || {
        let writer = sample.store.begin().unwrap();
        let record = writer.put_layer("client", "root", 0, LayerFormat::Raw, &path);
        record.unwrap().root
    };
    fs::write(&path, b"one").unwrap();
    fs::File::open(&path).unwrap().set_modified(old).unwrap();
    let one = put();
    assert_eq!(put(), one);
    fs::write(&path, b"two").unwrap();
    let two = put();
    assert_eq!(two, Address::of(b"two"));
    assert_ne!(one, two);
    assert!(sample.store.is_intact(&path, 3, &two).unwrap());
    assert!(!sample.store.is_intact(&path, 3, &one).unwrap());
    assert!(!sample.store.is_intact(&path, 4, &two).unwrap());
}

/// A list of many reads no manifests a second time, and a new process not either.
#[test]
fn lists_are_remembered_and_a_manifest_that_changed_is_read_again() {
    let sample = Sample::new();
    let ids: Vec<SnapshotId> = (0..40).map(|n| sample.commit(&format!("s{n}"), 1)).collect();
    assert_eq!(sample.store.list().unwrap().len(), 40);
    let store = sample.reopened();
    assert_eq!(store.list().unwrap().len(), 40);
    assert!(sample.names_in("cache").contains(&"summaries".to_owned()));
    let key = format!("snapshots/{}.json", ids[3]);
    let mut bytes = sample.backend.read(&key, MIB).unwrap().unwrap();
    bytes[10] ^= 1;
    // Some places tell times by the second; there, only the length shows that it is another.
    bytes.push(b' ');
    sample.backend.replace(&key, &bytes).unwrap();
    for store in [&store, &sample.reopened()] {
        let damaged: Vec<SnapshotId> =
            store.list().unwrap().iter().filter(|s| s.entry().is_none()).map(Summary::id).collect();
        assert_eq!(damaged, [ids[3]]);
    }
    sample.backend.replace("cache/summaries", b"nonsense\n{}\n").unwrap();
    assert_eq!(sample.reopened().list().unwrap().len(), 40);
}
