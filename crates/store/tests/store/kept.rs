//! One small store of each format that was ever released or merged is kept beside this file, and still restores.
//!
//! To add one: run the ignored test with the program of that format, and name the folder after it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diorama_store::*;

use crate::sample::*;
use crate::scratch;

/// What is kept; the encrypted ones open with this sample's key.
const KEPT: [&str; 2] = ["format-1", "format-1-encrypted"];

fn kept(format: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/store/kept").join(format)
}

fn copy(from: &Path, to: &Path) {
    if from.is_file() {
        fs::copy(from, to).unwrap();
        return;
    }
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
        copy(&file.path(), &to.join(file.file_name()));
    }
}

/// Pages of text, zeros between them, and two that are alike.
fn memory() -> fs::File {
    let file = scratch::file();
    file.set_len(40 * 4096).unwrap();
    for page in [0_u64, 3, 17, 18, 33, 39] {
        let text = format!("page {} of a small machine\n", page % 33).repeat(200);
        file.write_all_at(&text.as_bytes()[..4096], page * 4096).unwrap();
    }
    file
}

#[test]
fn each_format_restores() {
    for format in KEPT {
        // A copy: opening a store may tidy it up.
        let folder = scratch::folder();
        copy(&kept(format), folder.path());
        let secret = format.ends_with("encrypted").then(|| key(1));
        let store = Store::open_with(folder.path(), &OpenOptions { secret, signer: None }).unwrap();
        let report = store.check(ALL, &mut none).unwrap();
        assert!(report.is_sound() && report.snapshots == 1, "format {format}: {report:?}");
        let id = store.find_name("pair", "kept").unwrap().unwrap();
        let stored = store.load(&id).unwrap();
        let copy = scratch::file();
        store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
        assert!(contents(&copy) == contents(&memory()), "format {format}: memory differs");
        assert_eq!(store.read_state(&stored, "client").unwrap(), b"device state");
        assert_eq!(store.read_frames(&stored).unwrap(), frames(1));
        store.copy_layer(&stored.manifest.machines[0].disks[0].layers[0], &copy, &mut none).unwrap();
        assert_eq!(contents(&copy), "client".repeat(50_000).as_bytes());
        assert!(store.verify(&id, &mut none).unwrap().is_sound());
    }
}

/// Exported files of each version, by whom they are signed.
const EXPORTS: [(&str, Option<&str>); 2] = [
    ("export-1.diorama", None),
    ("export-2.diorama", Some("12b046f587f3dd5997346845845fc7c17cf08e0aca6f639e5810f08dd68da5ee")),
];

#[test]
fn each_exported_file_is_imported() {
    for (file, signer) in EXPORTS {
        let sample = Sample::new();
        let bytes = fs::read(kept(file)).unwrap();
        let arrived = sample.store.import(&mut &*bytes, None, &mut none).unwrap();
        assert_eq!((arrived.name.as_str(), arrived.was_there), ("kept", false), "{file}");
        assert!(sample.store.verify(&arrived.id, &mut none).unwrap().is_sound(), "{file}");
        let stored = sample.store.load(&arrived.id).unwrap();
        let copy = scratch::file();
        sample.store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
        assert!(contents(&copy) == contents(&memory()), "{file}: memory differs");
        let found = match sample.store.signature(&arrived.id).unwrap() {
            Signature::By(key) => Some(key.to_string()),
            Signature::None => None,
            wrong => panic!("{file}: {wrong:?}"),
        };
        assert_eq!(found.as_deref(), signer, "{file}");
    }
}

#[test]
#[ignore = "writes the store of the present format into the source tree"]
fn write() {
    KEPT.iter().zip(BOTH).for_each(|(format, make)| write_one(format, make()));
    let (file, _) = EXPORTS[EXPORTS.len() - 1];
    if !kept(file).exists() {
        let (sample, _) = Sample::new().signed();
        let id = sample.commit_memory(&sample.store, "kept", &memory(), b"device state");
        sample.store.export(&id, &mut fs::File::create(kept(file)).unwrap(), &mut none).unwrap();
    }
}

fn write_one(format: &str, sample: Sample) {
    if kept(format).exists() {
        return;
    }
    let template = {
        let writer = sample.store.begin().unwrap();
        sample.put_all(&writer, "kept", 1).unwrap()
    };
    let writer = sample.store.begin().unwrap();
    let mut manifest = template;
    manifest.machines.truncate(1);
    let machine = &mut manifest.machines[0];
    machine.kernel = None;
    machine.ram = writer.put_ram("client", &memory(), 40 * 4096, &mut none).unwrap();
    machine.device_state = writer.put_bytes(Piece::DeviceState, "client", b"device state").unwrap();
    let path = layer(sample.folder.path(), "client", 0);
    machine.disks[0].layers[0] = writer.put_layer("client", "root", 0, LayerFormat::Qcow2, &path).unwrap();
    manifest.frames = writer.put_frames(&frames(1)).unwrap();
    manifest.bytes = writer.seal().unwrap();
    writer.commit(manifest).unwrap();
    let status =
        std::process::Command::new("cp").arg("-r").arg(sample.root()).arg(kept(format)).status().unwrap();
    assert!(status.success());
    for left in ["lock", "incoming"] {
        let path = kept(format).join(left);
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
    }
}
