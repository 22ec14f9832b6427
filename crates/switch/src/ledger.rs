//! One network's books: every copy by its sender's colour and its fate, so that any recent cut can be balanced.
//!
//! Owns counters only, each counted where its event happens. None is the remainder of others: what is queued is not
//! even counted here, but found by walking the queues. So a lost copy shows as `unaccounted`.
//!
//! Only the newest [`COLOURS`] colours are told apart; older ones are folded into the oldest. That bounds the memory,
//! and the price is that a cut as old as a folded colour cannot be balanced any more.
//!
//! Invariants: `colours[..used]` ascends strictly. Slot i > 0 holds exactly colour `colours[i]`; slot 0 holds
//! `colours[0]` and everything older. `delivered[s][r]` is 0 for s > r (the rule of colours).

use std::{
    iter::Sum,
    ops::{Add, AddAssign},
};

use crate::{
    Epoch,
    counters::{DropReason, Dropped},
};

/// Colours told apart. A cut takes well under a second and environments cut one at a time, so two are alive in
/// practice; eight leave room for a machine that stayed behind through several aborted cuts.
const COLOURS: usize = 8;

/// The frame conservation of one network at one cut, in copies per receiver.
///
/// Sums of several networks, or of several hosts' parts of one network, balance as well: add them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accounting {
    /// Copies owed by senders that had not been cut.
    pub sent_before: u64,
    /// Copies delivered to receivers that had not been cut.
    pub delivered_before: u64,
    /// Copies recorded as in flight at this cut.
    pub in_flight: u64,
    /// Copies of `sent_before` that were dropped and are in no recording of this cut.
    pub dropped: Dropped,
    /// Copies of `sent_before` that still wait and have not been recorded: at receivers that are not cut or not
    /// released yet. 0 once the cut is over.
    pub pending: u64,
    /// Copies that crossed the cut forwards without being recorded, because nothing recorded or the recording was full.
    /// A snapshot of this cut would lack them, so they are part of what is unaccounted.
    pub unrecorded: u64,
}

impl Accounting {
    /// Copies without a known fate. Not 0: the snapshot would lose frames (or, below 0, deliver some twice).
    pub fn unaccounted(&self) -> i64 {
        let known = self.delivered_before + self.in_flight + self.dropped.total() + self.pending;
        self.sent_before.wrapping_sub(known) as i64
    }
}

impl Add for Accounting {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            sent_before: self.sent_before + other.sent_before,
            delivered_before: self.delivered_before + other.delivered_before,
            in_flight: self.in_flight + other.in_flight,
            dropped: self.dropped + other.dropped,
            pending: self.pending + other.pending,
            unrecorded: self.unrecorded + other.unrecorded,
        }
    }
}

impl AddAssign for Accounting {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Accounting {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

/// The copies that one recording holds, and what became of them since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RecordedCopies {
    /// The recording's serial number; see `Queued::recorded_in`.
    pub(crate) serial: u32,
    pub(crate) cut: Epoch,
    pub(crate) copies: u64,
    pub(crate) delivered: u64,
    pub(crate) dropped: Dropped,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    colours: [Epoch; COLOURS],
    used: usize,
    /// By sender's colour.
    owed: [u64; COLOURS],
    /// By sender's colour and receiver's epoch at delivery.
    delivered: [[u64; COLOURS]; COLOURS],
    /// By reason and sender's colour.
    dropped: [[u64; COLOURS]; DropReason::COUNT],
    /// The latest recording's, kept after its end.
    pub(crate) recorded: RecordedCopies,
}

impl Ledger {
    /// Books of an environment that begins at `epoch`. Older colours are folded from the start: only frames replayed
    /// from a snapshot have them.
    pub(crate) fn new(epoch: Epoch) -> Self {
        let mut ledger = Self {
            colours: [epoch; COLOURS],
            used: 1,
            owed: [0; COLOURS],
            delivered: [[0; COLOURS]; COLOURS],
            dropped: [[0; COLOURS]; DropReason::COUNT],
            recorded: RecordedCopies::default(),
        };
        if let Some(before) = epoch.0.checked_sub(1) {
            ledger.colours[0] = Epoch(before);
            ledger.used = 2;
        }
        ledger
    }

    #[inline]
    pub(crate) fn owe(&mut self, colour: Epoch, copies: u64) {
        let slot = self.slot(colour);
        self.owed[slot] += copies;
    }

    /// A copy was delivered. `recorded_in` is the serial number of the last recording that holds it.
    #[inline]
    pub(crate) fn deliver(&mut self, colour: Epoch, receiver: Epoch, recorded_in: u32) {
        let (s, r) = self.slots(colour, receiver);
        debug_assert!(s <= r, "colour {colour} delivered at epoch {receiver}");
        self.delivered[s][r] += 1;
        if recorded_in != 0 && recorded_in == self.recorded.serial {
            self.recorded.delivered += 1;
        }
    }

    pub(crate) fn drop(&mut self, colour: Epoch, reason: DropReason, recorded_in: u32) {
        let slot = self.slot(colour);
        self.dropped[reason as usize][slot] += 1;
        if recorded_in != 0 && recorded_in == self.recorded.serial {
            *self.recorded.dropped.of_mut(reason) += 1;
        }
    }

    /// The books at `cut`, or None if its colours have been folded. `queued` gives colour and `recorded_in` of every
    /// copy that waits.
    pub(crate) fn accounting(
        &self,
        cut: Epoch,
        queued: impl Iterator<Item = (Epoch, u32)>,
    ) -> Option<Accounting> {
        if cut <= self.colours[0] {
            return None;
        }
        let before = self.colours[..self.used].partition_point(|&colour| colour < cut);
        let crossed: u64 = self.delivered[..before].iter().flat_map(|row| &row[before..self.used]).sum();
        let recorded = if self.recorded.cut == cut { self.recorded } else { RecordedCopies::default() };

        let mut dropped = [0; DropReason::COUNT];
        for (sum, by_colour) in dropped.iter_mut().zip(&self.dropped) {
            *sum = by_colour[..before].iter().sum();
        }
        let holds = |recorded_in: u32| recorded.serial != 0 && recorded_in == recorded.serial;
        Some(Accounting {
            sent_before: self.owed[..before].iter().sum(),
            delivered_before: self.delivered[..before].iter().flat_map(|row| &row[..before]).sum(),
            in_flight: recorded.copies,
            dropped: without(Dropped::from_counts(dropped), recorded.dropped),
            pending: queued.filter(|&(colour, recorded_in)| colour < cut && !holds(recorded_in)).count()
                as u64,
            unrecorded: crossed - recorded.delivered,
        })
    }

    pub(crate) fn total_owed(&self) -> u64 {
        self.owed.iter().sum()
    }

    pub(crate) fn total_delivered(&self) -> u64 {
        self.delivered.iter().flatten().sum()
    }

    pub(crate) fn total_dropped(&self) -> Dropped {
        Dropped::from_counts(self.dropped.map(|by_colour| by_colour.iter().sum()))
    }

    #[inline]
    fn slot(&mut self, colour: Epoch) -> usize {
        let newest = self.used - 1;
        if self.colours[newest] == colour {
            return newest;
        }
        self.open_slot(colour);
        self.find(colour)
    }

    #[inline]
    fn slots(&mut self, a: Epoch, b: Epoch) -> (usize, usize) {
        let newest = self.used - 1;
        if self.colours[newest] == a && a == b {
            return (newest, newest);
        }
        // Opening one slot can move the other: open both, then look.
        self.open_slot(a);
        self.open_slot(b);
        (self.find(a), self.find(b))
    }

    /// The slot of a colour that has one.
    fn find(&self, colour: Epoch) -> usize {
        self.colours[..self.used].partition_point(|&c| c < colour)
    }

    fn open_slot(&mut self, colour: Epoch) {
        if colour <= self.colours[0] || self.colours[..self.used].contains(&colour) {
            return;
        }
        if self.used == COLOURS {
            self.fold_oldest();
            if colour <= self.colours[0] {
                return;
            }
        }
        let at = self.find(colour);
        insert(&mut self.colours, at, colour);
        insert(&mut self.owed, at, 0);
        insert(&mut self.delivered, at, [0; COLOURS]);
        for row in self.delivered.iter_mut().chain(&mut self.dropped) {
            insert(row, at, 0);
        }
        self.used += 1;
    }

    /// Merges slot 1 into slot 0.
    fn fold_oldest(&mut self) {
        let folded = remove(&mut self.colours, 1);
        self.colours[0] = folded;
        self.owed[0] += remove(&mut self.owed, 1);
        let row = remove(&mut self.delivered, 1);
        for (into, count) in self.delivered[0].iter_mut().zip(row) {
            *into += count;
        }
        for row in self.delivered.iter_mut().chain(&mut self.dropped) {
            row[0] += remove(row, 1);
        }
        self.used -= 1;
    }
}

fn without(all: Dropped, part: Dropped) -> Dropped {
    Dropped {
        queue_full: all.queue_full - part.queue_full,
        link_loss: all.link_loss - part.link_loss,
        wire_loss: all.wire_loss - part.wire_loss,
        no_receiver: all.no_receiver - part.no_receiver,
        cut_drop: all.cut_drop - part.cut_drop,
    }
}

/// Inserts at `at`; the last element, which must be unused, falls out.
fn insert<T: Copy>(array: &mut [T; COLOURS], at: usize, value: T) {
    array.copy_within(at..COLOURS - 1, at + 1);
    array[at] = value;
}

/// Removes `at` and leaves a default at the end.
fn remove<T: Copy + Default>(array: &mut [T; COLOURS], at: usize) -> T {
    let removed = array[at];
    array.copy_within(at + 1.., at);
    array[COLOURS - 1] = T::default();
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balance(ledger: &Ledger, cut: u32) -> Option<Accounting> {
        ledger.accounting(Epoch(cut), std::iter::empty())
    }

    #[test]
    fn a_delivery_counts_on_the_side_of_the_cut_where_its_receiver_was() {
        let mut ledger = Ledger::new(Epoch(0));
        ledger.owe(Epoch(0), 3);
        ledger.owe(Epoch(1), 1);
        ledger.deliver(Epoch(0), Epoch(0), 0);
        ledger.deliver(Epoch(0), Epoch(1), 0);
        ledger.drop(Epoch(0), DropReason::QueueFull, 0);
        ledger.deliver(Epoch(1), Epoch(1), 0);
        let one = balance(&ledger, 1).unwrap();
        assert_eq!(
            (one.sent_before, one.delivered_before, one.dropped.queue_full, one.unrecorded),
            (3, 1, 1, 1)
        );
        assert_eq!(one.unaccounted(), 1, "nothing recorded the copy that crossed");
        let two = balance(&ledger, 2).unwrap();
        assert_eq!((two.sent_before, two.delivered_before, two.unaccounted()), (4, 3, 0));
        assert_eq!(balance(&ledger, 0), None);
    }

    #[test]
    fn a_lost_copy_shows() {
        let mut ledger = Ledger::new(Epoch(4));
        ledger.owe(Epoch(4), 2);
        ledger.deliver(Epoch(4), Epoch(4), 0);
        assert_eq!(balance(&ledger, 5).unwrap().unaccounted(), 1);
        ledger.deliver(Epoch(4), Epoch(4), 0);
        ledger.deliver(Epoch(4), Epoch(4), 0);
        assert_eq!(balance(&ledger, 5).unwrap().unaccounted(), -1);
    }

    #[test]
    fn folding_keeps_every_later_cut_exact() {
        // Every pair of colours s <= r delivers once, in an order that opens slots in the middle.
        let mut ledger = Ledger::new(Epoch(0));
        for r in (0..40u32).map(|i| i * 3) {
            for s in (0..=r).rev() {
                ledger.owe(Epoch(s), 1);
                ledger.deliver(Epoch(s), Epoch(r), 0);
            }
        }
        assert_eq!(ledger.total_owed(), ledger.total_delivered());
        let oldest = ledger.colours[0].0;
        assert_eq!(balance(&ledger, oldest), None);
        for cut in oldest + 1..125 {
            let got = balance(&ledger, cut).unwrap();
            let pairs = (0..40u32).map(|i| i * 3).flat_map(|r| (0..=r).map(move |s| (s, r)));
            assert_eq!(got.sent_before, pairs.clone().filter(|&(s, _)| s < cut).count() as u64, "cut {cut}");
            assert_eq!(
                got.delivered_before,
                pairs.clone().filter(|&(_, r)| r < cut).count() as u64,
                "cut {cut}"
            );
            assert_eq!(
                got.unrecorded,
                pairs.filter(|&(s, r)| s < cut && cut <= r).count() as u64,
                "cut {cut}"
            );
        }
    }

    #[test]
    fn a_recorded_copy_is_in_flight_whatever_becomes_of_it() {
        let mut ledger = Ledger::new(Epoch(0));
        ledger.recorded = RecordedCopies { serial: 9, cut: Epoch(1), copies: 3, ..Default::default() };
        ledger.owe(Epoch(0), 3);
        ledger.deliver(Epoch(0), Epoch(1), 9);
        ledger.drop(Epoch(0), DropReason::NoReceiver, 9);
        let queued = [(Epoch(0), 9), (Epoch(1), 0)];
        let one = ledger.accounting(Epoch(1), queued.into_iter()).unwrap();
        let expected = Accounting { sent_before: 3, in_flight: 3, ..Default::default() };
        assert_eq!((one, one.unaccounted()), (expected, 0));
        let two = ledger.accounting(Epoch(2), queued.into_iter()).unwrap();
        assert_eq!((two.delivered_before, two.dropped.no_receiver, two.pending), (1, 1, 2));
    }
}
