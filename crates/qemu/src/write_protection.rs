//! Taking back the write protection of a live capture that was given up.
//!
//! While QEMU captures memory live, whoever writes to a page that has not been saved waits until QEMU's capture thread
//! has saved it. A capture that is cancelled, or whose reader has gone, ends that thread before QEMU takes the
//! protection back. When QEMU's main thread then writes to such a page (it delivers a frame, say), it waits for ever,
//! with QEMU's big lock in its hands, and the machine is lost. (Seen with QEMU 7.2; the code was the same later.)
//!
//! So whoever gives up a capture keeps the machine's memory [`Unprotected`] meanwhile. The capture is worth nothing
//! afterwards.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::process::ProcessId;

/// How often protection that came back is looked for: the machine may stand still so long.
const LOOK: Duration = Duration::from_millis(10);
/// More than any machine has mappings of guest memory.
const RANGES_MAX: usize = 4096;

/// Keeps a machine's memory free of write protection until it is dropped.
#[derive(Debug)]
pub struct Unprotected {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Takes all write protection of userfaultfd from a process's memory, once. Whoever waited goes on. Returns from how many
/// mappings.
pub fn lift(process: ProcessId) -> io::Result<usize> {
    let Some(pidfd) = process.pidfd().map_err(io::Error::other)? else { return Ok(0) };
    let faults = fault_descriptors(process.pid)?;
    if faults.is_empty() {
        return Ok(0);
    }
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", process.pid))?;
    let ranges = protected_ranges(&smaps);
    for theirs in faults {
        let fault = borrow(&pidfd, theirs)?;
        for range in &ranges {
            write_unprotect(&fault, *range)?;
        }
    }
    Ok(ranges.len())
}

impl Unprotected {
    /// Lifts the protection, and again whenever it is found to be back. A failure is not one of the caller's: without
    /// the right to do this, it is as if it had not been tried.
    pub fn keep(process: ProcessId) -> Self {
        // Once before returning: what the caller does next may need it.
        let mut usable = lift(process).is_ok();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let body = move || {
            while usable && !stopped.load(Ordering::Relaxed) {
                std::thread::park_timeout(LOOK);
                usable = lift(process).is_ok();
            }
        };
        let thread = std::thread::Builder::new().name("unprotect".to_owned()).spawn(body).ok();
        Self { stop, thread }
    }
}

impl Drop for Unprotected {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It cannot panic: it holds no lock and unwraps nothing.
            let _ = thread.join();
        }
    }
}

/// The numbers of a process's userfaultfd descriptors.
fn fault_descriptors(pid: u32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_fault = std::fs::read_link(entry.path())
            .is_ok_and(|target| target == Path::new("anon_inode:[userfaultfd]"));
        if let (true, Some(number)) =
            (is_fault, entry.file_name().to_str().and_then(|name| name.parse().ok()))
        {
            found.push(number);
        }
    }
    Ok(found)
}

/// A descriptor of ours for one of another process.
fn borrow(pidfd: &OwnedFd, theirs: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three numbers, and touches no memory.
    let ours = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), theirs, 0_u32) };
    let ours = i32::try_from(ours).map_err(io::Error::other)?;
    if ours < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(ours) })
}

/// `struct uffdio_writeprotect` of linux/userfaultfd.h.
#[repr(C)]
struct WriteProtect {
    start: u64,
    length: u64,
    mode: u64,
}

mod request {
    nix::ioctl_readwrite! {
        /// UFFDIO_WRITEPROTECT
        uffdio_writeprotect, 0xAA, 0x06, super::WriteProtect
    }
}

fn write_unprotect(fault: &OwnedFd, (start, end): (u64, u64)) -> io::Result<()> {
    let mut request = WriteProtect { start, length: end - start, mode: 0 };
    loop {
        // SAFETY: the kernel reads and writes one `WriteProtect`, and changes only the other process's protection.
        match unsafe { request::uffdio_writeprotect(fault.as_raw_fd(), &raw mut request) } {
            Ok(_) => return Ok(()),
            // The process's mappings are changing just now.
            Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
            // The mapping has gone or is not this descriptor's: nothing of it is protected any more.
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINVAL) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The mappings that userfaultfd protects against writes, as `/proc/PID/smaps` lists them.
fn protected_ranges(smaps: &str) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "uw") {
                ranges.extend(current);
            }
        } else if let Some(range) = mapping(line) {
            current = Some(range);
        }
    }
    ranges.truncate(RANGES_MAX);
    ranges
}

fn mapping(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protected_mappings_are_found() {
        let smaps = "\
7f30fbe00000-7f310be00000 rw-p 00000000 00:00 0 
Size:             262144 kB
VmFlags: rd wr mr mw me ac sd hg uw 
7f3110000000-7f3120000000 rw-p 00000000 00:19 7                          /dev/shm/a-b ram
Rss:                   4 kB
VmFlags: rd wr mr mw me ac sd
nonsense
";
        assert_eq!(protected_ranges(smaps), [(0x7f30_fbe0_0000, 0x7f31_0be0_0000)]);
        assert_eq!(protected_ranges("VmFlags: uw\n"), []);
    }

    #[test]
    fn a_process_without_protection_is_left_alone() {
        let process = ProcessId::of(std::process::id()).expect("read").expect("alive");
        assert_eq!(lift(process).expect("lifted"), 0);
        drop(Unprotected::keep(process));
    }
}
