//! What a live capture's reader does beside reading: it takes main memory itself, and sets the pace at which QEMU sends it.
//!
//! Guests wait for pages that are not saved yet, and all of them for the processors. So the reader [takes](WriteFaults::take) all of
//! main memory, and whatever a guest wants to write to at once. In the first tenth of a second that is all it does, and as quickly as can be:
//! guests have to catch up, all at the same time, and ask for most of what they will. It is a real-time thread, for that long. QEMU waits at the
//! full socket meanwhile, which costs nothing, and is read a little now and then: it may have been told of a page that somebody
//! waits for, and nobody else knows. Then, with all of it taken, nobody waits for QEMU any more: what it still sends of main memory
//! is thrown away, and it sends that behind ordinary threads. Only its last words are in a hurry again: there it ends the
//! protection, with locks that the guest needs.
//!
//! Where the reader may not take pages, QEMU and the reader are real-time threads all the time, and QEMU helps those who wait.

use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use diorama_qemu::migration::{PAGE_SIZE_BYTES, RamFile};
use diorama_qemu::process::Policy;
use diorama_qemu::userfault::{Waiting, WriteFaults};

use super::{DeviceState, set_buffer};
use crate::haste::{EASED_NICE, HURRIED, Service};
use crate::pace::{Pace, Work};
use crate::priority::schedule_this_thread;

/// How long QEMU is not read, at the most, while pages are taken.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How long after the cut nothing is done but what somebody waits for: guests catch up, and ask for most of those pages that they
/// will.
const FIRST_REST: Duration = Duration::from_millis(100);
/// The most copies of that time that are held in memory, in bytes: some hundred times those pages that one write asks for.
const MOST_SHELVED_BYTES: u64 = 8 << 20;
/// What part of the machine's memory they take at the most.
const SHELVED_PART: u64 = 32;

/// The socket's buffer on QEMU's side while pages are taken: as little as QEMU can do between two looks, two pages or three.
const TAKING_BUFFER_BYTES: usize = 8 << 10;
/// The same when nobody waits for it: some sixty pages, or some hundreds that are zero, between two looks.
/// Each of the two waits until it has a processor then.
const EASED_BUFFER_BYTES: usize = 256 << 10;
/// The same when somebody may: as much as QEMU is to do between two looks of its reader, some ten pages or eighty that are zero.
/// (QEMU goes on when three quarters have been read.)
const HURRIED_BUFFER_BYTES: usize = 32 << 10;

/// What is made before the cut: then the machine runs again, and the first page that it writes to is not saved yet.
#[derive(Debug)]
pub(super) struct Ready<'a> {
    machine: &'a str,
    service: &'a Service,
    memory_bytes: u64,
    shelf: Shelf,
    /// Whether pages can be taken, as far as that can be told: this process may have QEMU's descriptors.
    may_take: bool,
    /// Whether threads can be hurried, and so eased: or they could not be hurried again.
    may_hurry: bool,
}

impl<'a> Ready<'a> {
    /// Hurries the calling thread, which reads the stream.
    pub(super) fn new(machine: &'a str, service: &'a Service, memory_bytes: u64) -> Self {
        let shelf = Shelf::new(memory_bytes);
        let standard_input = service.process.duplicates(Path::new("/dev/null"));
        let may_take = standard_input.is_ok_and(|duplicates| !duplicates.is_empty());
        Self { machine, service, memory_bytes, shelf, may_take, may_hurry: hurry_this_thread() }
    }

    fn memory_pages(&self) -> u64 {
        self.memory_bytes / PAGE_SIZE_BYTES as u64
    }

    /// Makes QEMU's end of the socket as large as it is to be when memory begins to come.
    pub(super) fn set_buffer(&self, theirs: &UnixStream) {
        set_buffer(theirs, if self.may_take { TAKING_BUFFER_BYTES } else { HURRIED_BUFFER_BYTES });
    }
}

/// One machine's.
#[derive(Debug)]
pub(super) struct Live<'a> {
    ready: Ready<'a>,
    faults: WriteFaults,
    /// What QEMU's end of the socket is called.
    theirs: &'a Path,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Copies are kept, so many pages by now, and then pages are taken, so many by now; the next when it is time.
    Taking { pages: u64, kept: u64, pace: Pace, next: Instant },
    /// QEMU sends; `eased` while nobody waits for that.
    Sending { pace: Pace, eased: bool },
}

impl<'a> Live<'a> {
    /// Memory is protected, and the machine runs again, but for what it writes to. `theirs` is what `/proc/PID/fd` calls QEMU's
    /// end of the socket.
    pub(super) fn begin(ready: Ready<'a>, theirs: &'a Path) -> Self {
        let faults = WriteFaults::of(ready.service.process, ready.memory_bytes).unwrap_or_else(|error| {
            tracing::debug!(ready.machine, %error, "it is not seen when a guest waits");
            WriteFaults::default()
        });
        // QEMU's capture thread may be new.
        ready.service.hurry();
        let stage = Stage::Taking {
            pages: 0,
            kept: 0,
            pace: Pace::new(Work::Take, ready.memory_pages(), 0),
            next: Instant::now() + FIRST_REST,
        };
        Self { ready, faults, theirs, stage }
    }

    /// The stream has all of the memory.
    ///
    /// # Errors
    /// What the file says that pages are kept in.
    pub(super) fn finish(mut self, ram: &mut RamFile<DeviceState>) -> io::Result<()> {
        self.ready.shelf.keep_all(ram)
    }

    /// Between two looks at the stream, of which so many pages have been seen: takes pages, or waits as long as those are
    /// worth. Shorter when somebody waits for QEMU.
    ///
    /// # Errors
    /// What the file says that pages are kept in.
    pub(super) fn wait(&mut self, pages_seen: u64, ram: &mut RamFile<DeviceState>) -> io::Result<()> {
        match &mut self.stage {
            Stage::Taking { pages, kept, pace, next } => {
                let end = Instant::now() + LOOK_INTERVAL;
                while self.faults.takes() {
                    let pause = end.min(*next).saturating_duration_since(Instant::now());
                    let shelve = &mut |offset, pages: &[u8]| self.ready.shelf.put(offset, pages, ram);
                    if self.faults.serve(pause, shelve)? == Waiting::ForQemu || *next > end {
                        return Ok(());
                    }
                    // Copies first, at the same pace: to write pages down takes longer than to take them.
                    match self.ready.shelf.keep_one(ram)? {
                        Some(further) => *kept += further,
                        None => {
                            let keep = &mut |offset, pages: &[u8]| ram.keep(offset, pages);
                            let Some(further) = self.faults.take(keep)? else { break };
                            *pages += further;
                        }
                    }
                    *next = Instant::now() + pace.next(*pages + *kept);
                }
                self.ready.shelf.keep_all(ram)?;
                // All was taken or handed out, but for what QEMU had sent before; or the rest is QEMU's.
                let all = *pages == self.ready.memory_pages() && self.faults.refused().is_none();
                let eased = all && self.ready.may_hurry;
                let buffer_bytes = if eased { EASED_BUFFER_BYTES } else { HURRIED_BUFFER_BYTES };
                for socket in self.ready.service.process.duplicates(self.theirs).unwrap_or_default() {
                    set_buffer(&socket, buffer_bytes);
                }
                if eased {
                    self.ready.service.ease();
                    schedule_this_thread(Policy::Normal { nice: EASED_NICE }, "nobody waits for it");
                }
                let pace = Pace::new(Work::Send, self.ready.memory_pages(), pages_seen);
                self.stage = Stage::Sending { pace, eased };
            }
            Stage::Sending { pace, eased } => {
                let keep = &mut |offset, pages: &[u8]| ram.keep(offset, pages);
                let waiting = self.faults.serve(pace.next(pages_seen), keep)?;
                // For what is not main memory. Or it is through with that.
                if *eased && (waiting == Waiting::ForQemu || pages_seen >= self.ready.memory_pages()) {
                    self.ready.service.hurry();
                    hurry_this_thread();
                    *eased = false;
                }
            }
        }
        Ok(())
    }
}

/// Copies of pages that are kept when guests have caught up: a file takes as long to write to as all else that they wait for.
#[derive(Debug)]
struct Shelf {
    bytes: Vec<u8>,
    used: usize,
    /// Offsets in main memory, and where the copies begin and end.
    copies: Vec<(u64, Range<usize>)>,
}

impl Shelf {
    /// For a machine with so much memory. To be made before the cut: its own memory has been touched then.
    fn new(memory_bytes: u64) -> Self {
        let bytes = (memory_bytes / SHELVED_PART).min(MOST_SHELVED_BYTES) as usize;
        // Not zeros, which would be mapped when they are written to.
        Self { bytes: vec![1; bytes], used: 0, copies: Vec::with_capacity(bytes / PAGE_SIZE_BYTES) }
    }

    /// Keeps them later, or now when there is no room.
    fn put(&mut self, offset: u64, pages: &[u8], ram: &mut RamFile<DeviceState>) -> io::Result<()> {
        let place = self.used..self.used + pages.len();
        match self.bytes.get_mut(place.clone()) {
            Some(room) => {
                room.copy_from_slice(pages);
                self.used = place.end;
                self.copies.push((offset, place));
                Ok(())
            }
            None => ram.keep(offset, pages),
        }
    }

    /// Keeps one of the copies. Returns how many pages it has, or `None` if there was none.
    fn keep_one(&mut self, ram: &mut RamFile<DeviceState>) -> io::Result<Option<u64>> {
        let Some((offset, place)) = self.copies.pop() else {
            // There will be no more; and what comes late is kept at once.
            self.bytes = Vec::new();
            return Ok(None);
        };
        let pages = place.len() / PAGE_SIZE_BYTES;
        ram.keep(offset, &self.bytes[place])?;
        Ok(Some(pages as u64))
    }

    fn keep_all(&mut self, ram: &mut RamFile<DeviceState>) -> io::Result<()> {
        while self.keep_one(ram)?.is_some() {}
        Ok(())
    }
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        let (served, taken, refused) = (self.faults.served(), self.faults.taken(), self.faults.refused());
        tracing::debug!(self.ready.machine, served, taken, ?refused, "pages that QEMU need not have sent");
    }
}

/// Puts the calling thread, a reader, before ordinary ones. Returns whether it may.
fn hurry_this_thread() -> bool {
    schedule_this_thread(HURRIED, "a guest waits for it")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use diorama_qemu::migration::Sink;

    use super::*;

    #[test]
    fn copies_are_kept_later_and_count_more_than_what_came_meanwhile() {
        let file = tempfile::tempfile().expect("file");
        let mut ram = RamFile::new(file, 1 << 20, DeviceState(Vec::new())).expect("new");
        let page = |byte| [byte; PAGE_SIZE_BYTES];
        // Three pages' room.
        let mut shelf = Shelf::new(SHELVED_PART * 3 * PAGE_SIZE_BYTES as u64);
        shelf.put(0x1000, &[page(1), page(2)].concat(), &mut ram).expect("put");
        shelf.put(0x4000, &page(0), &mut ram).expect("put");
        assert_eq!(ram.written_bytes(), 0);
        shelf.put(0x5000, &page(5), &mut ram).expect("no room: kept at once");
        assert_eq!(ram.written_bytes(), 4096);
        for offset in [0x1000, 0x4000, 0x5000] {
            ram.page(offset, &page(9)).expect("what the stream brings is newer");
        }
        assert_eq!(shelf.keep_one(&mut ram).expect("keep"), Some(1));
        assert_eq!(shelf.keep_one(&mut ram).expect("keep"), Some(2));
        assert_eq!(shelf.keep_one(&mut ram).expect("there is no more"), None);
        shelf.put(0x6000, &page(6), &mut ram).expect("kept at once");
        let (file, _) = ram.into_inner();
        for (offset, byte) in [(0x1000, 1), (0x2000, 2), (0x4000, 0), (0x5000, 5), (0x6000, 6)] {
            let mut found = page(7);
            file.read_exact_at(&mut found, offset).expect("read");
            assert_eq!(found, page(byte), "{offset:#x}");
        }
    }
}
