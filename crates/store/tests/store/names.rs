//! Which snapshot a user means, and which names are taken.

use diorama_store::*;

use crate::sample::*;

type Change = fn(&mut Manifest);

impl Sample {
    fn commit_in(&self, environment: &str, name: &str, seed: u8) -> Result<SnapshotId, StoreError> {
        let writer = self.store.begin().unwrap();
        let mut manifest = self.put_all(&writer, name, seed).unwrap();
        manifest.environment = environment.into();
        writer.commit(manifest)
    }
}

#[test]
fn a_name_is_taken_once_in_an_environment() {
    let sample = Sample::new();
    let first = sample.commit_in("pair", "same", 1).unwrap();
    let refused = sample.commit_in("pair", "same", 2);
    assert!(matches!(&refused, Err(StoreError::NameInUse { id, .. }) if *id == first), "{refused:?}");
    assert_eq!(sample.names_in("incoming"), [""; 0]);
    sample.commit_in("other", "same", 3).unwrap();
    assert_eq!(sample.store.find_name("pair", "same").unwrap(), Some(first));
    sample.store.remove(&first).unwrap();
    assert_eq!(sample.store.find_name("pair", "same").unwrap(), None);
    sample.commit_in("pair", "same", 4).unwrap();
}

#[test]
fn of_many_that_want_one_name_one_gets_it() {
    let sample = Sample::new();
    let results = std::thread::scope(|scope| {
        let sample = &sample;
        let threads = [1, 2, 3, 4].map(|seed| scope.spawn(move || sample.commit_in("pair", "x", seed)));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert_eq!(sample.store.list().unwrap().len(), 1);
}

#[test]
fn words_find_snapshots() {
    let sample = Sample::new();
    let a = sample.commit_in("pair", "before-upgrade", 1).unwrap();
    let b = sample.commit_in("other", "before-upgrade", 2).unwrap();
    let c = sample.commit_in("other", "clean", 3).unwrap();
    let resolve = |query: &str, environment| sample.store.resolve(query, environment);
    let full = a.to_string();
    for (query, environment, expected) in [
        (&*full, None, a),
        (&full[..8], None, a),
        (&full[..8].to_uppercase(), None, a),
        ("pair/before-upgrade", Some("other"), a),
        ("before-upgrade", Some("pair"), a),
        ("before-upgrade", Some("other"), b),
        ("clean", Some("pair"), c),
        ("clean", None, c),
    ] {
        assert_eq!(resolve(query, environment).unwrap(), expected, "{query}");
    }
    let several = resolve("before-upgrade", None);
    assert!(
        matches!(&several, Err(StoreError::Ambiguous { matches, .. }) if matches.len() == 2),
        "{several:?}"
    );
    for (query, expected) in [
        ("befor-upgrade", &["other/before-upgrade", "pair/before-upgrade"][..]),
        ("pair/clean-", &[]),
        ("cleen", &["other/clean"]),
        ("upgrade", &["other/before-upgrade", "pair/before-upgrade"]),
        (&full[..3], &[]),
        ("", &[]),
        ("../clean", &[]),
    ] {
        let missing = resolve(query, None);
        assert!(
            matches!(&missing, Err(StoreError::NotFound { near, .. }) if near == expected),
            "{query}: {missing:?}"
        );
    }
}

#[test]
fn commit_refuses_what_the_manifest_does_not_match() {
    let cases: [(&str, Change); 5] = [
        ("name", |m| m.name = "../x".into()),
        ("format", |m| m.format = "other".into()),
        ("not written", |m| m.machines[0].device_state.bytes += 1),
        ("not named", |m| drop(m.machines.pop())),
        ("twice", |m| m.machines.push(m.machines[0].clone())),
    ];
    for (case, change) in cases {
        let sample = Sample::new();
        let writer = sample.store.begin().unwrap();
        let mut manifest = sample.put_all(&writer, "x", 1).unwrap();
        change(&mut manifest);
        let refused = writer.commit(manifest);
        assert!(
            matches!(
                (&refused, case),
                (Err(StoreError::BadManifest(_)), "name" | "format" | "twice")
                    | (Err(StoreError::NotWritten { .. }), "not written")
                    | (Err(StoreError::NotInManifest { .. }), "not named")
            ),
            "{case}: {refused:?}"
        );
        assert_eq!(sample.names_in("incoming"), [""; 0], "{case}");
    }
    let sample = Sample::new();
    let writer = sample.store.begin().unwrap();
    for name in ["", "..", "a/b", "a.blocks"] {
        let refused = writer.put_bytes(Piece::DeviceState, name, b"");
        assert!(matches!(refused, Err(StoreError::BadName { .. })), "{name}");
    }
}
