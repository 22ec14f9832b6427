//! Sparse files in blocks of 1 MiB: walked without reading holes, written without zero pages.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::error::StoreError;
use crate::tree::PAGE_BYTES;

/// How much of a file is read at once.
const BLOCK_BYTES: u64 = 1 << 20;

const BLOCK: usize = BLOCK_BYTES as usize;
const PAGE: usize = PAGE_BYTES as usize;
/// After this much, the kernel is asked to start writing out: the fsync at the end then waits for less, and dirty
/// pages do not pile up until the kernel throttles everybody who writes.
const WRITE_OUT_BYTES: u64 = 8 << 20;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Up to [`BLOCK_BYTES`] of a file; only the last may be shorter.
pub(crate) struct Block<'a> {
    pub(crate) offset: u64,
    pub(crate) bytes: &'a [u8],
    is_zero: bool,
}

impl Block<'_> {
    pub(crate) fn is_zero(&self) -> bool {
        self.is_zero
    }

    pub(crate) fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

/// Calls `visit` with each block of the first `bytes` bytes of a file, in order. A hole is seen as zeros and not read.
pub(crate) fn walk<E>(
    file: &File,
    bytes: u64,
    read_error: impl Fn(u64, io::Error) -> E,
    mut visit: impl FnMut(Block<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; BLOCK.min(usize::try_from(bytes).unwrap_or(BLOCK))];
    // Everything from `offset` to here is a hole; asked again only once that has been passed.
    let mut next_data = 0;
    let mut offset = 0;
    while offset < bytes {
        let length = BLOCK_BYTES.min(bytes - offset);
        if next_data <= offset {
            next_data = data_from(file, offset).map_err(|e| read_error(offset, e))?;
        }
        let is_hole = next_data >= offset + length;
        let contents = if is_hole {
            &ZEROS[..length as usize]
        } else {
            let block = &mut buffer[..length as usize];
            file.read_exact_at(block, offset).map_err(|e| read_error(offset, e))?;
            &*block
        };
        visit(Block { offset, bytes: contents, is_zero: is_hole || is_zero(contents) })?;
        offset += length;
    }
    Ok(())
}

/// Writes blocks into a file, leaving out pages of zeros.
pub(crate) struct SparseWriter<'a> {
    file: &'a File,
    path: &'a Path,
    total_bytes: u64,
    written_out: u64,
}

impl<'a> SparseWriter<'a> {
    /// Empties the file and makes it one hole of `bytes` bytes.
    pub(crate) fn new(file: &'a File, path: &'a Path, bytes: u64) -> Result<Self, StoreError> {
        file.set_len(0)
            .and_then(|()| file.set_len(bytes))
            .map_err(|e| StoreError::io("size", path, e).needing(bytes))?;
        Ok(Self { file, path, total_bytes: bytes, written_out: 0 })
    }

    /// Returns how many bytes of it were in pages that are not all zeros.
    pub(crate) fn write(&mut self, block: &Block<'_>) -> Result<u64, StoreError> {
        if block.is_zero {
            return Ok(0);
        }
        let mut used = 0;
        let mut run_start = None;
        for (index, page) in block.bytes.chunks(PAGE).enumerate() {
            let start = index * PAGE;
            if is_zero(page) {
                self.write_run(block, run_start.take(), start)?;
            } else {
                run_start.get_or_insert(start);
                used += page.len() as u64;
            }
        }
        self.write_run(block, run_start, block.bytes.len())?;
        if block.end() >= self.written_out + WRITE_OUT_BYTES {
            start_writing_out(self.file, self.written_out, block.end() - self.written_out);
            self.written_out = block.end();
        }
        Ok(used)
    }

    fn write_run(&self, block: &Block<'_>, start: Option<usize>, end: usize) -> Result<(), StoreError> {
        let Some(start) = start else { return Ok(()) };
        self.file
            .write_all_at(&block.bytes[start..end], block.offset + start as u64)
            .map_err(|e| StoreError::io("write", self.path, e).needing(self.total_bytes))
    }
}

/// Compared with memcmp, which is fast in unoptimised builds too.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(BLOCK).all(|part| *part == ZEROS[..part.len()])
}

/// The first offset from `offset` on that is not in a hole; past every file where there is none.
fn data_from(file: &File, offset: u64) -> io::Result<u64> {
    let Ok(from) = i64::try_from(offset) else {
        return Err(io::ErrorKind::FileTooLarge.into());
    };
    match lseek(file, from, Whence::SeekData) {
        Ok(at) => Ok(u64::try_from(at).unwrap_or(offset)),
        Err(Errno::ENXIO) => Ok(u64::MAX),
        // A file system that knows no holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(offset),
        Err(error) => Err(error.into()),
    }
}

/// Asks the kernel to start writing a range; a hint, so that failing is no error.
pub(crate) fn start_writing_out(file: &File, offset: u64, bytes: u64) {
    let (Ok(offset), Ok(bytes)) = (i64::try_from(offset), i64::try_from(bytes)) else {
        return;
    };
    // SAFETY: takes a file descriptor, which `file` keeps open, and numbers; touches no memory of ours.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE);
    }
}
