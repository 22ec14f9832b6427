//! Signed snapshots: who signed, what is refused, and that it holds without anything but the store.

use std::fs;
use std::path::Path;
use std::process::Command;

use diorama_store::*;

use crate::sample::*;

fn signature_file(sample: &Sample, id: &SnapshotId) -> std::path::PathBuf {
    sample.root().join(format!("signatures/{id}"))
}

#[test]
fn a_snapshot_says_who_signed_it() {
    for make in BOTH {
        let (sample, signer) = make().signed();
        let id = sample.commit("signed", 1);
        // By whoever has nothing but the store.
        let options = OpenOptions { signer: None, ..sample.options.clone() };
        let store = Store::open_with(&sample.root(), &options).unwrap();
        assert_eq!(store.signature(&id).unwrap(), Signature::By(signer));
        let writer = store.begin().unwrap();
        let manifest = sample.put_all(&writer, "unsigned", 2).unwrap();
        let unsigned = writer.commit(manifest).unwrap();
        assert_eq!(store.signature(&unsigned).unwrap(), Signature::None);
        assert!(store.check(ALL, &mut none).unwrap().is_sound());
        // What says so can be taken to another store, and goes with the snapshot.
        let bytes = store.signature_bytes(&id).unwrap().unwrap();
        let refused = store.put_signature(&unsigned, &bytes).unwrap_err();
        assert!(refused.is_damage(), "{refused:?}");
        fs::remove_file(signature_file(&sample, &id)).unwrap();
        store.put_signature(&id, &bytes).unwrap();
        assert_eq!(store.signature(&id).unwrap(), Signature::By(signer));
        let elsewhere = Sample::new();
        store.copy_to(&id, &elsewhere.store, None, &|| false, &mut none).unwrap();
        assert_eq!(elsewhere.store.signature(&id).unwrap(), Signature::By(signer));
        store.remove(&id).unwrap();
        store.remove(&unsigned).unwrap();
        assert_eq!(sample.names_in("signatures"), [""; 0]);
    }
}

/// Through a file and from store to store, encrypted or not, and whether the snapshot comes with it or is there.
#[test]
fn a_signature_goes_where_its_snapshot_goes() {
    for make in BOTH {
        let (from, signer) = make().signed();
        let id = from.commit("one", 1);
        let export = |store: &Store| {
            let mut file = Vec::new();
            store.export(&id, &mut file, &mut none).unwrap();
            file
        };
        let signed = export(&from.store);
        let signature = fs::read(signature_file(&from, &id)).unwrap();
        fs::remove_file(signature_file(&from, &id)).unwrap();
        let unsigned = export(&from.store);
        fs::write(signature_file(&from, &id), &signature).unwrap();
        for make in BOTH {
            let to = make();
            let bring = |file: &[u8]| to.store.import(&mut &*file, None, &mut none).unwrap();
            bring(&unsigned);
            assert_eq!(to.store.signature(&id).unwrap(), Signature::None);
            assert!(bring(&signed).was_there);
            assert_eq!(to.reopened().signature(&id).unwrap(), Signature::By(signer));
            bring(&unsigned);
            assert_eq!(to.store.signature(&id).unwrap(), Signature::By(signer));
            to.store.remove(&id).unwrap();
            assert!(!bring(&signed).was_there);
            assert_eq!(to.reopened().signature(&id).unwrap(), Signature::By(signer));
            // One that is damaged is replaced, and does not travel.
            fs::write(signature_file(&to, &id), b"nobody").unwrap();
            let third = Sample::new();
            to.store.copy_to(&id, &third.store, None, &|| false, &mut none).unwrap();
            assert_eq!(third.store.signature(&id).unwrap(), Signature::None);
            assert_eq!(export(&to.store).len(), unsigned.len());
            from.store.copy_to(&id, &to.store, None, &|| false, &mut none).unwrap();
            assert_eq!(to.store.signature(&id).unwrap(), Signature::By(signer));
            assert!(to.store.check(ALL, &mut none).unwrap().is_sound());
        }
    }
}

/// Who has signed a snapshot where it is goes on doing so, whoever else signs it elsewhere.
#[test]
fn the_signature_that_is_there_stays() {
    let (here, mine) = Sample::new().signed();
    let id = here.commit("one", 1);
    let (there, theirs) = Sample::new().signed();
    here.store.copy_to(&id, &there.store, None, &|| false, &mut none).unwrap();
    assert_eq!(
        there.store.signature(&id).unwrap(),
        Signature::By(mine),
        "the store that it goes to does not sign"
    );
    let path = there.folder.path().join("signing.pem");
    let again = Sample::new().signed_with(&path).0;
    let writer = again.store.begin().unwrap();
    let manifest = here.store.load(&id).unwrap().manifest;
    again.put_all(&writer, "one", 1).unwrap();
    assert_eq!(writer.commit(manifest).unwrap(), id);
    assert_eq!(again.store.signature(&id).unwrap(), Signature::By(theirs));
    assert!(again.store.copy_to(&id, &here.store, None, &|| false, &mut none).unwrap().was_there);
    assert_eq!(here.store.signature(&id).unwrap(), Signature::By(mine));
}

#[test]
fn a_damaged_signature_is_none_and_named() {
    type Harm = fn(&Path);
    let ways: [(&str, Harm); 6] = [
        ("empty", |path| fs::write(path, b"").unwrap()),
        ("truncated", |path| fs::write(path, &fs::read(path).unwrap()[..60]).unwrap()),
        ("flipped", |path| {
            let mut bytes = fs::read(path).unwrap();
            let at = bytes.len() - 40;
            bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
            fs::write(path, bytes).unwrap();
        }),
        ("extended", |path| fs::write(path, [fs::read(path).unwrap(), b"x".to_vec()].concat()).unwrap()),
        ("a link", |path| {
            fs::remove_file(path).unwrap();
            std::os::unix::fs::symlink("/dev/zero", path).unwrap();
        }),
        ("a folder", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for make in BOTH {
        for (way, harm) in ways {
            let (sample, _) = make().signed();
            let id = sample.commit("signed", 1);
            let other = sample.commit("other", 2);
            let file = signature_file(&sample, &id);
            harm(&file);
            let found = sample.store.signature(&id).unwrap();
            assert!(matches!(&found, Signature::Wrong { object, .. } if *object == file), "{way}: {found:?}");
            let report = sample.store.check(ALL, &mut none).unwrap();
            assert_eq!(report.problems.len(), 1, "{way}: {report:?}");
            assert_eq!(report.problems[0].object, file, "{way}");
            assert!(matches!(sample.store.signature(&other).unwrap(), Signature::By(_)));
            // Missing, it is a snapshot that nobody has signed.
            fs::remove_file(&file).or_else(|_| fs::remove_dir(&file)).unwrap();
            assert_eq!(sample.store.signature(&id).unwrap(), Signature::None);
            sample.restores(&sample.store, &id, 1).unwrap();
        }
        // Swapped: each is whole, and of another snapshot.
        let (sample, _) = make().signed();
        let (a, b) = (sample.commit("a", 1), sample.commit("b", 2));
        fs::copy(signature_file(&sample, &a), signature_file(&sample, &b)).unwrap();
        assert!(matches!(sample.store.signature(&b).unwrap(), Signature::Wrong { .. }));
    }
}

/// A writer that dies between its signature and its manifest leaves nothing but what the next collection removes.
#[test]
fn a_signature_of_nothing_is_collected() {
    let (sample, _) = Sample::new().signed();
    let id = sample.commit("kept", 1);
    let stray = SnapshotId::of_manifest(b"never there");
    fs::write(signature_file(&sample, &stray), b"whatever").unwrap();
    assert!(sample.store.check(ALL, &mut none).unwrap().is_sound());
    sample.store.collect(CollectOptions::default(), &mut none).unwrap();
    assert_eq!(sample.names_in("signatures"), [id.to_string()]);
    assert!(matches!(sample.store.signature(&id).unwrap(), Signature::By(_)));
}

/// docs/store-format.md says how: with a program that knows nothing of stores.
#[test]
fn openssl_verifies_it_too() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let openssl =
        |arguments: &[&str]| match Command::new("openssl").args(arguments).current_dir(&folder).output() {
            Ok(output) => Some(output.status.success()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => panic!("{error}"),
        };
    // Its keys are ours.
    match openssl(&["genpkey", "-algorithm", "ed25519", "-out", "key.pem"]) {
        Some(made) => assert!(made),
        None => return eprintln!("skipped: openssl is not installed"),
    }
    assert_eq!(openssl(&["pkey", "-in", "key.pem", "-pubout", "-out", "public.pem"]), Some(true));
    let (sample, signer) = Sample::new().signed_with(&at("key.pem"));
    assert_eq!(PublicKey::read_all(&at("public.pem")).unwrap(), [signer]);
    let id = sample.commit("signed", 1);
    let object: serde_json::Value =
        serde_json::from_slice(&fs::read(signature_file(&sample, &id)).unwrap()).unwrap();
    let digits = object["signature"].as_str().unwrap().as_bytes();
    let digit = |at: usize| (digits[at] as char).to_digit(16).unwrap() as u8;
    let signature: Vec<u8> = (0..digits.len() / 2).map(|n| digit(2 * n) << 4 | digit(2 * n + 1)).collect();
    fs::write(at("signature"), &signature).unwrap();
    fs::write(at("message"), format!("diorama snapshot {id}\n")).unwrap();
    let verify = [
        "pkeyutl",
        "-verify",
        "-rawin",
        "-pubin",
        "-inkey",
        "public.pem",
        "-in",
        "message",
        "-sigfile",
        "signature",
    ];
    assert_eq!(openssl(&verify), Some(true));
    fs::write(at("message"), format!("diorama snapshot {}\n", SnapshotId::of_manifest(b""))).unwrap();
    assert_eq!(openssl(&verify), Some(false));
    // And ours are its.
    fs::write(at("key.pem"), &*SigningKey::generate().0).unwrap();
    assert_eq!(openssl(&["pkey", "-in", "key.pem", "-noout"]), Some(true));
}
