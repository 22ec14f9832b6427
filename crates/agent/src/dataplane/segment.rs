//! One environment's part of the data plane: its switch, its ports' sockets, its cut and its replay.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use diorama_switch::{
    Accounting, Epoch, Hold, InFlight, NetworkCounters, NetworkId, PeerId, PortCounters, PortId, Recording,
    RecordingActive, Switch, Time,
};

use super::link::{Link, ReadOutcome};
use super::local_cut::LocalCut;
use super::peers::{Peers, Span};
use super::plane::Io;

/// Names a segment for as long as the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SegmentId(pub(crate) u32);

/// A frame that waits to be delivered again.
#[derive(Debug)]
struct Replay {
    /// After the machines went on.
    after_ns: u64,
    to: PortId,
    colour: Epoch,
    frame: Vec<u8>,
}

#[derive(Debug)]
struct Port {
    mac: [u8; 6],
    link: Option<Link>,
}

/// What is known of a port.
#[derive(Debug, Clone)]
pub(crate) struct PortStatus {
    pub(crate) connected: bool,
    pub(crate) counters: PortCounters,
}

/// What was recorded of a cut, and how its frames add up.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// None when nothing was recorded.
    pub(crate) recording: Option<Recording>,
    /// Each network's.
    pub(crate) accounting: Vec<(NetworkId, Accounting)>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Segment {
    id: SegmentId,
    switch: Switch,
    networks: Vec<NetworkId>,
    ports: BTreeMap<PortId, Port>,
    cut: Option<LocalCut>,
    /// Frames in flight are being recorded.
    recording: bool,
    peers: Option<Peers>,
    replays: VecDeque<Replay>,
    /// When the machines went on, once they have.
    replay_since: Option<Time>,
}

impl Segment {
    /// A segment around a switch that has these networks and ports (with their machines' addresses).
    pub(crate) fn new(
        id: SegmentId,
        switch: Switch,
        networks: Vec<NetworkId>,
        ports: Vec<(PortId, [u8; 6])>,
    ) -> Self {
        let ports = ports.into_iter().map(|(id, mac)| (id, Port { mac, link: None })).collect();
        Self {
            id,
            switch,
            networks,
            ports,
            cut: None,
            recording: false,
            peers: None,
            replays: VecDeque::new(),
            replay_since: None,
        }
    }

    pub(super) fn set_span(&mut self, span: Span) {
        self.peers = Some(Peers::new(span));
    }

    pub(super) fn peers(&self) -> Option<&Peers> {
        self.peers.as_ref()
    }

    pub(super) fn peers_mut(&mut self) -> Option<&mut Peers> {
        self.peers.as_mut()
    }

    pub(super) fn switch_and_peers(&mut self) -> Option<(&mut Switch, &mut Peers)> {
        Some((&mut self.switch, self.peers.as_mut()?))
    }

    pub(super) fn networks(&self) -> &[NetworkId] {
        &self.networks
    }

    pub(super) fn is_recording(&self) -> bool {
        self.recording
    }

    pub(super) fn start_recording(&mut self, cut: Epoch, in_flight: InFlight) -> Result<(), RecordingActive> {
        self.switch.start_recording(cut, in_flight)?;
        self.recording = true;
        Ok(())
    }

    /// Ends the recording of a cut and draws up its accounts. `sent` is what other hosts sent of older colours, as they count
    /// it: what has not come of it is lost from now on.
    pub(crate) fn stop_recording(&mut self, cut: Epoch, sent: &[(PeerId, NetworkId, u64)]) -> Stopped {
        for (peer, network, sent) in sent {
            self.switch.close_channel(*peer, *network, cut, *sent);
        }
        self.recording = false;
        Stopped { recording: self.switch.stop_recording(), accounting: self.accounting(cut) }
    }

    /// Puts every port at an epoch that is newer: there is no cut to make here for it, and frames must flow.
    pub(super) fn raise_epoch(&mut self, to: Epoch, io: &mut Io<'_>) {
        let now = io.now();
        let ports: Vec<PortId> = self.ports.keys().copied().collect();
        for port in ports {
            if self.switch.epoch(port) < to
                && let Err(error) = self.switch.advance_epoch(port, to, now)
            {
                tracing::error!(%error, "a port's epoch cannot be raised");
            }
        }
        self.flush_dirty(io);
    }

    pub(super) fn id(&self) -> SegmentId {
        self.id
    }

    pub(super) fn switch(&self) -> &Switch {
        &self.switch
    }

    pub(crate) fn switch_mut(&mut self) -> &mut Switch {
        &mut self.switch
    }

    pub(super) fn link(&self, port: PortId) -> Option<&Link> {
        self.ports.get(&port)?.link.as_ref()
    }

    /// Holds ports until [`super::Plane::release`]: of machines that do not run yet.
    pub(crate) fn hold(&mut self, ports: &[PortId]) {
        for port in ports {
            // When a pause began is of no interest: only a cut's hold is timed.
            self.switch.hold(*port, Hold::Pause, Time(0));
        }
    }

    /// Keeps a frame to be delivered again, `after_ns` after [`Segment::begin_replay`].
    pub(crate) fn queue_replay(&mut self, to: PortId, colour: Epoch, after_ns: u64, frame: Vec<u8>) {
        self.replays.push_back(Replay { after_ns, to, colour, frame });
    }

    /// Each port's state.
    pub(crate) fn port_status(&self, port: PortId) -> PortStatus {
        PortStatus { connected: self.link(port).is_some(), counters: self.switch.counters(port) }
    }

    /// A network's counters.
    pub(crate) fn network_counters(&self, network: NetworkId) -> NetworkCounters {
        self.switch.network_counters(network)
    }

    fn accounting(&self, cut: Epoch) -> Vec<(NetworkId, Accounting)> {
        self.networks
            .iter()
            .filter_map(|network| Some((*network, self.switch.accounting(*network, cut)?)))
            .collect()
    }

    pub(super) fn learned(&self) -> Vec<(NetworkId, [u8; 6], PortId)> {
        let of = |network: &NetworkId| {
            let network = *network;
            self.switch.learned(network).map(move |(mac, port)| (network, mac, port))
        };
        self.networks.iter().flat_map(of).collect()
    }

    pub(super) fn connect(
        &mut self,
        port: PortId,
        stream: UnixStream,
        takeover: bool,
        io: &mut Io<'_>,
    ) -> std::io::Result<()> {
        let slot = self.ports.get_mut(&port).ok_or(std::io::ErrorKind::NotFound)?;
        let mut link = Link::new(stream)?;
        self.switch.set_connected(port, true);
        if takeover {
            match link.resynchronise(io.scratch, &mut self.switch, port, slot.mac, io.now()) {
                Ok(0) => {}
                Ok(torn) => tracing::info!(?port, torn, "skipped the rest of a frame of the agent before"),
                Err(_) => return Err(std::io::ErrorKind::BrokenPipe.into()),
            }
        }
        io.watch_port(self.id, port, link.stream().as_fd())?;
        slot.link = Some(link);
        self.flush_dirty(io);
        Ok(())
    }

    pub(super) fn release(&mut self, ports: &[PortId], io: &mut Io<'_>) {
        let now = io.now();
        for port in ports {
            self.switch.release(*port, Hold::Pause, now);
            self.flush(*port, io);
        }
    }

    pub(super) fn begin_replay(&mut self, io: &mut Io<'_>) {
        self.replay_since = Some(io.now());
        self.replay(io);
    }

    pub(super) fn has_cut(&self) -> bool {
        self.cut.is_some()
    }

    pub(super) fn set_cut(&mut self, cut: LocalCut) {
        self.cut = Some(cut);
    }

    /// Moves the cut and the replay on.
    pub(super) fn advance(&mut self, io: &mut Io<'_>) {
        self.replay(io);
        if let Some(mut cut) = self.cut.take()
            && !cut.advance(self, io)
        {
            self.cut = Some(cut);
        }
    }

    /// When [`Segment::advance`] is next wanted; `None` when there is nothing to wait for.
    pub(super) fn next_deadline(&self, now: Time) -> Option<Time> {
        let cut = self.cut.as_ref().map(|cut| match cut.poll_interval() {
            Some(interval) => Time(now.0 + u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX)),
            None => cut.deadline(),
        });
        let replay = match (self.replay_since, self.replays.front()) {
            (Some(since), Some(replay)) => Some(Time(since.0.saturating_add(replay.after_ns))),
            _ => None,
        };
        match (cut, replay) {
            (Some(cut), Some(replay)) => Some(cut.min(replay)),
            (cut, replay) => cut.or(replay),
        }
    }

    pub(super) fn monitor_readable(&mut self, index: usize, io: &mut Io<'_>) {
        if let Some(mut cut) = self.cut.take() {
            cut.monitor_readable(index, self, io);
            if !cut.advance(self, io) {
                self.cut = Some(cut);
            }
        }
    }

    /// Reads a port once, and writes what that brought to the others.
    pub(super) fn read(&mut self, port: PortId, io: &mut Io<'_>) -> ReadOutcome {
        let Some(link) = self.ports.get_mut(&port).and_then(|slot| slot.link.as_mut()) else {
            return ReadOutcome::Closed;
        };
        let outcome = link.read(io.scratch, &mut self.switch, port, io.now());
        if outcome == ReadOutcome::Closed {
            self.disconnect(port, io);
        }
        self.flush_dirty(io);
        outcome
    }

    /// Reads a port until the kernel has nothing more. False when the last frame is not whole.
    pub(super) fn read_until_empty(&mut self, port: PortId, io: &mut Io<'_>) -> bool {
        while self.link(port).is_some() {
            // A short read is not yet the end: only the kernel's "would block" is.
            if self.read(port, io) != ReadOutcome::More && self.is_read_empty(port) {
                break;
            }
        }
        self.link(port).is_none_or(Link::at_frame_boundary)
    }

    /// Writes what a port's machine may have now.
    pub(super) fn flush(&mut self, port: PortId, io: &mut Io<'_>) {
        let Some(link) = self.ports.get_mut(&port).and_then(|slot| slot.link.as_mut()) else { return };
        match link.flush(&mut self.switch, port, io.now()) {
            Ok(wants_room) => {
                if link.watches_writable != wants_room {
                    link.watches_writable = wants_room;
                    io.watch_port_writable(self.id, port, link.stream().as_fd(), wants_room);
                }
            }
            Err(error) => {
                tracing::debug!(?port, %error, "a port's machine has gone");
                self.disconnect(port, io);
            }
        }
    }

    fn is_read_empty(&self, port: PortId) -> bool {
        let Some(link) = self.link(port) else { return true };
        let mut bytes: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int through the pointer; the link's socket is open.
        let result = unsafe { libc::ioctl(link.stream().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        result != 0 || bytes == 0
    }

    pub(super) fn flush_dirty(&mut self, io: &mut Io<'_>) {
        while let Some(port) = self.switch.pop_dirty() {
            self.flush(port, io);
        }
        self.flush_peers(io);
        self.tell_newer_colours();
    }

    fn replay(&mut self, io: &mut Io<'_>) {
        let Some(since) = self.replay_since else { return };
        let now = io.now();
        while self.replays.front().is_some_and(|replay| since.0.saturating_add(replay.after_ns) <= now.0) {
            let Some(replay) = self.replays.pop_front() else { break };
            if let Err(error) = self.switch.inject(replay.to, &replay.frame, replay.colour, now) {
                tracing::error!(%error, "a recorded frame could not be delivered again");
            }
        }
        self.flush_dirty(io);
    }

    fn disconnect(&mut self, port: PortId, io: &mut Io<'_>) {
        if let Some(link) = self.ports.get_mut(&port).and_then(|slot| slot.link.take()) {
            io.forget(link.fd());
            self.switch.set_connected(port, false);
        }
    }
}
