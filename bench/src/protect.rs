//! What write protection costs, which is most of a live snapshot's pause: userfaultfd over memory in 4 KiB pages and
//! in huge pages, as QEMU's background-snapshot does it while the machine stands still.
//!
//! Each measurement maps memory anew, writes every page (or only reads it), optionally collapses it into huge pages,
//! and then times one `UFFDIO_WRITEPROTECT` of all of it.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use crate::failure::Failure;
use crate::figures::{Outcome, Sample, Summary, table, times};
use crate::lab::{check_interrupted, say};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

// linux/userfaultfd.h
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const REGISTER_MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// How much memory, in MiB
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// How often each is measured
    #[arg(long, default_value_t = 11)]
    count: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { size: 256, count: 11 }
    }
}

/// How the memory came to be.
#[derive(Debug, Clone, Copy)]
struct Case {
    name: &'static str,
    kind: Kind,
    written: bool,
    collapse: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Anonymous,
    /// MAP_PRIVATE of a file on tmpfs, as a restored machine's memory.
    PrivateTmpfs,
}

const CASES: [Case; 6] = [
    case("anonymous, 4 KiB pages", Kind::Anonymous, true, false),
    case("anonymous, collapsed into huge pages", Kind::Anonymous, true, true),
    case("MAP_PRIVATE tmpfs, only read, 4 KiB pages", Kind::PrivateTmpfs, false, false),
    case("MAP_PRIVATE tmpfs, only read, collapsed", Kind::PrivateTmpfs, false, true),
    case("MAP_PRIVATE tmpfs, written, 4 KiB pages", Kind::PrivateTmpfs, true, false),
    case("MAP_PRIVATE tmpfs, written, collapsed", Kind::PrivateTmpfs, true, true),
];

const fn case(name: &'static str, kind: Kind, written: bool, collapse: bool) -> Case {
    Case { name, kind, written, collapse }
}

#[derive(Debug, Serialize)]
struct Row {
    memory: &'static str,
    protect_us: Summary,
    collapse_us: Option<Summary>,
    /// What MADV_COLLAPSE answered when it could not do all of it.
    collapse_refused: Option<String>,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    say("protect: userfaultfd write protection");
    let rows = CASES.iter().map(|case| measure(*case, arguments)).collect::<Result<Vec<_>, _>>()?;
    let json = serde_json::json!({ "size_mib": arguments.size, "rows": rows });
    Ok(Outcome { name: "protect", json, text: text(&rows, arguments.size), violations: Vec::new() })
}

fn measure(case: Case, arguments: &Arguments) -> Result<Row, Failure> {
    let (mut protect, mut collapse, mut refused) = (Sample::default(), Sample::default(), None);
    for _ in 0..arguments.count {
        check_interrupted()?;
        let mut memory = Memory::map(case.kind, arguments.size << 20)?;
        memory.touch(case.written);
        if case.collapse {
            let start = Instant::now();
            match memory.collapse() {
                Ok(()) => collapse.push(start.elapsed().as_secs_f64() * 1e6),
                Err(error) => refused = Some(error.to_string()),
            }
        }
        protect.push(memory.protect()?);
    }
    Ok(Row {
        memory: case.name,
        protect_us: protect.summary(),
        collapse_us: (case.collapse && refused.is_none()).then(|| collapse.summary()),
        collapse_refused: refused,
    })
}

/// A mapping that begins at a huge page's border.
#[derive(Debug)]
struct Memory {
    start: *mut u8,
    bytes: usize,
    mapped: (*mut libc::c_void, usize),
}

impl Memory {
    fn map(kind: Kind, bytes: usize) -> Result<Self, Failure> {
        // The file's own offset must agree with the address for huge pages, so address space is reserved first and
        // the memory mapped over an aligned part of it.
        let reserved = bytes + HUGE_PAGE;
        let map = |at: *mut libc::c_void, length, protection, flags, fd| {
            // SAFETY: without MAP_FIXED the kernel chooses the place; with it, the place is inside our reservation.
            let place = unsafe { libc::mmap(at, length, protection, flags, fd, 0) };
            if place == libc::MAP_FAILED {
                return Err(Failure::io("cannot map memory")(std::io::Error::last_os_error()));
            }
            Ok(place)
        };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = map(std::ptr::null_mut(), reserved, libc::PROT_NONE, anonymous, -1)?;
        let start = base.wrapping_byte_add(base.addr().next_multiple_of(HUGE_PAGE) - base.addr());
        let memory = Self { start: start.cast(), bytes, mapped: (base, reserved) };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        match kind {
            Kind::Anonymous => map(start, bytes, access, anonymous | libc::MAP_FIXED, -1)?,
            Kind::PrivateTmpfs => {
                let file = full_file(bytes)?;
                map(start, bytes, access, libc::MAP_PRIVATE | libc::MAP_FIXED, file.as_raw_fd())?
            }
        };
        // SAFETY: the range is our own mapping. Without this a kernel with THP on `always` would not give small pages.
        let advised = unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        if advised != 0 {
            return Err(Failure::io("MADV_NOHUGEPAGE")(std::io::Error::last_os_error()));
        }
        Ok(memory)
    }

    /// Writes or reads one byte of each page.
    fn touch(&mut self, write: bool) {
        for offset in (0..self.bytes).step_by(PAGE) {
            // SAFETY: inside the mapping, which is readable and writable and nobody else's.
            unsafe {
                let byte = self.start.add(offset);
                if write {
                    byte.write_volatile(1);
                } else {
                    byte.read_volatile();
                }
            }
        }
    }

    fn collapse(&mut self) -> std::io::Result<()> {
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE] {
            // SAFETY: the range is our own mapping, and the advice does not change its content.
            if unsafe { libc::madvise(self.start.cast(), self.bytes, advice) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Protects all of it and returns how long that took, in microseconds.
    fn protect(&mut self) -> Result<f64, Failure> {
        // SAFETY: a system call with one flag; the descriptor it returns is ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(Failure::io("userfaultfd (as root it is allowed)")(std::io::Error::last_os_error()));
        }
        // SAFETY: just opened, and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        let (start, bytes) = (self.start.addr() as u64, self.bytes as u64);
        control(
            &fd,
            UFFDIO_API,
            &mut [UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM, 0],
        )?;
        control(&fd, UFFDIO_REGISTER, &mut [start, bytes, REGISTER_MODE_WP, 0])?;
        let begun = Instant::now();
        control(&fd, UFFDIO_WRITEPROTECT, &mut [start, bytes, WRITEPROTECT_MODE_WP])?;
        Ok(begun.elapsed().as_secs_f64() * 1e6)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly what was reserved, and nothing refers to it any more.
        unsafe { libc::munmap(self.mapped.0, self.mapped.1) };
    }
}

/// The structures of all three requests are 64-bit words.
fn control(fd: &OwnedFd, request: libc::Ioctl, words: &mut [u64]) -> Result<(), Failure> {
    // SAFETY: each request takes a pointer to a structure of as many words as its number says, and callers pass those.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request, words.as_mut_ptr()) } == 0 {
        Ok(())
    } else {
        let what = format!("userfaultfd request {request:#x}");
        Err(Failure::io(what)(std::io::Error::last_os_error()))
    }
}

/// A file on tmpfs all of whose pages are there.
fn full_file(bytes: usize) -> Result<File, Failure> {
    use std::io::Write;
    let mut file =
        tempfile::tempfile_in("/dev/shm").map_err(Failure::io("cannot make a file in /dev/shm"))?;
    let chunk = vec![0x5a; HUGE_PAGE];
    for _ in 0..bytes / HUGE_PAGE {
        file.write_all(&chunk).map_err(Failure::io("cannot fill a file in /dev/shm"))?;
    }
    Ok(file)
}

fn text(rows: &[Row], size_mib: usize) -> String {
    let huge = rows
        .iter()
        .filter(|row| row.collapse_us.is_some())
        .map(|row| row.protect_us.median)
        .fold(f64::INFINITY, f64::min);
    let lines: Vec<_> = rows
        .iter()
        .map(|row| {
            let collapse = match (&row.collapse_us, &row.collapse_refused) {
                (Some(collapse), _) => format!("{:.1}", collapse.median / 1e3),
                (None, Some(refused)) => refused.clone(),
                (None, None) => "-".to_owned(),
            };
            vec![
                row.memory.to_owned(),
                format!("{:.3}", row.protect_us.median / 1e3),
                format!("{:.3}", row.protect_us.max / 1e3),
                times(row.protect_us.median, huge),
                collapse,
            ]
        })
        .collect();
    format!(
        "Write protection of {size_mib} MiB by userfaultfd, milliseconds.\n\n{}\n",
        table(&["memory", "protect, median", "max", "times the best", "collapse beforehand"], &lines)
    )
}
