//! The protocol's machines, alone, joined in one process, and across a faulty network.

mod initiator;
mod loopback;
mod messages;
mod network;
mod participant;
