//! Collecting beside writers: nothing goes that anybody needs, and in the end all goes that nobody does.

use diorama_store::*;

use crate::place::STAGED_GOES;
use crate::sample::*;

fn collect(store: &Store) -> Collected {
    store.collect(CollectOptions::default(), &mut none).unwrap()
}

/// The writer found chunks of a snapshot that is removed before it commits.
#[test]
fn what_a_living_writer_relies_on_stays() {
    let sample = Sample::new();
    let old = sample.commit("old", 1);
    let other = sample.reopened();
    let writer = other.begin().unwrap();
    let manifest = sample.put_all(&writer, "new", 1).unwrap();
    assert_eq!(manifest.bytes.new, 0);
    sample.store.remove(&old).unwrap();
    let collected = collect(&sample.store);
    assert!(collected.deferred && collected.removed_packs == 0, "{collected:?}");
    assert!(!sample.names_in("doomed").is_empty());
    // Who begins now does not rely on what is doomed.
    let late = sample.reopened();
    let late_writer = late.begin().unwrap();
    let late_manifest = sample.put_all(&late_writer, "late", 1).unwrap();
    assert!(late_manifest.bytes.new > 150_000, "{:?}", late_manifest.bytes);
    drop(late_writer);
    let id = writer.commit(manifest).unwrap();
    let collected = collect(&sample.store);
    assert!(!collected.deferred, "{collected:?}");
    // What the late one has staged is left to this, where it did not go with it: perhaps instead of the doomed packs.
    assert!(collected.removed_packs == 0 || !STAGED_GOES, "{collected:?}");
    assert_eq!(sample.names_in("doomed"), [""; 0]);
    sample.restores(&sample.reopened(), &id, 1).unwrap();
}

#[test]
fn what_a_writer_gave_up_goes_next_time() {
    let sample = Sample::new();
    let old = sample.commit("old", 1);
    let writer = sample.store.begin().unwrap();
    sample.store.remove(&old).unwrap();
    assert!(collect(&sample.store).deferred);
    drop(writer);
    let collected = collect(&sample.reopened());
    assert!(!collected.deferred && collected.freed_bytes > 150_000, "{collected:?}");
    assert_eq!(sample.names_in("packs"), [""; 0]);
}

/// What both had is in one pack with what one had alone: that pack is written again without it.
#[test]
fn a_pack_of_which_little_is_needed_is_repacked() {
    let sample = Sample::new();
    let old = sample.commit("old", 1);
    let new = sample.commit("new", 2);
    sample.store.remove(&old).unwrap();
    let plan = sample.store.plan_collection(CollectOptions::default(), &mut none).unwrap();
    assert!(!plan.repack.is_empty() && plan.unused_bytes > 140_000, "{plan:?}");
    let lazy = CollectOptions { unused_percent_max: 100 };
    assert_eq!(sample.store.plan_collection(lazy, &mut none).unwrap().repack, []);
    let collected = collect(&sample.store);
    assert_eq!(collected.plan.repack, plan.repack);
    sample.restores(&sample.store, &new, 2).unwrap();
    sample.restores(&sample.reopened(), &new, 2).unwrap();
    let stats = sample.store.stats().unwrap();
    assert_eq!(stats.snapshots, 1);
    assert!(stats.unused_bytes.unwrap() * 100 <= stats.stored_bytes * 30, "{stats:?}");
    assert!(collect(&sample.store).plan.repack.is_empty());
}

#[test]
fn small_packs_are_joined() {
    let sample = Sample::new();
    let ids: Vec<(SnapshotId, u8)> = (1..=40).map(|n| (sample.commit(&format!("s{n}"), n), n)).collect();
    let packs = sample.names_in("packs").len();
    assert!(packs >= 64, "{packs}");
    collect(&sample.store);
    assert_eq!(sample.names_in("packs").len(), 2);
    let store = sample.reopened();
    for (id, seed) in ids {
        sample.restores(&store, &id, seed).unwrap();
    }
    assert!(store.check(ALL, &mut none).unwrap().is_sound());
}

/// What cannot be read may need anything: so nothing goes.
#[test]
fn nothing_goes_while_a_manifest_cannot_be_read() {
    let sample = Sample::new();
    let gone = sample.commit("gone", 1);
    let damaged = sample.commit("damaged", 2);
    sample.store.remove(&gone).unwrap();
    sample.backend.replace(&format!("snapshots/{damaged}.json"), b"{}").unwrap();
    let packs = sample.names_in("packs");
    let refused = sample.store.collect(CollectOptions::default(), &mut none);
    assert!(matches!(refused, Err(StoreError::CannotCollect { .. })), "{refused:?}");
    assert_eq!(sample.names_in("packs"), packs);
    sample.store.remove(&damaged).unwrap();
    collect(&sample.store);
    assert_eq!(sample.names_in("packs"), [""; 0]);
}
