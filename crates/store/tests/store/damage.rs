//! Every kind of object, damaged in every way: check names it, verify and reading refuse it, and what is not touched
//! still restores.

use std::fs;
use std::path::Path;

use diorama_store::*;

use crate::sample::*;

type Harm = fn(&Path);
type Change = fn(&mut Manifest);
type Forge = Box<dyn Fn(&mut Manifest)>;

const WAYS: [(&str, Harm); 9] = [
    ("missing", |path| fs::remove_file(path).unwrap()),
    ("empty", |path| change(path, Vec::clear)),
    ("truncated", |path| change(path, |bytes| bytes.truncate(bytes.len() / 2))),
    ("extended", |path| change(path, |bytes| bytes.push(0))),
    ("its start flipped", |path| change(path, |bytes| bytes[0] ^= 1)),
    ("its contents flipped", |path| {
        change(path, |bytes| {
            let at = 50.min(bytes.len() / 2);
            bytes[at] ^= 1;
        })
    }),
    ("its end flipped", |path| change(path, |bytes| *bytes.last_mut().unwrap() ^= 1)),
    ("a link", |path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    }),
    ("a pipe", |path| {
        fs::remove_file(path).unwrap();
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    }),
];

/// Every way, in a store and in an encrypted one.
fn each_way() -> impl Iterator<Item = (fn() -> Sample, (&'static str, Harm))> {
    BOTH.into_iter().flat_map(|make| WAYS.into_iter().map(move |way| (make, way)))
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn objects(report: &CheckReport) -> Vec<&Path> {
    let damaged = report.problems.iter().filter(|p| matches!(p.kind, CheckProblemKind::Damaged(_)));
    damaged.map(|problem| problem.object.as_path()).collect()
}

/// Whoever has the store open and whoever opens it now see the same.
fn both(sample: &Sample, check: impl Fn(&Store)) {
    check(&sample.store);
    check(&sample.reopened());
}

#[test]
fn packs() {
    for (make, (way, damage)) in each_way() {
        for kind in 0..2 {
            let sample = make();
            let whole = sample.commit("whole", 2);
            let (damaged, packs) = sample.new_packs(|| sample.commit("damaged", 1));
            assert_eq!(packs.len(), 2);
            let what = format!("pack {kind} {way}");
            damage(&packs[kind]);
            both(&sample, |store| {
                let report = store.check(ALL, &mut none).unwrap();
                // Which packs there should be, nobody knows: one that is missing shows in what snapshots lack.
                let named = usize::from(way != "missing");
                assert_eq!(objects(&report), &[&packs[kind]][..named], "{what}: {report:?}");
                let incomplete = report
                    .problems
                    .iter()
                    .any(|p| matches!(&p.kind, CheckProblemKind::Incomplete { id, .. } if *id == damaged));
                // A magic or a footer alone is no loss to who has read the table before.
                // (Sealed, the same may take the data with it that stands beside.)
                let harmless = ["extended", "its start flipped", "its end flipped"].contains(&way);
                assert!(incomplete || harmless, "{what}: {report:?}");
                assert_eq!(report.problems.len(), named + usize::from(incomplete), "{what}: {report:?}");
                let verified = store.verify(&damaged, &mut none).unwrap();
                let restored = sample.restores(store, &damaged, 1);
                if !harmless {
                    assert!(!verified.is_sound(), "{what}");
                    let damage = restored.unwrap_err();
                    assert!(damage.is_damage(), "{what}: {damage:?}");
                    let packs = sample.root().join("packs");
                    assert!(damage.to_string().contains(packs.to_str().unwrap()), "{what}: {damage}");
                }
                assert!(store.verify(&whole, &mut none).unwrap().is_sound(), "{what}");
                sample.restores(store, &whole, 2).unwrap();
                // A damaged one hides nobody, and can be found by its id.
                assert_eq!(store.list().unwrap().len(), 2, "{what}");
                assert_eq!(store.resolve(&damaged.to_string()[..20], None).unwrap(), damaged);
            });
            let store = sample.reopened();
            store.remove(&damaged).unwrap();
            store.collect(CollectOptions::default(), &mut none).unwrap();
            assert_eq!(store.list().unwrap().len(), 1, "{what}");
            sample.restores(&store, &whole, 2).unwrap();
        }
    }
}

/// Each byte of a small pack, one at a time.
#[test]
fn every_byte_of_a_pack_counts() {
    BOTH.iter().for_each(|make| every_byte(make()));
}

fn every_byte(sample: Sample) {
    let (_, packs) = sample.new_packs(|| sample.commit("only", 1));
    let tree = packs.iter().min_by_key(|pack| fs::metadata(pack).unwrap().len()).unwrap();
    let bytes = fs::read(tree).unwrap();
    for at in (0..bytes.len()).step_by(7) {
        change(tree, |bytes| bytes[at] ^= 0x10);
        let report = sample.store.check(ALL, &mut none).unwrap();
        assert!(objects(&report).contains(&tree.as_path()), "byte {at}: {report:?}");
        fs::write(tree, &bytes).unwrap();
    }
    assert!(sample.store.check(ALL, &mut none).unwrap().is_sound());
}

#[test]
fn packs_swapped() {
    BOTH.iter().for_each(|make| swapped(make()));
}

fn swapped(sample: Sample) {
    let whole = sample.commit("whole", 2);
    let (damaged, packs) = sample.new_packs(|| sample.commit("damaged", 1));
    let aside = sample.root().join("aside");
    for (from, to) in [(&packs[0], &aside), (&packs[1], &packs[0]), (&aside, &packs[1])] {
        fs::rename(from, to).unwrap();
    }
    both(&sample, |store| {
        let report = store.check(ALL, &mut none).unwrap();
        let mut named = objects(&report);
        named.sort();
        assert_eq!(named, [&packs[0], &packs[1]], "{report:?}");
        assert!(sample.restores(store, &damaged, 1).unwrap_err().is_damage());
        sample.restores(store, &whole, 2).unwrap();
    });
}

#[test]
fn manifests() {
    for (make, (way, damage)) in each_way() {
        let sample = make();
        let damaged = sample.commit("damaged", 1);
        let whole = sample.commit("whole", 2);
        let file = sample.manifest_file(&damaged);
        damage(&file);
        both(&sample, |store| {
            let report = store.check(ALL, &mut none).unwrap();
            if way == "missing" {
                assert!(report.is_sound(), "it was removed, as far as anybody can tell: {report:?}");
                assert!(matches!(store.load(&damaged), Err(StoreError::Missing { .. })));
            } else {
                assert_eq!(objects(&report), [&file], "{way}: {report:?}");
                let refused = sample.restores(store, &damaged, 1);
                assert!(matches!(&refused, Err(StoreError::Corrupt { file: named, .. }) if *named == file));
                let verified = store.verify(&damaged, &mut none).unwrap();
                assert_eq!(verified.problems[0].object.as_ref(), Some(&file), "{way}");
            }
            sample.restores(store, &whole, 2).unwrap();
        });
        if way != "missing" {
            sample.store.remove(&damaged).unwrap();
        }
        assert_eq!(sample.store.list().unwrap().len(), 1, "{way}");
    }
    // Swapped: each is whole, and not what its key says.
    BOTH.iter().for_each(|make| manifests_swapped(make()));
}

fn manifests_swapped(sample: Sample) {
    let (a, b) = (sample.commit("a", 1), sample.commit("b", 2));
    let (file_a, file_b) = (sample.manifest_file(&a), sample.manifest_file(&b));
    let bytes = fs::read(&file_a).unwrap();
    fs::copy(&file_b, &file_a).unwrap();
    fs::write(&file_b, bytes).unwrap();
    both(&sample, |store| {
        for id in [a, b] {
            let refused = store.load(&id);
            assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?}");
        }
    });
}

/// Names lead to snapshots, and every snapshot says its own: so they can be made again.
#[test]
fn names_are_mended() {
    for (make, (way, damage)) in each_way() {
        let sample = make();
        let id = sample.commit("one", 1);
        let other = sample.commit("other", 2);
        let file = sample.name_file("one", &id);
        if way == "its contents flipped" {
            fs::write(&file, "g".repeat(64)).unwrap();
        } else {
            damage(&file);
        }
        let store = sample.reopened();
        let found = store.find_name("pair", "one");
        assert!(matches!(found, Ok(None)), "{way}: {found:?}");
        assert_eq!(store.resolve("one", Some("pair")).unwrap(), id, "{way}");
        let report = store.check(ALL, &mut none).unwrap();
        assert_eq!(report.problems.len(), 1, "{way}: {report:?}");
        let report = store.check(CheckOptions { repair: true, ..ALL }, &mut none).unwrap();
        assert_eq!((report.problems.len(), report.repaired.len()), (0, 1), "{way}: {report:?}");
        assert!(store.check(ALL, &mut none).unwrap().is_sound(), "{way}");
        assert_eq!(store.find_name("pair", "one").unwrap(), Some(id), "{way}");
        assert_eq!(store.find_name("pair", "other").unwrap(), Some(other), "{way}");
    }
}

/// What a snapshot is called here that came from elsewhere. Without it, it is called as where it came from.
#[test]
fn aliases_are_mended() {
    let from = Sample::new();
    let brought = from.commit("one", 1);
    for (make, (way, damage)) in each_way() {
        let sample = make();
        let own = sample.commit("own", 2);
        from.store.copy_to(&brought, &sample.store, Some("theirs"), &|| false, &mut none).unwrap();
        damage(&sample.root().join(format!("aliases/{brought}")));
        both(&sample, |store| {
            let report = store.check(ALL, &mut none).unwrap();
            assert_eq!(report.problems.len(), 1, "{way}: {report:?}");
            sample.restores(store, &brought, 1).unwrap();
            sample.restores(store, &own, 2).unwrap();
            assert_eq!(store.list().unwrap().len(), 2, "{way}");
        });
        let store = sample.reopened();
        let report = store.check(CheckOptions { repair: true, ..ALL }, &mut none).unwrap();
        assert_eq!((report.problems.len(), report.repaired.len()), (0, 1), "{way}: {report:?}");
        assert!(store.check(ALL, &mut none).unwrap().is_sound(), "{way}");
        let name = store.load(&brought).unwrap().name;
        assert_eq!(store.find_name("pair", &name).unwrap(), Some(brought), "{way}");
    }
}

/// Each is whole, and another's.
#[test]
fn names_swapped() {
    let sample = Sample::new();
    let (a, b) = (sample.commit("a", 1), sample.commit("b", 2));
    let (file_a, file_b) = (sample.name_file("a", &a), sample.name_file("b", &b));
    let bytes = fs::read(&file_a).unwrap();
    fs::copy(&file_b, &file_a).unwrap();
    fs::write(&file_b, bytes).unwrap();
    both(&sample, |store| {
        assert_eq!(store.check(ALL, &mut none).unwrap().problems.len(), 2);
        sample.restores(store, &a, 1).unwrap();
        sample.restores(store, &b, 2).unwrap();
    });
    let report = sample.store.check(CheckOptions { repair: true, ..ALL }, &mut none).unwrap();
    assert_eq!((report.problems.len(), report.repaired.len()), (0, 2), "{report:?}");
    assert_eq!(sample.store.find_name("pair", "a").unwrap(), Some(a));
    assert_eq!(sample.store.find_name("pair", "b").unwrap(), Some(b));
}

/// A mark says something by being there: what is in it is nothing, and a pack that is needed stays.
#[test]
fn marks_of_doomed_packs_are_harmless() {
    for make in BOTH {
        for contents in [None, Some(&b"something"[..])] {
            let sample = make();
            let id = sample.commit("one", 1);
            for pack in [sample.names_in("packs").remove(0), "0".repeat(64)] {
                sample.backend.create(&format!("doomed/{pack}"), b"").unwrap();
                if let Some(contents) = contents {
                    fs::write(sample.root().join("doomed").join(&pack), contents).unwrap();
                }
            }
            both(&sample, |store| {
                assert!(store.check(ALL, &mut none).unwrap().is_sound());
                sample.restores(store, &id, 1).unwrap();
            });
            sample.store.collect(CollectOptions::default(), &mut none).unwrap();
            assert_eq!(sample.names_in("doomed"), [""; 0]);
            sample.restores(&sample.reopened(), &id, 1).unwrap();
        }
    }
}

#[test]
fn the_rest_can_be_lost() {
    for (make, (way, damage)) in each_way() {
        let sample = make();
        let ids: Vec<SnapshotId> = (0..40).map(|n| sample.commit(&format!("s{n}"), 1)).collect();
        sample.store.put_receipt(&ids[0], &Receipt { create_ms: 12 }).unwrap();
        sample.store.list().unwrap();
        damage(&sample.root().join(format!("receipts/{}.json", ids[0])));
        damage(&sample.root().join("cache/summaries"));
        let store = sample.reopened();
        let receipt = store.load(&ids[0]).unwrap().receipt;
        assert!(receipt.is_none() || way == "its end flipped", "{way}: {receipt:?}");
        assert_eq!(store.list().unwrap().len(), 40, "{way}");
        assert!(store.check(ALL, &mut none).unwrap().is_sound(), "{way}");
    }
    for (make, (way, damage)) in each_way() {
        let sample = make();
        damage(&sample.root().join("format"));
        // Without it, it is a store in the making, if all else is a store's.
        let opened = Store::open_with(&sample.root(), &sample.options);
        // Its last byte is white space either way.
        let right = way == "missing" || way == "its end flipped";
        assert_eq!(opened.is_ok(), right, "{way}: {opened:?}");
    }
}

/// What a damaged store has lost is stored again by the next snapshot that has it.
#[test]
fn a_lost_pack_comes_back_with_the_next_snapshot() {
    for (kind, make) in [(0, BOTH[0]), (1, BOTH[0]), (0, BOTH[1]), (1, BOTH[1])] {
        let sample = make();
        let (first, packs) = sample.new_packs(|| sample.commit("first", 1));
        fs::remove_file(&packs[kind]).unwrap();
        assert!(sample.restores(&sample.store, &first, 1).is_err());
        let store = sample.reopened();
        let writer = store.begin().unwrap();
        let manifest = sample.put_all(&writer, "second", 1).unwrap();
        let second = writer.commit(manifest).unwrap();
        sample.restores(&store, &second, 1).unwrap();
        sample.restores(&sample.store, &first, 1).unwrap();
        assert!(store.check(ALL, &mut none).unwrap().is_sound());
    }
}

/// A chunk that two packs hold is read from the other when one is damaged.
#[test]
fn a_damaged_chunk_is_read_from_elsewhere() {
    BOTH.iter().for_each(|make| elsewhere(make()));
}

fn elsewhere(sample: Sample) {
    let (one, two) = (sample.reopened(), sample.reopened());
    // Neither sees what the other stages.
    let writers = [one.begin().unwrap(), two.begin().unwrap()];
    let manifests = [("a", &writers[0]), ("b", &writers[1])]
        .map(|(name, writer)| sample.put_all(writer, name, 1).unwrap());
    let mut ids = Vec::new();
    let mut packs = Vec::new();
    for (writer, manifest) in writers.into_iter().zip(manifests) {
        let (id, new) = sample.new_packs(|| writer.commit(manifest).unwrap());
        ids.push(id);
        packs.push(new);
    }
    assert_eq!(packs.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
    for damaged in &packs {
        let kept: Vec<Vec<u8>> = damaged.iter().map(|pack| fs::read(pack).unwrap()).collect();
        for pack in damaged {
            change(pack, |bytes| bytes[60] ^= 1);
        }
        both(&sample, |store| {
            for id in &ids {
                sample.restores(store, id, 1).unwrap();
            }
            let report = store.check(ALL, &mut none).unwrap();
            assert_eq!((objects(&report).len(), report.problems.len()), (2, 2), "{report:?}");
        });
        for (pack, bytes) in damaged.iter().zip(kept) {
            fs::write(pack, bytes).unwrap();
        }
        // Where a table could not be read, its pack is not known yet.
        sample.store.look_again().unwrap();
    }
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
    drop(other);
    manifest.frames = record;
    manifest.machines.clear();
    let id = writer.commit(manifest).unwrap();
    let report = sample.store.verify(&id, &mut none).unwrap();
    assert!(
        matches!(report.problems[0].kind, ProblemKind::FrameWithoutReceiver { frame: 1, nic: 1, .. }),
        "{report:?}"
    );
}

/// A manifest that anybody could have made: its id is right, and it claims what cannot be.
#[test]
fn a_forged_manifest_is_refused() {
    let sample = Sample::new();
    let id = sample.commit("honest", 1);
    let text = fs::read_to_string(sample.manifest_file(&id)).unwrap();
    let root = sample.store.load(&id).unwrap().manifest.machines[0].ram.root.to_string();
    for (from, to) in [
        ("\"name\": \"client\"", "\"name\": \"../client\""),
        ("\"environment\": \"pair\"", "\"environment\": \"../pair\""),
        ("\"bytes\": 3211264", "\"bytes\": 18446744073709547520"),
        ("\"bytes\": 3211264", "\"bytes\": 3211265"),
        (&*root, &*root.to_uppercase()),
        (&*root, "00"),
        ("diorama-snapshot/1", "diorama-snapshot/9"),
        ("\"cut\"", "\"cute\""),
    ] {
        let forged = text.replacen(from, to, 1);
        assert_ne!(forged, text, "{from}");
        let id = SnapshotId::of_manifest(forged.as_bytes());
        fs::write(sample.manifest_file(&id), &forged).unwrap();
        let refused = sample.store.load(&id);
        assert!(
            matches!(refused, Err(StoreError::Corrupt { .. } | StoreError::UnsupportedSnapshot { .. })),
            "{from} -> {to}: {refused:?}"
        );
    }
    assert_eq!(sample.store.list().unwrap().len(), 9);
    assert_eq!(sample.store.resolve("honest", None).unwrap(), id);
}

/// Its tree has another shape than its length says, or is of other things: refused, and no memory taken for it.
#[test]
fn a_forged_length_is_refused() {
    let sample = Sample::new();
    let id = sample.commit("honest", 1);
    let honest = sample.store.load(&id).unwrap().manifest;
    let ram_root = honest.machines[0].ram.root;
    let cases: [Forge; 5] = [
        Box::new(|m| m.machines[0].ram.bytes = 4 << 40),
        Box::new(|m| m.machines[0].ram.bytes = 4096),
        Box::new(|m| m.machines[0].device_state.bytes = 1 << 30),
        Box::new(|m| m.frames.bytes += 1),
        Box::new(move |m| m.machines[0].device_state.root = ram_root),
    ];
    for (case, forge) in cases.iter().enumerate() {
        let mut manifest = honest.clone();
        forge(&mut manifest);
        let text = serde_json::to_vec(&manifest).unwrap();
        let id = SnapshotId::of_manifest(&text);
        fs::write(sample.manifest_file(&id), &text).unwrap();
        let report = sample.store.verify(&id, &mut none).unwrap();
        assert!(!report.is_sound(), "case {case}");
        assert!(sample.restores(&sample.store, &id, 1).unwrap_err().is_damage(), "case {case}");
        fs::remove_file(sample.manifest_file(&id)).unwrap();
    }
}
