//! The tunnels' socket: what goes from this host's switches to those of other hosts, and what comes from there.
//!
//! One UDP socket serves all environments. A packet belongs to the environment whose network it names (the number is
//! readable, and authenticated once the tunnel opens it), and there to the tunnel of the address that it came from. What
//! belongs to none is counted and dropped, for the price of reading a header.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use diorama_switch::NetworkId;
use diorama_switch::geneve::{Header, Vni};
use diorama_tunnel::{ReceiveBatch, SendBatch, TunnelSocket};

use super::segment::SegmentId;

/// What may wait for the socket beyond the switches' own queues, in bytes.
const OUT_BYTES: usize = 1 << 20;
/// How often the socket is read in a row: whoever floods it must not keep machines from being served.
const READS_IN_A_ROW: usize = 4;

/// What came that no tunnel got to see, and what the network would not take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WireCounters {
    /// Packets that are not Geneve, or of networks that no environment here has.
    pub(crate) foreign: u64,
    /// Packets that the network refused for good.
    pub(crate) refused: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Wire {
    socket: TunnelSocket,
    pub(super) out: SendBatch,
    networks: BTreeMap<Vni, (SegmentId, NetworkId)>,
    /// The kernel has no room: what is left waits in the switches.
    blocked: bool,
    pub(super) counters: WireCounters,
}

impl Wire {
    pub(super) fn bind(address: SocketAddr) -> std::io::Result<Self> {
        Ok(Self {
            socket: TunnelSocket::bind(address)?,
            out: SendBatch::new(OUT_BYTES),
            networks: BTreeMap::new(),
            blocked: false,
            counters: WireCounters::default(),
        })
    }

    pub(super) fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Gives a number on the wire to a network of this host. False when another has it.
    pub(super) fn assign(&mut self, vni: Vni, segment: SegmentId, network: NetworkId) -> bool {
        *self.networks.entry(vni).or_insert((segment, network)) == (segment, network)
    }

    pub(super) fn forget(&mut self, segment: SegmentId) {
        self.networks.retain(|_, (of, _)| *of != segment);
    }

    /// Whose a packet is, as it claims.
    pub(super) fn owner(&self, packet: &[u8]) -> Option<(SegmentId, NetworkId)> {
        let (header, _) = Header::decode(packet).ok()?;
        self.networks.get(&header.vni).copied()
    }

    /// Sends what waits. False when the kernel has no room for all of it.
    pub(super) fn send(&mut self) -> bool {
        if self.out.is_empty() {
            return !self.blocked;
        }
        match self.socket.send(&mut self.out) {
            Ok(sent) => {
                self.counters.refused += sent.refused as u64;
                self.blocked = sent.would_block;
            }
            Err(error) => {
                tracing::error!(%error, "the tunnels' socket cannot send");
                self.blocked = false;
            }
        }
        !self.blocked
    }

    /// Receives a few times, and hands every packet with its sender to `take`, in order.
    pub(super) fn receive(
        socket: &mut Option<Self>,
        batch: &mut ReceiveBatch,
        mut take: impl FnMut(&mut Option<Self>, SocketAddr, &mut [u8]),
    ) {
        for _ in 0..READS_IN_A_ROW {
            let Some(wire) = socket else { return };
            let more = match wire.socket.receive(batch) {
                Ok(received) => received.more,
                Err(error) => {
                    tracing::debug!(%error, "the tunnels' socket cannot receive");
                    false
                }
            };
            for (from, packet) in batch.packets() {
                take(socket, from, packet);
            }
            if !more {
                return;
            }
        }
    }
}
