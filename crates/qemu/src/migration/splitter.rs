//! The stream's parser: no input or output, memory bounded by one item.
//!
//! States: `Header` -> `Configuration` -> `Section` -> (`BlockList` ->) `Ram` -> `Footer` -> `Section` ... -> `Devices`,
//! which lasts until the end. Invariants: bytes are consumed one whole item at a time, and an item that is not yet
//! complete waits in `carry`, which never exceeds [`MAX_ITEM_BYTES`]; every consumed byte goes to exactly one of
//! page, zero page or residual; after an error nothing more is consumed.

use std::io;

/// The page size of an x86 guest.
pub const PAGE_SIZE_BYTES: usize = 4096;

/// The largest item: an entry that names its block (8 + 1 + 255) and carries a page.
const MAX_ITEM_BYTES: usize = 8 + 256 + PAGE_SIZE_BYTES;

/// The most memory blocks in one machine. A machine here has about ten.
const MAX_BLOCKS: u32 = 1024;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const RAM_SECTION_VERSION: u32 = 4;
const MAX_NAME_BYTES: u32 = 255;

const SECTION_EOF: u8 = 0x00;
const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SECTION_FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const SECTION_CONFIGURATION: u8 = 0x07;
const SECTION_COMMAND: u8 = 0x08;
const SECTION_FOOTER: u8 = 0x7e;

/// Sent by QEMU from 10.0 on when the machine has stopped; without payload, and of no meaning to RAM.
const COMMAND_SWITCHOVER_START: u16 = 11;

const FLAG_MASK: u64 = PAGE_SIZE_BYTES as u64 - 1;
const FLAG_ZERO: u64 = 0x02;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;

/// Where the parts of a stream go.
pub trait Sink {
    /// A page of main memory at byte `offset`, a multiple of [`PAGE_SIZE_BYTES`] below the block's size.
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_SIZE_BYTES]) -> io::Result<()>;
    /// A page of main memory that holds only zeros, whatever it held before.
    fn zero_page(&mut self, offset: u64) -> io::Result<()>;
    /// The next bytes of the residual stream.
    fn residual(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// What a complete stream held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Pages of main memory with content, repeats included.
    pub pages: u64,
    /// Pages of main memory that were zero, repeats included.
    pub zero_pages: u64,
    /// Length of the residual stream.
    pub residual_bytes: u64,
    /// Length of the whole stream.
    pub stream_bytes: u64,
}

/// Why a stream cannot be split. Positions are byte offsets from the stream's start.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The first four bytes are not a migration stream's.
    #[error("not a migration stream: it starts with {found:#010x}")]
    BadMagic {
        /// The first four bytes.
        found: u32,
    },
    /// Another stream version than the one known.
    #[error("migration stream version {found} is not supported, only {VERSION}")]
    UnsupportedVersion {
        /// The stream's version.
        found: u32,
    },
    /// The stream has no configuration section where it must stand.
    #[error("expected the configuration section at byte {position}, found section type {found:#04x}")]
    NoConfiguration {
        /// Where.
        position: u64,
        /// The section type found there.
        found: u8,
    },
    /// The configuration carries a subsection, which means that a capability changes the stream's format.
    #[error(
        "the stream's configuration has a subsection at byte {position}: a migration capability that changes the format is on"
    )]
    UnsupportedConfiguration {
        /// Where.
        position: u64,
    },
    /// A name is longer than any that QEMU writes.
    #[error("a name of {length_bytes} bytes at byte {position} exceeds {MAX_NAME_BYTES}")]
    NameTooLong {
        /// Where.
        position: u64,
        /// The announced length.
        length_bytes: u32,
    },
    /// A device other than RAM sends live state; its format is not known.
    #[error("live section {name:?} at byte {position} is not supported, only \"ram\"")]
    UnsupportedLiveSection {
        /// Where.
        position: u64,
        /// The section's name.
        name: String,
    },
    /// The RAM section has another version than the one known.
    #[error("version {found} of the ram section is not supported, only {RAM_SECTION_VERSION}")]
    UnsupportedRamVersion {
        /// The section's version.
        found: u32,
    },
    /// A section continues one that was never started.
    #[error("section {section_id} at byte {position} continues a section that was not started")]
    UnknownSectionId {
        /// Where.
        position: u64,
        /// The section's number.
        section_id: u32,
    },
    /// A section type that no known QEMU writes at this place.
    #[error("unknown section type {found:#04x} at byte {position}")]
    UnknownSectionType {
        /// Where.
        position: u64,
        /// The type.
        found: u8,
    },
    /// A migration command that only appears with capabilities that must be off (post-copy, return path, COLO).
    #[error("migration command {command} of {length_bytes} bytes at byte {position} is not supported")]
    UnsupportedCommand {
        /// Where.
        position: u64,
        /// The command's number.
        command: u16,
        /// Its payload's length.
        length_bytes: u16,
    },
    /// A RAM entry with flags that are not known (compression, XBZRLE, multifd, RDMA or newer).
    #[error("RAM entry flags {flags:#x} at byte {position} are not supported")]
    UnsupportedRamFlags {
        /// Where.
        position: u64,
        /// The flags.
        flags: u64,
    },
    /// A RAM entry continues a block, and none was named before it.
    #[error("the RAM entry at byte {position} continues a block, but none was named")]
    NoCurrentBlock {
        /// Where.
        position: u64,
    },
    /// A RAM entry lies outside its block.
    #[error("page at offset {offset} at byte {position} lies outside main memory of {size_bytes} bytes")]
    PageOutsideBlock {
        /// Where.
        position: u64,
        /// The page's offset in its block.
        offset: u64,
        /// The block's size.
        size_bytes: u64,
    },
    /// The list of blocks does not add up to the announced total.
    #[error(
        "the block list at byte {position} does not add up: block {name:?} has {length_bytes} bytes where {left_bytes} are left"
    )]
    BlockListOverrun {
        /// Where.
        position: u64,
        /// The block.
        name: String,
        /// Its size.
        length_bytes: u64,
        /// What was left of the total.
        left_bytes: u64,
    },
    /// More blocks than any machine has.
    #[error("more than {MAX_BLOCKS} memory blocks")]
    TooManyBlocks,
    /// The main memory block has another size than the machine's configuration says.
    #[error("memory block {name:?} has {found_bytes} bytes, expected {expected_bytes}")]
    RamSizeMismatch {
        /// The block.
        name: String,
        /// Its size in the stream.
        found_bytes: u64,
        /// The size the caller gave.
        expected_bytes: u64,
    },
    /// The list of blocks lacks the main memory block.
    #[error("the stream has no memory block {name:?}")]
    NoMainBlock {
        /// The name that was looked for.
        name: String,
    },
    /// A section does not end where it should.
    #[error("expected the footer of section {section_id} at byte {position}")]
    BadFooter {
        /// Where.
        position: u64,
        /// The section's number.
        section_id: u32,
    },
    /// The stream ended before its end.
    #[error("the migration stream ends after {stream_bytes} bytes, before its end ({within})")]
    Truncated {
        /// The length received.
        stream_bytes: u64,
        /// The part that was being read.
        within: &'static str,
    },
    /// The splitter was fed again after an error.
    #[error("the migration stream had failed before")]
    AlreadyFailed,
    /// The sink failed.
    #[error("cannot store the migration stream: {0}")]
    Sink(#[from] io::Error),
}

/// Splits one stream. Feed it all bytes in order, then call [`Splitter::finish`].
#[derive(Debug)]
pub struct Splitter {
    main_block: String,
    main_size_bytes: u64,
    state: State,
    /// The beginning of an item whose rest has not arrived.
    carry: Vec<u8>,
    /// Bytes consumed, `carry` not included.
    position: u64,
    ram_section: Option<u32>,
    main_seen: bool,
    block: Block,
    trailer: Trailer,
    layout: Layout,
    summary: Summary,
    failed: bool,
}

/// Where the parts of a stream are, as far as it has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Layout {
    /// Where the header and the configuration end.
    pub(super) configuration_end: u64,
    /// Where the devices' sections begin.
    pub(super) devices: u64,
    /// Where the mark is that ends them.
    pub(super) end_mark: u64,
    /// The number of the section of memory.
    pub(super) ram_section: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Configuration,
    /// Between sections; `first` directly after the configuration, where subsections may stand.
    Section {
        first: bool,
    },
    BlockList {
        left_bytes: u64,
        blocks: u32,
    },
    Ram,
    Footer,
    Devices,
}

/// The block of the latest RAM entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    None,
    Main,
    Other,
}

/// What one attempt to parse an item gave.
enum Step {
    /// The item took this many bytes.
    Consumed(usize),
    /// The item has at least this many bytes, more than there are.
    Need(usize),
}

impl Splitter {
    /// A splitter for a machine whose main memory is block `main_block` (the backend's id) of `main_size_bytes`.
    pub fn new(main_block: &str, main_size_bytes: u64) -> Splitter {
        Splitter {
            main_block: main_block.to_owned(),
            main_size_bytes,
            state: State::Header,
            carry: Vec::with_capacity(MAX_ITEM_BYTES),
            position: 0,
            ram_section: None,
            main_seen: false,
            block: Block::None,
            trailer: Trailer::default(),
            layout: Layout::default(),
            summary: Summary::default(),
            failed: false,
        }
    }

    /// Where the parts of a stream are; to be asked before [`Splitter::finish`], and to be believed after it.
    pub(super) fn layout(&self) -> Layout {
        Layout { end_mark: self.trailer.end_mark, ..self.layout }
    }

    /// Consumes the next bytes of the stream. Pages that lie whole in `chunk` reach the sink without being copied, so
    /// chunks of 64 KiB and more are best.
    pub fn feed(&mut self, chunk: &[u8], sink: &mut impl Sink) -> Result<(), StreamError> {
        if self.failed {
            return Err(StreamError::AlreadyFailed);
        }
        let result = self.consume(chunk, sink);
        self.failed = result.is_err();
        result
    }

    /// Bytes of the stream taken so far.
    pub fn stream_bytes(&self) -> u64 {
        self.position + self.carry.len() as u64
    }

    /// Pages of main memory so far, zero or not, repeats included.
    pub fn pages_seen(&self) -> u64 {
        self.summary.pages + self.summary.zero_pages
    }

    /// Whether the stream has reached device state: all of RAM has passed.
    pub fn ram_complete(&self) -> bool {
        self.state == State::Devices
    }

    /// Says what the stream held, if it was whole.
    pub fn finish(self) -> Result<Summary, StreamError> {
        if self.failed {
            return Err(StreamError::AlreadyFailed);
        }
        let stream_bytes = self.stream_bytes();
        let within = match self.state {
            State::Header => "header",
            State::Configuration => "configuration",
            State::Section { .. } => "between sections",
            State::BlockList { .. } => "list of memory blocks",
            State::Ram => "memory",
            State::Footer => "section footer",
            State::Devices if self.ram_section.is_none() => {
                return Err(StreamError::NoMainBlock { name: self.main_block });
            }
            State::Devices if self.trailer.ends_at == Some(stream_bytes) => {
                return Ok(Summary { stream_bytes, ..self.summary });
            }
            State::Devices => "device state",
        };
        Err(StreamError::Truncated { stream_bytes, within })
    }

    fn consume(&mut self, mut chunk: &[u8], sink: &mut impl Sink) -> Result<(), StreamError> {
        while !chunk.is_empty() {
            if self.state == State::Devices && self.carry.is_empty() {
                self.trailer.scan(self.position, chunk);
                return self.residual(chunk, sink).map(|()| self.position += chunk.len() as u64);
            }
            if self.carry.is_empty() {
                match self.step(chunk, sink)? {
                    Step::Consumed(length) => {
                        self.position += length as u64;
                        chunk = &chunk[length..];
                    }
                    Step::Need(_) => {
                        debug_assert!(chunk.len() < MAX_ITEM_BYTES);
                        self.carry.extend_from_slice(chunk);
                        return Ok(());
                    }
                }
            } else {
                chunk = self.consume_carried(chunk, sink)?;
            }
        }
        Ok(())
    }

    /// Completes the item in `carry` with the first bytes of `chunk`; returns the rest.
    fn consume_carried<'a>(
        &mut self,
        mut chunk: &'a [u8],
        sink: &mut impl Sink,
    ) -> Result<&'a [u8], StreamError> {
        let mut carry = std::mem::take(&mut self.carry);
        loop {
            match self.step(&carry, sink)? {
                Step::Consumed(length) => {
                    // What was carried is exactly one item: it was topped up to what the item asked for, no further.
                    debug_assert_eq!(length, carry.len());
                    self.position += length as u64;
                    carry.clear();
                    self.carry = carry;
                    return Ok(chunk);
                }
                Step::Need(length) => {
                    let take = (length - carry.len()).min(chunk.len());
                    if take == 0 {
                        self.carry = carry;
                        return Ok(chunk);
                    }
                    carry.extend_from_slice(&chunk[..take]);
                    chunk = &chunk[take..];
                }
            }
        }
    }

    /// Parses one item at the start of `bytes`. Changes nothing when it needs more.
    fn step(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<Step, StreamError> {
        match self.state {
            State::Header => self.header(bytes, sink),
            State::Configuration => self.configuration(bytes, sink),
            State::Section { first } => self.section(bytes, first, sink),
            State::BlockList { left_bytes, blocks } => self.block_list(bytes, left_bytes, blocks, sink),
            State::Ram => self.ram_entry(bytes, sink),
            State::Footer => self.footer(bytes, sink),
            // Reached from a carried item only, and `consume` takes over from there.
            State::Devices => Ok(Step::Consumed(0)),
        }
    }

    fn header(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<Step, StreamError> {
        let Some(magic) = be32(bytes, 0) else { return Ok(Step::Need(4)) };
        if magic != MAGIC {
            return Err(StreamError::BadMagic { found: magic });
        }
        let Some(version) = be32(bytes, 4) else { return Ok(Step::Need(8)) };
        if version != VERSION {
            return Err(StreamError::UnsupportedVersion { found: version });
        }
        self.keep(bytes, 8, State::Configuration, sink)
    }

    fn configuration(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<Step, StreamError> {
        let Some(&kind) = bytes.first() else { return Ok(Step::Need(1)) };
        if kind != SECTION_CONFIGURATION {
            return Err(StreamError::NoConfiguration { position: self.position, found: kind });
        }
        let Some(length_bytes) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
        if length_bytes > MAX_NAME_BYTES {
            return Err(StreamError::NameTooLong { position: self.position, length_bytes });
        }
        self.layout.configuration_end = self.position + 5 + u64::from(length_bytes);
        self.keep(bytes, 5 + length_bytes as usize, State::Section { first: true }, sink)
    }

    fn section(&mut self, bytes: &[u8], first: bool, sink: &mut impl Sink) -> Result<Step, StreamError> {
        let position = self.position;
        let Some(&kind) = bytes.first() else { return Ok(Step::Need(1)) };
        match kind {
            SECTION_START => {
                let Some(&name_bytes) = bytes.get(5) else { return Ok(Step::Need(6)) };
                let length = 6 + usize::from(name_bytes) + 8;
                if bytes.len() < length {
                    return Ok(Step::Need(length));
                }
                let name = &bytes[6..length - 8];
                if name != b"ram" || self.ram_section.is_some() {
                    let name = String::from_utf8_lossy(name).into_owned();
                    return Err(StreamError::UnsupportedLiveSection { position, name });
                }
                let version = be32(bytes, length - 4).unwrap_or(0);
                if version != RAM_SECTION_VERSION {
                    return Err(StreamError::UnsupportedRamVersion { found: version });
                }
                self.ram_section = be32(bytes, 1);
                self.layout.ram_section = be32(bytes, 1).unwrap_or_default();
                self.keep(bytes, length, State::Ram, sink)
            }
            SECTION_PART | SECTION_END => {
                let Some(section_id) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
                if self.ram_section != Some(section_id) {
                    return Err(StreamError::UnknownSectionId { position, section_id });
                }
                self.keep(bytes, 5, State::Ram, sink)
            }
            SECTION_FULL | SECTION_EOF => {
                if !self.main_seen {
                    return Err(StreamError::NoMainBlock { name: self.main_block.clone() });
                }
                self.trailer.scan(position, &bytes[..1]);
                self.layout.devices = position;
                self.keep(bytes, 1, State::Devices, sink)
            }
            SECTION_COMMAND => {
                let (Some(command), Some(length_bytes)) = (be16(bytes, 1), be16(bytes, 3)) else {
                    return Ok(Step::Need(5));
                };
                if command != COMMAND_SWITCHOVER_START || length_bytes != 0 {
                    return Err(StreamError::UnsupportedCommand { position, command, length_bytes });
                }
                self.keep(bytes, 5, State::Section { first: false }, sink)
            }
            SUBSECTION if first => Err(StreamError::UnsupportedConfiguration { position }),
            found => Err(StreamError::UnknownSectionType { position, found }),
        }
    }

    fn block_list(
        &mut self,
        bytes: &[u8],
        left_bytes: u64,
        blocks: u32,
        sink: &mut impl Sink,
    ) -> Result<Step, StreamError> {
        let Some(&name_bytes) = bytes.first() else { return Ok(Step::Need(1)) };
        let name_end = 1 + usize::from(name_bytes);
        let Some(length_bytes) = be64(bytes, name_end) else { return Ok(Step::Need(name_end + 8)) };
        let name = &bytes[1..name_end];
        if blocks == MAX_BLOCKS {
            return Err(StreamError::TooManyBlocks);
        }
        if length_bytes > left_bytes {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(StreamError::BlockListOverrun {
                position: self.position,
                name,
                length_bytes,
                left_bytes,
            });
        }
        if name == self.main_block.as_bytes() {
            if length_bytes != self.main_size_bytes {
                return Err(StreamError::RamSizeMismatch {
                    name: self.main_block.clone(),
                    found_bytes: length_bytes,
                    expected_bytes: self.main_size_bytes,
                });
            }
            self.main_seen = true;
        }
        let left_bytes = left_bytes - length_bytes;
        if left_bytes == 0 && !self.main_seen {
            return Err(StreamError::NoMainBlock { name: self.main_block.clone() });
        }
        let next =
            if left_bytes == 0 { State::Ram } else { State::BlockList { left_bytes, blocks: blocks + 1 } };
        self.keep(bytes, name_end + 8, next, sink)
    }

    fn ram_entry(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<Step, StreamError> {
        let Some(word) = be64(bytes, 0) else { return Ok(Step::Need(8)) };
        let (offset, flags) = (word & !FLAG_MASK, word & FLAG_MASK);
        match flags & !FLAG_CONTINUE {
            FLAG_EOS => self.keep(bytes, 8, State::Footer, sink),
            FLAG_MEM_SIZE if offset == 0 => Err(StreamError::NoMainBlock { name: self.main_block.clone() }),
            FLAG_MEM_SIZE => self.keep(bytes, 8, State::BlockList { left_bytes: offset, blocks: 0 }, sink),
            FLAG_PAGE => self.page_entry(bytes, offset, flags, PAGE_SIZE_BYTES, sink),
            FLAG_ZERO => self.page_entry(bytes, offset, flags, 1, sink),
            _ => Err(StreamError::UnsupportedRamFlags { position: self.position, flags }),
        }
    }

    fn page_entry(
        &mut self,
        bytes: &[u8],
        offset: u64,
        flags: u64,
        payload_bytes: usize,
        sink: &mut impl Sink,
    ) -> Result<Step, StreamError> {
        let position = self.position;
        let (block, header_bytes) = if flags & FLAG_CONTINUE != 0 {
            (self.block, 8)
        } else {
            let Some(&name_bytes) = bytes.get(8) else { return Ok(Step::Need(9)) };
            let header_bytes = 9 + usize::from(name_bytes);
            let Some(name) = bytes.get(9..header_bytes) else { return Ok(Step::Need(header_bytes)) };
            (if name == self.main_block.as_bytes() { Block::Main } else { Block::Other }, header_bytes)
        };
        let length = header_bytes + payload_bytes;
        let Some(payload) = bytes.get(header_bytes..length) else { return Ok(Step::Need(length)) };
        match block {
            Block::None => return Err(StreamError::NoCurrentBlock { position }),
            Block::Other => self.residual(&bytes[..length], sink)?,
            // Offsets are page-aligned, so a page that starts inside a page-aligned block ends inside it.
            Block::Main if !self.main_seen || offset >= self.main_size_bytes => {
                return Err(StreamError::PageOutsideBlock {
                    position,
                    offset,
                    size_bytes: self.main_size_bytes,
                });
            }
            Block::Main => match <&[u8; PAGE_SIZE_BYTES]>::try_from(payload) {
                Ok(page) => {
                    sink.page(offset, page)?;
                    self.summary.pages += 1;
                }
                Err(_) if payload == [0] => {
                    sink.zero_page(offset)?;
                    self.summary.zero_pages += 1;
                }
                // The format allows a page filled with one byte; no QEMU since 1.5 sends it with another than 0.
                Err(_) => {
                    sink.page(offset, &[payload[0]; PAGE_SIZE_BYTES])?;
                    self.summary.pages += 1;
                }
            },
        }
        self.block = block;
        Ok(Step::Consumed(length))
    }

    fn footer(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<Step, StreamError> {
        let Some(section_id) = be32(bytes, 1) else { return Ok(Step::Need(5)) };
        let expected = self.ram_section.unwrap_or_default();
        if bytes[0] != SECTION_FOOTER || section_id != expected {
            return Err(StreamError::BadFooter { position: self.position, section_id: expected });
        }
        self.keep(bytes, 5, State::Section { first: false }, sink)
    }

    /// Passes an item of `length` bytes on to the residual, once all of it is there, and goes to `next`.
    fn keep(
        &mut self,
        bytes: &[u8],
        length: usize,
        next: State,
        sink: &mut impl Sink,
    ) -> Result<Step, StreamError> {
        let Some(item) = bytes.get(..length) else { return Ok(Step::Need(length)) };
        self.residual(item, sink)?;
        self.state = next;
        Ok(Step::Consumed(length))
    }

    fn residual(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<(), StreamError> {
        sink.residual(bytes)?;
        self.summary.residual_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Finds the stream's end within device state, which cannot be parsed without knowing each device.
///
/// The last thing in a stream is an end mark, then a description of all sections: `00 06`, a 32-bit length, and JSON
/// that starts with the page size (QEMU 7.2) or the configuration (10.0). The latest place that looks so tells where the stream must end. A guest can put
/// such bytes into its devices' state, but only the real one comes last, as JSON holds no zero bytes.
#[derive(Debug, Default)]
struct Trailer {
    /// The latest sixteen bytes.
    window: u128,
    ends_at: Option<u64>,
    /// Where that place is: the end mark's.
    end_mark: u64,
}

impl Trailer {
    const MASK: u128 = u128::from_be_bytes(*b"\xff\xff\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff");
    const PATTERNS: [u128; 2] = [
        u128::from_be_bytes(*b"\x00\x06\0\0\0\0{\"page_siz"),
        u128::from_be_bytes(*b"\x00\x06\0\0\0\0{\"configur"),
    ];
    const PATTERN_BYTES: u64 = 16;
    const JSON_SEEN_BYTES: u64 = 10;

    fn scan(&mut self, position: u64, bytes: &[u8]) {
        for (at, &byte) in (position + 1..).zip(bytes) {
            self.window = self.window << 8 | u128::from(byte);
            if Trailer::PATTERNS.contains(&(self.window & Trailer::MASK)) {
                let length = (self.window >> 80) as u32;
                self.ends_at = Some(at - Trailer::JSON_SEEN_BYTES + u64::from(length));
                self.end_mark = at - Trailer::PATTERN_BYTES;
            }
        }
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
#[path = "splitter_tests.rs"]
mod tests;
