//! qcow2 images without a QEMU: what a layer maps where, and whole new images of such clusters.
//!
//! Owns the format's bytes ([`Image`] reads them, [`ImageWriter`] writes them) and no policy: which layers make a disk,
//! and where their bytes come from, is the caller's. Everything that is read is hostile: sizes are bounded by the
//! file's length, and every offset is checked before it is used.

mod reader;
mod writer;

use std::io;

pub use reader::{Cluster, Image};
pub use writer::{Backing, ImageWriter, MAX_VIRTUAL_BYTES, WRITTEN_CLUSTER_BYTES};

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// QEMU's own limit on the first-level table.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Its cluster is nobody else's.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Bytes at offsets: a file, or something that behaves alike.
pub trait ReadAt {
    /// Fills the buffer from `offset` on, all of it. The caller stays within [`ReadAt::length`].
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// How many bytes there are.
    fn length(&self) -> u64;
}

/// A file of a length that does not change.
#[derive(Debug)]
pub struct FileBytes {
    file: std::fs::File,
    length: u64,
}

impl FileBytes {
    /// All of a file.
    pub fn new(file: std::fs::File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }
}

impl ReadAt for FileBytes {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buffer, offset)
    }

    fn length(&self) -> u64 {
        self.length
    }
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The bytes cannot be had.
    #[error("the image cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It contradicts itself or the format.
    #[error("the image is damaged: {what} at offset {offset}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// Where, in bytes.
        offset: u64,
    },
    /// It uses something that is not read here.
    #[error("the image has {what}, which is not supported here")]
    Unsupported {
        /// What.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests;
