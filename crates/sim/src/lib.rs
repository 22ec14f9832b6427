//! Many hosts in one process: the shipped snapshot protocol ([`diorama_cut`]) and switch ([`diorama_switch`]) with up to
//! 1,000 hosts and 10,000 machines, in simulated time, under faults, before a judge that knows nothing of either.
//!
//! # Contract
//!
//! [`Simulation::new`] with a [`Scenario`], then [`Simulation::run`]: figures, or the [`Failure`] that a run must not have.
//! Everything follows from the scenario and its seed; [`Figures::digest`] is equal in equal runs, bit for bit.
//!
//! | module | owns |
//! | --- | --- |
//! | [`scenario`] | sizes, links, durations, faults |
//! | [`simulation`] | time, the events in it, and what each does |
//! | [`host`] | one host: switch, participant, and what survives its agent |
//! | [`tunnel`] | how frames get from one switch to another |
//! | [`underlay`] | delay, jitter, loss, repetition, partitions |
//! | [`judge`] | vector clocks; whether a cut was consistent and its recording right |
//! | [`figures`], [`plot`] | what a run has measured, as a table, as JSON, as a picture |
//!
//! # What is simulated and what is not
//!
//! Real: the protocol's and the switch's code, every frame's bytes, every message's content. Simulated: time, the network
//! between hosts (without bandwidth: a packet takes its delay, however many there are), machines (they send, answer and
//! are stopped), and the host's work (holding, stopping, saving and storing take a random time). An agent's death loses
//! everything but its epoch and whether it is in doubt; its machines run on without a network meanwhile.

pub mod figures;
pub mod host;
pub mod judge;
pub mod plot;
mod random;
pub mod scenario;
pub mod simulation;
pub mod tunnel;
pub mod underlay;

pub use figures::{AttemptFigures, Figures};
pub use judge::{Judge, Verdict};
pub use random::Random;
pub use scenario::Scenario;
pub use simulation::{Failure, Simulation};
