//! A machine's main memory, seen from outside its process.
//!
//! Protecting memory against writes, as a live capture does within the pause, costs one page table entry after the
//! other: about 12 ms for 256 MiB of small pages, and 0.02 ms for the same in huge ones (measured on a virtual
//! machine; see docs/benchmarks.md). Memory that a machine is started with is in huge pages, but every capture splits those that it
//! touches, so they are put together again before each.

use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};

use crate::process::ProcessId;

/// `MADV_COLLAPSE` (Linux 6.1): put the range into huge pages now.
const MADV_COLLAPSE: libc::c_int = 25;
/// As much is put together in one call, a fifth of a millisecond's work.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The page size of the machines and of the kernel.
const PAGE_BYTES: usize = 4096;
/// How many pages are touched in one call: the kernel takes 1024 ranges.
const TOUCH_PAGES: usize = 1024;

/// Why memory stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum CollapseError {
    /// The process has no private, anonymous mapping of this size: its memory is a file, or it is gone.
    #[error("process {pid} has no anonymous memory of {memory_bytes} bytes")]
    NoSuchMemory {
        /// The process.
        pid: u32,
        /// The size looked for.
        memory_bytes: u64,
    },
    /// The kernel refused: it is older than 6.1, the caller lacks CAP_SYS_NICE, or no huge page is free.
    #[error("the memory of process {pid} cannot be put into huge pages: {source}")]
    Refused {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Puts the main memory of a machine into huge pages. The machine may run meanwhile; `between` is called after each of the
/// short steps that this is done in. What is in use at that moment, twice, stays as it is, and so does what was never touched.
pub fn collapse(
    process: ProcessId,
    memory_bytes: u64,
    mut between: impl FnMut(),
) -> Result<(), CollapseError> {
    let pid = process.pid;
    let refused = |source| CollapseError::Refused { pid, source };
    let missing = || CollapseError::NoSuchMemory { pid, memory_bytes };
    let pidfd = process.pidfd().map_err(|error| refused(io::Error::other(error)))?.ok_or_else(missing)?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(refused)?;
    let start = find_anonymous(&maps, memory_bytes).ok_or_else(missing)?;
    let end = start + memory_bytes;
    for first in (start..end).step_by(HUGE_PAGE_BYTES as usize) {
        let range = first..end.min(first + HUGE_PAGE_BYTES);
        let mut outcome = collapse_range(&pidfd, &range);
        between();
        if outcome == Err(Errno::EAGAIN) {
            outcome = collapse_range(&pidfd, &range);
            between();
        }
        match outcome {
            // In use, or never touched.
            Ok(()) | Err(Errno::EAGAIN | Errno::EINVAL) => {}
            Err(error) => return Err(refused(error.into())),
        }
    }
    Ok(())
}

fn collapse_range(pidfd: &OwnedFd, range: &Range<u64>) -> Result<(), Errno> {
    let range = libc::iovec {
        iov_base: range.start as *mut libc::c_void,
        iov_len: usize::try_from(range.end - range.start).unwrap_or(usize::MAX),
    };
    // SAFETY: the kernel reads one iovec from our memory; the addresses in it are the other process's, whose pages
    // keep their contents.
    let result = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd.as_raw_fd(),
            &raw const range,
            1_usize,
            MADV_COLLAPSE,
            0_u32,
        )
    };
    Errno::result(result).map(drop)
}

/// Reads one byte of every page of a machine's main memory, so that the machine need not wait for pages to be mapped when
/// QEMU reads all of it. The machine may run meanwhile. Takes about 60 ms for each GiB.
///
/// # Errors
/// What the kernel says: the caller may not read the other process's memory, say.
pub fn touch(process: ProcessId, memory_bytes: u64) -> io::Result<()> {
    let pid = process.pid;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let start = find_anonymous(&maps, memory_bytes)
        .or_else(|| find_file(&maps, memory_bytes))
        .ok_or(io::ErrorKind::NotFound)?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
    let mut bytes = [0; TOUCH_PAGES];
    let start = usize::try_from(start).map_err(io::Error::other)?;
    let end = start + usize::try_from(memory_bytes).map_err(io::Error::other)?;
    for first in (start..end).step_by(TOUCH_PAGES * PAGE_BYTES) {
        let pages = (first..end).step_by(PAGE_BYTES).take(TOUCH_PAGES);
        let remote: Vec<RemoteIoVec> = pages.map(|base| RemoteIoVec { base, len: 1 }).collect();
        process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes[..remote.len()])], &remote)?;
    }
    Ok(())
}

/// The start of the private mapping of a RAM file.
fn find_file(maps: &str, memory_bytes: u64) -> Option<u64> {
    private_mappings(maps)
        .find(|mapping| mapping.path.starts_with('/') && mapping.end - mapping.start == memory_bytes)
        .map(|mapping| mapping.start)
}

/// The start of the private, writable, anonymous mapping that main memory is in. Neighbours that the kernel has joined
/// to it make it larger, never smaller; QEMU aligns main memory to huge pages.
fn find_anonymous(maps: &str, memory_bytes: u64) -> Option<u64> {
    private_mappings(maps)
        .filter_map(|Mapping { start, end, path }| {
            let aligned = start.next_multiple_of(HUGE_PAGE_BYTES);
            let fits = end.checked_sub(aligned)? >= memory_bytes;
            (path.is_empty() && fits).then_some((end - start, aligned))
        })
        .min()
        .map(|(_, start)| start)
}

/// The start of main memory's mapping once it is protected for a capture: the kernel then keeps it apart from its neighbours, so
/// that it has exactly this size. `None` if there is another such one.
pub(crate) fn find_protected(maps: &str, memory_bytes: u64) -> Option<u64> {
    let mut found = private_mappings(maps).filter(|mapping| mapping.end - mapping.start == memory_bytes);
    let only = found.next()?;
    found.next().is_none().then_some(only.start)
}

/// A mapping as `/proc/PID/maps` lists it.
struct Mapping<'a> {
    start: u64,
    end: u64,
    /// Empty for anonymous memory.
    path: &'a str,
}

/// The mappings that are private and writable.
fn private_mappings(maps: &str) -> impl Iterator<Item = Mapping<'_>> {
    maps.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let is_private = fields.next()? == "rw-p" && start <= end;
        is_private.then(|| Mapping { start, end, path: fields.nth(3).unwrap_or_default() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_memory_is_found_among_the_mappings() {
        let maps = "\
55d0c0000000-55d0c1000000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0040000000 rw-p 00000000 00:00 0 \n\
7f30fbe00000-7f310be00000 rw-p 00000000 00:00 0 \n\
7f3110000000-7f3120000000 rw-p 00000000 00:19 7                          /dev/shm/ram
7f3130000000-7f3140000000 r--p 00000000 00:00 0 \n";
        assert_eq!(
            find_anonymous(maps, 256 << 20),
            Some(0x7f30_fbe0_0000),
            "the smallest that is large enough"
        );
        assert_eq!(find_anonymous(maps, 512 << 20), Some(0x7f00_0000_0000));
        assert_eq!(find_anonymous(maps, 4 << 30), None);
        assert_eq!(find_file(maps, 256 << 20), Some(0x7f31_1000_0000));
        assert_eq!(find_file(maps, 255 << 20), None);
        assert_eq!(find_protected(maps, 1 << 30), Some(0x7f00_0000_0000));
        assert_eq!(find_protected(maps, 512 << 20), None, "not as a part of another");
        let twice = maps.replace("7f310be00000", "7f3107e00000").replace("7f0040000000", "7f000c000000");
        assert_eq!(find_protected(&twice, 192 << 20), None, "which of the two?");
        assert_eq!(find_anonymous("nonsense\n-\n1-2 x\n", 4096), None);
    }
}
