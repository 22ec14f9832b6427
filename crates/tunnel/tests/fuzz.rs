//! Packets and keys from other hosts, mangled: whoever has no key gets nothing in, and stops nothing that is genuine.

#[path = "../../../testing/mangle.rs"]
mod mangle;

use diorama_switch::geneve::{HEADER_BYTES, KeyId, Vni};
use diorama_switch::{Epoch, Time};
use diorama_tunnel::{Cipher, Protection, ReceivingKey, SendingKey, Tunnel};
use mangle::{config, mangled, mangles};
use proptest::prelude::*;

const RED: Vni = Vni::new(1).unwrap();

fn pair(protection: Protection) -> (Tunnel, Tunnel) {
    let [mut from, mut to] = [(); 2].map(|()| Tunnel::new(protection));
    for tunnel in [&mut from, &mut to] {
        tunnel.admit(RED);
    }
    if protection == Protection::Sealed {
        let key = SendingKey::generate(KeyId(4), Cipher::for_hosts(true, true)).unwrap();
        to.install_receiving(ReceivingKey::from_bytes(&key.to_bytes()).unwrap());
        from.install_sending(key);
    }
    (from, to)
}

fn sealed(from: &mut Tunnel, frame: &[u8]) -> Vec<u8> {
    let mut room = vec![0; from.packet_bytes(frame.len())];
    let length = from.seal(RED, Epoch(3), [frame, &[]], &mut room).unwrap();
    room.truncate(length);
    room
}

#[test]
fn mangled_packets_that_are_sealed() {
    let frame = [0x5a; 90];
    proptest!(config(500), |(hows in prop::collection::vec(mangles(), 1..6))| {
        let (mut from, mut to) = pair(Protection::Sealed);
        let mut forgeries = 0;
        for how in &hows {
            let mut packet = sealed(&mut from, &frame);
            let mut bytes = mangled(&packet, how);
            if bytes != packet {
                prop_assert!(to.open(&mut bytes, Time(0)).is_err());
                forgeries += 1;
            }
            // It has moved no window, and used up no number.
            let opened = to.open(&mut packet, Time(0)).unwrap();
            prop_assert_eq!((opened.frame, opened.colour), (&frame[..], Epoch(3)));
        }
        let counters = to.counters();
        let refused = counters.malformed
            + counters.wrong_protection
            + counters.unknown_key
            + counters.forged
            + counters.replayed
            + counters.too_old;
        prop_assert_eq!(refused, forgeries, "each is counted: {:?}", counters);
    });
}

#[test]
fn mangled_packets_that_are_not_sealed() {
    proptest!(config(1000), |(how in mangles())| {
        let (mut from, mut to) = pair(Protection::Open);
        let mut bytes = mangled(&sealed(&mut from, &[0x5a; 90]), &how);
        let length = bytes.len();
        if let Ok(opened) = to.open(&mut bytes, Time(0)) {
            prop_assert!(opened.frame.len() + HEADER_BYTES <= length);
        }
    });
}

#[test]
fn mangled_keys() {
    let whole = SendingKey::generate(KeyId(4), Cipher::for_hosts(true, true)).unwrap().to_bytes();
    proptest!(config(1000), |(how in mangles())| {
        let (mut from, _) = pair(Protection::Sealed);
        let bytes = mangled(&whole, &how);
        if let Ok(key) = ReceivingKey::from_bytes(&bytes) {
            prop_assert_eq!(bytes.len(), whole.len());
            let mut to = Tunnel::new(Protection::Sealed);
            to.admit(RED);
            to.install_receiving(key);
            prop_assert!(to.open(&mut sealed(&mut from, &[0x5a; 90]), Time(0)).is_err());
        }
    });
}
