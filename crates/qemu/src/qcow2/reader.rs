//! Reading an image: its header, its tables, its clusters.

use std::io::Read;

use super::{COMPRESSED, ImageError, MAGIC, MAX_L1_ENTRIES, MAX_VIRTUAL_BYTES, OFFSET_MASK, ReadAt, ZERO};

const HEADER_BYTES_MAX: usize = 112;
const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// What an image has at a guest's cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing: what is below shows.
    Unallocated,
    /// Zeros, whatever is below.
    Zero,
    /// Its bytes, at this offset. What lies past the file's end is zeros.
    Data {
        /// A multiple of the cluster's size.
        offset: u64,
    },
    /// Its bytes compressed.
    Compressed {
        /// Where they begin.
        offset: u64,
        /// At most so many of them.
        bytes: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Deflate,
    Zstd,
}

/// An opened image.
#[derive(Debug)]
pub struct Image<R> {
    input: R,
    cluster_bits: u32,
    virtual_bytes: u64,
    compression: Compression,
    first_level: Vec<u64>,
    /// The table read last, and where it is.
    table: Option<(u64, Vec<u64>)>,
    /// The cluster decompressed last, and where it was.
    decompressed: Option<(u64, Vec<u8>)>,
}

impl<R: ReadAt> Image<R> {
    /// Reads the header and the first-level table. A backing file that the header names is not looked at.
    pub fn open(mut input: R) -> Result<Self, ImageError> {
        let damaged = |what, offset| ImageError::Damaged { what, offset };
        let length = input.length();
        let mut header = [0; HEADER_BYTES_MAX];
        if length < 72 {
            return Err(damaged("too short for a header", length));
        }
        let have = HEADER_BYTES_MAX.min(usize::try_from(length).unwrap_or(usize::MAX));
        input.read_at(0, &mut header[..have])?;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| (u64::from(word(at)) << 32) | u64::from(word(at + 4));
        if word(0) != MAGIC {
            return Err(damaged("no qcow2 header", 0));
        }
        let version = word(4);
        if !(2..=3).contains(&version) {
            return Err(ImageError::Unsupported { what: "an unknown version" });
        }
        if version == 3 && length < 104 {
            return Err(damaged("too short for a header", length));
        }
        let features = if version == 3 { long(72) } else { 0 };
        let header_bytes = if version == 3 { word(100) } else { 72 };
        let cluster_bits = word(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged("an impossible cluster size", 20));
        }
        if word(32) != 0 {
            return Err(ImageError::Unsupported { what: "encryption" });
        }
        for (feature, what) in [
            (INCOMPATIBLE_DATA_FILE, "its data in another file"),
            (INCOMPATIBLE_EXTENDED_L2, "extended second-level tables"),
        ] {
            if features & feature != 0 {
                return Err(ImageError::Unsupported { what });
            }
        }
        if features & INCOMPATIBLE_CORRUPT != 0 {
            return Err(damaged("QEMU's mark of a corrupt image", 72));
        }
        if features & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_COMPRESSION) != 0 {
            return Err(ImageError::Unsupported { what: "unknown features" });
        }
        let compression = match (features & INCOMPATIBLE_COMPRESSION != 0 && header_bytes > 104, header[104])
        {
            (false, _) | (true, 0) => Compression::Deflate,
            (true, 1) => Compression::Zstd,
            _ => return Err(ImageError::Unsupported { what: "an unknown compression" }),
        };
        let virtual_bytes = long(24);
        if virtual_bytes > MAX_VIRTUAL_BYTES {
            return Err(damaged("an impossible size", 24));
        }
        // One first-level entry maps one second-level table: a cluster of 8-byte entries, each a cluster of data.
        let mapped_per_entry = 1_u64 << (2 * cluster_bits - 3);
        let (entries, needed) = (u64::from(word(36)), virtual_bytes.div_ceil(mapped_per_entry));
        let at = long(40);
        let fits = at.checked_add(needed * 8).is_some_and(|end| end <= length);
        if entries < needed || needed > MAX_L1_ENTRIES || !fits {
            return Err(damaged("a first-level table that does not fit", at));
        }
        let mut bytes = vec![0; needed as usize * 8];
        input.read_at(at, &mut bytes)?;
        Ok(Self {
            input,
            cluster_bits,
            virtual_bytes,
            compression,
            first_level: numbers(&bytes),
            table: None,
            decompressed: None,
        })
    }

    /// The disk's size as the guest sees it.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// The size of its clusters.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Calls `visit` with each of the guest's clusters that is allocated or zero, in order.
    pub fn each_cluster<E: From<ImageError>>(
        &mut self,
        mut visit: impl FnMut(u64, Cluster) -> Result<(), E>,
    ) -> Result<(), E> {
        // Tables and data are clusters of their own: no image has more of them than clusters.
        let most = (self.input.length() >> self.cluster_bits) + 1;
        let (mut tables, mut data) = (0, 0);
        let per_table = self.cluster_bytes() / 8;
        let clusters = self.virtual_bytes.div_ceil(self.cluster_bytes());
        for index in 0..self.first_level.len() as u64 {
            let Some(table) = self.table(index).map_err(E::from)? else { continue };
            tables += 1;
            let entries = table.to_vec();
            for (entry, cluster) in entries.into_iter().zip(index * per_table..clusters) {
                if entry == 0 {
                    continue;
                }
                let found = self.cluster(entry, cluster).map_err(E::from)?;
                data += u64::from(matches!(found, Cluster::Data { .. }));
                if tables > most || data > most {
                    let what = "more clusters than it has room for";
                    return Err(ImageError::Damaged { what, offset: 0 }.into());
                }
                if found != Cluster::Unallocated {
                    visit(cluster, found)?;
                }
            }
        }
        Ok(())
    }

    /// What the image has at one of the guest's clusters.
    pub fn at(&mut self, cluster: u64) -> Result<Cluster, ImageError> {
        let per_table = self.cluster_bytes() / 8;
        if cluster >= self.virtual_bytes.div_ceil(self.cluster_bytes()) {
            return Ok(Cluster::Unallocated);
        }
        match self.table(cluster / per_table)? {
            Some(table) => {
                let entry = table[(cluster % per_table) as usize];
                self.cluster(entry, cluster)
            }
            None => Ok(Cluster::Unallocated),
        }
    }

    /// Fills a buffer with the guest's bytes from `offset` on. What the image does not have is zeros.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let cluster_bytes = self.cluster_bytes();
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let within = at % cluster_bytes;
            let length = (cluster_bytes - within).min((buffer.len() - done) as u64) as usize;
            let part = &mut buffer[done..done + length];
            match self.at(at / cluster_bytes)? {
                Cluster::Unallocated | Cluster::Zero => part.fill(0),
                Cluster::Data { offset } => {
                    let have =
                        self.input.length().saturating_sub(offset + within).min(length as u64) as usize;
                    self.input.read_at(offset + within, &mut part[..have])?;
                    part[have..].fill(0);
                }
                Cluster::Compressed { offset, bytes } => {
                    let whole = self.decompress(offset, bytes)?;
                    part.copy_from_slice(&whole[within as usize..within as usize + length]);
                }
            }
            done += length;
        }
        Ok(())
    }

    fn table(&mut self, index: u64) -> Result<Option<&[u64]>, ImageError> {
        let entry = self.first_level.get(index as usize).copied().unwrap_or(0);
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        let cluster_bytes = self.cluster_bytes();
        let fits = offset.checked_add(cluster_bytes).is_some_and(|end| end <= self.input.length());
        if !offset.is_multiple_of(cluster_bytes) || !fits {
            return Err(ImageError::Damaged { what: "a second-level table that is not there", offset });
        }
        if self.table.as_ref().is_none_or(|(known, _)| *known != offset) {
            let mut bytes = vec![0; cluster_bytes as usize];
            self.input.read_at(offset, &mut bytes)?;
            self.table = Some((offset, numbers(&bytes)));
        }
        Ok(self.table.as_ref().map(|(_, table)| table.as_slice()))
    }

    fn cluster(&self, entry: u64, cluster: u64) -> Result<Cluster, ImageError> {
        if entry & COMPRESSED != 0 {
            // The lower bits are where it begins, the upper ones in how many more sectors of 512 bytes it ends.
            let offset_bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << offset_bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
            let bytes = (sectors * 512 - offset % 512).min(self.input.length().saturating_sub(offset));
            return Ok(Cluster::Compressed { offset, bytes });
        }
        if entry & ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(Cluster::Unallocated);
        }
        if !offset.is_multiple_of(self.cluster_bytes()) {
            let offset = cluster << self.cluster_bits;
            return Err(ImageError::Damaged { what: "a cluster that does not begin where one can", offset });
        }
        Ok(Cluster::Data { offset })
    }

    fn decompress(&mut self, offset: u64, bytes: u64) -> Result<&[u8], ImageError> {
        if self.decompressed.as_ref().is_none_or(|(known, _)| *known != offset) {
            let damaged = ImageError::Damaged { what: "a compressed cluster that cannot be read", offset };
            let mut stored = vec![0; bytes as usize];
            self.input.read_at(offset, &mut stored)?;
            let length = self.cluster_bytes() as usize;
            let whole = match self.compression {
                Compression::Deflate => {
                    miniz_oxide::inflate::decompress_to_vec_with_limit(&stored, length).unwrap_or_default()
                }
                Compression::Zstd => {
                    let mut whole = Vec::new();
                    let read = zstd::stream::read::Decoder::with_buffer(&stored[..])
                        .and_then(|decoder| decoder.take(length as u64).read_to_end(&mut whole));
                    // What follows the frame belongs to others.
                    if read.is_err() && whole.len() != length {
                        whole.clear();
                    }
                    whole
                }
            };
            if whole.len() != length {
                return Err(damaged);
            }
            self.decompressed = Some((offset, whole));
        }
        Ok(self.decompressed.as_ref().map_or(&[], |(_, whole)| whole))
    }
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    let number = |bytes: &[u8]| {
        let mut array = [0; 8];
        array.copy_from_slice(bytes);
        u64::from_be_bytes(array)
    };
    bytes.chunks_exact(8).map(number).collect()
}
