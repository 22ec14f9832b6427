//! The initiator: takes one snapshot at a time from [`Initiator::start`] to [`Output::Done`].
//!
//! Owns the decision. Every request is sent again until it is answered or its deadline passes; participants
//! only answer. Between cuts it remembers the last outcome; older ones it has the host look up.
//!
//! Invariants, checked after every input:
//! - Writing is entered only with a Taken and a Report of every participant.
//! - Committing is entered only from Writing, by `ManifestWritten`; Aborting never from Committing.
//! - The cut's epoch is above every floor that a participant has told of while the cut was prepared.
//! - `floor` never goes back and covers every epoch that this initiator has proposed.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use thiserror::Error;

use crate::{
    message::{
        AbortReason, Body, CaptureMode, CutId, Epoch, FailReason, InFlight, MAX_DEADLINE, MAX_PARTICIPANTS,
        Message, PROTOCOL_VERSION, ParticipantId, Phase, Prepare, SnapshotId, Violation, bounded_detail,
    },
    report::{Channel, ChannelCount, Part, Report, Snapshot, Taken},
    retry::Retry,
};

/// How often participants may ask for a higher epoch within one attempt. One that knows the highest epoch is enough, so
/// more than a few means that somebody raises it for ever; each raise asks everybody again.
const MAX_EPOCH_RAISES: u32 = 64;

/// How a snapshot is to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    /// How memory is captured.
    pub capture: CaptureMode,
    /// What becomes of frames in flight.
    pub in_flight: InFlight,
    /// The time up to the last Report; then the cut is aborted. At most [`MAX_DEADLINE`].
    pub deadline: Duration,
    /// The time a participant waits for frames in flight between hosts. At most [`MAX_DEADLINE`].
    pub in_flight_deadline: Duration,
    /// The wait before an unanswered request is sent again; later ones double, up to eight of it.
    pub retry: Duration,
    /// The time to wait for everybody's answer to the decision, but for those that are lost. Who has not answered by then
    /// asks later. A longer one than any cut takes means to wait for a silent peer for ever.
    pub settle_deadline: Duration,
}

impl Default for Config {
    /// Ten minutes for everything: capturing and storing a large machine is slow, and machines run meanwhile.
    fn default() -> Self {
        Self {
            capture: CaptureMode::Live,
            in_flight: InFlight::Record,
            deadline: Duration::from_secs(600),
            in_flight_deadline: Duration::from_millis(200),
            retry: Duration::from_millis(250),
            settle_deadline: Duration::from_secs(10),
        }
    }
}

/// Why a snapshot was not even begun.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Error)]
pub enum StartError {
    /// One at a time.
    #[error("busy with {with}")]
    Busy {
        /// The cut in progress.
        with: CutId,
    },
    /// Nobody to snapshot.
    #[error("no participants")]
    NoParticipants,
    /// More than the protocol carries.
    #[error("{got} participants, at most {MAX_PARTICIPANTS}")]
    TooManyParticipants {
        /// How many were given.
        got: usize,
    },
    /// A deadline beyond [`MAX_DEADLINE`].
    #[error("a deadline of {got_s} s")]
    Deadline {
        /// The longest of the given ones, in seconds.
        got_s: u64,
    },
    /// 2^32 cuts were made.
    #[error("no epoch is left")]
    NoEpoch,
}

/// What happened to the initiator's host or reached it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Input {
    /// A message arrived from an authenticated peer.
    Message {
        /// The peer.
        from: ParticipantId,
        /// What it said.
        message: Message,
    },
    /// Answers [`Output::WriteManifest`]: it is durable.
    ManifestWritten {
        /// The cut.
        cut: CutId,
    },
    /// Answers [`Output::WriteManifest`]: it is not there, and cannot come to be there any more.
    ManifestFailed {
        /// The cut.
        cut: CutId,
        /// Why, for people.
        detail: String,
    },
    /// Answers [`Output::LookUpOutcome`].
    OutcomeLookedUp {
        /// Who asked.
        to: ParticipantId,
        /// About which cut.
        cut: CutId,
        /// Whether its manifest is durable. `false` only if it can never become so.
        committed: bool,
    },
    /// Abort, if nothing is decided and no manifest is being written.
    Cancel,
    /// A peer is unreachable for good, as far as the transport can tell. It is needed for what is not decided, and not
    /// waited for when it is.
    PeerLost {
        /// Which.
        peer: ParticipantId,
    },
    /// Time has passed.
    Tick,
}

/// What the initiator's host must do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Output {
    /// Send a message; it may be lost.
    Send {
        /// Where to.
        to: ParticipantId,
        /// What.
        message: Message,
    },
    /// Make the manifest durable: this decides. Answer `ManifestWritten` or `ManifestFailed`, within whatever
    /// time the store needs.
    WriteManifest {
        /// Everything that stands in it.
        snapshot: Snapshot,
    },
    /// A participant asks about a cut that is no longer known here: look for its manifest, and answer
    /// `OutcomeLookedUp`. If the host cannot tell now, it answers nothing: the participant asks again.
    LookUpOutcome {
        /// Who asks.
        from: ParticipantId,
        /// About which cut.
        cut: CutId,
    },
    /// The cut is over.
    Done {
        /// The cut.
        cut: CutId,
        /// How it ended.
        outcome: Outcome,
        /// Who has not confirmed the outcome; they will ask.
        unsettled: BTreeSet<ParticipantId>,
    },
    /// A message broke the rules and was ignored. Log it.
    Rejected {
        /// Who sent it.
        from: ParticipantId,
        /// How.
        violation: Violation,
    },
}

/// How a cut ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The snapshot exists.
    Committed,
    /// It does not, and never will.
    Aborted(AbortReason),
}

/// The state machine. See the crate's documentation for the contract.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Initiator {
    /// The highest epoch known to be used or proposed.
    floor: Epoch,
    state: State,
    /// The latest outcome, to answer late questions.
    last: Option<(CutId, Outcome)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    Idle,
    Undecided { round: Round, step: Step },
    Writing { round: Round },
    Deciding { round: Round, outcome: Outcome, unsettled: BTreeSet<ParticipantId>, settle_by: Duration },
}

/// The undecided steps, with who has answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Step {
    Preparing { prepared: BTreeSet<ParticipantId>, raises: u32 },
    Taking { taken: BTreeMap<ParticipantId, Taken> },
    Collecting { taken: BTreeMap<ParticipantId, Taken>, reports: BTreeMap<ParticipantId, Report> },
}

/// One attempt.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Round {
    cut: CutId,
    participants: BTreeSet<ParticipantId>,
    config: Config,
    deadline: Duration,
    retry: Retry,
    /// Who is unreachable for good, as far as the transport can tell, and has said nothing since.
    lost: BTreeSet<ParticipantId>,
}

impl Initiator {
    /// An initiator that knows of no cut in progress. `floor` is the highest epoch of this host's own ports;
    /// higher ones elsewhere are learned in the prepare round.
    pub fn new(floor: Epoch) -> Self {
        Self { floor, state: State::Idle, last: None }
    }

    /// Begins a snapshot of an environment that runs on `participants`.
    pub fn start(
        &mut self,
        snapshot: SnapshotId,
        participants: impl IntoIterator<Item = ParticipantId>,
        config: Config,
        now: Duration,
    ) -> Result<Vec<Output>, StartError> {
        if let Some(with) = self.active() {
            return Err(StartError::Busy { with });
        }
        let participants: BTreeSet<_> = participants.into_iter().collect();
        if participants.is_empty() {
            return Err(StartError::NoParticipants);
        }
        if participants.len() > MAX_PARTICIPANTS {
            return Err(StartError::TooManyParticipants { got: participants.len() });
        }
        let longest = config.deadline.max(config.in_flight_deadline);
        if longest > MAX_DEADLINE {
            return Err(StartError::Deadline { got_s: longest.as_secs() });
        }
        let epoch = self.floor.next().ok_or(StartError::NoEpoch)?;
        self.floor = epoch;
        let round = Round {
            cut: CutId { snapshot, epoch },
            participants,
            deadline: now.saturating_add(config.deadline),
            retry: Retry::new(now, config.retry),
            config,
            lost: BTreeSet::new(),
        };
        self.state =
            State::Undecided { round, step: Step::Preparing { prepared: BTreeSet::new(), raises: 0 } };
        let mut out = Vec::new();
        self.request(&mut out);
        self.assert_invariants();
        Ok(out)
    }

    /// Takes one input; the outputs are to be performed in order.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        let floor_before = self.floor;
        let mut out = Vec::new();
        match input {
            Input::Message { from, message } => self.message(from, message, now, &mut out),
            Input::ManifestWritten { cut } => self.manifest(cut, Outcome::Committed, now, &mut out),
            Input::ManifestFailed { cut, detail } => {
                let reason = AbortReason::Manifest { detail: bounded_detail(detail) };
                self.manifest(cut, Outcome::Aborted(reason), now, &mut out);
            }
            Input::OutcomeLookedUp { to, cut, committed } => {
                let outcome =
                    if committed { Outcome::Committed } else { Outcome::Aborted(AbortReason::NoManifest) };
                // A cut in progress is decided here and nowhere else.
                if self.active() != Some(cut) {
                    out.push(Output::Send { to, message: verdict(cut, &outcome) });
                }
            }
            Input::Cancel => self.abort(AbortReason::Cancelled, now, &mut out),
            Input::PeerLost { peer } => {
                if let Some(round) = self.round_mut() {
                    round.lost.insert(peer);
                }
                // Who has reported is not needed any more. Who has only answered the present step is.
                if self.needs(peer) {
                    self.abort(AbortReason::ParticipantLost { participant: peer }, now, &mut out);
                }
            }
            Input::Tick => {}
        }
        self.fire_timers(now, &mut out);
        assert!(floor_before <= self.floor, "epochs never go back");
        self.assert_invariants();
        out
    }

    /// When to feed [`Input::Tick`], if nothing else comes first.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match &self.state {
            State::Idle | State::Writing { .. } => None,
            State::Undecided { round, .. } => Some(round.retry.due.min(round.deadline)),
            State::Deciding { round, settle_by, .. } => Some(round.retry.due.min(*settle_by)),
        }
    }

    /// The cut in progress, up to its `Done`.
    pub fn active(&self) -> Option<CutId> {
        match &self.state {
            State::Idle => None,
            State::Undecided { round, .. } | State::Writing { round } | State::Deciding { round, .. } => {
                Some(round.cut)
            }
        }
    }

    /// The state's name, for status and logs.
    pub fn state_name(&self) -> &'static str {
        match &self.state {
            State::Idle => "idle",
            State::Undecided { step: Step::Preparing { .. }, .. } => "preparing",
            State::Undecided { step: Step::Taking { .. }, .. } => "taking",
            State::Undecided { step: Step::Collecting { .. }, .. } => "collecting",
            State::Writing { .. } => "writing",
            State::Deciding { outcome: Outcome::Committed, .. } => "committing",
            State::Deciding { outcome: Outcome::Aborted(_), .. } => "aborting",
        }
    }

    fn message(&mut self, from: ParticipantId, message: Message, now: Duration, out: &mut Vec<Output>) {
        if let Err(violation) = message.check() {
            let version = match violation {
                Violation::Version { got } => Some(got),
                _ => None,
            };
            out.push(Output::Rejected { from, violation });
            // About another cut it may be a late word of a process that has been replaced since.
            if let Some(speaks) = version
                && self.active() == Some(message.cut)
                && self.needs(from)
            {
                let reason = FailReason::UnsupportedVersion { got: PROTOCOL_VERSION, speaks };
                self.abort(AbortReason::Participant { participant: from, reason }, now, out);
            }
            return;
        }
        let Message { cut, body, .. } = message;
        if self.active() != Some(cut) {
            return self.about_another_cut(from, cut, &body, out);
        }
        match self.round_mut() {
            Some(round) if round.participants.contains(&from) => round.lost.remove(&from),
            _ => return out.push(Output::Rejected { from, violation: Violation::Stranger }),
        };
        match &mut self.state {
            State::Idle | State::Writing { .. } => {}
            State::Undecided { .. } => self.answer(from, body, now, out),
            State::Deciding { outcome, unsettled, .. } => {
                match (&body, &*outcome) {
                    (Body::CommitDone, Outcome::Committed) | (Body::AbortDone, Outcome::Aborted(_)) => {
                        unsettled.remove(&from);
                    }
                    (Body::Query | Body::Report(_), _) => {
                        out.push(Output::Send { to: from, message: verdict(cut, outcome) });
                    }
                    _ => {}
                }
                self.finish_if_settled(now, out);
            }
        }
    }

    /// Who asks about a cut that is over is told; everything else about it is late.
    fn about_another_cut(&self, from: ParticipantId, cut: CutId, body: &Body, out: &mut Vec<Output>) {
        if !matches!(body, Body::Query | Body::Report(_)) {
            return;
        }
        match &self.last {
            Some((known, outcome)) if *known == cut => {
                out.push(Output::Send { to: from, message: verdict(cut, outcome) });
            }
            _ => out.push(Output::LookUpOutcome { from, cut }),
        }
    }

    fn answer(&mut self, from: ParticipantId, body: Body, now: Duration, out: &mut Vec<Output>) {
        if let Body::Failed { reason } = body {
            // Its part is safe once reported, whatever happened to the participant since.
            if self.needs(from) {
                self.abort(AbortReason::Participant { participant: from, reason }, now, out);
            }
            return;
        }
        let unexpected = Violation::Unexpected { got: body.name(), state: self.state_name() };
        let State::Undecided { round, step } = &mut self.state else { return };
        match (body, &mut *step) {
            (Body::Prepared { floor }, Step::Preparing { .. }) if floor >= round.cut.epoch => {
                self.raise_epoch(floor, now, out);
            }
            (Body::Prepared { .. }, Step::Preparing { prepared, .. }) => {
                prepared.insert(from);
                if *prepared == round.participants {
                    *step = Step::Taking { taken: BTreeMap::new() };
                    self.next_step(now, out);
                }
            }
            (Body::EpochBehind { floor }, Step::Preparing { .. }) => self.raise_epoch(floor, now, out),
            (Body::Taken(report), Step::Taking { taken }) => {
                let stranger = report
                    .sent
                    .iter()
                    .map(|count| count.channel)
                    .find(|channel| channel.peer == from || !round.participants.contains(&channel.peer));
                if let Some(Channel { peer, network }) = stranger {
                    let violation = Violation::Channel { peer, network: network.0 };
                    out.push(Output::Rejected { from, violation });
                    return;
                }
                taken.entry(from).or_insert(report);
                if taken.len() == round.participants.len() {
                    let taken = mem::take(taken);
                    *step = Step::Collecting { taken, reports: BTreeMap::new() };
                    self.next_step(now, out);
                }
            }
            (Body::Report(report), Step::Collecting { reports, .. }) => {
                reports.entry(from).or_insert(report);
                self.write_if_complete(out);
            }
            // It restarted in doubt: ask for its report, to learn whether it still has one.
            (Body::Query, Step::Collecting { taken, reports }) if !reports.contains_key(&from) => {
                let incoming = expected(taken).remove(&from).unwrap_or_default();
                let message = Message::new(round.cut, Body::Expect { incoming });
                out.push(Output::Send { to: from, message });
            }
            (Body::Prepare(_) | Body::Take | Body::Expect { .. } | Body::Commit | Body::Abort { .. }, _) => {
                out.push(Output::Rejected { from, violation: unexpected });
            }
            // Late or repeated.
            _ => {}
        }
    }

    /// Proposes the epoch above `floor` to everybody; what hosts have prepared still holds.
    fn raise_epoch(&mut self, floor: Epoch, now: Duration, out: &mut Vec<Output>) {
        let State::Undecided { round, step: Step::Preparing { prepared, raises } } = &mut self.state else {
            return;
        };
        self.floor = self.floor.max(floor);
        // A repetition: this epoch is above it already.
        if floor < round.cut.epoch {
            return;
        }
        *raises += 1;
        match self.floor.next() {
            Some(epoch) if *raises <= MAX_EPOCH_RAISES => {
                self.floor = epoch;
                round.cut.epoch = epoch;
                prepared.clear();
                self.next_step(now, out);
            }
            _ => self.abort(AbortReason::NoEpoch { floor }, now, out),
        }
    }

    fn write_if_complete(&mut self, out: &mut Vec<Output>) {
        let State::Undecided { round, step: Step::Collecting { taken, reports } } = &mut self.state else {
            return;
        };
        if reports.len() < round.participants.len() {
            return;
        }
        assert_eq!(taken.len(), reports.len(), "a report without a cut");
        let parts = mem::take(taken)
            .into_iter()
            .zip(mem::take(reports))
            .map(|((id, taken), (reporter, report))| {
                assert_eq!(id, reporter);
                (id, Part { taken, report })
            })
            .collect();
        let Round { cut, config: Config { capture, in_flight, .. }, .. } = *round;
        out.push(Output::WriteManifest { snapshot: Snapshot { cut, capture, in_flight, parts } });
        self.state = State::Writing { round: round.clone() };
    }

    fn manifest(&mut self, cut: CutId, outcome: Outcome, now: Duration, out: &mut Vec<Output>) {
        if let State::Writing { round } = &self.state
            && round.cut == cut
        {
            let round = round.clone();
            self.decide(round, outcome, now, out);
        }
    }

    fn abort(&mut self, reason: AbortReason, now: Duration, out: &mut Vec<Output>) {
        if let State::Undecided { round, .. } = &self.state {
            let round = round.clone();
            self.decide(round, Outcome::Aborted(reason), now, out);
        }
    }

    fn decide(&mut self, round: Round, outcome: Outcome, now: Duration, out: &mut Vec<Output>) {
        let settle_by = now.saturating_add(round.config.settle_deadline);
        let unsettled = round.participants.clone();
        self.state = State::Deciding { round, outcome, unsettled, settle_by };
        self.next_step(now, out);
    }

    fn finish_if_settled(&mut self, now: Duration, out: &mut Vec<Output>) {
        let State::Deciding { round, outcome, unsettled, settle_by } = &mut self.state else { return };
        // Who is gone asks when it comes back.
        if !unsettled.is_subset(&round.lost) && now < *settle_by {
            return;
        }
        let (cut, outcome, unsettled) = (round.cut, outcome.clone(), mem::take(unsettled));
        self.last = Some((cut, outcome.clone()));
        self.state = State::Idle;
        out.push(Output::Done { cut, outcome, unsettled });
    }

    fn fire_timers(&mut self, now: Duration, out: &mut Vec<Output>) {
        if let State::Undecided { round, step } = &self.state
            && now >= round.deadline
        {
            let missing = self.missing();
            let reason = AbortReason::DeadlinePassed {
                phase: step.phase(),
                deadline_ms: whole_ms(round.config.deadline),
                missing: missing.len() as u32,
                first_missing: *missing.first().expect("a step with no answer missing is over"),
            };
            self.abort(reason, now, out);
        }
        self.finish_if_settled(now, out);
        let fired = match &mut self.state {
            State::Undecided { round, .. } | State::Deciding { round, .. } => round.retry.fire(now),
            State::Idle | State::Writing { .. } => false,
        };
        if fired {
            self.request(out);
        }
    }

    /// Sends the new step's request at once, and again from now on.
    fn next_step(&mut self, now: Duration, out: &mut Vec<Output>) {
        if let State::Undecided { round, .. } | State::Deciding { round, .. } = &mut self.state {
            round.retry = Retry::new(now, round.config.retry);
        }
        self.request(out);
    }

    /// Sends the current request to everybody who has not answered it.
    fn request(&self, out: &mut Vec<Output>) {
        let (State::Undecided { round, .. } | State::Deciding { round, .. }) = &self.state else { return };
        // For all at once: with many hosts, looking through all counts for each of them would take its time.
        let mut incoming = match &self.state {
            State::Undecided { step: Step::Collecting { taken, .. }, .. } => expected(taken),
            _ => BTreeMap::new(),
        };
        for to in self.missing() {
            let message = match &self.state {
                State::Undecided { step, .. } => {
                    let incoming = incoming.remove(&to).unwrap_or_default();
                    Message::new(round.cut, step.request(round, incoming))
                }
                State::Deciding { outcome, .. } => verdict(round.cut, outcome),
                State::Idle | State::Writing { .. } => return,
            };
            out.push(Output::Send { to, message });
        }
    }

    /// The attempt in progress.
    fn round_mut(&mut self) -> Option<&mut Round> {
        match &mut self.state {
            State::Idle => None,
            State::Undecided { round, .. } | State::Writing { round } | State::Deciding { round, .. } => {
                Some(round)
            }
        }
    }

    /// Who has not answered the current request.
    fn missing(&self) -> BTreeSet<ParticipantId> {
        let (round, step) = match &self.state {
            State::Idle | State::Writing { .. } => return BTreeSet::new(),
            State::Deciding { unsettled, .. } => return unsettled.clone(),
            State::Undecided { round, step } => (round, step),
        };
        round.participants.iter().copied().filter(|id| !step.answered(*id)).collect()
    }

    /// Whether the cut cannot succeed without this peer's further help.
    fn needs(&self, id: ParticipantId) -> bool {
        let State::Undecided { round, step } = &self.state else { return false };
        let reported = matches!(step, Step::Collecting { reports, .. } if reports.contains_key(&id));
        round.participants.contains(&id) && !reported
    }

    fn assert_invariants(&self) {
        if let Some(cut) = self.active() {
            assert!(cut.epoch <= self.floor, "epoch {} proposed above floor {}", cut.epoch, self.floor);
        }
        if let State::Undecided { round, step } = &self.state {
            assert!(step.answers() < round.participants.len(), "a step with no answer missing is over");
        }
    }
}

impl Step {
    fn phase(&self) -> Phase {
        match self {
            Self::Preparing { .. } => Phase::Preparing,
            Self::Taking { .. } => Phase::Taking,
            Self::Collecting { .. } => Phase::Collecting,
        }
    }

    fn answered(&self, id: ParticipantId) -> bool {
        match self {
            Self::Preparing { prepared, .. } => prepared.contains(&id),
            Self::Taking { taken } => taken.contains_key(&id),
            Self::Collecting { reports, .. } => reports.contains_key(&id),
        }
    }

    fn answers(&self) -> usize {
        match self {
            Self::Preparing { prepared, .. } => prepared.len(),
            Self::Taking { taken } => taken.len(),
            Self::Collecting { reports, .. } => reports.len(),
        }
    }

    fn request(&self, round: &Round, incoming: Vec<ChannelCount>) -> Body {
        match self {
            Self::Preparing { .. } => Body::Prepare(Prepare {
                capture: round.config.capture,
                in_flight: round.config.in_flight,
                participants: round.participants.iter().copied().collect(),
                deadline_ms: whole_ms(round.config.deadline),
                in_flight_deadline_ms: whole_ms(round.config.in_flight_deadline),
            }),
            Self::Taking { .. } => Body::Take,
            Self::Collecting { .. } => Body::Expect { incoming },
        }
    }
}

/// What everybody sent to each receiver, seen from there. Sorted as a message must be: senders come in order, and each
/// one's counts to the same receiver, by network.
fn expected(taken: &BTreeMap<ParticipantId, Taken>) -> BTreeMap<ParticipantId, Vec<ChannelCount>> {
    let mut incoming = BTreeMap::<_, Vec<_>>::new();
    for (&sender, taken) in taken {
        for &ChannelCount { channel, copies } in &taken.sent {
            let seen_from_there = Channel { peer: sender, network: channel.network };
            incoming.entry(channel.peer).or_default().push(ChannelCount { channel: seen_from_there, copies });
        }
    }
    incoming
}

fn verdict(cut: CutId, outcome: &Outcome) -> Message {
    let body = match outcome {
        Outcome::Committed => Body::Commit,
        Outcome::Aborted(reason) => Body::Abort { reason: reason.clone() },
    };
    Message::new(cut, body)
}

/// Rounded up: a deadline of part of a millisecond is not one of none.
fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
