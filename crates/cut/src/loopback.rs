//! An environment on one computer: one [`Initiator`] and one [`Participant`] that talk in this process.
//!
//! The agent performs [`Action`]s in order and feeds [`Event`]s back; it never sees a message.
//!
//! ```text
//! start -> Prepare -> Prepared -> Cut -> CutDone -> StopRecording -> RecordingStopped \
//!                                                   (meanwhile)      CaptureDone       > WriteManifest
//!       -> ManifestWritten -> Keep -> Finished -> Done(Committed)
//! any failure, deadline or Cancel before WriteManifest, or ManifestFailed:
//!          Discard -> Finished -> Done(Aborted)
//! ```
//!
//! `StopRecording` follows at once upon `CutDone`: with all machines cut and no other host, every frame of an
//! older colour is already in this host's switch.

use std::{collections::VecDeque, time::Duration};

use crate::{
    initiator::{self, Config, Initiator, Outcome, StartError},
    message::{CaptureMode, CutId, Epoch, InFlight, ParticipantId, SnapshotId},
    participant::{self, DiscardReason, Participant},
    report::{MachineReport, NetworkFrames, Snapshot, Taken},
};

/// The only participant.
const LOCAL: ParticipantId = ParticipantId(0);
/// Messages that one event can cause between the two. A cut has twelve; more is a loop between the machines.
const MAX_MESSAGES: usize = 64;

/// What the agent must do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Do all slow work while machines run; answer [`Event::Prepared`] or [`Event::PrepareFailed`].
    Prepare {
        /// The attempt.
        snapshot: SnapshotId,
        /// How memory is captured.
        capture: CaptureMode,
        /// What becomes of frames in flight.
        in_flight: InFlight,
    },
    /// Do the eight steps on every machine, recording from its cut on; answer [`Event::CutDone`] or
    /// [`Event::CutFailed`]. Captures go on in the background and end in [`Event::CaptureDone`] or
    /// [`Event::CaptureFailed`].
    Cut {
        /// The new epoch.
        epoch: Epoch,
    },
    /// Stop recording frames in flight; make them durable and answer [`Event::RecordingStopped`].
    StopRecording,
    /// Make the manifest durable; answer [`Event::ManifestWritten`] or [`Event::ManifestFailed`].
    WriteManifest {
        /// Everything that stands in it.
        snapshot: Snapshot,
    },
    /// The snapshot exists: keep what is useful of it here; answer [`Event::Finished`].
    Keep,
    /// The snapshot will not exist: stop whatever is under way, put every port at `epoch`, release held frames,
    /// let machines run, reclaim partial data; answer [`Event::Finished`].
    Discard {
        /// What every port's epoch must be in the end.
        epoch: Epoch,
        /// Why.
        reason: DiscardReason,
    },
    /// The cut is over and another may start.
    Done {
        /// The cut.
        cut: CutId,
        /// How it ended.
        outcome: Outcome,
    },
}

/// What the agent has done, or what happened. All but the last two answer an [`Action`]; an answer that comes
/// after its cut moved on is ignored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// All slow work is done.
    Prepared,
    /// Why not, for people.
    PrepareFailed(String),
    /// Every machine is cut and its port released. `sent` is empty: there is no other host.
    CutDone(Taken),
    /// Why not, for people.
    CutFailed(String),
    /// Memory, devices and disks of every machine are durable.
    CaptureDone(Vec<MachineReport>),
    /// Why not, for people.
    CaptureFailed(String),
    /// The recorded frames are durable, and these are the accounts.
    RecordingStopped(Vec<NetworkFrames>),
    /// The manifest is durable.
    ManifestWritten,
    /// It is not, and cannot come to be; why, for people.
    ManifestFailed(String),
    /// Kept or discarded.
    Finished,
    /// Give up, if the manifest is not being written yet.
    Cancel,
    /// Time has passed.
    Tick,
}

/// Both machines, joined.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Loopback {
    initiator: Initiator,
    participant: Participant,
    /// The attempt that events are about.
    cut: Option<CutId>,
}

enum Turn {
    Initiator(initiator::Output),
    Participant(participant::Output),
}

impl Loopback {
    /// For an environment whose ports are at `epoch`.
    ///
    /// After a crash there is nothing in doubt on one computer: a snapshot whose manifest is durable exists,
    /// and everything else of an unfinished one is to be discarded before this is called.
    pub fn new(epoch: Epoch) -> Self {
        Self { initiator: Initiator::new(epoch), participant: Participant::new(LOCAL, epoch), cut: None }
    }

    /// Begins a snapshot. `settle_deadline` is not used: the cut is over when the agent has finished with it.
    pub fn start(
        &mut self,
        snapshot: SnapshotId,
        config: Config,
        now: Duration,
    ) -> Result<Vec<Action>, StartError> {
        if let Some(with) = self.active() {
            return Err(StartError::Busy { with });
        }
        let config = Config { settle_deadline: Duration::MAX, ..config };
        let outputs = self.initiator.start(snapshot, [LOCAL], config, now)?;
        self.cut = self.initiator.active();
        Ok(self.run(outputs.into_iter().map(Turn::Initiator).collect(), now))
    }

    /// Takes one event; the actions are to be performed in order.
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut turns = VecDeque::new();
        if let Some(cut) = self.cut {
            let snapshot = cut.snapshot;
            let mut initiator = None;
            let mut participant = None;
            match event {
                Event::Prepared => participant = Some(participant::Input::Prepared { snapshot }),
                Event::PrepareFailed(detail) => {
                    participant = Some(participant::Input::PrepareFailed { snapshot, detail });
                }
                Event::CutDone(taken) => participant = Some(participant::Input::CutDone { cut, taken }),
                Event::CutFailed(detail) => participant = Some(participant::Input::CutFailed { cut, detail }),
                Event::CaptureDone(machines) => {
                    participant = Some(participant::Input::CaptureDone { cut, machines });
                }
                Event::CaptureFailed(detail) => {
                    participant = Some(participant::Input::CaptureFailed { cut, detail });
                }
                Event::RecordingStopped(networks) => {
                    participant = Some(participant::Input::RecordingStopped { cut, networks });
                }
                Event::Finished => participant = Some(participant::Input::Finished { cut }),
                Event::ManifestWritten => initiator = Some(initiator::Input::ManifestWritten { cut }),
                Event::ManifestFailed(detail) => {
                    initiator = Some(initiator::Input::ManifestFailed { cut, detail });
                }
                Event::Cancel => initiator = Some(initiator::Input::Cancel),
                Event::Tick => {
                    initiator = Some(initiator::Input::Tick);
                    participant = Some(participant::Input::Tick);
                }
            }
            if let Some(input) = initiator {
                turns.extend(self.initiator.handle(input, now).into_iter().map(Turn::Initiator));
            }
            if let Some(input) = participant {
                turns.extend(self.participant.handle(input, now).into_iter().map(Turn::Participant));
            }
        }
        self.run(turns, now)
    }

    /// When to feed [`Event::Tick`], if nothing else comes first. None while no snapshot is under way.
    pub fn poll_timeout(&self) -> Option<Duration> {
        [self.initiator.poll_timeout(), self.participant.poll_timeout()].into_iter().flatten().min()
    }

    /// The cut in progress. While there is one, no other can start.
    pub fn active(&self) -> Option<CutId> {
        self.initiator.active().or(self.participant.active())
    }

    /// The epoch that every port has or is about to have.
    pub fn epoch(&self) -> Epoch {
        self.participant.epoch()
    }

    /// What is under way, for status and logs.
    pub fn state_name(&self) -> &'static str {
        match self.initiator.state_name() {
            "writing" => "writing",
            _ => self.participant.state_name(),
        }
    }

    /// Carries messages between the two until only the agent can go on.
    fn run(&mut self, mut turns: VecDeque<Turn>, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut messages = 0;
        while let Some(turn) = turns.pop_front() {
            match turn {
                Turn::Initiator(initiator::Output::Send { to, message }) => {
                    assert_eq!(to, LOCAL);
                    messages += 1;
                    let input = participant::Input::Message { from: LOCAL, message };
                    turns.extend(self.participant.handle(input, now).into_iter().map(Turn::Participant));
                }
                Turn::Participant(participant::Output::Send { to, message }) => {
                    assert_eq!(to, LOCAL);
                    messages += 1;
                    let input = initiator::Input::Message { from: LOCAL, message };
                    turns.extend(self.initiator.handle(input, now).into_iter().map(Turn::Initiator));
                }
                Turn::Initiator(output) => actions.extend(self.initiator_action(output)),
                Turn::Participant(output) => actions.extend(participant_action(output)),
            }
            assert!(messages <= MAX_MESSAGES, "the initiator and the participant do not come to rest");
        }
        if self.active().is_none() {
            self.cut = None;
        } else if let Some(cut) = self.initiator.active() {
            // The epoch of an attempt may rise while it is prepared.
            self.cut = Some(cut);
        }
        actions
    }

    fn initiator_action(&self, output: initiator::Output) -> Option<Action> {
        match output {
            initiator::Output::WriteManifest { snapshot } => Some(Action::WriteManifest { snapshot }),
            initiator::Output::Done { cut, outcome, .. } => Some(Action::Done { cut, outcome }),
            initiator::Output::Send { .. } => None,
            initiator::Output::LookUpOutcome { .. } | initiator::Output::Rejected { .. } => {
                unreachable!("the local participant asks about the current cut only, and keeps the rules")
            }
        }
    }
}

fn participant_action(output: participant::Output) -> Option<Action> {
    match output {
        participant::Output::StartPrepare { snapshot, capture, in_flight } => {
            Some(Action::Prepare { snapshot, capture, in_flight })
        }
        participant::Output::StartCut { cut } => Some(Action::Cut { epoch: cut.epoch }),
        participant::Output::StopRecording { .. } => Some(Action::StopRecording),
        participant::Output::Keep { .. } => Some(Action::Keep),
        participant::Output::Discard { epoch, reason, .. } => Some(Action::Discard { epoch, reason }),
        participant::Output::Send { .. } => None,
        participant::Output::RaiseEpoch { .. } | participant::Output::Rejected { .. } => {
            unreachable!("nothing colours frames but the local cut, and the local initiator keeps the rules")
        }
    }
}
