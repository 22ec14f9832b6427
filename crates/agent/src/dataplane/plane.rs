//! The data plane's thread: its event loop, and what it waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use diorama_qemu::process::Policy;
use diorama_switch::{Epoch, NetworkId, PeerId, PortId, Time};
use diorama_tunnel::ReceiveBatch;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::timer::{Expiration, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::Task;
use super::link::Scratch;
use super::local_cut::{CutFailure, CutJob, CutOutcome, LocalCut};
use super::peers::Span;
use super::segment::{Segment, SegmentId, Stopped};
use super::wire::{Wire, WireCounters};
use crate::priority::schedule_this_thread;

/// The niceness of virtual CPUs' threads: QEMU's main loop and this thread go before them, or frames and cuts
/// wait for guests that compute.
pub(crate) const VCPU_NICE: i32 = 5;
/// What the data plane asks for itself; only who may gets it.
pub(crate) const PLANE_POLICY: Policy = Policy::Normal { nice: -15 };
/// Events taken of the kernel at once.
const EVENTS: usize = 128;

/// What an epoll event is about, packed into its 64-bit datum: kind, segment, index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Tasks,
    Timer,
    Wire,
    Port(SegmentId, PortId),
    Monitor(SegmentId, usize),
}

impl Source {
    fn pack(self) -> u64 {
        match self {
            Source::Tasks => 0,
            Source::Timer => 1,
            Source::Wire => 4 << 60,
            Source::Port(segment, port) => 2 << 60 | u64::from(segment.0) << 28 | u64::from(port.0),
            Source::Monitor(segment, index) => 3 << 60 | u64::from(segment.0) << 28 | index as u64,
        }
    }

    fn unpack(datum: u64) -> Self {
        let segment = SegmentId((datum >> 28 & 0xffff_ffff) as u32);
        let index = datum & 0xfff_ffff;
        match datum >> 60 {
            2 => Source::Port(segment, PortId(index as u32)),
            3 => Source::Monitor(segment, index as usize),
            4 => Source::Wire,
            _ if datum == 0 => Source::Tasks,
            _ => Source::Timer,
        }
    }
}

/// What the parts of the data plane use of the thread: epoll, the clock, the read buffer.
pub(super) struct Io<'a> {
    epoll: &'a Epoll,
    pub(super) scratch: &'a mut Scratch,
    pub(super) wire: &'a mut Option<Wire>,
    origin: Instant,
}

impl Io<'_> {
    /// The data plane's clock.
    pub(super) fn now(&self) -> Time {
        Time(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    pub(super) fn watch_port(&self, segment: SegmentId, port: PortId, fd: BorrowedFd<'_>) -> nix::Result<()> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, Source::Port(segment, port).pack()))
    }

    /// Watches a port for room to write as well, or no longer.
    pub(super) fn watch_port_writable(
        &self,
        segment: SegmentId,
        port: PortId,
        fd: BorrowedFd<'_>,
        yes: bool,
    ) {
        let flags = if yes { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        let mut event = EpollEvent::new(flags, Source::Port(segment, port).pack());
        if let Err(error) = self.epoll.modify(fd, &mut event) {
            tracing::error!(%error, ?port, "epoll refuses to change a port");
        }
    }

    pub(super) fn watch_monitor(&self, segment: SegmentId, index: usize, fd: RawFd) {
        // SAFETY: the cut owns the monitor's socket, and forgets it here before it gives it back.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Monitor(segment, index).pack());
        if let Err(error) = self.epoll.add(fd, event) {
            tracing::error!(%error, "epoll refuses a monitor; the cut will time out");
        }
    }

    pub(super) fn forget(&self, fd: RawFd) {
        // SAFETY: callers hold the socket open until after this call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // A descriptor that is not watched (any more) is as good.
        let _ = self.epoll.delete(fd);
    }
}

/// All segments, and what the thread waits for.
pub(crate) struct Plane {
    epoll: Epoll,
    wake: Arc<EventFd>,
    timer: TimerFd,
    timer_set: Option<Time>,
    origin: Instant,
    scratch: Scratch,
    /// The tunnels' socket, on a host of several.
    wire: Option<Wire>,
    wire_watched_writable: bool,
    received: Option<ReceiveBatch>,
    segments: BTreeMap<SegmentId, Segment>,
    /// The segments that have a cut or a replay under way, and so need the clock.
    timed: Vec<SegmentId>,
    next_segment: u32,
    /// How many wait for this thread now,
    hurries: Hurries,
    /// and those of them that are not cuts of a segment: cuts that this host stands ready for, guests that are captured.
    hurried: Vec<Hurry>,
}

impl Plane {
    pub(super) fn new(wake: Arc<EventFd>) -> std::io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        epoll.add(wake.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, Source::Tasks.pack()))?;
        epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, Source::Timer.pack()))?;
        Ok(Self {
            epoll,
            wake,
            timer,
            timer_set: None,
            origin: Instant::now(),
            scratch: Scratch::new(),
            wire: None,
            wire_watched_writable: false,
            received: None,
            segments: BTreeMap::new(),
            timed: Vec::new(),
            next_segment: 1,
            hurries: Hurries::default(),
            hurried: Vec::new(),
        })
    }

    /// The thread's body.
    pub(super) fn run(&mut self, tasks: &Receiver<Task>) {
        schedule_plane(PLANE_POLICY);
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => {
                    tracing::error!(%error, "epoll failed; the data plane cannot go on");
                    std::process::abort();
                }
            };
            for event in &events[..count] {
                self.handle(Source::unpack(event.data()), event.events(), tasks);
            }
            self.advance_timed();
            self.send_wire();
        }
    }

    /// Adds an environment's part. Its ports are connected one by one afterwards.
    pub(crate) fn attach(&mut self, build: impl FnOnce(SegmentId) -> Segment) -> SegmentId {
        let id = SegmentId(self.next_segment);
        self.next_segment += 1;
        self.segments.insert(id, build(id));
        id
    }

    /// Removes an environment's part, and closes its sockets.
    pub(crate) fn detach(&mut self, id: SegmentId) {
        // Closing a socket takes it out of epoll as well.
        self.segments.remove(&id);
        if let Some(wire) = &mut self.wire {
            wire.forget(id);
        }
        self.timed.retain(|timed| *timed != id);
    }

    /// Connects a port to its machine. After a takeover the machine must stand still, and what it half sent to
    /// the agent before is skipped.
    pub(crate) fn connect(
        &mut self,
        id: SegmentId,
        port: PortId,
        stream: UnixStream,
        takeover: bool,
    ) -> std::io::Result<()> {
        self.with_io(id, |segment, io| segment.connect(port, stream, takeover, io))
            .unwrap_or_else(|| Err(std::io::ErrorKind::NotFound.into()))
    }

    /// Looks at or changes a segment.
    pub(crate) fn segment(&mut self, id: SegmentId) -> Option<&mut Segment> {
        self.segments.get_mut(&id)
    }

    /// Lets held ports go: machines that were paused run again, or a restored environment begins.
    pub(crate) fn release(&mut self, id: SegmentId, ports: &[PortId]) {
        self.with_io(id, |segment, io| segment.release(ports, io));
        self.note_timed(id);
    }

    /// Begins to deliver the recorded frames at their times, counted from now.
    pub(crate) fn begin_replay(&mut self, id: SegmentId) {
        self.with_io(id, Segment::begin_replay);
        self.note_timed(id);
    }

    /// Opens the tunnels' socket. Done once, when this host joins others.
    pub(crate) fn open_wire(&mut self, address: SocketAddr) -> std::io::Result<SocketAddr> {
        let wire = Wire::bind(address)?;
        self.epoll.add(wire.fd(), EpollEvent::new(EpollFlags::EPOLLIN, Source::Wire.pack()))?;
        let address = wire.local_addr()?;
        self.wire = Some(wire);
        self.received.get_or_insert_with(ReceiveBatch::new);
        Ok(address)
    }

    /// Closes the tunnels' socket: this host leaves the others. No environment spans hosts any more.
    pub(crate) fn close_wire(&mut self) {
        let Some(wire) = self.wire.take() else { return };
        if let Err(error) = self.epoll.delete(wire.fd()) {
            tracing::error!(%error, "the tunnels' socket is not watched any more, or never was");
        }
        self.wire_watched_writable = false;
    }

    /// Says how an environment spans hosts. False when another environment of this host has one of its numbers, or there is
    /// no tunnels' socket.
    pub(crate) fn span(&mut self, id: SegmentId, span: Span) -> bool {
        let (Some(wire), Some(segment)) = (&mut self.wire, self.segments.get_mut(&id)) else { return false };
        let assigned =
            segment.networks().iter().zip(&span.vnis).all(|(network, vni)| wire.assign(*vni, id, *network));
        if assigned {
            segment.set_span(span);
        } else {
            wire.forget(id);
        }
        assigned
    }

    /// What the tunnels' socket has seen.
    pub(crate) fn wire_counters(&self) -> Option<WireCounters> {
        Some(self.wire.as_ref()?.counters)
    }

    /// Ends a cut's recording; see [`Segment::stop_recording`].
    pub(crate) fn stop_recording(
        &mut self,
        id: SegmentId,
        cut: Epoch,
        sent: &[(PeerId, NetworkId, u64)],
    ) -> Option<Stopped> {
        Some(self.segments.get_mut(&id)?.stop_recording(cut, sent))
    }

    /// Puts every port of an environment at an epoch, if that is newer, and lets frames go that waited for it.
    pub(crate) fn raise_epoch(&mut self, id: SegmentId, to: Epoch) {
        self.with_io(id, |segment, io| segment.raise_epoch(to, io));
    }

    /// It goes before ordinary threads, or no more; as often as it was told so.
    pub(crate) fn set_hurried(&mut self, yes: bool) {
        if yes {
            self.hurried.push(self.hurries.begin());
        } else {
            self.hurried.pop();
        }
    }

    /// Tells every other host of an environment, by the way that frames go, that a cut has begun.
    pub(crate) fn call_for_cut(&mut self, id: SegmentId, epoch: Epoch) {
        self.with_io(id, |segment, io| segment.call_for_cut(epoch, io));
    }

    /// Begins a local cut; `done` gets its outcome.
    pub(super) fn begin_cut(&mut self, id: SegmentId, job: CutJob, done: Sender<CutOutcome>) {
        let refused = match self.segments.get(&id) {
            None => Some(CutFailure::NoSegment),
            Some(segment) if segment.has_cut() => Some(CutFailure::Busy),
            Some(_) => None,
        };
        if let Some(failure) = refused {
            // The asker may have gone; nothing was begun.
            let _ = done.send(CutOutcome {
                machines: Vec::new(),
                learned: Vec::new(),
                sent: Vec::new(),
                failure: Some(failure),
            });
            return;
        }
        let hurry = self.hurries.begin();
        self.with_io(id, |segment, io| {
            let cut = LocalCut::begin(job, done, hurry, segment, io);
            segment.set_cut(cut);
            segment.advance(io);
        });
        self.note_timed(id);
    }

    fn handle(&mut self, source: Source, flags: EpollFlags, tasks: &Receiver<Task>) {
        match source {
            Source::Tasks => {
                // Empty already is as good: the tasks are looked for below.
                let _ = self.wake.read();
                while let Ok(task) = tasks.try_recv() {
                    task(self);
                }
            }
            Source::Timer => {
                self.timer_set = None;
                // Nonblocking, and only to clear it.
                let _ = nix::unistd::read(&self.timer, &mut [0; 8]);
            }
            Source::Port(id, port) => {
                self.with_io(id, |segment, io| {
                    if flags.contains(EpollFlags::EPOLLOUT) {
                        segment.flush(port, io);
                    }
                    if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                        segment.read(port, io);
                    }
                });
            }
            Source::Wire => {
                if flags.contains(EpollFlags::EPOLLOUT) {
                    self.wire_is_writable();
                }
                self.read_wire();
            }
            Source::Monitor(id, index) => {
                self.with_io(id, |segment, io| segment.monitor_readable(index, io));
            }
        }
    }

    /// Takes what other hosts sent.
    fn read_wire(&mut self) {
        let Some(mut batch) = self.received.take() else { return };
        let mut touched = BTreeSet::new();
        let now = self.now();
        let segments = &mut self.segments;
        Wire::receive(&mut self.wire, &mut batch, |wire, from, packet| {
            let Some(wire) = wire else { return };
            match wire.owner(packet).and_then(|(id, network)| Some((id, network, segments.get_mut(&id)?))) {
                Some((id, network, segment)) => {
                    segment.receive(from, network, packet, now);
                    touched.insert(id);
                }
                None => wire.counters.foreign += 1,
            }
        });
        self.received = Some(batch);
        for id in touched {
            self.with_io(id, Segment::flush_dirty);
        }
    }

    /// Sends what this turn of the loop has brought for other hosts.
    fn send_wire(&mut self) {
        let Some(wire) = &mut self.wire else { return };
        let blocked = !wire.send();
        if blocked == self.wire_watched_writable {
            return;
        }
        let flags = if blocked { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        let mut event = EpollEvent::new(flags, Source::Wire.pack());
        if let Err(error) = self.epoll.modify(wire.fd(), &mut event) {
            tracing::error!(%error, "epoll refuses to change the tunnels' socket");
        }
        self.wire_watched_writable = blocked;
    }

    fn wire_is_writable(&mut self) {
        let ids: Vec<SegmentId> = self.segments.keys().copied().collect();
        for id in ids {
            if self.wire.as_mut().is_none_or(|wire| !wire.send()) {
                return;
            }
            self.with_io(id, Segment::flush_all_peers);
        }
    }

    /// The data plane's clock.
    pub(crate) fn now(&self) -> Time {
        Time(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn advance_timed(&mut self) {
        let mut next: Option<Time> = None;
        let timed = std::mem::take(&mut self.timed);
        for id in timed {
            let due = self.with_io(id, |segment, io| {
                segment.advance(io);
                segment.next_deadline(io.now())
            });
            if let Some(Some(due)) = due {
                self.timed.push(id);
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        if let Some(due) = next
            && self.timer_set.is_none_or(|set| due < set)
        {
            let now = self.now();
            let wait = Duration::from_nanos(due.since_ns(now).max(1000));
            let expiration = Expiration::OneShot(wait.into());
            if let Err(error) = self.timer.set(expiration, TimerSetTimeFlags::empty()) {
                tracing::error!(%error, "the data plane's timer cannot be set");
            }
            self.timer_set = Some(due);
        }
    }

    fn note_timed(&mut self, id: SegmentId) {
        if !self.timed.contains(&id) {
            self.timed.push(id);
        }
    }

    fn with_io<R>(&mut self, id: SegmentId, task: impl FnOnce(&mut Segment, &mut Io<'_>) -> R) -> Option<R> {
        let segment = self.segments.get_mut(&id)?;
        let mut io =
            Io { epoll: &self.epoll, scratch: &mut self.scratch, wire: &mut self.wire, origin: self.origin };
        Some(task(segment, &mut io))
    }
}

/// How many need the data plane to go before ordinary threads: cuts, and who asked for it. For its own thread.
#[derive(Debug, Clone, Default)]
struct Hurries(Arc<AtomicU32>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Hurry(Hurries);

impl Hurries {
    fn begin(&self) -> Hurry {
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            schedule_plane(Policy::First);
        }
        Hurry(self.clone())
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if self.0.0.fetch_sub(1, Ordering::Relaxed) == 1 {
            schedule_plane(PLANE_POLICY);
        }
    }
}

fn schedule_plane(policy: Policy) {
    schedule_this_thread(policy, "moving frames");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_packing() {
        for source in [
            Source::Tasks,
            Source::Timer,
            Source::Port(SegmentId(1), PortId(0)),
            Source::Port(SegmentId(u32::MAX), PortId(0xfff_ffff)),
            Source::Monitor(SegmentId(77), 999),
            Source::Wire,
        ] {
            assert_eq!(Source::unpack(source.pack()), source);
        }
    }
}
