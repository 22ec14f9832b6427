//! Two ends of a tunnel whose keys change under traffic, on a wire that loses, repeats and reorders.
//!
//! Prints its seed. To run with one: `DIORAMA_SEED=123 cargo test -p diorama-tunnel --test rekey`.

use std::{
    cell::Cell,
    collections::{BTreeSet, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
};

use diorama_switch::{
    Epoch, Time,
    arrivals::WINDOW,
    geneve::{Header, KeyId, Vni},
};
use diorama_tunnel::{Cipher, GRACE_NS, OpenError, Protection, ReceivingKey, SendingKey, Tunnel};
use proptest::{prelude::*, test_runner::RngSeed};

const RED: Vni = Vni::new(1).unwrap();

fn config(cases: u32) -> ProptestConfig {
    let seed = std::env::var("DIORAMA_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
    println!("DIORAMA_SEED={seed}");
    ProptestConfig {
        rng_seed: RngSeed::Fixed(seed),
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send {
        count: usize,
        len: usize,
    },
    /// One packet from the wire, not always the first; perhaps it stays there, to come again.
    Arrive {
        place: usize,
        again: bool,
    },
    Lose {
        place: usize,
    },
    /// The sender makes a key and hands it over; the receiver installs it.
    HandOver,
    /// The receiver's answer has come: the sender uses the key.
    Use,
    Pass {
        ns: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..40usize, 0..100usize).prop_map(|(count, len)| Step::Send { count, len }),
        40 => (0..9usize, prop::bool::weighted(0.1)).prop_map(|(place, again)| Step::Arrive { place, again }),
        4 => (0..30usize).prop_map(|place| Step::Lose { place }),
        1 => Just(Step::HandOver),
        2 => Just(Step::Use),
        2 => prop_oneof![Just(1), Just(GRACE_NS / 3), Just(GRACE_NS)].prop_map(|ns| Step::Pass { ns }),
    ]
}

/// What the receiver should do with keys, as plainly as it can be said.
#[derive(Default)]
struct Keys {
    /// Ids in the order of installing; the last two at most are valid.
    installed: Vec<u16>,
    /// When the first packet of the newest was opened.
    newest_seen: Option<u64>,
}

impl Keys {
    fn is_valid(&self, id: u16, now: u64) -> bool {
        let grace_over = self.newest_seen.is_some_and(|seen| now > seen + GRACE_NS);
        match self.installed.iter().rev().position(|&known| known == id) {
            Some(0) => true,
            Some(1) => !grace_over,
            _ => false,
        }
    }
}

#[test]
fn each_packet_opens_at_most_once_and_every_timely_one_does() {
    let [rekeyed, old, replayed, lost] = [const { Cell::new(0) }; 4];
    proptest!(config(300), |(steps in prop::collection::vec(step(), 1..400), aes in any::<bool>())| {
        let cipher = if aes { Cipher::Aes256Gcm } else { Cipher::ChaCha20Poly1305 };
        let (mut sender, mut receiver) = (Tunnel::new(Protection::Sealed), Tunnel::new(Protection::Sealed));
        receiver.admit(RED);
        let mut keys = Keys::default();
        let mut handed: Option<SendingKey> = None;
        let (mut next_key, mut now, mut sent, mut given) = (u16::MAX - 1, 0, 0u64, 0);
        let mut wire: Vec<Vec<u8>> = Vec::new();
        let mut opened = BTreeSet::new();
        let hand_over = |next_key: &mut u16, receiver: &mut Tunnel, keys: &mut Keys| {
            let key = SendingKey::generate(KeyId(*next_key), cipher).unwrap();
            receiver.install_receiving(ReceivingKey::from_bytes(&key.to_bytes()).unwrap());
            keys.installed.push(*next_key);
            keys.newest_seen = None;
            *next_key = next_key.wrapping_add(1);
            key
        };
        assert!(sender.rekey_due());
        sender.install_sending(hand_over(&mut next_key, &mut receiver, &mut keys));
        assert!(!sender.rekey_due());
        for step in steps {
            match step {
                Step::Send { count, len } => for _ in 0..count {
                    let mut packet = vec![0; 300];
                    let body = sent.to_be_bytes();
                    let rest = vec![sent as u8; len];
                    let len = sender.seal(RED, Epoch(sent as u32), [&body, &rest], &mut packet).unwrap();
                    packet.truncate(len);
                    wire.push(packet);
                    sent += 1;
                },
                Step::Arrive { .. } | Step::Lose { .. } if wire.is_empty() => (),
                Step::Lose { place } => drop(wire.remove(place % wire.len())),
                Step::Arrive { place, again } => {
                    let place = place % wire.len();
                    let mut packet = if again { wire[place].clone() } else { wire.remove(place) };
                    let header = Header::decode(&packet).unwrap().0;
                    let number = header.sequence;
                    let newest = opened.last().copied().unwrap_or(0u64);
                    let valid = keys.is_valid(header.key.0, now);
                    given += 1;
                    match receiver.open(&mut packet, Time(now)) {
                        Ok(frame) => {
                            assert!(valid, "key {:?} was over", header.key);
                            assert_eq!(frame.frame[..8], number.to_be_bytes());
                            assert!(frame.frame[8..].iter().all(|&byte| byte == number as u8));
                            assert_eq!((frame.colour, frame.sequence), (Epoch(number as u32), number));
                            assert!(opened.insert(number), "packet {number} opened twice");
                            if Some(&header.key.0) == keys.installed.last() && keys.installed.len() > 1 {
                                keys.newest_seen.get_or_insert(now);
                            }
                        }
                        Err(OpenError::Replayed { sequence }) => {
                            assert!(valid && opened.contains(&sequence));
                            replayed.set(replayed.get() + 1);
                        }
                        Err(OpenError::TooOld { sequence }) => assert!(valid && sequence + WINDOW <= newest),
                        Err(OpenError::OldKey { .. } | OpenError::UnknownKey { .. }) => {
                            assert!(!valid, "key {:?} is good", header.key);
                            old.set(old.get() + 1);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                Step::HandOver => handed = Some(hand_over(&mut next_key, &mut receiver, &mut keys)),
                Step::Use => if let Some(key) = handed.take() {
                    sender.install_sending(key);
                    rekeyed.set(rekeyed.get() + 1);
                },
                Step::Pass { ns } => now += ns,
            }
            let c = receiver.counters();
            prop_assert_eq!(c.opened, opened.len() as u64);
            prop_assert_eq!(c.opened + c.replayed + c.too_old + c.old_key + c.unknown_key, given);
            prop_assert_eq!(c.opened + c.lost + c.missing, opened.last().map_or(0, |n| n + 1));
        }
        lost.set(lost.get() + receiver.counters().lost + receiver.counters().missing);
        prop_assert_eq!(sender.counters().sent, sent);
    });
    let seen = [&rekeyed, &old, &replayed, &lost].map(Cell::get);
    assert!(
        seen.iter().all(|&n| n > 0),
        "rekeyed, old, replayed, lost: {seen:?}: the test saw nothing of one"
    );
}

#[test]
fn arbitrary_packets_never_panic_and_never_open() {
    proptest!(config(2000), |(
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..8),
        headers in prop::collection::vec((any::<u32>(), any::<u64>(), 0..3u16, any::<bool>()), 8),
    )| {
        let mut receiver = Tunnel::new(Protection::Sealed);
        receiver.admit(RED);
        let key = SendingKey::generate(KeyId(1), Cipher::ChaCha20Poly1305).unwrap();
        receiver.install_receiving(ReceivingKey::from_bytes(&key.to_bytes()).unwrap());
        for (mut packet, &(colour, sequence, key, dressed)) in packets.into_iter().zip(&headers) {
            if dressed {
                let payload = diorama_switch::geneve::Payload::Sealed;
                let header = Header { vni: RED, payload, key: KeyId(key), colour: Epoch(colour), sequence };
                packet.splice(..0, header.encode());
            }
            prop_assert!(receiver.open(&mut packet, Time(colour.into())).is_err());
        }
        let counters = receiver.counters();
        prop_assert_eq!((counters.opened, counters.lost, counters.missing), (0, 0, 0));
    });
}
