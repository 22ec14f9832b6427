//! Three hosts' switches joined by sealed tunnels over real sockets that lose packets: a cut's books balance, and what the
//! counting finds lost is what the tunnels find lost by their packets' numbers.

use std::net::SocketAddr;

use diorama_switch::{
    Accounting, Epoch, FRAME_OVERHEAD, Hold, InFlight, NetworkConfig, NetworkId, PeerId, PortId, Switch,
    Time,
    arrivals::WINDOW,
    geneve::{KeyId, Vni},
};
use diorama_tunnel::{
    Cipher, Ip, Protection, ReceiveBatch, ReceivingKey, SendBatch, SendingKey, Tunnel, TunnelSocket,
    guest_mtu,
};

const HOSTS: usize = 3;
const PORTS: usize = 2;
const LAN: Vni = Vni::new(0x00beef).unwrap();

struct Host {
    switch: Switch,
    network: NetworkId,
    ports: Vec<PortId>,
    socket: TunnelSocket,
    address: SocketAddr,
    /// One for each other host, in ascending order: its address, our end of the tunnel to it.
    peers: Vec<(SocketAddr, Tunnel)>,
    /// What the wire has lost of ours.
    lost: u64,
    packets: u64,
}

impl Host {
    fn new(mtu: u16) -> Self {
        let mut switch = Switch::new(Epoch(0));
        let network = switch.add_network(NetworkConfig::new(mtu, 1));
        let ports: Vec<PortId> = (0..PORTS).map(|_| switch.add_port(network)).collect();
        ports.iter().for_each(|&port| switch.set_connected(port, true));
        let socket = TunnelSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        Self { switch, network, ports, socket, address, peers: Vec::new(), lost: 0, packets: 0 }
    }

    /// As the data plane does it: from the switch's queues into sealed packets, many by one call. Every `loses`th is lost.
    fn send(&mut self, loses: u64, now: Time) {
        let mut batch = SendBatch::new(1 << 18);
        while let Some(peer) = self.switch.pop_dirty_peer() {
            let (to, tunnel) = &mut self.peers[peer.0 as usize];
            while let Some(outgoing) = self.switch.outgoing(peer) {
                let bytes = outgoing.bytes.iter().map(|part| part.len()).sum();
                if !batch.has_room(tunnel.packet_bytes(bytes)) {
                    self.socket.send(&mut batch).unwrap();
                }
                self.packets += 1;
                if self.packets.is_multiple_of(loses) {
                    self.lost += 1;
                    let mut nowhere = vec![0; tunnel.packet_bytes(bytes)];
                    tunnel.seal(LAN, outgoing.colour, outgoing.bytes, &mut nowhere).unwrap();
                } else {
                    batch.push(*to, |room| tunnel.seal(LAN, outgoing.colour, outgoing.bytes, room)).unwrap();
                }
                self.switch.outgoing_taken(peer, now);
            }
        }
        self.socket.send(&mut batch).unwrap();
        assert!(batch.is_empty());
    }

    fn receive(&mut self, batch: &mut ReceiveBatch, now: Time) {
        loop {
            let received = self.socket.receive(batch).unwrap();
            for (from, packet) in batch.packets() {
                let peer = self.peers.iter().position(|(address, _)| *address == from).unwrap();
                let opened = self.peers[peer].1.open(packet, now).unwrap();
                assert_eq!(opened.vni, LAN);
                let peer = PeerId(peer as u32);
                assert!(self.switch.remote_ingress(peer, self.network, opened.colour, opened.frame, now));
            }
            if !received.more {
                return;
            }
        }
    }

    /// Machines read what there is for them.
    fn deliver(&mut self, now: Time) {
        while let Some(port) = self.switch.pop_dirty() {
            let bytes = self.switch.writable(port).iter().map(|part| part.len()).sum();
            self.switch.written(port, bytes, now);
        }
    }
}

fn cluster() -> Vec<Host> {
    let mtu = guest_mtu(1500, Ip::V4, Protection::Sealed).unwrap();
    let mut hosts: Vec<Host> = (0..HOSTS).map(|_| Host::new(mtu)).collect();
    let addresses: Vec<SocketAddr> = hosts.iter().map(|host| host.address).collect();
    for (n, host) in hosts.iter_mut().enumerate() {
        for &address in addresses.iter().filter(|&&address| address != addresses[n]) {
            let peer = host.switch.add_peer(1 << 20);
            host.switch.set_peer_attached(peer, host.network, true);
            host.switch.set_peer_connected(peer, true);
            let mut tunnel = Tunnel::new(Protection::Sealed);
            tunnel.admit(LAN);
            host.peers.push((address, tunnel));
        }
    }
    for (from, to) in channels() {
        let key = SendingKey::generate(KeyId(1), Cipher::Aes256Gcm).unwrap();
        let theirs = ReceivingKey::from_bytes(&key.to_bytes()).unwrap();
        hosts[to].peers[peer_of(to, from)].1.install_receiving(theirs);
        hosts[from].peers[peer_of(from, to)].1.install_sending(key);
    }
    hosts
}

fn channels() -> impl Iterator<Item = (usize, usize)> {
    (0..HOSTS).flat_map(|from| (0..HOSTS).filter(move |&to| to != from).map(move |to| (from, to)))
}

fn peer_of(host: usize, other: usize) -> usize {
    other - usize::from(other > host)
}

fn frame(destination: u8, source: u8, len: usize) -> Vec<u8> {
    let address = |n: u8| if n == 0xff { [0xff; 6] } else { [2, 0, 0, 0, 0, n] };
    let mut frame = [address(destination), address(source)].concat();
    frame.resize(len, 0x55);
    frame
}

/// Every machine says something to all and to each; on the way some is lost.
fn talk(hosts: &mut [Host], round: u64, loses: u64, batch: &mut ReceiveBatch) {
    let now = Time(round);
    let machines = (HOSTS * PORTS) as u8;
    let longest = usize::from(guest_mtu(1500, Ip::V4, Protection::Sealed).unwrap()) + FRAME_OVERHEAD;
    for (n, host) in hosts.iter_mut().enumerate() {
        for port in 0..PORTS {
            let source = (n * PORTS + port) as u8;
            let id = host.ports[port];
            for (destination, len) in (0..machines).map(|n| (n, longest)).chain([(0xff, 60), (0xff, longest)])
            {
                host.switch.ingress(id, &frame(destination, source, len), now);
            }
        }
        host.send(loses, now);
        // Hosts read at different times: frames are on their way while others are cut.
        if !(round + n as u64).is_multiple_of(3) {
            host.receive(batch, now);
            host.deliver(now);
        }
    }
}

#[test]
fn what_counting_finds_lost_is_what_tunnels_find_lost() {
    let mut hosts = cluster();
    let mut batch = ReceiveBatch::new();
    let mut round = 0;
    let mut in_flight = 0;
    for (cut, loses) in [(1, 7), (2, 100), (3, u64::MAX)] {
        let cut = Epoch(cut);
        for host in &mut hosts {
            host.switch.start_recording(cut, InFlight::Record).unwrap();
        }
        for machine in 0..HOSTS * PORTS {
            let (host, port) = (machine / PORTS, machine % PORTS);
            let id = hosts[host].ports[port];
            hosts[host].switch.hold(id, Hold::Cut, Time(round));
            round += 1;
            talk(&mut hosts, round, loses, &mut batch);
            hosts[host].switch.advance_epoch(id, cut, Time(round)).unwrap();
            hosts[host].switch.release(id, Hold::Cut, Time(round));
            round += 1;
            talk(&mut hosts, round, loses, &mut batch);
        }
        // Nothing more of the old colours is sent; what was, arrives.
        for host in &mut hosts {
            host.receive(&mut batch, Time(round));
            host.deliver(Time(round));
        }
        let mut missing = 0;
        for (from, to) in channels() {
            let (sender, receiver) = (PeerId(peer_of(from, to) as u32), PeerId(peer_of(to, from) as u32));
            let sent = hosts[from].switch.channel(sender, hosts[from].network, cut).unwrap().sent;
            let network = hosts[to].network;
            missing += hosts[to].switch.close_channel(receiver, network, cut, sent).unwrap();
        }
        let recorded: usize = hosts.iter_mut().map(|h| h.switch.stop_recording().unwrap().frames.len()).sum();
        let parts: Vec<Accounting> =
            hosts.iter().map(|host| host.switch.accounting(host.network, cut).unwrap()).collect();
        assert!(parts.iter().all(|part| part.unaccounted_here() == 0));
        let books: Accounting = parts.into_iter().sum();
        assert_eq!((books.unaccounted(), books.pending, books.unrecorded), (0, 0, 0));
        assert_eq!((books.in_flight, books.dropped.wire_loss), (recorded as u64, missing));
        assert_eq!(books.passed_on - books.arrived, missing);
        in_flight += recorded;
    }
    assert!(in_flight > 0, "nothing was in flight: the test saw nothing");

    // A cut that nobody takes, far enough behind everything lost, so that it has left the windows: both ways of counting
    // must say the same.
    for round in round..round + WINDOW / 8 {
        talk(&mut hosts, round, u64::MAX, &mut batch);
    }
    for host in &mut hosts {
        host.receive(&mut batch, Time(round));
    }
    let by_number: u64 = hosts
        .iter()
        .flat_map(|host| &host.peers)
        .map(|(_, tunnel)| tunnel.counters())
        .map(|counters| counters.lost + counters.missing)
        .sum();
    let lost: u64 = hosts.iter().map(|host| host.lost).sum();
    assert!(lost > 50, "only {lost} packets were lost");
    assert_eq!(by_number, lost);
    let mut by_counting = 0;
    for (from, to) in channels() {
        let (sender, receiver) = (PeerId(peer_of(from, to) as u32), PeerId(peer_of(to, from) as u32));
        let sent = hosts[from].switch.channel(sender, hosts[from].network, Epoch(4)).unwrap().sent;
        by_counting +=
            sent - hosts[to].switch.channel(receiver, hosts[to].network, Epoch(4)).unwrap().received;
    }
    assert_eq!(by_counting, lost);
}
