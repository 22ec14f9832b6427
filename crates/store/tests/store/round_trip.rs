//! What is written is read back, sparsely, and differs from another only where it differs.

use std::os::unix::fs::MetadataExt;

use diorama_store::*;

use crate::sample::*;

#[test]
fn all_of_it_comes_back() {
    let sample = Sample::new();
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "first", 7).unwrap();
    let id = writer.commit(manifest.clone()).unwrap();
    sample.store.put_receipt(&id, &Receipt { create_ms: 12 }).unwrap();

    let again = Store::open(sample.store.root()).unwrap();
    let stored = again.load(&id).unwrap();
    assert_eq!(stored.manifest, manifest);
    assert_eq!(stored.receipt, Some(Receipt { create_ms: 12 }));
    let bytes = std::fs::read(stored.folder.join("manifest.json")).unwrap();
    assert_eq!(SnapshotId::of_manifest(&bytes), id);

    assert_eq!(again.read_frames(&stored).unwrap(), frames(7));
    for machine in ["client", "server"] {
        assert_eq!(again.read_state(&stored, machine).unwrap(), [7; 5_000]);
        let copy = tempfile::tempfile_in("/dev/shm").unwrap();
        let mut last = (0, 0);
        again.copy_ram(&stored, machine, &copy, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!(last, (RAM_BYTES, RAM_BYTES));
        assert!(contents(&copy) == contents(&ram(7)), "memory differs");
        let disks = again.disk_files(&stored, machine).unwrap();
        let text = std::fs::read_to_string(&disks[0].layers[0].path).unwrap();
        assert_eq!(text, machine.repeat(50_000));
        let kernel = stored.manifest.machine(machine).unwrap().kernel.clone();
        let kernel = again.blob_file(&stored, &kernel.unwrap()).unwrap();
        assert_eq!(std::fs::read(kernel).unwrap(), vec![9; 10_000]);
    }

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
    assert_eq!(record.used_bytes, used);
    assert_eq!(record.bytes, RAM_BYTES);
    let file = stored.folder.join(&record.file).metadata().unwrap();
    assert_eq!(file.len(), RAM_BYTES);
    assert_eq!(file.blocks() * 512, used);
    let copy = tempfile::tempfile_in("/dev/shm").unwrap();
    sample.store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
    assert_eq!(copy.metadata().unwrap().blocks() * 512, used);
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
    assert_eq!(sample.names_in("blobs").len(), 1);
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
