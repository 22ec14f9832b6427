//! A [`Sink`] that writes a flat, sparse RAM file and passes the residual on.
//!
//! Pages are written with `pwrite`, not through a mapping: on a full tmpfs that is an error here, where a mapping
//! would end the process with SIGBUS. The first time a page is zero costs nothing, since a new file is all holes.

use super::splitter::{PAGE_SIZE_BYTES, Sink};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Compared as a whole, which takes the time of reading.
const ZEROS: [u8; PAGE_SIZE_BYTES] = [0; PAGE_SIZE_BYTES];

/// A RAM file that is being filled from a migration stream.
#[derive(Debug)]
pub struct RamFile<W> {
    file: File,
    residual: W,
    /// One bit a page: whether it was ever written, so that a later zero must be punched.
    written: Vec<u64>,
    /// One bit a page: whether it is kept, so that the stream's is of no use.
    kept: Vec<u64>,
}

impl<W: Write> RamFile<W> {
    /// Takes an empty file, makes it `size_bytes` long, and sends the residual to `residual`.
    pub fn new(file: File, size_bytes: u64, residual: W) -> io::Result<RamFile<W>> {
        file.set_len(0)?;
        file.set_len(size_bytes)?;
        let pages = size_bytes.div_ceil(PAGE_SIZE_BYTES as u64);
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok(RamFile { file, residual, written: vec![0; words], kept: vec![0; words] })
    }

    /// The file and the residual's writer, which is not flushed.
    pub fn into_inner(self) -> (File, W) {
        (self.file, self.residual)
    }

    /// Takes pages that did not come with the stream, from byte `offset` on. What the stream brings of them later is ignored: it
    /// may be newer, or half of it. One that is kept already stays as it is.
    ///
    /// # Errors
    /// What the file system says; `InvalidInput` for pages beyond the file, and for what is not whole pages.
    pub fn keep(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE_BYTES>();
        if !rest.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Pages in a row, of which something has to be written, are written in one call.
        let mut row = 0..0;
        for (index, page) in pages.iter().enumerate() {
            let at = offset + (index * PAGE_SIZE_BYTES) as u64;
            let (word, mask) = Self::bit(at);
            if *self.kept.get(word).ok_or(io::ErrorKind::InvalidInput)? & mask != 0 {
                continue;
            }
            if *page == ZEROS {
                self.zero_page(at)?;
            } else {
                if row.end != index {
                    self.write_row(offset, pages, &row)?;
                    row.start = index;
                }
                row.end = index + 1;
                self.written[word] |= mask;
            }
            self.kept[word] |= mask;
        }
        self.write_row(offset, pages, &row)
    }

    fn write_row(
        &self,
        offset: u64,
        pages: &[[u8; PAGE_SIZE_BYTES]],
        row: &std::ops::Range<usize>,
    ) -> io::Result<()> {
        let at = offset + (row.start * PAGE_SIZE_BYTES) as u64;
        self.file.write_all_at(pages[row.clone()].as_flattened(), at)
    }

    /// How many bytes of pages the file holds, holes not counted.
    pub fn written_bytes(&self) -> u64 {
        let pages: u64 = self.written.iter().map(|word| u64::from(word.count_ones())).sum();
        pages * PAGE_SIZE_BYTES as u64
    }

    fn bit(offset: u64) -> (usize, u64) {
        let page = offset / PAGE_SIZE_BYTES as u64;
        ((page / 64) as usize, 1 << (page % 64))
    }
}

impl<W: Write> Sink for RamFile<W> {
    fn page(&mut self, offset: u64, bytes: &[u8; PAGE_SIZE_BYTES]) -> io::Result<()> {
        let (word, mask) = Self::bit(offset);
        let written = self.written.get_mut(word).ok_or(io::ErrorKind::InvalidInput)?;
        if self.kept[word] & mask == 0 {
            self.file.write_all_at(bytes, offset)?;
            *written |= mask;
        }
        Ok(())
    }

    fn zero_page(&mut self, offset: u64) -> io::Result<()> {
        let (word, mask) = Self::bit(offset);
        let written = self.written.get_mut(word).ok_or(io::ErrorKind::InvalidInput)?;
        if self.kept[word] & mask == 0 && *written & mask != 0 {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let (at, length) = (offset.cast_signed(), PAGE_SIZE_BYTES as i64);
            fallocate(&self.file, flags, at, length)?;
            *written &= !mask;
        }
        Ok(())
    }

    fn residual(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.residual.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_last_version_wins_and_zeros_are_holes() {
        let file = tempfile::tempfile().expect("file");
        let mut ram = RamFile::new(file, 1 << 20, Vec::new()).expect("new");
        ram.page(0x3000, &[5; PAGE_SIZE_BYTES]).expect("page");
        ram.page(0x4000, &[6; PAGE_SIZE_BYTES]).expect("page");
        ram.zero_page(0x3000).expect("zero");
        ram.zero_page(0xff000).expect("zero");
        ram.residual(b"rest").expect("residual");
        assert_eq!(ram.written_bytes(), 4096);
        assert!(ram.page(1 << 20, &[1; PAGE_SIZE_BYTES]).is_err(), "outside the file");

        let (file, residual) = ram.into_inner();
        assert_eq!(residual, b"rest");
        let metadata = file.metadata().expect("metadata");
        assert_eq!(metadata.len(), 1 << 20);
        assert!(metadata.blocks() * 512 <= 8192, "{} blocks", metadata.blocks());
        let mut page = [0; PAGE_SIZE_BYTES];
        file.read_exact_at(&mut page, 0x4000).expect("read");
        assert_eq!(page, [6; PAGE_SIZE_BYTES]);
        file.read_exact_at(&mut page, 0x3000).expect("read");
        assert_eq!(page, [0; PAGE_SIZE_BYTES]);
    }

    #[test]
    fn what_is_kept_stays() {
        let file = tempfile::tempfile().expect("file");
        let mut ram = RamFile::new(file, 1 << 20, Vec::new()).expect("new");
        let page = |byte| [byte; PAGE_SIZE_BYTES];
        ram.page(0x1000, &page(1)).expect("page");
        for (offset, byte) in [(0x1000, 0), (0x2000, 0), (0x3000, 3), (0x4000, 4)] {
            ram.keep(offset, &page(byte)).expect("keep");
            ram.keep(offset, &page(7)).expect("kept already");
        }
        // In rows: of these some are kept already, one is zero, and those beyond the file are refused.
        let row = [page(8), page(8), page(0), page(6), page(5)].concat();
        ram.keep(0x4000, &row).expect("keep");
        ram.keep(0x7000, &[page(4), page(3), page(2)].concat()).expect("keep");
        assert!(ram.keep((1 << 20) - 4096, &[page(1), page(1)].concat()).is_err(), "outside the file");
        assert!(ram.keep(0xa000, &[1; 4097]).is_err(), "not whole pages");
        for offset in [0x1000, 0x2000, 0x3000, 0x5000, 0x9000] {
            ram.page(offset, &page(9)).expect("ignored");
        }
        ram.zero_page(0x4000).expect("ignored");
        assert!(ram.keep(1 << 20, &page(1)).is_err(), "outside the file");
        let (file, _) = ram.into_inner();
        let row = [(0x5000, 8), (0x6000, 0), (0x7000, 6), (0x8000, 5), (0x9000, 2), (0xa000, 0)];
        for (offset, byte) in [(0x1000, 0), (0x2000, 0), (0x3000, 3), (0x4000, 4)].into_iter().chain(row) {
            let mut found = page(8);
            file.read_exact_at(&mut found, offset).expect("read");
            assert_eq!(found, page(byte), "{offset:#x}");
        }
    }
}
