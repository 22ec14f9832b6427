//! One host of the model: the shipped participant, and the smallest port model that is faithful to the switch's rule.
//!
//! A port has an epoch and a queue in order of arrival. The head of the queue is delivered as soon as the port is not
//! held and the frame's colour is not above the port's epoch; one of a lower colour is recorded if the host is recording
//! that cut. The switch holds all ports of the host for a local cut and releases them together. Everything marked
//! *judge* is for the properties alone: no transition reads it.

use std::{collections::BTreeMap, time::Duration};

use diorama_cut::message::Epoch;
use diorama_cut::participant::Participant;
use diorama_cut::report::{Channel, ChannelCount, Drops, Frames, NetworkFrames, NetworkId, Taken};
use diorama_cut::{CutId, ParticipantId};

pub const NETWORK: NetworkId = NetworkId(0);

/// A set of attempts: bit n is attempt n.
pub type Attempts = u8;

/// The number of an attempt, which its name is made of.
pub fn bit(cut: CutId) -> Attempts {
    1 << cut.snapshot.0[0]
}

/// A machine's place: host, and machine of that host.
pub type Place = (usize, usize);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Frame {
    pub from: Place,
    pub to: Place,
    pub colour: Epoch,
    pub at: FrameAt,
    /// Judge: the cuts that its sender had passed when it sent this.
    pub sent_after: Attempts,
    /// Judge: the snapshots that hold it as in flight.
    pub recorded_in: Attempts,
    /// Judge: the snapshots that declare it lost on the wire.
    pub lost_in: Attempts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FrameAt {
    Wire,
    Queue,
    /// With the receiver's epoch then, and (judge) the cuts that it had passed.
    Delivered {
        epoch: Epoch,
        after: Attempts,
    },
    /// Lost on the wire, or refused because it came after it had been declared lost.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Port {
    pub epoch: Epoch,
    /// Numbers of frames.
    pub queue: Vec<usize>,
    /// Judge: the cuts that this machine has passed (made, not merely adopted the epoch of).
    pub passed: Attempts,
}

/// What the host's workers are at. Each is answered by an action of the model, so it may take any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    Preparing(CutId),
    /// The number of machines that have been cut.
    Cutting(CutId, usize),
    Capturing(CutId),
    Finishing(CutId),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host {
    pub participant: Participant,
    /// This host's clock. It advances only when a timer fires: when that is, is the model's choice.
    pub now: Duration,
    pub ports: Vec<Port>,
    pub held: bool,
    pub recording: Option<CutId>,
    pub work: Option<Work>,
    /// Durable: the epoch in the host's record, which it writes before any port has it, already when it prepares. A process
    /// that begins again puts its ports there.
    pub reserved: Epoch,
    /// Durable: this part is safe and was reported, and the outcome is not known.
    pub in_doubt: Option<(CutId, ParticipantId)>,
    /// Judge: snapshots that were reported, kept, and discarded.
    pub reported: Attempts,
    pub kept: Attempts,
    pub discarded: Attempts,
}

impl Host {
    pub fn new(id: usize, machines: usize) -> Self {
        Self {
            participant: Participant::new(ParticipantId(id as u32), Epoch(0)),
            now: Duration::ZERO,
            ports: vec![Port::default(); machines],
            held: false,
            recording: None,
            work: None,
            reserved: Epoch(0),
            in_doubt: None,
            reported: 0,
            kept: 0,
            discarded: 0,
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.ports.iter().map(|port| port.epoch).max().unwrap_or_default()
    }

    /// Whether a crash would change anything.
    pub fn has_to_lose(&self, id: usize) -> bool {
        self.participant != Participant::new(ParticipantId(id as u32), self.reserved)
    }

    /// Writes the record: from here on ports may have this epoch.
    pub fn reserve(&mut self, epoch: Epoch) {
        self.reserved = self.reserved.max(epoch);
    }

    pub fn hold_and_record(&mut self, cut: CutId) {
        self.reserve(cut.epoch);
        self.held = true;
        self.recording = Some(cut);
        self.work = Some(Work::Cutting(cut, 0));
    }

    /// The next machine's cut instant. True if it was the last one, and the ports are released.
    pub fn cut_next(&mut self, frames: &mut [Frame]) -> bool {
        let Some(Work::Cutting(cut, done)) = self.work else { unreachable!("no cut under way") };
        let port = &mut self.ports[done];
        port.epoch = cut.epoch;
        port.passed |= bit(cut);
        self.work = Some(Work::Cutting(cut, done + 1));
        if done + 1 < self.ports.len() {
            return false;
        }
        self.held = false;
        self.deliver_all(frames);
        true
    }

    /// Every port is at `epoch`, and delivers. Without a cut: nobody passes one.
    pub fn raise(&mut self, epoch: Epoch, frames: &mut [Frame]) {
        self.reserve(epoch);
        for port in &mut self.ports {
            assert!(port.epoch <= epoch, "an epoch went back");
            port.epoch = epoch;
        }
        self.held = false;
        self.deliver_all(frames);
    }

    pub fn stop_everything(&mut self) {
        self.recording = None;
        self.work = None;
    }

    /// A frame came to one of the ports. Returns the colour that it waits for, if it does.
    pub fn arrive(&mut self, number: usize, frames: &mut [Frame]) -> Option<Epoch> {
        let Frame { to: (_, machine), colour, .. } = frames[number];
        frames[number].at = FrameAt::Queue;
        self.ports[machine].queue.push(number);
        self.deliver(machine, frames);
        (colour > self.ports[machine].epoch).then_some(colour)
    }

    fn deliver_all(&mut self, frames: &mut [Frame]) {
        (0..self.ports.len()).for_each(|machine| self.deliver(machine, frames));
    }

    fn deliver(&mut self, machine: usize, frames: &mut [Frame]) {
        let Self { ports, held, recording, .. } = self;
        let port = &mut ports[machine];
        while let Some(&number) = port.queue.first()
            && !*held
            && frames[number].colour <= port.epoch
        {
            port.queue.remove(0);
            let frame = &mut frames[number];
            if let Some(cut) = recording
                && frame.colour < cut.epoch
                && cut.epoch <= port.epoch
            {
                frame.recorded_in |= bit(*cut);
            }
            frame.at = FrameAt::Delivered { epoch: port.epoch, after: port.passed };
        }
    }

    /// The oldest newer colour that waits here.
    pub fn waiting_for(&self, frames: &[Frame]) -> Option<Epoch> {
        let heads =
            self.ports.iter().filter_map(|port| Some((port.epoch, frames[*port.queue.first()?].colour)));
        heads.filter(|(epoch, colour)| colour > epoch).map(|(_, colour)| colour).min()
    }
}

/// Judge: a cut that was left and may be made again, at another epoch, has not been made.
pub fn forget(host: &mut Host, frames: &mut [Frame], id: usize, attempt: Attempts) {
    host.ports.iter_mut().for_each(|port| port.passed &= !attempt);
    for frame in frames {
        if frame.from.0 == id {
            frame.sent_after &= !attempt;
        }
        if frame.to.0 == id {
            frame.recorded_in &= !attempt;
            frame.lost_in &= !attempt;
            if let FrameAt::Delivered { after, .. } = &mut frame.at {
                *after &= !attempt;
            }
        }
    }
}

fn between(frames: &[Frame], from: usize, to: usize, cut: Epoch) -> impl Iterator<Item = &Frame> {
    frames.iter().filter(move |f| f.from.0 == from && f.to.0 == to && f.colour < cut)
}

/// What the host's switch counts of frames from a peer, older than the cut: arrived, and known lost.
pub fn received(frames: &[Frame], from: usize, to: usize, cut: Epoch) -> (u64, u64) {
    let count = |wanted: fn(&FrameAt) -> bool| {
        between(frames, from, to, cut).filter(|frame| wanted(&frame.at)).count() as u64
    };
    let arrived = count(|at| matches!(at, FrameAt::Queue | FrameAt::Delivered { .. }));
    let declared = between(frames, from, to, cut).filter(|frame| frame.lost_in != 0).count() as u64;
    (arrived, declared)
}

pub fn channel(peer: usize) -> Channel {
    Channel { peer: ParticipantId(peer as u32), network: NETWORK }
}

/// What the host states with its cut.
pub fn taken(frames: &[Frame], host: usize, hosts: usize, cut: CutId) -> Taken {
    let counts = (0..hosts).filter(|&peer| peer != host).map(|peer| ChannelCount {
        channel: channel(peer),
        copies: between(frames, host, peer, cut.epoch).count() as u64,
    });
    Taken { machines: Vec::new(), sent: counts.filter(|count| count.copies > 0).collect() }
}

/// Closes the host's channels: what has not come is lost, and will be refused. Returns what the switch accounts; and
/// whether the protocol's counts are the truth.
pub fn close(
    frames: &mut [Frame],
    host: usize,
    cut: CutId,
    missing: &BTreeMap<Channel, u64>,
) -> (Vec<NetworkFrames>, bool) {
    let mut lost = BTreeMap::new();
    for frame in frames.iter_mut() {
        let older = frame.to.0 == host && frame.from.0 != host && frame.colour < cut.epoch;
        if older && matches!(frame.at, FrameAt::Wire | FrameAt::Gone) {
            frame.at = FrameAt::Gone;
            frame.lost_in |= bit(cut);
            *lost.entry(channel(frame.from.0)).or_insert(0) += 1;
        }
    }
    let sent_before = frames.iter().filter(|f| f.from.0 == host && f.colour < cut.epoch).count() as u64;
    let mine = || frames.iter().filter(|f| f.to.0 == host && f.colour < cut.epoch);
    let delivered = mine().filter(|f| matches!(f.at, FrameAt::Delivered { epoch, .. } if epoch < cut.epoch));
    let frames = Frames {
        sent_before,
        delivered_before: delivered.count() as u64,
        in_flight: mine().filter(|f| f.recorded_in & bit(cut) != 0).count() as u64,
        dropped: Drops { wire_loss: missing.values().sum(), ..Drops::default() },
    };
    (vec![NetworkFrames { network: NETWORK, frames }], &lost == missing)
}
