//! What goes between two hosts in one second: our tunnel, sealed and not, the kernel's VXLAN, and plain UDP.
//!
//! Two network namespaces with a veth pair; the sender has one core and the receiver the other, softirqs included (receive
//! packet steering). All four send and receive by the same batched calls, with the kernel's segmentation, and differ only in
//! what is between: nothing, sealing and opening on these two threads, or a VXLAN interface. Sizes are of the Ethernet frame
//! that is carried; plain UDP carries as many bytes as payload.
//!
//! Flat out: the sender sends what its socket takes, and what reaches the receiver counts.

use std::fs::File;
use std::hint::black_box;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use diorama_switch::geneve::{KeyId, Vni};
use diorama_switch::{Epoch, Time};
use diorama_tunnel::{
    Cipher, Ip, Protection, ReceiveBatch, ReceivingKey, SendBatch, SendingKey, Tunnel, TunnelSocket,
    guest_mtu,
};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, table, times};
use crate::lab::{ip, need_root, say};
use crate::switch::pin;

const SENDER_CORE: usize = 0;
const RECEIVER_CORE: usize = 1;
const NETWORK: Vni = Vni::new(1).expect("fits 24 bits");
/// Packets that are made before they are sent: what a busy switch has for a tunnel at once.
const BATCH: usize = 64;
/// Ethernet, IPv4 and UDP headers: of a frame through VXLAN, these are not payload.
const INNER_HEADERS: usize = 42;
/// How long a socket that has no room is waited for.
const WAIT_MS: u8 = 1;
/// What is not measured: caches and address resolution are cold.
const WARM_UP: Duration = Duration::from_millis(200);

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Measurements of each, of which the median counts
    #[arg(long, default_value_t = 5)]
    count: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { seconds: 2.0, count: 5 }
    }
}

/// What is between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Vxlan,
    Open,
    Sealed,
}

const WAYS: [(Way, &str); 4] = [
    (Way::Plain, "plain UDP"),
    (Way::Vxlan, "VXLAN"),
    (Way::Open, "diorama, not sealed"),
    (Way::Sealed, "diorama, sealed"),
];

#[derive(Debug, Serialize)]
struct Row {
    way: &'static str,
    frame_bytes: usize,
    received_per_second: f64,
    gigabits_per_second: f64,
    lost_share: f64,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    need_root("two network namespaces")?;
    let (seconds, count) = if common.quick { (0.3, 1) } else { (arguments.seconds, arguments.count) };
    let hosts = Pair::new()?;
    let full = guest_mtu(1500, Ip::V4, Protection::Sealed).map_or(1420, |mtu| usize::from(mtu) + 14);
    let mut rows = Vec::new();
    for frame_bytes in [64, full] {
        let mut samples: [(Sample, Sample); WAYS.len()] = Default::default();
        // In turn, so that whatever else the computer does falls on all.
        for _ in 0..count {
            for ((way, name), (received, lost)) in WAYS.into_iter().zip(&mut samples) {
                say(format!("tunnel: {name}, {frame_bytes} bytes"));
                let trial = hosts.measure(way, frame_bytes, Duration::from_secs_f64(seconds))?;
                received.push(trial.received as f64 / seconds);
                lost.push(1.0 - trial.received as f64 / trial.sent.max(1) as f64);
            }
        }
        for ((_, name), (received, lost)) in WAYS.into_iter().zip(&samples) {
            rows.push(Row {
                way: name,
                frame_bytes,
                received_per_second: received.median(),
                gigabits_per_second: received.median() * frame_bytes as f64 * 8e-9,
                lost_share: lost.median().max(0.0),
            });
        }
    }
    let json = serde_json::json!({ "rows": rows });
    Ok(Outcome { name: "tunnel", json, text: text(&rows, seconds, count), violations: Vec::new() })
}

/// Two namespaces, joined.
#[derive(Debug)]
struct Pair {
    names: [String; 2],
}

#[derive(Debug, Clone, Copy)]
struct Trial {
    sent: u64,
    received: u64,
}

impl Pair {
    fn new() -> Result<Self, Failure> {
        let name = |what| format!("dioc{}{what}", std::process::id());
        let pair = Self { names: [name("a"), name("b")] };
        let [a, b] = &pair.names;
        for name in [a, b] {
            ip(&["netns", "add", name])?;
        }
        ip(&["link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b])?;
        for (number, (name, core)) in (1..).zip([(a, SENDER_CORE), (b, RECEIVER_CORE)]) {
            let other = 3 - number;
            ip(&["-n", name, "addr", "add", &format!("10.97.0.{number}/24"), "dev", "eth0"])?;
            ip(&["-n", name, "link", "set", "eth0", "up"])?;
            let remote = format!("10.97.0.{other}");
            let vxlan =
                ["link", "add", "vx0", "type", "vxlan", "id", "1", "dstport", "4789", "remote", &remote];
            ip(&[&["-n", name], &vxlan[..], &["dev", "eth0"]].concat())?;
            ip(&["-n", name, "addr", "add", &format!("10.96.0.{number}/24"), "dev", "vx0"])?;
            ip(&["-n", name, "link", "set", "vx0", "up"])?;
            // What comes in is handled on the core of whoever receives it.
            let steering = format!("echo {:x} >/sys/class/net/eth0/queues/rx-0/rps_cpus", 1 << core);
            ip(&["netns", "exec", name, "sh", "-c", &steering])?;
        }
        Ok(pair)
    }

    fn measure(&self, way: Way, frame_bytes: usize, length: Duration) -> Result<Trial, Failure> {
        let net = if way == Way::Vxlan { 96 } else { 97 };
        let address = |host| SocketAddr::from(([10, net, 0, host], 7447));
        let (from, to) = tunnels(way)?;
        let payload = if way == Way::Vxlan { frame_bytes - INNER_HEADERS } else { frame_bytes };
        let (ready, ends, measured) = (Barrier::new(2), AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let socket = open(&self.names[1], RECEIVER_CORE, address(2));
                ready.wait();
                receive(socket?, to, &ends, &measured)
            });
            let sender = scope.spawn(|| {
                let socket = open(&self.names[0], SENDER_CORE, address(1));
                ready.wait();
                let sent = send(socket?, from, (address(2), payload), length, &measured);
                // What is on its way comes within this, or not at all.
                std::thread::sleep(Duration::from_millis(50));
                sent
            });
            let sent = sender.join();
            // Whatever became of the sender: the receiver waits for this.
            ends.store(true, Ordering::Relaxed);
            receiver.join().expect("receiving does not panic")?;
            sent.expect("sending does not panic")
        })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(failure) = ip(&["netns", "del", name]) {
                say(format!("cleaning up: {failure}"));
            }
        }
    }
}

/// A socket in a namespace, and the calling thread on its core and in there: it does not come back.
fn open(namespace: &str, core: usize, address: SocketAddr) -> Result<TunnelSocket, Failure> {
    pin(core)?;
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path).map_err(Failure::io(path))?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(Failure::io("cannot enter a namespace"))?;
    TunnelSocket::bind(address).map_err(Failure::io(format!("cannot bind to {address}")))
}

fn tunnels(way: Way) -> Result<(Option<Tunnel>, Option<Tunnel>), Failure> {
    let protection = match way {
        Way::Plain | Way::Vxlan => return Ok((None, None)),
        Way::Open => Protection::Open,
        Way::Sealed => Protection::Sealed,
    };
    let (mut from, mut to) = (Tunnel::new(protection), Tunnel::new(protection));
    if way == Way::Sealed {
        let fast = Cipher::has_fast_aes();
        let key = SendingKey::generate(KeyId(1), Cipher::for_hosts(fast, fast));
        let key = key.map_err(|error| Failure::io("no key")(std::io::Error::other(error)))?;
        let other = ReceivingKey::from_bytes(&key.to_bytes());
        to.install_receiving(other.map_err(|error| Failure::io("no key")(std::io::Error::other(error)))?);
        from.install_sending(key);
    }
    to.admit(NETWORK);
    Ok((Some(from), Some(to)))
}

/// Sends for as long as is said, and returns what was sent and, by then, received.
fn send(
    mut socket: TunnelSocket,
    mut tunnel: Option<Tunnel>,
    (to, payload): (SocketAddr, usize),
    length: Duration,
    received: &AtomicU64,
) -> Result<Trial, Failure> {
    let frame = vec![7; payload];
    let mut batch = SendBatch::new(BATCH * (payload + 128));
    let mut sent = 0;
    let packet_bytes = tunnel.as_ref().map_or(payload, |tunnel| tunnel.packet_bytes(payload));
    let begin = Instant::now();
    let mut measured = None;
    loop {
        // What a full socket has left of an earlier batch keeps its room.
        while batch.len() < BATCH && batch.has_room(packet_bytes) {
            let made = batch.push(to, |room| match &mut tunnel {
                Some(tunnel) => tunnel.seal(NETWORK, Epoch(1), [black_box(&frame), &[]], room).map_err(drop),
                None => {
                    room[..payload].copy_from_slice(black_box(&frame));
                    Ok(payload)
                }
            });
            if made.is_err() {
                return Err(Failure::io("cannot seal")(std::io::Error::other("a key is worn")));
            }
        }
        let outcome = socket.send(&mut batch).map_err(Failure::io("cannot send"))?;
        sent += outcome.packets as u64;
        let elapsed = begin.elapsed();
        match measured {
            None if elapsed >= WARM_UP => measured = Some((sent, received.load(Ordering::Relaxed))),
            Some((sent_before, received_before)) if elapsed >= WARM_UP + length => {
                let received = received.load(Ordering::Relaxed) - received_before;
                return Ok(Trial { sent: sent - sent_before, received });
            }
            _ => {}
        }
        if outcome.would_block {
            wait(&socket, nix::poll::PollFlags::POLLOUT);
        }
    }
}

fn receive(
    mut socket: TunnelSocket,
    mut tunnel: Option<Tunnel>,
    ends: &AtomicBool,
    count: &AtomicU64,
) -> Result<(), Failure> {
    let mut batch = ReceiveBatch::new();
    while !ends.load(Ordering::Relaxed) {
        let more = socket.receive(&mut batch).map_err(Failure::io("cannot receive"))?.more;
        let mut good = 0;
        for (_, packet) in batch.packets() {
            match &mut tunnel {
                Some(tunnel) => good += u64::from(black_box(tunnel.open(packet, Time(0))).is_ok()),
                None => {
                    black_box(packet);
                    good += 1;
                }
            }
        }
        count.fetch_add(good, Ordering::Relaxed);
        if !more {
            wait(&socket, nix::poll::PollFlags::POLLIN);
        }
    }
    Ok(())
}

fn wait(socket: &TunnelSocket, what: nix::poll::PollFlags) {
    let _ = nix::poll::poll(&mut [nix::poll::PollFd::new(socket.as_fd(), what)], WAIT_MS);
}

fn text(rows: &[Row], seconds: f64, count: u32) -> String {
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let to = |way: Way| {
                let of = rows
                    .iter()
                    .zip(WAYS.iter().cycle())
                    .find(|(other, (of, _))| other.frame_bytes == row.frame_bytes && *of == way);
                times(row.received_per_second, of.map_or(0.0, |(other, _)| other.received_per_second))
            };
            vec![
                row.way.to_owned(),
                row.frame_bytes.to_string(),
                format!("{:.0}", row.received_per_second / 1e3),
                format!("{:.2}", row.gigabits_per_second),
                format!("{:.0} %", row.lost_share * 100.0),
                to(Way::Plain),
                to(Way::Vxlan),
            ]
        })
        .collect();
    format!(
        "Between two namespaces, one core for the sender and one for the receiver, flat out; medians of {count} times {seconds} s.\n\
         What the receiver got; AES instructions: {}.\n\n{}\n",
        Cipher::has_fast_aes(),
        table(&["", "frame bytes", "1000/s", "Gbit/s", "lost", "/ plain", "/ VXLAN"], &lines)
    )
}
