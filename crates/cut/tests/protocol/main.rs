//! The protocol's machines, alone, joined in one process, and across a faulty network.

mod fuzz;
mod initiator;
mod loopback;
#[path = "../../../../testing/mangle.rs"]
mod mangle;
mod messages;
mod network;
mod participant;
