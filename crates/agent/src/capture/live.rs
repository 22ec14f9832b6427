//! What a live capture's reader does beside reading: it takes main memory itself, and sets the pace at which QEMU sends it.
//!
//! Guests wait for pages that are not saved yet, and all of them for the processors. So the reader [takes](WriteFaults::take) all of
//! main memory, and whatever a guest wants to write to at once. It is a real-time thread, for that long. QEMU waits at the
//! full socket meanwhile, which costs nothing, and is read a little now and then: it may have been told of a page that somebody
//! waits for, and nobody else knows. Then, with all of it taken, nobody waits for QEMU any more: what it still sends of main memory
//! is thrown away, and it sends that behind ordinary threads. Only its last words are in a hurry again: there it ends the
//! protection, with locks that the guest needs.
//!
//! Where the reader may not take pages, QEMU and the reader are real-time threads all the time, and QEMU helps those who wait.

use std::io;
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

/// The socket's buffer on QEMU's side when nobody waits for it: some sixty pages, or some hundreds that are zero, between two looks.
/// Each of the two waits until it has a processor then.
const EASED_BUFFER_BYTES: usize = 256 << 10;

/// One machine's.
#[derive(Debug)]
pub(super) struct Live<'a> {
    machine: &'a str,
    service: &'a Service,
    memory_pages: u64,
    faults: WriteFaults,
    /// What QEMU's end of the socket is called.
    theirs: &'a Path,
    /// Whether threads can be hurried, and so eased: or they could not be hurried again.
    may_hurry: bool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Pages are taken, so many by now, and the next when it is time.
    Taking { pages: u64, pace: Pace, next: Instant },
    /// QEMU sends; `eased` while nobody waits for that.
    Sending { pace: Pace, eased: bool },
}

impl<'a> Live<'a> {
    /// Memory is protected, and the machine runs again. `theirs` is what `/proc/PID/fd` calls QEMU's end of the socket.
    pub(super) fn begin(machine: &'a str, service: &'a Service, memory_bytes: u64, theirs: &'a Path) -> Self {
        let faults = WriteFaults::of(service.process, memory_bytes).unwrap_or_else(|error| {
            tracing::debug!(machine, %error, "it is not seen when a guest waits");
            WriteFaults::default()
        });
        let memory_pages = memory_bytes / PAGE_SIZE_BYTES as u64;
        // QEMU's capture thread may be new.
        let may_hurry = hurry(service);
        let stage =
            Stage::Taking { pages: 0, pace: Pace::new(Work::Take, memory_pages, 0), next: Instant::now() };
        Self { machine, service, memory_pages, faults, theirs, may_hurry, stage }
    }

    /// Between two looks at the stream, of which so many pages have been seen: takes pages, or waits as long as those are
    /// worth. Shorter when somebody waits for QEMU.
    ///
    /// # Errors
    /// What the file says that pages are kept in.
    pub(super) fn wait(&mut self, pages_seen: u64, ram: &mut RamFile<DeviceState>) -> io::Result<()> {
        let keep = &mut |offset, pages: &[u8]| ram.keep(offset, pages);
        match &mut self.stage {
            Stage::Taking { pages, pace, next } => {
                let end = Instant::now() + LOOK_INTERVAL;
                loop {
                    let pause = end.min(*next).saturating_duration_since(Instant::now());
                    if self.faults.serve(pause, keep)? == Waiting::ForQemu || *next > end {
                        return Ok(());
                    }
                    let Some(further) = self.faults.take(keep)? else { break };
                    *pages += further;
                    *next = Instant::now() + pace.next(*pages);
                }
                // All was taken or handed out, but for what QEMU had sent before; or the rest is QEMU's.
                let all = *pages == self.memory_pages && self.faults.refused().is_none();
                let eased = all && self.may_hurry;
                if eased {
                    self.service.ease();
                    for socket in self.service.process.duplicates(self.theirs).unwrap_or_default() {
                        set_buffer(&socket, EASED_BUFFER_BYTES);
                    }
                    schedule_this_thread(Policy::Normal { nice: EASED_NICE }, "nobody waits for it");
                }
                let pace = Pace::new(Work::Send, self.memory_pages, pages_seen);
                self.stage = Stage::Sending { pace, eased };
            }
            Stage::Sending { pace, eased } => {
                let waiting = self.faults.serve(pace.next(pages_seen), keep)?;
                // For what is not main memory. Or it is through with that.
                if *eased && (waiting == Waiting::ForQemu || pages_seen >= self.memory_pages) {
                    hurry(self.service);
                    *eased = false;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        let (served, taken, refused) = (self.faults.served(), self.faults.taken(), self.faults.refused());
        tracing::debug!(self.machine, served, taken, ?refused, "pages that QEMU need not have sent");
    }
}

/// The calling thread, and QEMU's threads that guests wait for. Returns whether it may.
fn hurry(service: &Service) -> bool {
    service.hurry();
    schedule_this_thread(HURRIED, "a guest waits for it")
}
