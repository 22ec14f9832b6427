//! Every kind of file, damaged in every way: verify names it, reading refuses it, and other snapshots are untouched.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use diorama_store::*;

use crate::sample::*;

type Harm = fn(&Path);
type Change = fn(&mut Manifest);

const WAYS: [(&str, Harm); 6] = [
    ("missing", |path| fs::remove_file(path).unwrap()),
    ("truncated", |path| set_len(path, |bytes| bytes / 2)),
    ("extended", |path| set_len(path, |bytes| bytes + 1)),
    ("flipped", |path| flip(path, 0)),
    ("a link", |path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    }),
    ("a pipe", |path| {
        fs::remove_file(path).unwrap();
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    }),
];

fn set_len(path: &Path, change: impl Fn(u64) -> u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(change(file.metadata().unwrap().len())).unwrap();
}

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

/// Everything that a restore reads.
fn read_all(store: &Store, id: &SnapshotId) -> Result<(), StoreError> {
    let stored = store.load(id)?;
    store.read_frames(&stored)?;
    for machine in &stored.manifest.machines {
        let copy = tempfile::tempfile_in("/dev/shm").unwrap();
        store.copy_ram(&stored, &machine.name, &copy, &mut none)?;
        store.read_state(&stored, &machine.name)?;
        store.disk_files(&stored, &machine.name)?;
        store.blob_file(&stored, machine.kernel.as_ref().unwrap())?;
    }
    Ok(())
}

#[test]
fn every_file_in_every_way() {
    let files = [
        "manifest.json",
        "ram/client",
        "ram/server.blocks",
        "state/client",
        "disks/server/root/0.qcow2",
        "blobs/*",
        "frames",
    ];
    for file in files {
        for (way, damage) in WAYS {
            let sample = Sample::new();
            let damaged = sample.commit("damaged", 1);
            let whole = sample.commit("whole", 2);
            let mut path = sample.file(&damaged, file);
            if file == "blobs/*" {
                let folder = path.parent().unwrap();
                path = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
            }
            damage(&path);
            // What is shared by hard links is damaged in place for both, where it is not replaced.
            let shared = ["disks/server/root/0.qcow2", "blobs/*"].contains(&file)
                && ["truncated", "extended", "flipped"].contains(&way);

            let report = sample.store.verify(&damaged, &mut none).unwrap();
            let named: Vec<_> = report.problems.iter().map(|p| &p.file).collect();
            assert_eq!(named, [&path], "{file} {way}: {report:?}");

            let refused = read_all(&sample.store, &damaged);
            // QEMU reads layers in place: only verify sees a flipped bit there.
            if !(file.starts_with("disks/") && way == "flipped") {
                assert!(
                    matches!(&refused, Err(StoreError::Corrupt { file, .. }) if *file == path),
                    "{file} {way}: {refused:?}"
                );
            }
            let other = sample.store.verify(&whole, &mut none).unwrap();
            assert_eq!(other.is_sound(), !shared, "{file} {way}: {other:?}");
            // A damaged one hides nobody, and can be found by its id and removed.
            assert_eq!(sample.store.list().unwrap().len(), 2, "{file} {way}");
            let found = sample.store.resolve(&damaged.to_string()[..20], None);
            assert_eq!(found.unwrap(), damaged);
            sample.store.remove(&damaged).unwrap();
            assert_eq!(sample.store.list().unwrap().len(), 1, "{file} {way}");
        }
    }
}

#[test]
fn the_first_bad_block_is_named_also_in_a_hole() {
    for (offset, block) in [(2 * MIB + 5, 2 * MIB), (MIB + 4096, MIB), (RAM_BYTES - 1, 3 * MIB)] {
        let sample = Sample::new();
        let id = sample.commit("damaged", 1);
        flip(&sample.file(&id, "ram/server"), offset);
        let report = sample.store.verify(&id, &mut none).unwrap();
        let kind = ProblemKind::Damaged(Damage::Contents { offset: Some(block) });
        assert_eq!(report.problems.len(), 1);
        assert_eq!(report.problems[0].kind, kind);
        let stored = sample.store.load(&id).unwrap();
        let copy = tempfile::tempfile_in("/dev/shm").unwrap();
        let refused = sample.store.copy_ram(&stored, "server", &copy, &mut none);
        assert!(
            matches!(
                &refused,
                Err(StoreError::Corrupt { damage: Damage::Contents { offset: Some(at) }, .. })
                    if *at == block
            ),
            "{refused:?}"
        );
        sample.store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
    }
}

#[test]
fn data_that_became_a_hole_is_noticed() {
    let sample = Sample::new();
    let id = sample.commit("damaged", 1);
    let path = sample.file(&id, "ram/client");
    set_len(&path, |_| 0);
    set_len(&path, |_| RAM_BYTES);
    let report = sample.store.verify(&id, &mut none).unwrap();
    let kind = ProblemKind::Damaged(Damage::Contents { offset: Some(0) });
    assert_eq!(report.problems[0].kind, kind);
}

#[test]
fn a_damaged_blob_is_not_taken_again() {
    let sample = Sample::new();
    let damaged = sample.commit("damaged", 1);
    let blob = sample.names_in("blobs").remove(0);
    flip(&sample.store.root().join("blobs").join(&blob), 0);
    let whole = sample.commit("whole", 2);
    assert!(!sample.store.verify(&damaged, &mut none).unwrap().is_sound());
    assert!(sample.store.verify(&whole, &mut none).unwrap().is_sound());
    assert_eq!(sample.names_in("blobs"), [blob]);
}

#[test]
fn frames_that_do_not_add_up_are_reported() {
    let cases: [(&str, Change); 5] = [
        ("balance", |m| m.networks[0].accounting.sent_before += 1),
        ("unaccounted", |m| m.networks[0].accounting.unaccounted = 1),
        ("count", |m| {
            m.networks[0].accounting.in_flight = 3;
            m.networks[0].accounting.delivered_before = 6;
        }),
        ("policy", |m| m.in_flight_policy = InFlightPolicy::Drop),
        ("overflow", |m| {
            m.networks[0].accounting.delivered_before = u64::MAX;
        }),
    ];
    for (case, change) in cases {
        let sample = Sample::new();
        let writer = sample.store.begin().unwrap();
        let mut manifest = sample.put_all(&writer, "odd", 1).unwrap();
        change(&mut manifest);
        let id = writer.commit(manifest).unwrap();
        let report = sample.store.verify(&id, &mut none).unwrap();
        assert_eq!(report.problems.len(), 1, "{case}: {report:?}");
        assert_eq!(report.accounting[0].holds, case == "policy", "{case}");
    }
}

#[test]
fn a_frame_for_nobody_is_reported() {
    let sample = Sample::new();
    let writer = sample.store.begin().unwrap();
    let mut frames = frames(1);
    frames[1].nic = 1;
    let record = writer.put_frames(&frames).unwrap();
    let other = sample.store.begin().unwrap();
    let mut manifest = sample.put_all(&other, "odd", 1).unwrap();
    manifest.frames = record;
    manifest.machines.clear();
    let id = writer.commit(manifest).unwrap();
    let report = sample.store.verify(&id, &mut none).unwrap();
    assert!(
        matches!(report.problems[0].kind, ProblemKind::FrameWithoutReceiver { frame: 1, nic: 1, .. }),
        "{report:?}"
    );
}

/// A snapshot folder that anybody could have made: its id is right, and it leads outside.
#[test]
fn a_manifest_cannot_lead_outside_its_folder() {
    let sample = Sample::new();
    let id = sample.commit("honest", 1);
    let text = fs::read_to_string(sample.file(&id, "manifest.json")).unwrap();
    let secret = sample.folder.path().join("kernel");
    for (from, to) in [
        ("\"state/client\"", "\"../../../kernel\""),
        ("\"state/client\"", secret.to_str().map(|s| &*format!("{s:?}").leak()).unwrap()),
        ("\"name\": \"client\"", "\"name\": \"../client\""),
        ("\"block_bytes\": 1048576", "\"block_bytes\": 0"),
        ("\"bytes\": 3211264", "\"bytes\": 18446744073709547520"),
        ("diorama-snapshot/0", "diorama-snapshot/9"),
        ("\"cut\"", "\"cute\""),
    ] {
        let forged = text.replacen(from, to, 1);
        assert_ne!(forged, text, "{from}");
        let id = SnapshotId::of_manifest(forged.as_bytes());
        let folder = sample.store.root().join("snapshots").join(id.to_string());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("manifest.json"), &forged).unwrap();
        let refused = sample.store.load(&id);
        assert!(
            matches!(refused, Err(StoreError::Corrupt { .. } | StoreError::UnsupportedSnapshot { .. })),
            "{from} -> {to}: {refused:?}"
        );
    }
    assert_eq!(sample.store.list().unwrap().len(), 8);
    assert_eq!(sample.store.resolve("honest", None).unwrap(), id);
}
