//! Tunnels over real sockets on the loopback interface: what members say arrives, and what a hostile sender says does not.
//!
//! On loopback a packet is in the receiver's buffer when the call that sent it returns, so nothing here waits.

use std::net::{SocketAddr, UdpSocket};

use diorama_switch::{
    Epoch, Time,
    geneve::{HEADER_BYTES, Header, KeyId, Payload, Vni},
};
use diorama_tunnel::{
    Cipher, Protection, ReceiveBatch, ReceivingKey, SendBatch, SendingKey, Tunnel, TunnelSocket,
};

const RED: Vni = Vni::new(7).unwrap();
const BLUE: Vni = Vni::new(8).unwrap();
const NOW: Time = Time(5);
const CIPHERS: [Cipher; 2] = [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305];

struct Host {
    socket: TunnelSocket,
    tunnel: Tunnel,
    address: SocketAddr,
    batch: ReceiveBatch,
}

impl Host {
    fn new(protection: Protection, at: &str) -> Self {
        let socket = TunnelSocket::bind(at.parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let mut tunnel = Tunnel::new(protection);
        tunnel.admit(RED);
        Self { socket, tunnel, address, batch: ReceiveBatch::new() }
    }

    fn send(&mut self, to: SocketAddr, frames: &[Vec<u8>]) -> diorama_tunnel::Sent {
        let mut batch = SendBatch::new(1 << 20);
        for (n, frame) in frames.iter().enumerate() {
            let (a, b) = frame.split_at(frame.len() / 3);
            let colour = Epoch(n as u32);
            assert!(batch.has_room(self.tunnel.packet_bytes(frame.len())));
            batch.push(to, |room| self.tunnel.seal(RED, colour, [a, b], room)).unwrap();
        }
        let sent = self.socket.send(&mut batch).unwrap();
        assert!(batch.is_empty() || sent.would_block);
        sent
    }

    /// The frames that open, with their colours, and how many packets came.
    fn receive(&mut self) -> (Vec<(u32, Vec<u8>)>, usize) {
        let (mut frames, mut packets) = (Vec::new(), 0);
        loop {
            let received = self.socket.receive(&mut self.batch).unwrap();
            let mut seen = 0;
            for (_, packet) in self.batch.packets() {
                seen += 1;
                if let Ok(opened) = self.tunnel.open(packet, NOW) {
                    assert_eq!(opened.vni, RED);
                    frames.push((opened.colour.0, opened.frame.to_vec()));
                }
            }
            assert_eq!(seen, received.packets);
            packets += seen;
            if seen == 0 {
                return (frames, packets);
            }
        }
    }
}

/// Gives `to` a key of `from`'s.
fn introduce(from: &mut Tunnel, to: &mut Tunnel, id: u16, cipher: Cipher) {
    let key = SendingKey::generate(KeyId(id), cipher).unwrap();
    to.install_receiving(ReceivingKey::from_bytes(&key.to_bytes()).unwrap());
    from.install_sending(key);
}

fn pair(cipher: Cipher) -> (Host, Host) {
    let mut a = Host::new(Protection::Sealed, "127.0.0.1:0");
    let mut b = Host::new(Protection::Sealed, "127.0.0.1:0");
    introduce(&mut a.tunnel, &mut b.tunnel, 1, cipher);
    introduce(&mut b.tunnel, &mut a.tunnel, 1, cipher);
    (a, b)
}

fn sealed(tunnel: &mut Tunnel, vni: Vni, frame: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 2000];
    let len = tunnel.seal(vni, Epoch(3), [frame, &[]], &mut packet).unwrap();
    packet.truncate(len);
    packet
}

fn frame(n: usize, len: usize) -> Vec<u8> {
    let mut frame = vec![n as u8; len];
    frame[..8].copy_from_slice(&n.to_be_bytes());
    frame
}

#[test]
fn frames_of_any_length_arrive_in_order_with_their_colours() {
    for (at, protection, offload) in [
        ("127.0.0.1:0", Protection::Sealed, [true, true]),
        ("127.0.0.1:0", Protection::Sealed, [true, false]),
        ("127.0.0.1:0", Protection::Sealed, [false, true]),
        ("127.0.0.1:0", Protection::Sealed, [false, false]),
        ("127.0.0.1:0", Protection::Open, [true, true]),
        ("[::1]:0", Protection::Sealed, [true, true]),
    ] {
        let (mut a, mut b) = (Host::new(protection, at), Host::new(protection, at));
        introduce(&mut a.tunnel, &mut b.tunnel, 1, Cipher::ChaCha20Poly1305);
        for (host, with) in [&mut a, &mut b].into_iter().zip(offload) {
            if !with {
                host.socket.turn_offload_off().unwrap();
            }
        }
        // Runs of equal lengths, lengths alone, the longest, and more than one call takes.
        for lens in [vec![1428; 40], vec![60, 1428, 1428, 61, 62, 62, 14], vec![8000; 5], vec![14; 150]] {
            let frames: Vec<_> = lens.iter().enumerate().map(|(n, &len)| frame(n, len)).collect();
            let sent = a.send(b.address, &frames);
            assert_eq!((sent.packets, sent.refused), (lens.len(), 0), "{at} {protection:?}");
            let (opened, packets) = b.receive();
            assert_eq!(packets, lens.len());
            let expected: Vec<_> = frames.into_iter().enumerate().map(|(n, f)| (n as u32, f)).collect();
            assert_eq!(opened, expected, "{at} {protection:?} {offload:?}");
            if a.socket.offload().send && lens.len() == 40 {
                assert_eq!(sent.calls, 1);
            }
        }
        let counters = b.tunnel.counters();
        assert_eq!((counters.opened, counters.lost, counters.missing), (202, 0, 0));
        assert_eq!(counters.opened_bytes, a.tunnel.counters().sent_bytes);
    }
}

#[test]
fn one_socket_serves_both_versions_of_ip() {
    let mut both = Host::new(Protection::Sealed, "[::]:0");
    let mut v4 = Host::new(Protection::Sealed, "127.0.0.1:0");
    introduce(&mut both.tunnel, &mut v4.tunnel, 1, CIPHERS[0]);
    introduce(&mut v4.tunnel, &mut both.tunnel, 1, CIPHERS[0]);
    assert_eq!(both.send(v4.address, &[frame(1, 60), frame(2, 60)]).packets, 2);
    assert_eq!(v4.receive().0.len(), 2);
    v4.send(SocketAddr::from(([127, 0, 0, 1], both.address.port())), &[frame(3, 60)]);
    assert_eq!(both.socket.receive(&mut both.batch).unwrap().packets, 1);
    let (from, packet) = both.batch.packets().next().unwrap();
    assert_eq!(from, v4.address);
    assert_eq!(both.tunnel.open(packet, NOW).unwrap().frame, frame(3, 60));
}

#[test]
fn what_the_path_refuses_is_counted_and_does_not_stop_the_rest() {
    let (mut a, mut b) = pair(CIPHERS[0]);
    let mut batch = SendBatch::new(1 << 18);
    let nowhere: SocketAddr = "[::1]:9".parse().unwrap();
    for (to, len) in [(b.address, 100), (b.address, 65_530), (nowhere, 100), (b.address, 100)] {
        let frame = frame(1, len);
        batch.push(to, |room| a.tunnel.seal(RED, Epoch(0), [&frame, &[]], room)).unwrap();
    }
    let sent = a.socket.send(&mut batch).unwrap();
    assert_eq!((sent.packets, sent.refused, sent.would_block), (2, 2, false));
    assert!(batch.is_empty());
    assert_eq!(b.receive().0.len(), 2);
    // The receiver finds them missing, and once the window has passed, lost.
    assert_eq!(b.tunnel.counters().missing, 2);
}

#[test]
fn a_hostile_sender_cannot_inject_change_repeat_or_read() {
    for cipher in CIPHERS {
        let (mut a, mut b) = pair(cipher);
        let hostile = UdpSocket::bind("127.0.0.1:0").unwrap();
        let text = b"what machines say to each other is nobody else's business";
        let genuine = sealed(&mut a.tunnel, RED, text);
        let later = sealed(&mut a.tunnel, RED, text);

        // It sees the packet, and not the frame in it.
        assert!(!genuine.windows(8).any(|window| text.windows(8).any(|part| part == window)));
        let (header, at) = Header::decode(&genuine).unwrap();
        assert_eq!(
            (header.vni, header.colour, header.payload, at),
            (RED, Epoch(3), Payload::Sealed, HEADER_BYTES)
        );

        let mut attacks = Vec::new();
        for bit in 0..genuine.len() * 8 {
            let mut packet = genuine.clone();
            packet[bit / 8] ^= 1 << (bit % 8);
            attacks.push(packet);
        }
        for len in 0..genuine.len() {
            attacks.push(genuine[..len].to_vec());
        }
        attacks.push([&genuine[..], &[0]].concat());
        // Headers of its own: another network, colour or key, a number far ahead; the same body.
        let body = &genuine[HEADER_BYTES..];
        for header in [
            Header { vni: BLUE, ..header },
            Header { colour: Epoch(9), ..header },
            Header { key: KeyId(2), ..header },
            Header { sequence: u64::MAX, ..header },
            Header { sequence: 1 << 40, ..header },
            Header { payload: Payload::Ethernet, ..header },
        ] {
            attacks.push([&header.encode()[..], body].concat());
        }
        // A whole tunnel of its own, under the same name of key; and a frame that is not sealed.
        let mut own = Tunnel::new(Protection::Sealed);
        own.install_sending(SendingKey::generate(KeyId(1), cipher).unwrap());
        let mut open = Tunnel::new(Protection::Open);
        for tunnel in [&mut own, &mut open] {
            attacks.push(sealed(tunnel, RED, text));
        }
        let (mut came, mut nothing) = (0, 0);
        for packet in &attacks {
            hostile.send_to(packet, b.address).unwrap();
            let (frames, packets) = b.receive();
            assert_eq!(frames, [], "{packet:02x?} was let in");
            came += packets;
            nothing += usize::from(packet.is_empty());
        }
        assert_eq!(came + nothing, attacks.len());
        // A member's packet, sent back to the member.
        hostile.send_to(&genuine, a.address).unwrap();
        assert_eq!(a.receive(), (vec![], 1), "a packet was let in where it came from");

        let counters = b.tunnel.counters();
        let dropped = [
            counters.malformed,
            counters.wrong_protection,
            counters.unknown_key,
            counters.forged,
            counters.too_old,
        ];
        assert!(dropped.iter().all(|&n| n > 0), "an attack of each kind: {counters:?}");
        assert_eq!(dropped.iter().sum::<u64>() as usize, came);
        assert_eq!((counters.opened, counters.replayed, counters.lost, counters.missing), (0, 0, 0, 0));

        // After all that the genuine packets are let in, each once.
        for packet in [&later, &genuine, &genuine, &later] {
            hostile.send_to(packet, b.address).unwrap();
        }
        assert_eq!(b.receive(), (vec![(3, text.to_vec()), (3, text.to_vec())], 4));
        assert_eq!(b.tunnel.counters().replayed, 2);

        // A member's frame for a network that the receiver is not in.
        let stray = sealed(&mut a.tunnel, BLUE, text);
        hostile.send_to(&stray, b.address).unwrap();
        assert_eq!(b.receive(), (vec![], 1));
        assert_eq!(b.tunnel.counters().not_a_member, 1);
    }
}

#[test]
fn a_packet_of_one_tunnel_opens_in_no_other() {
    let (mut a, mut b) = pair(CIPHERS[0]);
    let (_, mut d) = pair(CIPHERS[0]);
    a.send(d.address, &[frame(1, 60)]);
    assert_eq!(d.receive(), (vec![], 1));
    assert_eq!(d.tunnel.counters().forged, 1);
    a.send(b.address, &[frame(2, 60)]);
    assert_eq!(b.receive().0.len(), 1);
    // A new incarnation has new keys: nothing from before opens.
    let mut again = Host::new(Protection::Sealed, "127.0.0.1:0");
    a.send(again.address, &[frame(3, 60)]);
    let mut other = Tunnel::new(Protection::Sealed);
    introduce(&mut other, &mut again.tunnel, 1, CIPHERS[0]);
    assert_eq!(again.receive(), (vec![], 1));
}

#[test]
fn a_receiver_that_does_not_read_neither_stops_nor_fails_its_sender() {
    let (mut a, b) = pair(CIPHERS[0]);
    // Nobody reads: packets are dropped at the receiver, not refused to the sender; the sender's own calls never block.
    let mut batch = SendBatch::new(4 << 20);
    let body = frame(0, 1400);
    while batch.has_room(a.tunnel.packet_bytes(1400)) {
        batch.push(b.address, |room| a.tunnel.seal(RED, Epoch(0), [&body, &[]], room)).unwrap();
    }
    let all = batch.len();
    let mut sent = 0;
    for _ in 0..1000 {
        let now = a.socket.send(&mut batch).unwrap();
        sent += now.packets;
        assert_eq!(now.refused, 0);
        if batch.is_empty() {
            break;
        }
        assert!(now.would_block);
    }
    assert_eq!(sent + batch.len(), all);
}
