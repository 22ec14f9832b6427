//! An environment's other hosts, as its data plane has them: one peer of the switch and one tunnel each.
//!
//! A *session* is the life of one pair of tunnels. It begins when both hosts have handed each other fresh keys, and the
//! counts of frames between them begin with it. While a cut is recorded, no session is begun: the cut's accounts are made
//! of the old one's counts.

use std::net::SocketAddr;

use diorama_switch::geneve::Vni;
use diorama_switch::{ChannelCounts, Epoch, NetworkId, PeerId, Time};
use diorama_tunnel::{Opened, ReceivingKey, SendingKey, Tunnel};

use super::plane::Io;
use super::segment::Segment;

/// How often a call is sent: more than once, as packets are lost; the protocol's own message comes besides, later.
const CALLS: usize = 2;

/// How an environment spans hosts.
pub(crate) struct Span {
    /// The networks' numbers on the wire, in the order of the specification.
    pub(crate) vnis: Vec<Vni>,
    /// Called when a frame of a newer colour waits here: on the data plane's thread, so it must not wait.
    pub(crate) newer_colour: Box<dyn FnMut(Epoch) + Send>,
}

impl std::fmt::Debug for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Span").field("vnis", &self.vnis).finish_non_exhaustive()
    }
}

/// One other host of an environment.
#[derive(Debug)]
pub(super) struct PeerLink {
    id: PeerId,
    address: SocketAddr,
    tunnel: Option<Tunnel>,
}

/// How this host stands with another, for one environment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerStatus {
    pub(crate) peer: PeerId,
    /// Whether there is a session.
    pub(crate) connected: bool,
    pub(crate) rekey_due: bool,
}

/// The part of a segment that concerns other hosts.
#[derive(Debug)]
pub(super) struct Peers {
    span: Span,
    links: Vec<PeerLink>,
    /// The newest colour that was told of.
    told: Epoch,
}

impl Peers {
    pub(super) fn new(span: Span) -> Self {
        Self { span, links: Vec::new(), told: Epoch(0) }
    }

    /// A cut of this epoch has begun somewhere.
    fn tell(&mut self, epoch: Epoch) {
        if epoch > self.told {
            self.told = epoch;
            (self.span.newer_colour)(epoch);
        }
    }

    fn link(&mut self, peer: PeerId) -> Option<&mut PeerLink> {
        self.links.iter_mut().find(|link| link.id == peer)
    }
}

impl Segment {
    /// Adds another host, which has ports in `networks`. Without a session, frames for it are dropped and counted.
    pub(crate) fn add_peer(
        &mut self,
        address: SocketAddr,
        networks: &[NetworkId],
        queue_bytes: usize,
    ) -> Option<PeerId> {
        let id = self.switch_mut().add_peer(queue_bytes);
        for network in networks {
            self.switch_mut().set_peer_attached(id, *network, true);
        }
        self.peers_mut()?.links.push(PeerLink { id, address, tunnel: None });
        Some(id)
    }

    /// Begins a session with another host, or ends the one that there is. False, and nothing is changed, while a cut is
    /// being recorded.
    pub(crate) fn set_session(&mut self, peer: PeerId, tunnel: Option<Tunnel>) -> bool {
        if self.is_recording() {
            return false;
        }
        let connected = tunnel.is_some();
        let Some(peers) = self.peers_mut() else { return false };
        let vnis = peers.span.vnis.clone();
        let Some(link) = peers.link(peer) else { return false };
        link.tunnel = tunnel;
        if let Some(tunnel) = &mut link.tunnel {
            vnis.iter().for_each(|vni| tunnel.admit(*vni));
        }
        if connected {
            self.switch_mut().restart_peer(peer);
        }
        self.switch_mut().set_peer_connected(peer, connected);
        true
    }

    /// Replaces a session's key for sending.
    pub(crate) fn install_sending(&mut self, peer: PeerId, key: SendingKey) -> bool {
        self.with_tunnel(peer, |tunnel| tunnel.install_sending(key))
    }

    /// Takes packets of another key too.
    pub(crate) fn install_receiving(&mut self, peer: PeerId, key: ReceivingKey) -> bool {
        self.with_tunnel(peer, |tunnel| tunnel.install_receiving(key))
    }

    fn with_tunnel(&mut self, peer: PeerId, change: impl FnOnce(&mut Tunnel)) -> bool {
        let tunnel =
            self.peers_mut().and_then(|peers| peers.link(peer)).and_then(|link| link.tunnel.as_mut());
        tunnel.map(change).is_some()
    }

    /// All other hosts.
    pub(crate) fn peer_status(&self) -> Vec<PeerStatus> {
        let of = |link: &PeerLink| PeerStatus {
            peer: link.id,
            connected: link.tunnel.is_some(),
            rekey_due: link.tunnel.as_ref().is_some_and(Tunnel::rekey_due),
        };
        self.peers().map(|peers| peers.links.iter().map(of).collect()).unwrap_or_default()
    }

    /// What the cut divides of the frames between this host and each other one.
    pub(crate) fn channels(&self, cut: Epoch) -> Vec<(PeerId, NetworkId, ChannelCounts)> {
        let Some(peers) = self.peers() else { return Vec::new() };
        let mut channels = Vec::new();
        for link in &peers.links {
            for network in self.networks() {
                if let Some(counts) = self.switch().channel(link.id, *network, cut) {
                    channels.push((link.id, *network, counts));
                }
            }
        }
        channels
    }

    /// A packet from another host.
    pub(super) fn receive(&mut self, from: SocketAddr, network: NetworkId, packet: &mut [u8], now: Time) {
        let Some((switch, peers)) = self.switch_and_peers() else { return };
        let Some(link) = peers.links.iter_mut().find(|link| link.address == from) else { return };
        let Some(tunnel) = &mut link.tunnel else { return };
        // The tunnel counts what it does not open, and the switch what it does not let in.
        if let Ok(Opened { colour, frame, .. }) = tunnel.open(packet, now) {
            if frame.is_empty() {
                return peers.tell(colour);
            }
            switch.remote_ingress(link.id, network, colour, frame, now);
        }
    }

    /// Tells all other hosts that a cut of this epoch has begun. A *call* is a packet of the new colour without a frame:
    /// it begins a host's part as a frame of that colour would, and is in no account.
    pub(super) fn call_for_cut(&mut self, epoch: Epoch, io: &mut Io<'_>) {
        let Some(wire) = io.wire.as_mut() else { return };
        let Some(peers) = self.peers_mut() else { return };
        let Some(vni) = peers.span.vnis.first().copied() else { return };
        for _ in 0..CALLS {
            for link in &mut peers.links {
                let Some(tunnel) = &mut link.tunnel else { continue };
                // A call that cannot be sent is not missed: the protocol's message comes.
                if wire.out.has_room(tunnel.packet_bytes(0)) || wire.send() {
                    let sealed =
                        wire.out.push(link.address, |room| tunnel.seal(vni, epoch, [&[], &[]], room));
                    if let Err(error) = sealed {
                        tracing::debug!(%error, peer = ?link.id, "a call could not be sealed");
                    }
                }
            }
        }
        wire.send();
    }

    /// Hands what waits for other hosts to the tunnels' socket, as far as there is room.
    pub(super) fn flush_peers(&mut self, io: &mut Io<'_>) {
        while let Some(peer) = self.switch_mut().pop_dirty_peer() {
            self.flush_peer(peer, io);
        }
    }

    /// The same after the socket was full: whatever waits.
    pub(super) fn flush_all_peers(&mut self, io: &mut Io<'_>) {
        let ids: Vec<PeerId> =
            self.peers().map(|peers| peers.links.iter().map(|link| link.id).collect()).unwrap_or_default();
        for peer in ids {
            self.flush_peer(peer, io);
        }
    }

    fn flush_peer(&mut self, peer: PeerId, io: &mut Io<'_>) {
        let now = io.now();
        let Some(wire) = io.wire.as_mut() else { return };
        let Some((switch, peers)) = self.switch_and_peers() else { return };
        let Some(at) = peers.links.iter().position(|link| link.id == peer) else { return };
        let PeerLink { address, tunnel: Some(tunnel), .. } = &mut peers.links[at] else { return };
        while let Some(outgoing) = switch.outgoing(peer) {
            let bytes = outgoing.bytes.iter().map(|part| part.len()).sum();
            if !wire.out.has_room(tunnel.packet_bytes(bytes)) && !wire.send() {
                return;
            }
            let vni = peers.span.vnis[usize::from(outgoing.network.0)];
            let sealed =
                wire.out.push(*address, |room| tunnel.seal(vni, outgoing.colour, outgoing.bytes, room));
            if let Err(error) = sealed {
                // It counts as passed on and never arrives: lost on the wire.
                tracing::debug!(%error, ?peer, "a frame could not be sealed");
            }
            switch.outgoing_taken(peer, now);
        }
    }

    /// Tells of newer colours that wait here for a cut.
    pub(super) fn tell_newer_colours(&mut self) {
        let Some((switch, peers)) = self.switch_and_peers() else {
            // One host: every machine is cut in the same job, so that nobody needs to be told.
            while self.switch_mut().pop_cut_wanted().is_some() {}
            return;
        };
        while let Some(wanted) = switch.pop_cut_wanted() {
            peers.tell(wanted.epoch);
        }
    }
}
