//! The snapshot protocol: who agrees with whom, and when, that a snapshot of an environment exists.
//!
//! Two state machines, [`Initiator`] (one per snapshot in progress) and [`Participant`] (one per host that
//! runs part of the environment), and [`Loopback`], which joins one of each for an environment on one
//! computer. `docs/protocol.md` explains the algorithm; this page states the contract of the code.
//!
//! # Contract
//!
//! - The machines are pure: no socket, thread, clock or randomness. Feed `handle(input, now)`, perform the
//!   outputs **in their order**, and feed `Tick` when [`Initiator::poll_timeout`] or
//!   [`Participant::poll_timeout`] says so. An early, late or needless `Tick` does no harm.
//! - `now` is a [`std::time::Duration`] since any fixed instant of this process. It must not go back; no two
//!   hosts' readings are ever compared.
//! - The network may lose, delay, repeat and reorder messages. It must not forge them: `from` is the peer
//!   that the transport authenticated.
//! - Inputs that answer an action of an earlier cut are ignored, so a host need not race its own workers.
//!   After `Finished` for a cut, a host must not answer actions of that cut any more.
//! - Every queue, list, name and retransmission is bounded (see [`message`]); a message over a bound is
//!   answered with a `Rejected` output and nothing else happens.
//!
//! # States
//!
//! ```text
//! initiator                                        participant
//!
//!   Idle <------------------------------+            Idle <---------------------------------+
//!    | start                            |             | Prepare                             |
//!   Preparing --------------+           |            Preparing ----------------+            |
//!    | all Prepared         |           |             | host is prepared       |            |
//!   Taking -----------------+ failure,  |            Prepared -----------------+ failure,   |
//!    | all Taken            | deadline, |             | Take, or a frame of    | deadline,  |
//!   Collecting -------------+ cancel,   |             | the cut's colour       | Abort,     |
//!    | all Reports          | loss      |            Cutting ------------------+ loss       |
//!   Writing ----------------+           |             | eight steps done       |            |
//!    | manifest   manifest  |           |            Capturing ----------------+            |
//!    | is durable failed    |           |             | all safe, recording    |            |
//!   Committing           Aborting       |             | stopped: Report        |            |
//!    |                      |           |            InDoubt ------------------+ Abort      |
//!    +--- all answered, ----+-----------+             | Commit                 |            |
//!         or settle deadline                         Keeping              Discarding        |
//!                                                     +--- host is finished ---+------------+
//! ```
//!
//! # Invariants
//!
//! 1. A decision is made once. It is *commit* exactly if the manifest became durable; until the host has
//!    answered `WriteManifest`, nothing is decided and nothing can be.
//! 2. A participant never ends `Keeping` without a durable manifest, and never ends `Discarding` with one:
//!    before its Report it may give up by itself, which makes a manifest impossible; after it, it asks.
//! 3. `Take` is sent only when every participant is prepared for that very epoch.
//! 4. Epochs never go back. The cut's epoch is above every participant's, and an epoch that any cut has
//!    used, aborted or not, is never used by a later one.
//! 5. A participant is part of at most one cut at a time.
//! 6. A participant outside a cut adopts any newer colour it meets ([`participant::Output::RaiseEpoch`]), so
//!    that frames are never held for a cut that will not come.
//!
//! # What the protocol relies on its host for
//!
//! - A participant's epoch survives a crash of its process: it is written down before any port has it, and the process that
//!   comes back begins at what was written, with its ports.
//! - `CaptureDone` and `RecordingStopped` mean *durable*: when both were fed, a process that crashes and
//!   comes back starts with [`Participant::recover`], not with [`Participant::new`].
//! - Two hosts count the same frames. When one has lost its counts, as by its agent's death, both begin them anew
//!   together, in a new session of their tunnel, into which no earlier frame is let. A host answers `Prepared` only once it
//!   has a session with every host that it shares a network with; and a host begins none while it records, because the
//!   counts that the cut's accounts are made of would change. Otherwise accounts of hosts do not add up.
//! - `ManifestWritten` and `ManifestFailed` are certain: after `ManifestFailed` (or after a restart, when
//!   [`initiator::Output::LookUpOutcome`] is answered) no earlier write of that manifest can still succeed.

pub mod initiator;
pub mod loopback;
pub mod message;
pub mod participant;
pub mod report;
mod retry;

pub use initiator::{Config, Initiator, Outcome, StartError};
pub use loopback::Loopback;
pub use message::{
    AbortReason, CaptureMode, CutId, Epoch, FailReason, InFlight, Message, ParticipantId, SnapshotId,
};
pub use participant::Participant;
pub use report::{Channel, Drops, Frames, MachineCut, MachineReport, NetworkId, Report, Snapshot, Taken};
