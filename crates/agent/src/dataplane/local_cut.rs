//! This host's part of a cut, step by step, on the data plane's thread.
//!
//! ```text
//!            all ports drained             every `stop` answered,          RESUME of each machine
//!            or the bound is hit           its ports read empty            (its ports released)
//!  Draining --------------------> Stopping --------------------> Saving --------------------------> done
//!      |                              |                             |
//!      +----------- a failure --------+-----------------------------+--> Undoing ------------------> done
//! ```
//!
//! The steps and why in that order: docs/protocol.md. All machines are held first, stopped together, then saved
//! together: that gives the least skew. A machine that does not run when the cut begins is not stopped and not
//! resumed; its ports stay held afterwards as they were (a pause's hold is another than a cut's).
//!
//! Invariants:
//! - the epoch of a machine's ports goes up only when its `stop` has been answered and its sockets are read
//!   empty, and before anything is saved;
//! - whatever happens, at the end no port is held by the cut, and no machine that ran is stopped;
//! - after a cut that succeeded, frames in flight are recorded until [`super::Plane::stop_recording`];
//! - a live capture is never cancelled: one that has begun to save is waited for, and one that waits at its gate stays
//!   there until another job of [`Goal::Disarm`] lets it through.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::mpsc::Sender;
use std::time::Duration;

use diorama_qemu::process::{Policy, set_thread_policy};
use diorama_qemu::qmp::{Message, Parts, Timestamp};
use diorama_switch::{Epoch, Hold, InFlight, NetworkId, PeerId, PortId, Time};
use serde_json::Value;

use super::command::{Command, Monitor};
use super::plane::{Hurry, Io};
use super::segment::Segment;
use crate::capture::GateHandle;
use crate::haste::HURRIED;
use crate::priority::schedule_threads;

/// How long QEMU may take to read what was written to it before its `stop` is sent all the same. A guest whose
/// receive ring stays full that long (or that has no driver yet) is cut with frames inside QEMU; this is counted.
const DRAIN_BOUND: Duration = Duration::from_millis(20);
/// How long that may take before its virtual CPUs are hurried: one of them may hold the lock that QEMU's main loop waits for,
/// and wait for a processor itself.
const DRAIN_PATIENCE: Duration = Duration::from_millis(1);
/// How long a machine may take to stop with its threads before ordinary ones; then for a turn they are ordinary ones, and so on.
/// QEMU's main loop and virtual CPUs wait for each other at spin locks. When whoever holds one is not running, and the others
/// are real-time threads and as many as there are processors, it never will (seen on two processors). Ordinary threads
/// all come to run.
const STOP_PATIENCE: Duration = Duration::from_millis(2);
const STOP_TURN: Duration = Duration::from_millis(5);
/// How often a draining socket is looked at: nothing tells when the other side has read.
const DRAIN_POLL: Duration = Duration::from_micros(50);
/// How many probe frames are sent, one after another. One shows that QEMU's receive queue was not blocked when
/// it was read; a queue that is emptied bit by bit could let one through, and then the second waits.
const PROBES: u32 = 2;
/// What QEMU answers to a `cont` that comes a moment too early.
const NOT_FINALIZED: &str = "Migration is not finalized yet";
/// How long undoing may take before a machine is given up.
const UNDO_BOUND: Duration = Duration::from_secs(5);

/// A frame that any NIC ignores: a destination nobody has, and an ethertype for local experiments
/// (IEEE 802, 0x88b5).
const PROBE: [u8; 60] = {
    let mut frame = [0; 60];
    frame[0] = 0x02;
    frame[5] = 0x01;
    frame[6] = 0x02;
    frame[11] = 0x02;
    frame[12] = 0x88;
    frame[13] = 0xb5;
    frame
};

/// What the steps are done for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    /// Cut, save, go on.
    Snapshot {
        /// The new epoch.
        epoch: Epoch,
        /// What becomes of frames in flight.
        in_flight: InFlight,
    },
    /// Let captures through that wait at their gates and that nobody wants any more: drain, stop, save, go on, with no new
    /// epoch and nothing recorded. QEMU stops the machine for it in any case; without a drain that would lose frames.
    Disarm,
    /// Drain and stop, and stay so: `diorama pause`.
    Pause,
}

impl Goal {
    fn hold(self) -> Hold {
        match self {
            Goal::Snapshot { .. } | Goal::Disarm => Hold::Cut,
            Goal::Pause => Hold::Pause,
        }
    }
}

/// How a machine comes to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resume {
    /// QEMU resumes it by itself once the device state is saved (background-snapshot).
    ByItself,
    /// The same, but QEMU leaves it as it found it: we resume it when memory begins to come.
    OnceSaved,
    /// We resume it when the migration has completed.
    AfterMigration,
    /// It did not run before, and does not afterwards.
    Never,
}

/// What is asked of the data plane.
#[derive(Debug)]
pub(crate) struct CutJob {
    pub(crate) goal: Goal,
    pub(crate) machines: Vec<CutMachine>,
    /// From the first `stop` until every machine must run again.
    pub(crate) bound: Duration,
}

/// One machine's part of the job.
#[derive(Debug)]
pub(crate) struct CutMachine {
    pub(crate) name: String,
    pub(crate) ports: Vec<PortId>,
    /// The monitor that is used for cuts; none for a machine that is not touched (captured before, still frozen).
    pub(crate) monitor: Option<Parts>,
    /// The one that its disks are pivoted through, if it has any.
    pub(crate) pivot_monitor: Option<Parts>,
    /// Stops it, if it runs now.
    pub(crate) stop: Option<Command>,
    /// Its virtual CPUs' threads.
    pub(crate) vcpu_threads: Vec<u32>,
    /// QEMU's other threads: its main loop, its monitors, its capture.
    pub(crate) service_threads: Vec<u32>,
    /// The disk pivot, then the migration: sent once the machine stands still.
    pub(crate) after_stop: Vec<Command>,
    pub(crate) resume: Resume,
    /// Of the capture. Opened once the machine stands still and its disks are pivoted: lets a migration that waits go on.
    pub(crate) gate: Option<GateHandle>,
    /// Whether a live capture waits at the gate.
    pub(crate) armed: bool,
    /// Its guest has switched it off since it was found running.
    pub(crate) powered_off: bool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct CutOutcome {
    pub(crate) machines: Vec<CutMachineResult>,
    pub(crate) learned: Vec<(NetworkId, [u8; 6], PortId)>,
    /// Frames of older colours that went to other hosts. Final.
    pub(crate) sent: Vec<(PeerId, NetworkId, u64)>,
    pub(crate) failure: Option<CutFailure>,
}

/// Why a cut failed. Everything that could be undone was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CutFailure {
    #[error("QEMU of machine {machine} closed its monitor while {during}; the process has probably died")]
    MonitorClosed { machine: String, during: &'static str },
    #[error("QEMU of machine {machine} refused `{command}`: {reason}")]
    Refused { machine: String, command: String, reason: String },
    #[error("machine {machine}: the migration stream failed: {reason}")]
    Migration { machine: String, reason: String },
    #[error(
        "machine {machine}: QEMU cut a frame short when it was stopped; its network interface needs a restart"
    )]
    TornFrame { machine: String },
    #[error("machine {machine} did not get past {during} within {after_ms} ms")]
    TooLate { machine: String, during: &'static str, after_ms: u64 },
    #[error("the environment has no data plane")]
    NoSegment,
    #[error("another cut of the environment is under way")]
    Busy,
    #[error("the data plane refused the cut: {0}")]
    Switch(String),
}

/// One machine after the cut.
#[derive(Debug)]
pub(crate) struct CutMachineResult {
    pub(crate) name: String,
    /// When its epoch went up, on the data plane's clock.
    pub(crate) cut_at: Option<Time>,
    pub(crate) pause_us: u64,
    pub(crate) stall_us: u64,
    pub(crate) drain_incomplete: bool,
    /// Whether the disk pivot was carried out (also when the cut failed later).
    pub(crate) pivoted: bool,
    /// Whether `migrate` was accepted.
    pub(crate) migrating: bool,
    /// Whether a live capture still waits at its gate.
    pub(crate) armed: bool,
    /// Its guest had switched it off before it was stopped: it is not to run, whatever the capture has made of it.
    pub(crate) powered_off: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Draining,
    Stopping,
    Saving,
    Undoing,
}

#[derive(Debug)]
struct PortDrain {
    port: PortId,
    probes_sent: u32,
    drained: bool,
}

#[derive(Debug)]
struct Progress {
    machine: CutMachine,
    drains: Vec<PortDrain>,
    drain_incomplete: bool,
    /// Its virtual CPUs go before ordinary threads, since it did not drain.
    drain_hurried: bool,
    /// It ran when the cut began.
    running: bool,
    monitor_open: bool,
    stop_id: Option<u64>,
    stopped: bool,
    commands: Vec<(u64, Monitor, &'static str)>,
    pivoted: bool,
    migrating: bool,
    migrated: bool,
    migration_failed: bool,
    saving: bool,
    cut_at: Option<Time>,
    stop_event: Option<Timestamp>,
    resume_event: Option<Timestamp>,
    /// A question whose answer shows that QEMU has left the machine as it found it.
    asked_id: Option<u64>,
    answered: bool,
    cont_id: Option<u64>,
    resumed: bool,
    released_at: Option<Time>,
}

/// A cut under way.
#[derive(Debug)]
pub(super) struct LocalCut {
    goal: Goal,
    stage: Stage,
    machines: Vec<Progress>,
    bound: Duration,
    /// When machines that do not stop have lost their priority or got it back, and how often.
    turned: Option<(Time, u32)>,
    held_at: Time,
    stage_since: Time,
    learned: Vec<(NetworkId, [u8; 6], PortId)>,
    failure: Option<CutFailure>,
    done: Sender<CutOutcome>,
    /// The data plane goes first.
    _hurry: Hurry,
}

impl LocalCut {
    /// Holds the ports and begins to drain.
    pub(super) fn begin(
        job: CutJob,
        done: Sender<CutOutcome>,
        hurry: Hurry,
        segment: &mut Segment,
        io: &mut Io<'_>,
    ) -> Self {
        let now = io.now();
        let machines = job.machines.into_iter().map(Progress::new).collect();
        let mut cut = Self {
            goal: job.goal,
            stage: Stage::Draining,
            machines,
            bound: job.bound,
            turned: None,
            held_at: now,
            stage_since: now,
            learned: Vec::new(),
            failure: None,
            done,
            _hurry: hurry,
        };
        for (index, progress) in cut.machines.iter_mut().enumerate() {
            progress.schedule_service(Policy::First);
            for which in [Monitor::Cut, Monitor::Pivot] {
                if let Some(monitor) = progress.machine.monitor(which) {
                    io.watch_monitor(segment.id(), source_index(index, which), monitor.stream.as_raw_fd());
                }
            }
            for drain in &progress.drains {
                segment.switch_mut().hold(drain.port, cut.goal.hold(), now);
            }
        }
        if let Goal::Snapshot { epoch, in_flight } = cut.goal
            && let Err(error) = segment.start_recording(epoch, in_flight)
        {
            cut.fail(CutFailure::Switch(error.to_string()), segment, io);
        }
        cut
    }

    /// Does what can be done now. Returns true when the cut is over.
    pub(super) fn advance(&mut self, segment: &mut Segment, io: &mut Io<'_>) -> bool {
        loop {
            let before = self.stage;
            let over = match self.stage {
                Stage::Draining => {
                    self.drain(segment, io);
                    false
                }
                Stage::Stopping => {
                    self.note_stopped(segment, io);
                    false
                }
                Stage::Saving => self.note_resumed(segment, io),
                Stage::Undoing => self.note_undone(segment, io),
            };
            if over {
                return true;
            }
            if self.stage == before {
                return false;
            }
        }
    }

    /// When [`LocalCut::advance`] must be called again at the latest.
    pub(super) fn deadline(&self) -> Time {
        let wait = match self.stage {
            Stage::Draining => return Time(0),
            Stage::Saving if self.watches_memory() => return Time(0),
            Stage::Stopping | Stage::Saving => self.bound,
            Stage::Undoing => UNDO_BOUND,
        };
        let end = after(self.stage_since, wait);
        if self.stage == Stage::Stopping { end.min(self.next_turn()) } else { end }
    }

    /// How long to wait when nothing is to be read and the stage polls.
    pub(super) fn poll_interval(&self) -> Option<Duration> {
        (self.stage == Stage::Draining || self.watches_memory()).then_some(DRAIN_POLL)
    }

    /// Whether a machine is resumed as soon as its memory comes, which nothing announces here.
    fn watches_memory(&self) -> bool {
        matches!(self.stage, Stage::Saving | Stage::Undoing)
            && self.machines.iter().any(|progress| {
                progress.machine.resume == Resume::OnceSaved
                    && progress.released_at.is_none()
                    && progress.asked_id.is_none()
            })
    }

    /// Reads what a machine's monitor sent.
    pub(super) fn monitor_readable(&mut self, index: usize, segment: &mut Segment, io: &mut Io<'_>) {
        let (index, which) = of_source_index(index);
        let Some(progress) = self.machines.get_mut(index) else { return };
        let Some(monitor) = progress.machine.monitor_mut(which) else { return };
        let mut chunk = [0; 16 * 1024];
        let mut closed = false;
        loop {
            match (&monitor.stream).read(&mut chunk) {
                Ok(0) => {
                    closed = true;
                    break;
                }
                Ok(read) => monitor.decoder.feed(&chunk[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    closed = true;
                    break;
                }
            }
        }
        let mut failure = None;
        while let Some(message) =
            progress.machine.monitor_mut(which).and_then(|parts| parts.decoder.next_message())
        {
            match message {
                // Both monitors tell of every event; once is enough.
                Ok(Message::Event(_)) if which == Monitor::Pivot => {}
                Ok(message) => failure = failure.or(progress.take(message, which)),
                Err(error) => {
                    tracing::warn!(machine = progress.machine.name, %error, "unreadable QMP message")
                }
            }
        }
        if closed {
            if which == Monitor::Cut {
                progress.monitor_open = false;
            } else {
                // Nothing is answered there any more.
                progress.commands.retain(|(_, monitor, _)| *monitor != Monitor::Pivot);
            }
            let monitor = progress.machine.monitor(which).map(|parts| parts.stream.as_raw_fd());
            if let Some(fd) = monitor {
                io.forget(fd);
            }
            failure = failure.or(Some(CutFailure::MonitorClosed {
                machine: progress.machine.name.clone(),
                during: self.stage.during(),
            }));
        }
        if let Some(failure) = failure {
            self.fail(failure, segment, io);
        }
    }

    // Steps 1 and 2.
    fn drain(&mut self, segment: &mut Segment, io: &mut Io<'_>) {
        let now = io.now();
        let waited = now.since_ns(self.stage_since);
        let (long, late) = (waited > nanoseconds(DRAIN_PATIENCE), waited > nanoseconds(DRAIN_BOUND));
        let mut all_drained = true;
        for progress in &mut self.machines {
            if !progress.running {
                continue;
            }
            for drain in &mut progress.drains {
                drain.advance(segment, io);
            }
            let drained = progress.drains.iter().all(|drain| drain.drained);
            all_drained &= drained;
            if long && !drained && !progress.drain_hurried {
                tracing::debug!(machine = progress.machine.name, "does not drain");
                progress.schedule_guest(Policy::Second);
                progress.drain_hurried = true;
            }
            if late {
                progress.drain_incomplete = !drained;
            }
        }
        if all_drained || late {
            self.enter(Stage::Stopping, now);
            self.stop(segment, io);
        }
    }

    // Step 3.
    fn stop(&mut self, segment: &mut Segment, io: &mut Io<'_>) {
        let mut failure = None;
        for progress in &mut self.machines {
            if let Some(stop) = progress.machine.stop.take() {
                progress.stop_id = Some(stop.id);
                failure = failure.or(progress.finish_command(&stop, Stage::Stopping));
                // A virtual CPU stops by itself, and must run for that. It does nothing else: QEMU's main loop goes before it.
                progress.schedule_guest(Policy::Second);
            }
        }
        if let Some(failure) = failure {
            self.fail(failure, segment, io);
        }
    }

    // Steps 4 and 5, as each `stop` is answered.
    fn note_stopped(&mut self, segment: &mut Segment, io: &mut Io<'_>) {
        for index in 0..self.machines.len() {
            let progress = &mut self.machines[index];
            if progress.cut_at.is_some() || (progress.running && !progress.stopped) {
                continue;
            }
            for drain in &progress.drains {
                if !segment.read_until_empty(drain.port, io) {
                    let machine = progress.machine.name.clone();
                    self.fail(CutFailure::TornFrame { machine }, segment, io);
                    return;
                }
            }
            // Its virtual CPUs sleep now. When they wake, other machines may still stand and go before them. (Not
            // earlier: `stop` is answered only when they have run once more.)
            if progress.running {
                progress.prefer_others(true);
            }
            let now = io.now();
            progress.cut_at = Some(now);
            if let Goal::Snapshot { epoch, .. } = self.goal {
                for drain in &progress.drains {
                    if let Err(error) = segment.switch_mut().advance_epoch(drain.port, epoch, now) {
                        self.fail(CutFailure::Switch(error.to_string()), segment, io);
                        return;
                    }
                }
            }
        }
        if self.machines.iter().all(|progress| progress.cut_at.is_some()) {
            self.learned = segment.learned();
            // Machines that do not stand still yet, of other hosts on this computer, go before what is saved here.
            for progress in &self.machines {
                progress.schedule_service(HURRIED);
            }
            let now = io.now();
            self.enter(Stage::Saving, now);
        } else {
            self.take_turns(io.now());
            self.fail_when_late(segment, io);
        }
    }

    fn next_turn(&self) -> Time {
        match self.turned {
            None => after(self.stage_since, STOP_PATIENCE),
            Some((at, _)) => after(at, STOP_TURN),
        }
    }

    /// Machines that do not stop have no priority every other while: whatever they wait for comes to run.
    fn take_turns(&mut self, now: Time) {
        if now < self.next_turn() {
            return;
        }
        let turns = self.turned.map_or(0, |(_, turns)| turns) + 1;
        self.turned = Some((now, turns));
        let usual = Policy::Normal { nice: super::plane::VCPU_NICE };
        let (service, guest) = match turns % 2 {
            0 => (Policy::First, Policy::Second),
            _ => (Policy::Normal { nice: 0 }, usual),
        };
        for progress in self.machines.iter_mut().filter(|progress| progress.cut_at.is_none()) {
            let machine = &progress.machine.name;
            tracing::debug!(machine, turns, ?service, "does not stop");
            progress.schedule_service(service);
            progress.schedule_guest(guest);
            // A pre-copy that has come to its last round by itself stops the machine and holds QEMU's big lock until what it writes
            // is read: `stop` would wait for the gate, and the gate for it.
            if turns > 1
                && progress.machine.resume == Resume::AfterMigration
                && let Some(gate) = &mut progress.machine.gate
            {
                gate.open();
            }
        }
    }

    // Steps 6 and 7; and 8, as each machine runs again.
    fn note_resumed(&mut self, segment: &mut Segment, io: &mut Io<'_>) -> bool {
        let mut failure = None;
        for progress in &mut self.machines {
            failure = failure.or(progress.send_next());
            if progress.released_at.is_some() || !progress.commands.is_empty() {
                continue;
            }
            // Only now, with the disks pivoted, may QEMU save the devices.
            if let Some(gate) = &mut progress.machine.gate
                && !progress.saving
            {
                progress.saving = true;
                match progress.machine.resume {
                    Resume::ByItself => gate.set_ajar(),
                    Resume::OnceSaved | Resume::AfterMigration | Resume::Never => gate.open(),
                }
            }
            failure = failure.or(progress.resume_when_saved(Stage::Saving));
            let ready = match (self.goal, progress.machine.resume) {
                (Goal::Pause, _) | (_, Resume::Never) => true,
                (_, Resume::ByItself | Resume::OnceSaved) => progress.resumed,
                (_, Resume::AfterMigration) => {
                    if progress.migrated && progress.cont_id.is_none() {
                        failure = failure.or(progress.resume(Stage::Saving));
                    }
                    progress.resumed
                }
            };
            if ready {
                tracing::debug!(
                    machine = progress.machine.name,
                    at_us = io.now().since_ns(self.held_at) / 1000,
                    "released"
                );
                progress.finish((self.goal != Goal::Pause).then_some(Hold::Cut), segment, io);
            }
        }
        if let Some(failure) = failure {
            self.fail(failure, segment, io);
            return false;
        }
        if self.machines.iter().all(|progress| progress.released_at.is_some()) {
            self.conclude(segment, io);
            return true;
        }
        self.fail_when_late(segment, io);
        false
    }

    fn fail_when_late(&mut self, segment: &mut Segment, io: &mut Io<'_>) {
        let waited = io.now().since_ns(self.stage_since);
        if waited <= nanoseconds(self.bound) {
            return;
        }
        let stage = self.stage;
        let late = self.machines.iter().find(|progress| match stage {
            Stage::Stopping => progress.cut_at.is_none(),
            _ => progress.released_at.is_none(),
        });
        if let Some(progress) = late {
            let failure = CutFailure::TooLate {
                machine: progress.machine.name.clone(),
                during: stage.during(),
                after_ms: waited / 1_000_000,
            };
            self.fail(failure, segment, io);
        }
    }

    /// Begins to undo, once; later failures change nothing.
    fn fail(&mut self, failure: CutFailure, segment: &mut Segment, io: &mut Io<'_>) {
        tracing::warn!(%failure, "a cut fails; undoing it");
        if self.failure.is_none() {
            self.failure = Some(failure);
        }
        if self.stage == Stage::Undoing {
            return;
        }
        let now = io.now();
        self.enter(Stage::Undoing, now);
        for progress in &mut self.machines {
            if (progress.stop_id.is_some() || progress.drain_hurried) && progress.cut_at.is_none() {
                progress.schedule_guest(Policy::Normal { nice: super::plane::VCPU_NICE });
            }
            if progress.released_at.is_some() {
                continue;
            }
            if !progress.running || progress.stop_id.is_none() || !progress.monitor_open {
                progress.abandon(self.goal, segment, io);
                continue;
            }
            if progress.saves_live() {
                // It goes on as if nothing had happened, and the machine with it. Nobody else holds it up from now on.
                if progress.saving
                    && let Some(gate) = &mut progress.machine.gate
                {
                    gate.open();
                }
                continue;
            }
            if progress.may_be_migrating() && !progress.is_live() {
                // Refused when there is nothing to cancel: the answer is of no interest.
                let _ = progress.send("migrate_cancel", Stage::Undoing);
            }
            if progress.cont_id.is_none() && progress.resume(Stage::Undoing).is_some() {
                progress.abandon(self.goal, segment, io);
            }
        }
    }

    fn note_undone(&mut self, segment: &mut Segment, io: &mut Io<'_>) -> bool {
        let late = io.now().since_ns(self.stage_since) > nanoseconds(UNDO_BOUND);
        for progress in &mut self.machines {
            if progress.released_at.is_some() {
                continue;
            }
            // A failure to send shows as a monitor that closes.
            let _ = progress.resume_when_saved(Stage::Undoing);
            if progress.cont_id.is_none() && !progress.saves_live() {
                // What was waited for has failed.
                let _ = progress.resume(Stage::Undoing);
            }
            // Whether the disks are pivoted must be known: their overlays are removed if they are not.
            let pivoting = progress.commands.iter().any(|(_, monitor, _)| *monitor == Monitor::Pivot);
            if (progress.resumed && !pivoting) || !progress.monitor_open || late {
                if late && !progress.resumed {
                    tracing::error!(
                        machine = progress.machine.name,
                        "could not make sure that the machine runs on"
                    );
                    let _ = progress.resume(Stage::Undoing);
                }
                progress.abandon(self.goal, segment, io);
            }
        }
        if self.machines.iter().all(|progress| progress.released_at.is_some()) {
            self.conclude(segment, io);
            return true;
        }
        false
    }

    fn enter(&mut self, stage: Stage, now: Time) {
        tracing::debug!(?stage, at_us = now.since_ns(self.held_at) / 1000, "cut");
        if let Goal::Snapshot { .. } = self.goal {
            crate::failpoint::reach(format_args!("cut {}", stage.word()));
        }
        self.stage = stage;
        self.stage_since = now;
    }

    fn conclude(&mut self, segment: &mut Segment, io: &mut Io<'_>) {
        let mut sent = Vec::new();
        if let Goal::Snapshot { epoch, .. } = self.goal {
            if self.failure.is_some() {
                segment.stop_recording(epoch, &[]);
            }
            let channels = segment.channels(epoch).into_iter();
            sent.extend(channels.map(|(peer, network, counts)| (peer, network, counts.sent)));
        }
        let held_at = self.held_at;
        let machines = std::mem::take(&mut self.machines)
            .into_iter()
            .map(|mut progress| {
                // Only now: a machine that runs again is not to slow down another that does not yet.
                if progress.stop_id.is_some() {
                    progress.prefer_others(false);
                }
                if progress.saving
                    && let Some(gate) = &mut progress.machine.gate
                {
                    gate.open();
                }
                for which in [Monitor::Cut, Monitor::Pivot] {
                    if let Some(monitor) = progress.machine.monitor(which) {
                        io.forget(monitor.stream.as_raw_fd());
                    }
                }
                progress.into_result(held_at)
            })
            .collect();
        let outcome = CutOutcome {
            machines,
            learned: std::mem::take(&mut self.learned),
            sent,
            failure: self.failure.take(),
        };
        // Whoever asked may have been killed by a panic; the machines run on all the same.
        let _ = self.done.send(outcome);
    }
}

impl Stage {
    fn word(self) -> &'static str {
        match self {
            Stage::Draining => "draining",
            Stage::Stopping => "stopping",
            Stage::Saving => "saving",
            Stage::Undoing => "undoing",
        }
    }

    fn during(self) -> &'static str {
        match self {
            Stage::Draining => "draining",
            Stage::Stopping => "stopping",
            Stage::Saving => "saving the device state",
            Stage::Undoing => "undoing",
        }
    }
}

impl CutMachine {
    fn monitor(&self, which: Monitor) -> Option<&Parts> {
        match which {
            Monitor::Cut => self.monitor.as_ref(),
            Monitor::Pivot => self.pivot_monitor.as_ref(),
        }
    }

    fn monitor_mut(&mut self, which: Monitor) -> Option<&mut Parts> {
        match which {
            Monitor::Cut => self.monitor.as_mut(),
            Monitor::Pivot => self.pivot_monitor.as_mut(),
        }
    }
}

/// A monitor's number among all that the cut watches.
fn source_index(machine: usize, which: Monitor) -> usize {
    2 * machine + usize::from(which == Monitor::Pivot)
}

fn of_source_index(index: usize) -> (usize, Monitor) {
    (index / 2, if index.is_multiple_of(2) { Monitor::Cut } else { Monitor::Pivot })
}

impl PortDrain {
    fn advance(&mut self, segment: &mut Segment, io: &mut Io<'_>) {
        if self.drained {
            return;
        }
        if segment.switch().mid_frame(self.port) {
            // The rest of a frame that QEMU has half of: it goes out although the port is held.
            segment.flush(self.port, io);
            return;
        }
        let Some(link) = segment.link(self.port) else {
            // Not connected: nothing can be inside QEMU on our account.
            self.drained = true;
            return;
        };
        if !link.is_drained() {
            return;
        }
        if self.probes_sent == PROBES {
            self.drained = true;
        } else if link.send_directly(&PROBE).is_ok() {
            self.probes_sent += 1;
        }
    }
}

impl Progress {
    fn new(machine: CutMachine) -> Self {
        let drains = machine
            .ports
            .iter()
            .map(|port| PortDrain { port: *port, probes_sent: 0, drained: false })
            .collect();
        Self {
            monitor_open: machine.monitor.is_some(),
            running: machine.stop.is_some(),
            machine,
            drains,
            drain_incomplete: false,
            drain_hurried: false,
            stop_id: None,
            stopped: false,
            commands: Vec::new(),
            pivoted: false,
            migrating: false,
            migrated: false,
            migration_failed: false,
            saving: false,
            cut_at: None,
            stop_event: None,
            resume_event: None,
            asked_id: None,
            answered: false,
            cont_id: None,
            resumed: false,
            released_at: None,
        }
    }

    /// Whether its memory is captured while it runs.
    fn is_live(&self) -> bool {
        matches!(self.machine.resume, Resume::ByItself | Resume::OnceSaved)
    }

    fn may_be_migrating(&self) -> bool {
        self.machine.armed
            || self.migrating
            || self.commands.iter().any(|(_, _, command)| *command == "migrate")
    }

    /// Whether QEMU saves the devices now, or has done so, for a live capture.
    fn saves_live(&self) -> bool {
        self.is_live()
            && self.may_be_migrating()
            && (self.saving || !self.machine.armed)
            && !self.migration_failed
    }

    /// Resumes a machine that QEMU leaves standing, once it is saved.
    ///
    /// When its memory begins to come, QEMU's main loop is about to set the machine's state to what it was: standing. A
    /// `cont` that came before would be undone in name only. So something is asked first: QEMU answers after that.
    fn resume_when_saved(&mut self, stage: Stage) -> Option<CutFailure> {
        if self.machine.resume != Resume::OnceSaved || self.cont_id.is_some() || !self.saves_live() {
            return None;
        }
        let memory_comes = self.machine.gate.as_ref().is_some_and(GateHandle::memory_comes);
        if memory_comes && self.asked_id.is_none() {
            let (id, failure) = self.send("query-status", stage)?;
            self.asked_id = Some(id);
            return failure;
        }
        if self.answered { self.resume(stage) } else { None }
    }

    fn resume(&mut self, stage: Stage) -> Option<CutFailure> {
        let (id, failure) = self.send("cont", stage)?;
        self.cont_id = Some(id);
        failure
    }

    /// Sends a command without arguments on the monitor for cuts, without waiting. Returns its id, and why it could not
    /// be sent; nothing for a machine without a monitor.
    fn send(&mut self, name: &'static str, stage: Stage) -> Option<(u64, Option<CutFailure>)> {
        let command = Command::new(self.machine.monitor.as_mut()?, Monitor::Cut, name, Value::Null);
        Some((command.id, self.finish_command(&command, stage)))
    }

    /// Sends the next command for the machine that stands still, once the one before is answered: the disks are pivoted
    /// before anything can let the machine run.
    fn send_next(&mut self) -> Option<CutFailure> {
        if !self.commands.is_empty() || self.machine.after_stop.is_empty() {
            return None;
        }
        let command = self.machine.after_stop.remove(0);
        let failure = self.finish_command(&command, Stage::Saving);
        if failure.is_none() {
            self.commands.push((command.id, command.monitor, command.name));
        }
        failure
    }

    /// Sends the rest of a command that was prepared.
    fn finish_command(&self, command: &Command, stage: Stage) -> Option<CutFailure> {
        let monitor = self.machine.monitor(command.monitor)?;
        command.finish(monitor).err().map(|_| self.monitor_closed(stage))
    }

    fn monitor_closed(&self, stage: Stage) -> CutFailure {
        CutFailure::MonitorClosed { machine: self.machine.name.clone(), during: stage.during() }
    }

    fn take(&mut self, message: Message, monitor: Monitor) -> Option<CutFailure> {
        let is_cut = monitor == Monitor::Cut;
        let place = |commands: &[(u64, Monitor, &str)], id| {
            commands.iter().position(|(sent, on, _)| (*sent, *on) == (id, monitor))
        };
        match message {
            Message::Return { id: Some(id), .. } => {
                if is_cut && self.stop_id == Some(id) {
                    self.stopped = true;
                } else if is_cut && self.asked_id == Some(id) {
                    self.answered = true;
                } else if is_cut && self.cont_id == Some(id) {
                    self.resumed = true;
                } else if let Some(at) = place(&self.commands, id) {
                    match self.commands.remove(at).2 {
                        "transaction" => self.pivoted = true,
                        "migrate" => self.migrating = true,
                        _ => {}
                    }
                }
                None
            }
            // Asked again: the migration says that it has completed before QEMU has left that state.
            Message::Error { id: Some(id), desc, .. }
                if is_cut && self.cont_id == Some(id) && desc == NOT_FINALIZED =>
            {
                self.cont_id = None;
                None
            }
            Message::Error { id: Some(id), desc, .. } => {
                let command = if is_cut && self.stop_id == Some(id) {
                    "stop"
                } else if is_cut && self.cont_id == Some(id) {
                    "cont"
                } else {
                    let at = place(&self.commands, id)?;
                    self.commands.remove(at).2
                };
                Some(CutFailure::Refused {
                    machine: self.machine.name.clone(),
                    command: command.to_owned(),
                    reason: desc,
                })
            }
            Message::Event(event) => match event.name.as_str() {
                "STOP" => {
                    self.stop_event.get_or_insert(event.timestamp);
                    None
                }
                // Only until it is stopped: what is off cannot be switched off, and what runs again is not of the cut.
                "SHUTDOWN" => {
                    self.machine.powered_off |= !self.stopped;
                    None
                }
                "RESUME" => {
                    self.resume_event.get_or_insert(event.timestamp);
                    self.resumed = true;
                    None
                }
                "MIGRATION" => {
                    let status = event.data["status"].as_str().unwrap_or_default();
                    if status == "completed" {
                        self.migrated = true;
                    }
                    self.migration_failed |= status == "failed";
                    (status == "failed").then(|| CutFailure::Migration {
                        machine: self.machine.name.clone(),
                        reason: "QEMU reports that it failed".to_owned(),
                    })
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// Changes its virtual CPUs' priority; only for a user who can take it back.
    fn schedule_guest(&self, policy: Policy) {
        if may_return_from_idle() {
            schedule_threads(&self.machine.vcpu_threads, policy);
        }
    }

    /// Whether whatever else must run goes before this guest.
    fn prefer_others(&self, yes: bool) {
        prefer_others(&self.machine.vcpu_threads, yes);
    }

    /// Changes the priority of QEMU's other threads, which go first until the machine's release.
    fn schedule_service(&self, policy: Policy) {
        schedule_threads(&self.machine.service_threads, policy);
    }

    fn finish(&mut self, release: Option<Hold>, segment: &mut Segment, io: &mut Io<'_>) {
        let now = io.now();
        if let Some(hold) = release {
            for drain in &self.drains {
                segment.switch_mut().release(drain.port, hold, now);
                segment.flush(drain.port, io);
            }
        }
        self.released_at = Some(now);
    }

    /// Gives the machine back as it was before the cut.
    fn abandon(&mut self, goal: Goal, segment: &mut Segment, io: &mut Io<'_>) {
        // As a machine that is saved has them, and the attempt that asked for this.
        self.schedule_service(HURRIED);
        if let (Goal::Snapshot { epoch, .. }, true) = (goal, self.cut_at.is_none()) {
            // Epochs never go back, and a port left behind would wait for ever before the others' new colour.
            let now = io.now();
            for drain in &self.drains {
                if let Err(error) = segment.switch_mut().advance_epoch(drain.port, epoch, now) {
                    tracing::error!(%error, "a port could not be advanced after an aborted cut");
                }
            }
        }
        self.finish(Some(goal.hold()), segment, io);
    }

    fn into_result(self, held_at: Time) -> CutMachineResult {
        let pause_us = match (self.stop_event, self.resume_event) {
            (Some(stop), Some(resume)) if !self.machine.powered_off => {
                u64::try_from(resume.as_micros() - stop.as_micros()).unwrap_or(0)
            }
            _ => 0,
        };
        let stall_us = match (self.running, self.released_at) {
            (true, Some(released)) => released.since_ns(held_at) / 1000,
            _ => 0,
        };
        let migrating = self.may_be_migrating();
        CutMachineResult {
            name: self.machine.name,
            cut_at: self.cut_at,
            pause_us,
            stall_us,
            drain_incomplete: self.drain_incomplete,
            pivoted: self.pivoted,
            migrating,
            armed: self.machine.armed && !self.saving,
            powered_off: self.machine.powered_off,
        }
    }
}

/// Whether whatever else must run goes before these virtual CPUs. Changes nothing for a user who could not take it back.
pub(crate) fn prefer_others(vcpu_threads: &[u32], yes: bool) {
    if !may_return_from_idle() {
        return;
    }
    let policy = if yes { Policy::Idle } else { Policy::Normal { nice: super::plane::VCPU_NICE } };
    schedule_threads(vcpu_threads, policy);
}

/// Whether this user's threads can leave the idle policy again: without privilege they stay in it for ever. Tried once,
/// by a thread that is not needed afterwards.
pub(super) fn may_return_from_idle() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let attempt = || {
            let thread = nix::unistd::gettid().as_raw().cast_unsigned();
            set_thread_policy(thread, Policy::Idle).is_ok()
                && set_thread_policy(thread, Policy::Normal { nice: super::plane::VCPU_NICE }).is_ok()
        };
        std::thread::spawn(attempt).join().unwrap_or(false)
    })
}

fn after(time: Time, wait: Duration) -> Time {
    Time(time.0.saturating_add(nanoseconds(wait)))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_is_a_unicast_frame_of_a_local_experiment() {
        assert_eq!(PROBE[0] & 1, 0, "no group address: promiscuous or not, no guest may answer it");
        assert_eq!(u16::from_be_bytes([PROBE[12], PROBE[13]]), 0x88b5);
    }
}
