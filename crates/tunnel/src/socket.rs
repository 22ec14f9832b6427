//! A UDP socket that sends and receives many packets by one call.
//!
//! Owns the file descriptor and what the kernel was found to offer: UDP_SEGMENT (one buffer goes out as a train of equal
//! packets) and UDP_GRO (a train comes in as one buffer). Without them, `sendmmsg` and `recvmmsg` still take many packets
//! by one call. Packets are never fragmented: what does not fit the path is refused, and counted by whoever sends.
//!
//! Nothing blocks: a call that would says so, and the caller's event loop waits.

mod address;
mod receive;
mod send;

use std::{
    io,
    mem::size_of,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

pub use receive::{ReceiveBatch, Received};
pub use send::{SendBatch, Sent};

/// What is asked of the kernel for each direction, in bytes; it gives what its limits allow. A burst of 64 KiB from each of
/// dozens of peers, while this host's thread is elsewhere for a millisecond.
const SOCKET_BUFFER_BYTES: libc::c_int = 8 << 20;

/// What the kernel does for whole trains of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// It cuts one buffer into packets (UDP_SEGMENT).
    pub send: bool,
    /// It joins packets of one sender (UDP_GRO).
    pub receive: bool,
}

/// A UDP socket for the tunnels of one host.
#[derive(Debug)]
pub struct TunnelSocket {
    socket: UdpSocket,
    v6: bool,
    offload: Offload,
}

impl TunnelSocket {
    /// Binds, and finds out what the kernel offers. Bound to `[::]`, it serves IPv4 as well where the system lets it.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        // Who administers the network may go beyond the limit.
        for (buffer, beyond) in
            [(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)]
        {
            set_option(&socket, libc::SOL_SOCKET, beyond, SOCKET_BUFFER_BYTES)
                .or_else(|_| set_option(&socket, libc::SOL_SOCKET, buffer, SOCKET_BUFFER_BYTES))?;
        }
        // Probe: the don't-fragment bit is set, and the path's MTU is ours to know, not for ICMP (which anybody can send) to
        // say.
        // A socket for IPv6 may carry IPv4 too.
        set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
        if address.is_ipv6() {
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
        }
        // A segment size of 0 changes nothing, and fails where there is no such thing.
        let offload = Offload {
            send: set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok(),
            receive: set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok(),
        };
        Ok(Self { socket, v6: address.is_ipv6(), offload })
    }

    /// Where it is bound.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What is in use now.
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Does without, for comparing and for devices that get it wrong.
    pub fn turn_offload_off(&mut self) -> io::Result<()> {
        if self.offload.receive {
            set_option(&self.socket, libc::SOL_UDP, libc::UDP_GRO, 0)?;
        }
        self.offload = Offload { send: false, receive: false };
        Ok(())
    }

    /// Sends what the batch holds, as far as the socket takes it. What it takes, or refuses for good, leaves the batch.
    pub fn send(&mut self, batch: &mut SendBatch) -> io::Result<Sent> {
        batch.send(self.socket.as_raw_fd(), self.v6, &mut self.offload.send)
    }

    /// Receives what is there, as far as the batch has room. What the batch held before is gone.
    pub fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<Received> {
        batch.receive(self.socket.as_raw_fd())
    }
}

impl AsFd for TunnelSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn set_option(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `socket` is borrowed; the pointer is to `value`, of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Room for one control message with an integer; as aligned as the kernel's headers are.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

const CONTROL_BYTES: usize = 64;

impl Control {
    const EMPTY: Self = Self([0; CONTROL_BYTES]);
}
