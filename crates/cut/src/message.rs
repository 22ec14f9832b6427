//! What participants and the initiator say to each other, and the bounds on it.
//!
//! Every message names its [`CutId`], so that late, repeated and reordered ones are told apart. The bounds
//! here hold for whatever a peer sends; [`Message::check`] is applied to each message before its meaning.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::report::{ChannelCount, Report, Taken};

/// The version that this code speaks.
pub const PROTOCOL_VERSION: u16 = 1;
/// Hosts of one environment. What the simulator has been run with; lists of all hosts, which go to all hosts, then take
/// some megabytes in all.
pub const MAX_PARTICIPANTS: usize = 1024;
/// Machines on one host: well above what its memory can hold.
pub const MAX_MACHINES: usize = 1024;
/// Networks of one environment.
pub const MAX_NETWORKS: usize = 256;
/// Channels of one participant that have carried a frame: to every host in sixteen networks, or in all networks to 64.
pub const MAX_CHANNELS: usize = 1 << 14;
/// A machine's name, in bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// Text that tells of a failure, in bytes.
pub const MAX_DETAIL_BYTES: usize = 1024;
/// One machine's part of the manifest, in bytes.
pub const MAX_CAPTURED_BYTES: usize = 1 << 20;
/// The longest time that a cut may be given.
pub const MAX_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// The colour: the number of cuts a machine has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Epoch(pub u32);

impl Epoch {
    /// The epoch after this one; none after the last.
    pub fn next(self) -> Option<Epoch> {
        self.0.checked_add(1).map(Epoch)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One participant; the host maps it to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ParticipantId(pub u32);

impl fmt::Display for ParticipantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Names one attempt to take a snapshot, before its manifest exists. Unique: draw it at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SnapshotId(pub [u8; 16]);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One cut: a snapshot attempt and the epoch that machines enter by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CutId {
    /// The attempt.
    pub snapshot: SnapshotId,
    /// The new colour.
    pub epoch: Epoch,
}

impl fmt::Display for CutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at epoch {}", self.snapshot, self.epoch)
    }
}

/// How a machine's memory is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptureMode {
    /// In the background, pages saved before the guest overwrites them.
    #[default]
    Live,
    /// Copied while running, and again where changed; the rest while stopped.
    PreCopy,
    /// All of it while stopped: the paper's way.
    Stop,
}

/// What becomes of frames in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InFlight {
    /// Recorded in the snapshot and delivered.
    #[default]
    Record,
    /// Dropped and counted: the paper's way.
    Drop,
}

/// A message and what it is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u16,
    /// The cut it belongs to.
    pub cut: CutId,
    /// What it says.
    pub body: Body,
}

/// What a message says. `I` is the initiator, `P` a participant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Body {
    /// I to P: get ready for this cut.
    Prepare(Prepare),
    /// P to I: ready, and everything slow is done.
    Prepared {
        /// The highest epoch this participant knows to be used; below the cut's.
        floor: Epoch,
    },
    /// P to I: this cut's epoch is used up; try again above `floor`.
    EpochBehind {
        /// The highest epoch this participant knows to be used.
        floor: Epoch,
    },
    /// I to P: cut now (the paper's TAKE_SNAPSHOT).
    Take,
    /// P to I: the local cut is made.
    Taken(Taken),
    /// I to P: so many frames of older colours were sent to you; record until you have them.
    Expect {
        /// Per sender and network; each at most once.
        incoming: Vec<ChannelCount>,
    },
    /// P to I: all of my part is safe (the paper's SNAPSHOT_SUCCESS).
    Report(Report),
    /// I to P: the snapshot exists (the paper's SNAPSHOT_DONE).
    Commit,
    /// P to I: known, and acted upon.
    CommitDone,
    /// I to P: the snapshot will never exist.
    Abort {
        /// Why.
        reason: AbortReason,
    },
    /// P to I: known, and all partial data is gone.
    AbortDone,
    /// P to I: I am not, or no longer, part of this cut.
    Failed {
        /// Why.
        reason: FailReason,
    },
    /// P to I: I have reported; what became of it?
    Query,
}

/// The terms of a cut.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepare {
    /// How to capture memory.
    pub capture: CaptureMode,
    /// What to do with frames in flight.
    pub in_flight: InFlight,
    /// Everybody, the receiver included; sorted, each once.
    pub participants: Vec<ParticipantId>,
    /// The time for everything up to the Report, in milliseconds from receipt.
    pub deadline_ms: u64,
    /// The time to wait for frames in flight, in milliseconds from `Expect`.
    pub in_flight_deadline_ms: u64,
}

/// Why a participant left a cut.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Error)]
pub enum FailReason {
    /// The host could not prepare.
    #[error("preparing failed: {detail}")]
    Prepare {
        /// The host's words.
        detail: String,
    },
    /// The host could not cut its machines.
    #[error("the cut failed: {detail}")]
    Cut {
        /// The host's words.
        detail: String,
    },
    /// Machines or frames in flight could not be saved.
    #[error("the capture failed: {detail}")]
    Capture {
        /// The host's words.
        detail: String,
    },
    /// The cut was not complete in time.
    #[error("it was not complete within {deadline_ms} ms")]
    DeadlinePassed {
        /// The time that was given.
        deadline_ms: u64,
    },
    /// A frame came from beyond this cut.
    #[error("a frame of epoch {seen} arrived")]
    Overtaken {
        /// Its colour.
        seen: Epoch,
    },
    /// The same initiator began another cut.
    #[error("its initiator began {by}")]
    Superseded {
        /// The newer one.
        by: CutId,
    },
    /// The participant takes part in another initiator's cut.
    #[error("busy with {with}")]
    Busy {
        /// That cut.
        with: CutId,
    },
    /// The participant is asked to take part, and the list does not name it.
    #[error("not in the list of participants")]
    NotListed,
    /// The participant knows nothing of this cut; it has restarted.
    #[error("not prepared for this cut")]
    NotPrepared,
    /// The participant restarted between capture and report.
    #[error("restarted before its report arrived")]
    ReportLost,
    /// The initiator cannot be reached.
    #[error("the initiator was lost")]
    InitiatorLost,
    /// Someone on the participant's host gave up.
    #[error("cancelled on this host")]
    Cancelled,
    /// The participant speaks another version.
    #[error("it speaks version {speaks}, not {got}")]
    UnsupportedVersion {
        /// The initiator's version.
        got: u16,
        /// The participant's version.
        speaks: u16,
    },
}

/// Why a cut was aborted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Error)]
pub enum AbortReason {
    /// The user asked for it.
    #[error("cancelled")]
    Cancelled,
    /// A participant could not go on.
    #[error("participant {participant}: {reason}")]
    Participant {
        /// Which.
        participant: ParticipantId,
        /// Why.
        reason: FailReason,
    },
    /// A participant cannot be reached.
    #[error("participant {participant} was lost")]
    ParticipantLost {
        /// Which.
        participant: ParticipantId,
    },
    /// Some participants did not answer in time.
    #[error(
        "{phase:?} was not complete within {deadline_ms} ms: no answer from {missing} participants, {first_missing} among them"
    )]
    DeadlinePassed {
        /// What was under way.
        phase: Phase,
        /// The time given to the whole cut.
        deadline_ms: u64,
        /// How many had not answered.
        missing: u32,
        /// One of them.
        first_missing: ParticipantId,
    },
    /// The manifest could not be written.
    #[error("the manifest was not written: {detail}")]
    Manifest {
        /// The host's words.
        detail: String,
    },
    /// No epoch is left above `floor`, or participants raised it too often.
    #[error("no epoch above {floor} could be agreed on")]
    NoEpoch {
        /// The highest epoch known to be used.
        floor: Epoch,
    },
    /// Found out later: there is no manifest, and there will be none.
    #[error("there is no manifest")]
    NoManifest,
}

/// The initiator's undecided phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Waiting for Prepared.
    Preparing,
    /// Waiting for Taken.
    Taking,
    /// Waiting for Report.
    Collecting,
}

/// A message that breaks the rules; nothing was done about it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Error)]
pub enum Violation {
    /// Another version.
    #[error("version {got}, this code speaks {PROTOCOL_VERSION}")]
    Version {
        /// Theirs.
        got: u16,
    },
    /// A list is too long.
    #[error("{got} {what}, at most {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        got: usize,
        /// The bound.
        most: usize,
    },
    /// Text or bytes are too long.
    #[error("{what} of {got_bytes} bytes, at most {most_bytes}")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its length.
        got_bytes: usize,
        /// The bound.
        most_bytes: usize,
    },
    /// A list that must be sorted without repetition is not.
    #[error("{what} are repeated or out of order")]
    NotSorted {
        /// Of what.
        what: &'static str,
    },
    /// A time beyond [`MAX_DEADLINE`].
    #[error("a deadline of {got_ms} ms")]
    Deadline {
        /// Theirs.
        got_ms: u64,
    },
    /// The sender has no part in this cut.
    #[error("the sender has no part in this cut")]
    Stranger,
    /// A count names a participant that has no part in this cut, or the sender itself.
    #[error("a count for participant {peer}, network {network}, is unknown")]
    Channel {
        /// The participant.
        peer: ParticipantId,
        /// The network's number.
        network: u16,
    },
    /// A message that cannot follow what was decided: a faulty peer.
    #[error("{got} in state {state}")]
    Unexpected {
        /// Which message.
        got: &'static str,
        /// The receiver's state.
        state: &'static str,
    },
}

impl Message {
    /// A message of this code's version.
    pub fn new(cut: CutId, body: Body) -> Self {
        Self { version: PROTOCOL_VERSION, cut, body }
    }

    /// Checks version and bounds.
    pub fn check(&self) -> Result<(), Violation> {
        if self.version != PROTOCOL_VERSION {
            return Err(Violation::Version { got: self.version });
        }
        match &self.body {
            Body::Prepare(prepare) => prepare.check(),
            Body::Taken(taken) => {
                at_most("machines", taken.machines.len(), MAX_MACHINES)?;
                taken.machines.iter().try_for_each(|m| name(&m.machine))?;
                channels(&taken.sent)
            }
            Body::Expect { incoming } => channels(incoming),
            Body::Report(report) => {
                at_most("machines", report.machines.len(), MAX_MACHINES)?;
                at_most("networks", report.networks.len(), MAX_NETWORKS)?;
                report.machines.iter().try_for_each(|m| {
                    name(&m.machine)?;
                    short("a machine's capture", m.captured.len(), MAX_CAPTURED_BYTES)
                })
            }
            Body::Failed { reason } => reason.check(),
            Body::Abort { reason } => match reason {
                AbortReason::Participant { reason, .. } => reason.check(),
                AbortReason::Manifest { detail } => short("detail", detail.len(), MAX_DETAIL_BYTES),
                _ => Ok(()),
            },
            Body::Prepared { .. }
            | Body::EpochBehind { .. }
            | Body::Take
            | Body::Commit
            | Body::CommitDone
            | Body::AbortDone
            | Body::Query => Ok(()),
        }
    }
}

impl Prepare {
    fn check(&self) -> Result<(), Violation> {
        at_most("participants", self.participants.len(), MAX_PARTICIPANTS)?;
        if !self.participants.is_sorted_by(|a, b| a < b) {
            return Err(Violation::NotSorted { what: "participants" });
        }
        let longest_ms = self.deadline_ms.max(self.in_flight_deadline_ms);
        if Duration::from_millis(longest_ms) > MAX_DEADLINE {
            return Err(Violation::Deadline { got_ms: longest_ms });
        }
        Ok(())
    }
}

impl FailReason {
    fn check(&self) -> Result<(), Violation> {
        match self {
            Self::Prepare { detail } | Self::Cut { detail } | Self::Capture { detail } => {
                short("detail", detail.len(), MAX_DETAIL_BYTES)
            }
            _ => Ok(()),
        }
    }
}

impl Body {
    /// The message's name, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "Prepare",
            Self::Prepared { .. } => "Prepared",
            Self::EpochBehind { .. } => "EpochBehind",
            Self::Take => "Take",
            Self::Taken(_) => "Taken",
            Self::Expect { .. } => "Expect",
            Self::Report(_) => "Report",
            Self::Commit => "Commit",
            Self::CommitDone => "CommitDone",
            Self::Abort { .. } => "Abort",
            Self::AbortDone => "AbortDone",
            Self::Failed { .. } => "Failed",
            Self::Query => "Query",
        }
    }
}

/// Cuts the host's words to what a message may carry.
pub(crate) fn bounded_detail(mut detail: String) -> String {
    if detail.len() > MAX_DETAIL_BYTES {
        let end = (0..=MAX_DETAIL_BYTES).rev().find(|&i| detail.is_char_boundary(i)).unwrap_or(0);
        detail.truncate(end);
    }
    detail
}

fn at_most(what: &'static str, got: usize, most: usize) -> Result<(), Violation> {
    if got > most { Err(Violation::TooMany { what, got, most }) } else { Ok(()) }
}

fn short(what: &'static str, got_bytes: usize, most_bytes: usize) -> Result<(), Violation> {
    if got_bytes > most_bytes { Err(Violation::TooLong { what, got_bytes, most_bytes }) } else { Ok(()) }
}

fn name(name: &str) -> Result<(), Violation> {
    short("a machine's name", name.len(), MAX_NAME_BYTES)
}

fn channels(counts: &[ChannelCount]) -> Result<(), Violation> {
    at_most("channels", counts.len(), MAX_CHANNELS)?;
    if !counts.is_sorted_by(|a, b| a.channel < b.channel) {
        return Err(Violation::NotSorted { what: "channels" });
    }
    Ok(())
}
