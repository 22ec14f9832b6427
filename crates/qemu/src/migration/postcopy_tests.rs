//! Streams and replies built by hand. A real QEMU is in `tests/live_capture.rs`.

use super::*;
use proptest::prelude::*;

const RAM_BYTES: u64 = 4 * PAGE_SIZE_BYTES as u64;

/// A device state in its three parts, and its end.
fn parts() -> [Vec<u8>; 4] {
    let mut list = (RAM_BYTES + 0x2000 + 0x04).to_be_bytes().to_vec();
    for (name, size) in [("ram0", RAM_BYTES), ("bios", 0x2000)] {
        list.push(4);
        list.extend_from_slice(name.as_bytes());
        list.extend_from_slice(&size.to_be_bytes());
    }
    let footer = b"\x7e\0\0\0\x02";
    let end = [&FLAG_EOS.to_be_bytes()[..], footer].concat();
    let page = [&FLAG_PAGE.to_be_bytes()[..], b"\x04bios", &[7; PAGE_SIZE_BYTES]].concat();
    let memory =
        [b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", &list[..], &end, b"\x03\0\0\0\x02", &page, &end]
            .concat();
    let json = br#"{"page_size": 4096, "devices": []}"#;
    [
        b"QEVM\0\0\0\x03\x07\0\0\0\x06pc-q35".to_vec(),
        memory,
        b"\x04\0\0\0\x09\x03dev\0\0\0\0\0\0\0\x01\x00\x06\0\0\0\x02{\"page_size\x7e\0\0\0\x09".to_vec(),
        [b"\0\x06", &(json.len() as u32).to_be_bytes()[..], json].concat(),
    ]
}

#[test]
fn the_opening_has_the_state_in_the_order_of_postcopy() {
    let [configuration, memory, devices, end] = parts();
    let state = [&configuration[..], &memory, &devices, &end].concat();
    let opening = opening(&state, "ram0", RAM_BYTES).expect("valid");
    assert_eq!(opening.ram_section, 2);
    let package =
        [b"\x08\0\x04\0\0", &devices[..], b"\x08\0\x02\0\x04\0\0\0\x03", b"\x08\0\x05\0\0"].concat();
    let expected = [
        &configuration[..],
        b"\x08\0\x01\0\0",
        b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0",
        &memory,
        b"\x08\0\x06\0\x17\0\x04ram0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0",
        b"\x08\0\x07\0\x04",
        &(package.len() as u32).to_be_bytes(),
        &package,
    ]
    .concat();
    assert_eq!(opening.bytes, expected);
}

#[test]
fn a_state_that_is_not_whole_is_refused() {
    let state = parts().concat();
    for length in 0..state.len() {
        assert!(opening(&state[..length], "ram0", RAM_BYTES).is_err(), "{length}");
    }
    assert!(matches!(opening(&state, "ram0", 2 * RAM_BYTES), Err(StreamError::RamSizeMismatch { .. })));
    // Main memory does not belong here.
    let [configuration, memory, devices, end] = parts();
    let page = [b"\x02\0\0\0\x02", &FLAG_ZERO.to_be_bytes()[..], b"\x04ram0\0", &FLAG_EOS.to_be_bytes()];
    let page = [&page.concat()[..], b"\x7e\0\0\0\x02"].concat();
    let state = [configuration, memory, page, devices, end].concat();
    assert!(matches!(opening(&state, "ram0", RAM_BYTES), Err(StreamError::Sink(_))));
}

#[test]
fn pages_name_their_block_once() {
    let mut pages = Pages::new(2);
    pages.page("ram0", 0x1000, &[5; PAGE_SIZE_BYTES]);
    pages.zero("ram0", 0x3000);
    pages.zero("bios", 0);
    assert_eq!(pages.count(), 3);
    let expected = [
        b"\x02\0\0\0\x02",
        &0x1008u64.to_be_bytes()[..],
        b"\x04ram0",
        &[5; PAGE_SIZE_BYTES],
        &0x3022u64.to_be_bytes(),
        b"\0",
        &0x02u64.to_be_bytes(),
        b"\x04bios\0",
        &0x10u64.to_be_bytes(),
        b"\x7e\0\0\0\x02",
    ]
    .concat();
    assert_eq!(pages.finish(), expected);
    assert_eq!(closing(2), [b"\x03\0\0\0\x02", &0x10u64.to_be_bytes()[..], b"\x7e\0\0\0\x02\0"].concat());
}

fn replies() -> Vec<u8> {
    [
        &b"\0\x02\0\x04\0\0\0\x03"[..],
        b"\0\x03\0\x11\0\0\0\0\0\0\x10\0\0\0\x10\0\x04ram0",
        b"\0\x04\0\x0c\0\0\0\0\0\0\x30\0\0\0\x20\0",
        b"\0\x01\0\x04\0\0\0\0",
    ]
    .concat()
}

fn read(chunks: &[&[u8]]) -> Result<Vec<Reply>, ReplyError> {
    let mut reader = ReplyReader::default();
    let mut replies = Vec::new();
    for chunk in chunks {
        reader.feed(chunk);
        while let Some(reply) = reader.next_reply()? {
            replies.push(reply);
        }
        assert!(reader.carry.len() - reader.at < MAX_REPLY_BYTES);
    }
    Ok(replies)
}

#[test]
fn replies_are_read() {
    let request = |offset, bytes| Reply::Request { block: "ram0".to_owned(), offset, bytes };
    let expected = [
        Reply::Pong { value: READY },
        request(0x1000, 0x1000),
        request(0x3000, 0x2000),
        Reply::Shut { status: 0 },
    ];
    assert_eq!(read(&[&replies()]).expect("valid"), expected);
}

#[test]
fn replies_that_make_no_sense_are_refused() {
    let cases: [(&[u8], &str); 8] = [
        (b"\0\x04\0\x0c\0\0\0\0\0\0\x10\0\0\0\x10\0", "names no memory block"),
        (b"\0\x05\0\x04", "kind 5 and 4 bytes"),
        (b"\0\x02\0\x05", "kind 2 and 5 bytes"),
        (b"\0\x03\xff\xff", "kind 3 and 65535 bytes"),
        (b"\0\x03\0\x11\0\0\0\0\0\0\x10\x01\0\0\x10\0\x04ram0", "at 0x1001"),
        (b"\0\x03\0\x11\0\0\0\0\0\0\x10\0\0\0\0\0\x04ram0", "for 0 bytes"),
        (b"\0\x03\0\x11\xff\xff\xff\xff\xff\xff\xf0\0\0\0\x10\0\x04ram0", "at 0xfffffffffffff000"),
        (b"\0\x03\0\x11\0\0\0\0\0\0\x10\0\0\0\x10\0\x05ram0", "kind 3 and 17 bytes"),
    ];
    for (bytes, expected) in cases {
        let error = read(&[bytes]).expect_err("refused").to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces_give_the_same(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        valid in any::<bool>(),
        chunk in 1usize..40,
    ) {
        if valid {
            bytes = [replies(), bytes].concat();
        }
        let chunks: Vec<&[u8]> = bytes.chunks(chunk).collect();
        prop_assert_eq!(read(&chunks), read(&[&bytes]));
    }

    #[test]
    fn a_damaged_state_never_panics(
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut state = parts().concat();
        for (at, byte) in damage {
            let at = at.index(state.len());
            state[at] = byte;
        }
        let _ = opening(&state, "ram0", RAM_BYTES);
    }
}
