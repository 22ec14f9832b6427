//! The frames in flight at one cut: those sent before their sender's cut and not delivered before their receiver's.
//!
//! Owns the copied frames and their bound. When a copy is offered is the port's business.
//!
//! States: none, or recording one cut. Invariant: `held_bytes` is what the recording takes in memory, never above `limit`.

use crate::{Epoch, NetworkId, PortId, Time, queue::Queued};

/// What a recording may take in memory before it overflows, in bytes, unless told otherwise: 256 MiB. Frames in flight
/// are what queues held for some milliseconds; this is a bound for hostile guests, not a size to expect.
pub const DEFAULT_RECORDING_BYTES: usize = 256 << 20;

/// What happens to frames that are in flight at a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InFlight {
    /// They are recorded, and delivered.
    Record,
    /// They are dropped and counted as [`DropReason::CutDrop`](crate::DropReason::CutDrop), as the VTDC 2007 paper does.
    /// A frame of which the machine has a part already cannot be dropped: it is recorded and delivered.
    Drop,
}

/// One copy that was in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedFrame {
    /// The network it crossed.
    pub network: NetworkId,
    /// The receiver.
    pub to: PortId,
    /// Its sender's epoch; less than the cut's.
    pub colour: Epoch,
    /// When it arrived at the receiver's queue, in nanoseconds after the receiver's cut; 0 if it waited there already.
    pub after_cut_ns: u64,
    /// The frame, without a length prefix.
    pub bytes: Box<[u8]>,
}

/// Copies that a recording had no room for. The snapshot would lack them: the cut must fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overflow {
    /// How many.
    pub frames: u64,
    /// Their bytes, without length prefixes.
    pub bytes: u64,
}

/// All copies that were in flight at one cut, on this host. Those to one receiver stand in their order of delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// The cut.
    pub cut: Epoch,
    /// What was asked for.
    pub policy: InFlight,
    /// The copies.
    pub frames: Vec<RecordedFrame>,
    /// The bytes of all frames, without length prefixes.
    pub bytes: usize,
    /// What did not fit; see [`Recording::is_complete`].
    pub overflow: Overflow,
}

impl Recording {
    /// Whether nothing is missing. If something is, the snapshot must not be committed.
    pub fn is_complete(&self) -> bool {
        self.overflow.frames == 0
    }
}

/// A recording is active; stop it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cut {cut} is still being recorded")]
pub struct RecordingActive {
    /// What is being recorded.
    pub cut: Epoch,
}

#[derive(Debug)]
pub(crate) struct Recorder {
    /// Distinguishes this recording from all others of the switch; never 0.
    pub(crate) serial: u32,
    recording: Recording,
    held_bytes: usize,
    limit: usize,
}

impl Recorder {
    pub(crate) fn new(serial: u32, cut: Epoch, policy: InFlight, limit: usize) -> Self {
        debug_assert_ne!(serial, 0);
        let recording =
            Recording { cut, policy, frames: Vec::new(), bytes: 0, overflow: Overflow::default() };
        Self { serial, recording, held_bytes: 0, limit }
    }

    pub(crate) fn cut(&self) -> Epoch {
        self.recording.cut
    }

    pub(crate) fn policy(&self) -> InFlight {
        self.recording.policy
    }

    /// Whether a copy of this colour to a receiver at this epoch crosses the cut.
    #[inline]
    pub(crate) fn crosses(&self, colour: Epoch, receiver: Epoch) -> bool {
        colour < self.recording.cut && self.recording.cut <= receiver
    }

    /// Copies a frame that crosses the cut. False if it has no room; that is remembered.
    pub(crate) fn record(
        &mut self,
        (network, to): (NetworkId, PortId),
        queued: &Queued,
        body: [&[u8]; 2],
        cut_at: Time,
    ) -> bool {
        let len = queued.len as usize;
        let held = len + size_of::<RecordedFrame>();
        if self.held_bytes + held > self.limit {
            self.recording.overflow.frames += 1;
            self.recording.overflow.bytes += len as u64;
            return false;
        }
        self.held_bytes += held;
        self.recording.bytes += len;
        self.recording.frames.push(RecordedFrame {
            network,
            to,
            colour: queued.colour,
            after_cut_ns: queued.enqueued.since_ns(cut_at),
            bytes: body.concat().into_boxed_slice(),
        });
        true
    }

    pub(crate) fn finish(self) -> Recording {
        self.recording
    }
}
