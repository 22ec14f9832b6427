//! Several switches, each against its oracle, joined by wires that lose and reorder.

use std::cell::Cell;

use diorama_switch::{Accounting, Epoch, Hold, InFlight, PeerId, Time};
use proptest::prelude::*;

use super::{MTU, NETWORK_OF, Op, Pair, config, cutting, replay, traffic, writing};

/// A frame on a wire: network, colour, bytes.
type OnWire = (usize, u32, Vec<u8>);

#[derive(Clone, Debug)]
enum HostOp {
    Local(Op),
    /// The tunnel takes so many frames; every `loses`th is lost.
    Send {
        to: usize,
        count: usize,
        loses: usize,
    },
    /// A frame arrives, not always the first.
    Arrive {
        from: usize,
        place: usize,
    },
    /// A frame that no switch would send.
    Forge {
        from: usize,
        network: u16,
        ahead: u32,
        bytes: Vec<u8>,
    },
    ConnectPeer {
        peer: usize,
        connected: bool,
    },
    Attach {
        peer: usize,
        network: usize,
        attached: bool,
    },
    /// A cut's counting comes to its end, for one channel.
    Close {
        from: usize,
        network: usize,
        behind: u32,
    },
    /// Both sides begin anew.
    Restart {
        peer: usize,
    },
}

fn wire() -> impl Strategy<Value = HostOp> {
    let other = || 0..2usize;
    let forged = prop::collection::vec(any::<u8>(), 0..usize::from(MTU) + 40);
    prop_oneof![
        8 => (other(), 1..6usize, 1..8usize).prop_map(|(to, count, loses)| HostOp::Send { to, count, loses }),
        16 => (other(), 0..4usize).prop_map(|(from, place)| HostOp::Arrive { from, place }),
        1 => (other(), 0..3u16, 0..2u32, forged)
            .prop_map(|(from, network, ahead, bytes)| HostOp::Forge { from, network, ahead, bytes }),
    ]
}

fn rare() -> impl Strategy<Value = HostOp> {
    let (other, network) = (|| 0..2usize, || 0..2usize);
    prop_oneof![
        2 => (other(), prop::bool::weighted(0.7))
            .prop_map(|(peer, connected)| HostOp::ConnectPeer { peer, connected }),
        2 => (other(), network(), prop::bool::weighted(0.7))
            .prop_map(|(peer, network, attached)| HostOp::Attach { peer, network, attached }),
        2 => (other(), network(), 0..3u32)
            .prop_map(|(from, network, behind)| HostOp::Close { from, network, behind }),
        1 => other().prop_map(|peer| HostOp::Restart { peer }),
    ]
}

/// Each host numbers its peers as the other hosts in ascending order.
struct Cluster {
    hosts: Vec<Pair>,
    /// From sender (first index) to receiver.
    wires: Vec<Vec<Vec<OnWire>>>,
    /// Frames that a wire lost, by their network and colour.
    lost: Vec<(usize, u32)>,
}

impl Cluster {
    fn new(hosts: usize) -> Self {
        let pair = |_| {
            let mut pair = Pair::new(0);
            for _ in 1..hosts {
                let peer = pair.switch.add_peer(1 << 20);
                pair.networks.iter().for_each(|&network| pair.switch.set_peer_attached(peer, network, true));
                pair.switch.set_peer_connected(peer, true);
                pair.oracle.add_peer();
            }
            pair.connect(5, true);
            pair
        };
        Self {
            hosts: (0..hosts).map(pair).collect(),
            wires: vec![vec![Vec::new(); hosts]; hosts],
            lost: Vec::new(),
        }
    }

    /// Which host a host's peer is.
    fn host_of(&self, host: usize, peer: usize) -> usize {
        (0..self.hosts.len()).filter(|&other| other != host).nth(peer).unwrap()
    }

    fn peer_of(&self, host: usize, other: usize) -> usize {
        (0..self.hosts.len()).filter(|&h| h != host).position(|h| h == other).unwrap()
    }

    fn apply(&mut self, host: usize, op: &HostOp) {
        let peers = self.hosts.len() - 1;
        match *op {
            HostOp::Local(ref op) => self.hosts[host].apply(op),
            HostOp::Send { to, count, loses } => self.send(host, to % peers, count, loses),
            HostOp::Arrive { from, place } => self.arrive(self.host_of(host, from % peers), host, place),
            HostOp::Forge { from, network, ahead, ref bytes } => {
                let pair = &mut self.hosts[host];
                let colour = pair.oracle.newest_epoch() + ahead;
                let (peer, id, now) = (from % peers, diorama_switch::NetworkId(network), Time(pair.now));
                let let_in = pair.switch.remote_ingress(PeerId(peer as u32), id, Epoch(colour), bytes, now);
                let expected = usize::from(network) < 2
                    && pair.oracle.remote_ingress(peer, usize::from(network), colour, bytes, pair.now);
                assert_eq!(let_in, expected);
            }
            HostOp::ConnectPeer { peer, connected } => {
                let (pair, peer) = (&mut self.hosts[host], peer % peers);
                pair.switch.set_peer_connected(PeerId(peer as u32), connected);
                pair.oracle.peers[peer].connected = connected;
                if !connected {
                    pair.oracle.peers[peer].queue.clear();
                }
            }
            HostOp::Attach { peer, network, attached } => {
                let (pair, peer) = (&mut self.hosts[host], peer % peers);
                pair.switch.set_peer_attached(PeerId(peer as u32), pair.networks[network], attached);
                pair.oracle.peers[peer].attached[network] = Some(attached);
            }
            HostOp::Close { from, network, behind } => {
                let other = self.host_of(host, from % peers);
                let cut = self.hosts[host].oracle.newest_epoch().saturating_sub(behind);
                let sender = &self.hosts[other].oracle;
                let (sent, _) = sender.channel(self.peer_of(other, host), network, cut);
                let (pair, peer) = (&mut self.hosts[host], from % peers);
                let id = pair.networks[network];
                // Only colours that are told apart can be closed.
                if pair.switch.close_channel(PeerId(peer as u32), id, Epoch(cut), sent).is_some() {
                    assert!(pair.oracle.close_channel(peer, network, cut, sent));
                }
            }
            HostOp::Restart { peer } => {
                let other = self.host_of(host, peer % peers);
                for (one, another) in [(host, other), (other, host)] {
                    let peer = self.peer_of(one, another);
                    self.hosts[one].switch.restart_peer(PeerId(peer as u32));
                    self.hosts[one].oracle.restart_peer(peer);
                    self.wires[one][another].clear();
                }
            }
        }
    }

    fn send(&mut self, host: usize, peer: usize, count: usize, loses: usize) {
        let to = self.host_of(host, peer);
        let pair = &mut self.hosts[host];
        let id = PeerId(peer as u32);
        for n in 1..=count {
            let expected = pair.oracle.peers[peer].queue.pop_front();
            let outgoing = pair.switch.outgoing(id);
            let got = outgoing.map(|o| (usize::from(o.network.0), o.colour.0, o.bytes.concat()));
            assert_eq!(got, expected);
            assert_eq!(pair.switch.outgoing_taken(id, Time(pair.now)), got.is_some());
            match got {
                Some((network, colour, _)) if n % loses == 0 && loses > 1 => {
                    self.lost.push((network, colour))
                }
                Some(frame) => self.wires[host][to].push(frame),
                None => return,
            }
        }
    }

    fn arrive(&mut self, from: usize, to: usize, place: usize) {
        let waiting = self.wires[from][to].len();
        if waiting == 0 {
            return;
        }
        let (network, colour, bytes) = self.wires[from][to].remove(place % waiting);
        let peer = self.peer_of(to, from);
        let pair = &mut self.hosts[to];
        let (id, now) = (pair.networks[network], Time(pair.now));
        let let_in = pair.switch.remote_ingress(PeerId(peer as u32), id, Epoch(colour), &bytes, now);
        assert_eq!(let_in, pair.oracle.remote_ingress(peer, network, colour, &bytes, pair.now));
        if !let_in {
            self.lost.push((network, colour));
        }
    }

    /// Every channel's two ends, as (sender, receiver).
    fn channels(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let hosts = self.hosts.len();
        (0..hosts).flat_map(move |a| (0..hosts).filter(move |&b| b != a).map(move |b| (a, b)))
    }
}

impl Pair {
    pub(super) fn check_peers(&mut self) {
        let newest = self.oracle.newest_epoch();
        for (n, peer) in self.oracle.peers.iter().enumerate() {
            let id = PeerId(n as u32);
            let next = self.switch.outgoing(id);
            let next = next.map(|o| (usize::from(o.network.0), o.colour.0, o.bytes.concat()));
            assert_eq!(next.as_ref(), peer.queue.front(), "peer {n}");
            let counters = self.switch.peer_counters(id);
            assert_eq!(counters.queued_frames, peer.queue.len() as u64, "peer {n}");
            for (network, &network_id) in self.networks.iter().enumerate() {
                for cut in newest.saturating_sub(2)..newest + 2 {
                    let Some(counts) = self.switch.channel(id, network_id, Epoch(cut)) else { continue };
                    let (sent, received) = self.oracle.channel(n, network, cut);
                    assert_eq!(
                        (counts.sent, counts.received),
                        (sent, received),
                        "peer {n}, {network_id}, cut {cut}"
                    );
                    assert_eq!(counts.lost, peer.closed[network].1);
                }
            }
        }
    }
}

fn local() -> impl Strategy<Value = HostOp> {
    prop_oneof![6 => traffic(), 4 => writing()].prop_map(HostOp::Local)
}

#[test]
fn hosts_do_what_their_oracles_do() {
    let op = prop_oneof![6 => local(), 3 => cutting().prop_map(HostOp::Local), 4 => wire(), 1 => rare()];
    let ops = prop::collection::vec((0..3usize, op), 1..200);
    proptest!(config(), |(ops in ops, hosts in 2..4usize)| {
        let mut cluster = Cluster::new(hosts);
        for (host, op) in &ops {
            cluster.apply(host % hosts, op);
            cluster.hosts.iter_mut().for_each(Pair::check);
        }
    });
}

/// Cuts as they should be, on hosts whose tunnels lose and reorder: every machine of every host passes each cut, in any
/// order over all hosts, under traffic; then the counting, in which some frames come in time and some do not.
#[test]
fn a_snapshot_across_hosts_conserves_every_frame() {
    let machines: Vec<(usize, usize)> =
        (0..3).flat_map(|h| (0..NETWORK_OF.len()).map(move |p| (h, p))).collect();
    let orders = prop::collection::vec(Just(machines).prop_shuffle(), 1..4);
    let policy = prop_oneof![3 => Just(InFlight::Record), 1 => Just(InFlight::Drop)];
    let ops = prop::collection::vec((0..3usize, prop_oneof![3 => local(), 2 => wire()]), 0..1500);
    let [in_flight, wanted, lost, late] = [const { Cell::new(0) }; 4];
    proptest!(config(), |(orders in orders, ops in ops, policy in policy, hosts in 2..4usize, in_time in 0..4usize)| {
        let mut cluster = Cluster::new(hosts);
        let mut chunks = ops.chunks(ops.len() / (orders.len() * 6 * hosts * 3) + 1);
        let mut run = |cluster: &mut Cluster| for (host, op) in chunks.next().into_iter().flatten() {
            // A forged frame is one that nobody sent: it does not belong into these books.
            if !matches!(op, HostOp::Forge { .. }) {
                cluster.apply(host % hosts, op);
            }
        };
        for (n, order) in orders.iter().enumerate() {
            let cut = n as u32 + 1;
            run(&mut cluster);
            for host in &mut cluster.hosts {
                host.apply(&Op::Start { policy, further: cut - host.oracle.newest_epoch() });
            }
            for &(host, port) in order.iter().filter(|&&(host, _)| host < hosts) {
                cluster.hosts[host].apply(&Op::Hold { port, hold: Hold::Cut });
                run(&mut cluster);
                cluster.hosts[host].advance(port, cut);
                run(&mut cluster);
                cluster.hosts[host].release(port, Hold::Cut);
                run(&mut cluster);
                for pair in &mut cluster.hosts {
                    while let Some(wants) = pair.switch.pop_cut_wanted() {
                        assert_eq!(wants.epoch, Epoch(cut));
                        wanted.set(wanted.get() + 1);
                    }
                    pair.check();
                }
            }
            let channels = cluster.channels();
            for (from, to) in channels {
                // What still waits for the tunnel goes, and so many frames arrive in time.
                let (peer, back) = (cluster.peer_of(from, to), cluster.peer_of(to, from));
                cluster.send(from, peer, usize::MAX, 5);
                (0..in_time * 8).for_each(|place| cluster.arrive(from, to, place));
                for network in 0..2 {
                    let id = cluster.hosts[from].networks[network];
                    let sent = cluster.hosts[from].switch.channel(PeerId(peer as u32), id, Epoch(cut)).unwrap().sent;
                    let receiver = &mut cluster.hosts[to];
                    prop_assert!(receiver.switch.close_channel(PeerId(back as u32), id, Epoch(cut), sent).is_some());
                    prop_assert!(receiver.oracle.close_channel(back, network, cut, sent));
                }
            }
            let recordings: Vec<_> = cluster.hosts.iter_mut().map(|host| host.stop().unwrap()).collect();
            cluster.hosts.iter_mut().for_each(Pair::check);
            for network in 0..2 {
                let books: Accounting = (cluster.hosts.iter())
                    .map(|host| host.switch.accounting(host.networks[network], Epoch(cut)).unwrap())
                    .sum();
                prop_assert_eq!((books.unaccounted(), books.unrecorded, books.pending), (0, 0, 0));
                let on_wires = cluster.wires.iter().flatten().flatten().map(|&(n, colour, _)| (n, colour));
                let missing = (cluster.lost.iter().copied().chain(on_wires))
                    .filter(|&(n, colour)| n == network && colour < cut)
                    .count();
                prop_assert_eq!(books.dropped.wire_loss, missing as u64);
                let recorded = recordings.iter().flat_map(|r| &r.frames);
                let recorded = recorded.filter(|f| usize::from(f.network.0) == network).count();
                prop_assert_eq!(books.in_flight, recorded as u64);
                in_flight.set(in_flight.get() + books.in_flight);
                lost.set(lost.get() + books.dropped.wire_loss);
            }
            recordings.iter().for_each(replay);
        }
        for host in &cluster.hosts {
            late.set(late.get() + host.oracle.peers.iter().enumerate()
                .map(|(n, _)| host.switch.peer_counters(PeerId(n as u32)).late_frames).sum::<u64>());
        }
    });
    let seen = [&in_flight, &wanted, &lost, &late].map(Cell::get);
    assert!(
        seen.iter().all(|&n| n > 0),
        "in flight, wanted, lost, late: {seen:?}: the test saw nothing of one"
    );
}
