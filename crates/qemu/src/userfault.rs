//! What guests write to while they are captured: the faults of a machine whose memory is protected against writes.
//!
//! While QEMU captures a running machine, whoever writes to a page that is not saved yet waits, and QEMU's userfaultfd(2)
//! says so to whoever reads it first. QEMU's capture thread does that between two pages, so not while it waits for its
//! reader. A duplicate of the descriptor lets that reader do it instead: it copies the page out of the machine's memory,
//! [keeps](crate::migration::RamFile::keep) it, and lets the writer go on. That takes it some microseconds, whatever
//! QEMU is waiting for.
//!
//! **Why the copy is the page at the cut.** Protection is given once, before the machine goes on, and only taken away. A page
//! that is still protected after it was copied was so all the time, and nobody has written to it. One that is not any more has
//! been sent by QEMU, which sends first and unprotects then: it comes with the stream. And what the stream brings of a page
//! that is kept was perhaps read after its protection was taken away, so it is thrown away.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::memory::find_protected;
use crate::migration::PAGE_SIZE_BYTES;
use crate::process::ProcessId;

/// What `/proc/PID/fd` calls such a descriptor.
const LINK: &str = "anon_inode:[userfaultfd]";
/// How many faults are read at once: a machine has a few threads that write.
const EVENTS: usize = 16;
/// Bit 57 of an entry of `/proc/PID/pagemap`: the page is protected against writes through userfaultfd (Linux 5.13; the
/// kernel's Documentation/admin-guide/mm/pagemap.rst).
const PAGEMAP_PROTECTED: u64 = 1 << 57;

/// Who is to be helped next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// Nobody, or nobody who has not been helped.
    Nobody,
    /// Somebody waits whom only QEMU can help.
    ForQemu,
}

/// The faults of one machine that is being captured. To be dropped with the capture: while it is there, what is protected may
/// stay so.
#[derive(Debug, Default)]
pub struct WriteFaults {
    descriptors: Vec<OwnedFd>,
    /// `None`: it is only seen that somebody waits.
    memory: Option<ProtectedMemory>,
    served: u64,
    refused: Option<io::Error>,
}

/// Main memory of the machine, in its process.
#[derive(Debug)]
struct ProtectedMemory {
    pid: Pid,
    start: u64,
    bytes: u64,
    pagemap: File,
}

impl WriteFaults {
    /// Those of a machine whose memory is protected by now. Where this process may not reach that memory, or it is not found
    /// for certain, it is only seen that somebody waits.
    ///
    /// # Errors
    /// What the kernel says: this process may not trace that one (pidfd_getfd(2), ptrace(2)), or the kernel is older than 5.6.
    pub fn of(process: ProcessId, memory_bytes: u64) -> io::Result<Self> {
        let pidfd = process.pidfd().map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
        let mut descriptors = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid))? {
            let path = entry?.path();
            // One that has been closed meanwhile is none.
            if !std::fs::read_link(&path).is_ok_and(|link| link == Path::new(LINK)) {
                continue;
            }
            let number: Option<RawFd> = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let Some(number) = number {
                descriptors.push(duplicate(&pidfd, number)?);
            }
        }
        // A second one is for something else, and nobody could tell which is which.
        let memory = if descriptors.len() == 1 { ProtectedMemory::of(process, memory_bytes) } else { None };
        Ok(Self { descriptors, memory, served: 0, refused: None })
    }

    /// Whether nobody will ever be seen to wait.
    pub fn is_empty(&self) -> bool {
        self.descriptors.is_empty()
    }

    /// How many pages have been handed out.
    pub fn served(&self) -> u64 {
        self.served
    }

    /// Why no page has been handed out any more since then.
    pub fn refused(&self) -> Option<&io::Error> {
        self.refused.as_ref()
    }

    /// For so long, hands out each page that somebody wants to write to, as it was at the cut, and lets the writer go on when
    /// `keep`, which gets its offset in main memory, has kept it. Returns earlier when somebody waits for QEMU.
    ///
    /// # Errors
    /// What `keep` says. (When the kernel refuses something, all is left to QEMU from then on.)
    pub fn serve(
        &mut self,
        limit: Duration,
        keep: &mut dyn FnMut(u64, &[u8; PAGE_SIZE_BYTES]) -> io::Result<()>,
    ) -> io::Result<Waiting> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if !self.wait(left) {
                return Ok(Waiting::Nobody);
            }
            let (Some(memory), Some(descriptor)) = (&self.memory, self.descriptors.first()) else {
                return Ok(Waiting::ForQemu);
            };
            let mut events = [Event::default(); EVENTS];
            let (mut failed, mut refused) = (None, None);
            // Each of them: QEMU will not hear of these.
            for event in read_events(descriptor, &mut events) {
                match memory.serve(descriptor, event, keep) {
                    Ok(handed_out) => self.served += u64::from(handed_out),
                    Err(Unserved::Kept(error)) => failed = Some(error),
                    Err(Unserved::Refused(error)) => refused = Some(error),
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if let Some(error) = refused {
                self.memory = None;
                self.refused = Some(error);
                return Ok(Waiting::ForQemu);
            }
            if left.is_zero() {
                return Ok(Waiting::Nobody);
            }
        }
    }

    /// Waits until somebody waits for a page, for at most `limit`. Returns whether somebody does.
    fn wait(&self, limit: Duration) -> bool {
        let mut polls: Vec<_> =
            self.descriptors.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        // Interrupted, or an error: as if the time were over.
        ppoll(&mut polls, Some(TimeSpec::from_duration(limit)), None).unwrap_or(0) > 0
            && polls
                .iter()
                .any(|poll| poll.revents().is_some_and(|events| events.contains(PollFlags::POLLIN)))
    }
}

impl ProtectedMemory {
    fn of(process: ProcessId, memory_bytes: u64) -> Option<Self> {
        let proc = |name: &str| format!("/proc/{}/{name}", process.pid);
        let maps = std::fs::read_to_string(proc("maps")).ok()?;
        let start = find_protected(&maps, memory_bytes)?;
        let pagemap = File::open(proc("pagemap")).ok()?;
        Some(Self { pid: Pid::from_raw(process.pid.cast_signed()), start, bytes: memory_bytes, pagemap })
    }

    /// Returns whether a page was handed out.
    fn serve(
        &self,
        descriptor: &OwnedFd,
        event: &Event,
        keep: &mut dyn FnMut(u64, &[u8; PAGE_SIZE_BYTES]) -> io::Result<()>,
    ) -> Result<bool, Unserved> {
        let address = event.address & !(PAGE_SIZE_BYTES as u64 - 1);
        let inside = address.checked_sub(self.start).filter(|offset| *offset < self.bytes);
        let Some(offset) = inside.filter(|_| event.is_write_fault()) else {
            // Other memory, such as a display's: its writer faults once more, for QEMU to see.
            wake(descriptor, address)?;
            return Err(Unserved::Refused(io::Error::other("a fault in other memory")));
        };
        let mut page = [0; PAGE_SIZE_BYTES];
        let base = usize::try_from(address).map_err(io::Error::other)?;
        let remote = [RemoteIoVec { base, len: PAGE_SIZE_BYTES }];
        let read = process_vm_readv(self.pid, &mut [IoSliceMut::new(&mut page)], &remote);
        // After the copy, not before it.
        if read.map_err(io::Error::from)? != PAGE_SIZE_BYTES || !self.is_protected(address)? {
            wake(descriptor, address)?;
            return Ok(false);
        }
        let kept = keep(offset, &page);
        // Kept or not: nobody is to wait for what has failed.
        unprotect(descriptor, address)?;
        kept.map(|()| true).map_err(Unserved::Kept)
    }

    fn is_protected(&self, address: u64) -> io::Result<bool> {
        let mut entry = [0; 8];
        self.pagemap.read_exact_at(&mut entry, address / PAGE_SIZE_BYTES as u64 * 8)?;
        Ok(u64::from_ne_bytes(entry) & PAGEMAP_PROTECTED != 0)
    }
}

/// Why a page was not handed out.
#[derive(Debug)]
enum Unserved {
    /// It could not be kept.
    Kept(io::Error),
    /// It is QEMU's.
    Refused(io::Error),
}

impl From<io::Error> for Unserved {
    /// What the kernel says.
    fn from(error: io::Error) -> Self {
        Self::Refused(error)
    }
}

/// `struct uffd_msg` of linux/userfaultfd.h, as it is for page faults.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Event {
    kind: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;

impl Event {
    fn is_write_fault(&self) -> bool {
        self.kind == UFFD_EVENT_PAGEFAULT && self.flags & UFFD_PAGEFAULT_FLAG_WP != 0
    }
}

/// `struct uffdio_range` of linux/userfaultfd.h.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

/// `struct uffdio_writeprotect` of linux/userfaultfd.h. Mode 0: not protected, and whoever waits goes on; 1: protected; 2: not
/// protected, and nobody is woken.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const UFFDIO_WAKE: libc::c_ulong = nix::request_code_read!(0xaa, 0x02, size_of::<Range>());
const UFFDIO_WRITEPROTECT: libc::c_ulong =
    nix::request_code_readwrite!(0xaa, 0x06, size_of::<WriteProtect>());

impl Range {
    fn page(address: u64) -> Self {
        Self { start: address, length: PAGE_SIZE_BYTES as u64 }
    }
}

/// Whoever waits for the page tries again.
fn wake(descriptor: &OwnedFd, address: u64) -> io::Result<()> {
    let range = Range::page(address);
    // SAFETY: the kernel reads `range`; the addresses in it are the other process's, whose memory keeps its contents.
    Errno::result(unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_WAKE, &raw const range) })?;
    Ok(())
}

/// Whoever waits for the page goes on.
fn unprotect(descriptor: &OwnedFd, address: u64) -> io::Result<()> {
    write_protect(descriptor, WriteProtect { range: Range::page(address), mode: 0 })
}

fn write_protect(descriptor: &OwnedFd, mut protect: WriteProtect) -> io::Result<()> {
    loop {
        // SAFETY: the kernel reads and writes `protect`; the addresses in it are the other process's, whose memory keeps its
        // contents.
        let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) };
        match Errno::result(result) {
            Ok(_) => return Ok(()),
            // Its mappings are just being changed.
            Err(Errno::EAGAIN) => std::thread::yield_now(),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The faults that there are now; none when somebody else has read them.
fn read_events<'a>(descriptor: &OwnedFd, events: &'a mut [Event]) -> &'a [Event] {
    let length = size_of_val(events);
    // SAFETY: the kernel writes whole events into the array, for which any bytes are valid.
    let read = unsafe { libc::read(descriptor.as_raw_fd(), events.as_mut_ptr().cast(), length) };
    &events[..usize::try_from(read).unwrap_or(0) / size_of::<Event>()]
}

fn duplicate(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes numbers only.
    let copy = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_them_has_none_and_the_time_passes() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a child");
        let process = ProcessId::of(child.id()).expect("readable").expect("it is there");
        let faults = WriteFaults::of(process, 1 << 20);
        child.kill().and_then(|()| child.wait()).expect("it ends");
        let mut faults = faults.expect("one's own child");
        assert!(faults.is_empty());
        let began = Instant::now();
        let waiting = faults.serve(Duration::from_millis(5), &mut |_, _| panic!("nobody writes"));
        assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
        assert!(began.elapsed() >= Duration::from_millis(5));
    }

    /// Memory of this process that is protected as QEMU does it.
    struct Protected {
        start: u64,
        bytes: u64,
        descriptor: OwnedFd,
    }

    impl Protected {
        /// Of a size that nothing else has.
        fn new(pages: u64) -> Self {
            let bytes = pages * PAGE_SIZE_BYTES as u64;
            let length = usize::try_from(bytes).expect("small");
            let (access, kind) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping, wherever there is room.
            let memory = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
            assert_ne!(memory, libc::MAP_FAILED);
            // SAFETY: it is this long, and nobody else knows it.
            unsafe { memory.cast::<u8>().write_bytes(5, length) };
            let descriptor = crate::capability::userfaultfd_by_call().expect("permitted, as for QEMU");
            let start = memory as u64;
            let range = Range { start, length: bytes };
            assert!(crate::capability::supports_write_protection(&descriptor));
            // `struct uffdio_register`: the range, the mode (write protection), and what is answered.
            let mut register: [u64; 4] = [range.start, range.length, 2, 0];
            let request = nix::request_code_readwrite!(0xaa, 0x00, 32);
            // SAFETY: `register` has the layout that the request reads and writes; the range is the mapping.
            let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), request, &raw mut register) };
            Errno::result(answer).expect("the kernel takes it");
            write_protect(&descriptor, WriteProtect { range, mode: 1 }).expect("protected");
            Self { start, bytes, descriptor }
        }

        fn faults(&self) -> WriteFaults {
            let me = ProcessId::of(std::process::id()).expect("readable").expect("this process is there");
            let memory = ProtectedMemory::of(me, self.bytes);
            assert!(memory.is_some(), "it is found");
            let descriptors = vec![self.descriptor.try_clone().expect("a duplicate")];
            WriteFaults { descriptors, memory, served: 0, refused: None }
        }

        fn byte(&self, page: u64) -> *mut u8 {
            (self.start + page * PAGE_SIZE_BYTES as u64) as *mut u8
        }

        fn get(&self, page: u64) -> u8 {
            // SAFETY: within the mapping; other threads' writes are waited for, or not looked at.
            unsafe { self.byte(page).read_volatile() }
        }

        /// Waits while the page is protected.
        fn set(&self, page: u64, byte: u8) {
            // SAFETY: as above.
            unsafe { self.byte(page).write_volatile(byte) };
        }
    }

    impl Drop for Protected {
        fn drop(&mut self) {
            // SAFETY: nobody uses it any more.
            unsafe { libc::munmap(self.byte(0).cast(), usize::try_from(self.bytes).expect("small")) };
        }
    }

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn a_page_is_handed_out_as_it_was_and_its_writer_goes_on() {
        let memory = Protected::new(1027);
        let mut faults = memory.faults();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| [3, 7, 3].map(|page| memory.set(page, 9)));
            let mut kept = Vec::new();
            while !writer.is_finished() {
                let waiting = faults.serve(Duration::from_millis(1), &mut |offset, page| {
                    kept.push((offset, page.iter().all(|byte| *byte == 5)));
                    Ok(())
                });
                assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
            }
            assert_eq!(kept, [(3 * 4096, true), (7 * 4096, true)], "each once");
        });
        assert_eq!([2, 3, 7].map(|page| memory.get(page)), [5, 9, 9]);
        assert_eq!(faults.served(), 2);
        // One that cannot be kept: its writer goes on all the same.
        std::thread::scope(|scope| {
            scope.spawn(|| memory.set(4, 9));
            let error = faults.serve(LONG, &mut |_, _| Err(io::ErrorKind::StorageFull.into()));
            assert_eq!(error.expect_err("no room").kind(), io::ErrorKind::StorageFull);
        });
        assert_eq!((memory.get(4), faults.served()), (9, 2));
    }

    #[test]
    fn a_page_that_is_not_protected_any_more_is_not_handed_out() {
        let memory = Protected::new(1031);
        let mut faults = memory.faults();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| memory.set(3, 9));
            assert!(faults.wait(LONG), "the writer waits");
            // As if QEMU had saved it meanwhile, and somebody else had written to it, before the waiting thread runs again.
            let quietly = WriteProtect { range: Range::page(memory.byte(3) as u64), mode: 2 };
            write_protect(&memory.descriptor, quietly).expect("unprotected, and nobody woken");
            memory.set(3, 6);
            while !writer.is_finished() {
                let waiting = faults.serve(Duration::from_millis(1), &mut |_, _| Ok(()));
                assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
            }
        });
        assert_eq!((memory.get(3), faults.served()), (9, 0), "it is newer than the cut");
    }

    #[test]
    fn what_is_not_main_memory_is_left_to_others() {
        let memory = Protected::new(1033);
        let mut faults = memory.faults();
        // All but the last page.
        faults.memory.as_mut().expect("found").bytes -= PAGE_SIZE_BYTES as u64;
        std::thread::scope(|scope| {
            scope.spawn(|| memory.set(1032, 9));
            assert!(faults.memory.is_some());
            for _ in 0..2 {
                let waiting = faults.serve(LONG, &mut |_, _| Ok(()));
                assert_eq!(waiting.expect("nothing fails"), Waiting::ForQemu);
            }
            unprotect(&memory.descriptor, memory.byte(1032) as u64).expect("as QEMU does it");
        });
        assert!(faults.memory.is_none() && faults.refused().is_some());
        assert_eq!((memory.get(1032), faults.served()), (9, 0));
    }

    #[test]
    fn the_kernel_knows_these_layouts() {
        assert_eq!((size_of::<Event>(), size_of::<Range>(), size_of::<WriteProtect>()), (32, 16, 24));
    }
}
