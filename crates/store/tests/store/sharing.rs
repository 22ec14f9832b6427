//! Snapshots share layers and blobs with one another and with environments, and none needs another.

use std::fs;

use diorama_store::*;

use crate::sample::*;

#[test]
fn removing_one_leaves_the_others_whole() {
    let sample = Sample::new();
    let a = sample.commit("a", 1);
    let b = sample.commit("b", 2);
    let stored = sample.store.load(&a).unwrap();
    let shared = stored.manifest.bytes.logical - sample.store.load(&b).unwrap().manifest.bytes.logical;
    assert_eq!(shared, 0);
    assert!(sample.store.load(&b).unwrap().manifest.bytes.new + 600_000 <= stored.manifest.bytes.new);

    // An environment restored from `a`.
    let own = sample.folder.path().join("own.qcow2");
    let layer = &sample.store.disk_files(&stored, "client").unwrap()[0].layers[0];
    assert_eq!(link_file(&layer.path, &own).unwrap(), Linked::Hard);

    let removed = sample.store.remove(&a).unwrap();
    let ram: u64 = stored.manifest.machines.iter().map(|m| m.ram.used_bytes).sum();
    assert!(removed.bytes >= ram && removed.bytes < ram + 200_000, "{removed:?}");
    assert!(sample.store.verify(&b, &mut none).unwrap().is_sound());
    assert_eq!(fs::read_to_string(&own).unwrap(), "client".repeat(50_000));
    let missing = sample.store.remove(&a);
    assert!(matches!(missing, Err(StoreError::Missing { .. })));

    assert_eq!(sample.names_in("blobs").len(), 1);
    sample.store.remove(&b).unwrap();
    assert_eq!(sample.names_in("blobs"), [""; 0]);
    assert_eq!(sample.names_in("incoming"), [""; 0]);
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

/// The remembered hash of a layer does not hide that the layer is another one now.
#[test]
fn a_layer_that_changed_is_read_again() {
    let sample = Sample::new();
    let path = layer(sample.folder.path(), "client", 0);
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    let put = || {
        let writer = sample.store.begin().unwrap();
        let record = writer.link_file("client", "root", 0, LayerFormat::Raw, &path);
        record.unwrap().blake3
    };
    fs::write(&path, b"one").unwrap();
    fs::File::open(&path).unwrap().set_modified(old).unwrap();
    let one = put();
    assert_eq!(put(), one);
    fs::write(&path, b"two").unwrap();
    let two = put();
    assert_eq!(two, blake3::hash(b"two").to_hex().to_string());
    assert_ne!(one, two);
}
