//! One network's books: every copy by its sender's colour and its fate, so that any recent cut can be balanced.
//!
//! Owns counters only, each counted where its event happens. None is the remainder of others: what is queued is not
//! even counted here, but found by walking the queues. So a lost copy shows as `unaccounted`.
//!
//! Between hosts, the unit is one frame on the wire. A sender's host owes one copy to each host that shall replicate the
//! frame; that copy's fate is to be dropped, or to be *passed on*. A receiver's host owes as many copies as it makes of a
//! frame that *arrived*. The arrived copy has been counted as sent by its sender's host already, so `sent_before` is what
//! is owed here less what arrived. Per host, `owed = delivered + dropped + waiting + passed on`; summed over all hosts,
//! what was passed on and did not arrive is what the wire lost, which receivers learn from senders and state as such.
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
/// Sums of several networks balance as well: add them. A network that spans hosts balances when all hosts' parts are
/// added: [`Accounting::unaccounted`] of the sum. Each part for itself has [`Accounting::unaccounted_here`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accounting {
    /// Copies owed by senders that had not been cut. A frame for several machines of another host is one copy where it
    /// is sent, and what replicating it adds where it arrives.
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
    /// Frames passed on to other hosts by senders that had not been cut. No part of [`Accounting::unaccounted`].
    pub passed_on: u64,
    /// Frames that arrived from other hosts, of senders that had not been cut. No part of [`Accounting::unaccounted`].
    pub arrived: u64,
}

impl Accounting {
    /// Copies without a known fate. Not 0: the snapshot would lose frames (or, below 0, deliver some twice). For a
    /// network that spans hosts this says something only of all hosts' sum.
    pub fn unaccounted(&self) -> i64 {
        let known = self.delivered_before + self.in_flight + self.dropped.total() + self.pending;
        self.sent_before.wrapping_sub(known) as i64
    }

    /// Copies without a known fate on this host, whatever happened between hosts. 0 on every host, or there is a defect
    /// there (or, as above, something crossed the cut unrecorded).
    pub fn unaccounted_here(&self) -> i64 {
        let received_or_lost = (self.arrived + self.dropped.wire_loss) as i64;
        self.unaccounted().wrapping_add(received_or_lost).wrapping_sub(self.passed_on as i64)
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
            passed_on: self.passed_on + other.passed_on,
            arrived: self.arrived + other.arrived,
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

/// One network's frames between this host and one other, as one cut divides them. Cumulative over the switch's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelCounts {
    /// Frames passed on to the peer whose colour is older than the cut. Final once every port has passed the cut.
    pub sent: u64,
    /// Frames that arrived from the peer whose colour is older than the cut.
    pub received: u64,
    /// Frames from the peer that were found lost when the channel was last closed; they are not in `received` and never
    /// will be.
    pub lost: u64,
}

/// One network's frames between this host and one other, by colour.
#[derive(Clone, Copy, Debug, Default)]
struct Channel {
    passed_on: [u64; COLOURS],
    arrived: [u64; COLOURS],
    /// What of the colours below `closed` had not come when that cut was over.
    lost: u64,
    /// No frame of a colour below this is let in any more.
    closed: Epoch,
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
    /// By channel, as [`Ledger::add_channel`] numbers them.
    channels: Vec<Channel>,
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
            channels: Vec::new(),
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

    /// The books of frames between this host and one more; returns their number.
    pub(crate) fn add_channel(&mut self) -> usize {
        self.channels.push(Channel::default());
        self.channels.len() - 1
    }

    /// An owed copy was passed on to another host.
    #[inline]
    pub(crate) fn pass_on(&mut self, channel: usize, colour: Epoch) {
        let slot = self.slot(colour);
        self.channels[channel].passed_on[slot] += 1;
    }

    /// A frame came from another host, unless it comes after its channel was closed for its colour.
    #[inline]
    pub(crate) fn arrive(&mut self, channel: usize, colour: Epoch) -> bool {
        if colour < self.channels[channel].closed {
            return false;
        }
        let slot = self.slot(colour);
        self.channels[channel].arrived[slot] += 1;
        true
    }

    /// What `cut` divides of a channel; None if its colours have been folded.
    pub(crate) fn channel(&self, channel: usize, cut: Epoch) -> Option<ChannelCounts> {
        let before = self.slots_before(cut)?;
        let Channel { passed_on, arrived, lost, .. } = &self.channels[channel];
        Some(ChannelCounts {
            sent: passed_on[..before].iter().sum(),
            received: arrived[..before].iter().sum(),
            lost: *lost,
        })
    }

    /// What of `sent` frames of colours below `cut` has not come is lost from now on.
    pub(crate) fn close_channel(&mut self, channel: usize, cut: Epoch, sent: u64) -> Option<u64> {
        let ChannelCounts { received, .. } = self.channel(channel, cut)?;
        let channel = &mut self.channels[channel];
        if cut < channel.closed {
            return None;
        }
        channel.closed = cut;
        channel.lost = sent.saturating_sub(received);
        Some(channel.lost)
    }

    /// Begins the channel's counts anew: what was passed on is struck from the books, and what arrived is from now on as
    /// if it had been sent here.
    pub(crate) fn restart_channel(&mut self, channel: usize) {
        let Channel { passed_on, .. } = std::mem::take(&mut self.channels[channel]);
        for (owed, struck) in self.owed.iter_mut().zip(passed_on) {
            *owed -= struck;
        }
    }

    /// The books at `cut`, or None if its colours have been folded. `queued` gives colour and `recorded_in` of every
    /// copy that waits.
    pub(crate) fn accounting(
        &self,
        cut: Epoch,
        queued: impl Iterator<Item = (Epoch, u32)>,
    ) -> Option<Accounting> {
        let before = self.slots_before(cut)?;
        if self.channels.iter().any(|channel| cut < channel.closed) {
            return None;
        }
        let crossed: u64 = self.delivered[..before].iter().flat_map(|row| &row[before..self.used]).sum();
        let recorded = if self.recorded.cut == cut { self.recorded } else { RecordedCopies::default() };

        let mut dropped = [0; DropReason::COUNT];
        for (sum, by_colour) in dropped.iter_mut().zip(&self.dropped) {
            *sum = by_colour[..before].iter().sum();
        }
        let mut dropped = Dropped::from_counts(dropped);
        let (mut passed_on, mut arrived) = (0, 0);
        for channel in &self.channels {
            passed_on += channel.passed_on[..before].iter().sum::<u64>();
            arrived += channel.arrived[..before].iter().sum::<u64>();
            dropped.wire_loss += channel.lost;
        }
        let holds = |recorded_in: u32| recorded.serial != 0 && recorded_in == recorded.serial;
        Some(Accounting {
            sent_before: self.owed[..before].iter().sum::<u64>() - arrived,
            delivered_before: self.delivered[..before].iter().flat_map(|row| &row[..before]).sum(),
            in_flight: recorded.copies,
            dropped: without(dropped, recorded.dropped),
            pending: queued.filter(|&(colour, recorded_in)| colour < cut && !holds(recorded_in)).count()
                as u64,
            unrecorded: crossed - recorded.delivered,
            passed_on,
            arrived,
        })
    }

    pub(crate) fn total_owed(&self) -> u64 {
        self.owed.iter().sum()
    }

    pub(crate) fn total_delivered(&self) -> u64 {
        self.delivered.iter().flatten().sum()
    }

    pub(crate) fn total_passed_on(&self) -> u64 {
        self.channels.iter().flat_map(|channel| channel.passed_on).sum()
    }

    pub(crate) fn total_arrived(&self) -> u64 {
        self.channels.iter().flat_map(|channel| channel.arrived).sum()
    }

    pub(crate) fn total_dropped(&self) -> Dropped {
        let mut dropped = Dropped::from_counts(self.dropped.map(|by_colour| by_colour.iter().sum()));
        dropped.wire_loss += self.channels.iter().map(|channel| channel.lost).sum::<u64>();
        dropped
    }

    /// How many slots are older than `cut`; None if that is not told apart any more.
    fn slots_before(&self, cut: Epoch) -> Option<usize> {
        let before = self.colours[..self.used].partition_point(|&colour| colour < cut);
        (cut > self.colours[0]).then_some(before)
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
        for channel in &mut self.channels {
            insert(&mut channel.passed_on, at, 0);
            insert(&mut channel.arrived, at, 0);
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
        for channel in &mut self.channels {
            channel.passed_on[0] += remove(&mut channel.passed_on, 1);
            channel.arrived[0] += remove(&mut channel.arrived, 1);
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
    fn folding_keeps_what_channels_counted() {
        let mut ledger = Ledger::new(Epoch(0));
        let channels = [ledger.add_channel(), ledger.add_channel()];
        for colour in [0, 9, 3, 12, 6, 15, 18, 21, 24, 27, 30, 33] {
            for n in 0..=u64::from(colour) {
                ledger.owe(Epoch(colour), 1);
                ledger.pass_on(channels[(n % 2) as usize], Epoch(colour));
                assert!(ledger.arrive(channels[0], Epoch(colour)));
            }
        }
        let total: u64 = (0..12).map(|n| 3 * n + 1).sum();
        assert_eq!((ledger.total_passed_on(), ledger.total_arrived()), (total, total));
        let counts = channels.map(|channel| ledger.channel(channel, Epoch(34)).unwrap());
        assert_eq!(
            (counts[0].sent + counts[1].sent, counts[0].received, counts[1].received),
            (total, total, 0)
        );
        assert_eq!(ledger.channel(channels[0], Epoch(31)).unwrap().received, total - 34);
        assert_eq!(ledger.channel(channels[0], Epoch(3)), None);
        ledger.restart_channel(channels[0]);
        ledger.restart_channel(channels[1]);
        assert_eq!(ledger.total_owed(), 0);
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
