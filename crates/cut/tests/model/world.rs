//! The model: one initiator and some hosts over a faulty network, and everything that may happen next.
//!
//! Messages are delivered in any order; the network may lose some, and repeat some. With [`Bounds::forever`] a message
//! that was sent once may be delivered at any later time and any number of times, or never: that is every loss,
//! repetition and reordering there can be. Frames between machines overtake each other and get lost.
//!
//! Time: a host's clock moves only when one of its timers fires. A timer fires in two cases. When nothing else can happen,
//! time passes, and the one with the shortest wait is next. And at any moment, as long as there is budget for it
//! (`hurries`): the rest of the world is slow.
//!
//! Every action uses up something (a message, a budget, a step of work, a timer of finitely many), so every run ends.

use std::time::Duration;

use diorama_cut::initiator::{self, Config, Initiator, Outcome};
use diorama_cut::message::{AbortReason::DeadlinePassed, Epoch, FailReason, Message};
use diorama_cut::participant::{self, DiscardReason, Participant};
use diorama_cut::report::Frames;
use diorama_cut::{CutId, ParticipantId, SnapshotId};
use stateright::{Model, Property};

use crate::{
    host::{self, Attempts, Frame, FrameAt, Host, NETWORK, Place, Port, Work, bit},
    network::{Network, Node},
    properties,
};

/// How much of what may happen.
#[derive(Debug, Clone)]
pub struct Bounds {
    pub hosts: usize,
    pub machines: usize,
    /// The frames that machines send, in this order, each at any time.
    pub frames: Vec<(Place, Place)>,
    pub attempts: u8,
    pub forever: bool,
    /// Frames carry no colour: what a judge must see.
    pub colourless: bool,
    pub faults: Faults,
}

/// What is left of each fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Faults {
    /// Messages lost.
    pub lose: u8,
    /// Messages delivered once more.
    pub repeat: u8,
    /// Frames lost.
    pub lose_frame: u8,
    pub crash_host: u8,
    pub crash_initiator: u8,
    /// Preparing, cutting, capturing or writing the manifest fails, or somebody cancels.
    pub fail: u8,
    /// Timers that fire before all else has happened.
    pub hurries: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    pub initiator: Initiator,
    pub initiator_now: Duration,
    pub writing: Option<Written>,
    pub hosts: Vec<Host>,
    pub network: Network,
    pub frames: Vec<Frame>,
    pub faults: Faults,
    pub attempts: u8,
    /// The store: snapshots that exist.
    pub manifests: Attempts,
    /// Judge: snapshots that somebody was told are committed, and aborted.
    pub told_committed: Attempts,
    pub told_aborted: Attempts,
    /// Judge: snapshots that had no excuse: begun at rest, and no fault after.
    pub must_succeed: Attempts,
    /// Judge: some cut was begun by a frame.
    pub frame_began_a_cut: bool,
    /// Judge: a rule was broken on the way, which no later state shows.
    pub broken: Option<&'static str>,
}

/// A manifest that is being written, with the protocol's own account of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Written {
    pub cut: CutId,
    pub account: Frames,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Start,
    Deliver(usize),
    Repeat(usize),
    Lose(usize),
    SendFrame,
    FrameArrives(usize),
    FrameLost(usize),
    WorkDone(usize),
    WorkFails(usize),
    ManifestWritten,
    ManifestFails,
    Cancel,
    HostTimer(usize),
    InitiatorTimer,
    /// One that prepares may have its record written already, and has told nobody.
    CrashHost {
        id: usize,
        has_reserved: bool,
    },
    /// If a manifest is being written, it may be complete, or it never will be.
    CrashInitiator {
        manifest_complete: bool,
    },
}

/// Enough for each fault that somebody makes up for by asking again.
const DEADLINE: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(100);
const NEVER: Duration = Duration::from_secs(3600);

impl Model for Bounds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            initiator: Initiator::new(Epoch(0)),
            initiator_now: Duration::ZERO,
            writing: None,
            hosts: (0..self.hosts).map(|id| Host::new(id, self.machines)).collect(),
            network: Network::default(),
            frames: Vec::new(),
            faults: self.faults,
            attempts: 0,
            manifests: 0,
            told_committed: 0,
            told_aborted: 0,
            must_succeed: 0,
            frame_began_a_cut: false,
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let faults = &state.faults;
        for at in state.network.distinct() {
            actions.push(Action::Deliver(at));
            if faults.repeat > 0 {
                actions.push(Action::Repeat(at));
            }
            if faults.lose > 0 {
                actions.push(Action::Lose(at));
            }
        }
        for (number, frame) in state.frames.iter().enumerate() {
            if frame.at == FrameAt::Wire {
                actions.push(Action::FrameArrives(number));
                if faults.lose_frame > 0 {
                    actions.push(Action::FrameLost(number));
                }
            }
        }
        for (id, host) in state.hosts.iter().enumerate() {
            if let Some(work) = host.work {
                actions.push(Action::WorkDone(id));
                if faults.fail > 0 && !matches!(work, Work::Finishing(_)) {
                    actions.push(Action::WorkFails(id));
                }
            }
        }
        if state.writing.is_some() {
            actions.push(Action::ManifestWritten);
            if faults.fail > 0 {
                actions.push(Action::ManifestFails);
            }
        }
        // From here on: what need not happen for the world to go on, and timers.
        let all_else_is_done = actions.is_empty();
        if state.initiator.active().is_none() && state.attempts < self.attempts {
            actions.push(Action::Start);
        }
        if state.frames.len() < self.frames.len() {
            actions.push(Action::SendFrame);
        }
        let due = state.shortest_wait().filter(|_| all_else_is_done);
        for (timer, wait) in state.timers() {
            if faults.hurries > 0 || due == Some(wait) {
                actions.push(timer);
            }
        }
        if faults.crash_host > 0 {
            for (id, host) in state.hosts.iter().enumerate().filter(|(id, host)| host.has_to_lose(*id)) {
                actions.push(Action::CrashHost { id, has_reserved: false });
                if matches!(host.work, Some(Work::Preparing(_))) {
                    actions.push(Action::CrashHost { id, has_reserved: true });
                }
            }
        }
        if state.initiator.active().is_some() {
            if faults.crash_initiator > 0 {
                actions.push(Action::CrashInitiator { manifest_complete: false });
                if state.writing.is_some() {
                    actions.push(Action::CrashInitiator { manifest_complete: true });
                }
            }
            if faults.fail > 0 {
                actions.push(Action::Cancel);
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        state.perform(self, action);
        // A message that says nothing new, where it can be delivered without end.
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all(self)
    }
}

impl State {
    /// Nobody is in a cut, and nothing is on its way.
    pub fn at_rest(&self) -> bool {
        self.network.is_empty()
            && self.writing.is_none()
            && self.initiator.active().is_none()
            && self.hosts.iter().all(|host| host.participant.active().is_none() && host.work.is_none())
    }

    /// The timers that are set, and how long each has to wait by its host's clock.
    fn timers(&self) -> impl Iterator<Item = (Action, Duration)> + '_ {
        let initiator = (Action::InitiatorTimer, self.initiator.poll_timeout(), self.initiator_now);
        let hosts = self.hosts.iter().enumerate();
        let hosts =
            hosts.map(|(id, host)| (Action::HostTimer(id), host.participant.poll_timeout(), host.now));
        let all = [initiator].into_iter().chain(hosts);
        all.filter_map(|(timer, due, now)| Some((timer, due?.saturating_sub(now))))
    }

    fn shortest_wait(&self) -> Option<Duration> {
        self.timers().map(|(_, wait)| wait).min()
    }

    fn perform(&mut self, bounds: &Bounds, action: Action) {
        let hurried = self
            .timers()
            .any(|(timer, wait)| timer == action && !(self.is_quiet() && self.shortest_wait() == Some(wait)));
        let before = self.faults;
        if hurried {
            self.faults.hurries -= 1;
        }
        match action {
            Action::Start => self.start(bounds),
            Action::Deliver(at) if bounds.forever => self.deliver(bounds, at, true),
            Action::Deliver(at) => self.deliver(bounds, at, false),
            Action::Repeat(at) => {
                self.faults.repeat -= 1;
                self.deliver(bounds, at, true);
            }
            Action::Lose(at) => {
                self.faults.lose -= 1;
                self.network.remove(at);
            }
            Action::SendFrame => self.send_frame(bounds),
            Action::FrameArrives(number) => self.frame_arrives(bounds, number),
            Action::FrameLost(number) => {
                self.faults.lose_frame -= 1;
                self.frames[number].at = FrameAt::Gone;
            }
            Action::WorkDone(host) => self.work_done(bounds, host),
            Action::WorkFails(host) => self.work_fails(bounds, host),
            Action::ManifestWritten => {
                let Written { cut, account } = self.writing.take().expect("a manifest");
                self.check_account(cut, account);
                self.manifests |= bit(cut);
                self.feed_initiator(bounds, initiator::Input::ManifestWritten { cut });
            }
            Action::ManifestFails => {
                self.faults.fail -= 1;
                let Written { cut, .. } = self.writing.take().expect("a manifest");
                let detail = String::new();
                self.feed_initiator(bounds, initiator::Input::ManifestFailed { cut, detail });
            }
            Action::Cancel => {
                self.faults.fail -= 1;
                self.feed_initiator(bounds, initiator::Input::Cancel);
            }
            Action::HostTimer(id) => {
                let host = &mut self.hosts[id];
                host.now = host.participant.poll_timeout().expect("a timer").max(host.now);
                self.feed_host(bounds, id, participant::Input::Tick);
            }
            Action::InitiatorTimer => {
                self.initiator_now = self.initiator.poll_timeout().expect("a timer").max(self.initiator_now);
                self.feed_initiator(bounds, initiator::Input::Tick);
            }
            Action::CrashHost { id, has_reserved } => self.crash_host(bounds, id, has_reserved),
            Action::CrashInitiator { manifest_complete } => self.crash_initiator(manifest_complete),
        }
        if self.faults != before {
            self.must_succeed = 0;
        }
    }

    /// Whether only time can go on.
    fn is_quiet(&self) -> bool {
        self.network.is_empty()
            && self.writing.is_none()
            && self.hosts.iter().all(|host| host.work.is_none())
            && self.frames.iter().all(|frame| frame.at != FrameAt::Wire)
    }

    fn start(&mut self, bounds: &Bounds) {
        let number = self.attempts;
        self.attempts += 1;
        if self.at_rest() {
            self.must_succeed |= 1 << number;
        }
        let config = Config {
            deadline: DEADLINE,
            in_flight_deadline: RETRY / 2,
            // A message that is there for ever need not be sent again.
            retry: if bounds.forever { NEVER } else { RETRY },
            settle_deadline: DEADLINE,
            ..Config::default()
        };
        let everybody = (0..bounds.hosts as u32).map(ParticipantId);
        let snapshot = SnapshotId([number; 16]);
        let outputs =
            self.initiator.start(snapshot, everybody, config, self.initiator_now).expect("it is idle");
        self.initiator_outputs(bounds, outputs);
    }

    fn deliver(&mut self, bounds: &Bounds, at: usize, keep: bool) {
        let envelope = if keep { self.network.get(at) } else { self.network.remove(at) };
        let message = Message::clone(&envelope.message);
        match (envelope.from, envelope.to) {
            (Node::Host(from), Node::Initiator) => {
                let from = ParticipantId(from as u32);
                self.feed_initiator(bounds, initiator::Input::Message { from, message });
            }
            // The initiator is on host 0.
            (_, Node::Host(to)) => {
                let from = ParticipantId(0);
                self.feed_host(bounds, to, participant::Input::Message { from, message });
            }
            (Node::Initiator, Node::Initiator) => unreachable!("nobody writes to himself"),
        }
    }

    fn send_frame(&mut self, bounds: &Bounds) {
        let number = self.frames.len();
        let (from, to) = bounds.frames[number];
        let Port { epoch, passed: sent_after, .. } = self.hosts[from.0].ports[from.1];
        let colour = if bounds.colourless { Epoch(0) } else { epoch };
        self.frames.push(Frame {
            from,
            to,
            colour,
            at: FrameAt::Wire,
            sent_after,
            recorded_in: 0,
            lost_in: 0,
        });
        // Within a host there is no wire.
        if from.0 == to.0 {
            self.frame_arrives(bounds, number);
        }
    }

    fn frame_arrives(&mut self, bounds: &Bounds, number: usize) {
        let Frame { from: (peer, _), to: (id, _), .. } = self.frames[number];
        let Self { hosts, frames, .. } = self;
        if let Some(epoch) = hosts[id].arrive(number, frames) {
            self.newer_colour(bounds, id, epoch);
        }
        if peer != id {
            self.tell_received(bounds, id, peer);
        }
    }

    fn newer_colour(&mut self, bounds: &Bounds, id: usize, epoch: Epoch) {
        let was_prepared = self.hosts[id].participant.state_name() == "prepared";
        self.feed_host(bounds, id, participant::Input::NewerColourSeen { epoch });
        if was_prepared && self.hosts[id].participant.state_name() == "cutting" {
            self.frame_began_a_cut = true;
        }
    }

    fn tell_received(&mut self, bounds: &Bounds, id: usize, peer: usize) {
        let Some(cut) = self.hosts[id].recording else { return };
        let (received, known_lost) = host::received(&self.frames, peer, id, cut.epoch);
        let channel = host::channel(peer);
        let input = participant::Input::OldColourReceived { cut, channel, received, known_lost };
        self.feed_host(bounds, id, input);
    }

    fn work_done(&mut self, bounds: &Bounds, id: usize) {
        let Self { hosts, frames, .. } = self;
        match hosts[id].work.expect("work") {
            Work::Preparing(cut) => {
                let host = &mut hosts[id];
                host.work = None;
                // The attempt may have risen since.
                host.reserve(host.participant.active().expect("a cut").epoch);
                self.feed_host(bounds, id, participant::Input::Prepared { snapshot: cut.snapshot });
            }
            Work::Cutting(cut, _) => {
                if !hosts[id].cut_next(frames) {
                    return;
                }
                hosts[id].work = Some(Work::Capturing(cut));
                let taken = host::taken(&self.frames, id, bounds.hosts, cut);
                self.feed_host(bounds, id, participant::Input::CutDone { cut, taken });
                for peer in (0..bounds.hosts).filter(|&peer| peer != id) {
                    self.tell_received(bounds, id, peer);
                }
            }
            Work::Capturing(cut) => {
                hosts[id].work = None;
                self.feed_host(bounds, id, participant::Input::CaptureDone { cut, machines: Vec::new() });
            }
            Work::Finishing(cut) => {
                let host = &mut hosts[id];
                host.work = None;
                host.in_doubt = None;
                // What was reserved for a cut that no port has made is not used; its record says so again.
                host.reserved = host.epoch();
                self.feed_host(bounds, id, participant::Input::Finished { cut });
            }
        }
    }

    fn work_fails(&mut self, bounds: &Bounds, id: usize) {
        self.faults.fail -= 1;
        let detail = String::new();
        let input = match self.hosts[id].work.take().expect("work") {
            Work::Preparing(cut) => participant::Input::PrepareFailed { snapshot: cut.snapshot, detail },
            Work::Cutting(cut, _) => participant::Input::CutFailed { cut, detail },
            Work::Capturing(cut) => participant::Input::CaptureFailed { cut, detail },
            Work::Finishing(_) => unreachable!("what finishes is tried until it is done"),
        };
        self.feed_host(bounds, id, input);
    }

    /// The process ends and begins again. Ports, queues and what is durable stay; the ports are put at the reserved epoch.
    fn crash_host(&mut self, bounds: &Bounds, id: usize, has_reserved: bool) {
        self.faults.crash_host -= 1;
        let Self { hosts, frames, .. } = self;
        let host = &mut hosts[id];
        if has_reserved {
            host.reserve(host.participant.active().expect("a cut").epoch);
        }
        host.stop_everything();
        let epoch = host.reserved;
        host.raise(epoch, frames);
        let me = ParticipantId(id as u32);
        host.participant = match host.in_doubt {
            Some((cut, initiator)) => Participant::recover(me, epoch, cut, initiator, host.now),
            None => Participant::new(me, epoch),
        };
        // What still waits in the queues is seen again.
        if let Some(colour) = self.hosts[id].waiting_for(&self.frames) {
            self.newer_colour(bounds, id, colour);
        }
    }

    fn crash_initiator(&mut self, manifest_complete: bool) {
        self.faults.crash_initiator -= 1;
        if let Some(Written { cut, account }) = self.writing.take()
            && manifest_complete
        {
            self.check_account(cut, account);
            self.manifests |= bit(cut);
        }
        self.initiator = Initiator::new(self.hosts[0].epoch());
    }

    fn feed_initiator(&mut self, bounds: &Bounds, input: initiator::Input) {
        let outputs = self.initiator.handle(input, self.initiator_now);
        self.initiator_outputs(bounds, outputs);
    }

    fn initiator_outputs(&mut self, bounds: &Bounds, outputs: Vec<initiator::Output>) {
        for output in outputs {
            match output {
                initiator::Output::Send { to, message } => {
                    let to = Node::Host(to.0 as usize);
                    self.network.send(Node::Initiator, to, message, bounds.forever);
                }
                initiator::Output::WriteManifest { snapshot } => {
                    let account = snapshot.networks()[&NETWORK];
                    self.writing = Some(Written { cut: snapshot.cut, account });
                }
                initiator::Output::LookUpOutcome { from, cut } => {
                    let committed = self.manifests & bit(cut) != 0;
                    self.feed_initiator(
                        bounds,
                        initiator::Input::OutcomeLookedUp { to: from, cut, committed },
                    );
                }
                initiator::Output::Done { cut, outcome, unsettled } => {
                    if !unsettled.is_empty() || matches!(outcome, Outcome::Aborted(DeadlinePassed { .. })) {
                        self.check_waiting(bounds);
                    }
                    match outcome {
                        Outcome::Committed => self.told_committed |= bit(cut),
                        Outcome::Aborted(_) => self.told_aborted |= bit(cut),
                    }
                }
                initiator::Output::Rejected { .. } => self.broken = Some("the initiator rejected a message"),
            }
        }
    }

    fn feed_host(&mut self, bounds: &Bounds, id: usize, input: participant::Input) {
        let host = &mut self.hosts[id];
        let outputs = host.participant.handle(input, host.now);
        if let Some(doubt) = host.participant.in_doubt() {
            host.in_doubt = Some(doubt);
            host.reported |= bit(doubt.0);
        }
        for output in outputs {
            self.host_output(bounds, id, output);
        }
    }

    fn host_output(&mut self, bounds: &Bounds, id: usize, output: participant::Output) {
        let Self { hosts, frames, manifests, broken, .. } = self;
        let host = &mut hosts[id];
        match output {
            participant::Output::Send { to, message } => {
                assert_eq!(to, ParticipantId(0), "there is one initiator");
                self.network.send(Node::Host(id), Node::Initiator, message, bounds.forever);
            }
            participant::Output::StartPrepare { snapshot, .. } => {
                let cut = host.participant.active().expect("a cut");
                assert_eq!(cut.snapshot, snapshot);
                // It may have left this attempt before, or died in it, even when it had cut: what was of that cut is of none.
                host.discarded &= !bit(cut);
                host::forget(host, frames, id, bit(cut));
                host.work = Some(Work::Preparing(cut));
            }
            participant::Output::StartCut { cut } => host.hold_and_record(cut),
            participant::Output::StopRecording { cut, missing } => {
                let (networks, counted_right) = host::close(frames, id, cut, &missing);
                if !counted_right {
                    *broken = Some("the protocol miscounts lost frames");
                }
                host.recording = None;
                self.feed_host(bounds, id, participant::Input::RecordingStopped { cut, networks });
            }
            participant::Output::Keep { cut } => {
                if *manifests & bit(cut) == 0 || host.discarded & bit(cut) != 0 {
                    *broken = Some("kept without a manifest, or after it was discarded");
                }
                host.kept |= bit(cut);
                host.work = Some(Work::Finishing(cut));
            }
            participant::Output::Discard { cut, epoch, reason } => {
                if *manifests & bit(cut) != 0 || host.kept & bit(cut) != 0 {
                    *broken = Some("discarded with a manifest, or after it was kept");
                }
                host.discarded |= bit(cut);
                host.stop_everything();
                host.raise(epoch, frames);
                host.work = Some(Work::Finishing(cut));
                if matches!(reason, DiscardReason::Failed(FailReason::DeadlinePassed { .. })) {
                    self.check_waiting(bounds);
                }
            }
            participant::Output::RaiseEpoch { epoch } => {
                host.raise(epoch, frames);
            }
            participant::Output::Rejected { .. } => *broken = Some("a participant rejected a message"),
        }
    }

    /// A deadline has passed, in the world's own time. Where nobody is away for good and at most one message was lost,
    /// everybody answers long before: somebody waits for what nobody will do.
    fn check_waiting(&mut self, bounds: &Bounds) {
        let Faults { lose, crash_initiator, hurries, .. } = bounds.faults;
        let in_time = self.faults.hurries == hurries && self.faults.crash_initiator == crash_initiator;
        if in_time && lose - self.faults.lose <= 1 {
            self.broken = Some("a deadline passes although everybody answers");
        }
    }

    /// The protocol's own account of a snapshot that comes to exist, against what happened to each frame.
    fn check_account(&mut self, cut: CutId, account: Frames) {
        if account.unaccounted() != 0 {
            self.broken = Some("a copy is unaccounted for");
        }
        let before = |f: &&Frame| f.sent_after & bit(cut) == 0;
        let count =
            |wanted: &dyn Fn(&Frame) -> bool| self.frames.iter().filter(before).filter(|f| wanted(f)).count();
        let truth = Frames {
            sent_before: count(&|_| true) as u64,
            delivered_before: count(
                &|f| matches!(f.at, FrameAt::Delivered { after, .. } if after & bit(cut) == 0),
            ) as u64,
            in_flight: count(&|f| f.recorded_in & bit(cut) != 0) as u64,
            dropped: diorama_cut::Drops {
                wire_loss: count(&|f| f.lost_in & bit(cut) != 0) as u64,
                ..Default::default()
            },
        };
        if account != truth {
            self.broken = Some("the account is not what happened");
        }
    }
}
