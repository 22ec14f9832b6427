//! One port: its epoch, its holds, its queue, and what happens to a copy that is owed to it.
//!
//! States, apart from the epoch, are two independent facts: connected or not, and the set of holds.
//!
//! ```text
//! not connected   every copy is dropped (no_receiver); the queue is empty
//! connected       copies queue; written unless held
//!   held (Pause)  queued copies wait for long: the queue's normal bound holds
//!   held (Cut)    queued copies wait for milliseconds: HELD_FACTOR times the bound; crossing copies are recorded
//!                 when this hold ends (a partly written one at the cut instant, since its rest may go before)
//! ```
//!
//! Invariants: the queue's invariants at this port's epoch; an unconnected port's queue is empty; the epoch and
//! `cut_at` change together, only while held for a cut, and the epoch only upwards.

use crate::{
    Epoch, NetworkId, PortId, Time,
    counters::{DropReason, PortCounters},
    ledger::Ledger,
    queue::{Keep, Queue, Queued},
    recorder::{DEFAULT_RECORDING_BYTES, InFlight, Recorder},
};

/// How many times its normal bound a queue may take while its port is held for a cut, or waits for one. A cut lasts
/// milliseconds; four times the bound is what a sender that fills the queue at once can send again in some of those.
pub(crate) const HELD_FACTOR: usize = 4;

/// Why a port is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hold {
    /// Its machine is being cut. Lasts milliseconds: the queue may grow to four times its bound.
    Cut,
    /// Its machine is paused by its user, or not running yet. May last for ever: the queue keeps its bound.
    Pause,
}

/// A port's epoch was not advanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    /// A cut needs the port to be held for it.
    #[error("{port} is not held for a cut")]
    NotHeld {
        /// The port.
        port: PortId,
    },
    /// Epochs never go back.
    #[error("{port} has passed cut {current}; it cannot go back to {requested}")]
    Backwards {
        /// The port.
        port: PortId,
        /// Where it is.
        current: Epoch,
        /// Where it should have gone.
        requested: Epoch,
    },
}

/// What ports report to the switch's user, and the recording in progress: the state that all ports share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Ports with `dirty` set, each once.
    pub(crate) dirty: Vec<PortId>,
    /// Ports with `wanted_listed` set, each once.
    pub(crate) wanted: Vec<PortId>,
    pub(crate) recorder: Option<Recorder>,
}

/// A copy on its way into a queue.
#[derive(Clone, Copy)]
pub(crate) struct Offered<'a> {
    pub(crate) frame: &'a [u8],
    pub(crate) colour: Epoch,
    pub(crate) now: Time,
}

#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) id: PortId,
    pub(crate) network: NetworkId,
    /// Its number within the network.
    pub(crate) local: u32,
    pub(crate) connected: bool,
    pub(crate) epoch: Epoch,
    pub(crate) dirty: bool,
    pub(crate) wanted_listed: bool,
    pub(crate) queue: Queue,
    pub(crate) counters: PortCounters,
    cut_at: Time,
    held_for_cut: Option<Time>,
    held_for_pause: Option<Time>,
    /// The newest colour for which a cut was wanted here.
    wanted: Epoch,
    queue_bytes: usize,
}

impl Port {
    pub(crate) fn new(id: PortId, network: NetworkId, local: u32, epoch: Epoch, queue_bytes: usize) -> Self {
        Self {
            id,
            network,
            local,
            connected: false,
            epoch,
            dirty: false,
            wanted_listed: false,
            queue: Queue::default(),
            counters: PortCounters::default(),
            cut_at: Time(0),
            held_for_cut: None,
            held_for_pause: None,
            wanted: epoch,
            queue_bytes,
        }
    }

    pub(crate) fn is_held(&self) -> bool {
        self.held_for_cut.is_some() || self.held_for_pause.is_some()
    }

    #[inline]
    pub(crate) fn is_writable(&self) -> bool {
        if self.is_held() { self.queue.mid_frame() } else { self.queue.has_open() }
    }

    #[inline]
    pub(crate) fn writable(&self) -> [&[u8]; 2] {
        if self.is_held() { self.queue.rest_of_head() } else { self.queue.open() }
    }

    /// The normal bound, or the raised one where copies wait for a cut. In encoded bytes.
    #[inline]
    pub(crate) fn limit(&self) -> usize {
        if self.held_for_cut.is_some() || self.queue.is_blocked() {
            self.queue_bytes * HELD_FACTOR
        } else {
            self.queue_bytes
        }
    }

    /// Takes an owed copy: queues, records or drops it. True if it is queued.
    #[inline]
    pub(crate) fn offer(
        &mut self,
        offered: Offered<'_>,
        limit: usize,
        ledger: &mut Ledger,
        shared: &mut Shared,
    ) -> bool {
        let Offered { frame, colour, now } = offered;
        if !self.connected {
            self.drop_copy(colour, DropReason::NoReceiver, ledger);
            return false;
        }
        let crosses = self.held_for_cut.is_none()
            && shared.recorder.as_ref().is_some_and(|recorder| recorder.crosses(colour, self.epoch));
        if crosses && shared.recorder.as_ref().is_some_and(|recorder| recorder.policy() == InFlight::Drop) {
            self.drop_copy(colour, DropReason::CutDrop, ledger);
            return false;
        }
        let queued = Queued { colour, len: frame.len() as u32, recorded_in: 0, enqueued: now };
        if !self.queue.push(frame, queued, colour <= self.epoch, limit) {
            self.drop_copy(colour, DropReason::QueueFull, ledger);
            return false;
        }
        self.counters.peak_queued_bytes = self.counters.peak_queued_bytes.max(self.queue.bytes() as u64);
        if crosses {
            self.record_last(frame, ledger, shared);
        }
        if colour > self.epoch {
            self.want_cut(colour, shared);
        } else {
            self.mark_dirty(shared);
        }
        true
    }

    /// The socket took `count` of the writable bytes.
    #[inline]
    pub(crate) fn written(&mut self, count: usize, now: Time, ledger: &mut Ledger) {
        let Self { queue, counters, epoch, .. } = self;
        queue.written(count, self.queue_bytes, |frame| {
            ledger.deliver(frame.colour, *epoch, frame.recorded_in);
            counters.delivered_frames += 1;
            counters.delivered_bytes += u64::from(frame.len);
            counters.longest_wait_ns = counters.longest_wait_ns.max(now.since_ns(frame.enqueued));
        });
    }

    /// Disconnecting drops what waits: whoever connects next starts at a frame's beginning, and is not owed the old.
    pub(crate) fn set_connected(&mut self, connected: bool, ledger: &mut Ledger) {
        self.connected = connected;
        if !connected {
            let dropped = &mut self.counters.dropped.no_receiver;
            self.queue.clear(|frame| {
                *dropped += 1;
                ledger.drop(frame.colour, DropReason::NoReceiver, frame.recorded_in);
            });
        }
    }

    pub(crate) fn hold(&mut self, hold: Hold, now: Time) {
        self.held_since(hold).get_or_insert(now);
    }

    /// Ends one hold; returns how long it lasted, in nanoseconds, or None if there was none.
    pub(crate) fn release(
        &mut self,
        hold: Hold,
        now: Time,
        ledger: &mut Ledger,
        shared: &mut Shared,
    ) -> Option<u64> {
        let since = self.held_since(hold).take()?;
        if hold == Hold::Cut {
            self.settle(ledger, shared);
        }
        self.mark_dirty(shared);
        Some(now.since_ns(since))
    }

    /// The machine's cut instant. Advancing to the present epoch again changes nothing.
    pub(crate) fn advance(
        &mut self,
        to: Epoch,
        now: Time,
        ledger: &mut Ledger,
        shared: &mut Shared,
    ) -> Result<(), EpochError> {
        if self.held_for_cut.is_none() {
            return Err(EpochError::NotHeld { port: self.id });
        }
        if to < self.epoch {
            return Err(EpochError::Backwards { port: self.id, current: self.epoch, requested: to });
        }
        if to > self.epoch {
            self.epoch = to;
            self.cut_at = now;
            self.queue.reopen(to);
            self.settle(ledger, shared);
        }
        Ok(())
    }

    /// Records, or drops, the queued copies that cross the cut being recorded. While the port is held for a cut that
    /// is only the partly written one: its rest may be delivered before the hold ends, and of what QEMU has of it
    /// nothing is in the machine's snapshot.
    pub(crate) fn settle(&mut self, ledger: &mut Ledger, shared: &mut Shared) {
        let Some(recorder) = shared.recorder.as_mut() else { return };
        let only_begun = self.held_for_cut.is_some();
        let Self { queue, counters, epoch, cut_at, .. } = self;
        let receiver = (self.network, self.id);
        queue.visit(*epoch, |frame, body, begun| {
            let settled = frame.recorded_in == recorder.serial || (only_begun && !begun);
            if settled || !recorder.crosses(frame.colour, *epoch) {
                return Keep::Yes;
            }
            if recorder.policy() == InFlight::Drop && !begun {
                counters.dropped.cut_drop += 1;
                ledger.drop(frame.colour, DropReason::CutDrop, frame.recorded_in);
                return Keep::No;
            }
            if recorder.record(receiver, frame, body, *cut_at) {
                frame.recorded_in = recorder.serial;
                ledger.recorded.copies += 1;
                counters.recorded_frames += 1;
            }
            Keep::Yes
        });
    }

    /// What [`Shared::wanted`] means for this port, if it still means anything.
    pub(crate) fn wanted_cut(&self) -> Option<Epoch> {
        Some(self.wanted).filter(|&wanted| wanted > self.epoch && self.queue.is_blocked())
    }

    pub(crate) fn counters(&self) -> PortCounters {
        PortCounters {
            queued_frames: self.queue.frames().len() as u64,
            queued_bytes: self.queue.bytes() as u64,
            ..self.counters
        }
    }

    #[inline]
    pub(crate) fn mark_dirty(&mut self, shared: &mut Shared) {
        if !self.dirty && self.is_writable() {
            self.dirty = true;
            shared.dirty.push(self.id);
        }
    }

    pub(crate) fn assert_consistent(&self) {
        self.queue.assert_consistent(self.epoch);
        assert!(self.connected || self.queue.bytes() == 0, "{} is not connected and has a queue", self.id);
        assert!(
            self.queue.bytes() <= (self.queue_bytes * HELD_FACTOR).max(DEFAULT_RECORDING_BYTES),
            "{} is over its bound",
            self.id
        );
    }

    fn held_since(&mut self, hold: Hold) -> &mut Option<Time> {
        match hold {
            Hold::Cut => &mut self.held_for_cut,
            Hold::Pause => &mut self.held_for_pause,
        }
    }

    #[cold]
    fn drop_copy(&mut self, colour: Epoch, reason: DropReason, ledger: &mut Ledger) {
        *self.counters.dropped.of_mut(reason) += 1;
        ledger.drop(colour, reason, 0);
    }

    #[cold]
    fn record_last(&mut self, frame: &[u8], ledger: &mut Ledger, shared: &mut Shared) {
        let (Some(recorder), Some(last)) = (shared.recorder.as_mut(), self.queue.last_mut()) else { return };
        if recorder.record((self.network, self.id), last, [frame, &[]], self.cut_at) {
            last.recorded_in = recorder.serial;
            ledger.recorded.copies += 1;
            self.counters.recorded_frames += 1;
        }
    }

    #[cold]
    fn want_cut(&mut self, colour: Epoch, shared: &mut Shared) {
        if colour > self.wanted {
            self.wanted = colour;
            if !self.wanted_listed {
                self.wanted_listed = true;
                shared.wanted.push(self.id);
            }
        }
    }
}
