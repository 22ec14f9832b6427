//! How hosts talk: HTTP over mutual TLS.
//!
//! The same HTTP that an agent speaks to its clients, so that a request can be passed on to another host as it is; HTTP/2,
//! so that many requests and streams share a connection, each with its own back-pressure. [`Server`] takes connections and
//! hands requests with their [`Peer`] to a router; [`Peers`] keeps connections to other hosts.
//!
//! - A **message** ([`Peers::call`], [`messages`]) is a kind and some bytes, answered by some bytes: the protocol of cuts, the
//!   keys of tunnels.
//! - A **request** ([`Peers::send`]) is any HTTP request, its body and the answer's as long as they like: the API of another
//!   host, memory and disks.
//! - A **taken-over connection** ([`Peers::send_upgradable`]) is HTTP/1.1 with `Upgrade`: a console.
//!
//! Messages and bulk have connections of their own ([`Lane`]), so that a disk does not stand in a cut's way.
//!
//! Invariants:
//! - No request reaches the router unless its sender is a member at that moment; connections of a host that is removed are
//!   closed on both sides as soon as the directory says so.
//! - A peer that does not answer is found within [`DEAD_AFTER`], whatever the connection is doing.
//! - Whatever a stranger sends costs one handshake of bounded size and time.

mod messages;
mod peers;
mod server;
mod socket;

use std::time::Duration;

use diorama_topology::HostName;

pub use messages::{MESSAGE_BYTES_MAX, MessageHandler, Refusal, messages};
pub use peers::{Lane, PeerError, Peers, UpgradedPeer};
pub use server::Server;

use crate::identity::{HostId, PublicKey};

/// How long a peer may be silent: keep-alives are sent and must be answered within this time.
pub const DEAD_AFTER: Duration = Duration::from_secs(5);

const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(3);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// What may be under way to a slow reader, in bytes: of one stream, and of a connection.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES_MAX: u32 = 64 << 10;

/// Who sent a request: in its extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub name: HostName,
    /// Its key, as TLS proved it.
    pub key: PublicKey,
}

#[cfg(test)]
#[path = "../channel_tests.rs"]
mod tests;
