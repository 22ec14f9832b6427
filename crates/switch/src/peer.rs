//! One peer: another host of the environment, the frames that wait for the tunnel to it, and what came from it.
//!
//! A frame for machines of another host waits here once, whatever the number of its receivers there: that host's switch
//! makes the copies. A peer is no machine: it is never held, has no epoch, and takes frames of every colour at any time;
//! the rule of colours is applied where frames are delivered to machines.
//!
//! States: connected (there is a tunnel; frames queue) or not (they are dropped, and the queue is empty).
//!
//! Invariants: `ring.len() == sum(4 + frame.len)`; the ring never holds more than `queue_bytes`. How many frames were
//! passed on and came in, by network and colour, is in the networks' ledgers, not here.

use std::collections::VecDeque;

use crate::{
    Epoch, LENGTH_BYTES, NetworkId, PeerId, Time,
    counters::{DropReason, PeerCounters},
    ring::Ring,
};

/// The next frame for a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing<'a> {
    /// The network it belongs to.
    pub network: NetworkId,
    /// Its sender's epoch when it was sent.
    pub colour: Epoch,
    /// When it began to wait.
    pub enqueued: Time,
    /// The frame, without a length prefix; the second slice follows the first, and is mostly empty.
    pub bytes: [&'a [u8]; 2],
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    network: NetworkId,
    colour: Epoch,
    len: u32,
    enqueued: Time,
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) connected: bool,
    pub(crate) dirty: bool,
    pub(crate) counters: PeerCounters,
    ring: Ring,
    frames: VecDeque<Waiting>,
    queue_bytes: usize,
}

/// What became of a frame that was offered to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    Queued,
    Dropped(DropReason),
}

impl Peer {
    pub(crate) fn new(queue_bytes: usize) -> Self {
        Self {
            connected: false,
            dirty: false,
            counters: PeerCounters::default(),
            ring: Ring::default(),
            frames: VecDeque::new(),
            queue_bytes,
        }
    }

    /// Queues a frame, or says why not. `dirty` lists the peers that have something to send.
    #[inline]
    pub(crate) fn offer(
        &mut self,
        id: PeerId,
        (network, colour): (NetworkId, Epoch),
        frame: &[u8],
        now: Time,
        dirty: &mut Vec<PeerId>,
    ) -> Offer {
        if !self.connected {
            self.counters.dropped.no_receiver += 1;
            return Offer::Dropped(DropReason::NoReceiver);
        }
        if self.ring.len() + LENGTH_BYTES + frame.len() > self.queue_bytes {
            self.counters.dropped.queue_full += 1;
            return Offer::Dropped(DropReason::QueueFull);
        }
        let len = frame.len() as u32;
        self.ring.push(len.to_be_bytes(), frame);
        self.frames.push_back(Waiting { network, colour, len, enqueued: now });
        self.counters.sent_frames += 1;
        self.counters.sent_bytes += u64::from(len);
        self.counters.peak_queued_bytes = self.counters.peak_queued_bytes.max(self.ring.len() as u64);
        if !self.dirty {
            self.dirty = true;
            dirty.push(id);
        }
        Offer::Queued
    }

    #[inline]
    pub(crate) fn outgoing(&self) -> Option<Outgoing<'_>> {
        let &Waiting { network, colour, len, enqueued } = self.frames.front()?;
        let bytes = self.ring.slices(LENGTH_BYTES, len as usize);
        Some(Outgoing { network, colour, enqueued, bytes })
    }

    /// Takes the first frame out. False if there was none.
    #[inline]
    pub(crate) fn taken(&mut self, now: Time) -> bool {
        let Some(first) = self.frames.pop_front() else { return false };
        self.ring.pop(LENGTH_BYTES + first.len as usize);
        self.counters.longest_wait_ns = self.counters.longest_wait_ns.max(now.since_ns(first.enqueued));
        true
    }

    pub(crate) fn has_outgoing(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Forgets all that waits, and gives the memory back. The frames stay counted as passed on: to the other host they
    /// are as lost as those that a wire loses.
    pub(crate) fn clear(&mut self) {
        self.counters.abandoned_frames += self.frames.len() as u64;
        self.ring = Ring::default();
        self.frames = VecDeque::new();
    }

    pub(crate) fn counters(&self) -> PeerCounters {
        PeerCounters {
            queued_frames: self.frames.len() as u64,
            queued_bytes: self.ring.len() as u64,
            ..self.counters
        }
    }

    pub(crate) fn assert_consistent(&self) {
        let encoded: usize = self.frames.iter().map(|frame| LENGTH_BYTES + frame.len as usize).sum();
        assert_eq!(self.ring.len(), encoded, "a peer's ring and frames disagree");
        assert!(encoded <= self.queue_bytes, "a peer's queue is over its bound");
        assert!(self.connected || encoded == 0, "a peer is not connected and has a queue");
    }
}
