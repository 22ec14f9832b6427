//! One snapshot in one file: its bytes, record by record. It is written and read from front to back, through a pipe
//! as well as in a file.
//!
//! ```text
//! magic      8 bytes   "DIOARCH2", the last byte is the version
//! records, each:
//!   kind     u8        1 manifest, 2 pack, 3 end, 4 signature
//!   zero     3 bytes
//!   length   u32       of the contents
//!   hash     32 bytes  BLAKE3 of the contents
//!   contents
//! ```
//!
//! The first record is the manifest, and its signature may follow; the last one is the end. Its contents are the hash of
//! the magic and of all records' heads before it. A head has the hash of its contents, so the end covers every byte, and
//! what has changed is named by the record it is in. Nothing follows the end. Version 1 had no signatures; it is read.
//!
//! Invariant: no more memory is taken than the input has bytes, and than the longest record of its kind.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;

use crate::address::Address;
use crate::error::StoreError;
use crate::manifest::{MAX_MANIFEST_BYTES, ManifestProblem};
use crate::pack::{PACK_BYTES_MAX, PackError};
use crate::signature::OBJECT_BYTES_MAX as SIGNATURE_BYTES_MAX;

const MAGIC: &[u8; 8] = b"DIOARCH2";
/// What a magic of the version without signatures is.
const MAGIC_1: &[u8; 8] = b"DIOARCH1";
/// What a magic of another version begins with.
const MAGIC_OF_ANY: &[u8; 7] = b"DIOARCH";
const HEAD_BYTES: usize = 1 + 3 + 4 + 32;
/// What is read and copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The manifest, whose hash is the snapshot's id.
    Manifest,
    /// A pack as in the store, with nothing in it that the snapshot does not need.
    Pack,
    /// The hash of all heads.
    End,
    /// Who vouches for the snapshot: right after the manifest, or not at all.
    Signature,
}

/// How an archive differs from what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArchiveProblem {
    /// It begins with something else.
    NotAnArchive,
    /// Another version of Diorama wrote it.
    Version {
        /// The version's character.
        found: char,
    },
    /// It is cut off.
    Ends,
    /// A record's head that nobody writes.
    Head,
    /// A record where another kind belongs.
    Order,
    /// A record longer than any of its kind.
    Length {
        /// What its head says.
        bytes: u64,
        /// The most there can be.
        limit_bytes: u64,
    },
    /// The contents of a record have changed.
    Contents,
    /// A record is missing, too many, or in another's place.
    Records,
    /// Something follows the end.
    Excess,
    /// The hash is right, and yet it is not a manifest.
    NotAManifest {
        /// Where parsing stopped: line and column, from 1.
        line: usize,
        /// See `line`.
        column: usize,
    },
    /// The hash is right, and yet the manifest contradicts itself.
    Manifest(ManifestProblem),
    /// The hash is right, and yet it is not a pack.
    Pack(PackError),
    /// The hash is right, and yet it is no signature of this snapshot.
    Signature,
    /// Everything is as it was written, and yet something of the snapshot is not there.
    Lacks {
        /// Such as `ram/server`.
        part: String,
    },
}

impl fmt::Display for ArchiveProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnArchive => write!(f, "it is no exported snapshot"),
            Self::Version { found } => write!(f, "it is an export of version {found:?}, which is not known"),
            Self::Ends => write!(f, "it is cut off"),
            Self::Head => write!(f, "no record begins there"),
            Self::Order => write!(f, "another record belongs there"),
            Self::Length { bytes, limit_bytes } => {
                write!(f, "a record of {bytes} bytes, where the longest has {limit_bytes}")
            }
            Self::Contents => write!(f, "the record there has changed"),
            Self::Records => write!(f, "a record before has been removed, added or moved"),
            Self::Excess => write!(f, "something follows its end"),
            Self::NotAManifest { line, column } => {
                write!(f, "no manifest, from line {line}, column {column}")
            }
            Self::Manifest(problem) => write!(f, "{problem}"),
            Self::Pack(problem) => write!(f, "the pack there: {problem}"),
            Self::Signature => write!(f, "the signature there is none of this snapshot"),
            Self::Lacks { part } => write!(f, "it does not hold all of {part}"),
        }
    }
}

/// Writes an archive.
pub(crate) struct ArchiveWriter<'a> {
    out: &'a mut dyn Write,
    heads: blake3::Hasher,
    bytes: u64,
}

impl<'a> ArchiveWriter<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Result<Self, StoreError> {
        let mut writer = Self { out, heads: blake3::Hasher::new(), bytes: 0 };
        writer.heads.update(MAGIC);
        writer.write(MAGIC)?;
        Ok(writer)
    }

    /// Appends a record of at most 4 GiB; a reader takes less.
    pub(crate) fn record(&mut self, kind: Kind, contents: &[u8]) -> Result<(), StoreError> {
        let mut head = [0; HEAD_BYTES];
        head[0] = kind.code();
        head[4..8].copy_from_slice(&(contents.len() as u32).to_le_bytes());
        head[8..].copy_from_slice(blake3::hash(contents).as_bytes());
        self.heads.update(&head);
        self.write(&head)?;
        self.write(contents)
    }

    /// Writes the end. Returns the length of it all.
    pub(crate) fn finish(mut self) -> Result<u64, StoreError> {
        let hash = self.heads.finalize();
        self.record(Kind::End, hash.as_bytes())?;
        self.out.flush().map_err(|error| write_error(error, self.bytes))?;
        Ok(self.bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.out.write_all(bytes).map_err(|error| write_error(error, self.bytes))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Reads an archive.
pub(crate) struct ArchiveReader<'a> {
    input: &'a mut dyn Read,
    heads: blake3::Hasher,
    /// How far it has been read.
    offset: u64,
    may_be_signed: bool,
    /// What was found where a signature might have been.
    ahead: Option<Record>,
}

struct Record {
    at: u64,
    kind: Kind,
    contents: Vec<u8>,
    /// The hash of all heads before this one.
    heads: blake3::Hash,
}

impl<'a> ArchiveReader<'a> {
    /// Looks whether it is one.
    pub(crate) fn new(input: &'a mut dyn Read) -> Result<Self, StoreError> {
        let (heads, may_be_signed, ahead) = (blake3::Hasher::new(), false, None);
        let mut reader = Self { input, heads, offset: 0, may_be_signed, ahead };
        let magic = reader.read(MAGIC.len() as u64)?;
        reader.may_be_signed = magic == MAGIC;
        if magic != MAGIC && magic != MAGIC_1 {
            let problem = match magic.strip_prefix(MAGIC_OF_ANY) {
                Some([found]) => ArchiveProblem::Version { found: char::from(*found) },
                _ => ArchiveProblem::NotAnArchive,
            };
            return Err(damaged(0, problem));
        }
        reader.heads.update(&magic);
        Ok(reader)
    }

    /// How far it has been read, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The manifest's bytes, which come first.
    pub(crate) fn manifest(&mut self) -> Result<Vec<u8>, StoreError> {
        match self.record()? {
            Record { kind: Kind::Manifest, contents, .. } => Ok(contents),
            Record { at, .. } => Err(damaged(at, ArchiveProblem::Order)),
        }
    }

    /// What comes after the manifest, if it is a signature, and where it stands.
    pub(crate) fn signature(&mut self) -> Result<Option<(u64, Vec<u8>)>, StoreError> {
        let record = self.record()?;
        if record.kind == Kind::Signature {
            return Ok(Some((record.at, record.contents)));
        }
        self.ahead = Some(record);
        Ok(None)
    }

    /// The next pack, and where it stands; `None` at the end, which has then been checked.
    pub(crate) fn pack(&mut self) -> Result<Option<(u64, Vec<u8>)>, StoreError> {
        let Record { at, kind, contents, heads } = match self.ahead.take() {
            Some(record) => record,
            None => self.record()?,
        };
        match kind {
            Kind::Pack => Ok(Some((at, contents))),
            Kind::Manifest | Kind::Signature => Err(damaged(at, ArchiveProblem::Order)),
            Kind::End => {
                if contents != heads.as_bytes() {
                    return Err(damaged(at, ArchiveProblem::Records));
                }
                let mut more = [0];
                let read = loop {
                    match self.input.read(&mut more) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        read => break read.map_err(|error| read_error(error, self.offset))?,
                    }
                };
                if read > 0 {
                    return Err(damaged(self.offset, ArchiveProblem::Excess));
                }
                Ok(None)
            }
        }
    }

    fn record(&mut self) -> Result<Record, StoreError> {
        let (at, heads) = (self.offset, self.heads.finalize());
        let head = self.read(HEAD_BYTES as u64)?;
        let kind = match head[..4] {
            [1, 0, 0, 0] => Kind::Manifest,
            [2, 0, 0, 0] => Kind::Pack,
            [3, 0, 0, 0] => Kind::End,
            [4, 0, 0, 0] if self.may_be_signed => Kind::Signature,
            _ => return Err(damaged(at, ArchiveProblem::Head)),
        };
        let bytes = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        let limit_bytes = kind.limit_bytes();
        if bytes > limit_bytes {
            return Err(damaged(at, ArchiveProblem::Length { bytes, limit_bytes }));
        }
        let contents = self.read(bytes)?;
        if *blake3::hash(&contents).as_bytes() != head[8..] {
            return Err(damaged(at, ArchiveProblem::Contents));
        }
        self.heads.update(&head);
        Ok(Record { at, kind, contents, heads })
    }

    /// Exactly this much. What the input does not have is not allocated either.
    fn read(&mut self, bytes: u64) -> Result<Vec<u8>, StoreError> {
        let mut read = Vec::with_capacity(bytes.min(COPY_BYTES) as usize);
        let count = (&mut self.input).take(bytes).read_to_end(&mut read);
        let count = count.map_err(|error| read_error(error, self.offset))? as u64;
        self.offset += count;
        if count < bytes {
            return Err(damaged(self.offset, ArchiveProblem::Ends));
        }
        Ok(read)
    }
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Manifest => 1,
            Self::Pack => 2,
            Self::End => 3,
            Self::Signature => 4,
        }
    }

    fn limit_bytes(self) -> u64 {
        match self {
            Self::Manifest => MAX_MANIFEST_BYTES,
            Self::Pack => PACK_BYTES_MAX,
            Self::End => Address::BYTES as u64,
            Self::Signature => SIGNATURE_BYTES_MAX,
        }
    }
}

/// An archive that is not what was written.
pub(crate) fn damaged(offset: u64, problem: ArchiveProblem) -> StoreError {
    StoreError::Archive { offset, problem }
}

fn read_error(error: io::Error, offset: u64) -> StoreError {
    StoreError::io("read", Path::new(&format!("the export at byte {offset}")), error)
}

fn write_error(error: io::Error, offset: u64) -> StoreError {
    StoreError::io("write", Path::new(&format!("the export at byte {offset}")), error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(signature: Option<&[u8]>, packs: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut writer = ArchiveWriter::new(&mut out).unwrap();
        writer.record(Kind::Manifest, b"{}").unwrap();
        if let Some(signature) = signature {
            writer.record(Kind::Signature, signature).unwrap();
        }
        for pack in packs {
            writer.record(Kind::Pack, pack).unwrap();
        }
        let bytes = writer.finish().unwrap();
        assert_eq!(bytes, out.len() as u64);
        out
    }

    type Read = (Option<Vec<u8>>, Vec<Vec<u8>>);

    fn read(mut bytes: &[u8]) -> Result<Read, ArchiveProblem> {
        let problem = |error| match error {
            StoreError::Archive { problem, .. } => problem,
            other => panic!("{other}"),
        };
        let mut reader = ArchiveReader::new(&mut bytes).map_err(problem)?;
        assert_eq!(reader.manifest().map_err(problem)?, b"{}");
        let signature = reader.signature().map_err(problem)?.map(|(_, signature)| signature);
        let mut packs = Vec::new();
        while let Some((_, pack)) = reader.pack().map_err(problem)? {
            packs.push(pack);
        }
        Ok((signature, packs))
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_any_change_is_found(
            signature in prop::option::of(prop::collection::vec(any::<u8>(), 0..300)),
            packs in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..6),
            at in any::<prop::sample::Index>(),
            flip in 1_u8..,
        ) {
            let whole = written(signature.as_deref(), &packs);
            prop_assert_eq!(read(&whole), Ok((signature, packs)));
            let at = at.index(whole.len());
            let mut changed = whole.clone();
            changed[at] ^= flip;
            // The manifest's contents are looked at by the caller.
            prop_assert!(read(&changed).is_err());
            prop_assert!(read(&whole[..at]).is_err());
            let longer = [&whole[..], &[flip]].concat();
            prop_assert_eq!(read(&longer), Err(ArchiveProblem::Excess));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), with_magic in any::<bool>()) {
            let mut bytes = bytes;
            if with_magic && bytes.len() >= 16 {
                bytes[..8].copy_from_slice(MAGIC);
                bytes[9..12].fill(0);
            }
            prop_assert!(read(&bytes).is_err());
        }
    }

    #[test]
    fn records_are_neither_moved_nor_doubled_nor_left_out() {
        let packs = [vec![1; 50], vec![2; 50], vec![3; 50]];
        let whole = written(None, &packs);
        let record = HEAD_BYTES + 50;
        let first = 8 + HEAD_BYTES + 2;
        let (before, rest) = whole.split_at(first);
        let (records, after) = rest.split_at(3 * record);
        let parts: Vec<&[u8]> = records.chunks(record).collect();
        for order in [&[1, 0, 2][..], &[0, 1], &[0, 1, 2, 2], &[]] {
            let moved: Vec<&[u8]> = order.iter().map(|index| parts[*index]).collect();
            let forged = [before, &moved.concat(), after].concat();
            assert_eq!(read(&forged), Err(ArchiveProblem::Records), "{order:?}");
        }
        let signed = written(Some(b"signed"), &packs);
        let (before, rest) = signed.split_at(first);
        let (signature, after) = rest.split_at(HEAD_BYTES + 6);
        assert_eq!(read(&[before, after].concat()), Err(ArchiveProblem::Records));
        let late = [before, &after[..record], signature, &after[record..]].concat();
        assert_eq!(read(&late), Err(ArchiveProblem::Order));
        let twice = [before, signature, signature, after].concat();
        assert_eq!(read(&twice), Err(ArchiveProblem::Order));
        // Version 1 knows none.
        let older = [MAGIC_1, &signed[8..]].concat();
        assert_eq!(read(&older), Err(ArchiveProblem::Head));
        // A whole archive after another, and one that only claims to be long.
        assert_eq!(read(&[&whole[..], &whole].concat()), Err(ArchiveProblem::Excess));
        let mut long = whole[..8].to_vec();
        long.extend_from_slice(&[2, 0, 0, 0, 255, 255, 255, 255]);
        long.resize(8 + HEAD_BYTES, 0);
        let limit_bytes = PACK_BYTES_MAX;
        let refused = ArchiveProblem::Length { bytes: u32::MAX.into(), limit_bytes };
        assert_eq!(read(&long), Err(refused));
        assert_eq!(read(b"DIOARCH7"), Err(ArchiveProblem::Version { found: '7' }));
        assert_eq!(read(b"GIF89a.."), Err(ArchiveProblem::NotAnArchive));
        assert_eq!(read(b""), Err(ArchiveProblem::Ends));
    }
}
