//! The switch as plainly as it can be written: every copy is kept for ever with its fate, the books are made by
//! looking at all of them. Slow, unbounded, and by other means than the real one.

use std::collections::{BTreeMap, VecDeque};

use diorama_switch::{Accounting, DropReason, Epoch, Hold, InFlight, Mac};

const LIFETIME_NS: u64 = 300_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Queued,
    Delivered {
        at_epoch: u32,
    },
    Dropped(DropReason),
    PassedOn {
        peer: usize,
    },
    /// It was passed on, and its books were begun anew.
    Struck,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Port(usize),
    Peer(usize),
}

/// Another host: the frames that wait for its tunnel, and all that ever came from it, as (network, colour, bytes).
pub struct Peer {
    pub connected: bool,
    /// By network; none where it never was.
    pub attached: [Option<bool>; 2],
    pub queue: VecDeque<(usize, u32, Vec<u8>)>,
    pub arrived: Vec<(usize, u32)>,
    /// By network: the cut it was closed for last, and what was lost.
    pub closed: [(u32, u64); 2],
}

pub struct Copy {
    pub network: usize,
    pub to: Option<usize>,
    pub colour: u32,
    pub bytes: Vec<u8>,
    pub enqueued: u64,
    pub fate: Fate,
    /// The recordings that hold it: serial number and what they noted as time after the cut.
    pub recorded: Vec<(usize, u64)>,
}

#[derive(Default)]
pub struct Port {
    pub network: usize,
    pub connected: bool,
    pub epoch: u32,
    pub cut_at: u64,
    pub held_for_cut: bool,
    pub held_for_pause: bool,
    /// Indexes of copies.
    pub queue: VecDeque<usize>,
    pub head_written: usize,
}

#[derive(Clone, Copy)]
pub struct Recording {
    pub serial: usize,
    pub cut: u32,
    pub policy: InFlight,
}

pub struct Oracle {
    pub queue_bytes: usize,
    pub max_frame: usize,
    pub ports: Vec<Port>,
    pub copies: Vec<Copy>,
    pub recording: Option<Recording>,
    /// The latest, running or not.
    pub latest: Recording,
    pub peers: Vec<Peer>,
    macs: BTreeMap<(usize, Mac), (Place, u64)>,
}

impl Oracle {
    pub fn new(base: u32, networks: &[usize], queue_bytes: usize, max_frame: usize) -> Self {
        let port = |&network| Port { network, epoch: base, ..Port::default() };
        Self {
            queue_bytes,
            max_frame,
            ports: networks.iter().map(port).collect(),
            copies: Vec::new(),
            recording: None,
            latest: Recording { serial: 0, cut: base, policy: InFlight::Record },
            peers: Vec::new(),
            macs: BTreeMap::new(),
        }
    }

    pub fn add_peer(&mut self) {
        self.peers.push(Peer {
            connected: true,
            attached: [Some(true); 2],
            queue: VecDeque::new(),
            arrived: Vec::new(),
            closed: [(0, 0); 2],
        });
    }

    pub fn ingress(&mut self, from: usize, frame: &[u8], now: u64) {
        if frame.len() < 14 || frame.len() > self.max_frame {
            return;
        }
        let Port { network, epoch: colour, .. } = self.ports[from];
        let destination: Mac = frame[..6].try_into().unwrap();
        let source: Mac = frame[6..12].try_into().unwrap();
        if source[0] & 1 == 0 && source != [0; 6] {
            self.macs.insert((network, source), (Place::Port(from), now));
        }
        let receivers: Vec<Place> = match self.place(network, destination, now) {
            Some(Place::Port(port)) if port == from => vec![],
            Some(place) => vec![place],
            None => {
                let peers = (0..self.peers.len())
                    .filter(|&p| self.peers[p].connected && self.peers[p].attached[network] == Some(true));
                let ports = self.connected_ports(network).into_iter().filter(|&p| p != from);
                ports.map(Place::Port).chain(peers.map(Place::Peer)).collect()
            }
        };
        for &place in &receivers {
            match place {
                Place::Port(to) => self.owe(to, frame, colour, now, 1),
                Place::Peer(peer) => {
                    let fate = if self.peers[peer].connected {
                        self.peers[peer].queue.push_back((network, colour, frame.to_vec()));
                        Fate::PassedOn { peer }
                    } else {
                        Fate::Dropped(DropReason::NoReceiver)
                    };
                    self.owe_nobody(network, frame, colour, now, fate);
                }
            }
        }
        if receivers.is_empty() {
            self.owe_nobody(network, frame, colour, now, Fate::Dropped(DropReason::NoReceiver));
        }
    }

    /// Whether the frame was let in.
    pub fn remote_ingress(
        &mut self,
        from: usize,
        network: usize,
        colour: u32,
        frame: &[u8],
        now: u64,
    ) -> bool {
        let peer = &mut self.peers[from];
        let fits = (14..=self.max_frame).contains(&frame.len());
        if peer.attached[network] != Some(true) || !fits || colour < peer.closed[network].0 {
            return false;
        }
        peer.arrived.push((network, colour));
        let destination: Mac = frame[..6].try_into().unwrap();
        let source: Mac = frame[6..12].try_into().unwrap();
        if source[0] & 1 == 0 && source != [0; 6] {
            self.macs.insert((network, source), (Place::Peer(from), now));
        }
        let receivers = match self.place(network, destination, now) {
            Some(Place::Port(port)) => vec![port],
            Some(Place::Peer(_)) => vec![],
            None => self.connected_ports(network),
        };
        for &to in &receivers {
            self.owe(to, frame, colour, now, 1);
        }
        if receivers.is_empty() {
            self.owe_nobody(network, frame, colour, now, Fate::Dropped(DropReason::NoReceiver));
        }
        true
    }

    /// How many frames older than the cut were passed on to the peer, and came from it.
    pub fn channel(&self, peer: usize, network: usize, cut: u32) -> (u64, u64) {
        let passed_on = (self.copies.iter())
            .filter(|c| c.network == network && c.colour < cut && c.fate == Fate::PassedOn { peer })
            .count();
        let arrived = self.peers[peer].arrived.iter().filter(|a| a.0 == network && a.1 < cut).count();
        (passed_on as u64, arrived as u64)
    }

    /// Whether that was possible.
    pub fn close_channel(&mut self, peer: usize, network: usize, cut: u32, sent: u64) -> bool {
        let (_, arrived) = self.channel(peer, network, cut);
        let closed = &mut self.peers[peer].closed[network];
        if cut < closed.0 {
            return false;
        }
        *closed = (cut, sent.saturating_sub(arrived));
        true
    }

    pub fn restart_peer(&mut self, peer: usize) {
        let state = &mut self.peers[peer];
        state.queue.clear();
        state.arrived.clear();
        state.closed = [(0, 0); 2];
        for copy in self.copies.iter_mut().filter(|copy| copy.fate == Fate::PassedOn { peer }) {
            copy.fate = Fate::Struck;
        }
    }

    fn place(&self, network: usize, destination: Mac, now: u64) -> Option<Place> {
        let &(place, seen) = self.macs.get(&(network, destination))?;
        let gone = matches!(place, Place::Peer(p) if self.peers[p].attached[network] != Some(true));
        (destination[0] & 1 == 0 && now - seen <= LIFETIME_NS && !gone).then_some(place)
    }

    fn connected_ports(&self, network: usize) -> Vec<usize> {
        let connected = |&p: &usize| self.ports[p].network == network && self.ports[p].connected;
        (0..self.ports.len()).filter(connected).collect()
    }

    fn owe_nobody(&mut self, network: usize, frame: &[u8], colour: u32, now: u64, fate: Fate) {
        let bytes = frame.to_vec();
        self.copies.push(Copy { network, to: None, colour, bytes, enqueued: now, fate, recorded: vec![] });
    }

    pub fn inject(&mut self, to: usize, frame: &[u8], colour: u32, now: u64) {
        let index = self.copies.len();
        self.owe(to, frame, colour, now, 1 << 16);
        let base = self.latest;
        let replay = self.recording.is_none() && base.serial == 0;
        let copy = &mut self.copies[index];
        if replay && copy.fate == Fate::Queued && colour < base.cut && base.cut <= self.ports[to].epoch {
            copy.recorded.push((0, 0));
        }
    }

    fn owe(&mut self, to: usize, frame: &[u8], colour: u32, now: u64, least_factor: usize) {
        let port = &self.ports[to];
        let waits: usize = port.queue.iter().map(|&c| 4 + self.copies[c].bytes.len()).sum();
        let blocked = port.queue.iter().any(|&c| self.copies[c].colour > port.epoch);
        let factor = if port.held_for_cut || blocked { least_factor.max(4) } else { least_factor };
        let crossing = self.recording.filter(|r| !port.held_for_cut && colour < r.cut && r.cut <= port.epoch);
        let fate = if !port.connected {
            Fate::Dropped(DropReason::NoReceiver)
        } else if crossing.is_some_and(|r| r.policy == InFlight::Drop) {
            Fate::Dropped(DropReason::CutDrop)
        } else if waits + 4 + frame.len() > factor * self.queue_bytes {
            Fate::Dropped(DropReason::QueueFull)
        } else {
            Fate::Queued
        };
        let recorded = match crossing {
            Some(r) if fate == Fate::Queued => vec![(r.serial, now - port.cut_at)],
            _ => vec![],
        };
        let network = port.network;
        if fate == Fate::Queued {
            self.ports[to].queue.push_back(self.copies.len());
        }
        let bytes = frame.to_vec();
        self.copies.push(Copy { network, to: Some(to), colour, bytes, enqueued: now, fate, recorded });
    }

    pub fn set_connected(&mut self, port: usize, connected: bool) {
        self.ports[port].connected = connected;
        if !connected {
            self.ports[port].head_written = 0;
            for copy in std::mem::take(&mut self.ports[port].queue) {
                self.copies[copy].fate = Fate::Dropped(DropReason::NoReceiver);
            }
        }
    }

    /// Everything that may be written now.
    pub fn writable(&self, port: usize) -> Vec<u8> {
        let port = &self.ports[port];
        let held = port.held_for_cut || port.held_for_pause;
        let mut bytes = Vec::new();
        for (place, &copy) in port.queue.iter().enumerate() {
            let copy = &self.copies[copy];
            let begun = place == 0 && port.head_written > 0;
            if copy.colour > port.epoch || (held && !begun) {
                break;
            }
            bytes.extend((copy.bytes.len() as u32).to_be_bytes());
            bytes.extend(&copy.bytes);
        }
        bytes.drain(..port.head_written);
        bytes
    }

    pub fn written(&mut self, port: usize, count: usize) {
        let port = &mut self.ports[port];
        port.head_written += count;
        while let Some(&copy) = port.queue.front() {
            let copy = &mut self.copies[copy];
            if port.head_written < 4 + copy.bytes.len() {
                break;
            }
            assert!(copy.colour <= port.epoch);
            port.head_written -= 4 + copy.bytes.len();
            copy.fate = Fate::Delivered { at_epoch: port.epoch };
            port.queue.pop_front();
        }
    }

    pub fn hold(&mut self, port: usize, hold: Hold) {
        *self.held(port, hold) = true;
    }

    pub fn release(&mut self, port: usize, hold: Hold) {
        if std::mem::take(self.held(port, hold)) && hold == Hold::Cut {
            self.settle(port);
        }
    }

    /// Whether it was allowed.
    pub fn advance(&mut self, port: usize, to: u32, now: u64) -> bool {
        let state = &mut self.ports[port];
        if !state.held_for_cut || to < state.epoch {
            return false;
        }
        if to > state.epoch {
            state.epoch = to;
            state.cut_at = now;
            self.settle(port);
        }
        true
    }

    pub fn start_recording(&mut self, cut: u32, policy: InFlight) {
        self.latest = Recording { serial: self.latest.serial + 1, cut, policy };
        self.recording = Some(self.latest);
        (0..self.ports.len()).for_each(|port| self.settle(port));
    }

    pub fn newest_epoch(&self) -> u32 {
        self.ports.iter().map(|p| p.epoch).max().unwrap()
    }

    /// The copies that a recording must hold.
    pub fn recorded(&self, serial: usize) -> Vec<(usize, usize, u32, u64, Vec<u8>)> {
        let entry = |c: &Copy| {
            let &(_, after) = c.recorded.iter().find(|(s, _)| *s == serial)?;
            Some((c.network, c.to?, c.colour, after, c.bytes.clone()))
        };
        self.copies.iter().filter_map(entry).collect()
    }

    pub fn accounting(&self, network: usize, cut: u32) -> Accounting {
        let mut books = Accounting::default();
        for peer in &self.peers {
            books.arrived += peer.arrived.iter().filter(|a| a.0 == network && a.1 < cut).count() as u64;
            books.dropped.wire_loss += peer.closed[network].1;
        }
        let copies = self.copies.iter().filter(|c| c.network == network && c.colour < cut);
        for copy in copies.filter(|c| c.fate != Fate::Struck) {
            books.sent_before += 1;
            let latest = self.latest;
            let recorded =
                latest.cut == cut && copy.recorded.iter().any(|(serial, _)| *serial == latest.serial);
            books.in_flight += u64::from(recorded);
            match copy.fate {
                Fate::Delivered { at_epoch } if at_epoch < cut => books.delivered_before += 1,
                _ if recorded => (),
                Fate::Delivered { .. } => books.unrecorded += 1,
                Fate::Queued => books.pending += 1,
                Fate::PassedOn { .. } => books.passed_on += 1,
                Fate::Dropped(DropReason::QueueFull) => books.dropped.queue_full += 1,
                Fate::Dropped(DropReason::NoReceiver) => books.dropped.no_receiver += 1,
                Fate::Dropped(DropReason::CutDrop) => books.dropped.cut_drop += 1,
                Fate::Dropped(reason) => panic!("nothing drops for {reason:?} yet"),
                Fate::Struck => unreachable!("filtered out"),
            }
        }
        books.sent_before -= books.arrived;
        books
    }

    fn settle(&mut self, port: usize) {
        let Some(Recording { serial, cut, policy }) = self.recording else { return };
        let Port { epoch, cut_at, held_for_cut, head_written, .. } = self.ports[port];
        if epoch < cut {
            return;
        }
        let queue = std::mem::take(&mut self.ports[port].queue);
        for (place, index) in queue.into_iter().enumerate() {
            let copy = &mut self.copies[index];
            let held_already = copy.recorded.iter().any(|(s, _)| *s == serial);
            let begun = place == 0 && head_written > 0;
            if copy.colour < cut && !held_already && (begun || !held_for_cut) {
                if policy == InFlight::Drop && !begun {
                    copy.fate = Fate::Dropped(DropReason::CutDrop);
                    continue;
                }
                copy.recorded.push((serial, copy.enqueued.saturating_sub(cut_at)));
            }
            self.ports[port].queue.push_back(index);
        }
    }

    fn held(&mut self, port: usize, hold: Hold) -> &mut bool {
        match hold {
            Hold::Cut => &mut self.ports[port].held_for_cut,
            Hold::Pause => &mut self.ports[port].held_for_pause,
        }
    }

    pub fn epoch(&self, port: usize) -> Epoch {
        Epoch(self.ports[port].epoch)
    }
}
