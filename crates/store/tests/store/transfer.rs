//! Snapshots from store to store and by way of a file: all of it or nothing, and nothing twice.

use std::fs;

use diorama_store::*;

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
    to.assert_whole(&id, 1);
    assert_eq!(to.store.load(&id).unwrap().manifest, from.store.load(&id).unwrap().manifest);

    // Once more is no harm, and brings nothing.
    let again = import(&to.store, &file, None).unwrap();
    assert_eq!((again.was_there, again.new_chunks, again.new_bytes), (true, 0, 0));
    // What both share comes once.
    let second = from.commit("second", 1);
    let shared = import(&to.store, &export(&from, &second), None).unwrap();
    assert_eq!((shared.was_there, shared.new_chunks), (false, 0));
    to.assert_whole(&second, 1);
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
    to.assert_whole(&id, 1);
}

/// A file's manifest and packs, if it has no signature.
fn taken_apart(file: &[u8]) -> (&[u8], Vec<&[u8]>) {
    let mut records = Vec::new();
    let mut at = 8;
    while at < file.len() {
        let length = u32::from_le_bytes(file[at + 4..at + 8].try_into().unwrap()) as usize;
        records.push(&file[at + 40..at + 40 + length]);
        at += 40 + length;
    }
    records.pop();
    (records.remove(0), records)
}

fn forged(manifest: &[u8], signature: Option<&[u8]>, packs: &[&[u8]]) -> Vec<u8> {
    let mut file = b"DIOARCH2".to_vec();
    let mut heads = file.clone();
    let mut record = |kind: u8, contents: &[u8], heads: &mut Vec<u8>| {
        let length = (contents.len() as u32).to_le_bytes();
        let head = [&[kind, 0, 0, 0], &length, &blake3::hash(contents).as_bytes()[..]].concat();
        file.extend_from_slice(&head);
        file.extend_from_slice(contents);
        heads.extend(head);
    };
    record(1, manifest, &mut heads);
    if let Some(signature) = signature {
        record(4, signature, &mut heads);
    }
    packs.iter().for_each(|pack| record(2, pack, &mut heads));
    let hash = blake3::hash(&heads);
    record(3, hash.as_bytes(), &mut heads);
    file
}

/// Whoever writes a file of their own can make all its hashes right.
#[test]
fn a_forged_file_makes_no_snapshot() {
    let from = Sample::new();
    let one = export(&from, &from.commit("one", 1));
    let other = export(&from, &from.commit("other", 2));
    let (one_manifest, one_packs) = taken_apart(&one);
    let (_, of_other) = taken_apart(&other);
    let to = Sample::new();
    let refused = |what: &str, file: &[u8]| {
        let error = import(&to.store, file, None).unwrap_err();
        assert!(matches!(error, StoreError::Archive { .. }), "{what}: {error:?}");
        for folder in ["snapshots", "names/pair", "aliases", "incoming"] {
            assert_eq!(to.names_in(folder), [""; 0], "{what}: {folder}");
        }
        assert!(to.reopened().check(ALL, &mut none).unwrap().is_sound(), "{what}");
    };
    assert_eq!(forged(one_manifest, None, &one_packs), one);
    refused("lacks all", &forged(one_manifest, None, &[]));
    refused("another's packs", &forged(one_manifest, None, &of_other));
    refused("no pack", &forged(one_manifest, None, &[b"DIOPACK1DIOTABL1"]));
    refused("nothing", &forged(b"{}", None, &[]));
    refused("one of all packs", &forged(one_manifest, None, &[&one_packs.concat()]));
    // A name that would lead out of the store.
    let evil = String::from_utf8(one_manifest.to_vec()).unwrap().replace("\"pair\"", "\"../pair\"");
    refused("a path for a name", &forged(evil.as_bytes(), None, &[]));
    // Signed by somebody, but not this.
    let (signing, _) = Sample::new().signed();
    let id = signing.commit("another", 3);
    let signature = signing.store.signature_bytes(&id).unwrap().unwrap();
    for (what, signature) in
        [("another's signature", &signature[..]), ("no signature", b"{}"), ("nobody", b"")]
    {
        refused(what, &forged(one_manifest, Some(signature), &one_packs));
    }
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
    to.assert_whole(&id, 1);
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
    to.assert_whole(&id, 1);
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
    from.assert_whole(&one, 1);
}
