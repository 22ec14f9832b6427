//! When the computer itself stood still: on one that is a virtual machine, whatever ran on it is late then, and no snapshot is to
//! blame.
//!
//! A real-time thread, which goes before everything else (that takes root), sleeps two milliseconds at a time. When it wakes up late, the
//! processor that was to wake it did not run; whether others did is not seen. (Work within the kernel that cannot be interrupted looks the
//! same; that is not known to take milliseconds.)

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

const LOOK: Duration = Duration::from_millis(2);
/// Above all threads of the agent and of QEMU (sched(7)).
const PRIORITY: libc::c_int = 50;
/// It is an interruption when a look is so late.
const LATE: Duration = Duration::from_millis(8);

/// A processor of the computer stood still: until when, and for how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interruption {
    pub(crate) end: Instant,
    pub(crate) length: Duration,
}

/// Looks for them until it is dropped.
#[derive(Debug)]
pub(crate) struct Interruptions(Arc<Mutex<Vec<Interruption>>>);

impl Interruptions {
    /// `None` where a thread may not be real-time: an ordinary one is late for other reasons.
    pub(crate) fn watch() -> Option<Self> {
        let found = Arc::<Mutex<Vec<Interruption>>>::default();
        let noted = Arc::downgrade(&found);
        let (ready, is_ready) = mpsc::channel();
        std::thread::spawn(move || {
            let first = go_first();
            if ready.send(first).is_err() || !first {
                return;
            }
            while let Some(noted) = noted.upgrade() {
                let due = Instant::now() + LOOK;
                std::thread::sleep(LOOK);
                let end = Instant::now();
                let length = end.saturating_duration_since(due);
                if length >= LATE {
                    noted.lock().unwrap_or_else(PoisonError::into_inner).push(Interruption { end, length });
                }
            }
        });
        is_ready.recv().unwrap_or(false).then_some(Self(found))
    }

    /// All until now.
    pub(crate) fn found(&self) -> Vec<Interruption> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Puts the calling thread before all others. Returns whether it may.
fn go_first() -> bool {
    let parameters = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: `parameters` is valid for the call, which only reads it; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) }).is_ok()
}
