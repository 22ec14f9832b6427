//! What a frame wears between hosts: Geneve (RFC 8926) with one option. Bytes to fields and back, nothing else.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +---+-----------+-+-+-----------+-------------------------------+
//! | 0 | length  5 |O|C|  0        | protocol: 6558, sealed: 88b5  |   Geneve's fixed header
//! +---+-----------+-+-+-----------+---------------+---------------+
//! | virtual network identifier                    | 0             |
//! +-------------------------------+---------------+-----+---------+
//! | class ff44                    | type 81       | 0   | length 4|   our option
//! +-------------------------------+---------------+-----+---------+
//! | 0                             | key                           |
//! +-------------------------------+-------------------------------+
//! | epoch of the sender: the frame's colour                       |
//! +---------------------------------------------------------------+
//! | sequence number, high                                         |
//! | sequence number, low                                          |
//! +---------------------------------------------------------------+
//! | the Ethernet frame; or, sealed, its ciphertext and a tag      |
//! ```
//!
//! All integers are big-endian; lengths count words of 4 bytes. The option is critical, and C says so: who does not know
//! it must drop the packet, for a frame without its colour must not reach a machine. The class is from the range for
//! experiments, and so is the protocol type of what is sealed (IEEE 802 local experimental 1): a dissector shows the headers,
//! and does not take ciphertext for Ethernet.
//!
//! A decoder takes anything: other options that are not critical are skipped, reserved bits are ignored, and everything else
//! that is not as above is an error that says what is wrong. O, a control packet, is an error: there are none.

use crate::Epoch;

/// Length of what [`Header::encode`] makes, in bytes: the fixed header and our option.
pub const HEADER_BYTES: usize = FIXED_BYTES + OPTION_HEADER_BYTES + OPTION_DATA_BYTES;

/// The UDP port that IANA has assigned to Geneve.
pub const UDP_PORT: u16 = 6081;

const FIXED_BYTES: usize = 8;
const OPTION_HEADER_BYTES: usize = 4;
const OPTION_DATA_BYTES: usize = 16;
const WORD: usize = 4;

const CONTROL: u8 = 0x80;
const CRITICAL: u8 = 0x40;
const OPTION_CRITICAL: u8 = 0x80;
const OPTION_LENGTH: u8 = 0x1f;

const PROTOCOL_ETHERNET: u16 = 0x6558;
const PROTOCOL_SEALED: u16 = 0x88b5;
const OPTION_CLASS: u16 = 0xff44;
const OPTION_TYPE: u8 = OPTION_CRITICAL | 1;

/// A virtual network identifier: one network of one environment, the same number on all hosts. 24 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The greatest.
    pub const MAX: Vni = Vni(0xff_ffff);

    /// None beyond 24 bits.
    pub const fn new(number: u32) -> Option<Self> {
        if number <= Self::MAX.0 { Some(Self(number)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Which of a tunnel's keys a packet is sealed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u16);

/// What follows the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Payload {
    /// An Ethernet frame.
    Ethernet,
    /// Ciphertext and tag.
    Sealed,
}

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// The network.
    pub vni: Vni,
    /// What follows.
    pub payload: Payload,
    /// What it is sealed with; 0 if it is not.
    pub key: KeyId,
    /// The frame's colour.
    pub colour: Epoch,
    /// The packet's number in its tunnel and direction: the first is 0, and each is one more than the one before.
    pub sequence: u64,
}

/// Why bytes are not a packet of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeneveError {
    /// It ends within its headers.
    #[error("a packet of {len} bytes ends within its headers, which take {needed} or more")]
    Truncated {
        /// Its length, in bytes.
        len: usize,
        /// What it would need at least, in bytes.
        needed: usize,
    },
    /// There is only version 0.
    #[error("Geneve version {version}")]
    Version {
        /// What it says.
        version: u8,
    },
    /// Control packets mean nothing here.
    #[error("a control packet")]
    Control,
    /// Neither Ethernet nor sealed.
    #[error("protocol type {protocol:#06x}")]
    Protocol {
        /// What it says.
        protocol: u16,
    },
    /// An option is longer than the room that is left for options.
    #[error("the option at byte {at} reaches beyond the end of the options at byte {end}")]
    OptionLength {
        /// Where it begins.
        at: usize,
        /// Where the options end.
        end: usize,
    },
    /// It must not be accepted without understanding this option.
    #[error("a critical option of class {class:#06x} and type {kind:#04x}")]
    UnknownCritical {
        /// The option's class.
        class: u16,
        /// Its type.
        kind: u8,
    },
    /// Our option has another length than ours has.
    #[error("our option has {len} bytes of data, not {OPTION_DATA_BYTES}")]
    OurLength {
        /// What it has.
        len: usize,
    },
    /// Our option is there more than once.
    #[error("our option is there twice")]
    Repeated,
    /// Our option is not there.
    #[error("our option is not there")]
    Missing,
}

impl Header {
    /// The header's bytes.
    #[inline]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let (fixed, option) = bytes.split_at_mut(FIXED_BYTES);
        let protocol = match self.payload {
            Payload::Ethernet => PROTOCOL_ETHERNET,
            Payload::Sealed => PROTOCOL_SEALED,
        };
        fixed[0] = ((OPTION_HEADER_BYTES + OPTION_DATA_BYTES) / WORD) as u8;
        fixed[1] = CRITICAL;
        fixed[2..4].copy_from_slice(&protocol.to_be_bytes());
        fixed[4..8].copy_from_slice(&(self.vni.0 << 8).to_be_bytes());
        option[0..2].copy_from_slice(&OPTION_CLASS.to_be_bytes());
        option[2] = OPTION_TYPE;
        option[3] = (OPTION_DATA_BYTES / WORD) as u8;
        option[6..8].copy_from_slice(&self.key.0.to_be_bytes());
        option[8..12].copy_from_slice(&self.colour.0.to_be_bytes());
        option[12..20].copy_from_slice(&self.sequence.to_be_bytes());
        bytes
    }

    /// The header of a packet, and where what follows begins.
    #[inline]
    pub fn decode(packet: &[u8]) -> Result<(Self, usize), GeneveError> {
        let truncated = |needed| GeneveError::Truncated { len: packet.len(), needed };
        let [first, flags, p, q, a, b, c, _] = *packet.first_chunk().ok_or(truncated(FIXED_BYTES))?;
        if first >> 6 != 0 {
            return Err(GeneveError::Version { version: first >> 6 });
        }
        if flags & CONTROL != 0 {
            return Err(GeneveError::Control);
        }
        let payload = match u16::from_be_bytes([p, q]) {
            PROTOCOL_ETHERNET => Payload::Ethernet,
            PROTOCOL_SEALED => Payload::Sealed,
            protocol => return Err(GeneveError::Protocol { protocol }),
        };
        let end = FIXED_BYTES + usize::from(first & 0x3f) * WORD;
        let options = packet.get(FIXED_BYTES..end).ok_or(truncated(end))?;
        let [_, _, k, l, rest @ ..] = *our_option(options, end)?.ok_or(GeneveError::Missing)?;
        let [e, f, g, h, sequence @ ..] = rest;
        let header = Self {
            vni: Vni(u32::from_be_bytes([0, a, b, c])),
            payload,
            key: KeyId(u16::from_be_bytes([k, l])),
            colour: Epoch(u32::from_be_bytes([e, f, g, h])),
            sequence: u64::from_be_bytes(sequence),
        };
        Ok((header, end))
    }
}

/// The data of our option, if it is there.
#[inline]
fn our_option(options: &[u8], end: usize) -> Result<Option<&[u8; OPTION_DATA_BYTES]>, GeneveError> {
    let mut found = None;
    let mut rest = options;
    while !rest.is_empty() {
        let at = end - rest.len();
        // `rest` is whole words, so an option's header is always there; its data may not be.
        let Some((&[c, d, kind, length], after)) = rest.split_first_chunk() else {
            return Err(GeneveError::OptionLength { at, end });
        };
        let len = usize::from(length & OPTION_LENGTH) * WORD;
        let Some((data, after)) = after.split_at_checked(len) else {
            return Err(GeneveError::OptionLength { at, end });
        };
        let class = u16::from_be_bytes([c, d]);
        if (class, kind) == (OPTION_CLASS, OPTION_TYPE) {
            let data = data.try_into().map_err(|_| GeneveError::OurLength { len })?;
            if found.replace(data).is_some() {
                return Err(GeneveError::Repeated);
            }
        } else if kind & OPTION_CRITICAL != 0 {
            return Err(GeneveError::UnknownCritical { class, kind });
        }
        rest = after;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEALED: Header = Header {
        vni: Vni(0x01_0203),
        payload: Payload::Sealed,
        key: KeyId(0x0a0b),
        colour: Epoch(0xe0e1_e2e3),
        sequence: 0x5051_5253_5455_5657,
    };

    #[rustfmt::skip]
    const BYTES: [u8; HEADER_BYTES] = [
        0x05, 0x40, 0x88, 0xb5, 0x01, 0x02, 0x03, 0x00,
        0xff, 0x44, 0x81, 0x04,
        0x00, 0x00, 0x0a, 0x0b,
        0xe0, 0xe1, 0xe2, 0xe3,
        0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57,
    ];

    #[test]
    fn a_header_is_these_bytes() {
        assert_eq!(SEALED.encode(), BYTES);
        assert_eq!(Header::decode(&BYTES), Ok((SEALED, HEADER_BYTES)));
        let open = Header { payload: Payload::Ethernet, ..SEALED };
        assert_eq!(open.encode()[..4], [0x05, 0x40, 0x65, 0x58]);
        assert_eq!(Header::decode(&open.encode()).unwrap().0, open);
        assert_eq!(Vni::new(0x100_0000), None);
    }

    #[test]
    fn what_is_not_ours_is_told_apart() {
        let with = |at: usize, byte: u8| {
            let mut bytes = BYTES;
            bytes[at] = byte;
            Header::decode(&bytes).map(|(header, _)| header)
        };
        let cases: [(usize, u8, GeneveError); 9] = [
            (0, 0x45, GeneveError::Version { version: 1 }),
            (0, 0x06, GeneveError::Truncated { len: 28, needed: 32 }),
            (0, 0x04, GeneveError::OptionLength { at: 8, end: 24 }),
            (0, 0x00, GeneveError::Missing),
            (1, 0xc0, GeneveError::Control),
            (3, 0xb6, GeneveError::Protocol { protocol: 0x88b6 }),
            (8, 0xfe, GeneveError::UnknownCritical { class: 0xfe44, kind: 0x81 }),
            (10, 0x01, GeneveError::Missing),
            (11, 0x05, GeneveError::OptionLength { at: 8, end: 28 }),
        ];
        for (at, byte, error) in cases {
            assert_eq!(with(at, byte), Err(error), "byte {at} = {byte:#04x}");
        }
        // Reserved bits and the C bit mean nothing to who knows the option.
        for (at, byte) in [(1, 0x3f), (7, 0xff), (11, 0xe4), (12, 0xff)] {
            assert_eq!(with(at, byte), Ok(SEALED), "byte {at} = {byte:#04x}");
        }
        for len in 0..HEADER_BYTES {
            assert!(
                matches!(Header::decode(&BYTES[..len]), Err(GeneveError::Truncated { .. })),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn other_options_may_stand_around_ours_and_ours_only_once() {
        let option = &BYTES[FIXED_BYTES..];
        let harmless: &[u8] = &[0x01, 0x08, 0x7f, 0x01, 9, 9, 9, 9];
        let packet = |options: &[&[u8]]| {
            let options = options.concat();
            let mut packet = BYTES[..FIXED_BYTES].to_vec();
            packet[0] = (options.len() / WORD) as u8;
            packet.extend(options);
            packet
        };
        assert_eq!(Header::decode(&packet(&[harmless, option, harmless])), Ok((SEALED, 44)));
        assert_eq!(Header::decode(&packet(&[option, option])), Err(GeneveError::Repeated));
        assert_eq!(Header::decode(&packet(&[harmless])), Err(GeneveError::Missing));
        let short: &[u8] = &[0xff, 0x44, 0x81, 0x01, 0, 0, 0, 0];
        assert_eq!(Header::decode(&packet(&[short])), Err(GeneveError::OurLength { len: 4 }));
    }
}
