//! What stands in a store or an exported file, mangled: refused, or what it was; never a panic, and never accepted as
//! something else. `make fuzz` runs these for long.

use std::fs;

use diorama_store::*;
use proptest::prelude::*;

use crate::mangle::{config, mangled, mangles};
use crate::sample::*;

/// A manifest that anybody could have made, with the right id. What is accepted has been checked to be in bounds.
#[test]
fn mangled_manifests() {
    let sample = Sample::new();
    let id = sample.commit("whole", 1);
    let whole = fs::read(sample.manifest_file(&id)).unwrap();
    proptest!(config(64), |(how in mangles())| {
        let bytes = mangled(&whole, &how);
        let forged = SnapshotId::of_manifest(&bytes);
        fs::write(sample.manifest_file(&forged), &bytes).unwrap();
        if let Ok(stored) = sample.store.load(&forged) {
            // It names what is there or what is not; it is read as far as it goes.
            let _ = sample.store.verify(&forged, &mut none);
            let _ = sample.store.read_frames(&stored);
            for machine in &stored.manifest.machines {
                let _ = sample.store.read_state(&stored, &machine.name);
            }
        }
        sample.store.list().unwrap();
        if forged != id {
            fs::remove_file(sample.manifest_file(&forged)).unwrap();
        }
        fs::write(sample.manifest_file(&id), &whole).unwrap();
    });
    sample.restores(&sample.store, &id, 1).unwrap();
}

/// Any object of a store, plain or encrypted, that is not what it was.
#[test]
fn mangled_objects() {
    for make in [Sample::new as fn() -> Sample, Sample::signing] {
        let sample = make();
        let id = sample.commit("whole", 1);
        let mut objects = Vec::new();
        for folder in ["packs", "snapshots", "signatures", "keys"] {
            objects.extend(sample.names_in(folder).iter().map(|name| sample.root().join(folder).join(name)));
        }
        // (A plain one means the same with other letters; sealed, each byte counts.)
        if sample.options.secret.is_some() {
            objects.push(sample.name_file("whole", &id));
        }
        proptest!(config(64), |(which in any::<prop::sample::Index>(), how in mangles())| {
            let file = &objects[which.index(objects.len())];
            let whole = fs::read(file).unwrap();
            let bytes = mangled(&whole, &how);
            fs::write(file, &bytes).unwrap();
            if let Ok(store) = Store::open_with(&sample.root(), &sample.options) {
                let report = store.check(ALL, &mut none).unwrap();
                prop_assert!(!report.is_sound() || bytes == whole, "{}", file.display());
                // What restores is right: `restores` compares.
                let _ = sample.restores(&store, &id, 1);
                let _ = store.signature(&id);
            }
            fs::write(file, &whole).unwrap();
        });
        sample.restores(&sample.reopened(), &id, 1).unwrap();
    }
}

/// An exported file: whatever was done to it, what comes of it is the snapshot that was exported, or nothing.
#[test]
fn mangled_archives() {
    let sample = Sample::new();
    let id = sample.commit("whole", 1);
    let mut whole = Vec::new();
    sample.store.export(&id, &mut whole, &mut none).unwrap();
    proptest!(config(64), |(how in mangles())| {
        let bytes = mangled(&whole, &how);
        let to = Sample::new();
        match to.store.import(&mut &*bytes, None, &mut none) {
            Ok(arrived) => {
                prop_assert_eq!(arrived.id, id);
                sample.restores(&to.store, &id, 1).unwrap();
            }
            Err(_) => prop_assert!(to.store.list().unwrap().is_empty()),
        }
        let report = to.store.check(ALL, &mut none).unwrap();
        prop_assert!(report.is_sound(), "{:?}", report);
    });
}
