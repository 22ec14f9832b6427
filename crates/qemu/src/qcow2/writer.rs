//! Writing an image: clusters as they come, tables behind them, the header last.
//!
//! Invariant: until [`ImageWriter::finish`] has written the header, the file is no image.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{COPIED, MAGIC, ZERO};
use crate::command_line::DiskFormat;

const CLUSTER_BITS: u32 = 16;
/// The size of clusters that are written.
pub const WRITTEN_CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// The largest disk.
pub const MAX_VIRTUAL_BYTES: u64 = 64 << 40;
const ENTRIES: usize = (WRITTEN_CLUSTER_BYTES / 8) as usize;
/// A block of 16-bit counts covers this many clusters.
const COUNTS: u64 = WRITTEN_CLUSTER_BYTES / 2;
const HEADER_BYTES: u32 = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const BACKING_NAME_BYTES_MAX: usize = 1023;

/// The image under a written one.
#[derive(Debug, Clone, Copy)]
pub struct Backing<'a> {
    /// Its path, as it will stand in the header.
    pub path: &'a Path,
    /// What it is.
    pub format: DiskFormat,
}

/// An image in the making. Its caller writes the clusters' bytes.
#[derive(Debug)]
pub struct ImageWriter {
    virtual_bytes: u64,
    /// By first-level entry.
    tables: Vec<Option<Box<[u64]>>>,
    /// The cluster that comes next; the header is number 0.
    next: u64,
}

impl ImageWriter {
    /// An empty image of this size, at most [`MAX_VIRTUAL_BYTES`].
    pub fn new(virtual_bytes: u64) -> Self {
        assert!(virtual_bytes <= MAX_VIRTUAL_BYTES, "{virtual_bytes} bytes");
        let tables = virtual_bytes.div_ceil(WRITTEN_CLUSTER_BYTES * ENTRIES as u64);
        Self { virtual_bytes, tables: vec![None; tables as usize], next: 1 }
    }

    /// Where the bytes of this cluster of the guest's are to be written.
    pub fn allocate(&mut self, cluster: u64) -> u64 {
        let offset = self.next * WRITTEN_CLUSTER_BYTES;
        self.next += 1;
        *self.entry(cluster) = offset | COPIED;
        offset
    }

    /// Makes a cluster of the guest's read as zeros, whatever is below.
    pub fn zero(&mut self, cluster: u64) {
        *self.entry(cluster) = ZERO;
    }

    /// Writes the tables, and then the header. Not durable yet.
    pub fn finish(self, file: &File, backing: Option<Backing<'_>>) -> io::Result<()> {
        let mut next = self.next;
        let mut first_level = Vec::with_capacity(self.tables.len() * 8);
        for table in &self.tables {
            let entry = match table {
                Some(table) => {
                    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
                    file.write_all_at(&bytes, next * WRITTEN_CLUSTER_BYTES)?;
                    next += 1;
                    ((next - 1) * WRITTEN_CLUSTER_BYTES) | COPIED
                }
                None => 0,
            };
            first_level.extend_from_slice(&entry.to_be_bytes());
        }
        let first_level_at = next * WRITTEN_CLUSTER_BYTES;
        file.write_all_at(&first_level, first_level_at)?;
        next += clusters(first_level.len() as u64).max(1);

        // Counts cover themselves.
        let (mut blocks, mut block_table) = (0, 0);
        loop {
            let all = next + blocks + block_table;
            let needed = (all.div_ceil(COUNTS), clusters(all.div_ceil(COUNTS) * 8));
            if needed == (blocks, block_table) {
                break;
            }
            (blocks, block_table) = needed;
        }
        let table_at = next;
        let all = next + blocks + block_table;
        let offsets: Vec<u8> = (0..blocks)
            .flat_map(|block| ((table_at + block_table + block) * WRITTEN_CLUSTER_BYTES).to_be_bytes())
            .collect();
        file.write_all_at(&offsets, table_at * WRITTEN_CLUSTER_BYTES)?;
        for block in 0..blocks {
            let counted = (all - block * COUNTS).min(COUNTS) as usize;
            let bytes = 1_u16.to_be_bytes().repeat(counted);
            file.write_all_at(&bytes, (table_at + block_table + block) * WRITTEN_CLUSTER_BYTES)?;
        }
        file.set_len(all * WRITTEN_CLUSTER_BYTES)?;
        let header = self.header(first_level_at, table_at * WRITTEN_CLUSTER_BYTES, block_table, backing)?;
        file.write_all_at(&header, 0)
    }

    fn header(
        &self,
        first_level_at: u64,
        counts_at: u64,
        count_clusters: u64,
        backing: Option<Backing<'_>>,
    ) -> io::Result<Vec<u8>> {
        let mut extensions = Vec::new();
        let mut name: &[u8] = &[];
        if let Some(backing) = backing {
            name = backing.path.as_os_str().as_bytes();
            if name.len() > BACKING_NAME_BYTES_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidFilename,
                    "the path of the image below is too long for a qcow2 header",
                ));
            }
            let format = backing.format.name().as_bytes();
            extensions.extend_from_slice(&BACKING_FORMAT.to_be_bytes());
            extensions.extend_from_slice(&(format.len() as u32).to_be_bytes());
            extensions.extend_from_slice(format);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // The end of the extensions.
        extensions.extend_from_slice(&[0; 8]);
        let name_at = if name.is_empty() { 0 } else { u64::from(HEADER_BYTES) + extensions.len() as u64 };
        let mut header = Vec::new();
        header.extend_from_slice(&MAGIC.to_be_bytes());
        header.extend_from_slice(&3_u32.to_be_bytes()); // version
        header.extend_from_slice(&name_at.to_be_bytes());
        header.extend_from_slice(&(name.len() as u32).to_be_bytes());
        header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
        header.extend_from_slice(&self.virtual_bytes.to_be_bytes());
        header.extend_from_slice(&[0; 4]); // no encryption
        header.extend_from_slice(&(self.tables.len() as u32).to_be_bytes());
        header.extend_from_slice(&first_level_at.to_be_bytes());
        header.extend_from_slice(&counts_at.to_be_bytes());
        header.extend_from_slice(&(count_clusters as u32).to_be_bytes());
        header.extend_from_slice(&[0; 4 + 8]); // no internal snapshots
        header.extend_from_slice(&[0; 3 * 8]); // no feature bits
        header.extend_from_slice(&4_u32.to_be_bytes()); // counts of 2^4 bits
        header.extend_from_slice(&HEADER_BYTES.to_be_bytes());
        debug_assert_eq!(header.len(), HEADER_BYTES as usize);
        header.extend_from_slice(&extensions);
        header.extend_from_slice(name);
        Ok(header)
    }

    fn entry(&mut self, cluster: u64) -> &mut u64 {
        let (table, entry) = ((cluster as usize) / ENTRIES, (cluster as usize) % ENTRIES);
        &mut self.tables[table].get_or_insert_with(|| vec![0; ENTRIES].into())[entry]
    }
}

fn clusters(bytes: u64) -> u64 {
    bytes.div_ceil(WRITTEN_CLUSTER_BYTES)
}
