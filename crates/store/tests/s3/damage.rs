//! Objects in a bucket, damaged in every way that a bucket can have: check names them, reading refuses them, and what is
//! not touched still restores. (What only a folder can have, links and pipes, is tested there.)

use diorama_store::*;

use crate::sample::*;

type Harm = fn(&mut Vec<u8>);

const WAYS: [(&str, Option<Harm>); 5] = [
    ("missing", None),
    ("empty", Some(Vec::clear)),
    ("truncated", Some(|bytes| bytes.truncate(bytes.len() / 2))),
    ("extended", Some(|bytes| bytes.push(0))),
    (
        "its contents flipped",
        Some(|bytes| {
            let at = 50.min(bytes.len() / 2);
            bytes[at] ^= 1;
        }),
    ),
];

fn harm(sample: &Sample, key: &str, way: Option<Harm>) {
    match way {
        None => assert!(sample.backend.remove(key, None).unwrap()),
        Some(way) => {
            let mut bytes = sample.backend.read(key, 64 * MIB).unwrap().unwrap();
            way(&mut bytes);
            sample.backend.replace(key, &bytes).unwrap();
        }
    }
}

#[test]
fn packs_and_manifests() {
    let sample = Sample::new();
    let whole = sample.commit("whole", 2);
    for (number, (way, change)) in (10..).zip(WAYS) {
        for kind in ["pack", "manifest"] {
            let before = sample.names_in("packs");
            let damaged = sample.commit("damaged", number);
            let key = match kind {
                "pack" => {
                    let new = sample.names_in("packs").into_iter().find(|pack| !before.contains(pack));
                    format!("packs/{}", new.unwrap())
                }
                _ => format!("snapshots/{damaged}.json"),
            };
            harm(&sample, &key, change);
            let what = format!("{kind} {way}");
            let store = sample.reopened();
            let report = store.check(ALL, &mut none).unwrap();
            let object = sample.backend.locate(&key);
            let named = report.problems.iter().any(|problem| problem.object == object);
            // What is not there, nobody misses by its name; the snapshot lacks it.
            assert_eq!(named, way != "missing", "{what}: {report:?}");
            let refused = sample.restores(&store, &damaged, number);
            if way == "missing" && kind == "manifest" {
                assert!(matches!(refused, Err(StoreError::Missing { .. })), "{what}: {refused:?}");
            } else {
                assert!(!report.is_sound(), "{what}: {report:?}");
                assert!(refused.unwrap_err().is_damage(), "{what}");
                store.remove(&damaged).unwrap();
            }
            sample.restores(&store, &whole, 2).unwrap();
            store.collect(CollectOptions::default(), &mut none).unwrap();
            if way == "missing" && kind == "manifest" {
                sample.backend.remove("names/pair/damaged", None).unwrap();
            }
        }
    }
    let report = sample.reopened().verify(&whole, &mut none).unwrap();
    assert!(report.is_sound(), "{report:?}");
}
