//! What is written is read back, sparsely, and differs from another only where it differs.

use std::os::unix::fs::MetadataExt;

use diorama_store::*;

use crate::sample::*;
use crate::scratch;

#[test]
fn all_of_it_comes_back() {
    let sample = Sample::new();
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "first", 7).unwrap();
    let id = writer.commit(manifest.clone()).unwrap();
    sample.store.put_receipt(&id, &Receipt { create_ms: 12 }).unwrap();

    let again = sample.reopened();
    let stored = again.load(&id).unwrap();
    assert_eq!(stored.manifest, manifest);
    assert_eq!(stored.receipt, Some(Receipt { create_ms: 12 }));
    let bytes = sample.backend.read(&format!("snapshots/{id}.json"), MIB).unwrap().unwrap();
    assert_eq!(SnapshotId::of_manifest(&bytes), id);
    sample.restores(&again, &id, 7).unwrap();
    sample.restores(&sample.store, &id, 7).unwrap();

    let mut last = (0, 0);
    let copy = scratch::file();
    again.copy_ram(&stored, "client", &copy, &mut |done, total| last = (done, total)).unwrap();
    assert_eq!(last, (RAM_BYTES, RAM_BYTES));
    let mut last = (0, 1);
    let report = again
        .verify(&id, &mut |done, total| {
            assert!(done >= last.0, "progress went back");
            last = (done, total);
        })
        .unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(last.0, last.1);
    assert_eq!(report.checked_bytes, stored.manifest.bytes.logical);
    assert_eq!(report.checked_parts, 1 + 3 * 2 + 1 + 1);
    assert!(report.accounting[0].holds);
    assert_eq!(report.accounting[0].stored_frames, 2);
}

#[test]
fn memory_is_stored_and_restored_sparsely() {
    let sample = Sample::new();
    let id = sample.commit("first", 7);
    let stored = sample.store.load(&id).unwrap();
    let record = &stored.manifest.machines[0].ram;
    let used: u64 = USED.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!((record.used_bytes, record.bytes), (used, RAM_BYTES));
    let copy = scratch::file();
    sample.store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
    assert_eq!(copy.metadata().unwrap().blocks() * 512, used);
}

/// Several windows of groups, several packs, several threads; and not a multiple of anything.
#[test]
fn a_large_memory_comes_back() {
    use std::os::unix::fs::FileExt;
    let sample = Sample::new();
    let bytes = 40 * MIB + 12 * 4096;
    let file = scratch::file();
    file.set_len(bytes).unwrap();
    let unique = noise(1, 36 << 20);
    file.write_all_at(&unique, 4096).unwrap();
    // The same pages once more, in another order and elsewhere.
    for page in 0..200_u64 {
        let from = (page * 37 % 9000) as usize * 4096;
        file.write_all_at(&unique[from..from + 4096], 37 * MIB + page * 8192).unwrap();
    }
    let writer = sample.store.begin().unwrap();
    let mut manifest = sample.put_all(&writer, "large", 1).unwrap();
    let other = sample.store.begin().unwrap();
    drop(writer);
    manifest.machines.truncate(1);
    manifest.machines[0].ram = other.put_ram("client", &file, bytes, &mut none).unwrap();
    let put = |writer: &Writer| -> Result<(), StoreError> {
        let machine = &manifest.machines[0];
        assert_eq!(writer.put_bytes(Piece::DeviceState, "client", &state(1))?, machine.device_state);
        let path = layer(sample.folder.path(), "client", 0);
        writer.put_layer("client", "root", 0, LayerFormat::Qcow2, &path)?;
        writer.put_blob(&sample.folder.path().join("kernel"))?;
        writer.put_frames(&frames(1)).map(drop)
    };
    put(&other).unwrap();
    manifest.bytes = other.seal().unwrap();
    assert!(manifest.bytes.new > 36 << 20 && manifest.bytes.new < 38 << 20, "{:?}", manifest.bytes);
    let id = other.commit(manifest).unwrap();
    let store = sample.reopened();
    let copy = scratch::file();
    store.copy_ram(&store.load(&id).unwrap(), "client", &copy, &mut none).unwrap();
    assert!(contents(&copy) == contents(&file), "memory differs");
    assert!(store.check(ALL, &mut none).unwrap().is_sound());
}

#[test]
fn differences_are_counted_in_pages_bytes_and_frames() {
    let sample = Sample::new();
    let a = sample.commit("a", 7);
    let b = sample.commit("b", 8);
    let same = sample.store.diff(&a, &a).unwrap();
    let differ = sample.store.diff(&a, &b).unwrap();
    let both = |diff: &Diff| match &diff.machines[..] {
        [MachineDiff::Both { pages_differing, state_differs, disks, .. }, MachineDiff::Both { .. }] => {
            (*pages_differing, *state_differs, disks[0].clone())
        }
        other => panic!("{other:?}"),
    };
    let disk = DiskDiff { name: "root".into(), shared_bytes: 300_000, only_a_bytes: 0, only_b_bytes: 0 };
    assert_eq!(both(&same), (0, false, disk.clone()));
    assert_eq!(both(&differ), (4, true, disk));
    assert_eq!((same.frames.shared, same.frames.only_a), (2, 0));
    let frames = FramesDiff { shared: 0, only_a: 2, only_b: 2 };
    assert_eq!(differ.frames, frames);
}

#[test]
fn two_writers_at_once_do_not_meet() {
    let sample = Sample::new();
    let ids = std::thread::scope(|scope| {
        let sample = &sample;
        let writers = [("a", 1), ("b", 2)].map(|(name, seed)| scope.spawn(move || sample.commit(name, seed)));
        writers.map(|writer| writer.join().unwrap())
    });
    for id in ids {
        let report = sample.store.verify(&id, &mut none).unwrap();
        assert!(report.is_sound(), "{report:?}");
    }
    assert_eq!(sample.names_in("incoming"), [""; 0]);
}

#[test]
fn a_memory_of_another_size_is_refused() {
    let sample = Sample::new();
    let writer = sample.store.begin().unwrap();
    let result = writer.put_ram("client", &ram(1), RAM_BYTES + 4096, &mut none);
    assert!(
        matches!(result, Err(StoreError::RamLength { actual_bytes, .. }) if actual_bytes == RAM_BYTES),
        "{result:?}"
    );
    // Refused, and then free to be written.
    writer.put_ram("client", &ram(1), RAM_BYTES, &mut none).unwrap();
    let twice = writer.put_ram("client", &ram(1), RAM_BYTES, &mut none);
    assert!(matches!(twice, Err(StoreError::WrittenTwice { .. })));
}
