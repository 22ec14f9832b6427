//! Tunnel headers under arbitrary bytes, and packets in any order.
//!
//! Each test prints its seed. To run with one: `DIORAMA_SEED=123 cargo test -p diorama-switch --test tunnel_packets`.

use std::{
    collections::BTreeSet,
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
};

use diorama_switch::{
    Epoch,
    arrivals::{Arrival, Arrivals, WINDOW},
    geneve::{GeneveError, HEADER_BYTES, Header, KeyId, Payload, Vni},
};
use proptest::{prelude::*, test_runner::RngSeed};

fn config() -> ProptestConfig {
    let seed = std::env::var("DIORAMA_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
    println!("DIORAMA_SEED={seed}");
    ProptestConfig {
        rng_seed: RngSeed::Fixed(seed),
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn header() -> impl Strategy<Value = Header> {
    let payload = prop_oneof![Just(Payload::Ethernet), Just(Payload::Sealed)];
    (0..=Vni::MAX.get(), payload, any::<u16>(), any::<u32>(), any::<u64>()).prop_map(
        |(vni, payload, key, colour, sequence)| Header {
            vni: Vni::new(vni).unwrap(),
            payload,
            key: KeyId(key),
            colour: Epoch(colour),
            sequence,
        },
    )
}

#[test]
fn what_is_encoded_is_decoded_whatever_follows() {
    proptest!(config(), |(header in header(), follows in prop::collection::vec(any::<u8>(), 0..40))| {
        let packet = [&header.encode()[..], &follows].concat();
        prop_assert_eq!(Header::decode(&packet), Ok((header, HEADER_BYTES)));
        for len in 0..HEADER_BYTES {
            let truncated = matches!(Header::decode(&packet[..len]), Err(GeneveError::Truncated { .. }));
            prop_assert!(truncated, "{} bytes", len);
        }
    });
}

#[test]
fn damaged_and_arbitrary_packets_never_panic_and_the_payload_is_inside() {
    // Mostly almost right: arbitrary bytes alone hardly get past the first check.
    let damage = prop::collection::vec((0..HEADER_BYTES + 30, any::<u8>()), 0..5);
    let packet = (header(), prop::collection::vec(any::<u8>(), 0..300), damage, 0..400usize, any::<bool>())
        .prop_map(|(header, follows, damage, len, plain)| {
            let mut packet = follows;
            if !plain {
                packet.splice(..0, header.encode());
            }
            for (at, byte) in damage {
                if let Some(place) = packet.get_mut(at) {
                    *place = byte;
                }
            }
            packet.truncate(len);
            packet
        });
    let (decoded, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    proptest!(config(), |(packet in packet)| {
        match Header::decode(&packet) {
            Ok((header, at)) => {
                prop_assert!((HEADER_BYTES..=8 + 63 * 4).contains(&at) && at <= packet.len());
                prop_assert_eq!(Header::decode(&header.encode()).unwrap().0, header);
                decoded.set(decoded.get() + 1);
            }
            Err(error) => {
                prop_assert!(!error.to_string().is_empty());
                refused.set(refused.get() + 1);
            }
        }
    });
    assert!(
        decoded.get() > 100 && refused.get() > 100,
        "{} decoded, {} refused",
        decoded.get(),
        refused.get()
    );
}

#[test]
fn arrivals_agree_with_a_set_of_numbers() {
    let steps =
        prop::collection::vec(prop_oneof![20 => -6..9i64, 3 => -2100..2100i64, 1 => 0..9000i64], 1..600);
    proptest!(config(), |(steps in steps)| {
        let (mut arrivals, mut came) = (Arrivals::default(), BTreeSet::new());
        let mut at = 0i64;
        for step in steps {
            at = (at + step).max(0);
            let number = at as u64;
            let next = came.last().map_or(0, |&n: &u64| n + 1);
            let expected = if number + WINDOW < next {
                Arrival::TooOld
            } else if came.contains(&number) {
                Arrival::Repeated
            } else {
                Arrival::New
            };
            prop_assert_eq!(arrivals.judge(number), expected);
            prop_assert_eq!(arrivals.accept(number), expected);
            if expected == Arrival::New {
                came.insert(number);
            }
            let next = came.last().map_or(0, |&n| n + 1);
            let left_behind = next.saturating_sub(WINDOW);
            let lost = left_behind - came.range(..left_behind).count() as u64;
            prop_assert_eq!(arrivals.lost(), lost);
            prop_assert_eq!(arrivals.came(), came.len() as u64);
            prop_assert_eq!(arrivals.missing(), next - lost - came.len() as u64);
        }
    });
}
