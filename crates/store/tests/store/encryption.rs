//! Encrypted stores: who opens them, what can be read without, and what is done to their keys.

use std::fs;
use std::path::Path;

use diorama_store::*;

use crate::sample::*;
use crate::scratch;

const CHEAP: PassphraseCost = PassphraseCost { memory_kib: 64, passes: 1, lanes: 1 };

fn passphrase(text: &str) -> Secret {
    Secret::passphrase(text.as_bytes().to_vec().into()).unwrap()
}

fn open(sample: &Sample, secret: Option<Secret>) -> Result<Store, StoreError> {
    Store::open_with(&sample.root(), &OpenOptions { secret, signer: None })
}

/// Every file below a folder, and its path.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => all.extend(files(&entry.path())),
            false => all.push((entry.path().display().to_string(), fs::read(entry.path()).unwrap())),
        }
    }
    all
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

/// The same search finds what it looks for in a store that is not encrypted.
#[test]
fn nothing_of_the_contents_is_in_the_clear() {
    for (make, encrypted) in BOTH.into_iter().zip([false, true]) {
        let sample = make();
        let id = sample.commit("monday", 0x5a);
        sample.store.put_receipt(&id, &Receipt { create_ms: 12 }).unwrap();
        for n in 0..40 {
            sample.commit(&format!("s{n}"), 1);
        }
        sample.store.list().unwrap();
        let manifest = sample.store.load(&id).unwrap().manifest;
        let page = Address::of(&[0x5a; 4096]);
        let searched: [(&str, Vec<u8>); 9] = [
            ("device state", state(0x5a)[..64].to_vec()),
            ("a root", manifest.machines[0].ram.root.as_bytes().to_vec()),
            ("a root in text", manifest.machines[0].ram.root.to_string().into()),
            ("a page's address", page.as_bytes().to_vec()),
            ("a machine's name", b"client".to_vec()),
            ("a snapshot's name", b"monday".to_vec()),
            ("the environment's name", b"pair".to_vec()),
            ("the receipt", b"create_ms".to_vec()),
            ("a magic", b"DIOPACK1".to_vec()),
        ];
        let all = files(&sample.root());
        assert!(all.iter().any(|(path, _)| path.ends_with("cache/summaries")));
        for (what, bytes) in &searched {
            let found: Vec<&String> = all
                .iter()
                .filter(|(path, stored)| {
                    let below = path.strip_prefix(sample.root().to_str().unwrap()).unwrap();
                    contains(stored, bytes) || contains(below.as_bytes(), bytes)
                })
                .map(|(path, _)| path)
                .collect();
            assert_eq!(found.is_empty(), encrypted, "{what}: {found:?}");
        }
    }
}

/// Addresses inside are what they are everywhere, so that a snapshot keeps its id in any store.
#[test]
fn a_snapshot_has_the_same_id_in_both() {
    let samples = BOTH.map(|make| make());
    let ids = samples.each_ref().map(|sample| {
        let writer = sample.store.begin().unwrap();
        let mut manifest = sample.put_all(&writer, "same", 1).unwrap();
        manifest.bytes.new = 0;
        writer.commit(manifest).unwrap()
    });
    assert_eq!(ids[0], ids[1]);
}

#[test]
fn only_a_key_opens_it_and_nothing_is_made_over_it() {
    let sample = Sample::encrypted();
    let id = sample.commit("one", 1);
    let before = files(&sample.root());
    assert!(matches!(open(&sample, None), Err(StoreError::KeyMissing { .. })));
    let refused = open(&sample, Some(key(2)));
    assert!(matches!(refused, Err(StoreError::WrongKey { secret: "key file", slots: 1, .. })), "{refused:?}");
    let refused = open(&sample, Some(passphrase("a passphrase")));
    assert!(matches!(refused, Err(StoreError::WrongKey { secret: "passphrase", slots: 0, .. })));
    // Without its format, it is an encrypted one all the same.
    fs::remove_file(sample.root().join("format")).unwrap();
    assert!(matches!(open(&sample, None), Err(StoreError::KeyMissing { .. })));
    let refused = Store::create_encrypted(&sample.root(), &key(3), CHEAP, "");
    assert!(matches!(refused, Err(StoreError::AlreadyAStore { .. })), "{refused:?}");
    sample.restores(&open(&sample, Some(key(1))).unwrap(), &id, 1).unwrap();
    assert_eq!(files(&sample.root()).len(), before.len());

    // And a key opens nothing else: neither a store that anybody could have put there, nor none.
    let plain = Sample::new();
    assert!(matches!(open(&plain, Some(key(1))), Err(StoreError::NotEncrypted { .. })));
    let nowhere = plain.folder.path().join("nowhere");
    let refused = Store::open_with(&nowhere, &OpenOptions { secret: Some(key(1)), signer: None });
    assert!(matches!(refused, Err(StoreError::NoStore { .. })), "{refused:?}");
    assert!(files(&nowhere).is_empty());
    assert!(matches!(
        Store::create_encrypted(&plain.root(), &key(1), CHEAP, ""),
        Err(StoreError::AlreadyAStore { .. })
    ));
}

#[test]
fn keys_are_added_and_removed() {
    let sample = Sample::encrypted();
    let id = sample.commit("one", 1);
    let keyring = sample.store.keyring().unwrap();
    let first = keyring.slots().unwrap().0.remove(0);
    assert_eq!((&*first.label, first.passphrase), ("first", false));
    assert!(matches!(keyring.remove(&first.id), Err(StoreError::LastKey { .. })));
    let second = keyring.add(&passphrase("correct horse"), CHEAP, "mine").unwrap();
    sample.restores(&open(&sample, Some(passphrase("correct horse"))).unwrap(), &id, 1).unwrap();
    assert!(matches!(open(&sample, Some(passphrase("battery staple"))), Err(StoreError::WrongKey { .. })));
    assert!(matches!(keyring.remove("xyz"), Err(StoreError::NoSuchKey { .. })));
    assert!(matches!(keyring.remove(""), Err(StoreError::NoSuchKey { .. })));
    keyring.remove(&first.id).unwrap();
    assert!(matches!(open(&sample, Some(key(1))), Err(StoreError::WrongKey { .. })));
    let store = open(&sample, Some(passphrase("correct horse"))).unwrap();
    assert_eq!(store.keyring().unwrap().slots().unwrap().0, [second]);
    assert!(Sample::new().store.keyring().is_none());
    for label in ["a\nb", &"x".repeat(200)] {
        assert!(keyring.add(&key(4), CHEAP, label).is_err());
    }
    let hopeless = PassphraseCost { memory_kib: 1, passes: 0, lanes: 0 };
    let refused = keyring.add(&passphrase("correct horse"), hopeless, "");
    assert!(matches!(refused, Err(StoreError::BadKeyCost)), "{refused:?}");
    while keyring.slots().unwrap().0.len() < 32 {
        keyring.add(&key(9), CHEAP, "").unwrap();
    }
    assert!(matches!(keyring.add(&key(9), CHEAP, ""), Err(StoreError::TooManyKeys { .. })));
}

/// A damaged slot is found and named; who has another key notices nothing else.
#[test]
fn damaged_keys() {
    type Harm = fn(&Path, &Path);
    let ways: [(&str, Harm); 8] = [
        ("truncated", |slot, _| fs::write(slot, &fs::read(slot).unwrap()[..100]).unwrap()),
        ("empty", |slot, _| fs::write(slot, b"").unwrap()),
        ("extended", |slot, _| fs::write(slot, [fs::read(slot).unwrap(), b" ".to_vec()].concat()).unwrap()),
        ("swapped", |slot, other| fs::write(slot, fs::read(other).unwrap()).unwrap()),
        ("flipped in what is wrapped", |slot, _| {
            let text = fs::read_to_string(slot).unwrap();
            let at = text.find("wrapped\":\"").unwrap() + 10;
            let other = if &text[at..=at] == "0" { "1" } else { "0" };
            fs::write(slot, format!("{}{other}{}", &text[..at], &text[at + 1..])).unwrap();
        }),
        ("another label", |slot, _| {
            fs::write(slot, fs::read_to_string(slot).unwrap().replace("mine", "nine")).unwrap();
        }),
        ("a cost that nobody can pay", |slot, _| {
            let text = fs::read_to_string(slot).unwrap();
            fs::write(slot, text.replace("\"memory_kib\":64,", "\"memory_kib\":4294967295,")).unwrap();
        }),
        ("a link", |slot, _| {
            fs::remove_file(slot).unwrap();
            std::os::unix::fs::symlink("/dev/zero", slot).unwrap();
        }),
    ];
    for (way, harm) in ways {
        let sample = Sample::encrypted();
        let id = sample.commit("one", 1);
        let keyring = sample.store.keyring().unwrap();
        let first = keyring.slots().unwrap().0.remove(0);
        let second = keyring.add(&passphrase("correct horse"), CHEAP, "mine").unwrap();
        let path = |slot: &KeySlot| sample.root().join("keys").join(&slot.id);
        harm(&path(&second), &path(&first));
        let refused = open(&sample, Some(passphrase("correct horse"))).map(drop).unwrap_err();
        let named = refused.to_string().contains(&second.id);
        assert!(named || matches!(refused, StoreError::WrongKey { .. }), "{way}: {refused}");
        let store = open(&sample, Some(key(1))).unwrap();
        sample.restores(&store, &id, 1).unwrap();
        let report = store.check(ALL, &mut none).unwrap();
        assert_eq!(report.problems.len(), 1, "{way}: {report:?}");
        assert_eq!(report.problems[0].object, path(&second), "{way}: {report:?}");
        // A damaged one can go; the last that is whole cannot.
        let keyring = store.keyring().unwrap();
        assert!(matches!(keyring.remove(&first.id), Err(StoreError::LastKey { .. })), "{way}");
        keyring.remove(&second.id).unwrap();
        assert!(store.check(ALL, &mut none).unwrap().is_sound(), "{way}");
    }
}

/// Objects of one kind exchanged: each is whole, and not the one that belongs there.
#[test]
fn swapped_objects() {
    let sample = Sample::encrypted();
    let (a, b) = (sample.commit("a", 1), sample.commit("b", 2));
    for id in [a, b] {
        sample.store.put_receipt(&id, &Receipt { create_ms: 5 }).unwrap();
    }
    let swap = |one: &Path, other: &Path| {
        let (first, second) = (fs::read(one).unwrap(), fs::read(other).unwrap());
        fs::write(one, second).unwrap();
        fs::write(other, first).unwrap();
    };
    let receipt = |id: &SnapshotId| sample.root().join(format!("receipts/{id}.json"));
    swap(&receipt(&a), &receipt(&b));
    assert_eq!(sample.store.load(&a).unwrap().receipt, None);
    swap(&receipt(&a), &receipt(&b));
    assert_eq!(sample.store.load(&a).unwrap().receipt, Some(Receipt { create_ms: 5 }));
    swap(&sample.name_file("a", &a), &sample.name_file("b", &b));
    assert_eq!(sample.store.find_name("pair", "a").unwrap(), None);
    let report = sample.store.check(ALL, &mut none).unwrap();
    assert_eq!(report.problems.len(), 2, "{report:?}");
    sample.store.check(CheckOptions { repair: true, ..ALL }, &mut none).unwrap();
    assert!(sample.store.check(ALL, &mut none).unwrap().is_sound());
}

/// What anybody can write who has no key is refused, whatever it is.
#[test]
fn nobody_without_a_key_makes_a_snapshot() {
    let (sample, plain) = (Sample::encrypted(), Sample::new());
    let id = sample.commit("one", 1);
    let other = plain.commit("forged", 2);
    // A whole store that is not encrypted, mixed in.
    for folder in ["packs", "snapshots"] {
        for name in plain.names_in(folder) {
            let place = |sample: &Sample| sample.root().join(folder).join(&name);
            fs::copy(place(&plain), place(&sample)).unwrap();
        }
    }
    // And one of another key.
    let stranger = scratch::folder();
    let root = stranger.path().join("store");
    Store::create_encrypted(&root, &key(2), CHEAP, "").unwrap();
    let store = sample.reopened();
    assert!(matches!(store.load(&other), Err(StoreError::Corrupt { .. })));
    sample.restores(&store, &id, 1).unwrap();
    let report = store.check(ALL, &mut none).unwrap();
    assert_eq!(report.problems.len(), 3, "its manifest and its two packs: {report:?}");
    for slot in fs::read_dir(root.join("keys")).unwrap().map(Result::unwrap) {
        fs::copy(slot.path(), sample.root().join("keys").join(slot.file_name())).unwrap();
    }
    // Their slot gives another master key, under which nothing here is sealed.
    let theirs = open(&sample, Some(key(2))).unwrap();
    assert!(matches!(theirs.load(&id), Err(StoreError::Corrupt { .. })));
    assert_eq!(store.check(ALL, &mut none).unwrap().problems.len(), 4);
}
