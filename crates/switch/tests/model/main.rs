//! The switch against a naive oracle, under random operations.
//!
//! Each test prints its seed. To run with one: `DIORAMA_SEED=123 cargo test -p diorama-switch --test model`.
//! `DIORAMA_CASES` sets the number of cases.

mod oracle;
mod tunnels;

use std::{
    cell::Cell,
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
};

use diorama_switch::{
    Accounting, Epoch, FrameReader, Hold, InFlight, Mac, NetworkConfig, NetworkId, PortId, Recording, Switch,
    Time, resync,
};
use oracle::Oracle;
use proptest::{prelude::*, test_runner::RngSeed};

/// Ports 0 to 3 are in network 0, ports 4 and 5 in network 1.
const NETWORK_OF: [usize; 6] = [0, 0, 0, 0, 1, 1];
const MTU: u16 = 100;
const QUEUE_BYTES: usize = 512;

fn config() -> ProptestConfig {
    let number = |name| std::env::var(name).ok().and_then(|value: String| value.parse().ok());
    let seed = number("DIORAMA_SEED").unwrap_or_else(|| RandomState::new().build_hasher().finish());
    println!("DIORAMA_SEED={seed}");
    ProptestConfig {
        rng_seed: RngSeed::Fixed(seed),
        cases: number("DIORAMA_CASES").unwrap_or(400) as u32,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// A frame from a port to another's address (or one that nobody has), or to all.
    Ingress {
        from: usize,
        source: u8,
        destination: u8,
        len: usize,
    },
    Raw {
        from: usize,
        bytes: Vec<u8>,
    },
    Inject {
        to: usize,
        behind: u32,
        ahead: u32,
        len: usize,
    },
    /// Parts of 256 of what is writable.
    Write {
        port: usize,
        parts: usize,
    },
    Connect {
        port: usize,
        connected: bool,
    },
    Hold {
        port: usize,
        hold: Hold,
    },
    Release {
        port: usize,
        hold: Hold,
    },
    /// To the newest epoch or the cut being recorded, and so much further.
    Advance {
        port: usize,
        further: u32,
    },
    /// One machine's cut as it should be.
    Cut {
        port: usize,
    },
    Start {
        policy: InFlight,
        further: u32,
    },
    Stop,
    Pass {
        ns: u64,
    },
}

fn port() -> impl Strategy<Value = usize> {
    0..NETWORK_OF.len()
}

fn traffic() -> impl Strategy<Value = Op> {
    let frame = (port(), 0..7u8, 0..9u8, 14..124usize);
    let raw = (port(), prop::collection::vec(any::<u8>(), 0..130));
    prop_oneof![
        24 => frame.prop_map(|(from, source, destination, len)| Op::Ingress { from, source, destination, len }),
        1 => raw.prop_map(|(from, bytes)| Op::Raw { from, bytes }),
        2 => (port(), prop::bool::weighted(0.8)).prop_map(|(port, connected)| Op::Connect { port, connected }),
        2 => prop_oneof![5 => 0..1000u64, 1 => Just(200_000_000_000u64)].prop_map(|ns| Op::Pass { ns }),
    ]
}

fn writing() -> impl Strategy<Value = Op> {
    let parts = prop_oneof![2 => Just(256usize), 1 => 0..256usize];
    (port(), parts).prop_map(|(port, parts)| Op::Write { port, parts })
}

fn cutting() -> impl Strategy<Value = Op> {
    let hold = || prop_oneof![4 => Just(Hold::Cut), 1 => Just(Hold::Pause)];
    let further = prop_oneof![6 => Just(0u32), 1 => Just(1u32)];
    let policy = prop_oneof![3 => Just(InFlight::Record), 1 => Just(InFlight::Drop)];
    let inject = (port(), 0..3u32, 0..2u32, 10..130usize);
    prop_oneof![
        2 => inject.prop_map(|(to, behind, ahead, len)| Op::Inject { to, behind, ahead, len }),
        3 => (port(), hold()).prop_map(|(port, hold)| Op::Hold { port, hold }),
        4 => (port(), hold()).prop_map(|(port, hold)| Op::Release { port, hold }),
        3 => (port(), further).prop_map(|(port, further)| Op::Advance { port, further }),
        4 => port().prop_map(|port| Op::Cut { port }),
        2 => (policy, 0..2u32).prop_map(|(policy, further)| Op::Start { policy, further }),
        1 => Just(Op::Stop),
    ]
}

fn address(n: u8) -> Mac {
    match n {
        8 => [0xff; 6],
        n => [2, 0, 0, 0, 0, n],
    }
}

fn frame(destination: Mac, source: Mac, len: usize, number: u64) -> Vec<u8> {
    let mut bytes = [destination, source].concat();
    bytes.extend(number.to_le_bytes());
    bytes.resize(len, number as u8);
    bytes
}

struct Pair {
    switch: Switch,
    oracle: Oracle,
    networks: [NetworkId; 2],
    ports: Vec<PortId>,
    now: u64,
    frames: u64,
}

impl Pair {
    fn new(base: u32) -> Self {
        let mut switch = Switch::new(Epoch(base));
        let config = NetworkConfig { queue_bytes: QUEUE_BYTES, ..NetworkConfig::new(MTU, 3) };
        let networks = [switch.add_network(config), switch.add_network(config)];
        let ports: Vec<PortId> = NETWORK_OF.iter().map(|&n| switch.add_port(networks[n])).collect();
        let oracle = Oracle::new(base, &NETWORK_OF, QUEUE_BYTES, config.max_frame());
        let mut pair = Self { switch, oracle, networks, ports, now: 1000, frames: 0 };
        for port in 0..5 {
            pair.connect(port, true);
        }
        pair
    }

    fn apply(&mut self, op: &Op) {
        self.now += 1;
        let now = Time(self.now);
        match *op {
            Op::Ingress { from, source, destination, len } => self.ingress(from, source, destination, len),
            Op::Raw { from, ref bytes } => {
                self.switch.ingress(self.ports[from], bytes, now);
                self.oracle.ingress(from, bytes, self.now);
            }
            Op::Inject { to, behind, ahead, len } => {
                let colour = (self.oracle.ports[to].epoch + ahead).saturating_sub(behind);
                let frame = frame(address(8), address(7), 20.max(len), self.frames);
                let injected = self.switch.inject(self.ports[to], &frame[..len], Epoch(colour), now);
                assert_eq!(injected.is_ok(), (14..=usize::from(MTU) + 22).contains(&len), "{injected:?}");
                if injected.is_ok() {
                    self.oracle.inject(to, &frame[..len], colour, self.now);
                }
            }
            Op::Write { port, parts } => self.write(port, parts),
            Op::Connect { port, connected } => self.connect(port, connected),
            Op::Hold { port, hold } => {
                self.switch.hold(self.ports[port], hold, now);
                self.oracle.hold(port, hold);
            }
            Op::Release { port, hold } => self.release(port, hold),
            Op::Advance { port, further } => self.advance(port, self.target() + further),
            Op::Cut { port } => {
                self.apply(&Op::Hold { port, hold: Hold::Cut });
                self.advance(port, self.target());
                self.release(port, Hold::Cut);
            }
            Op::Start { policy, further } => {
                let cut = self.oracle.newest_epoch() + further;
                let started = self.switch.start_recording(Epoch(cut), policy);
                assert_eq!(started.is_ok(), self.oracle.recording.is_none());
                if started.is_ok() {
                    self.oracle.start_recording(cut, policy);
                }
            }
            Op::Stop => drop(self.stop()),
            Op::Pass { ns } => self.now += ns,
        }
    }

    fn target(&self) -> u32 {
        self.oracle.recording.map_or(self.oracle.newest_epoch(), |r| r.cut)
    }

    fn ingress(&mut self, from: usize, source: u8, destination: u8, len: usize) {
        self.frames += 1;
        let frame = frame(address(destination), address(source), len.max(20), self.frames);
        self.switch.ingress(self.ports[from], &frame[..len], Time(self.now));
        self.oracle.ingress(from, &frame[..len], self.now);
    }

    fn connect(&mut self, port: usize, connected: bool) {
        self.switch.set_connected(self.ports[port], connected);
        self.oracle.set_connected(port, connected);
    }

    fn advance(&mut self, port: usize, to: u32) {
        let advanced = self.switch.advance_epoch(self.ports[port], Epoch(to), Time(self.now));
        assert_eq!(advanced.is_ok(), self.oracle.advance(port, to, self.now), "{advanced:?}");
    }

    fn release(&mut self, port: usize, hold: Hold) {
        self.switch.release(self.ports[port], hold, Time(self.now));
        self.oracle.release(port, hold);
    }

    fn write(&mut self, port: usize, parts: usize) {
        let writable = self.oracle.writable(port);
        assert_eq!(
            self.switch.writable(self.ports[port]).concat(),
            writable,
            "port {port} offers other bytes"
        );
        let count = writable.len() * parts / 256;
        self.switch.written(self.ports[port], count, Time(self.now));
        self.oracle.written(port, count);
    }

    fn stop(&mut self) -> Option<Recording> {
        let recording = self.switch.stop_recording();
        let expected = self.oracle.recording.take();
        assert_eq!(recording.is_some(), expected.is_some());
        if let (Some(recording), Some(expected)) = (&recording, expected) {
            assert!(recording.is_complete());
            assert_eq!((recording.cut, recording.policy), (Epoch(expected.cut), expected.policy));
            assert_eq!(recording.bytes, recording.frames.iter().map(|f| f.bytes.len()).sum::<usize>());
            let expected = self.oracle.recorded(expected.serial);
            let number = |id: PortId| self.ports.iter().position(|&p| p == id).unwrap();
            for port in 0..self.ports.len() {
                // Per receiver and in order: that is what a replay needs.
                let got: Vec<_> = (recording.frames.iter().filter(|f| number(f.to) == port))
                    .map(|f| (usize::from(f.network.0), port, f.colour.0, f.after_cut_ns, f.bytes.to_vec()))
                    .collect();
                let expected: Vec<_> = expected.iter().filter(|f| f.1 == port).cloned().collect();
                assert_eq!(got, expected, "recorded for port {port}");
            }
        }
        recording
    }

    /// Everything that can be seen from outside agrees.
    fn check(&mut self) {
        self.switch.assert_consistent();
        let mut dirty = vec![false; self.ports.len()];
        for (n, &port) in self.ports.iter().enumerate() {
            let writable = self.oracle.writable(n);
            assert_eq!(self.switch.writable(port).concat(), writable, "port {n} offers other bytes");
            let state = &self.oracle.ports[n];
            assert_eq!(self.switch.mid_frame(port), state.head_written > 0);
            assert_eq!(self.switch.is_held(port), state.held_for_cut || state.held_for_pause);
            assert_eq!(self.switch.epoch(port), self.oracle.epoch(n));
            let waits = state.queue.iter().map(|&c| self.oracle.copies[c].colour).find(|&c| c > state.epoch);
            assert_eq!(self.switch.waiting_for(port), waits.map(Epoch));
            dirty[n] = !writable.is_empty();
        }
        let newest = self.oracle.newest_epoch();
        self.check_peers();
        for (n, &network) in self.networks.iter().enumerate() {
            for cut in newest.saturating_sub(3)..newest + 3 {
                if let Some(books) = self.switch.accounting(network, Epoch(cut)) {
                    assert_eq!(books, self.oracle.accounting(n, cut), "network {n} at cut {cut}");
                    assert_eq!(books.unaccounted_here(), books.unrecorded as i64, "network {n} at cut {cut}");
                } else {
                    assert!(
                        cut == 0
                            || cut < self.oracle.latest.cut
                            || cut < newest.saturating_sub(1)
                            || self.oracle.peers.iter().any(|peer| cut < peer.closed[n].0),
                        "cut {cut}"
                    );
                }
            }
        }
    }

    /// Every port that has something to write was announced since it was last drained.
    fn drain_announced(&mut self) {
        while let Some(id) = self.switch.pop_dirty() {
            let port = self.ports.iter().position(|&p| p == id).unwrap();
            self.write(port, 256);
        }
        for port in 0..self.ports.len() {
            assert!(self.oracle.writable(port).is_empty(), "port {port} was not announced");
        }
    }
}

#[test]
fn does_what_the_oracle_does() {
    let ops = prop::collection::vec(prop_oneof![3 => traffic(), 2 => writing(), 2 => cutting()], 1..160);
    proptest!(config(), |(ops in ops, base in 0..3u32)| {
        let mut pair = Pair::new(base);
        for op in &ops {
            pair.apply(op);
            pair.check();
        }
        pair.stop();
        pair.check();
    });
}

#[test]
fn announces_every_port_that_can_be_written() {
    // Ports disconnect here with a partly written queue, are held and cut; nothing but the announcements tells what to drain.
    let ops = prop::collection::vec(prop_oneof![3 => traffic(), 2 => cutting()], 1..160);
    proptest!(config(), |(ops in ops)| {
        let mut pair = Pair::new(1);
        for op in &ops {
            pair.apply(op);
            pair.drain_announced();
        }
    });
}

/// Cuts as they should be: every machine passes each cut, in any order, under traffic.
#[test]
fn a_snapshot_of_every_cut_conserves_every_frame() {
    let orders = prop::collection::vec(Just([0, 1, 2, 3, 4, 5usize]).prop_shuffle(), 1..4);
    let policy = prop_oneof![3 => Just(InFlight::Record), 1 => Just(InFlight::Drop)];
    let ops = prop::collection::vec(prop_oneof![2 => traffic(), 1 => writing()], 0..800);
    let in_flight = Cell::new(0);
    let wanted = Cell::new(0);
    proptest!(config(), |(orders in orders, ops in ops, policy in policy)| {
        let mut pair = Pair::new(0);
        let mut chunks = ops.chunks(ops.len() / (orders.len() * 20) + 1);
        let mut run = |pair: &mut Pair| for op in chunks.next().into_iter().flatten() {
            pair.apply(op);
        };
        for (n, order) in orders.iter().enumerate() {
            let cut = Epoch(n as u32 + 1);
            run(&mut pair);
            pair.apply(&Op::Start { policy, further: 1 });
            for &port in order {
                pair.apply(&Op::Hold { port, hold: Hold::Cut });
                run(&mut pair);
                pair.advance(port, cut.0);
                run(&mut pair);
                pair.release(port, Hold::Cut);
                run(&mut pair);
                while let Some(wants) = pair.switch.pop_cut_wanted() {
                    assert_eq!(wants.epoch, cut);
                    assert!(pair.switch.epoch(wants.port) < cut);
                    wanted.set(wanted.get() + 1);
                }
                pair.check();
            }
            let recording = pair.stop().unwrap();
            let books: Accounting = pair.networks.iter().map(|&n| pair.switch.accounting(n, cut).unwrap()).sum();
            prop_assert_eq!((books.unaccounted(), books.unrecorded, books.pending), (0, 0, 0));
            prop_assert_eq!(books.in_flight, recording.frames.len() as u64);
            in_flight.set(in_flight.get() + books.in_flight);
            replay(&recording);
        }
    });
    let (in_flight, wanted) = (in_flight.get(), wanted.get());
    assert!(in_flight > 0 && wanted > 0, "{in_flight} in flight, {wanted} cuts wanted: the test saw nothing");
}

/// A restored environment delivers exactly the recorded frames, and accounts for them.
fn replay(recording: &Recording) {
    let mut pair = Pair::new(recording.cut.0);
    pair.connect(5, true);
    for frame in &recording.frames {
        pair.switch.inject(frame.to, &frame.bytes, frame.colour, Time(2000 + frame.after_cut_ns)).unwrap();
    }
    let books: Accounting =
        pair.networks.iter().map(|&n| pair.switch.accounting(n, recording.cut).unwrap()).sum();
    assert_eq!((books.sent_before, books.unaccounted()), (recording.frames.len() as u64, 0));
    assert_eq!(books.in_flight, books.sent_before);
    for &port in &pair.ports {
        let bytes = pair.switch.writable(port).concat();
        let got: Vec<Vec<u8>> = FrameReader::new(&bytes).map(|f| f.unwrap().to_vec()).collect();
        let owed: Vec<Vec<u8>> =
            recording.frames.iter().filter(|f| f.to == port).map(|f| f.bytes.to_vec()).collect();
        assert_eq!(got, owed, "{port}");
        pair.switch.written(port, bytes.len(), Time(u64::MAX));
    }
    pair.switch.assert_consistent();
    let later: Accounting =
        pair.networks.iter().map(|&n| pair.switch.accounting(n, recording.cut).unwrap()).sum();
    assert_eq!(later, books, "delivery changes nothing at a cut that is over");
}

#[test]
fn hostile_streams_never_panic() {
    let bytes = prop::collection::vec(prop_oneof![3 => Just(0u8), 2 => any::<u8>(), 1 => Just(14u8)], 0..600);
    proptest!(config(), |(bytes in bytes, from in 0..6usize)| {
        let mut pair = Pair::new(0);
        let mut reader = FrameReader::new(&bytes);
        let mut total = 0;
        for frame in reader.by_ref().flatten() {
            total += 4 + frame.len();
            pair.switch.ingress(pair.ports[from], frame, Time(0));
            pair.oracle.ingress(from, frame, 0);
        }
        prop_assert_eq!(reader.consumed(), total);
        pair.now = 0;
        pair.check();
        if let Some(at) = resync(&bytes, [0; 6]) {
            let mut reader = FrameReader::new(&bytes[at..]);
            let first = reader.next().unwrap().unwrap();
            prop_assert_eq!(&first[6..12], &[0; 6]);
            prop_assert!(reader.by_ref().all(|f| f.is_ok_and(|f| f.len() >= 14)));
            prop_assert_eq!(at + reader.consumed(), bytes.len());
        }
    });
}
