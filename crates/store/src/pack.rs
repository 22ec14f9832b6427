//! A pack: many chunks in one file that is written once. Pure: bytes to values and back.
//!
//! docs/store-format.md says what stands where. In short: a magic, *groups* of chunks one after another, a *table* of
//! what is in them, a footer with the table's length. A group is compressed as one, so that small chunks compress
//! well; it is the least that is read.
//!
//! Invariants:
//! * The pack's id is the hash of its table, and the table holds the hash of each group as it is stored: the id
//!   covers every byte but the magic and the footer, which have one right value each.
//! * The table holds a random number, so that no two packs ever written have the same id, whatever is in them: a pack
//!   that is being deleted is never one that somebody writes just now.
//! * What [`Table::decode`] accepts is in bounds: every group lies within the file, every chunk within its group.

use std::fmt;

use crate::address::Address;

/// The most bytes of chunks in one group, before compression, of each kind.
const DATA_GROUP_BYTES: usize = 128 << 10;
const TREE_GROUP_BYTES: usize = 32 << 10;
/// A pack is closed when it has reached this length.
pub const PACK_BYTES: usize = 16 << 20;
/// The longest pack that is read: one more group than a full one, and its table.
pub const PACK_BYTES_MAX: u64 = 64 << 20;
/// The longest chunk.
pub const CHUNK_BYTES_MAX: usize = 64 << 10;
/// What stands before the groups.
pub(crate) const MAGIC: &[u8; 8] = b"DIOPACK1";
/// The table's length and a magic.
pub(crate) const FOOTER_BYTES: usize = 12;
const FOOTER_MAGIC: &[u8; 8] = b"DIOTABL1";
const TABLE_HEAD_BYTES: usize = 1 + 3 + 16 + 4 + 4;
const TABLE_GROUP_BYTES: usize = 4 + 4 + 2 + 1 + 1 + 32;
/// An address and a length.
pub(crate) const TABLE_CHUNK_BYTES: usize = 32 + 2;
/// zstd's fastest level with entropy coding as usual.
const ZSTD_LEVEL: i32 = 1;

/// A pack's name: the hash of its table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(Address);

/// What a pack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PackKind {
    /// Pages and clusters.
    Data,
    /// Nodes of trees: apart, so that everything can be traced without reading data.
    Tree,
}

/// How a group is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// As it is: compressing it would not have made it smaller.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// A group, as the table describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Where it starts in the pack.
    pub offset: u32,
    /// How long it is in the pack.
    pub stored_bytes: u32,
    /// How long its chunks are together.
    pub raw_bytes: u32,
    /// The number of its first chunk, in the pack.
    pub first_chunk: u32,
    /// How many chunks it has.
    pub chunks: u16,
    /// How it is stored.
    pub coding: Coding,
    /// The hash of the stored bytes.
    pub hash: Address,
}

/// What is in a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Pages and clusters, or nodes.
    pub kind: PackKind,
    /// In the order in which they are stored.
    pub groups: Box<[Group]>,
    /// The address of each chunk.
    pub addresses: Box<[Address]>,
    /// The length of each chunk, less one.
    lengths: Box<[u16]>,
    /// Makes the id unique.
    nonce: [u8; 16],
}

/// Why bytes are no pack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// Too short to be one, or without the right beginning and end.
    #[error("it is no pack of a known version")]
    NotAPack,
    /// The footer names a length that cannot be.
    #[error("its table of {table_bytes} bytes does not fit its {pack_bytes} bytes")]
    TableLength {
        /// What the footer says.
        table_bytes: u64,
        /// How long the pack is.
        pack_bytes: u64,
    },
    /// The table is not the one that the pack is named after.
    #[error("its table has changed")]
    TableHash,
    /// The hash is right, and yet the table contradicts itself or the limits.
    #[error("its table contradicts itself in {what} {index}")]
    Table {
        /// What is wrong.
        what: &'static str,
        /// Which one, from 0.
        index: usize,
    },
    /// The stored bytes of a group are not those that were written.
    #[error("group {group} at offset {offset} has changed")]
    Group {
        /// Which one, from 0.
        group: usize,
        /// Where it starts.
        offset: u32,
    },
    /// A group cannot be decompressed, although it is as it was written.
    #[error("group {group} cannot be decompressed")]
    Compression {
        /// Which one, from 0.
        group: usize,
    },
    /// A chunk in a sound group is not what its address says.
    #[error("chunk {chunk} is not {address}")]
    Chunk {
        /// Which one, from 0.
        chunk: usize,
        /// What it should be.
        address: Address,
    },
}

impl PackId {
    /// The id of the pack with this (encoded) table.
    pub fn of_table(table: &[u8]) -> Self {
        Self(Address::of(table))
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.0.short()
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackId({})", self.short())
    }
}

impl std::str::FromStr for PackId {
    type Err = crate::address::ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl PackKind {
    /// The most bytes that one group of it holds.
    pub fn group_bytes(self) -> usize {
        match self {
            Self::Data => DATA_GROUP_BYTES,
            Self::Tree => TREE_GROUP_BYTES,
        }
    }
}

impl Group {
    /// Where it ends in the pack.
    pub fn end(&self) -> u32 {
        self.offset + self.stored_bytes
    }

    /// Its chunks' numbers.
    pub fn chunk_range(&self) -> std::ops::Range<usize> {
        let first = self.first_chunk as usize;
        first..first + usize::from(self.chunks)
    }
}

/// A group that is ready to be put into a pack.
#[derive(Debug)]
pub struct SealedGroup {
    stored: Vec<u8>,
    raw_bytes: u32,
    coding: Coding,
    hash: Address,
    chunks: Vec<(Address, u16)>,
}

/// Chunks on their way into a group. Owns the compressor.
pub struct GroupBuilder {
    kind: PackKind,
    raw: Vec<u8>,
    chunks: Vec<(Address, u16)>,
    compressor: zstd::bulk::Compressor<'static>,
}

impl fmt::Debug for GroupBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupBuilder").field("kind", &self.kind).field("chunks", &self.chunks.len()).finish()
    }
}

impl GroupBuilder {
    /// An empty one.
    pub fn new(kind: PackKind) -> Self {
        let compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).expect("zstd knows its own level");
        Self { kind, raw: Vec::with_capacity(kind.group_bytes()), chunks: Vec::new(), compressor }
    }

    /// What it is a group of.
    pub fn kind(&self) -> PackKind {
        self.kind
    }

    /// Whether a chunk of this length still fits. An empty group takes any.
    pub fn fits(&self, bytes: usize) -> bool {
        self.raw.len() + bytes <= self.kind.group_bytes()
    }

    /// Takes in a chunk of 1 to [`CHUNK_BYTES_MAX`] bytes, which has this address.
    pub fn push(&mut self, address: Address, chunk: &[u8]) {
        assert!(!chunk.is_empty() && chunk.len() <= CHUNK_BYTES_MAX, "a chunk of {} bytes", chunk.len());
        self.raw.extend_from_slice(chunk);
        // Checked just above.
        self.chunks.push((address, (chunk.len() - 1) as u16));
    }

    /// Compresses what has been taken in; `None` when that is nothing.
    pub fn seal(&mut self) -> Option<SealedGroup> {
        if self.chunks.is_empty() {
            return None;
        }
        let compressed = match self.kind {
            PackKind::Data => self.compressor.compress(&self.raw).ok(),
            // Hashes do not compress.
            PackKind::Tree => None,
        };
        let raw_bytes = self.raw.len() as u32;
        let (stored, coding) = match compressed {
            Some(compressed) if compressed.len() < self.raw.len() => (compressed, Coding::Zstd),
            _ => (self.raw.clone(), Coding::Raw),
        };
        self.raw.clear();
        let hash = Address::of(&stored);
        Some(SealedGroup { stored, raw_bytes, coding, hash, chunks: std::mem::take(&mut self.chunks) })
    }
}

/// A pack being filled.
#[derive(Debug)]
pub struct PackBuilder {
    bytes: Vec<u8>,
    kind: PackKind,
    nonce: [u8; 16],
    groups: Vec<Group>,
    addresses: Vec<Address>,
    lengths: Vec<u16>,
}

impl PackBuilder {
    /// An empty one; `nonce` is random.
    pub fn new(kind: PackKind, nonce: [u8; 16]) -> Self {
        let bytes = MAGIC.to_vec();
        Self { bytes, kind, nonce, groups: Vec::new(), addresses: Vec::new(), lengths: Vec::new() }
    }

    /// Whether it has reached [`PACK_BYTES`], its table counted: of pages that compress to next to nothing the table is
    /// the larger part.
    pub fn is_full(&self) -> bool {
        let table = self.groups.len() * TABLE_GROUP_BYTES + self.addresses.len() * TABLE_CHUNK_BYTES;
        self.bytes.len() + table >= PACK_BYTES
    }

    /// Appends a group.
    pub fn add(&mut self, group: SealedGroup) {
        self.groups.push(Group {
            offset: self.bytes.len() as u32,
            stored_bytes: group.stored.len() as u32,
            raw_bytes: group.raw_bytes,
            first_chunk: self.addresses.len() as u32,
            chunks: group.chunks.len() as u16,
            coding: group.coding,
            hash: group.hash,
        });
        self.bytes.extend_from_slice(&group.stored);
        for (address, length) in group.chunks {
            self.addresses.push(address);
            self.lengths.push(length);
        }
    }

    /// The finished file, its table and its id.
    pub fn finish(mut self) -> (PackId, Vec<u8>, Table) {
        let table = Table {
            kind: self.kind,
            groups: self.groups.into(),
            addresses: self.addresses.into(),
            lengths: self.lengths.into(),
            nonce: self.nonce,
        };
        let encoded = table.encode();
        self.bytes.extend_from_slice(&encoded);
        self.bytes.extend_from_slice(&(encoded.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(FOOTER_MAGIC);
        (PackId::of_table(&encoded), self.bytes, table)
    }
}

/// How long the table is that a pack's last [`FOOTER_BYTES`] bytes announce.
pub fn table_bytes(footer: &[u8; FOOTER_BYTES], pack_bytes: u64) -> Result<u64, PackError> {
    let (length, magic) = footer.split_at(4);
    if magic != FOOTER_MAGIC {
        return Err(PackError::NotAPack);
    }
    let table_bytes = u64::from(u32::from_le_bytes([length[0], length[1], length[2], length[3]]));
    let most = pack_bytes.saturating_sub((MAGIC.len() + FOOTER_BYTES) as u64);
    if table_bytes > most || table_bytes < TABLE_HEAD_BYTES as u64 {
        return Err(PackError::TableLength { table_bytes, pack_bytes });
    }
    Ok(table_bytes)
}

impl Table {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(
            TABLE_HEAD_BYTES
                + self.groups.len() * TABLE_GROUP_BYTES
                + self.addresses.len() * TABLE_CHUNK_BYTES,
        );
        out.extend_from_slice(&[if self.kind == PackKind::Data { 1 } else { 2 }, 0, 0, 0]);
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&(self.groups.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.addresses.len() as u32).to_le_bytes());
        for group in &self.groups {
            out.extend_from_slice(&group.stored_bytes.to_le_bytes());
            out.extend_from_slice(&group.raw_bytes.to_le_bytes());
            out.extend_from_slice(&group.chunks.to_le_bytes());
            out.extend_from_slice(&[if group.coding == Coding::Raw { 0 } else { 1 }, 0]);
            out.extend_from_slice(group.hash.as_bytes());
        }
        for address in &self.addresses {
            out.extend_from_slice(address.as_bytes());
        }
        for length in &self.lengths {
            out.extend_from_slice(&length.to_le_bytes());
        }
        out
    }

    /// The table of the pack that has this id and length. `bytes` is exactly the table.
    pub fn decode(id: &PackId, bytes: &[u8], pack_bytes: u64) -> Result<Self, PackError> {
        if PackId::of_table(bytes) != *id {
            return Err(PackError::TableHash);
        }
        let bad = |what, index| PackError::Table { what, index };
        let mut input = Input { bytes };
        let head = input.take(TABLE_HEAD_BYTES).ok_or(bad("its head", 0))?;
        let kind = match head[..4] {
            [1, 0, 0, 0] => PackKind::Data,
            [2, 0, 0, 0] => PackKind::Tree,
            _ => return Err(bad("its kind", 0)),
        };
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&head[4..20]);
        let group_count = number(&head[20..24]);
        let chunk_count = number(&head[24..28]);
        let expected = group_count
            .checked_mul(TABLE_GROUP_BYTES)
            .zip(chunk_count.checked_mul(TABLE_CHUNK_BYTES))
            .and_then(|(groups, chunks)| groups.checked_add(chunks));
        // From here on both counts are backed by the input.
        if expected != Some(input.bytes.len()) {
            return Err(bad("its counts", 0));
        }
        let mut groups = Vec::with_capacity(group_count);
        let (mut offset, mut first_chunk) = (MAGIC.len() as u64, 0_usize);
        for index in 0..group_count {
            let bytes = input.take(TABLE_GROUP_BYTES).ok_or(bad("group", index))?;
            let stored_bytes = number(&bytes[..4]);
            let raw_bytes = number(&bytes[4..8]);
            let chunks = u16::from_le_bytes([bytes[8], bytes[9]]);
            let coding = match bytes[10..12] {
                [0, 0] if stored_bytes == raw_bytes => Coding::Raw,
                [1, 0] if stored_bytes < raw_bytes => Coding::Zstd,
                _ => return Err(bad("group", index)),
            };
            if chunks == 0 || stored_bytes == 0 || raw_bytes > kind.group_bytes() {
                return Err(bad("group", index));
            }
            let mut hash = [0; 32];
            hash.copy_from_slice(&bytes[12..]);
            groups.push(Group {
                offset: u32::try_from(offset).map_err(|_| bad("group", index))?,
                stored_bytes: stored_bytes as u32,
                raw_bytes: raw_bytes as u32,
                first_chunk: first_chunk as u32,
                chunks,
                coding,
                hash: Address::from_bytes(hash),
            });
            offset += stored_bytes as u64;
            first_chunk += usize::from(chunks);
        }
        if first_chunk != chunk_count {
            return Err(bad("its counts", 1));
        }
        if offset + (bytes.len() + FOOTER_BYTES) as u64 != pack_bytes {
            return Err(bad("its length", 0));
        }
        let addresses = input.take(chunk_count * 32).ok_or(bad("chunk", 0))?;
        let addresses: Box<[Address]> = addresses
            .chunks_exact(32)
            .map(|bytes| {
                let mut address = [0; 32];
                address.copy_from_slice(bytes);
                Address::from_bytes(address)
            })
            .collect();
        let lengths: Box<[u16]> =
            input.bytes.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]])).collect();
        let table = Self { kind, groups: groups.into(), addresses, lengths, nonce };
        for (index, group) in table.groups.iter().enumerate() {
            let chunks = &table.lengths[group.chunk_range()];
            let sum: usize = chunks.iter().map(|length| usize::from(*length) + 1).sum();
            if sum != group.raw_bytes as usize {
                return Err(bad("group", index));
            }
        }
        if let Some(index) = table.addresses.iter().position(Address::is_zero) {
            return Err(bad("chunk", index));
        }
        Ok(table)
    }

    /// How many chunks it has.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// A chunk's length.
    pub fn chunk_bytes(&self, chunk: usize) -> usize {
        usize::from(self.lengths[chunk]) + 1
    }

    /// Which group a chunk is in.
    pub fn group_of(&self, chunk: usize) -> usize {
        self.groups.partition_point(|group| group.first_chunk as usize <= chunk) - 1
    }

    /// Where a chunk starts in its group's bytes.
    pub fn offset_in_group(&self, group: usize, chunk: usize) -> usize {
        let first = self.groups[group].first_chunk as usize;
        (first..chunk).map(|before| self.chunk_bytes(before)).sum()
    }

    /// How long the whole pack is.
    pub fn pack_bytes(&self) -> u64 {
        let groups: u64 = self.groups.iter().map(|group| u64::from(group.stored_bytes)).sum();
        let table = TABLE_HEAD_BYTES + self.groups.len() * TABLE_GROUP_BYTES + self.len() * TABLE_CHUNK_BYTES;
        groups + (MAGIC.len() + table + FOOTER_BYTES) as u64
    }

    /// A group's chunks, one after another, from its stored bytes; those are checked, the chunks' addresses not yet.
    pub fn open_group(
        &self,
        index: usize,
        stored: &[u8],
        opener: &mut Opener,
        out: &mut Vec<u8>,
    ) -> Result<(), PackError> {
        let group = &self.groups[index];
        if stored.len() != group.stored_bytes as usize || Address::of(stored) != group.hash {
            return Err(PackError::Group { group: index, offset: group.offset });
        }
        out.clear();
        match group.coding {
            Coding::Raw => out.extend_from_slice(stored),
            Coding::Zstd => {
                out.reserve(group.raw_bytes as usize);
                let length = opener.0.decompress_to_buffer(stored, out);
                if length.ok() != Some(group.raw_bytes as usize) {
                    return Err(PackError::Compression { group: index });
                }
            }
        }
        Ok(())
    }

    /// Checks every chunk of an opened group against its address.
    pub fn check_chunks(&self, index: usize, raw: &[u8]) -> Result<(), PackError> {
        let mut rest = raw;
        for chunk in self.groups[index].chunk_range() {
            let (bytes, after) = rest.split_at(self.chunk_bytes(chunk));
            if Address::of(bytes) != self.addresses[chunk] {
                return Err(PackError::Chunk { chunk, address: self.addresses[chunk] });
            }
            rest = after;
        }
        Ok(())
    }
}

/// A decompressor; one for each thread.
pub struct Opener(zstd::bulk::Decompressor<'static>);

impl Opener {
    /// A new one.
    pub fn new() -> Self {
        Self(zstd::bulk::Decompressor::new().expect("a decompressor without a dictionary"))
    }
}

impl Default for Opener {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener")
    }
}

fn number(bytes: &[u8]) -> usize {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
}

struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length)?;
        self.bytes = rest;
        Some(taken)
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
