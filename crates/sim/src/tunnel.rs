//! What joins the hosts' switches: the only place that knows how frames get from one to another. A real tunnel (Geneve,
//! sealing) can take this module's place; the rest of the simulator sees packets that are sent and arrive.
//!
//! Owns the sessions. A session is what two agents agree on anew whenever one of them has lost its memory; each side then
//! begins its counts of the other anew ([`Switch::restart_peer`]), and packets of an earlier session are not let in.
//! Within a session each packet is let in once, whatever the network repeats.
//!
//! In one respect this is simpler than the truth: both sides begin a session at the same instant.
//!
//! [`Switch::restart_peer`]: diorama_switch::Switch::restart_peer

use std::collections::BTreeMap;

use diorama_cut::report::{Channel, ChannelCount, NetworkId};
use diorama_cut::{CutId, ParticipantId};
use diorama_switch::{
    Epoch, Time,
    arrivals::{Arrival, Arrivals},
};

use crate::{host::Host, scenario::Sabotage};

/// One frame on its way between two hosts.
#[derive(Clone, Debug)]
pub struct Packet {
    /// The sender.
    pub from: usize,
    /// The receiver.
    pub to: usize,
    session: u64,
    sequence: u64,
    network: u16,
    colour: Epoch,
    /// The frame.
    pub frame: Box<[u8]>,
}

/// All tunnels of the environment.
#[derive(Debug, Default)]
pub struct Tunnels {
    /// By pair, the lower host first. None while there is none.
    sessions: BTreeMap<(usize, usize), u64>,
    last_session: u64,
    /// By sender and receiver.
    ways: BTreeMap<(usize, usize), Way>,
    /// Packets that were refused: of an earlier session, or repeated.
    pub refused: u64,
    /// Packets sent.
    pub sent: u64,
}

#[derive(Debug, Default)]
struct Way {
    next: u64,
    /// The shipped replay window.
    arrivals: Arrivals,
}

impl Tunnels {
    /// Begins a session between two hosts that are up and record nothing. (While one records, its counts of the other
    /// belong to the accounts of that cut; restarted, hosts' accounts of it would not add up.)
    pub fn join(&mut self, a: &mut Host, b: &mut Host) {
        let pair = (a.id.min(b.id), a.id.max(b.id));
        self.last_session += 1;
        self.sessions.insert(pair, self.last_session);
        for way in [(a.id, b.id), (b.id, a.id)] {
            self.ways.insert(way, Way::default());
        }
        let (one, other) = (a.id, b.id);
        for (host, other) in [(a, other), (b, one)] {
            let peer = host.peers[&other];
            host.joined.insert(other);
            host.switch.restart_peer(peer);
            host.switch.set_peer_connected(peer, true);
        }
    }

    /// Takes everything that waits for tunnels out of a host's switch.
    pub fn drain(&mut self, host: &mut Host, now: Time) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some(peer) = host.switch.pop_dirty_peer() {
            let to = host.peer_hosts[peer.0 as usize];
            let pair = (host.id.min(to), host.id.max(to));
            let session = self.sessions.get(&pair).copied().unwrap_or(0);
            let way = self.ways.entry((host.id, to)).or_default();
            while let Some(outgoing) = host.switch.outgoing(peer) {
                packets.push(Packet {
                    from: host.id,
                    to,
                    session,
                    sequence: way.next,
                    network: host.networks[usize::from(outgoing.network.0)],
                    colour: outgoing.colour,
                    frame: outgoing.bytes.concat().into_boxed_slice(),
                });
                way.next += 1;
                host.switch.outgoing_taken(peer, now);
            }
        }
        self.sent += packets.len() as u64;
        packets
    }

    /// A packet has come. True if its frame was let in.
    pub fn arrive(
        &mut self,
        host: &mut Host,
        packet: &Packet,
        sabotage: Option<Sabotage>,
        now: Time,
    ) -> bool {
        let pair = (packet.from.min(packet.to), packet.from.max(packet.to));
        let way = self.ways.entry((packet.from, packet.to)).or_default();
        if self.sessions.get(&pair) != Some(&packet.session)
            || way.arrivals.accept(packet.sequence) != Arrival::New
        {
            self.refused += 1;
            return false;
        }
        let Some(&network) = host.local_networks.get(&packet.network) else { return false };
        let peer = host.peers[&packet.from];
        let colour = match sabotage {
            Some(Sabotage::ForgetColour) => host.switch.newest_epoch(),
            _ => packet.colour,
        };
        host.switch.remote_ingress(peer, network, colour, &packet.frame, now)
    }
}

impl Host {
    /// What this host has sent to others of colours older than the cut.
    pub fn sent_before(&self, cut: CutId) -> Vec<ChannelCount> {
        let counts =
            self.channels(cut).map(|(channel, counts)| ChannelCount { channel, copies: counts.sent });
        let mut counts: Vec<_> = counts.filter(|count| count.copies > 0).collect();
        counts.sort_by_key(|count| count.channel);
        counts
    }

    /// What it has received from others of colours older than the cut, and what it knows to be lost.
    pub fn received_before(&self, cut: CutId) -> Vec<(Channel, u64, u64)> {
        self.channels(cut).map(|(channel, counts)| (channel, counts.received, counts.lost)).collect()
    }

    /// The same for one peer.
    pub fn received_from(&self, peer: usize, cut: CutId) -> Vec<(Channel, u64, u64)> {
        self.channels_of(peer, cut).map(|(channel, counts)| (channel, counts.received, counts.lost)).collect()
    }

    /// Closes all channels: what has not come is lost.
    ///
    /// # Panics
    ///
    /// If the protocol and the switch disagree about what is missing.
    pub fn close_channels(&mut self, cut: CutId, missing: &BTreeMap<Channel, u64>) {
        for (channel, received, _) in self.received_before(cut) {
            let missing = missing.get(&channel).copied().unwrap_or(0);
            let peer = self.peers[&(channel.peer.0 as usize)];
            let network = self.local_networks[&channel.network.0];
            let lost = self.switch.close_channel(peer, network, Epoch(cut.epoch.0), received + missing);
            assert_eq!(lost, Some(missing), "{channel:?} of {cut}");
        }
    }

    fn channels(&self, cut: CutId) -> impl Iterator<Item = (Channel, diorama_switch::ChannelCounts)> + '_ {
        self.peers.keys().flat_map(move |&peer| self.channels_of(peer, cut))
    }

    fn channels_of(
        &self,
        peer: usize,
        cut: CutId,
    ) -> impl Iterator<Item = (Channel, diorama_switch::ChannelCounts)> + '_ {
        let id = self.peers[&peer];
        self.local_networks.iter().filter_map(move |(&global, &local)| {
            let counts = self.switch.channel(id, local, Epoch(cut.epoch.0))?;
            Some((Channel { peer: ParticipantId(peer as u32), network: NetworkId(global) }, counts))
        })
    }
}
