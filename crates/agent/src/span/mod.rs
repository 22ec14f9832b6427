//! Environments that span hosts.
//!
//! Each host has a *part*: its own machines and all networks, run by the same code as an environment on one host, with
//! peers at the switch. What concerns the whole is *coordinated* by the agent that was asked:
//!
//! | module | owns |
//! | --- | --- |
//! | `parts` | this host's part: launching it, and the messages of its cuts |
//! | `coordinate` | the whole: up, down, status, restore |
//! | `forward` | requests that another host answers |
//! | `initiate` | the whole's snapshots: the initiator of the protocol |
//! | `rest` | pausing and resuming the whole |
//! | `sessions` | the tunnels' keys |
//! | `clocks` | how other hosts' clocks stand to this one's |
//! | `urgent` | threads that a cut waits for |
//!
//! All of it is for hosts in a cluster ([`crate::cluster`]). There every environment has a record in the cluster's directory,
//! and goes this way even if one host has all of it.

mod clocks;
mod coordinate;
mod forward;
mod initiate;
mod parts;
mod rest;
mod sessions;
mod urgent;

pub(crate) use clocks::Clocks;
pub(crate) use forward::forward;
pub(crate) use parts::{
    CUT_NICE, Joining, Messages, PartDownRequest, PartRequest, PartRestRequest, prefer_this_thread,
};
pub(crate) use sessions::Sessions;
pub(crate) use urgent::Urgent;

use diorama_topology::Environment;

use crate::record::SpanRecord;

impl SpanRecord {
    /// What this host runs.
    pub(crate) fn part(&self) -> Environment {
        let here = self.hosts.get(self.me as usize);
        self.whole.part(|machine| here.is_some_and(|host| host.machines.iter().any(|known| known == machine)))
    }
}
