//! The built program with real machines: each test is a list of what a user does, and what must then be so.
//!
//! Every test has a [`lab::Lab`] of its own: a home, a runtime folder and so an agent that no other test meets. At its
//! end the lab proves that nothing stays behind: no process, no socket, no part of a snapshot. The images are those of
//! `make images`, found where the program itself looks.

mod bucket;
mod carry;
mod cluster;
mod cluster_faults;
mod disks;
mod encryption;
mod etcd;
mod extract;
mod faults;
mod hosts;
mod interrupts;
mod lab;
mod lazy;
mod life;
mod resting;
#[path = "../../../../testing/s3_server.rs"]
mod s3_server;
#[path = "../../../../testing/scratch.rs"]
mod scratch;
mod snapshots;
mod storage;
mod takeover;
mod traffic;
mod underlay;
