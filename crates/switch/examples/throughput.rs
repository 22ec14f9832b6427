//! Prints how many frames a second one core moves through the switch: ingress of one machine's frames, their egress
//! to the receivers in batches; and the same across hosts, from a machine to a peer's queue and from a peer to a machine. Run with `cargo run --release --example throughput`.

use std::{hint::black_box, time::Instant};

use diorama_switch::{Epoch, NetworkConfig, NetworkId, PeerId, PortId, Switch, Time};

/// Frames that are fed before the receivers are drained, as one big read from a socket gives.
const BATCH: usize = 256;

fn main() {
    println!("{:>6} {:>9} {:>14} {:>10} {:>12}", "bytes", "receivers", "frames/s", "Gbit/s", "copies/s");
    for (bytes, receivers) in [(64, 1), (64, 7), (1514, 1), (1514, 7)] {
        let frames = 20_000_000 / (receivers * if bytes > 64 { 4 } else { 1 });
        let seconds = run(bytes, receivers, frames);
        let rate = frames as f64 / seconds;
        println!(
            "{bytes:>6} {receivers:>9} {rate:>14.0} {:>10.2} {:>12.0}",
            rate * bytes as f64 * 8e-9,
            rate * receivers as f64
        );
    }
    println!("{:>6} {:>9} {:>14} {:>10}", "bytes", "", "frames/s", "Gbit/s");
    for bytes in [64, 1420] {
        let frames = 20_000_000 / if bytes > 64 { 4 } else { 1 };
        for (way, seconds) in [("to peer", to_peer(bytes, frames)), ("from peer", from_peer(bytes, frames))] {
            let rate = frames as f64 / seconds;
            println!("{bytes:>6} {way:>9} {rate:>14.0} {:>10.2}", rate * bytes as f64 * 8e-9);
        }
    }
}

/// A switch with one machine and one peer, where another machine is, and a frame from the first to the second.
fn two_hosts(bytes: usize) -> (Switch, NetworkId, PortId, PeerId, Vec<u8>) {
    let mut switch = Switch::new(Epoch(0));
    let network = switch.add_network(NetworkConfig::new(1500, 42));
    let port = switch.add_port(network);
    switch.set_connected(port, true);
    let peer = switch.add_peer(1 << 20);
    switch.set_peer_attached(peer, network, true);
    switch.set_peer_connected(peer, true);
    switch.learn(network, [2, 0, 0, 0, 0, 0], port, Time(0)).expect("an empty table has room");
    switch.learn_at_peer(network, [2, 0, 0, 0, 0, 1], peer, Time(0)).expect("an empty table has room");
    let mut frame = vec![0; bytes];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]);
    (switch, network, port, peer, frame)
}

fn to_peer(bytes: usize, frames: usize) -> f64 {
    let (mut switch, network, port, peer, frame) = two_hosts(bytes);
    let start = Instant::now();
    for batch in 0..frames / BATCH {
        let now = Time(batch as u64 * 1000);
        for _ in 0..BATCH {
            switch.ingress(port, black_box(&frame), now);
        }
        while let Some(peer) = switch.pop_dirty_peer() {
            while black_box(switch.outgoing(peer)).is_some() {
                switch.outgoing_taken(peer, now);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let counts = switch.channel(peer, network, Epoch(1)).expect("the colour is not folded");
    assert_eq!(counts.sent, (frames / BATCH * BATCH) as u64, "frames were lost");
    seconds
}

fn from_peer(bytes: usize, frames: usize) -> f64 {
    let (mut switch, network, _, peer, mut frame) = two_hosts(bytes);
    let (destination, source) = frame.split_at_mut(6);
    destination.swap_with_slice(&mut source[..6]);
    let start = Instant::now();
    for batch in 0..frames / BATCH {
        let now = Time(batch as u64 * 1000);
        for _ in 0..BATCH {
            switch.remote_ingress(peer, network, Epoch(0), black_box(&frame), now);
        }
        while let Some(port) = switch.pop_dirty() {
            let len = black_box(switch.writable(port)).iter().map(|slice| slice.len()).sum();
            switch.written(port, len, now);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let counters = switch.network_counters(network);
    assert_eq!(counters.delivered, (frames / BATCH * BATCH) as u64, "frames were lost");
    seconds
}

/// Unicast to one receiver, broadcast to several. Returns seconds.
fn run(bytes: usize, receivers: usize, frames: usize) -> f64 {
    let mut switch = Switch::new(Epoch(0));
    let network = switch.add_network(NetworkConfig::new(1500, 42));
    let ports: Vec<PortId> = (0..=receivers).map(|_| switch.add_port(network)).collect();
    for (n, &port) in ports.iter().enumerate() {
        switch.set_connected(port, true);
        switch.learn(network, [2, 0, 0, 0, 0, n as u8], port, Time(0)).expect("an empty table has room");
    }
    let mut frame = vec![0; bytes];
    frame[..6].copy_from_slice(&if receivers == 1 { [2, 0, 0, 0, 0, 1] } else { [0xff; 6] });
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 0]);

    let start = Instant::now();
    for batch in 0..frames / BATCH {
        let now = Time(batch as u64 * 1000);
        for _ in 0..BATCH {
            switch.ingress(ports[0], black_box(&frame), now);
        }
        while let Some(port) = switch.pop_dirty() {
            let len = black_box(switch.writable(port)).iter().map(|slice| slice.len()).sum();
            switch.written(port, len, now);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let counters = switch.network_counters(network);
    assert_eq!(counters.delivered, (frames / BATCH * BATCH * receivers) as u64, "frames were lost");
    seconds
}
