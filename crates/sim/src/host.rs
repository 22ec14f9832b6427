//! One host: a computer that runs an agent. Owns its switch, its part in the protocol, and what of both survives the
//! agent's death.
//!
//! ```text
//! up     the switch forwards; the participant takes part
//! away   the agent is dead: machines run on without a network, nothing is received, all memory is lost but `Durable`
//! ```

use std::collections::{BTreeMap, BTreeSet};

use diorama_cut::report::{Drops, Frames, NetworkFrames, NetworkId as GlobalNetwork};
use diorama_cut::{CutId, Initiator, Participant, ParticipantId, SnapshotId};
use diorama_switch::{
    Epoch, FrameReader, Hold, InFlight, NetworkConfig, NetworkId, PeerId, PortId, Recording, Switch, Time,
};

use crate::judge::Machine;

/// Which machines and networks a host has, and with whom it shares the latter. Does not change in a run.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// This host's machines and the number of each one's network.
    pub machines: Vec<(Machine, u16)>,
    /// For each network of this host, the other hosts that have ports in it.
    pub shared: BTreeMap<u16, Vec<usize>>,
}

/// What the agent finds again when it comes back.
#[derive(Clone, Debug, Default)]
pub struct Durable {
    /// No frame of this host has had a newer colour. Reserved when a cut is prepared.
    pub epoch: diorama_cut::Epoch,
    /// This host's part is safe and its outcome unknown.
    pub in_doubt: Option<(CutId, ParticipantId)>,
}

/// A local cut under way.
#[derive(Clone, Copy, Debug)]
pub struct LocalCut {
    /// Which.
    pub cut: CutId,
    /// When the ports were held, in nanoseconds.
    pub began_ns: u64,
    /// Whether the machines are stopped.
    pub stopped: bool,
}

/// See the module's page.
#[derive(Debug)]
pub struct Host {
    /// Its number, which is also its participant's.
    pub id: usize,
    /// Which agent process this is.
    pub life: u32,
    /// Whether there is an agent now.
    pub up: bool,
    /// What it serves.
    pub layout: Layout,
    /// The shipped switch.
    pub switch: Switch,
    /// By the switch's network number: the environment's.
    pub networks: Vec<u16>,
    /// And back.
    pub local_networks: BTreeMap<u16, NetworkId>,
    /// Other hosts, as the switch knows them.
    pub peers: BTreeMap<usize, PeerId>,
    /// And back.
    pub peer_hosts: Vec<usize>,
    /// Hosts with which this agent, in this life, has begun a session.
    pub joined: BTreeSet<usize>,
    /// The shipped participant.
    pub participant: Participant,
    /// The shipped initiator, on the host where snapshots are begun.
    pub initiator: Option<Initiator>,
    /// The cut that the machines are being taken through.
    pub cutting: Option<LocalCut>,
    /// The cut whose frames are being recorded.
    pub recording: Option<CutId>,
    /// What a death leaves.
    pub durable: Durable,
    /// What this host's clock says more than the simulation's, in nanoseconds. No two agree.
    pub clock_ahead_ns: u64,
}

impl Host {
    /// A host whose agent has just started, for the first time.
    pub fn new(id: usize, layout: Layout, initiates: bool, clock_ahead_ns: u64) -> Self {
        let mut host = Self {
            id,
            life: 0,
            up: true,
            layout,
            switch: Switch::new(Epoch(0)),
            networks: Vec::new(),
            local_networks: BTreeMap::new(),
            peers: BTreeMap::new(),
            peer_hosts: Vec::new(),
            joined: BTreeSet::new(),
            participant: Participant::new(ParticipantId(id as u32), diorama_cut::Epoch(0)),
            initiator: initiates.then(|| Initiator::new(diorama_cut::Epoch(0))),
            cutting: None,
            recording: None,
            durable: Durable::default(),
            clock_ahead_ns,
        };
        host.build_switch();
        host
    }

    /// The agent dies.
    pub fn die(&mut self) {
        self.up = false;
        self.life += 1;
        self.cutting = None;
        self.recording = None;
    }

    /// The next agent starts.
    pub fn come_back(&mut self, now_ns: u64) {
        let me = ParticipantId(self.id as u32);
        let Durable { epoch, in_doubt } = self.durable;
        let now = self.clock(now_ns);
        self.up = true;
        self.joined.clear();
        self.participant = match in_doubt {
            Some((cut, initiator)) => Participant::recover(me, epoch, cut, initiator, now),
            None => Participant::new(me, epoch),
        };
        if self.initiator.is_some() {
            self.initiator = Some(Initiator::new(epoch));
        }
        self.build_switch();
    }

    /// This host's clock.
    pub fn clock(&self, now_ns: u64) -> std::time::Duration {
        std::time::Duration::from_nanos(now_ns + self.clock_ahead_ns)
    }

    /// Whether this agent has begun a session with every host that it shares a network with. Before that, the two count
    /// different frames, and accounts of a cut would not add up: it must not be prepared.
    pub fn has_joined_all(&self) -> bool {
        self.peers.keys().all(|peer| self.joined.contains(peer))
    }

    /// Whether the machines can send: the agent reads their ports, and they are not stopped.
    pub fn machines_run(&self) -> bool {
        self.up && self.cutting.is_none_or(|cut| !cut.stopped)
    }

    /// Writes down that the epoch of this attempt may be used, if it is still under way.
    pub fn reserve_epoch(&mut self, attempt: SnapshotId) {
        if let Some(cut) = self.participant.active().filter(|cut| cut.snapshot == attempt) {
            self.durable.epoch = self.durable.epoch.max(cut.epoch);
        }
    }

    /// Holds all ports and begins to record.
    pub fn begin_cut(&mut self, cut: CutId, now_ns: u64) {
        self.durable.epoch = self.durable.epoch.max(cut.epoch);
        self.recording = Some(cut);
        self.switch
            .start_recording(Epoch(cut.epoch.0), InFlight::Record)
            .expect("the last recording has ended with its cut");
        for port in self.ports() {
            self.switch.hold(port, Hold::Cut, Time(now_ns));
        }
        self.cutting = Some(LocalCut { cut, began_ns: now_ns, stopped: false });
    }

    /// One machine's cut instant.
    pub fn cut_machine(&mut self, at: usize, cut: CutId, now_ns: u64) {
        let port = PortId(at as u32);
        self.switch.advance_epoch(port, Epoch(cut.epoch.0), Time(now_ns)).expect("held, and epochs rise");
    }

    /// Releases all ports. Returns how long they were held, in nanoseconds.
    pub fn release(&mut self, now_ns: u64) -> u64 {
        for port in self.ports() {
            self.switch.release(port, Hold::Cut, Time(now_ns));
        }
        self.cutting.take().map_or(0, |cut| now_ns - cut.began_ns)
    }

    /// Every port is at `epoch` and delivers; nothing is cut or recorded any more.
    pub fn abandon(&mut self, epoch: diorama_cut::Epoch, now_ns: u64) {
        self.recording = None;
        self.switch.stop_recording();
        self.raise(epoch, now_ns);
    }

    /// Every port is at `epoch` and delivers.
    pub fn raise(&mut self, epoch: diorama_cut::Epoch, now_ns: u64) {
        self.durable.epoch = self.durable.epoch.max(epoch);
        self.cutting = None;
        for port in self.ports() {
            self.switch.hold(port, Hold::Cut, Time(now_ns));
            self.switch.advance_epoch(port, Epoch(epoch.0), Time(now_ns)).expect("epochs never go back");
            self.switch.release(port, Hold::Cut, Time(now_ns));
        }
    }

    /// Ends the recording and makes up the accounts.
    pub fn end_recording(&mut self, cut: CutId) -> (Recording, Vec<NetworkFrames>) {
        self.recording = None;
        let recording = self.switch.stop_recording().expect("it was recording");
        let accounts = self.local_networks.iter().map(|(&global, &local)| {
            let account = self.switch.accounting(local, Epoch(cut.epoch.0)).expect("a recent cut");
            assert_eq!(account.unaccounted_here(), 0, "host {}, network {global}: {account:?}", self.id);
            assert_eq!(account.pending, 0, "host {}, network {global}: {account:?}", self.id);
            let dropped = account.dropped;
            let frames = Frames {
                sent_before: account.sent_before,
                delivered_before: account.delivered_before,
                in_flight: account.in_flight,
                dropped: Drops {
                    queue_full: dropped.queue_full,
                    link_loss: dropped.link_loss,
                    wire_loss: dropped.wire_loss,
                    no_receiver: dropped.no_receiver,
                    cut_drop: dropped.cut_drop,
                },
            };
            NetworkFrames { network: GlobalNetwork(global), frames }
        });
        (recording, accounts.collect())
    }

    /// Takes everything that may be written to machines: the machine, and each frame.
    pub fn deliver(&mut self, now_ns: u64, mut to: impl FnMut(Machine, &[u8])) {
        while let Some(port) = self.switch.pop_dirty() {
            let bytes = self.switch.writable(port).concat();
            let (machine, _) = self.layout.machines[port.0 as usize];
            for frame in FrameReader::new(&bytes) {
                to(machine, frame.expect("the switch keeps the framing"));
            }
            self.switch.written(port, bytes.len(), Time(now_ns));
        }
    }

    /// The ports, one for each machine, in their order.
    pub fn ports(&self) -> impl Iterator<Item = PortId> + use<> {
        (0..self.layout.machines.len() as u32).map(PortId)
    }

    fn build_switch(&mut self) {
        let mut switch = Switch::new(Epoch(self.durable.epoch.0));
        self.networks.clear();
        self.local_networks.clear();
        self.peers.clear();
        self.peer_hosts.clear();
        for &global in self.layout.shared.keys() {
            let local = switch.add_network(NetworkConfig::new(1500, u64::from(global)));
            self.networks.push(global);
            self.local_networks.insert(global, local);
        }
        for (_, network) in &self.layout.machines {
            let port = switch.add_port(self.local_networks[network]);
            switch.set_connected(port, true);
        }
        for (network, hosts) in &self.layout.shared {
            for &other in hosts {
                let peer = *self.peers.entry(other).or_insert_with(|| {
                    self.peer_hosts.push(other);
                    switch.add_peer(1 << 20)
                });
                switch.set_peer_attached(peer, self.local_networks[network], true);
            }
        }
        self.switch = switch;
    }
}
