//! One host's part in a snapshot: its states from [`Input`]s to [`Output`]s.
//!
//! Owns the host's epoch, the highest epoch known to be used (`floor`), and at most one cut. Only the
//! initiator retransmits requests; a participant answers each repetition from its state. The one thing it
//! sends by itself is [`Body::Query`], while in doubt.
//!
//! Invariants, checked after every input:
//! - `epoch <= floor`; neither goes back.
//! - Preparing and Prepared: the cut's epoch is above `floor`. Every later state: it is not.
//! - A cut that has ended is never entered again (its epoch is not above `floor`).
//! - From InDoubt only a told outcome leads on. Before it, anything may end in Discarding.

mod states;

use std::{collections::BTreeMap, time::Duration};

use crate::{
    message::{
        AbortReason, Body, CaptureMode, CutId, Epoch, FailReason, InFlight, Message, ParticipantId,
        SnapshotId, Violation,
    },
    report::{Channel, MachineReport, NetworkFrames, Report, Taken},
    retry::Retry,
};

/// The first wait before an unanswered `Query` is sent again; later ones double, up to eight of it.
pub const QUERY_WAIT: Duration = Duration::from_millis(500);

/// What happened to the host or reached it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Input {
    /// A message arrived from an authenticated peer.
    Message {
        /// The peer.
        from: ParticipantId,
        /// What it said.
        message: Message,
    },
    /// Answers [`Output::StartPrepare`]: all slow work is done.
    Prepared {
        /// Of this attempt.
        snapshot: SnapshotId,
    },
    /// Answers [`Output::StartPrepare`]. Cleaning up waits for [`Output::Discard`].
    PrepareFailed {
        /// Of this attempt.
        snapshot: SnapshotId,
        /// Why, for people.
        detail: String,
    },
    /// Answers [`Output::StartCut`]: every machine is cut and its port released.
    CutDone {
        /// The cut.
        cut: CutId,
        /// Instants and final counts of what was sent.
        taken: Taken,
    },
    /// Answers [`Output::StartCut`]. Cleaning up waits for [`Output::Discard`].
    CutFailed {
        /// The cut.
        cut: CutId,
        /// Why, for people.
        detail: String,
    },
    /// After [`Input::CutDone`]: memory, devices and disks of every machine are durable.
    CaptureDone {
        /// The cut.
        cut: CutId,
        /// The machines.
        machines: Vec<MachineReport>,
    },
    /// Machines or recorded frames could not be saved (or the recording was too large).
    CaptureFailed {
        /// The cut.
        cut: CutId,
        /// Why, for people.
        detail: String,
    },
    /// Frames of colours older than the cut arrived from another host. Counts are cumulative over the
    /// environment's life; the highest count counts.
    OldColourReceived {
        /// The cut.
        cut: CutId,
        /// Where from.
        channel: Channel,
        /// Copies received.
        received: u64,
        /// Copies that were found lost before, at earlier cuts or by a gap in the tunnel's sequence.
        known_lost: u64,
    },
    /// Answers [`Output::StopRecording`]: the recorded frames are durable and these are the accounts.
    RecordingStopped {
        /// The cut.
        cut: CutId,
        /// Each network's account, the missing copies counted as wire loss.
        networks: Vec<NetworkFrames>,
    },
    /// Answers [`Output::Keep`] and [`Output::Discard`].
    Finished {
        /// The cut.
        cut: CutId,
    },
    /// A frame waits that was sent by a machine of this, newer colour.
    NewerColourSeen {
        /// Its colour.
        epoch: Epoch,
    },
    /// In doubt, the host learned the outcome elsewhere and for certain.
    OutcomeFound {
        /// The cut.
        cut: CutId,
        /// Whether its manifest is durable. `false` only if it can never become so.
        committed: bool,
    },
    /// Give up if that is still possible, as when the host shuts down.
    Cancel,
    /// A peer is unreachable for good, as far as the transport can tell.
    PeerLost {
        /// Which.
        peer: ParticipantId,
    },
    /// Time has passed.
    Tick,
}

/// What the host must do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Output {
    /// Send a message; it may be lost.
    Send {
        /// Where to.
        to: ParticipantId,
        /// What.
        message: Message,
    },
    /// Do all slow work while machines run; answer `Prepared` or `PrepareFailed`.
    StartPrepare {
        /// The attempt. Its epoch is settled only at the cut.
        snapshot: SnapshotId,
        /// How memory is captured.
        capture: CaptureMode,
        /// What becomes of frames in flight.
        in_flight: InFlight,
    },
    /// Do the eight local steps on every machine, recording from its cut on; answer `CutDone` or `CutFailed`.
    StartCut {
        /// The cut, and with it the new epoch.
        cut: CutId,
    },
    /// Every frame that will come has come. Stop recording; answer `RecordingStopped`.
    StopRecording {
        /// The cut.
        cut: CutId,
        /// Copies that were sent and not received, cumulative; channels without loss are left out.
        missing: BTreeMap<Channel, u64>,
    },
    /// The snapshot exists: keep what is useful of it here; answer `Finished`.
    Keep {
        /// The cut.
        cut: CutId,
    },
    /// The snapshot will not exist: stop preparing, cutting or capturing, put every port at `epoch`, release
    /// held frames in order, let machines run, reclaim partial data; answer `Finished`. Idempotent.
    Discard {
        /// The cut.
        cut: CutId,
        /// What every port's epoch must be in the end.
        epoch: Epoch,
        /// Why.
        reason: DiscardReason,
    },
    /// There is no cut to make here for this colour: put every port at `epoch`, so that frames flow.
    RaiseEpoch {
        /// The epoch.
        epoch: Epoch,
    },
    /// A message broke the rules and was ignored. Log it.
    Rejected {
        /// Who sent it.
        from: ParticipantId,
        /// How.
        violation: Violation,
    },
}

/// Why a cut was discarded.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiscardReason {
    /// The initiator said so.
    Aborted(AbortReason),
    /// This participant gave up.
    Failed(FailReason),
}

/// One host's state machine. See the crate's documentation for the contract.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Participant {
    me: ParticipantId,
    /// The colour of this host's ports, as far as the protocol has ordered it.
    epoch: Epoch,
    /// The highest epoch that this participant knows to be used.
    floor: Epoch,
    state: State,
    /// How the latest cut ended, to answer late repetitions.
    last: Option<(CutId, End)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    Idle,
    Preparing(Terms),
    Prepared(Terms),
    Cutting { terms: Terms, received: Received },
    Capturing { terms: Terms, capture: Capture },
    InDoubt { cut: CutId, initiator: ParticipantId, report: Option<Report>, query: Retry },
    Keeping { cut: CutId, initiator: ParticipantId },
    Discarding { cut: CutId, initiator: ParticipantId, end: End },
}

/// An undecided cut's terms.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Terms {
    cut: CutId,
    initiator: ParticipantId,
    participants: Vec<ParticipantId>,
    deadline: Duration,
    deadline_ms: u64,
    in_flight_deadline: Duration,
}

/// Per channel: copies received, and copies known lost.
type Received = BTreeMap<Channel, (u64, u64)>;

/// What is still open between the local cut and the report.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Capture {
    taken: Taken,
    received: Received,
    machines: Option<Vec<MachineReport>>,
    recording: Recording,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Recording {
    /// How much to expect is not known before everybody has cut.
    Open,
    /// Waiting for these until then.
    Expecting { copies: BTreeMap<Channel, u64>, deadline: Duration },
    /// The host was told to stop.
    Stopping,
    /// It has.
    Stopped(Vec<NetworkFrames>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum End {
    Committed,
    Aborted,
    Failed(FailReason),
}

impl Participant {
    /// A participant whose ports are at `epoch`, and which has reported nothing that is undecided.
    pub fn new(me: ParticipantId, epoch: Epoch) -> Self {
        Self { me, epoch, floor: epoch, state: State::Idle, last: None }
    }

    /// A participant that comes back after a crash between its report and the outcome. It asks at once.
    pub fn recover(
        me: ParticipantId,
        epoch: Epoch,
        cut: CutId,
        initiator: ParticipantId,
        now: Duration,
    ) -> Self {
        let epoch = epoch.max(cut.epoch);
        let query = Retry::due_at(now, QUERY_WAIT);
        let state = State::InDoubt { cut, initiator, report: None, query };
        Self { me, epoch, floor: epoch, state, last: None }
    }

    /// Takes one input; the outputs are to be performed in order.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        let before = (self.epoch, self.floor);
        let mut out = Vec::new();
        self.apply(input, now, &mut out);
        self.fire_timers(now, &mut out);
        assert!(before.0 <= self.epoch && before.1 <= self.floor, "epochs never go back");
        self.assert_invariants();
        out
    }

    /// When to feed [`Input::Tick`], if nothing else comes first.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match &self.state {
            State::Preparing(terms) | State::Prepared(terms) | State::Cutting { terms, .. } => {
                Some(terms.deadline)
            }
            State::Capturing { terms, capture } => Some(match capture.recording {
                Recording::Expecting { deadline, .. } => deadline.min(terms.deadline),
                _ => terms.deadline,
            }),
            State::InDoubt { query, .. } => Some(query.due),
            State::Idle | State::Keeping { .. } | State::Discarding { .. } => None,
        }
    }

    /// The epoch that every port of this host has or is about to have.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The cut this participant is part of, until it has finished with it.
    pub fn active(&self) -> Option<CutId> {
        match &self.state {
            State::Idle => None,
            State::Preparing(terms) | State::Prepared(terms) => Some(terms.cut),
            State::Cutting { terms, .. } | State::Capturing { terms, .. } => Some(terms.cut),
            State::InDoubt { cut, .. } | State::Keeping { cut, .. } | State::Discarding { cut, .. } => {
                Some(*cut)
            }
        }
    }

    /// The cut whose outcome this participant must be told, and by whom: what [`Participant::recover`] needs.
    pub fn in_doubt(&self) -> Option<(CutId, ParticipantId)> {
        match self.state {
            State::InDoubt { cut, initiator, .. } => Some((cut, initiator)),
            _ => None,
        }
    }

    /// The state's name, for status and logs.
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Idle => "idle",
            State::Preparing(_) => "preparing",
            State::Prepared(_) => "prepared",
            State::Cutting { .. } => "cutting",
            State::Capturing { .. } => "capturing",
            State::InDoubt { .. } => "in doubt",
            State::Keeping { .. } => "keeping",
            State::Discarding { .. } => "discarding",
        }
    }

    fn assert_invariants(&self) {
        assert!(self.epoch <= self.floor, "epoch {} above floor {}", self.epoch, self.floor);
        match &self.state {
            State::Idle => {}
            State::Preparing(terms) | State::Prepared(terms) => assert!(terms.cut.epoch > self.floor),
            State::Cutting { terms, .. } | State::Capturing { terms, .. } => {
                assert_eq!(terms.cut.epoch, self.epoch);
            }
            State::InDoubt { cut, .. } | State::Keeping { cut, .. } => assert!(cut.epoch <= self.epoch),
            State::Discarding { cut, .. } => assert!(cut.epoch <= self.floor),
        }
    }
}
