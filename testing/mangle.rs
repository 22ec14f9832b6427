//! Valid input made invalid: what the parsers' tests share. Included by path; it belongs to no crate.
//!
//! Bytes that are almost right get past the first checks, and find what random ones never reach.

use std::hash::{BuildHasher, RandomState};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::RngSeed;

/// So many cases that they take a second or so, unless PROPTEST_CASES says otherwise (`make fuzz` does). Prints its seed;
/// PROPTEST_RNG_SEED repeats it.
pub fn config(cases: u32) -> ProptestConfig {
    let given = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    let mut config = ProptestConfig::with_cases(given.unwrap_or(cases));
    config.failure_persistence = None;
    if let RngSeed::Random = config.rng_seed {
        config.rng_seed = RngSeed::Fixed(RandomState::new().hash_one("seed"));
    }
    if let RngSeed::Fixed(seed) = config.rng_seed {
        println!("PROPTEST_RNG_SEED={seed}");
    }
    config
}

/// One thing done to some bytes.
#[derive(Debug, Clone)]
pub enum Mangle {
    Flip(Index, u8),
    Set(Index, u8),
    /// A number that lies at some type's edge, in either order.
    Number(Index, u64, usize, bool),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, Index, usize),
    Truncate(Index),
    Append(Vec<u8>),
}

/// One to six of them.
pub fn mangles() -> impl Strategy<Value = Vec<Mangle>> {
    let at = any::<Index>;
    let edges = prop_oneof![
        Just(0),
        Just(1),
        Just(0x7f),
        Just(0xff),
        Just(0x7fff),
        Just(0xffff),
        Just(0x7fff_ffff),
        Just(0xffff_ffff),
        Just(i64::MAX.cast_unsigned()),
        Just(u64::MAX),
        any::<u64>(),
    ];
    let one = prop_oneof![
        (at(), 0_u8..8).prop_map(|(at, bit)| Mangle::Flip(at, bit)),
        (at(), any::<u8>()).prop_map(|(at, byte)| Mangle::Set(at, byte)),
        (at(), edges, prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)], any::<bool>())
            .prop_map(|(at, number, width, big)| Mangle::Number(at, number, width, big)),
        (at(), vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Mangle::Insert(at, bytes)),
        (at(), 1_usize..40).prop_map(|(at, length)| Mangle::Remove(at, length)),
        (at(), at(), 1_usize..80).prop_map(|(from, to, length)| Mangle::Repeat(from, to, length)),
        at().prop_map(Mangle::Truncate),
        vec(any::<u8>(), 1..40).prop_map(Mangle::Append),
    ];
    vec(one, 1..6)
}

/// Does them, in order.
pub fn mangled(bytes: &[u8], mangles: &[Mangle]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for mangle in mangles {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let length = bytes.len();
        match mangle {
            Mangle::Flip(at, bit) => bytes[at.index(length)] ^= 1 << bit,
            Mangle::Set(at, byte) => bytes[at.index(length)] = *byte,
            Mangle::Number(at, number, width, big) => {
                let at = at.index(length);
                let encoded = if *big {
                    number.to_be_bytes()[8 - width..].to_vec()
                } else {
                    number.to_le_bytes()[..*width].to_vec()
                };
                bytes[at..].iter_mut().zip(encoded).for_each(|(place, byte)| *place = byte);
            }
            Mangle::Insert(at, more) => {
                drop(bytes.splice(at.index(length)..at.index(length), more.iter().copied()))
            }
            Mangle::Remove(at, count) => {
                let at = at.index(length);
                bytes.drain(at..(at + count).min(length));
            }
            Mangle::Repeat(from, to, count) => {
                let from = from.index(length);
                let part = bytes[from..(from + count).min(length)].to_vec();
                let to = to.index(length);
                bytes.splice(to..to, part);
            }
            Mangle::Truncate(at) => bytes.truncate(at.index(length)),
            Mangle::Append(more) => bytes.extend_from_slice(more),
        }
    }
    bytes
}
