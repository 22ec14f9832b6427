//! The switch towards other hosts: peers, what goes to their tunnels, what comes from there, and the counts that the
//! snapshot protocol needs of both.

use super::{LARGEST_QUEUE_BYTES, LearnError, Member, Place, Switch, addresses, flood, is_one_machines};
use crate::{
    Epoch, Mac, NetworkId, PeerId, Time,
    counters::{DropReason, PeerCounters},
    ledger::ChannelCounts,
    peer::{Outgoing, Peer},
    port::Offered,
};

impl Switch {
    /// Adds another host of the environment: not connected, and with ports in no network. `queue_bytes` bounds what may
    /// wait for its tunnel, with 4 bytes for each frame's length; at least one frame of 64 KiB always fits.
    ///
    /// # Panics
    ///
    /// With 2^32 peers already there.
    pub fn add_peer(&mut self, queue_bytes: usize) -> PeerId {
        let id = PeerId(u32::try_from(self.peers.len()).expect("no more than 2^32 peers"));
        self.peers.push(Peer::new(queue_bytes.clamp(1 << 17, LARGEST_QUEUE_BYTES)));
        id
    }

    /// Whether there is a tunnel to the peer. Disconnecting forgets what waits for it; the frames stay counted as passed
    /// on, so that the peer finds them lost.
    pub fn set_peer_connected(&mut self, peer: PeerId, connected: bool) {
        let peer = &mut self.peers[peer.0 as usize];
        peer.connected = connected;
        if !connected {
            peer.clear();
        }
    }

    /// Whether the peer has ports in the network. Only then are frames flooded to it, and let in from it.
    pub fn set_peer_attached(&mut self, peer: PeerId, network: NetworkId, attached: bool) {
        let at = peer.0 as usize;
        assert!(at < self.peers.len(), "{peer} is not of this switch");
        let owner = &mut self.networks[usize::from(network.0)];
        match owner.member(peer) {
            Some(member) => owner.members[member].attached = attached,
            None if attached => {
                let channel = owner.ledger.add_channel();
                debug_assert_eq!(channel, owner.members.len(), "members and channels are numbered alike");
                owner.members.push(Member { peer, place: owner.places.len() as u32, attached });
                owner.places.push(Place::Peer(channel));
                owner.macs.add_port(owner.mac_entries_per_peer);
                if owner.member_of.len() <= at {
                    owner.member_of.resize(at + 1, None);
                }
                owner.member_of[at] = Some(channel);
            }
            None => (),
        }
    }

    /// Begins the counts between this host and the peer anew, in all networks, and forgets what waits for its tunnel.
    /// To be called when the peer has lost its own, as with its agent's death, and after the last frame from before:
    /// a tunnel's keys tell them apart.
    pub fn restart_peer(&mut self, peer: PeerId) {
        self.peers[peer.0 as usize].clear();
        for network in &mut self.networks {
            if let Some(member) = network.member(peer) {
                network.ledger.restart_channel(member);
            }
        }
    }

    /// One whole frame came from a peer, with the colour that it has there; each frame at most once. Copies go to ports of
    /// this host alone. False if it was not let in: the peer has no port in that network, or the network is not known
    /// here, or the frame is a runt or a giant, or it was declared lost before it came. Such a frame does not count as
    /// received, hence counts as lost; the peer's counters tell why.
    pub fn remote_ingress(
        &mut self,
        from: PeerId,
        network: NetworkId,
        colour: Epoch,
        frame: &[u8],
        now: Time,
    ) -> bool {
        let Self { networks, ports, peers, shared, .. } = self;
        let counters = &mut peers[from.0 as usize].counters;
        let owner = networks.get_mut(usize::from(network.0));
        let member = owner.as_ref().and_then(|network| network.member(from));
        let (Some(network), Some(member)) = (owner, member) else {
            counters.foreign_frames += 1;
            return false;
        };
        if !network.members[member].attached {
            counters.foreign_frames += 1;
            return false;
        }
        let Some((destination, source)) = addresses(frame).filter(|_| frame.len() <= network.max_frame)
        else {
            counters.invalid_frames += 1;
            return false;
        };
        if !network.ledger.arrive(member, colour) {
            counters.late_frames += 1;
            return false;
        }
        counters.received_frames += 1;
        counters.received_bytes += frame.len() as u64;
        let place = network.members[member].place;
        if is_one_machines(source) && !network.macs.observe(source, place, now) {
            counters.unlearned += 1;
        }

        let offered = Offered { frame, colour, now };
        let owed = match network.find(destination, now) {
            Some(Place::Port(at)) => {
                let receiver = &mut ports[at.0 as usize];
                receiver.offer(offered, receiver.limit(), &mut network.ledger, shared);
                1
            }
            Some(Place::Peer(_)) => 0,
            None => flood(&network.ports, None, offered, ports, &mut network.ledger, shared),
        };
        network.ledger.owe(colour, owed.max(1));
        if owed == 0 {
            network.ledger.drop(colour, DropReason::NoReceiver, 0);
        }
        true
    }

    /// A peer that has something to send since it was last returned.
    pub fn pop_dirty_peer(&mut self) -> Option<PeerId> {
        while let Some(id) = self.dirty_peers.pop() {
            let peer = &mut self.peers[id.0 as usize];
            peer.dirty = false;
            if peer.has_outgoing() {
                return Some(id);
            }
        }
        None
    }

    /// The next frame for the peer's tunnel. Whatever its colour, it may go at once.
    #[inline]
    pub fn outgoing(&self, peer: PeerId) -> Option<Outgoing<'_>> {
        self.peers[peer.0 as usize].outgoing()
    }

    /// The tunnel took the frame that [`Switch::outgoing`] shows. False if there was none.
    #[inline]
    pub fn outgoing_taken(&mut self, peer: PeerId, now: Time) -> bool {
        self.peers[peer.0 as usize].taken(now)
    }

    /// The peers that have, or had, ports in the network.
    pub fn peers(&self, network: NetworkId) -> impl Iterator<Item = PeerId> + '_ {
        self.networks[usize::from(network.0)].members.iter().map(|member| member.peer)
    }

    /// What a cut divides of the frames between this host and the peer in one network: what the protocol's counting needs.
    /// None if the peer never had a port in that network, or if the cut is too old, as with [`Switch::accounting`].
    pub fn channel(&self, peer: PeerId, network: NetworkId, cut: Epoch) -> Option<ChannelCounts> {
        let network = &self.networks[usize::from(network.0)];
        network.ledger.channel(network.member(peer)?, cut)
    }

    /// The cut's frames from the peer that will come have come: of the `sent` frames with a colour older than the cut
    /// (as the peer counts them, over the environment's life) those that have not arrived are lost. They count as wire
    /// loss in this network's accounts, and are not let in should they come after all: what a snapshot says is lost
    /// stays lost.
    ///
    /// To be called when the recording of that cut stops, with final counts: `sent` is the number received that the protocol
    /// was told last, and what it says is missing. (Not what is missing alone: a frame may have come since.) Returns how many are lost; None, and nothing
    /// is changed, for a channel that does not exist, a cut too old, and a cut older than the one it was closed for last.
    pub fn close_channel(&mut self, peer: PeerId, network: NetworkId, cut: Epoch, sent: u64) -> Option<u64> {
        let network = &mut self.networks[usize::from(network.0)];
        network.ledger.close_channel(network.member(peer)?, cut, sent)
    }

    /// What passed between this host and the peer.
    pub fn peer_counters(&self, peer: PeerId) -> PeerCounters {
        self.peers[peer.0 as usize].counters()
    }

    /// The network's addresses on other hosts, likewise.
    pub fn learned_at_peers(&self, network: NetworkId) -> impl Iterator<Item = (Mac, PeerId)> + '_ {
        let network = &self.networks[usize::from(network.0)];
        network.macs.entries().filter_map(|(mac, place)| match network.places[place as usize] {
            Place::Port(_) => None,
            Place::Peer(member) => Some((mac, network.members[member].peer)),
        })
    }

    /// Puts an address of another host's machine into a network's table as if it had been seen now.
    pub fn learn_at_peer(
        &mut self,
        network: NetworkId,
        mac: Mac,
        peer: PeerId,
        now: Time,
    ) -> Result<(), LearnError> {
        if !is_one_machines(mac) {
            return Err(LearnError::NotUnicast { mac });
        }
        let owner = &mut self.networks[usize::from(network.0)];
        let Some(member) = owner.member(peer).filter(|&member| owner.members[member].attached) else {
            return Err(LearnError::NotAttached { network, peer });
        };
        if !owner.macs.observe(mac, owner.members[member].place, now) {
            return Err(LearnError::FullAtPeer { network, peer, mac });
        }
        Ok(())
    }
}
