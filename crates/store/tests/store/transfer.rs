//! Snapshots from store to store and by way of a file: all of it or nothing, and nothing twice.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use diorama_store::*;

use crate::faulty::{Fault, Faulty, Switchboard};
use crate::sample::*;

/// Nothing is there, and nothing wrong.
fn assert_empty(sample: &Sample, what: &str) {
    for folder in ["snapshots", "names/pair", "aliases", "incoming", "packs"] {
        assert_eq!(sample.names_in(folder), [""; 0], "{what}: {folder}");
    }
    assert!(sample.reopened().check(ALL, &mut none).unwrap().is_sound(), "{what}");
}

fn export(sample: &Sample, id: &SnapshotId) -> Vec<u8> {
    let mut file = Vec::new();
    let exported = sample.store.export(id, &mut file, &mut none).unwrap();
    assert_eq!((exported.id, exported.file_bytes), (*id, file.len() as u64));
    file
}

fn import(store: &Store, file: &[u8], name: Option<&str>) -> Result<Arrived, StoreError> {
    store.import(&mut &*file, name, &mut none)
}

/// Whole and as it was, for whoever has the store open and whoever opens it now.
fn assert_whole(sample: &Sample, id: &SnapshotId, seed: u8) {
    for store in [&sample.store, &sample.reopened()] {
        assert!(store.verify(id, &mut none).unwrap().is_sound());
        sample.restores(store, id, seed).unwrap();
        assert!(store.check(ALL, &mut none).unwrap().is_sound());
    }
    assert_eq!(sample.names_in("incoming"), [""; 0]);
}

#[test]
fn a_file_brings_a_snapshot_and_nothing_else() {
    let from = Sample::new();
    let id = from.commit("one", 1);
    from.commit("other", 2);
    let file = export(&from, &id);
    // The other's noise is not in it, and it is about as small as the store.
    assert!(file.len() < 180_000, "{}", file.len());
    let others = state(2);
    assert!(!file.windows(64).any(|window| *window == others[..64]));

    let to = Sample::new();
    let mut steps = Vec::new();
    let arrived = to.store.import(&mut &*file, None, &mut |done, total| steps.push((done, total))).unwrap();
    assert_eq!((arrived.id, arrived.name.as_str(), arrived.was_there), (id, "one", false));
    assert_eq!(arrived.new_chunks, arrived.chunks);
    assert!(steps.iter().all(|(done, total)| *done <= file.len() as u64 && *total == 0) && steps.len() >= 2);
    assert_whole(&to, &id, 1);
    assert_eq!(to.store.load(&id).unwrap().manifest, from.store.load(&id).unwrap().manifest);

    // Once more is no harm, and brings nothing.
    let again = import(&to.store, &file, None).unwrap();
    assert_eq!((again.was_there, again.new_chunks, again.new_bytes), (true, 0, 0));
    // What both share comes once.
    let second = from.commit("second", 1);
    let shared = import(&to.store, &export(&from, &second), None).unwrap();
    assert_eq!((shared.was_there, shared.new_chunks), (false, 0));
    assert_whole(&to, &second, 1);
}

#[test]
fn every_damage_to_a_file_is_named_and_nothing_of_it_stays() {
    let from = Sample::new();
    let id = from.commit("one", 1);
    let file = export(&from, &id);
    let other = export(&from, &from.commit("other", 2));
    let to = Sample::new();
    let refused = |what: &str, bytes: &[u8]| -> ArchiveProblem {
        let error = import(&to.store, bytes, None).unwrap_err();
        assert_empty(&to, what);
        match error {
            StoreError::Archive { problem, .. } => problem,
            other => panic!("{what}: {other:?}"),
        }
    };
    for length in (0..file.len()).step_by(3_001).chain([file.len() - 1, 7, 8, 9, 48]) {
        assert_eq!(refused("truncated", &file[..length]), ArchiveProblem::Ends, "{length} bytes");
    }
    for at in (0..file.len()).step_by(1_999).chain([0, 8, 20, file.len() - 1, file.len() - 40]) {
        let mut flipped = file.clone();
        flipped[at] ^= 0x20;
        refused(&format!("byte {at} flipped"), &flipped);
    }
    assert_eq!(refused("extended", &[&file[..], b"\0"].concat()), ArchiveProblem::Excess);
    // Another snapshot's packs after this one's manifest.
    let manifest = |file: &[u8]| 48 + u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let swapped = [&file[..manifest(&file)], &other[manifest(&other)..]].concat();
    assert_eq!(refused("swapped", &swapped), ArchiveProblem::Records);
    assert_eq!(refused("something else", b"PK\x03\x04 and so on"), ArchiveProblem::NotAnArchive);
    // The whole one still arrives.
    import(&to.store, &file, None).unwrap();
    assert_whole(&to, &id, 1);
}

/// Whoever writes a file of their own can make all its hashes right.
#[test]
fn a_forged_file_makes_no_snapshot() {
    let from = Sample::new();
    let one = export(&from, &from.commit("one", 1));
    let other = export(&from, &from.commit("other", 2));
    let manifest = |file: &[u8]| 48 + u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let forged = |manifest: &[u8], records: &[&[u8]]| {
        let mut file = b"DIOARCH1".to_vec();
        let mut record = |kind: u8, contents: &[u8]| {
            file.extend_from_slice(&[kind, 0, 0, 0]);
            file.extend_from_slice(&(contents.len() as u32).to_le_bytes());
            file.extend_from_slice(blake3::hash(contents).as_bytes());
            let head = file[file.len() - 40..].to_vec();
            file.extend_from_slice(contents);
            head
        };
        let mut heads = b"DIOARCH1".to_vec();
        heads.extend(record(1, manifest));
        for contents in records {
            heads.extend(record(2, contents));
        }
        record(3, blake3::hash(&heads).as_bytes());
        file
    };
    let packs = |file: &[u8]| -> Vec<Vec<u8>> {
        let (mut at, mut packs) = (manifest(file), Vec::new());
        while file[at] == 2 {
            let length = u32::from_le_bytes(file[at + 4..at + 8].try_into().unwrap()) as usize;
            packs.push(file[at + 40..at + 40 + length].to_vec());
            at += 40 + length;
        }
        packs
    };
    let to = Sample::new();
    let refused = |what: &str, file: &[u8]| {
        let error = import(&to.store, file, None).unwrap_err();
        assert!(matches!(error, StoreError::Archive { .. }), "{what}: {error:?}");
        for folder in ["snapshots", "names/pair", "aliases", "incoming"] {
            assert_eq!(to.names_in(folder), [""; 0], "{what}: {folder}");
        }
        assert!(to.reopened().check(ALL, &mut none).unwrap().is_sound(), "{what}");
    };
    let (one_manifest, one_packs) = (&one[48..manifest(&one)], packs(&one));
    let slices = |packs: &[Vec<u8>]| packs.iter().map(Vec::as_slice).collect::<Vec<_>>().concat();
    assert_eq!(forged(one_manifest, &one_packs.iter().map(Vec::as_slice).collect::<Vec<_>>()), one);
    refused("lacks all", &forged(one_manifest, &[]));
    let of_other = packs(&other);
    refused(
        "another's packs",
        &forged(one_manifest, &of_other.iter().map(Vec::as_slice).collect::<Vec<_>>()),
    );
    refused("no pack", &forged(one_manifest, &[b"DIOPACK1DIOTABL1"]));
    refused("nothing", &forged(b"{}", &[]));
    refused("one of all packs", &forged(one_manifest, &[&slices(&one_packs)]));
    // A name that would lead out of the store.
    let evil = String::from_utf8(one_manifest.to_vec()).unwrap().replace("\"pair\"", "\"../pair\"");
    refused("a path for a name", &forged(evil.as_bytes(), &[]));
    // What such a file has left goes by collecting.
    to.store.collect(CollectOptions::default(), &mut none).unwrap();
    assert_empty(&to, "collected");
}

#[test]
fn a_taken_name_is_refused_and_another_can_be_given() {
    let from = Sample::new();
    let id = from.commit("one", 1);
    let file = export(&from, &id);
    let to = Sample::new();
    let taken = to.commit("one", 2);
    let refused = import(&to.store, &file, None).unwrap_err();
    assert!(matches!(refused, StoreError::NameInUse { id, .. } if id == taken), "{refused:?}");
    assert!(matches!(import(&to.store, &file, Some("../x")), Err(StoreError::BadName { .. })));
    let arrived = import(&to.store, &file, Some("theirs")).unwrap();
    assert_eq!((arrived.id, arrived.name.as_str()), (id, "theirs"));
    assert_whole(&to, &id, 1);
    for store in [&to.store, &to.reopened()] {
        let mut names: Vec<String> =
            store.list().unwrap().iter().map(|s| s.entry().unwrap().full_name()).collect();
        names.sort();
        assert_eq!(names, ["pair/one", "pair/theirs"]);
        assert_eq!(store.resolve("theirs", None).unwrap(), id);
        assert_eq!(store.resolve("one", Some("pair")).unwrap(), taken);
        assert_eq!(store.load(&id).unwrap().name, "theirs");
        assert_eq!(store.find_name("pair", "theirs").unwrap(), Some(id));
    }
    // The name goes along, and with the snapshot.
    let third = Sample::new();
    assert_eq!(to.store.copy_to(&id, &third.store, None, &|| false, &mut none).unwrap().name, "theirs");
    assert_eq!(third.store.load(&id).unwrap().name, "theirs");
    to.store.remove(&id).unwrap();
    assert_eq!((to.names_in("names/pair"), to.names_in("aliases")), (vec!["one".to_owned()], vec![]));
    to.store.remove(&taken).unwrap();
    assert_eq!(import(&to.store, &file, None).unwrap().name, "one");
    assert_whole(&to, &id, 1);
}

#[test]
fn only_what_the_other_store_lacks_is_moved() {
    for make in BOTH {
        moves_what_is_lacked(&Sample::new(), &make());
        moves_what_is_lacked(&make(), &Sample::new());
    }
}

fn moves_what_is_lacked(from: &Sample, to: &Sample) {
    let one = from.commit("one", 1);
    let two = from.commit("two", 2);
    let first = from.store.copy_to(&one, &to.store, None, &|| false, &mut none).unwrap();
    assert_eq!((first.new_chunks, first.was_there), (first.chunks, false));
    assert_whole(to, &one, 1);
    let mut moved = 0;
    let second = from.store.copy_to(&two, &to.store, None, &|| false, &mut |done, _| moved = done).unwrap();
    // Kernel, layers: there. Memory and state: new.
    assert!(second.new_chunks < second.chunks && second.new_bytes < first.new_bytes, "{first:?} {second:?}");
    assert!(moved > 150_000 && moved < 170_000, "{moved}");
    assert_whole(to, &two, 2);
    let mut nothing = |_, total| assert_eq!(total, 0);
    let again = from.store.copy_to(&two, &to.store, None, &|| false, &mut nothing).unwrap();
    assert_eq!((again.was_there, again.new_chunks, again.new_bytes), (true, 0, 0));
    // And back, into a store that has lost it.
    from.store.remove(&two).unwrap();
    from.store.collect(CollectOptions::default(), &mut none).unwrap();
    to.store.copy_to(&two, &from.store, None, &|| false, &mut none).unwrap();
    assert_whole(from, &two, 2);
    // A store of one's own is no other.
    assert!(from.store.copy_to(&two, &from.store, None, &|| false, &mut none).unwrap().was_there);
}

#[test]
fn a_transfer_that_is_not_wanted_any_more_stops() {
    let (from, to) = (Sample::new(), Sample::new());
    let one = from.commit("one", 1);
    let stopped = from.store.copy_to(&one, &to.store, None, &|| true, &mut none);
    assert!(matches!(stopped, Err(StoreError::Stopped)), "{stopped:?}");
    assert_empty(&to, "stopped");
}

#[test]
fn what_is_damaged_here_does_not_travel_and_what_was_lost_there_is_mended() {
    let (from, to) = (Sample::new(), Sample::new());
    let (one, packs) = from.new_packs(|| from.commit("one", 1));
    let file = export(&from, &one);
    import(&to.store, &file, None).unwrap();
    // That of the data.
    let pack = packs.iter().max_by_key(|pack| fs::metadata(pack).unwrap().len()).unwrap();
    let mut damaged = fs::read(pack).unwrap();
    damaged[5_000] ^= 1;
    fs::write(pack, &damaged).unwrap();
    let third = Sample::new();
    let refused = from.store.copy_to(&one, &third.store, None, &|| false, &mut none).unwrap_err();
    assert!(refused.is_damage(), "{refused:?}");
    assert!(from.store.export(&one, &mut std::io::sink(), &mut none).unwrap_err().is_damage());
    assert_eq!(third.names_in("snapshots"), [""; 0]);
    assert!(third.store.check(ALL, &mut none).unwrap().is_sound());
    // A pack that is gone is stored anew by whoever brings the snapshot again.
    fs::remove_file(pack).unwrap();
    let mended = import(&from.reopened(), &file, None).unwrap();
    assert!(mended.was_there && mended.new_chunks > 0, "{mended:?}");
    assert_whole(&from, &one, 1);
}

/// Each operation of the other store fails once; afterwards the same again succeeds.
#[test]
fn an_interrupted_transfer_leaves_nothing_visible_and_goes_on() {
    let from = Sample::new();
    let one = from.commit("one", 1);
    for fault in [Fault::Before, Fault::After, Fault::Dead] {
        for position in 0.. {
            let to = Sample::new();
            let board = Switchboard::new(fault);
            let store = Store::with_backend(Faulty::new(Arc::clone(&to.backend), &board)).unwrap();
            board.arm(position);
            let copied = from.store.copy_to(&one, &store, Some("copy"), &|| false, &mut none);
            drop(store);
            if !board.hit.load(Ordering::Relaxed) {
                copied.unwrap();
                assert!(position > 8, "{fault:?}: only {position} operations");
                break;
            }
            let what = format!("{fault:?} at {position}: {copied:?}");
            // What fails after the manifest is there is no failure of it; a dead one is told nothing.
            let there = to.names_in("snapshots").len() == 1;
            assert!(fault == Fault::Dead || copied.is_ok() == there, "{what}");
            let store = to.reopened();
            assert!(store.check(ALL, &mut none).unwrap().is_sound(), "{what}");
            from.store.copy_to(&one, &store, Some("copy"), &|| false, &mut none).unwrap();
            assert_eq!(store.resolve("pair/copy", None).unwrap(), one, "{what}");
            assert_whole(&to, &one, 1);
        }
    }
}
