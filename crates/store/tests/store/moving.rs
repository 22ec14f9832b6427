//! Snapshots from store to store, wherever and whatever these are: only what is lacked is moved, and what is interrupted
//! goes on.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use diorama_store::*;

use crate::faulty::{Fault, Faulty, Switchboard};
use crate::place::{self, FAULT_STRIDE, WAYS};
use crate::sample::*;
use crate::scratch;

#[test]
fn only_what_the_other_store_lacks_is_moved() {
    for (from, to) in WAYS {
        moves_what_is_lacked(&from(), &to());
    }
}

fn moves_what_is_lacked(from: &Sample, to: &Sample) {
    let one = from.commit("one", 1);
    let two = from.commit("two", 2);
    let first = from.store.copy_to(&one, &to.store, None, &|| false, &mut none).unwrap();
    assert_eq!((first.new_chunks, first.was_there), (first.chunks, false));
    to.assert_whole(&one, 1);
    let mut moved = 0;
    let second = from.store.copy_to(&two, &to.store, None, &|| false, &mut |done, _| moved = done).unwrap();
    // Kernel, layers: there. Memory and state: new.
    assert!(second.new_chunks < second.chunks && second.new_bytes < first.new_bytes, "{first:?} {second:?}");
    assert!(moved > 150_000 && moved < 170_000, "{moved}");
    to.assert_whole(&two, 2);
    let mut nothing = |_, total| assert_eq!(total, 0);
    let again = from.store.copy_to(&two, &to.store, None, &|| false, &mut nothing).unwrap();
    assert_eq!((again.was_there, again.new_chunks, again.new_bytes), (true, 0, 0));
    // And back, into a store that has lost it.
    from.store.remove(&two).unwrap();
    from.store.collect(CollectOptions::default(), &mut none).unwrap();
    to.store.copy_to(&two, &from.store, None, &|| false, &mut none).unwrap();
    from.assert_whole(&two, 2);
    // A store of one's own is no other.
    assert!(from.store.copy_to(&two, &from.store, None, &|| false, &mut none).unwrap().was_there);
}

const FAULTS: [Fault; 3] = [Fault::Before, Fault::After, Fault::Dead];

/// Each operation of either store fails once; afterwards the same again succeeds. (Where not every position is tried, each
/// way has its own kind of fault.)
#[test]
fn an_interrupted_transfer_leaves_nothing_visible_and_goes_on() {
    for (number, (from, to)) in WAYS.into_iter().enumerate() {
        let from = from();
        let one = from.commit("one", 1);
        let others = if FAULT_STRIDE == 1 { 0..3 } else { number % 3..number % 3 + 1 };
        for fault in FAULTS[others].iter().copied() {
            for at_target in [true, false] {
                for position in (place::first_fault(number)..).step_by(FAULT_STRIDE) {
                    let to = to();
                    if !interrupted(&from, &to, &one, fault, at_target, position) {
                        assert!(position > 5, "{fault:?}: only {position} operations");
                        break;
                    }
                }
            }
        }
    }
}

/// Whether the fault happened.
fn interrupted(
    from: &Sample,
    to: &Sample,
    one: &SnapshotId,
    fault: Fault,
    at_target: bool,
    position: usize,
) -> bool {
    let board = Switchboard::new(fault);
    let [source, target] = [(from, !at_target), (to, at_target)].map(|(sample, is_faulty)| {
        let backend = Arc::clone(&sample.backend);
        if is_faulty {
            Store::open_in(Faulty::new(backend, &board), &sample.options).unwrap()
        } else {
            sample.reopened()
        }
    });
    board.arm(position);
    let copied = source.copy_to(one, &target, Some("copy"), &|| false, &mut none);
    drop((source, target));
    if !board.hit.load(Ordering::Relaxed) {
        copied.unwrap();
        return false;
    }
    let what =
        format!("{fault:?} at {position} of {}: {copied:?}", if at_target { "target" } else { "source" });
    // What fails after the manifest is there is no failure of it; a dead one is told nothing.
    let there = to.names_in("snapshots").len() == 1;
    assert!((fault == Fault::Dead && at_target) || copied.is_ok() == there, "{what}");
    place::let_time_pass(to);
    let store = to.reopened();
    assert!(store.check(ALL, &mut none).unwrap().is_sound(), "{what}");
    from.store.copy_to(one, &store, Some("copy"), &|| false, &mut none).unwrap();
    assert_eq!(store.resolve("pair/copy", None).unwrap(), *one, "{what}");
    to.assert_whole(one, 1);
    true
}

/// Most of it has come when it is stopped.
#[test]
fn what_has_been_moved_is_not_moved_again() {
    let ram = scratch::file();
    for part in 0..5 {
        use std::os::unix::fs::FileExt;
        ram.write_all_at(&noise(part, 20 * MIB as usize), part * 20 * MIB).unwrap();
    }
    // A hundred megabytes each: the others are no other in this.
    for (from, to) in WAYS.into_iter().take(2) {
        let (from, to) = (from(), to());
        let id = from.commit_memory(&from.store, "large", &ram, b"state");
        let (moved, all) = (Cell::new(0), Cell::new(0));
        let mut progress = |done, total| {
            moved.set(done);
            all.set(total);
        };
        let stop = || moved.get() > 90 * MIB;
        let stopped = from.store.copy_to(&id, &to.store, None, &stop, &mut progress);
        assert!(matches!(stopped, Err(StoreError::Stopped)), "{stopped:?}");
        assert_eq!(to.names_in("snapshots"), [""; 0]);
        place::let_time_pass(&to);
        let whole = all.get();
        let arrived = from.store.copy_to(&id, &to.store, None, &|| false, &mut progress).unwrap();
        assert!(!arrived.was_there && whole > 100 * MIB && all.get() < whole / 2, "{whole} {}", all.get());
        assert!(to.store.verify(&id, &mut none).unwrap().is_sound());
    }
}
