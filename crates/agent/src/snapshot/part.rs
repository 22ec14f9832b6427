//! This host's part in the cuts of an environment that spans hosts.
//!
//! A thread for each such environment owns the participant of the protocol (`diorama-cut`). Messages, newer colours and the
//! clock go in; what comes out is done here, with the same [`Attempt`] that serves an environment on one host.
//!
//! Invariants:
//! - whatever the participant says it has done, it has: an [`Attempt`] lives from `StartPrepare` to `Keep` or `Discard`;
//! - while an attempt lives, the environment's slot is busy with it, so that nothing else changes the machines;
//! - before a report can be sent, the record says that its cut is in doubt.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use diorama_api::{ApiError, CaptureMode, ErrorKind, InFlightPolicy, MachineState};
use diorama_cut::message::Body;
use diorama_cut::participant::{Input, Output};
use diorama_cut::{
    Channel, CutId, Epoch, MachineReport, Message, NetworkId, Participant, ParticipantId, SnapshotId,
    initiator,
};
use diorama_qemu::process::Policy;
use diorama_store::{Bytes, FileRecord, LearnedRecord, MachineRecord};
use diorama_switch::PeerId;
use serde::{Deserialize, Serialize};

use super::commit::defect;
use super::{Attempt, refuse_broken};
use crate::Agent;
use crate::dataplane::SegmentId;
use crate::operation::Operation;
use crate::problem::store_error;
use crate::record::{Doubt, Record};
use crate::slot::{OperationGuard, Slot};
use crate::span::{CUT_NICE, Urgent};

/// How often frames from other hosts are counted while they are waited for.
const COUNT_INTERVAL: Duration = Duration::from_millis(1);
/// How long a thread waits when nothing is to be done: there is no timer then.
const IDLE_WAIT: Duration = Duration::from_secs(3600);

/// Sends a message of the protocol to another host (or to this one). It may be lost.
pub(crate) type Post = Arc<dyn Fn(ParticipantId, Message) + Send + Sync>;

/// What a report says of one machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CapturedMachine {
    pub(crate) machine: MachineRecord,
    /// What belongs to the host as a whole; stands with its first machine.
    pub(crate) host: Option<HostPart>,
}

/// What a host adds to a snapshot beside its machines.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HostPart {
    pub(crate) frames: FileRecord,
    /// What the host's part takes in the store.
    pub(crate) bytes: Bytes,
    /// By network, in the order of the specification.
    pub(crate) learned: Vec<Vec<LearnedRecord>>,
}

/// Where messages for the initiator go, while there is one on this host.
type Initiators = Arc<Mutex<Option<(SnapshotId, Sender<initiator::Input>)>>>;

/// The attempt that the thread is busy with.
#[derive(Debug)]
struct Current {
    attempt: SnapshotId,
    initiator: ParticipantId,
    /// When its initiator's host was asked last whether it is still at it.
    asked: Instant,
    operation: Operation,
}

/// The handle on an environment's thread. It ends when the last handle goes.
#[derive(Debug, Clone)]
pub(crate) struct PartWorker {
    inbox: Sender<Input>,
    initiator: Initiators,
    current: Arc<Mutex<Option<Current>>>,
}

impl PartWorker {
    /// Starts the thread for an environment. `doubt` is the cut that this host had reported when its last agent died.
    pub(crate) fn start(
        agent: &Arc<Agent>,
        slot: &Arc<Slot>,
        me: ParticipantId,
        doubt: Option<(CutId, ParticipantId)>,
        post: Post,
    ) -> std::io::Result<Self> {
        let (inbox, inputs) = channel();
        let current = Arc::new(Mutex::new(None));
        let worker = Self { inbox, initiator: Arc::default(), current: Arc::clone(&current) };
        let (agent, slot) = (Arc::clone(agent), Arc::clone(slot));
        let name = format!("cuts {}", slot.name);
        std::thread::Builder::new().name(name).spawn(move || {
            crate::span::prefer_this_thread();
            let epoch = Epoch(slot.state().record.as_ref().map_or(0, |record| record.epoch));
            let participant = match doubt {
                Some((cut, initiator)) => Participant::recover(me, epoch, cut, initiator, Duration::ZERO),
                None => Participant::new(me, epoch),
            };
            let mut part = Part {
                agent: &agent,
                slot,
                participant,
                inputs,
                queue: VecDeque::new(),
                current,
                post,
                origin: Instant::now(),
                initiator: me,
                proposed: epoch,
                reserved: epoch,
            };
            while part.serve_one() {}
        })?;
        Ok(worker)
    }

    /// A message for the participant came from an authenticated host.
    pub(crate) fn deliver(&self, from: ParticipantId, message: Message) {
        if matches!(message.body, Body::Abort { .. })
            && let Some(current) = &*self.current.lock().unwrap_or_else(PoisonError::into_inner)
            && current.attempt == message.cut.snapshot
        {
            // The thread may be busy preparing or storing.
            current.operation.withdraw();
        }
        self.feed(Input::Message { from, message });
    }

    /// Messages for the initiator of an attempt go there, for as long as what is returned lives.
    pub(crate) fn receive_as_initiator(
        &self,
        attempt: SnapshotId,
        inbox: Sender<initiator::Input>,
    ) -> Receiving {
        *self.initiator.lock().unwrap_or_else(PoisonError::into_inner) = Some((attempt, inbox));
        Receiving(Arc::clone(&self.initiator))
    }

    /// Whether this host's initiator is at work on an attempt.
    pub(crate) fn initiates(&self, attempt: SnapshotId) -> bool {
        let initiator = self.initiator.lock().unwrap_or_else(PoisonError::into_inner);
        initiator.as_ref().is_some_and(|(known, _)| *known == attempt)
    }

    /// The attempt that this host takes part in, and whose it is; at most once in an interval, and not in the first.
    pub(crate) fn attempt_to_ask_about(&self, interval: Duration) -> Option<(SnapshotId, ParticipantId)> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let current = current.as_mut().filter(|current| current.asked.elapsed() >= interval)?;
        current.asked = Instant::now();
        Some((current.attempt, current.initiator))
    }

    /// Hands over what is for the initiator. Gives it back when there is none.
    pub(crate) fn initiator_takes(&self, input: initiator::Input) -> Option<initiator::Input> {
        match &*self.initiator.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((_, inbox)) => inbox.send(input).err().map(|unsent| unsent.0),
            None => Some(input),
        }
    }

    /// Something else happened.
    pub(crate) fn feed(&self, input: Input) {
        // The thread ends with its last handle, and this is one.
        let _ = self.inbox.send(input);
    }
}

/// See [`PartWorker::receive_as_initiator`].
pub(crate) struct Receiving(Initiators);

impl Drop for Receiving {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

struct Part<'a> {
    agent: &'a Agent,
    slot: Arc<Slot>,
    participant: Participant,
    inputs: Receiver<Input>,
    queue: VecDeque<Output>,
    current: Arc<Mutex<Option<Current>>>,
    post: Post,
    origin: Instant,
    /// Who asked for a cut last.
    initiator: ParticipantId,
    /// The epoch that was asked for.
    proposed: Epoch,
    /// The highest epoch that this thread has had written down before it is used.
    reserved: Epoch,
}

impl Part<'_> {
    /// Does what comes next when no attempt is under way. False when the environment is gone.
    fn serve_one(&mut self) -> bool {
        let Some(output) = self.next(None) else { return false };
        match output {
            Some(Output::StartPrepare { snapshot, capture, in_flight }) => {
                let operation = Operation::unattended();
                self.set_current(Some(Current {
                    attempt: snapshot,
                    initiator: self.initiator,
                    asked: Instant::now(),
                    operation: operation.clone(),
                }));
                self.attempt(snapshot, (capture_mode(capture), in_flight_policy(in_flight)), &operation);
                self.set_current(None);
            }
            // The attempt that this is about died with the agent before.
            Some(Output::Keep { cut }) => {
                self.note_outcome(Some(cut.snapshot));
                self.feed(Input::Finished { cut });
            }
            Some(Output::Discard { cut, epoch, .. }) => {
                self.raise(epoch);
                self.note_outcome(None);
                self.feed(Input::Finished { cut });
            }
            Some(other) => tracing::error!(?other, "the snapshot protocol asks for something out of order"),
            None => {}
        }
        true
    }

    /// One attempt, from its preparation until it is kept or discarded.
    fn attempt(&mut self, snapshot: SnapshotId, terms: (CaptureMode, InFlightPolicy), operation: &Operation) {
        let begun = self.begin(operation);
        let (mut attempt, _guard) = match begun {
            Ok((record, states, guard)) => {
                let mut attempt = Attempt::new(self.agent, &self.slot, operation, record, states);
                (attempt.capture, attempt.in_flight) = terms;
                (Some(attempt), Some(guard))
            }
            Err(error) => {
                self.feed(Input::PrepareFailed { snapshot, detail: detail(&error) });
                (None, None)
            }
        };
        let mut urgent = None;
        if let Some(attempt) = &mut attempt {
            let prepared = attempt
                .compact_disks()
                .and_then(|()| attempt.prepare())
                .and_then(|()| attempt.reserve_epoch(self.proposed))
                .and_then(|()| self.check_sessions());
            if prepared.is_ok() {
                self.reserved = self.reserved.max(self.proposed);
                urgent = Some(Urgent::begin(Policy::Normal { nice: CUT_NICE }));
            }
            self.feed(match prepared {
                Ok(()) => Input::Prepared { snapshot },
                Err(error) => Input::PrepareFailed { snapshot, detail: detail(&error) },
            });
        }
        let mut counting: Option<CutId> = None;
        let mut told: BTreeMap<(PeerId, u16), u64> = BTreeMap::new();
        loop {
            let Some(output) = self.next(counting.map(|_| COUNT_INTERVAL)) else {
                // The environment goes down; what was begun goes with it.
                if let Some(attempt) = &mut attempt {
                    attempt.discard();
                }
                return;
            };
            // A colour that was adopted meanwhile stays in what the attempt writes down.
            if let Some(attempt) = &mut attempt {
                attempt.record.epoch = attempt.record.epoch.max(self.participant.epoch().0);
            }
            match (output, &mut attempt) {
                (None, Some(attempt)) => {
                    if let Some(cut) = counting {
                        self.count(attempt, cut, &mut told);
                    }
                }
                (Some(Output::StartCut { cut }), Some(attempt)) => {
                    let taken = attempt.cut(cut.epoch);
                    urgent = None;
                    match taken {
                        Ok(taken) => {
                            counting = Some(cut);
                            self.feed(Input::CutDone { cut, taken });
                        }
                        Err(error) => self.feed(Input::CutFailed { cut, detail: detail(&error) }),
                    }
                }
                (Some(Output::StopRecording { cut, missing }), Some(attempt)) => {
                    counting = None;
                    let sent = self.sent_to_us(&told, &missing);
                    let stored = attempt.store_frames(sent);
                    match stored {
                        Ok(networks) => self.feed(Input::RecordingStopped { cut, networks }),
                        Err(error) => {
                            self.feed(Input::CaptureFailed { cut, detail: detail(&error) });
                            continue;
                        }
                    }
                    let captured = attempt.capture_for_report(cut, self.initiator);
                    self.feed(captured);
                }
                (Some(Output::Keep { cut }), Some(attempt)) => {
                    attempt.id = self.agent.store.find_attempt(&cut.snapshot.to_string()).ok().flatten();
                    attempt.keep();
                    self.note_outcome(Some(cut.snapshot));
                    self.feed(Input::Finished { cut });
                    return;
                }
                (Some(Output::Discard { cut, epoch, .. }), attempt) => {
                    drop(urgent.take());
                    if let Some(attempt) = attempt {
                        attempt.discard();
                    }
                    self.raise(epoch);
                    self.note_outcome(None);
                    self.feed(Input::Finished { cut });
                    return;
                }
                (Some(other), _) => {
                    tracing::error!(?other, "the snapshot protocol asks for something out of order");
                }
                (None, None) => {}
            }
        }
    }
}

/// What an attempt begins with.
type Begun = (Record, Vec<(MachineState, Option<String>)>, OperationGuard);

impl Part<'_> {
    fn begin(&self, operation: &Operation) -> Result<Begun, ApiError> {
        let (slot, guard) = self.agent.slots.enter(self.slot.name.as_str(), "a snapshot", operation)?;
        let record = slot.record_if_up()?;
        let states = self.agent.machine_states(&slot, &record);
        refuse_broken(&record, &states)?;
        Ok((record, states, guard))
    }

    /// Without a session with every other host, frames could be neither counted nor delivered.
    fn check_sessions(&self) -> Result<(), ApiError> {
        let Some((segment, peers)) = self.peers() else { return Ok(()) };
        let status =
            self.agent.plane.call(move |plane| plane.segment(segment).map(|segment| segment.peer_status()));
        let missing = status.into_iter().flatten().find(|status| !status.connected);
        let Some(missing) = missing else { return Ok(()) };
        let host = peers.iter().find(|(_, peer)| *peer == missing.peer).map_or(0, |(host, _)| host.0);
        Err(ApiError::new(
            ErrorKind::CutFailed,
            format!("there is no tunnel between this host and number {host} of the environment's hosts"),
        )
        .hint(
            "hosts that were restarted connect again within seconds; `diorama host list` shows who is there",
        ))
    }

    /// Tells the participant how many frames from other hosts have come.
    fn count(&mut self, attempt: &Attempt<'_>, cut: CutId, told: &mut BTreeMap<(PeerId, u16), u64>) {
        let (Some((segment, peers)), Some((_, epoch))) = (self.peers(), attempt.recording) else { return };
        let channels = self
            .agent
            .plane
            .call(move |plane| plane.segment(segment).map(|segment| segment.channels(epoch)))
            .unwrap_or_default();
        for (peer, network, counts) in channels {
            let Some((from, _)) = peers.iter().find(|(_, known)| *known == peer) else { continue };
            told.insert((peer, network.0), counts.received);
            self.feed(Input::OldColourReceived {
                cut,
                channel: Channel { peer: *from, network: NetworkId(network.0) },
                received: counts.received,
                known_lost: counts.lost,
            });
        }
    }

    /// What other hosts sent before the cut, by what was received and what is missing.
    fn sent_to_us(
        &self,
        told: &BTreeMap<(PeerId, u16), u64>,
        missing: &BTreeMap<Channel, u64>,
    ) -> Vec<(PeerId, diorama_switch::NetworkId, u64)> {
        let Some((_, peers)) = self.peers() else { return Vec::new() };
        let mut sent = Vec::new();
        for ((peer, network), received) in told {
            let Some((from, _)) = peers.iter().find(|(_, known)| known == peer) else { continue };
            let channel = Channel { peer: *from, network: NetworkId(*network) };
            let missing = missing.get(&channel).copied().unwrap_or(0);
            sent.push((*peer, diorama_switch::NetworkId(*network), received + missing));
        }
        sent
    }

    fn peers(&self) -> Option<(SegmentId, Vec<(ParticipantId, PeerId)>)> {
        let state = self.slot.state();
        let running = state.running.as_ref()?;
        Some((running.segment, running.peers.clone()))
    }

    /// Every port has at least this epoch from now on, and the record says so.
    fn raise(&self, epoch: Epoch) {
        let mut state = self.slot.state();
        if let Some(record) = &mut state.record
            && record.epoch < epoch.0
        {
            record.epoch = epoch.0;
            // What is reserved for the cut under way stays so: its ports may have it before anything else is written.
            let written = Record { epoch: epoch.0.max(self.reserved.0), ..record.clone() };
            if let Err(error) = written.save(&self.slot.folder(&self.agent.folders)) {
                tracing::error!(error = error.message, "an epoch is not recorded");
            }
        }
        let segment = state.running.as_ref().map(|running| running.segment);
        drop(state);
        if let Some(segment) = segment {
            self.agent.plane.call(move |plane| plane.raise_epoch(segment, diorama_switch::Epoch(epoch.0)));
        }
    }

    /// The cut that was in doubt is so no more.
    fn note_outcome(&self, kept: Option<SnapshotId>) {
        let kept =
            kept.and_then(|attempt| self.agent.store.find_attempt(&attempt.to_string()).ok().flatten());
        let mut state = self.slot.state();
        if let Some(record) = &mut state.record {
            record.doubt = None;
            record.snapshot = kept.or(record.snapshot);
            if let Err(error) = record.save(&self.slot.folder(&self.agent.folders)) {
                tracing::error!(error = error.message, "a cut's outcome is not recorded");
            }
        }
    }

    fn set_current(&self, current: Option<Current>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
    }

    fn feed(&mut self, input: Input) {
        if let Input::Message { from, message } = &input
            && matches!(message.body, Body::Prepare(_))
        {
            self.initiator = *from;
            self.proposed = message.cut.epoch;
        }
        let before = self.participant.state_name();
        self.queue.extend(self.participant.handle(input, self.origin.elapsed()));
        let now = self.participant.state_name();
        if now != before {
            crate::failpoint::reach(format_args!("participant {now}"));
        }
    }

    /// The next thing to do; messages are sent and colours adopted on the way. `Some(None)` when there is nothing for as
    /// long as `patience` says; `None` when nobody holds the handle any more.
    fn next(&mut self, patience: Option<Duration>) -> Option<Option<Output>> {
        loop {
            while let Some(output) = self.queue.pop_front() {
                match output {
                    Output::Send { to, message } => (self.post)(to, message),
                    Output::RaiseEpoch { epoch } => self.raise(epoch),
                    Output::Rejected { from, violation } => {
                        tracing::warn!(%from, ?violation, "a message broke the snapshot protocol");
                    }
                    other => return Some(Some(other)),
                }
            }
            let due = self.participant.poll_timeout().map(|due| due.saturating_sub(self.origin.elapsed()));
            let wait = due.into_iter().chain(patience).min().unwrap_or(IDLE_WAIT);
            match self.inputs.recv_timeout(wait) {
                Ok(input) => self.feed(input),
                Err(RecvTimeoutError::Timeout) => {
                    self.feed(Input::Tick);
                    if self.queue.is_empty() && patience.is_some() {
                        return Some(None);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }
}

impl Attempt<'_> {
    /// Waits for the captures, stores them, and makes a report of them. The record says from then on that the cut is in
    /// doubt.
    fn capture_for_report(&mut self, cut: CutId, initiator: ParticipantId) -> Input {
        match self.try_capture_for_report(cut, initiator) {
            Ok(machines) => Input::CaptureDone { cut, machines },
            Err(error) => Input::CaptureFailed { cut, detail: detail(&error) },
        }
    }

    fn try_capture_for_report(
        &mut self,
        cut: CutId,
        initiator: ParticipantId,
    ) -> Result<Vec<MachineReport>, ApiError> {
        let written = self.try_store_machines()?;
        self.writer
            .as_ref()
            .ok_or_else(|| defect("a report without a writer"))?
            .publish()
            .map_err(store_error)?;
        let mut host = Some(self.host_part()?);
        let machines = written
            .into_iter()
            .map(|machine| {
                let name = machine.name.clone();
                let captured = CapturedMachine { machine, host: host.take() };
                let captured = serde_json::to_vec(&captured).map_err(|error| {
                    ApiError::new(ErrorKind::Internal, format!("a report cannot be written: {error}"))
                })?;
                Ok(MachineReport { machine: name, captured })
            })
            .collect::<Result<_, ApiError>>()?;
        self.record.doubt =
            Some(Doubt { attempt: cut.snapshot.0, epoch: cut.epoch.0, initiator: initiator.0 });
        self.record.save(&self.slot.folder(&self.agent.folders))?;
        Ok(machines)
    }
}

fn capture_mode(mode: diorama_cut::CaptureMode) -> CaptureMode {
    match mode {
        diorama_cut::CaptureMode::Live => CaptureMode::Live,
        diorama_cut::CaptureMode::PreCopy => CaptureMode::Precopy,
        diorama_cut::CaptureMode::Stop => CaptureMode::Stop,
    }
}

fn in_flight_policy(policy: diorama_cut::InFlight) -> InFlightPolicy {
    match policy {
        diorama_cut::InFlight::Record => InFlightPolicy::Record,
        diorama_cut::InFlight::Drop => InFlightPolicy::Drop,
    }
}

/// An error's words, as far as a message of the protocol may carry them.
fn detail(error: &ApiError) -> String {
    let mut detail = error.message.clone();
    detail.truncate(detail.floor_char_boundary(diorama_cut::message::MAX_DETAIL_BYTES));
    detail
}
