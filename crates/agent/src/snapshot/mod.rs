//! Taking a snapshot of a running environment.
//!
//! The protocol (`diorama-cut`) says what to do next; this module does it and tells the protocol what came of it:
//!
//! | action | done in |
//! | --- | --- |
//! | prepare: overlays, capture sockets, RAM files, space | [`prepare`] |
//! | cut: the eight steps | [`crate::dataplane`] |
//! | stop recording: frames in flight go to the store | [`commit`] |
//! | captures end, memory and disks go to the store | [`commit`] |
//! | write the manifest | [`commit`] |
//! | keep, or discard | here |
//!
//! Invariant: dropping an [`Attempt`] at any point leaves the machines running and nothing of the snapshot, unless its
//! manifest was written.

mod commit;
mod compact;
mod frozen;
mod joint;
mod part;
mod prepare;
mod turns;

pub(crate) use commit::modified;
pub(crate) use joint::{protocol_capture, protocol_in_flight};
pub(crate) use part::{CapturedMachine, HostPart, PartWorker, Post};

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use diorama_api::{
    ApiError, CaptureMode, CreateSnapshotRequest, ErrorKind, InFlightPolicy, MachineState, SnapshotReport,
};
use diorama_cut::loopback::{Action, Event, Loopback};
use diorama_cut::report::ChannelCount;
use diorama_cut::{Channel, Config, Epoch, MachineCut, Outcome, Taken};
use diorama_qemu::capability::{self, BackgroundSnapshot};
use diorama_store::{SnapshotId, Writer};
use diorama_switch::{NetworkId, PeerId};

use crate::Agent;
use crate::capture::Capture;
use crate::dataplane::{CutJob, CutMachine, CutOutcome, Goal, SegmentId, Stopped};
use crate::haste::Haste;
use crate::keeper::Keeper;
use crate::operation::Operation;
use crate::problem::{cut_error, store_error};
use crate::ram_cache::NewFiles;
use crate::record::{LayerRecord, Record};
use crate::slot::Slot;

/// How long every machine may take from its stop until it runs again, when memory is captured live.
const LIVE_BOUND: Duration = Duration::from_secs(5);
/// The same when it stands still meanwhile, for each GiB beyond this.
const STOP_BOUND: Duration = Duration::from_secs(120);

/// One attempt at a snapshot.
pub(crate) struct Attempt<'a> {
    agent: &'a Agent,
    slot: Arc<Slot>,
    operation: &'a Operation,
    started: Instant,
    record: Record,
    states: Vec<MachineState>,
    name: String,
    message: String,
    /// The attempt's id.
    attempt: String,
    capture: CaptureMode,
    /// Whether the user did not choose the capture mode, so that another may be taken.
    may_fall_back: bool,
    in_flight: InFlightPolicy,
    writer: Option<Writer>,
    files: Option<NewFiles>,
    machines: Vec<Machine>,
    /// Keeps live captures from being left by an agent that dies.
    keeper: Option<Keeper>,
    /// The monitors for the cut.
    monitors: Vec<prepare::Monitors>,
    /// All that the data plane needs for it.
    ready: Option<(SegmentId, Vec<CutMachine>)>,
    /// The highest epoch that the record on disk allows for.
    reserved: Epoch,
    outcome: Option<CutOutcome>,
    /// From the preparation until all is stored; dropped after captures, which hurry threads as well.
    haste: Option<Haste<'a>>,
    /// Frames in flight are being recorded there.
    recording: Option<(SegmentId, diorama_switch::Epoch)>,
    /// What was recorded.
    stopped: Option<Stopped>,
    created: String,
    frames: Option<diorama_store::FileRecord>,
    written: Vec<diorama_store::MachineRecord>,
    id: Option<SnapshotId>,
    /// What went wrong first, in full.
    error: Option<ApiError>,
}

/// One machine of the attempt, in the order of the specification.
struct Machine {
    name: String,
    /// Runs, so that it is stopped and resumed.
    runs: bool,
    /// Captured before and not moved since: its saved state serves again.
    frozen: bool,
    capture: Option<Capture>,
    /// The overlays that become active at the cut, in the order of the disks.
    overlays: Vec<LayerRecord>,
    pivoted: bool,
    migrating: bool,
    /// A live capture waits at its gate for the machine to be stopped.
    armed: bool,
    /// Its guest has switched it off since it was found running.
    powered_off: bool,
}

impl Machine {
    /// Whether its memory is captured while it runs; one that stands still is captured so.
    fn is_captured_live(&self, capture: CaptureMode) -> bool {
        self.runs && capture == CaptureMode::Live
    }
}

impl Agent {
    /// Takes a snapshot of all machines, live where possible.
    pub(crate) fn create_snapshot(
        &self,
        environment: &str,
        request: CreateSnapshotRequest,
        operation: &Operation,
    ) -> Result<SnapshotReport, ApiError> {
        if self.environment_record(environment).is_some() {
            return self.create_snapshot_in_cluster(environment, request, operation);
        }
        let started = Instant::now();
        let (slot, _guard) = self.slots.enter(environment, "a snapshot", operation)?;
        let record = slot.record_if_up()?;
        self.wait_for_memory(&slot, operation)?;
        let states = self.machine_states(&slot, &record);
        refuse_broken(&record, &states)?;
        let name = self.choose_name(environment, request.name)?;
        let (capture, may_fall_back) = self.choose_capture(request.capture, operation)?;
        let mut attempt = Attempt::new(self, &slot, operation, record, states);
        attempt.started = started;
        attempt.name = name;
        attempt.message = request.message.unwrap_or_default();
        attempt.capture = capture;
        attempt.may_fall_back = may_fall_back;
        attempt.in_flight = request.in_flight;
        let id = attempt.run()?;
        self.report_snapshot(&id)
    }

    pub(crate) fn choose_name(&self, environment: &str, wanted: Option<String>) -> Result<String, ApiError> {
        if let Some(name) = wanted {
            diorama_store::check_snapshot_name(&name).map_err(|problem| {
                store_error(diorama_store::StoreError::BadName { name: name.clone(), problem })
            })?;
            if let Some(id) = self.store.find_name(environment, &name).map_err(store_error)? {
                let environment = environment.to_owned();
                return Err(store_error(diorama_store::StoreError::NameInUse { environment, name, id }));
            }
            return Ok(name);
        }
        for number in 1_u32.. {
            let name = format!("s{number}");
            if self.store.find_name(environment, &name).map_err(store_error)?.is_none() {
                return Ok(name);
            }
        }
        unreachable!("there are more numbers than snapshots")
    }

    pub(crate) fn choose_capture(
        &self,
        wanted: Option<CaptureMode>,
        operation: &Operation,
    ) -> Result<(CaptureMode, bool), ApiError> {
        if matches!(wanted, Some(CaptureMode::Precopy | CaptureMode::Stop)) {
            return Ok((wanted.unwrap_or_default(), false));
        }
        let usable = capability::background_snapshot_usable(&*self.hardware.qemu()?);
        if matches!(usable, BackgroundSnapshot::Usable { .. }) {
            return Ok((CaptureMode::Live, wanted.is_none()));
        }
        let (found, hint) = crate::doctor::background_snapshot(&usable);
        if wanted.is_some() {
            return Err(ApiError::new(
                ErrorKind::Unsupported,
                format!("memory cannot be captured live: {found}"),
            )
            .hint(hint.unwrap_or_else(|| "leave `--capture` out to use pre-copy".to_owned())));
        }
        operation.warn(format!(
            "memory cannot be captured live ({found}); using pre-copy, which pauses machines longer{}",
            hint.map(|hint| format!(". To mend it: {hint}")).unwrap_or_default(),
        ));
        Ok((CaptureMode::Precopy, false))
    }
}

impl<'a> Attempt<'a> {
    /// An attempt at an environment whose machines are in these states: live, frames in flight recorded, without a name.
    fn new(
        agent: &'a Agent,
        slot: &Arc<Slot>,
        operation: &'a Operation,
        record: Record,
        states: Vec<(MachineState, Option<String>)>,
    ) -> Self {
        Self {
            agent,
            slot: Arc::clone(slot),
            operation,
            started: Instant::now(),
            record,
            states: states.into_iter().map(|(state, _)| state).collect(),
            name: String::new(),
            message: String::new(),
            attempt: String::new(),
            capture: CaptureMode::Live,
            may_fall_back: false,
            in_flight: InFlightPolicy::Record,
            writer: None,
            files: None,
            machines: Vec::new(),
            keeper: None,
            monitors: Vec::new(),
            ready: None,
            reserved: Epoch(0),
            outcome: None,
            haste: None,
            recording: None,
            stopped: None,
            created: String::new(),
            frames: None,
            written: Vec::new(),
            id: None,
            error: None,
        }
    }
}

impl Attempt<'_> {
    /// Does what the protocol asks for until the snapshot exists or never will.
    fn run(&mut self) -> Result<SnapshotId, ApiError> {
        self.compact_disks()?;
        let mut protocol = Loopback::new(Epoch(self.record.epoch));
        let config = Config {
            capture: protocol_capture(self.capture),
            in_flight: protocol_in_flight(self.in_flight),
            ..Config::default()
        };
        let attempt_id = diorama_cut::SnapshotId(crate::launch::random_bytes());
        self.attempt = attempt_id.to_string();
        let mut actions: VecDeque<Action> = protocol
            .start(attempt_id, config, self.started.elapsed())
            .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?
            .into();
        let mut outcome = None;
        loop {
            let event = match actions.pop_front() {
                Some(Action::Done { outcome: ended, .. }) => {
                    outcome = Some(ended);
                    continue;
                }
                Some(action) => self.perform(action),
                // Nothing to do but what goes on in the background: the captures.
                None if outcome.is_none() => self.store_machines(),
                None => break,
            };
            actions.extend(protocol.handle(event, self.started.elapsed()));
            if self.operation.is_cancelled() {
                actions.extend(protocol.handle(Event::Cancel, self.started.elapsed()));
            }
        }
        match (outcome, self.id, self.error.take()) {
            (Some(Outcome::Committed), Some(id), _) => Ok(id),
            (_, _, Some(error)) => Err(error),
            (Some(Outcome::Aborted(reason)), _, None) => {
                self.operation.check()?;
                Err(ApiError::new(ErrorKind::CutFailed, format!("the snapshot failed: {reason}"))
                    .hint("the machines run on; nothing of it remains"))
            }
            _ => Err(ApiError::new(ErrorKind::Internal, "the snapshot protocol ended without an outcome")),
        }
    }

    fn perform(&mut self, action: Action) -> Event {
        match action {
            Action::Prepare { .. } => {
                let result = self.prepare();
                self.event(result, Event::Prepared, Event::PrepareFailed)
            }
            Action::Cut { epoch } => match self.cut(epoch) {
                Ok(taken) => Event::CutDone(taken),
                Err(error) => self.failed(error, Event::CutFailed),
            },
            Action::StopRecording => match self.store_frames(Vec::new()) {
                Ok(frames) => Event::RecordingStopped(frames),
                Err(error) => self.failed(error, Event::CaptureFailed),
            },
            Action::WriteManifest { .. } => {
                let result = self.write_manifest();
                self.event(result, Event::ManifestWritten, Event::ManifestFailed)
            }
            Action::Keep => {
                self.keep();
                Event::Finished
            }
            Action::Discard { .. } => {
                self.discard();
                Event::Finished
            }
            Action::Done { .. } => Event::Tick,
        }
    }

    /// The eight steps, on the data plane's thread.
    fn cut(&mut self, epoch: Epoch) -> Result<Taken, ApiError> {
        self.reserve_epoch(epoch)?;
        self.record.epoch = epoch.0;
        self.operation.step("cutting");
        let (segment, machines) = self.ready.take().ok_or_else(|| {
            ApiError::new(ErrorKind::Internal, "a cut was asked for before everything was prepared")
        })?;
        let bound = if self.capture == CaptureMode::Live { LIVE_BOUND } else { STOP_BOUND };
        let goal = Goal::Snapshot {
            epoch: diorama_switch::Epoch(epoch.0),
            in_flight: match self.in_flight {
                InFlightPolicy::Record => diorama_switch::InFlight::Record,
                InFlightPolicy::Drop => diorama_switch::InFlight::Drop,
            },
        };
        let cut = self.agent.plane.cut(segment, CutJob { goal, machines, bound });
        self.created = crate::up::now();
        let outcome = cut.recv().expect("the data plane answers every cut");
        if let Some(haste) = &self.haste {
            haste.hurry_services();
        }
        for (machine, result) in self.machines.iter_mut().zip(&outcome.machines) {
            machine.pivoted = result.pivoted;
            machine.migrating = result.migrating;
            machine.armed = result.armed;
            if machine.migrating
                && machine.is_captured_live(self.capture)
                && let Some(capture) = &mut machine.capture
            {
                capture.must_be_read_out();
            }
        }
        self.keep_off(&outcome);
        self.take_pivoted_overlays()?;
        if let Some(failure) = &outcome.failure {
            return Err(cut_error(failure));
        }
        self.recording = Some((segment, diorama_switch::Epoch(epoch.0)));
        let now = self.agent.plane.call(|plane| plane.now());
        let wall_now = wall_clock_us();
        let machines = outcome
            .machines
            .iter()
            .map(|machine| MachineCut {
                machine: machine.name.clone(),
                cut_at_us: machine.cut_at.map_or(0, |at| wall_now.saturating_sub(now.since_ns(at) / 1000)),
                pause_us: machine.pause_us,
                stall_us: machine.stall_us,
            })
            .collect();
        let state = self.slot.state();
        let peers = state.running.as_ref().map(|running| running.peers.as_slice()).unwrap_or_default();
        let sent = outcome
            .sent
            .iter()
            .filter(|(_, _, copies)| *copies > 0)
            .filter_map(|(peer, network, copies)| {
                let (participant, _) = peers.iter().find(|(_, known)| known == peer)?;
                let channel = Channel { peer: *participant, network: diorama_cut::NetworkId(network.0) };
                Some(ChannelCount { channel, copies: *copies })
            })
            .collect();
        drop(state);
        self.outcome = Some(outcome);
        Ok(Taken { machines, sent })
    }

    /// Writes down that an epoch may be used, before any frame has it: an agent that takes over begins there. Already while
    /// the cut is prepared, or hosts would wait for their disks before they cut.
    fn reserve_epoch(&mut self, epoch: Epoch) -> Result<(), ApiError> {
        if self.reserved >= epoch {
            return Ok(());
        }
        let reserving = Record { epoch: self.record.epoch.max(epoch.0), ..self.record.clone() };
        reserving.save(&self.slot.folder(&self.agent.folders))?;
        self.reserved = epoch;
        Ok(())
    }

    /// The overlays are active from the pivot on, whatever becomes of the snapshot.
    fn take_pivoted_overlays(&mut self) -> Result<(), ApiError> {
        for machine in self.machines.iter_mut().filter(|machine| machine.pivoted) {
            let disks = self.record.disks.get_mut(&machine.name).into_iter().flatten();
            for (disk, overlay) in disks.zip(machine.overlays.drain(..)) {
                disk.layers.push(overlay);
            }
        }
        self.record.save(&self.slot.folder(&self.agent.folders))?;
        self.slot.state().record = Some(self.record.clone());
        Ok(())
    }

    /// Ends the recording of frames in flight, if one is under way. `sent` is what other hosts sent before the cut.
    fn stop_recording(&mut self, sent: Vec<(PeerId, NetworkId, u64)>) {
        if let Some((segment, cut)) = self.recording.take() {
            self.stopped = self.agent.plane.call(move |plane| plane.stop_recording(segment, cut, &sent));
        }
    }

    fn keep(&mut self) {
        // Of a part, another host's writer has made the snapshot; this one has only to go.
        self.writer = None;
        let Some(id) = self.id else { return };
        self.keeper = None;
        if let Some(files) = self.files.take() {
            self.agent.cache.commit(files, &id);
        }
        self.agent.files.trim();
        self.note_resting();
        self.record.snapshot = Some(id);
        if let Err(error) = self.record.save(&self.slot.folder(&self.agent.folders)) {
            self.operation
                .warn(format!("the snapshot exists, but the environment's record was not updated: {error}"));
        }
        self.slot.state().record = Some(self.record.clone());
    }

    fn discard(&mut self) {
        // What it recorded is of no use.
        self.stop_recording(Vec::new());
        self.end_captures();
        self.remove_unused_overlays();
        if self.note_resting()
            && let Err(error) = self.record.save(&self.slot.folder(&self.agent.folders))
        {
            tracing::error!(error = error.message, "the record does not say which machines are at rest");
        }
        self.files = None;
        if let Some(writer) = self.writer.take()
            && let Err(error) = writer.abort()
        {
            tracing::error!(%error, "a partial snapshot is left; the next agent removes it");
        }
        // The epoch went up all the same.
        self.slot.state().record = Some(self.record.clone());
    }

    fn event(&mut self, result: Result<(), ApiError>, done: Event, failed: fn(String) -> Event) -> Event {
        match result {
            Ok(()) => done,
            Err(error) => self.failed(error, failed),
        }
    }

    fn failed(&mut self, error: ApiError, event: fn(String) -> Event) -> Event {
        let mut detail = error.message.clone();
        detail.truncate(detail.floor_char_boundary(diorama_cut::message::MAX_DETAIL_BYTES));
        self.error.get_or_insert(error);
        event(detail)
    }
}

/// Microseconds since 1970, UTC, as this host's clock has them.
pub(crate) fn wall_clock_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn refuse_broken(record: &Record, states: &[(MachineState, Option<String>)]) -> Result<(), ApiError> {
    for (machine, (state, reason)) in record.specification.machines.iter().zip(states) {
        if matches!(state, MachineState::Dead | MachineState::Crashed | MachineState::Starting) {
            let reason = reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            return Err(ApiError::new(
                ErrorKind::WrongState,
                format!("machine {} cannot be captured: it is not running{reason}", machine.name),
            )
            .hint("`diorama restore SNAPSHOT` brings the environment back, `diorama down` and `up` start it anew"));
        }
    }
    Ok(())
}
