//! Streams built by hand, cut in every way. Streams of a real QEMU are in `tests/live_capture.rs`.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const RAM_BYTES: u64 = 16 * PAGE_SIZE_BYTES as u64;

/// Keeps the latest version of each page, and the residual.
#[derive(Debug, Default, PartialEq, Clone)]
struct Kept {
    pages: BTreeMap<u64, Vec<u8>>,
    residual: Vec<u8>,
}

impl Sink for Kept {
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_SIZE_BYTES]) -> io::Result<()> {
        self.pages.insert(offset, bytes.to_vec());
        Ok(())
    }
    fn zero_page(&mut self, offset: u64) -> io::Result<()> {
        self.pages.insert(offset, vec![0; PAGE_SIZE_BYTES]);
        Ok(())
    }
    fn residual(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.residual.extend_from_slice(bytes);
        Ok(())
    }
}

fn named(word: u64, name: &str) -> Vec<u8> {
    let mut bytes = word.to_be_bytes().to_vec();
    bytes.push(name.len() as u8);
    bytes.extend_from_slice(name.as_bytes());
    bytes
}

/// A stream in pieces; the flag says whether the piece belongs to the residual.
fn pieces() -> Vec<(bool, Vec<u8>)> {
    let page = |fill: u8| vec![fill; PAGE_SIZE_BYTES];
    let join = |parts: &[&[u8]]| parts.concat();
    let footer = b"\x7e\0\0\0\x02".to_vec();
    let mut list = join(&[&(RAM_BYTES + 0x2000 + FLAG_MEM_SIZE).to_be_bytes()]);
    for (name, size) in [("ram0", RAM_BYTES), ("bios", 0x2000)] {
        list.push(4);
        list.extend_from_slice(name.as_bytes());
        list.extend_from_slice(&size.to_be_bytes());
    }
    let json = br#"{"page_size": 4096, "devices": []}"#;
    vec![
        (true, join(&[b"QEVM\0\0\0\x03", b"\x07\0\0\0\x06pc-q35"])),
        (true, join(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", &list, &FLAG_EOS.to_be_bytes(), &footer])),
        (true, b"\x02\0\0\0\x02".to_vec()),
        (false, join(&[&named(FLAG_PAGE, "ram0"), &page(1)])),
        (false, join(&[&(0x1000 | FLAG_ZERO | FLAG_CONTINUE).to_be_bytes(), &[0]])),
        (true, join(&[&named(0x1000 | FLAG_PAGE, "bios"), &page(7)])),
        (true, join(&[&(FLAG_ZERO | FLAG_CONTINUE).to_be_bytes(), &[0]])),
        (false, join(&[&named(0x1000 | FLAG_PAGE, "ram0"), &page(2)])),
        (true, join(&[&FLAG_EOS.to_be_bytes(), &footer])),
        (true, b"\x03\0\0\0\x02".to_vec()),
        // A page and its later versions, across sections; the block goes on from the section before.
        (false, join(&[&((RAM_BYTES - 0x1000) | FLAG_PAGE | FLAG_CONTINUE).to_be_bytes(), &page(3)])),
        (false, join(&[&(FLAG_ZERO | FLAG_CONTINUE).to_be_bytes(), &[0]])),
        (false, join(&[&(0x2000 | FLAG_ZERO | FLAG_CONTINUE).to_be_bytes(), &[9]])),
        (true, join(&[&FLAG_EOS.to_be_bytes(), &footer])),
        // Device state that tries to look like the end, then the end.
        (
            true,
            b"\x04\0\0\0\x09\x03dev\0\0\0\0\0\0\0\x01\x00\x06\0\0\0\x02{\"page_size\x7e\0\0\0\x09".to_vec(),
        ),
        (true, join(&[b"\0\x06", &(json.len() as u32).to_be_bytes(), json])),
    ]
}

fn stream() -> Vec<u8> {
    pieces().into_iter().flat_map(|(_, bytes)| bytes).collect()
}

fn split(chunks: &[&[u8]]) -> Result<(Kept, Summary), StreamError> {
    let mut kept = Kept::default();
    let mut splitter = Splitter::new("ram0", RAM_BYTES);
    for chunk in chunks {
        splitter.feed(chunk, &mut kept)?;
        assert!(splitter.carry.len() < MAX_ITEM_BYTES);
    }
    splitter.finish().map(|summary| (kept, summary))
}

#[test]
fn pages_and_residual_part() {
    let stream = stream();
    let (kept, summary) = split(&[&stream]).expect("valid");
    let residual: Vec<u8> =
        pieces().into_iter().filter(|(keep, _)| *keep).flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(kept.residual, residual);
    let fills: Vec<(u64, u8)> = kept.pages.iter().map(|(&offset, page)| (offset, page[0])).collect();
    assert_eq!(fills, [(0, 0), (0x1000, 2), (0x2000, 9), (RAM_BYTES - 0x1000, 3)]);
    assert!(kept.pages.values().all(|page| page.iter().all(|&byte| byte == page[0])));
    let expected = Summary {
        pages: 4,
        zero_pages: 2,
        residual_bytes: residual.len() as u64,
        stream_bytes: stream.len() as u64,
    };
    assert_eq!(summary, expected);
}

#[test]
fn the_residual_is_a_stream_of_its_own() {
    let (kept, summary) = split(&[&stream()]).expect("valid");
    let (again, second) = split(&[&kept.residual]).expect("the residual splits");
    assert_eq!(again.residual, kept.residual);
    assert_eq!((second.pages, second.zero_pages, second.stream_bytes), (0, 0, summary.residual_bytes));
}

#[test]
fn every_truncation_is_noticed() {
    let stream = stream();
    for length in 0..stream.len() {
        let error = split(&[&stream[..length]]).expect_err("truncated");
        assert!(
            matches!(error, StreamError::Truncated { stream_bytes, .. } if stream_bytes == length as u64),
            "{length}: {error}"
        );
    }
}

#[test]
fn the_end_as_a_newer_qemu_writes_it() {
    let mut stream = stream();
    let at = stream.windows(2).rposition(|window| window == b"{\"").expect("the description");
    stream.truncate(at - 4);
    let json = br#"{"configuration": {}, "page_size": 4096, "devices": []}"#;
    stream.extend_from_slice(&(json.len() as u32).to_be_bytes());
    stream.extend_from_slice(json);
    split(&[&stream]).map(|_| ()).expect("whole");
    stream.pop();
    assert!(matches!(split(&[&stream]), Err(StreamError::Truncated { within: "device state", .. })));
}

#[test]
fn bytes_after_the_end_are_noticed() {
    let mut stream = stream();
    stream.push(0);
    assert!(matches!(split(&[&stream]), Err(StreamError::Truncated { within: "device state", .. })));
}

#[test]
fn byte_by_byte_gives_the_same() {
    let stream = stream();
    let chunks: Vec<&[u8]> = stream.chunks(1).collect();
    assert_eq!(split(&chunks).expect("valid"), split(&[&stream]).expect("valid"));
}

/// Replaces the piece at `index` and returns the error's text.
fn error_with(index: usize, bytes: &[u8]) -> String {
    let mut pieces = pieces();
    pieces[index].1 = bytes.to_vec();
    let stream: Vec<u8> = pieces.into_iter().flat_map(|(_, bytes)| bytes).collect();
    split(&[&stream]).expect_err("must be refused").to_string()
}

#[test]
fn what_is_not_understood_is_named() {
    let cases: [(usize, Vec<u8>, &str); 14] = [
        (0, b"QEVX\0\0\0\x03".to_vec(), "starts with 0x51455658"),
        (0, b"QEVM\0\0\0\x04".to_vec(), "version 4 is not supported"),
        (0, b"QEVM\0\0\0\x03\x01".to_vec(), "expected the configuration section at byte 8"),
        (0, b"QEVM\0\0\0\x03\x07\xff\0\0\0".to_vec(), "a name of 4278190080 bytes"),
        (0, b"QEVM\0\0\0\x03\x07\0\0\0\x01q\x05".to_vec(), "subsection at byte 14"),
        (1, b"\x01\0\0\0\x02\x05block\0\0\0\0\0\0\0\x01".to_vec(), "live section \"block\""),
        (1, b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x05".to_vec(), "version 5 of the ram section"),
        (2, b"\x02\0\0\0\x03".to_vec(), "section 3 at byte"),
        (2, b"\x08\0\x07\0\x04".to_vec(), "migration command 7 of 4 bytes"),
        (2, b"\x55".to_vec(), "section type 0x55"),
        (3, named(0x100 | 0x1000, "ram0"), "flags 0x100 at byte"),
        (3, (0x1000 | 0x200u64).to_be_bytes().to_vec(), "flags 0x200 at byte"),
        (3, [&(RAM_BYTES | FLAG_ZERO).to_be_bytes()[..], b"\x04ram0\0"].concat(), "lies outside main memory"),
        (8, [&FLAG_EOS.to_be_bytes()[..], b"\x7e\0\0\0\x03"].concat(), "footer of section 2"),
    ];
    for (index, bytes, expected) in cases {
        let text = error_with(index, &bytes);
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    }
}

#[test]
fn a_block_list_that_does_not_fit_is_refused() {
    let start = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";
    let list = |total: u64, blocks: &[(&str, u64)]| {
        let mut bytes = start.to_vec();
        bytes.extend_from_slice(&(total | FLAG_MEM_SIZE).to_be_bytes());
        for (name, size) in blocks {
            bytes.push(name.len() as u8);
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(&size.to_be_bytes());
        }
        bytes
    };
    let cases = [
        (list(RAM_BYTES, &[("ram0", RAM_BYTES + 0x1000)]), "does not add up"),
        (list(0x3000, &[("ram0", 0x3000)]), "has 12288 bytes, expected 65536"),
        (list(0x3000, &[("pc.ram", 0x3000)]), "no memory block \"ram0\""),
        (list(0x3000, &vec![("x", 0); 1100]), "more than 1024"),
    ];
    for (bytes, expected) in cases {
        let text = error_with(1, &bytes);
        assert!(text.contains(expected), "{text:?} lacks {expected:?}");
    }
}

#[test]
fn after_an_error_nothing_is_taken() {
    let mut splitter = Splitter::new("ram0", RAM_BYTES);
    let mut kept = Kept::default();
    assert!(splitter.feed(b"nope", &mut kept).is_err());
    assert!(matches!(splitter.feed(&stream(), &mut kept), Err(StreamError::AlreadyFailed)));
    assert!(matches!(splitter.finish(), Err(StreamError::AlreadyFailed)));
    assert_eq!(kept, Kept::default());
}

mod fuzz {
    use super::*;
    use crate::mangle::{config, mangled, mangles};

    /// However it comes in pieces, the same comes of it.
    #[test]
    fn mangled_streams() {
        proptest!(config(500), |(how in mangles(), piece in 1..6000_usize)| {
            let stream = mangled(&stream(), &how);
            let whole = split(&[&stream]).map_err(|error| error.to_string());
            let pieces: Vec<&[u8]> = stream.chunks(piece).collect();
            let parts = split(&pieces).map_err(|error| error.to_string());
            if let Ok((kept, summary)) = &whole {
                prop_assert_eq!(summary.stream_bytes, stream.len() as u64);
                let is_page = |offset: &u64| *offset < RAM_BYTES && offset.is_multiple_of(PAGE_SIZE_BYTES as u64);
                prop_assert!(kept.pages.keys().all(is_page));
                prop_assert!(kept.residual.len() <= stream.len());
            }
            prop_assert_eq!(whole, parts);
        });
    }
}

proptest! {
    #[test]
    fn chunking_does_not_matter(mut cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..40)) {
        let stream = stream();
        let mut cuts: Vec<usize> = cuts.drain(..).map(|cut| cut.index(stream.len())).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
        prop_assert_eq!(split(&chunks).expect("valid"), split(&[&stream]).expect("valid"));
    }

    #[test]
    fn damage_never_panics_and_chunking_still_does_not_matter(
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        chunk in 1usize..6000,
    ) {
        let mut stream = stream();
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let chunks: Vec<&[u8]> = stream.chunks(chunk).collect();
        let whole = split(&[&stream]);
        let parts = split(&chunks);
        match (whole, parts) {
            (Ok(whole), Ok(parts)) => prop_assert_eq!(whole, parts),
            (Err(whole), Err(parts)) => prop_assert_eq!(whole.to_string(), parts.to_string()),
            (whole, parts) => prop_assert!(false, "whole: {:?}, in parts: {:?}", whole.is_ok(), parts.is_ok()),
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), prefix in 0usize..9000) {
        let mut input = stream();
        input.truncate(prefix);
        input.extend(bytes);
        let _ = split(&[&input]);
    }
}
