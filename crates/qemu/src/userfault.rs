//! What guests write to while they are captured: the faults of a machine whose memory is protected against writes.
//!
//! While QEMU captures a running machine, whoever writes to a page that is not saved yet waits, and QEMU's userfaultfd(2)
//! says so to whoever reads it first. QEMU's capture thread does that between two pages, so not while it waits for its
//! reader. A duplicate of the descriptor lets that reader do it instead: it copies the page out of the machine's memory,
//! [keeps](crate::migration::RamFile::keep) it, and lets the writer go on. That takes it some microseconds, whatever
//! QEMU is waiting for.
//!
//! Having that, it need not wait until somebody writes: it [takes](WriteFaults::take) the rest as well, many pages at once, which
//! costs a fifth of what QEMU's three system calls a page do. Then nobody waits any more, and what QEMU still sends can take as
//! long as it likes.
//!
//! **Why the copy is the page at the cut.** Protection is given once, before the machine goes on, and only taken away. A page
//! that is still protected after it was copied was so all the time, and nobody has written to it. One that is not any more has
//! been sent by QEMU, which sends first and unprotects then: it comes with the stream. And what the stream brings of a page
//! that is kept was perhaps read after its protection was taken away, so it is thrown away.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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
/// The most pages that are taken at once: some 80 µs, in which nobody is served.
const TAKEN_PAGES: usize = 64;
/// How many pages are handed out when somebody wants to write to one of them: those around it, which are often next.
const AROUND_PAGES: usize = 16;
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
    taken: u64,
    refused: Option<io::Error>,
}

/// Main memory of the machine, in its process.
#[derive(Debug)]
struct ProtectedMemory {
    pid: Pid,
    start: u64,
    bytes: u64,
    pagemap: File,
    /// Up to where pages were taken.
    next: u64,
    /// Pages that were copied, and are not kept yet.
    copies: Vec<u8>,
}

/// Keeps pages, one or more, that begin at this offset in main memory.
type Keep<'a> = dyn FnMut(u64, &[u8]) -> io::Result<()> + 'a;

impl WriteFaults {
    /// Those of a machine whose memory is protected by now. Where this process may not reach that memory, or it is not found
    /// for certain, it is only seen that somebody waits.
    ///
    /// # Errors
    /// What the kernel says: this process may not trace that one (pidfd_getfd(2), ptrace(2)), or the kernel is older than 5.6.
    pub fn of(process: ProcessId, memory_bytes: u64) -> io::Result<Self> {
        let descriptors = process.duplicates(Path::new(LINK))?;
        // A second one is for something else, and nobody could tell which is which.
        let memory = if descriptors.len() == 1 { ProtectedMemory::of(process, memory_bytes) } else { None };
        Ok(Self { descriptors, memory, served: 0, taken: 0, refused: None })
    }

    /// Whether nobody will ever be seen to wait.
    pub fn is_empty(&self) -> bool {
        self.descriptors.is_empty()
    }

    /// Whether pages are handed out and taken here, or all is left to QEMU.
    pub fn takes(&self) -> bool {
        self.memory.is_some()
    }

    /// How many pages have been handed out.
    pub fn served(&self) -> u64 {
        self.served
    }

    /// How many pages nobody had asked for when they were taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Why no page has been handed out any more since then.
    pub fn refused(&self) -> Option<&io::Error> {
        self.refused.as_ref()
    }

    /// For so long, hands out each page that somebody wants to write to, and some around it, as they were at the cut, and lets the
    /// writer go on when `keep`, which gets their offset in main memory, has kept them. Returns earlier when somebody waits for
    /// QEMU.
    ///
    /// # Errors
    /// What `keep` says. (When the kernel refuses something, all is left to QEMU from then on.)
    pub fn serve(&mut self, limit: Duration, keep: &mut Keep) -> io::Result<Waiting> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if !self.wait(left) {
                return Ok(Waiting::Nobody);
            }
            let (Some(memory), Some(descriptor)) = (&mut self.memory, self.descriptors.first()) else {
                return Ok(Waiting::ForQemu);
            };
            let mut events = [Event::default(); EVENTS];
            let (mut failed, mut refused) = (None, None);
            // Each of them: QEMU will not hear of these.
            for event in read_events(descriptor, &mut events) {
                match memory.serve(descriptor, event, keep) {
                    Ok(handed_out) => self.served += handed_out,
                    Err(Unserved::Kept(error)) => failed = Some(error),
                    Err(Unserved::Refused(error)) => refused = Some(error),
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if let Some(error) = refused {
                self.refuse(error);
                return Ok(Waiting::ForQemu);
            }
            if left.is_zero() {
                return Ok(Waiting::Nobody);
            }
        }
    }

    /// Takes the next few pages of main memory that are still protected, and lets everybody write to them. Returns how many pages
    /// it has come further, `None` when it has been everywhere, or when all is left to QEMU.
    ///
    /// # Errors
    /// What `keep` says. (When the kernel refuses something, all is left to QEMU from then on.)
    pub fn take(&mut self, keep: &mut Keep) -> io::Result<Option<u64>> {
        let (Some(memory), Some(descriptor)) = (&mut self.memory, self.descriptors.first()) else {
            return Ok(None);
        };
        let offset = memory.next;
        let left = (memory.bytes - offset) / PAGE_SIZE_BYTES as u64;
        let pages = left.min(TAKEN_PAGES as u64);
        if pages == 0 {
            return Ok(None);
        }
        memory.next += pages * PAGE_SIZE_BYTES as u64;
        match memory.take(descriptor, offset, pages as usize, keep) {
            Ok(taken) => self.taken += taken,
            Err(Unserved::Kept(error)) => return Err(error),
            Err(Unserved::Refused(error)) => {
                self.refuse(error);
                return Ok(None);
            }
        }
        Ok(Some(pages))
    }

    fn refuse(&mut self, error: io::Error) {
        self.memory = None;
        self.refused = Some(error);
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
        let copies = vec![0; TAKEN_PAGES * PAGE_SIZE_BYTES];
        let pid = Pid::from_raw(process.pid.cast_signed());
        Some(Self { pid, start, bytes: memory_bytes, pagemap, next: 0, copies })
    }

    /// Returns how many pages were handed out.
    fn serve(&mut self, descriptor: &OwnedFd, event: &Event, keep: &mut Keep) -> Result<u64, Unserved> {
        let address = event.address & !(PAGE_SIZE_BYTES as u64 - 1);
        let inside = address.checked_sub(self.start).filter(|offset| *offset < self.bytes);
        let taken = match inside.filter(|_| event.is_write_fault()) {
            Some(offset) => {
                let first = offset - offset % (AROUND_PAGES * PAGE_SIZE_BYTES) as u64;
                let left = (self.bytes - first) / PAGE_SIZE_BYTES as u64;
                self.take(descriptor, first, left.min(AROUND_PAGES as u64) as usize, keep)
            }
            None => Err(Unserved::Refused(io::Error::other("a fault in other memory"))),
        };
        // Perhaps it was not protected any more, or it is other memory, such as a display's: its writer faults once more, for
        // QEMU to see.
        let woken = wake(descriptor, address);
        // What could not be kept must not be taken for something that QEMU may still send.
        let taken = taken?;
        woken?;
        Ok(taken)
    }

    /// Keeps those of some pages that are still protected, and takes their protection away. Returns how many.
    fn take(
        &mut self,
        descriptor: &OwnedFd,
        offset: u64,
        pages: usize,
        keep: &mut Keep,
    ) -> Result<u64, Unserved> {
        let address = self.start + offset;
        let copies = &mut self.copies[..pages * PAGE_SIZE_BYTES];
        let base = usize::try_from(address).map_err(io::Error::other)?;
        let remote = [RemoteIoVec { base, len: copies.len() }];
        let read = process_vm_readv(self.pid, &mut [IoSliceMut::new(copies)], &remote);
        if read.map_err(io::Error::from)? != copies.len() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        // After the copy, not before it.
        let mut entries = [0; TAKEN_PAGES * 8];
        let entries = &mut entries[..pages * 8];
        self.pagemap.read_exact_at(entries, address / PAGE_SIZE_BYTES as u64 * 8)?;
        let (entries, _) = entries.as_chunks();
        let is_protected = |page: &usize| u64::from_ne_bytes(entries[*page]) & PAGEMAP_PROTECTED != 0;
        let (mut taken, mut first) = (0, 0);
        while first < pages {
            let run = (first..pages).take_while(is_protected).count();
            if run > 0 {
                let (at, length) = (first * PAGE_SIZE_BYTES, run * PAGE_SIZE_BYTES);
                let kept = keep(offset + at as u64, &copies[at..at + length]);
                // Kept or not: nobody is to wait for what has failed.
                unprotect(descriptor, Range { start: address + at as u64, length: length as u64 })?;
                kept.map_err(Unserved::Kept)?;
                taken += run as u64;
            }
            first += run + 1;
        }
        Ok(taken)
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

/// Whoever waits for these pages goes on.
fn unprotect(descriptor: &OwnedFd, range: Range) -> io::Result<()> {
    write_protect(descriptor, WriteProtect { range, mode: 0 })
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
            WriteFaults { descriptors, memory, ..WriteFaults::default() }
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
            // The last ones have fewer around them.
            let writer = scope.spawn(|| [3, 40, 3, 7, 1026].map(|page| memory.set(page, 9)));
            let mut kept = Vec::new();
            while !writer.is_finished() {
                let waiting = faults.serve(Duration::from_millis(1), &mut |offset, pages| {
                    kept.push((offset / 4096, pages.len() / 4096));
                    assert!(pages.iter().all(|byte| *byte == 5), "as they were");
                    Ok(())
                });
                assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
            }
            assert_eq!(kept, [(0, 16), (32, 16), (1024, 3)], "each once, and those around it");
        });
        assert_eq!([2, 3, 7, 40, 1026].map(|page| memory.get(page)), [5, 9, 9, 9, 9]);
        assert_eq!(faults.served(), 35);
        // One that cannot be kept: its writer goes on all the same.
        std::thread::scope(|scope| {
            scope.spawn(|| memory.set(100, 9));
            let error = faults.serve(LONG, &mut |_, _| Err(io::ErrorKind::StorageFull.into()));
            assert_eq!(error.expect_err("no room").kind(), io::ErrorKind::StorageFull);
        });
        assert_eq!((memory.get(100), faults.served()), (9, 35));
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
                let waiting = faults.serve(Duration::from_millis(1), &mut |offset, pages| {
                    let first = offset / 4096;
                    assert!(
                        !(first..first + pages.len() as u64 / 4096).contains(&3),
                        "it is newer than the cut"
                    );
                    Ok(())
                });
                assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
            }
        });
        assert_eq!((memory.get(3), faults.served()), (9, 15), "only those around it");
    }

    #[test]
    fn all_that_is_still_protected_is_taken() {
        let memory = Protected::new(1035);
        let mut faults = memory.faults();
        // As if QEMU had saved it, and somebody had written to it since: the first, the last, some of a row, all of one.
        let gone = [0, 3, 4, 70, 1034].into_iter().chain(128..192);
        for page in gone.clone() {
            unprotect(&memory.descriptor, Range::page(memory.byte(page) as u64)).expect("as QEMU does it");
            memory.set(page, 6);
        }
        let mut kept = Vec::new();
        let mut pages = 0;
        std::thread::scope(|scope| {
            // Who waits goes on, whether the page is handed out to it or taken before.
            let writer = scope.spawn(|| (0..1035).rev().step_by(50).for_each(|page| memory.set(page, 9)));
            let mut keep = |offset, bytes: &[u8]| {
                assert!(bytes.iter().all(|byte| *byte == 5), "as it was");
                kept.extend((0..bytes.len() as u64 / 4096).map(|page| offset / 4096 + page));
                Ok(())
            };
            while let Some(further) = faults.take(&mut keep).expect("nothing fails") {
                pages += further;
                let waiting = faults.serve(Duration::from_micros(100), &mut keep).expect("nothing fails");
                assert_eq!(waiting, Waiting::Nobody);
            }
            while !writer.is_finished() {
                faults.serve(Duration::from_millis(1), &mut keep).expect("nothing fails");
            }
        });
        assert_eq!((pages, faults.refused().is_none()), (1035, true));
        assert_eq!(faults.served() + faults.taken(), kept.len() as u64);
        kept.sort_unstable();
        let gone: Vec<u64> = gone.collect();
        let expected: Vec<u64> = (0..1035).filter(|page| !gone.contains(page)).collect();
        assert_eq!(kept, expected, "each once");
        // Nobody waits any more.
        (0..1035).for_each(|page| memory.set(page, 7));
        assert_eq!(faults.take(&mut |_, _| Ok(())).expect("nothing fails"), None);
    }

    #[test]
    fn what_cannot_be_taken_is_free_all_the_same() {
        let memory = Protected::new(1037);
        let mut faults = memory.faults();
        let error = faults.take(&mut |_, _| Err(io::ErrorKind::StorageFull.into())).expect_err("no room");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        (0..TAKEN_PAGES as u64).for_each(|page| memory.set(page, 7));
        // Memory that is not there: all is left to QEMU.
        faults.memory.as_mut().expect("found").start = 4096;
        assert_eq!(faults.take(&mut |_, _| panic!("a page of what?")).expect("nothing fails"), None);
        assert!(faults.memory.is_none() && faults.refused().is_some());
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
            unprotect(&memory.descriptor, Range::page(memory.byte(1032) as u64)).expect("as QEMU does it");
        });
        assert!(faults.memory.is_none() && faults.refused().is_some());
        assert_eq!((memory.get(1032), faults.served()), (9, 0));
    }

    #[test]
    fn the_kernel_knows_these_layouts() {
        assert_eq!((size_of::<Event>(), size_of::<Range>(), size_of::<WriteProtect>()), (32, 16, 24));
    }
}
