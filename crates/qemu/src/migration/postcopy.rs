//! The source's half of a postcopy migration, for a machine whose pages are somewhere else than in a QEMU.
//!
//! A QEMU that was started with `-incoming defer` and has the capability `postcopy-ram` takes the devices' state first,
//! runs, and asks for pages as its guest touches them:
//!
//! ```text
//! to QEMU    header configuration OPEN_RETURN_PATH ADVISE
//!            pages of other memory blocks (vga, firmware, ACPI tables)
//!            DISCARD
//!            PACKAGED { LISTEN devices PING(READY) RUN }
//!            { PART "ram": { page | zero page } }               until every page that is not zero was sent
//!            END "ram", end mark
//! from QEMU  { PONG(value) | REQUEST(block, offset, length) | SHUT(status) | ... }
//! ```
//!
//! [`opening`] makes the first four lines of a residual stream (see [`super`]), [`Pages`] the fifth, [`closing`] the
//! last; [`ReplyReader`] reads what comes back. All of it is pure: bytes in, bytes out.
//!
//! Pages that are zero need not be sent unless they are asked for: when the load has ended, QEMU stops watching its
//! memory, and what was never placed is zero as fresh memory is.
//!
//! The format is the same from QEMU 7.2 to 10.0.

use super::splitter::{PAGE_SIZE_BYTES, Sink, Splitter, StreamError};
use std::io;

/// The value of the ping whose answer means that the devices are loaded, and the machine is about to stand ready.
pub const READY: u32 = 3;

/// The most bytes of pages that one request may be for; QEMU asks for one page (of the host) at a time.
pub const MAX_REQUEST_BYTES: u32 = 2 << 20;

const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SECTION_COMMAND: u8 = 0x08;
const SECTION_FOOTER: u8 = 0x7e;
const END_MARK: u8 = 0x00;

const COMMAND_OPEN_RETURN_PATH: u16 = 1;
const COMMAND_PING: u16 = 2;
const COMMAND_ADVISE: u16 = 3;
const COMMAND_LISTEN: u16 = 4;
const COMMAND_RUN: u16 = 5;
const COMMAND_DISCARD: u16 = 6;
const COMMAND_PACKAGED: u16 = 7;

const FLAG_ZERO: u64 = 0x02;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;

const REPLY_SHUT: u16 = 1;
const REPLY_PONG: u16 = 2;
const REPLY_REQUEST_NAMED: u16 = 3;
const REPLY_REQUEST: u16 = 4;

/// The longest reply: a request that names its block.
const MAX_REPLY_BYTES: usize = 4 + 8 + 4 + 1 + 255;

/// What is sent until the machine stands ready, and what has to be known for the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// To be sent first.
    pub bytes: Vec<u8>,
    /// The number of the section of memory.
    pub ram_section: u32,
}

/// Nothing of main memory may be in a residual stream.
struct NoPages;

impl Sink for NoPages {
    fn page(&mut self, _: u64, _: &[u8; PAGE_SIZE_BYTES]) -> io::Result<()> {
        Err(io::ErrorKind::InvalidData.into())
    }

    fn zero_page(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::InvalidData.into())
    }

    fn residual(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Makes the beginning of a postcopy stream from a machine's device state (a residual stream).
pub fn opening(state: &[u8], main_block: &str, main_size_bytes: u64) -> Result<Opening, StreamError> {
    let mut splitter = Splitter::new(main_block, main_size_bytes);
    splitter.feed(state, &mut NoPages)?;
    let layout = splitter.layout();
    splitter.finish()?;
    let at = |position: u64| usize::try_from(position).unwrap_or(usize::MAX).min(state.len());
    let (configuration, rest) = state.split_at(at(layout.configuration_end));
    let (memory, devices) = rest.split_at(at(layout.devices) - configuration.len());
    let devices = &devices[..at(layout.end_mark).saturating_sub(at(layout.devices))];

    let mut package = Vec::with_capacity(devices.len() + 64);
    command(&mut package, COMMAND_LISTEN, &[]);
    package.extend_from_slice(devices);
    command(&mut package, COMMAND_PING, &READY.to_be_bytes());
    command(&mut package, COMMAND_RUN, &[]);

    let mut bytes = Vec::with_capacity(state.len() + 128);
    bytes.extend_from_slice(configuration);
    command(&mut bytes, COMMAND_OPEN_RETURN_PATH, &[]);
    // The sizes of all blocks' pages, or-ed, and the target's page.
    let page = (PAGE_SIZE_BYTES as u64).to_be_bytes();
    command(&mut bytes, COMMAND_ADVISE, &[page, page].concat());
    bytes.extend_from_slice(memory);
    // Nothing is there to be discarded. But a QEMU that has not discarded anything before it listens takes itself for not
    // listening, writes pages over its guest's memory, and waits for itself.
    let name = main_block.as_bytes();
    let discard =
        [&[0, name.len() as u8][..], name, &[0], &0u64.to_be_bytes(), &main_size_bytes.to_be_bytes()];
    command(&mut bytes, COMMAND_DISCARD, &discard.concat());
    let length = u32::try_from(package.len()).unwrap_or(u32::MAX);
    command(&mut bytes, COMMAND_PACKAGED, &length.to_be_bytes());
    bytes.extend_from_slice(&package);
    Ok(Opening { bytes, ram_section: layout.ram_section })
}

/// What ends the stream, when every page was sent.
pub fn closing(ram_section: u32) -> Vec<u8> {
    let mut bytes = section(SECTION_END, ram_section);
    end_section(&mut bytes, ram_section);
    bytes.push(END_MARK);
    bytes
}

fn command(to: &mut Vec<u8>, command: u16, payload: &[u8]) {
    to.push(SECTION_COMMAND);
    to.extend_from_slice(&command.to_be_bytes());
    to.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    to.extend_from_slice(payload);
}

fn section(kind: u8, ram_section: u32) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&ram_section.to_be_bytes());
    bytes
}

fn end_section(to: &mut Vec<u8>, ram_section: u32) {
    to.extend_from_slice(&FLAG_EOS.to_be_bytes());
    to.push(SECTION_FOOTER);
    to.extend_from_slice(&ram_section.to_be_bytes());
}

/// One section of pages, in the making.
#[derive(Debug)]
pub struct Pages {
    ram_section: u32,
    bytes: Vec<u8>,
    /// The block of the latest page.
    block: String,
    pages: usize,
}

impl Pages {
    /// A section without pages.
    pub fn new(ram_section: u32) -> Pages {
        Pages { ram_section, bytes: section(SECTION_PART, ram_section), block: String::new(), pages: 0 }
    }

    /// Adds a page of a block, at a multiple of the page's size.
    pub fn page(&mut self, block: &str, offset: u64, page: &[u8; PAGE_SIZE_BYTES]) {
        self.entry(block, offset, FLAG_PAGE);
        self.bytes.extend_from_slice(page);
    }

    /// Adds a page of zeros.
    pub fn zero(&mut self, block: &str, offset: u64) {
        self.entry(block, offset, FLAG_ZERO);
        self.bytes.push(0);
    }

    /// How many pages it has.
    pub fn count(&self) -> usize {
        self.pages
    }

    /// The section, to be sent.
    pub fn finish(mut self) -> Vec<u8> {
        end_section(&mut self.bytes, self.ram_section);
        self.bytes
    }

    fn entry(&mut self, block: &str, offset: u64, flags: u64) {
        debug_assert!(offset.is_multiple_of(PAGE_SIZE_BYTES as u64), "{offset:#x}");
        self.pages += 1;
        if self.block == block {
            self.bytes.extend_from_slice(&(offset | flags | FLAG_CONTINUE).to_be_bytes());
            return;
        }
        self.bytes.extend_from_slice(&(offset | flags).to_be_bytes());
        // Names of blocks come from a stream that has a byte for their length.
        self.bytes.push(block.len() as u8);
        self.bytes.extend_from_slice(block.as_bytes());
        block.clone_into(&mut self.block);
    }
}

/// What QEMU says on the return path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It has ended the load, with 0 when all is well.
    Shut {
        /// The status.
        status: u32,
    },
    /// The answer to a ping.
    Pong {
        /// The ping's value.
        value: u32,
    },
    /// Somebody waits for this memory.
    Request {
        /// Which block.
        block: String,
        /// Where in it, a multiple of the page's size.
        offset: u64,
        /// How much, a positive multiple of the page's size.
        bytes: u32,
    },
}

/// Why the return path cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// A kind of reply that does not come without capabilities that are off.
    #[error("reply of kind {kind} and {length_bytes} bytes on the return path is not supported")]
    Unknown {
        /// The kind.
        kind: u16,
        /// The announced length.
        length_bytes: u16,
    },
    /// A request for memory that cannot be a request.
    #[error("a request for {bytes} bytes of memory at {offset:#x} on the return path")]
    BadRequest {
        /// Where.
        offset: u64,
        /// How much.
        bytes: u32,
    },
    /// A request in the block of the one before, and there is none.
    #[error("a request on the return path names no memory block")]
    NoBlock,
}

/// Reads replies. Memory is bounded by one reply and what was fed.
#[derive(Debug, Default)]
pub struct ReplyReader {
    carry: Vec<u8>,
    at: usize,
    block: Option<String>,
}

impl ReplyReader {
    /// Takes bytes that came.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.carry.drain(..self.at);
        self.at = 0;
        self.carry.extend_from_slice(bytes);
    }

    /// The next reply, when it is whole. After an error the path is of no use any more.
    pub fn next_reply(&mut self) -> Result<Option<Reply>, ReplyError> {
        let left = &self.carry[self.at..];
        let Some((&head, rest)) = left.split_first_chunk::<4>() else { return Ok(None) };
        let [kind_high, kind_low, length_high, length_low] = head;
        let kind = u16::from_be_bytes([kind_high, kind_low]);
        let length_bytes = u16::from_be_bytes([length_high, length_low]);
        let length = usize::from(length_bytes);
        let known = match kind {
            REPLY_SHUT | REPLY_PONG => length == 4,
            REPLY_REQUEST => length == 12,
            REPLY_REQUEST_NAMED => (13..=MAX_REPLY_BYTES - 4).contains(&length),
            _ => false,
        };
        if !known {
            return Err(ReplyError::Unknown { kind, length_bytes });
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let reply = match kind {
            REPLY_SHUT => Reply::Shut { status: be32(payload) },
            REPLY_PONG => Reply::Pong { value: be32(payload) },
            _ => {
                let (offset, length_of) = payload.split_at(8);
                let offset = offset.iter().fold(0, |offset, byte| offset << 8 | u64::from(*byte));
                let bytes = be32(length_of);
                let page = PAGE_SIZE_BYTES as u32;
                if bytes == 0
                    || !bytes.is_multiple_of(page)
                    || bytes > MAX_REQUEST_BYTES
                    || !offset.is_multiple_of(page.into())
                    || offset.checked_add(bytes.into()).is_none()
                {
                    return Err(ReplyError::BadRequest { offset, bytes });
                }
                if let Some((&name_bytes, name)) = payload[12..].split_first() {
                    if name.len() != usize::from(name_bytes) {
                        return Err(ReplyError::Unknown { kind, length_bytes });
                    }
                    self.block = Some(String::from_utf8_lossy(name).into_owned());
                }
                let block = self.block.clone().ok_or(ReplyError::NoBlock)?;
                Reply::Request { block, offset, bytes }
            }
        };
        self.at += 4 + length;
        Ok(Some(reply))
    }
}

/// The first four bytes, which the caller has counted.
fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |value, byte| value << 8 | u32::from(*byte))
}

#[cfg(test)]
#[path = "postcopy_tests.rs"]
mod tests;
