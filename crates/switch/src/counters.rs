//! Counters that people read. All are cumulative over the switch's life, except those named `queued` and `connected`.

use std::ops::{Add, AddAssign};

/// Why a copy that was owed to a receiver never reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The receiver's queue was full.
    QueueFull,
    /// An emulated link lost it.
    LinkLoss,
    /// A tunnel between hosts lost it.
    WireLoss,
    /// Nobody was there to receive it.
    NoReceiver,
    /// It was in flight at a cut whose policy is [`InFlight::Drop`](crate::InFlight::Drop).
    CutDrop,
}

impl DropReason {
    pub(crate) const COUNT: usize = 5;
}

/// Copies dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// [`DropReason::QueueFull`]
    pub queue_full: u64,
    /// [`DropReason::LinkLoss`]
    pub link_loss: u64,
    /// [`DropReason::WireLoss`]
    pub wire_loss: u64,
    /// [`DropReason::NoReceiver`]
    pub no_receiver: u64,
    /// [`DropReason::CutDrop`]
    pub cut_drop: u64,
}

impl Dropped {
    /// All reasons together.
    pub fn total(&self) -> u64 {
        self.queue_full + self.link_loss + self.wire_loss + self.no_receiver + self.cut_drop
    }

    pub(crate) fn of_mut(&mut self, reason: DropReason) -> &mut u64 {
        match reason {
            DropReason::QueueFull => &mut self.queue_full,
            DropReason::LinkLoss => &mut self.link_loss,
            DropReason::WireLoss => &mut self.wire_loss,
            DropReason::NoReceiver => &mut self.no_receiver,
            DropReason::CutDrop => &mut self.cut_drop,
        }
    }

    pub(crate) fn from_counts(counts: [u64; DropReason::COUNT]) -> Self {
        let [queue_full, link_loss, wire_loss, no_receiver, cut_drop] = counts;
        Self { queue_full, link_loss, wire_loss, no_receiver, cut_drop }
    }
}

impl Add for Dropped {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            queue_full: self.queue_full + other.queue_full,
            link_loss: self.link_loss + other.link_loss,
            wire_loss: self.wire_loss + other.wire_loss,
            no_receiver: self.no_receiver + other.no_receiver,
            cut_drop: self.cut_drop + other.cut_drop,
        }
    }
}

impl AddAssign for Dropped {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// What one port has seen. "Received" and "sent" are the machine's view turned round: the switch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Valid frames that came from the machine.
    pub received_frames: u64,
    /// Their bytes, without length prefixes.
    pub received_bytes: u64,
    /// Frames from the machine that were too short to be frames; never owed to anybody.
    pub runts: u64,
    /// Frames from the machine that were longer than the network carries; never owed to anybody.
    pub giants: u64,
    /// Frames whose last byte was written to the machine.
    pub delivered_frames: u64,
    /// Their bytes, without length prefixes.
    pub delivered_bytes: u64,
    /// Copies owed to this port's machine and dropped. Copies owed to nobody in particular count at the network only,
    /// except that an unconnected unicast receiver counts its own.
    pub dropped: Dropped,
    /// Copies to this port that were recorded as in flight.
    pub recorded_frames: u64,
    /// Source addresses of this port that were not learned because a bound was reached.
    pub unlearned: u64,
    /// Frames that wait now.
    pub queued_frames: u64,
    /// Their bytes, length prefixes included.
    pub queued_bytes: u64,
    /// The most bytes that ever waited, length prefixes included.
    pub peak_queued_bytes: u64,
    /// The longest that a delivered frame had waited, in nanoseconds.
    pub longest_wait_ns: u64,
}

/// What has passed between this host and one other. "Sent" and "received" are this host's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerCounters {
    /// Frames passed on to the peer: queued for its tunnel.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that were queued and then given up: the peer was disconnected, or started anew.
    pub abandoned_frames: u64,
    /// Copies owed to the peer that were not passed on.
    pub dropped: Dropped,
    /// Frames that arrived from the peer and were let in.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames from the peer that came after they had been declared lost. They were not let in.
    pub late_frames: u64,
    /// Frames from the peer of networks that it has no port in, or that this host does not know. They were not let in.
    pub foreign_frames: u64,
    /// Frames from the peer too short or too long for their network. They were not let in.
    pub invalid_frames: u64,
    /// Source addresses behind this peer that were not learned because a bound was reached.
    pub unlearned: u64,
    /// Frames that wait now.
    pub queued_frames: u64,
    /// Their bytes, with 4 for each frame's length.
    pub queued_bytes: u64,
    /// The most bytes that ever waited.
    pub peak_queued_bytes: u64,
    /// The longest that a frame had waited for the tunnel, in nanoseconds.
    pub longest_wait_ns: u64,
}

/// What one network has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkCounters {
    /// Valid frames that came from machines.
    pub received_frames: u64,
    /// Their bytes, without length prefixes.
    pub received_bytes: u64,
    /// Runts and giants.
    pub invalid_frames: u64,
    /// Copies owed to receivers.
    pub owed: u64,
    /// Copies delivered.
    pub delivered: u64,
    /// Copies dropped; and as `wire_loss`, frames from other hosts that were found lost, which were never owed here.
    pub dropped: Dropped,
    /// Copies that wait now.
    pub queued: u64,
    /// Copies passed on to other hosts. All that is owed is delivered, dropped, queued or passed on.
    pub passed_on: u64,
    /// Frames that arrived from other hosts; the copies made of them are in `owed`.
    pub arrived: u64,
    /// Addresses in the MAC table, aged ones included until their place is needed.
    pub learned: u64,
}
