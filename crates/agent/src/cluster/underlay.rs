//! What carries the tunnels: how long a packet the network between hosts takes.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

/// What is assumed of a network that nobody knows: Ethernet's MTU, in bytes.
pub(crate) const UNDERLAY_MTU: u16 = 1500;

nix::ioctl_read_bad!(interface_mtu, libc::SIOCGIFMTU, libc::ifreq);

/// The MTU of the interface that has this address, in bytes.
pub(crate) fn underlay_mtu(address: IpAddr) -> Option<u16> {
    let has_it = |storage: &nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let v6 = storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
        v4.or(v6) == Some(address)
    };
    let mut interfaces = nix::ifaddrs::getifaddrs().ok()?;
    let name = interfaces.find(|known| known.address.as_ref().is_some_and(has_it))?.interface_name;
    // Any socket will do; it asks in this process's network namespace, which /sys may not show.
    let socket = std::net::UdpSocket::bind(SocketAddr::new(address, 0)).ok()?;
    // SAFETY: all-zero bytes are a valid `ifreq`: integers, and a union of such and null pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the descriptor is open, and the request is what SIOCGIFMTU reads and writes.
    unsafe { interface_mtu(socket.as_raw_fd(), &raw mut request) }.ok()?;
    // SAFETY: SIOCGIFMTU has written this member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    // The loopback's is one more than a packet can have.
    Some(u16::try_from(mtu.max(0)).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_known_by_its_address() {
        let loopback = underlay_mtu("127.0.0.1".parse().unwrap());
        assert!(loopback.is_some_and(|mtu| mtu >= UNDERLAY_MTU), "{loopback:?}");
        // Documentation's: nobody has it.
        assert_eq!(underlay_mtu("192.0.2.1".parse().unwrap()), None);
    }
}
