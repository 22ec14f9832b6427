//! The layer-2 switch of one environment on one host: it forwards, colours, holds and records frames, and counts
//! every copy of every frame until its fate is known.
//!
//! # Contract
//!
//! The crate is pure: no socket, clock, thread or environment. Its user, the data plane, feeds frames and drains bytes:
//!
//! 1. Read a chunk from a machine's socket, split it with [`FrameReader`], call [`Switch::ingress`] for each frame.
//! 2. Until [`Switch::pop_dirty`] is empty: write [`Switch::writable`] of that port to its socket (at most two slices,
//!    already length-prefixed) and report the bytes that went with [`Switch::written`]. When the socket would block,
//!    do the same again once it is writable; the port need not become dirty for that.
//! 3. Until [`Switch::pop_cut_wanted`] is empty: tell the snapshot participant that a newer colour waits there.
//!
//! Where the environment spans hosts, each of the others is a *peer*, and also:
//!
//! 4. Open each tunnel packet from a peer and call [`Switch::remote_ingress`], each frame at most once.
//! 5. Until [`Switch::pop_dirty_peer`] is empty: hand [`Switch::outgoing`] of that peer to its tunnel, then call
//!    [`Switch::outgoing_taken`], until nothing is outgoing or the tunnel is full.
//!
//! One machine's cut is, for each of its ports: [`hold`](Switch::hold) with [`Hold::Cut`], drain, stop the machine, feed
//! what it still sent, [`advance_epoch`](Switch::advance_epoch) (the cut instant), save, [`release`](Switch::release).
//! Around the cuts of all machines stand [`start_recording`](Switch::start_recording) and
//! [`stop_recording`](Switch::stop_recording). After an aborted cut, the ports that have not passed it must be
//! advanced too (hold, advance, release, without a save), or frames of the new colour wait for ever before them.
//!
//! Across hosts, the counting of the protocol is: once all ports have passed the cut, [`Switch::channel`] tells for each
//! peer and network the final number of older frames passed on to it; while recording, the number received from it; and
//! when the recording stops, [`Switch::close_channel`] is told the peer's number. Then take [`Switch::accounting`].
//! The unit is one frame on the wire, whatever it is replicated to; `ledger` says why the books of all hosts together
//! balance with it.
//!
//! # The rule
//!
//! A frame copy carries the *colour* that its sender's port had when the frame came in. At the head of receiver d's queue:
//!
//! ```text
//! colour = d's epoch   deliver
//! colour < d's epoch   it was in flight at a cut: record it if that cut is being recorded, and deliver it
//! colour > d's epoch   it waits, and everything behind it waits, until d has been cut
//! ```
//!
//! # One copy's life
//!
//! ```text
//!  ingress / remote_ingress / inject
//!        | owed
//!        +--> dropped (no_receiver, queue_full, cut_drop)
//!        +--> passed on to a peer, whose switch owes its own copies of what arrives there
//!        v
//!     queued --------------------> delivered (its last byte was written)
//!        |                             ^
//!        +-- recorded for a cut -------+      (a copy is recorded at most once for a cut)
//!        |                             |
//!        +--> dropped (no_receiver: the port was disconnected) <--+
//! ```
//!
//! # Invariants
//!
//! Debug builds assert those of constant cost as they go; [`Switch::assert_consistent`] checks all of them.
//!
//! - A port's epoch never goes back, and changes only while the port is held for a cut.
//! - No byte of a frame is written while its colour is newer than the receiver's epoch.
//! - Frames leave a port in the order in which they were queued; a frame once begun is finished before anything else,
//!   held or not (or else the stream to the machine would lose its framing), unless the port is disconnected.
//! - A port's ring holds exactly the encoded bytes of its queued frames, less what was written of the first.
//! - Every owed copy is exactly one of: queued, delivered, dropped, passed on.
//! - What came from a peer goes to no peer. A frame goes to a peer at most once.
//! - Nothing here grows without a bound: queues, MAC tables, recordings, the ledger's colours.
//! - No input from a machine panics. An id of another switch does: that is the program's mistake, not the machine's.
//!
//! Forwarding is that of a plain bridge without spanning tree: VLAN tags are carried, not looked at (one shared MAC
//! table), and link-local multicast (LLDP, STP, LACP) is flooded like any other, because guests that emulate switches
//! want to see each other's.

pub mod arrivals;
mod counters;
pub mod geneve;
mod ledger;
mod mac_table;
mod peer;
mod port;
mod queue;
mod recorder;
mod ring;
mod stream;
mod switch;

use std::fmt;

pub use counters::{DropReason, Dropped, NetworkCounters, PeerCounters, PortCounters};
pub use ledger::{Accounting, ChannelCounts};
pub use peer::Outgoing;
pub use port::{EpochError, Hold};
pub use recorder::{DEFAULT_RECORDING_BYTES, InFlight, Overflow, RecordedFrame, Recording, RecordingActive};
pub use stream::{FrameReader, LENGTH_BYTES, MAX_STREAM_FRAME, StreamError, resync};
pub use switch::{CutWanted, InjectError, LearnError, NetworkConfig, Switch};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Destination, source and type: the shortest thing that is a frame, in bytes.
pub const MIN_FRAME: usize = 14;

/// What a frame may have beyond its network's MTU, in bytes: the Ethernet header and two VLAN tags.
pub const FRAME_OVERHEAD: usize = MIN_FRAME + 8;

/// The number of cuts that a machine has passed; as a frame's colour, its sender's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A reading of the data plane's monotonic clock: nanoseconds since an arbitrary start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// Nanoseconds from `earlier` to `self`; 0 if `earlier` is later.
    pub fn since_ns(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One network of one [`Switch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkId(pub u16);

/// One port of one [`Switch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u32);

/// Another host of the environment, as one [`Switch`] knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer {}", self.0)
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "network {}", self.0)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {}", self.0)
    }
}
