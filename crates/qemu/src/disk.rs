//! Disk images: empty overlays, and a bounded look at images that users bring.
//!
//! Overlays are written here, not by another program: a cut creates one per disk while the machine runs, and starting
//! a program for each costs more than the whole cut. An overlay's header names no backing file; the chain is given by
//! block node names on QEMU's command line, so images can be moved and no header is ever trusted.

use crate::command_line::DiskFormat;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Cluster size of overlays as a power of two, 64 KiB: the unit in which the store keeps disks.
pub const DEFAULT_CLUSTER_BITS: u32 = 16;

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
const HEADER_BYTES: usize = 104;
const SECTOR_BYTES: u64 = 512;

/// QEMU's own limit on the first-level table.
const MAX_L1_BYTES: u64 = 32 << 20;

/// Incompatible features that do not change how the image is opened: dirty and corrupt are decided below,
/// compression type only matters to compressed clusters, extended second-level entries are QEMU's business.
const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY | INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The format found.
    pub format: DiskFormat,
    /// The disk's size as the guest sees it.
    pub virtual_size_bytes: u64,
    /// Whether its header names a backing file.
    pub has_backing: bool,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened or read.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is too short for what it claims to be.
    #[error("{} is a qcow2 image of {length_bytes} bytes, too short for its header", path.display())]
    TooShort {
        /// The image.
        path: PathBuf,
        /// Its length.
        length_bytes: usize,
    },
    /// A qcow2 version that QEMU does not write either.
    #[error("{} is qcow2 version {version}, only 2 and 3 are supported", path.display())]
    UnsupportedVersion {
        /// The image.
        path: PathBuf,
        /// The version.
        version: u32,
    },
    /// A cluster size outside the format.
    #[error("{} has clusters of 2^{cluster_bits} bytes, the format allows 2^9 to 2^21", path.display())]
    BadClusterBits {
        /// The image, or the overlay to be made.
        path: PathBuf,
        /// The power of two.
        cluster_bits: u32,
    },
    /// The image needs another file beside it.
    #[error("{} keeps its data in another file, which is not supported", path.display())]
    ExternalDataFile {
        /// The image.
        path: PathBuf,
    },
    /// The image stands on another.
    #[error("{} has a backing file; flatten it first", path.display())]
    HasBackingFile {
        /// The image.
        path: PathBuf,
    },
    /// The image is encrypted.
    #[error("{} is encrypted (method {method}), which is not supported", path.display())]
    Encrypted {
        /// The image.
        path: PathBuf,
        /// The header's encryption method.
        method: u32,
    },
    /// QEMU has marked the image as corrupt.
    #[error("{} is marked as corrupt; repair it first", path.display())]
    MarkedCorrupt {
        /// The image.
        path: PathBuf,
    },
    /// Features that are not known.
    #[error("{} uses unknown qcow2 features {features:#x}", path.display())]
    UnknownFeatures {
        /// The image.
        path: PathBuf,
        /// The unknown bits.
        features: u64,
    },
    /// A format that QEMU knows and this crate does not.
    #[error("{} is a {format} image; convert it to qcow2 or raw", path.display())]
    UnsupportedFormat {
        /// The image.
        path: PathBuf,
        /// The format.
        format: &'static str,
    },
    /// A size that no disk has.
    #[error("{} has a size of {virtual_size_bytes} bytes: not a positive multiple of 512, or too large", path.display())]
    BadSize {
        /// The image, or the overlay to be made.
        path: PathBuf,
        /// The size.
        virtual_size_bytes: u64,
    },
}

impl Probe {
    /// Accepts only images that need no other file.
    pub fn standalone(self, path: &Path) -> Result<Probe, DiskError> {
        if self.has_backing { Err(DiskError::HasBackingFile { path: path.to_owned() }) } else { Ok(self) }
    }
}

/// Writes an empty qcow2 image of the given virtual size to `path`, which must not exist.
///
/// The image reads as zeros by itself, and as the node below it once it is made an overlay. It takes a few kilobytes;
/// its tables are holes until the guest writes.
pub fn create_overlay(path: &Path, virtual_size_bytes: u64, cluster_bits: u32) -> Result<(), DiskError> {
    // Clusters below 4 KiB would need more than the one refcount block that is written here.
    if !(12..=21).contains(&cluster_bits) {
        return Err(DiskError::BadClusterBits { path: path.to_owned(), cluster_bits });
    }
    let cluster_bytes = 1u64 << cluster_bits;
    // One first-level entry maps one second-level table: a cluster of 8-byte entries, each a cluster of data.
    let mapped_per_entry = cluster_bytes * (cluster_bytes / 8);
    let l1_entries = virtual_size_bytes.div_ceil(mapped_per_entry);
    let l1_clusters = (l1_entries * 8).div_ceil(cluster_bytes);
    // Header, refcount table, refcount block; 16-bit counts in one block.
    let clusters = 3 + l1_clusters;
    let fits = l1_entries * 8 <= MAX_L1_BYTES && clusters <= cluster_bytes / 2;
    if virtual_size_bytes == 0 || !virtual_size_bytes.is_multiple_of(SECTOR_BYTES) || !fits {
        return Err(DiskError::BadSize { path: path.to_owned(), virtual_size_bytes });
    }
    let mut header = Vec::with_capacity(HEADER_BYTES);
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
    header.extend_from_slice(&MAGIC.to_be_bytes());
    header.extend_from_slice(&3u32.to_be_bytes()); // version
    header.extend_from_slice(&[0; 8 + 4]); // no backing file
    header.extend_from_slice(&cluster_bits.to_be_bytes());
    header.extend_from_slice(&virtual_size_bytes.to_be_bytes());
    header.extend_from_slice(&[0; 4]); // no encryption
    header.extend_from_slice(&word(l1_entries));
    header.extend_from_slice(&(3 * cluster_bytes).to_be_bytes()); // first-level table
    header.extend_from_slice(&cluster_bytes.to_be_bytes()); // refcount table
    header.extend_from_slice(&1u32.to_be_bytes()); // its clusters
    header.extend_from_slice(&[0; 4 + 8]); // no internal snapshots
    header.extend_from_slice(&[0; 3 * 8]); // no feature bits
    header.extend_from_slice(&4u32.to_be_bytes()); // refcounts of 2^4 bits
    header.extend_from_slice(&word(HEADER_BYTES as u64));
    debug_assert_eq!(header.len(), HEADER_BYTES);
    let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();

    let write = || -> io::Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.set_len(clusters * cluster_bytes)?;
        file.write_all_at(&header, 0)?;
        file.write_all_at(&(2 * cluster_bytes).to_be_bytes(), cluster_bytes)?;
        file.write_all_at(&refcounts, 2 * cluster_bytes)
    };
    write().map_err(|source| DiskError::Io { operation: "create", path: path.to_owned(), source })
}

/// Says what the image at `path` is, reading its first sector only. What is no known format is raw.
///
/// Use it on images that a user names, never on one that a guest has written: a guest may write any header to a raw
/// disk. Formats are recorded, not probed again.
pub fn probe(path: &Path) -> Result<Probe, DiskError> {
    let io_error = |operation| move |source| DiskError::Io { operation, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io_error("open"))?;
    let mut start = Vec::new();
    (&mut file).take(SECTOR_BYTES).read_to_end(&mut start).map_err(io_error("read"))?;
    if let Some(format) = foreign_format(&start) {
        return Err(DiskError::UnsupportedFormat { path: path.to_owned(), format });
    }
    let probe = if be32(&start, 0) == Some(MAGIC) {
        probe_qcow2(path, &start)?
    } else {
        // Seeking finds a block device's size too. A raw file's last sector is padded by QEMU.
        let length = file.seek(SeekFrom::End(0)).map_err(io_error("measure"))?;
        let virtual_size_bytes = length.div_ceil(SECTOR_BYTES) * SECTOR_BYTES;
        Probe { format: DiskFormat::Raw, virtual_size_bytes, has_backing: false }
    };
    let size = probe.virtual_size_bytes;
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || i64::try_from(size).is_err() {
        return Err(DiskError::BadSize { path: path.to_owned(), virtual_size_bytes: size });
    }
    Ok(probe)
}

fn probe_qcow2(path: &Path, start: &[u8]) -> Result<Probe, DiskError> {
    let too_short = || DiskError::TooShort { path: path.to_owned(), length_bytes: start.len() };
    let version = be32(start, 4).ok_or_else(too_short)?;
    if !(2..=3).contains(&version) {
        return Err(DiskError::UnsupportedVersion { path: path.to_owned(), version });
    }
    let backing_offset = be64(start, 8).ok_or_else(too_short)?;
    let cluster_bits = be32(start, 20).ok_or_else(too_short)?;
    let virtual_size_bytes = be64(start, 24).ok_or_else(too_short)?;
    let method = be32(start, 32).ok_or_else(too_short)?;
    let features = if version == 3 { be64(start, 72).ok_or_else(too_short)? } else { 0 };
    let path = || path.to_owned();
    if !(9..=21).contains(&cluster_bits) {
        return Err(DiskError::BadClusterBits { path: path(), cluster_bits });
    }
    if method != 0 {
        return Err(DiskError::Encrypted { path: path(), method });
    }
    if features & INCOMPATIBLE_DATA_FILE != 0 {
        return Err(DiskError::ExternalDataFile { path: path() });
    }
    if features & INCOMPATIBLE_CORRUPT != 0 {
        return Err(DiskError::MarkedCorrupt { path: path() });
    }
    if features & !INCOMPATIBLE_KNOWN != 0 {
        return Err(DiskError::UnknownFeatures { path: path(), features: features & !INCOMPATIBLE_KNOWN });
    }
    Ok(Probe { format: DiskFormat::Qcow2, virtual_size_bytes, has_backing: backing_offset != 0 })
}

/// Formats that would be taken for raw and then not boot. VirtualBox's magic stands after a comment.
fn foreign_format(start: &[u8]) -> Option<&'static str> {
    let known: [(usize, &[u8], &'static str); 6] = [
        (0, b"KDMV", "VMDK"),
        (0, b"# Disk DescriptorFile", "VMDK"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (64, b"\x7f\x10\xda\xbe", "VDI"),
        (0, b"QED\0", "QED"),
    ];
    known
        .iter()
        .find(|(at, magic, _)| start.get(*at..at + magic.len()) == Some(*magic))
        .map(|(_, _, name)| *name)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
