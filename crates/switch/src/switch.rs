//! The switch: networks and their ports, forwarding, and the cut's operations on them.
//!
//! Owns the networks, the ports and what they share. What a port does with a copy is in `port`, what it means for the
//! books in `ledger`.
//!
//! Which copies a valid frame is owed: to a learned address, one; to any other, one for each connected port of the
//! network but the sender's. Where that leaves nobody (no other port connected; the learned port not connected; the
//! address learned at the sender's own port), one copy is owed to nobody and dropped as no_receiver, so that no frame
//! vanishes from the books. Invalid frames (runts, giants) are counted at their port and owed to nobody.
//!
//! A network may have ports on other hosts, the peers. To a sender's switch a peer is one more receiver, of one copy,
//! whether the frame is for one machine there or for all; the peer's switch owes what it makes of it to its own ports, by
//! the same rules, and to no other peer (split horizon: all hosts of a network have tunnels to one another, so the sender's
//! switch has served them already). An address learned at a peer that has no port in the network any more is unknown.

mod peers;

use crate::{
    Epoch, FRAME_OVERHEAD, LENGTH_BYTES, MIN_FRAME, Mac, NetworkId, PeerId, PortId, Time,
    counters::{DropReason, NetworkCounters, PortCounters},
    ledger::{Accounting, Ledger, RecordedCopies},
    mac_table::MacTable,
    peer::{Offer, Peer},
    port::{EpochError, Hold, Offered, Port, Shared},
    recorder::{DEFAULT_RECORDING_BYTES, InFlight, Recorder, Recording, RecordingActive},
};

/// The largest queue bound, in bytes; larger requests get this. Keeps the raised bound of a held port within reason.
const LARGEST_QUEUE_BYTES: usize = 256 << 20;

/// The serial number of what is not a recording but its replay: frames of older colours injected at the beginning.
const REPLAYED: u32 = 1;

/// One network's properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// What a frame may carry behind its Ethernet header and VLAN tags, in bytes.
    pub mtu: u16,
    /// How many bytes may wait for one port, length prefixes included. Rounded up to a power of two that holds at
    /// least one frame of the largest size. A port that waits for a cut may take four times as much.
    pub queue_bytes: usize,
    /// How many addresses the network learns; every port may learn a few (4) beyond.
    pub mac_entries: usize,
    /// How many of them at one port, so that one machine cannot take them all. (One peer, which stands for many machines,
    /// may take half of all.)
    pub mac_entries_per_port: usize,
    /// Random, unknown to the machines: keeps them from choosing addresses that collide in the MAC table.
    pub mac_seed: u64,
}

impl NetworkConfig {
    /// The usual bounds: 1 MiB of queue for each port, 4096 addresses, 1024 at one port.
    pub fn new(mtu: u16, mac_seed: u64) -> Self {
        Self { mtu, queue_bytes: 1 << 20, mac_entries: 4096, mac_entries_per_port: 1024, mac_seed }
    }

    /// The longest valid frame, in bytes.
    pub fn max_frame(&self) -> usize {
        usize::from(self.mtu) + FRAME_OVERHEAD
    }

    fn rounded_queue_bytes(&self) -> usize {
        self.queue_bytes.clamp(LENGTH_BYTES + self.max_frame(), LARGEST_QUEUE_BYTES).next_power_of_two()
    }
}

/// A frame of a newer colour waits at a port: its machine must be cut before it can be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutWanted {
    /// Where it waits.
    pub port: PortId,
    /// The newest colour that waits, or waited, there.
    pub epoch: Epoch,
}

/// A frame cannot be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    /// No valid frame of its network has this length.
    #[error("a frame of {len} bytes cannot be replayed to {to}: its network carries {min} to {max}", min = MIN_FRAME)]
    Length {
        /// The receiver.
        to: PortId,
        /// Its length, in bytes.
        len: usize,
        /// The longest that the network carries, in bytes.
        max: usize,
    },
}

/// An address cannot be put into a network's MAC table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LearnError {
    /// Group addresses and the zero address are nobody's.
    #[error("{mac:02x?} is not one machine's address")]
    NotUnicast {
        /// The address.
        mac: Mac,
    },
    /// The port belongs elsewhere.
    #[error("{port} is not a port of {network}")]
    OtherNetwork {
        /// The network whose table was meant.
        network: NetworkId,
        /// The port.
        port: PortId,
    },
    /// The port's or the network's bound is reached.
    #[error("the MAC table of {network} has no room for {mac:02x?} at {port}")]
    Full {
        /// The network.
        network: NetworkId,
        /// The port.
        port: PortId,
        /// The address.
        mac: Mac,
    },
    /// The peer has no port in the network.
    #[error("{peer} has no port in {network}")]
    NotAttached {
        /// The network whose table was meant.
        network: NetworkId,
        /// The peer.
        peer: PeerId,
    },
    /// The peer's or the network's bound is reached.
    #[error("the MAC table of {network} has no room for {mac:02x?} at {peer}")]
    FullAtPeer {
        /// The network.
        network: NetworkId,
        /// The peer.
        peer: PeerId,
        /// The address.
        mac: Mac,
    },
}

/// Where an address can be: what the MAC table's numbers mean.
#[derive(Clone, Copy, Debug)]
enum Place {
    Port(PortId),
    /// An index of [`Network::members`].
    Peer(usize),
}

/// A peer in one network. Its index is its channel's number in the ledger.
#[derive(Debug)]
struct Member {
    peer: PeerId,
    /// Its number in the MAC table.
    place: u32,
    /// Whether it has ports in the network now.
    attached: bool,
}

#[derive(Debug)]
struct Network {
    max_frame: usize,
    queue_bytes: usize,
    mac_entries_per_port: usize,
    mac_entries_per_peer: usize,
    ports: Vec<PortId>,
    members: Vec<Member>,
    /// By peer: its index among the members.
    member_of: Vec<Option<usize>>,
    places: Vec<Place>,
    macs: MacTable,
    ledger: Ledger,
}

impl Network {
    fn member(&self, peer: PeerId) -> Option<usize> {
        self.member_of.get(peer.0 as usize).copied().flatten()
    }

    /// Where an address was learned, unless it has aged or its host has no port here any more.
    #[inline]
    fn find(&self, destination: Mac, now: Time) -> Option<Place> {
        if is_group(destination) {
            return None;
        }
        match self.places[self.macs.lookup(destination, now)? as usize] {
            Place::Peer(member) if !self.members[member].attached => None,
            place => Some(place),
        }
    }
}

/// Gives a peer its one copy of a frame, which the caller owes it.
#[inline]
fn pass_on(
    (peer, id, channel): (&mut Peer, PeerId, usize),
    network: NetworkId,
    offered: Offered<'_>,
    ledger: &mut Ledger,
    dirty: &mut Vec<PeerId>,
) {
    let Offered { frame, colour, now } = offered;
    match peer.offer(id, (network, colour), frame, now, dirty) {
        Offer::Queued => ledger.pass_on(channel, colour),
        Offer::Dropped(reason) => ledger.drop(colour, reason, 0),
    }
}

/// The switch of one environment on one host. See the crate's documentation for how to use it.
///
/// # Panics
///
/// Methods panic when given an id that this switch did not hand out.
#[derive(Debug)]
pub struct Switch {
    /// The newest epoch of any port, or the one to begin at.
    epoch: Epoch,
    networks: Vec<Network>,
    ports: Vec<Port>,
    peers: Vec<Peer>,
    /// Peers with `dirty` set, each once.
    dirty_peers: Vec<PeerId>,
    shared: Shared,
    last_serial: u32,
    recording_limit: usize,
}

impl Switch {
    /// A switch without networks, all of whose ports will begin at `epoch`: 0 for a new environment, the snapshot's
    /// cut for a restored one.
    pub fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            networks: Vec::new(),
            ports: Vec::new(),
            peers: Vec::new(),
            dirty_peers: Vec::new(),
            shared: Shared::default(),
            last_serial: REPLAYED,
            recording_limit: DEFAULT_RECORDING_BYTES,
        }
    }

    /// Bounds the memory of recordings that start from now on, in bytes.
    pub fn set_recording_limit(&mut self, bytes: usize) {
        self.recording_limit = bytes;
    }

    /// Adds a network without ports.
    ///
    /// # Panics
    ///
    /// With 65,536 networks already there.
    pub fn add_network(&mut self, config: NetworkConfig) -> NetworkId {
        let id = NetworkId(u16::try_from(self.networks.len()).expect("no more than 65,536 networks"));
        let mut ledger = Ledger::new(self.epoch);
        ledger.recorded = match &self.shared.recorder {
            Some(recorder) => {
                RecordedCopies { serial: recorder.serial, cut: recorder.cut(), ..Default::default() }
            }
            None => RecordedCopies { serial: self.last_serial, cut: self.epoch, ..Default::default() },
        };
        self.networks.push(Network {
            max_frame: config.max_frame(),
            queue_bytes: config.rounded_queue_bytes(),
            mac_entries_per_port: config.mac_entries_per_port,
            mac_entries_per_peer: config.mac_entries_per_port.max(config.mac_entries / 2),
            ports: Vec::new(),
            members: Vec::new(),
            member_of: Vec::new(),
            places: Vec::new(),
            macs: MacTable::new(config.mac_entries, config.mac_seed),
            ledger,
        });
        id
    }

    /// Adds a port, not connected, not held, at the newest epoch.
    ///
    /// # Panics
    ///
    /// With 2^32 ports already there.
    pub fn add_port(&mut self, network: NetworkId) -> PortId {
        let id = PortId(u32::try_from(self.ports.len()).expect("no more than 2^32 ports"));
        let owner = &mut self.networks[usize::from(network.0)];
        self.ports.push(Port::new(id, network, owner.places.len() as u32, self.epoch, owner.queue_bytes));
        owner.ports.push(id);
        owner.places.push(Place::Port(id));
        owner.macs.add_port(owner.mac_entries_per_port);
        id
    }

    /// Whether a machine's socket is there to take frames. Disconnecting drops what waits for it, the rest of a partly
    /// written frame too, as no_receiver.
    pub fn set_connected(&mut self, port: PortId, connected: bool) {
        let (port, ledger, _) = self.split(port);
        port.set_connected(connected, ledger);
    }

    /// One whole frame came from the port's machine, without its length prefix.
    pub fn ingress(&mut self, from: PortId, frame: &[u8], now: Time) {
        let Self { networks, ports, peers, dirty_peers, shared, .. } = self;
        let sender = &mut ports[from.0 as usize];
        let id = sender.network;
        let network = &mut networks[usize::from(id.0)];
        let Some((destination, source)) = addresses(frame) else {
            sender.counters.runts += 1;
            return;
        };
        if frame.len() > network.max_frame {
            sender.counters.giants += 1;
            return;
        }
        sender.counters.received_frames += 1;
        sender.counters.received_bytes += frame.len() as u64;
        if is_one_machines(source) && !network.macs.observe(source, sender.local, now) {
            sender.counters.unlearned += 1;
        }

        let offered = Offered { frame, colour: sender.epoch, now };
        let place = network.find(destination, now);
        let Network { ports: receivers, members, ledger, .. } = network;
        let owed = match place {
            Some(Place::Port(at)) if at == from => 0,
            Some(Place::Port(at)) => {
                let receiver = &mut ports[at.0 as usize];
                receiver.offer(offered, receiver.limit(), ledger, shared);
                1
            }
            Some(Place::Peer(at)) => {
                let to = members[at].peer;
                pass_on((&mut peers[to.0 as usize], to, at), id, offered, ledger, dirty_peers);
                1
            }
            None => {
                let mut copies = flood(receivers, Some(from), offered, ports, ledger, shared);
                for (at, &Member { peer: to, attached, .. }) in members.iter().enumerate() {
                    let peer = &mut peers[to.0 as usize];
                    if attached && peer.connected {
                        pass_on((peer, to, at), id, offered, ledger, dirty_peers);
                        copies += 1;
                    }
                }
                copies
            }
        };
        ledger.owe(offered.colour, owed.max(1));
        if owed == 0 {
            ledger.drop(offered.colour, DropReason::NoReceiver, 0);
        }
    }

    /// Replays a recorded frame into a restored environment: one copy, owed to `to`, of the colour it had. It may queue
    /// beyond the port's bound, up to [`DEFAULT_RECORDING_BYTES`]: what a snapshot holds must not be lost by a machine
    /// that is slow to wake.
    ///
    /// Until the first recording starts, such frames are in flight at the cut at which this switch began. Inject all
    /// of them before the next cut starts: a frame still outstanding then is missing from that snapshot, and injected
    /// afterwards it shows there as unaccounted.
    pub fn inject(&mut self, to: PortId, frame: &[u8], colour: Epoch, now: Time) -> Result<(), InjectError> {
        let is_replay = self.shared.recorder.is_none() && self.last_serial == REPLAYED;
        let network = self.ports[to.0 as usize].network;
        let max = self.networks[usize::from(network.0)].max_frame;
        if !(MIN_FRAME..=max).contains(&frame.len()) {
            return Err(InjectError::Length { to, len: frame.len(), max });
        }
        let (port, ledger, shared) = self.split(to);
        ledger.owe(colour, 1);
        let queued = port.offer(Offered { frame, colour, now }, DEFAULT_RECORDING_BYTES, ledger, shared);
        let base = ledger.recorded.cut;
        if queued
            && is_replay
            && colour < base
            && base <= port.epoch
            && let Some(last) = port.queue.last_mut()
        {
            last.recorded_in = REPLAYED;
            ledger.recorded.copies += 1;
        }
        Ok(())
    }

    /// A port that may have something to write: since it was last returned, a frame came for it or it was released.
    pub fn pop_dirty(&mut self) -> Option<PortId> {
        while let Some(id) = self.shared.dirty.pop() {
            let port = &mut self.ports[id.0 as usize];
            port.dirty = false;
            if port.is_writable() {
                return Some(id);
            }
        }
        None
    }

    /// What may be written to the port's socket now: length-prefixed frames up to the first of a newer colour. While
    /// held, only the rest of a partly written frame. The second slice follows the first.
    #[inline]
    pub fn writable(&self, port: PortId) -> [&[u8]; 2] {
        self.ports[port.0 as usize].writable()
    }

    /// The first `bytes` of [`Switch::writable`] were written to the port's socket. A frame counts as delivered with
    /// its last byte.
    #[inline]
    pub fn written(&mut self, port: PortId, bytes: usize, now: Time) {
        let (port, ledger, _) = self.split(port);
        debug_assert!(
            bytes <= port.writable().iter().map(|s| s.len()).sum(),
            "more written than was writable"
        );
        port.written(bytes, now, ledger);
    }

    /// Whether a part of a frame was written and its rest was not. Such a port is not drained: write the rest first.
    pub fn mid_frame(&self, port: PortId) -> bool {
        self.ports[port.0 as usize].queue.mid_frame()
    }

    /// Stops delivery to the port; what arrives queues. The two kinds of hold are independent of one another.
    pub fn hold(&mut self, port: PortId, hold: Hold, now: Time) {
        self.ports[port.0 as usize].hold(hold, now);
    }

    /// Whether the port is held, for any reason.
    pub fn is_held(&self, port: PortId) -> bool {
        self.ports[port.0 as usize].is_held()
    }

    /// The port's machine passes the cut `to`, at this instant: what it sends from now on has the new colour. Advancing
    /// to where it is already changes nothing.
    pub fn advance_epoch(&mut self, port: PortId, to: Epoch, now: Time) -> Result<(), EpochError> {
        let (port, ledger, shared) = self.split(port);
        port.advance(to, now, ledger, shared)?;
        self.epoch = self.epoch.max(to);
        Ok(())
    }

    /// Ends a hold. When it was for the cut being recorded and the port has passed it, queued copies of older colours
    /// are recorded, and so are later arrivals. Returns how long the hold lasted, in nanoseconds (the stall), or None
    /// if there was no such hold.
    pub fn release(&mut self, port: PortId, hold: Hold, now: Time) -> Option<u64> {
        let (port, ledger, shared) = self.split(port);
        port.release(hold, now, ledger, shared)
    }

    /// Records the copies in flight at `cut` from now on; to be called before any port passes it.
    pub fn start_recording(&mut self, cut: Epoch, policy: InFlight) -> Result<(), RecordingActive> {
        if let Some(recorder) = &self.shared.recorder {
            return Err(RecordingActive { cut: recorder.cut() });
        }
        self.last_serial = self.last_serial.checked_add(1).unwrap_or(REPLAYED + 1);
        let serial = self.last_serial;
        self.shared.recorder = Some(Recorder::new(serial, cut, policy, self.recording_limit));
        for network in &mut self.networks {
            network.ledger.recorded = RecordedCopies { serial, cut, ..Default::default() };
        }
        // A port that has passed the cut already would deliver its queue unrecorded.
        for port in &mut self.ports {
            port.settle(&mut self.networks[usize::from(port.network.0)].ledger, &mut self.shared);
        }
        Ok(())
    }

    /// Ends the recording and returns it; None if there was none. To be called once every port has passed the cut and
    /// been released, or when the cut is aborted.
    pub fn stop_recording(&mut self) -> Option<Recording> {
        self.shared.recorder.take().map(Recorder::finish)
    }

    /// A port where a newer colour waits for a cut, each port once for each colour.
    pub fn pop_cut_wanted(&mut self) -> Option<CutWanted> {
        while let Some(id) = self.shared.wanted.pop() {
            let port = &mut self.ports[id.0 as usize];
            port.wanted_listed = false;
            if let Some(epoch) = port.wanted_cut() {
                return Some(CutWanted { port: id, epoch });
            }
        }
        None
    }

    /// The colour of the first frame at the port that waits for a cut.
    pub fn waiting_for(&self, port: PortId) -> Option<Epoch> {
        let port = &self.ports[port.0 as usize];
        port.queue.first_newer(port.epoch)
    }

    /// The frame conservation of a network at a cut, cumulative over this switch's life. Walks the network's queues.
    ///
    /// None for a cut before the latest that was recorded (its recorded copies are not remembered) or for which a channel
    /// was closed, for the beginning,
    /// and for one so old that its colour is not told apart any more: ask when a cut's recording stops.
    pub fn accounting(&self, network: NetworkId, cut: Epoch) -> Option<Accounting> {
        let network = &self.networks[usize::from(network.0)];
        if cut < network.ledger.recorded.cut {
            return None;
        }
        let queues = network.ports.iter().map(|port| &self.ports[port.0 as usize].queue);
        network.ledger.accounting(cut, queues.flat_map(|q| q.frames()).map(|f| (f.colour, f.recorded_in)))
    }

    /// The newest epoch that any port has reached.
    pub fn newest_epoch(&self) -> Epoch {
        self.epoch
    }

    /// The port's epoch: the number of cuts its machine has passed.
    pub fn epoch(&self, port: PortId) -> Epoch {
        self.ports[port.0 as usize].epoch
    }

    /// Whether the port is connected.
    pub fn is_connected(&self, port: PortId) -> bool {
        self.ports[port.0 as usize].connected
    }

    /// The network's ports, in the order in which they were added.
    pub fn ports(&self, network: NetworkId) -> &[PortId] {
        &self.networks[usize::from(network.0)].ports
    }

    /// What the port has seen.
    pub fn counters(&self, port: PortId) -> PortCounters {
        self.ports[port.0 as usize].counters()
    }

    /// What the network has carried.
    pub fn network_counters(&self, network: NetworkId) -> NetworkCounters {
        let network = &self.networks[usize::from(network.0)];
        let mut counters = NetworkCounters {
            owed: network.ledger.total_owed(),
            delivered: network.ledger.total_delivered(),
            dropped: network.ledger.total_dropped(),
            learned: network.macs.len() as u64,
            passed_on: network.ledger.total_passed_on(),
            arrived: network.ledger.total_arrived(),
            ..NetworkCounters::default()
        };
        for port in &network.ports {
            let port = self.counters(*port);
            counters.received_frames += port.received_frames;
            counters.received_bytes += port.received_bytes;
            counters.invalid_frames += port.runts + port.giants;
            counters.queued += port.queued_frames;
        }
        counters
    }

    /// Where the network's addresses on this host are, aged ones left out; in no particular order.
    pub fn learned(&self, network: NetworkId) -> impl Iterator<Item = (Mac, PortId)> + '_ {
        let network = &self.networks[usize::from(network.0)];
        network.macs.entries().filter_map(|(mac, place)| match network.places[place as usize] {
            Place::Port(port) => Some((mac, port)),
            Place::Peer(_) => None,
        })
    }

    /// Puts an address into a network's table as if it had been seen now: what a snapshot remembers.
    pub fn learn(&mut self, network: NetworkId, mac: Mac, port: PortId, now: Time) -> Result<(), LearnError> {
        if !is_one_machines(mac) {
            return Err(LearnError::NotUnicast { mac });
        }
        let member = &self.ports[port.0 as usize];
        if member.network != network {
            return Err(LearnError::OtherNetwork { network, port });
        }
        if !self.networks[usize::from(network.0)].macs.observe(mac, member.local, now) {
            return Err(LearnError::Full { network, port, mac });
        }
        Ok(())
    }

    /// Panics unless every invariant holds. For tests and simulations: costs time in proportion to all that waits.
    pub fn assert_consistent(&self) {
        for port in &self.ports {
            port.assert_consistent();
            assert!(port.epoch <= self.epoch, "{} is ahead of the newest epoch", port.id);
            let listed = |list: &[PortId]| list.iter().filter(|&&id| id == port.id).count();
            assert_eq!(listed(&self.shared.dirty), usize::from(port.dirty), "dirty list and flag disagree");
            assert_eq!(
                listed(&self.shared.wanted),
                usize::from(port.wanted_listed),
                "wanted list and flag disagree"
            );
        }
        for (index, network) in self.networks.iter().enumerate() {
            network.macs.assert_consistent();
            let c = self.network_counters(NetworkId(index as u16));
            let dropped = c.dropped.total() - c.dropped.wire_loss;
            assert_eq!(c.owed, c.delivered + dropped + c.queued + c.passed_on, "a copy has no fate, or two");
        }
        for (index, peer) in self.peers.iter().enumerate() {
            peer.assert_consistent();
            let listed = self.dirty_peers.iter().filter(|id| id.0 as usize == index).count();
            assert_eq!(listed, usize::from(peer.dirty), "dirty list and flag of a peer disagree");
        }
    }

    fn split(&mut self, port: PortId) -> (&mut Port, &mut Ledger, &mut Shared) {
        let port = &mut self.ports[port.0 as usize];
        let ledger = &mut self.networks[usize::from(port.network.0)].ledger;
        (port, ledger, &mut self.shared)
    }
}

/// Gives each connected port but the sender's a copy; returns how many that is.
#[inline]
fn flood(
    receivers: &[PortId],
    sender: Option<PortId>,
    offered: Offered<'_>,
    ports: &mut [Port],
    ledger: &mut Ledger,
    shared: &mut Shared,
) -> u64 {
    let mut copies = 0;
    for &at in receivers.iter().filter(|&&at| Some(at) != sender) {
        let receiver = &mut ports[at.0 as usize];
        if receiver.connected {
            receiver.offer(offered, receiver.limit(), ledger, shared);
            copies += 1;
        }
    }
    copies
}

/// Destination and source; None if there is not even an Ethernet header.
#[inline]
fn addresses(frame: &[u8]) -> Option<(Mac, Mac)> {
    let header: &[u8; MIN_FRAME] = frame.first_chunk()?;
    let [a, b, c, d, e, f, g, h, i, j, k, l, _, _] = *header;
    Some(([a, b, c, d, e, f], [g, h, i, j, k, l]))
}

#[inline]
fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether one machine can have this address.
#[inline]
fn is_one_machines(mac: Mac) -> bool {
    !is_group(mac) && mac != [0; 6]
}
