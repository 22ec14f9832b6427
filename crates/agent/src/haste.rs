//! Threads that guests wait for while a snapshot is taken, and that have little to do themselves.
//!
//! A guest's timers and frames wait for QEMU's main loop, and all guests for the data plane; whoever writes to a page that is
//! not saved yet waits for QEMU's capture thread, which waits for its reader. With the processors busy each of them is late by
//! whole time slices, whatever its niceness, where the kernel groups threads by session (autogroup): in a session that had
//! more than its share before, it may be late by a tenth of a second. So they go before ordinary threads from the cut until all
//! is stored (the data plane already while machines are prepared, since it is of the session that prepares them), the capture thread only as long as somebody may wait for it (before the cut, they would make hosts be cut apart from each other); the [pace](crate::pace) keeps what captures take of the processors within bounds.

use diorama_qemu::process::{Policy, ProcessId, thread_name, threads_of};

use crate::dataplane::DataPlane;
use crate::priority::schedule_threads;

/// What QEMU calls the thread of a live capture.
pub(crate) const CAPTURE_THREAD: &str = "bg_snapshot";
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
        let mut threads = threads_of(self.process.pid, &self.vcpu_threads);
        threads.retain(|thread| {
            thread_name(self.process.pid, *thread).is_some_and(|name| name == CAPTURE_THREAD)
        });
        schedule_threads(&threads, Policy::Normal { nice: EASED_NICE });
    }

    fn schedule(&self, policy: Policy) {
        schedule_threads(&threads_of(self.process.pid, &self.vcpu_threads), policy);
    }
}

/// The policy of threads that are hurried: what a cut waits for, on whichever host, goes before them.
pub(crate) const HURRIED: Policy = Policy::Third;

/// An environment's QEMUs, which have their usual priority again when this is dropped, whoever has hurried them.
#[derive(Debug)]
pub(crate) struct Haste<'a> {
    services: Vec<Service>,
    plane: Option<HurriedPlane<'a>>,
}

impl<'a> Haste<'a> {
    /// Nobody is hurried yet.
    pub(crate) fn new(services: Vec<Service>) -> Self {
        Self { services, plane: None }
    }

    /// From now on the data plane goes first.
    pub(crate) fn begin_plane(&mut self, plane: &'a DataPlane) {
        self.plane.get_or_insert_with(|| HurriedPlane::begin(plane));
    }

    /// From now on they go first, and the data plane with them.
    pub(crate) fn begin(&mut self, plane: &'a DataPlane) {
        for service in &self.services {
            service.hurry();
        }
        self.begin_plane(plane);
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
pub(crate) struct HurriedPlane<'a>(&'a DataPlane);

impl<'a> HurriedPlane<'a> {
    pub(crate) fn begin(plane: &'a DataPlane) -> Self {
        plane.tell(|plane| plane.set_hurried(true));
        Self(plane)
    }
}

impl Drop for HurriedPlane<'_> {
    fn drop(&mut self) {
        self.0.tell(|plane| plane.set_hurried(false));
    }
}
