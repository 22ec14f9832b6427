//! Prints what tunnels carry over the loopback interface, sealed and not, and what sealing and opening cost by themselves:
//! packets for each second of processor time of the one thread, medians of several runs. Both ends run in turn on this thread
//! and are timed apart, so each figure is what one core does that does nothing else, and other programs on the computer
//! disturb little. Over loopback the kernel's way of a packet, to the receiver's socket, is in the sender's time.
//!
//! `cargo run --release -p diorama-tunnel --example tunnel-throughput [RUNS [MILLISECONDS]]`

use std::{error::Error, hint::black_box, net::SocketAddr, time::Duration};

use diorama_switch::{
    Epoch, Time,
    geneve::{KeyId, Vni},
};
use diorama_tunnel::{
    Cipher, Ip, Protection, ReceiveBatch, ReceivingKey, SendBatch, SendingKey, Tunnel, TunnelSocket,
    guest_mtu,
};

const NETWORK: Vni = Vni::new(1).expect("fits 24 bits");

/// Packets that the sender makes before it sends: what a busy switch has for a tunnel at once.
const BATCH: usize = 64;

#[derive(Clone, Copy)]
struct Case {
    cipher: Option<Cipher>,
    bytes: usize,
    offload: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let runs: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let length = Duration::from_millis(arguments.next().map_or(Ok(500), |text| text.parse())?);
    println!("AES instructions: {}; median of {runs} runs of {length:?}", Cipher::has_fast_aes());
    let full = usize::from(guest_mtu(1500, Ip::V4, Protection::Sealed)?) + 14;
    let ciphers = [
        ("open", None),
        ("AES-256-GCM", Some(Cipher::Aes256Gcm)),
        ("ChaCha20", Some(Cipher::ChaCha20Poly1305)),
    ];

    let head = ["sent/s", "Gbit/s", "received/s", "Gbit/s"];
    let row = |name: &str, bytes: usize, how: &str, (sent, received): Figures| {
        let gigabits = |rate: f64| rate * bytes as f64 * 8e-9;
        println!(
            "{name:<12} {bytes:>6} {how:<10} {sent:>12.0} {:>8.2} {received:>12.0} {:>8.2}",
            gigabits(sent),
            gigabits(received)
        );
    };
    let [a, b, c, d] = head;
    println!("{:<12} {:>6} {:<10} {a:>12} {b:>8} {c:>12} {d:>8}", "", "bytes", "");
    for (name, cipher) in ciphers {
        for bytes in [64, full, 8914] {
            let case = |offload| Case { cipher, bytes, offload };
            row(name, bytes, "in memory", median(runs, || in_memory(case(false), length))?);
            row(name, bytes, "mmsg", median(runs, || over_loopback(case(false), length))?);
            row(name, bytes, "mmsg+gso", median(runs, || over_loopback(case(true), length))?);
        }
    }
    Ok(())
}

/// Packets sent, and packets received, in a second of processor time.
type Figures = (f64, f64);

fn median(runs: usize, run: impl Fn() -> Result<Figures, Box<dyn Error>>) -> Result<Figures, Box<dyn Error>> {
    let runs = (0..runs.max(1)).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    let of = |figure: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Ok((of(|figures| figures.0), of(|figures| figures.1)))
}

fn tunnels(case: Case) -> Result<(Tunnel, Tunnel), Box<dyn Error>> {
    let protection = if case.cipher.is_some() { Protection::Sealed } else { Protection::Open };
    let (mut from, mut to) = (Tunnel::new(protection), Tunnel::new(protection));
    if let Some(cipher) = case.cipher {
        let key = SendingKey::generate(KeyId(1), cipher)?;
        to.install_receiving(ReceivingKey::from_bytes(&key.to_bytes())?);
        from.install_sending(key);
    }
    to.admit(NETWORK);
    Ok((from, to))
}

fn in_memory(case: Case, length: Duration) -> Result<Figures, Box<dyn Error>> {
    let (mut from, mut to) = tunnels(case)?;
    let frame = vec![7; case.bytes];
    let packet_bytes = from.packet_bytes(case.bytes);
    let mut packets = vec![0; packet_bytes * BATCH];
    let mut times = Times::default();
    while times.total() < length {
        let start = processor_time();
        for packet in packets.chunks_exact_mut(packet_bytes) {
            from.seal(NETWORK, Epoch(1), [black_box(&frame), &[]], packet)?;
        }
        let between = processor_time();
        for packet in packets.chunks_exact_mut(packet_bytes) {
            black_box(to.open(packet, Time(0))?);
        }
        times.add(start, between);
    }
    Ok(times.figures())
}

fn over_loopback(case: Case, length: Duration) -> Result<Figures, Box<dyn Error>> {
    let (mut from, mut to) = tunnels(case)?;
    let bind = || -> Result<TunnelSocket, Box<dyn Error>> {
        let mut socket = TunnelSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        if !case.offload {
            socket.turn_offload_off()?;
        }
        Ok(socket)
    };
    let (mut sender, mut receiver) = (bind()?, bind()?);
    let address = receiver.local_addr()?;
    let frame = vec![7; case.bytes];
    let mut outgoing = SendBatch::new(BATCH * from.packet_bytes(case.bytes));
    let mut incoming = ReceiveBatch::new();
    let mut times = Times::default();
    while times.total() < length {
        let start = processor_time();
        for _ in 0..BATCH {
            outgoing.push(address, |room| from.seal(NETWORK, Epoch(1), [black_box(&frame), &[]], room))?;
        }
        sender.send(&mut outgoing)?;
        let between = processor_time();
        loop {
            let received = receiver.receive(&mut incoming)?;
            for (_, packet) in incoming.packets() {
                black_box(to.open(packet, Time(0))?);
            }
            if !received.more {
                break;
            }
        }
        times.add(start, between);
    }
    let (sent, opened) = (from.counters().sent, to.counters().opened);
    if sent != opened {
        return Err(format!("{opened} of {sent} packets came").into());
    }
    Ok(times.figures())
}

#[derive(Default)]
struct Times {
    sending: Duration,
    receiving: Duration,
    batches: usize,
}

impl Times {
    /// One batch: sent from `start` to `between`, received from then to now.
    fn add(&mut self, start: Duration, between: Duration) {
        self.sending += between - start;
        self.receiving += processor_time() - between;
        self.batches += 1;
    }

    fn total(&self) -> Duration {
        self.sending + self.receiving
    }

    fn figures(&self) -> Figures {
        let packets = (self.batches * BATCH) as f64;
        (packets / self.sending.as_secs_f64(), packets / self.receiving.as_secs_f64())
    }
}

/// What this thread has used of processors so far.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to `time`. The clock exists for every thread.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
