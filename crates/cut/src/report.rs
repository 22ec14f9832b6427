//! What participants tell of their part of a cut: instants, frame counts, machines.
//!
//! Counts are cumulative over the environment's life, so an old loss stays a loss in every later account.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::message::{CaptureMode, CutId, InFlight, ParticipantId};

/// A network's number within its environment; the same on every host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetworkId(pub u16);

/// Frames of one network between this participant and one other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Channel {
    /// The other participant.
    pub peer: ParticipantId,
    /// The network the frames belong to.
    pub network: NetworkId,
}

/// How many frames of colours older than the cut went into a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChannelCount {
    /// In a [`Taken`], `peer` is the receiver; in an `Expect`, the sender.
    pub channel: Channel,
    /// Copies sent, over the environment's life.
    pub copies: u64,
}

/// One machine's cut, as its host measured it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineCut {
    /// The machine's name.
    pub machine: String,
    /// When its port's epoch went up: microseconds of wall clock since 1970, UTC.
    pub cut_at_us: u64,
    /// How long its virtual CPUs were stopped, in microseconds.
    pub pause_us: u64,
    /// How long no frame could reach it, in microseconds.
    pub stall_us: u64,
}

/// A participant has made its local cut; memory may still be on its way to storage.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Taken {
    /// Every machine of this participant.
    pub machines: Vec<MachineCut>,
    /// What this participant sent to others in colours older than the cut. Final: it cannot grow any more.
    pub sent: Vec<ChannelCount>,
}

/// Copies that reached no machine, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Drops {
    /// A bounded queue had no room.
    pub queue_full: u64,
    /// The emulated link lost them on purpose.
    pub link_loss: u64,
    /// Sent by another host and never received here.
    pub wire_loss: u64,
    /// There was no machine to receive them.
    pub no_receiver: u64,
    /// They crossed a cut with [`InFlight::Drop`].
    pub cut_drop: u64,
}

/// One network's account at the cut, as one participant sees it, or the sum of several. In copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Frames {
    /// Copies owed by frames sent before their sender's cut.
    pub sent_before: u64,
    /// Of these, delivered before their receiver's cut.
    pub delivered_before: u64,
    /// Of these, recorded as in flight.
    pub in_flight: u64,
    /// Of these, dropped.
    pub dropped: Drops,
}

impl Frames {
    /// Copies sent that nothing explains. Zero, or the snapshot is wrong; negative means too many were seen.
    pub fn unaccounted(&self) -> i128 {
        let Drops { queue_full, link_loss, wire_loss, no_receiver, cut_drop } = self.dropped;
        let explained =
            [self.delivered_before, self.in_flight, queue_full, link_loss, wire_loss, no_receiver, cut_drop];
        i128::from(self.sent_before) - explained.into_iter().map(i128::from).sum::<i128>()
    }

    /// Adds another participant's or network's account. Saturates: the figures come from other hosts.
    pub fn add(&mut self, other: &Frames) {
        let pairs = [
            (&mut self.sent_before, other.sent_before),
            (&mut self.delivered_before, other.delivered_before),
            (&mut self.in_flight, other.in_flight),
            (&mut self.dropped.queue_full, other.dropped.queue_full),
            (&mut self.dropped.link_loss, other.dropped.link_loss),
            (&mut self.dropped.wire_loss, other.dropped.wire_loss),
            (&mut self.dropped.no_receiver, other.dropped.no_receiver),
            (&mut self.dropped.cut_drop, other.dropped.cut_drop),
        ];
        for (sum, more) in pairs {
            *sum = sum.saturating_add(more);
        }
    }
}

/// One network's account in a [`Report`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetworkFrames {
    /// Which network.
    pub network: NetworkId,
    /// Its account.
    pub frames: Frames,
}

/// One machine's capture, durable.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineReport {
    /// The machine's name.
    pub machine: String,
    /// What the manifest says of it; the protocol carries these bytes and does not read them.
    pub captured: Vec<u8>,
}

/// A participant's whole part of the snapshot is safe.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Report {
    /// Every machine of this participant.
    pub machines: Vec<MachineReport>,
    /// Every network with a port on this participant.
    pub networks: Vec<NetworkFrames>,
}

/// Everything the initiator's host needs to write the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Snapshot {
    /// Which cut.
    pub cut: CutId,
    /// How machines were captured.
    pub capture: CaptureMode,
    /// What was done with frames in flight.
    pub in_flight: InFlight,
    /// Each participant's part.
    pub parts: BTreeMap<ParticipantId, Part>,
}

/// One participant's part of a [`Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Part {
    /// Its cut.
    pub taken: Taken,
    /// Its captured machines and accounts.
    pub report: Report,
}

impl Snapshot {
    /// Latest minus earliest machine's cut instant, in microseconds; across hosts, as good as their clocks.
    pub fn skew_us(&self) -> u64 {
        let instants = || self.parts.values().flat_map(|part| &part.taken.machines).map(|m| m.cut_at_us);
        instants().max().unwrap_or(0) - instants().min().unwrap_or(0)
    }

    /// Each network's account, summed over the participants.
    pub fn networks(&self) -> BTreeMap<NetworkId, Frames> {
        let mut sums = BTreeMap::<NetworkId, Frames>::new();
        for entry in self.parts.values().flat_map(|part| &part.report.networks) {
            sums.entry(entry.network).or_default().add(&entry.frames);
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_copy_is_explained_or_counted() {
        let dropped = Drops { queue_full: 1, link_loss: 2, wire_loss: 3, no_receiver: 4, cut_drop: 5 };
        let mut frames = Frames { sent_before: 35, delivered_before: 15, in_flight: 5, dropped };
        assert_eq!(frames.unaccounted(), 0);
        frames.sent_before += 1;
        assert_eq!(frames.unaccounted(), 1);
        let other = Frames { sent_before: u64::MAX, delivered_before: 2, ..Frames::default() };
        frames.add(&other);
        assert_eq!(frames.sent_before, u64::MAX);
        assert_eq!(frames.delivered_before, 17);
    }
}
