//! What comes from guests and from other hosts, mangled: tunnel headers with options, and QEMU's stream of frames.

#[path = "../../../testing/mangle.rs"]
mod mangle;

use diorama_switch::geneve::{HEADER_BYTES, Header, KeyId, Payload, Vni};
use diorama_switch::{Epoch, FrameReader, LENGTH_BYTES, MAX_STREAM_FRAME, resync};
use mangle::{config, mangled, mangles};
use proptest::prelude::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A packet with options of others around ours.
fn packet() -> Vec<u8> {
    let header = Header {
        vni: Vni::new(7).unwrap(),
        payload: Payload::Ethernet,
        key: KeyId(3),
        colour: Epoch(5),
        sequence: 9,
    };
    let plain = header.encode();
    let (fixed, ours) = plain.split_at(8);
    let other = [0x01, 0x02, 0x03, 0x01, 0xaa, 0xbb, 0xcc, 0xdd];
    let empty = [0x01, 0x02, 0x04, 0x00];
    let mut packet = [fixed, &other, ours, &empty].concat();
    packet[0] += 3;
    packet.extend([0x5a; 60]);
    packet
}

#[test]
fn mangled_packets() {
    let whole = packet();
    assert!(Header::decode(&whole).is_ok_and(|(header, _)| header.colour == Epoch(5)));
    proptest!(config(2000), |(how in mangles())| {
        let bytes = mangled(&whole, &how);
        if let Ok((header, payload)) = Header::decode(&bytes) {
            prop_assert!((HEADER_BYTES..=bytes.len()).contains(&payload));
            prop_assert_eq!(Header::decode(&header.encode()), Ok((header, HEADER_BYTES)));
        }
    });
}

fn stream() -> Vec<u8> {
    let frame = |length: usize| {
        let mut bytes = (length as u32).to_be_bytes().to_vec();
        bytes.extend([0xff; 6]);
        bytes.extend(MAC);
        bytes.resize(LENGTH_BYTES + length, 0x5a);
        bytes
    };
    [frame(14), frame(60), frame(1500), frame(64)].concat()
}

/// However it comes in pieces, the same frames come of it, and each lies where it says.
#[test]
fn mangled_streams_of_frames() {
    let whole = stream();
    proptest!(config(1000), |(how in mangles(), piece in 1..2000_usize)| {
        let bytes = mangled(&whole, &how);
        let mut reader = FrameReader::new(&bytes);
        let at_once: Vec<Vec<u8>> = reader.by_ref().map_while(Result::ok).map(<[u8]>::to_vec).collect();
        prop_assert!(reader.consumed() <= bytes.len());
        prop_assert!(at_once.iter().all(|frame| frame.len() <= MAX_STREAM_FRAME));
        prop_assert_eq!(reader.consumed(), at_once.iter().map(|frame| LENGTH_BYTES + frame.len()).sum::<usize>());
        let (mut kept, mut in_pieces) = (Vec::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            kept.extend_from_slice(piece);
            let mut reader = FrameReader::new(&kept);
            in_pieces.extend(reader.by_ref().map_while(Result::ok).map(<[u8]>::to_vec));
            let used = reader.consumed();
            kept.drain(..used);
        }
        prop_assert_eq!(at_once, in_pieces);
        if let Some(at) = resync(&bytes, MAC) {
            let mut reader = FrameReader::new(&bytes[at..]);
            prop_assert!(reader.by_ref().all(|frame| frame.is_ok()));
            prop_assert_eq!(reader.consumed(), bytes.len() - at);
        }
    });
}
