//! Threads that guests wait for while a snapshot is taken, and that have little to do themselves.
//!
//! A guest's timers and frames wait for QEMU's main loop, and all guests for the data plane; whoever writes to a page that is
//! not saved yet waits for QEMU's capture thread, which waits for its reader. With the processors busy each of them is late by
//! whole time slices, whatever its niceness, where the kernel groups threads by session (autogroup): in a session that had
//! more than its share before, it may be late by a tenth of a second. So they go before ordinary threads from the cut until all
//! is stored, the capture thread only as long as somebody may wait for it (before the cut, they would make hosts be cut apart
//! from each other), and the data plane already while machines are prepared, which its own session does. The
//! [pace](crate::pace) keeps what captures take of the processors within bounds.

use diorama_qemu::migration::CAPTURE_THREAD;
use diorama_qemu::process::{Policy, ProcessId, threads_named, threads_of};

use crate::dataplane::DataPlane;
use crate::priority::schedule_threads;

/// The niceness of a capture thread, and of its reader, when nobody waits for them.
pub(crate) const EASED_NICE: i32 = 10;

/// A QEMU whose machine runs.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) process: ProcessId,
    /// Its guest: everything but that is hurried.
    pub(crate) vcpu_threads: Vec<u32>,
}

impl Service {
    /// Puts its threads, those that have come since as well, before ordinary ones. Only root may; for others nothing changes.
    pub(crate) fn hurry(&self) {
        self.schedule(HURRIED);
    }

    /// Puts its capture thread behind ordinary ones: nobody waits for it.
    pub(crate) fn ease(&self) {
        let threads = threads_named(self.process.pid, CAPTURE_THREAD);
        schedule_threads(&threads, Policy::Normal { nice: EASED_NICE });
    }

    fn schedule(&self, policy: Policy) {
        schedule_threads(&threads_of(self.process.pid, &self.vcpu_threads), policy);
    }
}

/// The policy of threads that are hurried: what a cut waits for, on whichever host, goes before them.
pub(crate) const HURRIED: Policy = Policy::Third;

/// The data plane, which goes first as long as this lives, and an environment's QEMUs, which have their usual priority again
/// when it is dropped, whoever has hurried them.
#[derive(Debug)]
pub(crate) struct Haste<'a> {
    services: Vec<Service>,
    _plane: HurriedPlane<'a>,
}

impl<'a> Haste<'a> {
    /// From now on the data plane goes first; QEMUs are not hurried yet.
    pub(crate) fn begin(services: Vec<Service>, plane: &'a DataPlane) -> Self {
        Self { services, _plane: HurriedPlane::begin(plane) }
    }

    /// From now on QEMUs go first, too.
    pub(crate) fn hurry_services(&self) {
        for service in &self.services {
            service.hurry();
        }
    }
}

impl Drop for Haste<'_> {
    fn drop(&mut self) {
        for service in &self.services {
            service.schedule(Policy::Normal { nice: 0 });
        }
    }
}

/// The data plane goes first.
#[derive(Debug)]
struct HurriedPlane<'a>(&'a DataPlane);

impl<'a> HurriedPlane<'a> {
    fn begin(plane: &'a DataPlane) -> Self {
        plane.tell(|plane| plane.set_hurried(true));
        Self(plane)
    }
}

impl Drop for HurriedPlane<'_> {
    fn drop(&mut self) {
        self.0.tell(|plane| plane.set_hurried(false));
    }
}
