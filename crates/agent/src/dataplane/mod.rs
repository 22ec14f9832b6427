//! The data plane: one thread that moves every frame of every environment on this host.
//!
//! It owns the switches and the sockets to QEMU, and nothing else touches them: other threads hand it
//! closures ([`DataPlane::call`]), so there is no lock on a frame's way. It also runs the critical part of a
//! cut ([`local_cut`]) itself, because every hand-over to another thread would lengthen the pause.
//!
//! One turn of the loop: wait for sockets or the next timer, read each readable port once in a large batch,
//! let the switch copy the frames into the receivers' queues, and write those queues out. Nothing in the
//! loop blocks, and no allocation is made for a frame.
//!
//! Invariants:
//! - a port's socket is read whenever it is readable, held or not: QEMU must never find it full (a frame that
//!   QEMU has half written when it is told to `stop` is lost, and the stream's framing with it);
//! - what a guest sends can cost memory only up to the queues' bounds.

mod command;
mod link;
mod local_cut;
mod peers;
mod plane;
mod segment;
mod standalone;
mod wire;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sys::eventfd::{EfdFlags, EventFd};

pub(crate) use command::{Command, Monitor, wait_until_read};
pub(crate) use local_cut::{CutFailure, CutJob, CutMachine, CutOutcome, Goal, Resume, prefer_others};
pub(crate) use peers::{PeerStatus, Span};
pub(crate) use plane::{PLANE_POLICY, Plane, VCPU_NICE};
pub(crate) use segment::{PortStatus, Segment, SegmentId, Stopped};
pub use standalone::switch_streams;

/// Something to do on the data plane's thread.
type Task = Box<dyn FnOnce(&mut Plane) + Send>;

/// The other threads' handle on the data plane.
#[derive(Debug)]
pub(crate) struct DataPlane {
    tasks: Sender<Task>,
    wake: Arc<EventFd>,
}

impl DataPlane {
    /// Starts the thread.
    pub(crate) fn start() -> std::io::Result<Self> {
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (tasks, receiver) = channel();
        let mut plane = Plane::new(Arc::clone(&wake))?;
        // Found out before a cut asks for it: it takes another thread, which would have to wait for a processor.
        local_cut::may_return_from_idle();
        std::thread::Builder::new().name("dataplane".into()).spawn(move || plane.run(&receiver))?;
        Ok(Self { tasks, wake })
    }

    /// Runs `task` on the data plane's thread and waits for what it returns.
    pub(crate) fn call<R: Send + 'static>(&self, task: impl FnOnce(&mut Plane) -> R + Send + 'static) -> R {
        let (sender, receiver) = channel();
        self.post(Box::new(move |plane| {
            // The caller waits below; it cannot have gone.
            let _ = sender.send(task(plane));
        }));
        receiver.recv().expect("the data plane's thread runs as long as the agent")
    }

    /// Begins a local cut; its outcome comes through the receiver.
    pub(crate) fn cut(&self, segment: SegmentId, job: CutJob) -> Receiver<CutOutcome> {
        let (sender, receiver) = channel();
        self.post(Box::new(move |plane| plane.begin_cut(segment, job, sender)));
        receiver
    }

    /// Runs `task` on the data plane's thread, some time soon.
    pub(crate) fn tell(&self, task: impl FnOnce(&mut Plane) + Send + 'static) {
        self.post(Box::new(task));
    }

    fn post(&self, task: Task) {
        self.tasks.send(task).expect("the data plane's thread runs as long as the agent");
        // Full (2^64 - 1 wakes pending) cannot happen, and would be no harm: it is awake then.
        let _ = self.wake.write(1);
    }
}
