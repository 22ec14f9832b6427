//! Every operation of the backend fails once, at each position of create, remove and collect. Afterwards a check is
//! clean, every committed snapshot restores, and going on works.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use diorama_store::*;

use crate::faulty::{Fault, Faulty, Switchboard};
use crate::place::{self, FAULT_STRIDE};
use crate::sample::*;

/// What is made before, in which the last snapshot stays; and what is then done.
#[derive(Clone, Copy)]
pub struct Case {
    pub prepare: fn(&Sample) -> Vec<(SnapshotId, u8)>,
    pub work: fn(&Sample, &Store) -> Result<(), StoreError>,
}

/// Runs `work` with the fault at every position, until it is so late that it does not happen.
fn at_every_position(Case { prepare, work }: Case) {
    let plain: Make = Sample::new;
    let kinds = [
        (Fault::Before, plain),
        (Fault::After, plain),
        (Fault::Dead, plain),
        (Fault::After, Sample::signing),
        (Fault::Before, Sample::signing),
    ];
    for (number, (fault, make)) in kinds.into_iter().enumerate() {
        for position in (place::first_fault(number)..).step_by(FAULT_STRIDE) {
            let sample = make();
            let before = prepare(&sample);
            let board = Switchboard::new(fault);
            let faulty = Faulty::new(Arc::clone(&sample.backend), &board);
            let faulty = Store::open_in(faulty, &sample.options).unwrap();
            board.arm(position);
            let result = work(&sample, &faulty);
            drop(faulty);
            if !board.hit.load(Ordering::Relaxed) {
                result.unwrap();
                assert!(position > 5, "{fault:?}: only {position} operations");
                break;
            }
            assert_whole(&sample, &before, &format!("{fault:?} at {position}"));
        }
    }
}

/// Nothing is damaged or lost, and going on works.
pub fn assert_whole(sample: &Sample, before: &[(SnapshotId, u8)], what: &str) {
    place::let_time_pass(sample);
    let store = sample.reopened();
    let whole = |store: &Store, when: &str| {
        let report = store.check(ALL, &mut none).unwrap();
        assert!(report.is_sound(), "{what}, {when}: {report:#?}");
        for summary in store.list().unwrap() {
            let entry = summary.entry().unwrap();
            let seed =
                if entry.name == "new" { 9 } else { before.iter().find(|b| b.0 == entry.id).unwrap().1 };
            sample.restores(store, &entry.id, seed).unwrap();
        }
    };
    whole(&store, "at once");
    assert!(before.last().is_none_or(|(id, _)| store.load(id).is_ok()), "{what}: a snapshot is lost");
    let collected = store.collect(CollectOptions::default(), &mut none).unwrap();
    assert!(!collected.deferred, "{what}: {collected:?}");
    whole(&store, "collected");
    let plan = store.plan_collection(CollectOptions::default(), &mut none).unwrap();
    assert!(plan.remove.is_empty() && plan.repack.is_empty() && plan.spare.is_empty(), "{what}: {plan:?}");
    assert_eq!(sample.names_in("doomed"), [""; 0], "{what}");
    assert_eq!(sample.names_in("incoming"), [""; 0], "{what}");
    // The name is free, unless the snapshot is there.
    if store.find_name("pair", "new").unwrap().is_none() {
        let writer = store.begin().unwrap();
        let manifest = sample.put_all(&writer, "new", 9).unwrap();
        writer.commit(manifest).unwrap();
    }
    whole(&store, "gone on");
}

pub const CREATE: Case = Case {
    prepare: |sample| vec![(sample.commit("old", 1), 1)],
    work: |sample, store| {
        let writer = store.begin()?;
        let manifest = sample.put_all(&writer, "new", 9)?;
        writer.commit(manifest).map(drop)
    },
};

pub const REMOVE: Case = Case {
    prepare: |sample| vec![(sample.commit("old", 1), 1), (sample.commit("other", 2), 2)],
    work: |_, store| {
        let id = store.resolve("old", None)?;
        store.remove(&id)
    },
};

/// Packs that go, that are repacked, and that were doomed already and are needed.
pub const COLLECT: Case = Case {
    prepare: |sample| {
        let gone = sample.commit("gone", 3);
        let kept = sample.commit("kept", 1);
        let both = sample.commit("both", 3);
        sample.store.remove(&gone).unwrap();
        let alone = sample.commit("alone", 4);
        sample.store.remove(&alone).unwrap();
        sample.store.remove(&both).unwrap();
        let pack = sample.names_in("packs").remove(0);
        sample.backend.create(&format!("doomed/{pack}"), b"").unwrap();
        vec![(kept, 1)]
    },
    work: |_, store| store.collect(CollectOptions::default(), &mut none).map(drop),
};

#[test]
fn create() {
    at_every_position(CREATE);
}

#[test]
fn remove() {
    at_every_position(REMOVE);
}

#[test]
fn collect() {
    at_every_position(COLLECT);
}
