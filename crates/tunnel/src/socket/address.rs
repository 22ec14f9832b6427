//! Socket addresses as the kernel has them. A socket for IPv6 has IPv4 addresses mapped into it; outside of here they are
//! IPv4 addresses, whatever the socket.

use std::{
    mem::{size_of, zeroed},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
};

/// An IPv4 or IPv6 socket address in the kernel's form.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union RawAddress {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl RawAddress {
    pub(super) const BYTES: libc::socklen_t = size_of::<Self>() as libc::socklen_t;

    pub(super) fn empty() -> Self {
        // SAFETY: all fields of both address types are integers or arrays of them, for which zero is valid.
        unsafe { zeroed() }
    }

    /// The address and its length, for a socket of IPv6 or of IPv4.
    pub(super) fn new(address: SocketAddr, v6_socket: bool) -> (Self, libc::socklen_t) {
        let mut raw = Self::empty();
        let mapped = match address {
            SocketAddr::V4(v4) if v6_socket => {
                SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0))
            }
            address => address,
        };
        let len = match mapped {
            SocketAddr::V4(address) => {
                raw.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(address) => {
                raw.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                size_of::<libc::sockaddr_in6>()
            }
        };
        (raw, len as libc::socklen_t)
    }

    /// What the kernel wrote; None for a family that is neither.
    pub(super) fn get(&self) -> Option<SocketAddr> {
        // SAFETY: all variants begin with the family, and every bit pattern is valid in each; `empty` initialised all bytes.
        match libc::c_int::from(unsafe { self.family }) {
            libc::AF_INET => {
                // SAFETY: as above.
                let raw = unsafe { self.v4 };
                let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
                Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(raw.sin_port))))
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let raw = unsafe { self.v6 };
                let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
                let port = u16::from_be(raw.sin6_port);
                if let Some(ip) = ip.to_ipv4_mapped() {
                    return Some(SocketAddr::V4(SocketAddrV4::new(ip, port)));
                }
                Some(SocketAddr::V6(SocketAddrV6::new(ip, port, raw.sin6_flowinfo, raw.sin6_scope_id)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_it_went() {
        for address in ["192.0.2.7:6081", "[2001:db8::7]:6081", "[fe80::1%3]:1"] {
            let address: SocketAddr = address.parse().unwrap();
            for v6_socket in [false, true] {
                let (raw, len) = RawAddress::new(address, v6_socket);
                assert_eq!(raw.get(), Some(address));
                assert!(len <= RawAddress::BYTES);
            }
        }
        assert_eq!(RawAddress::empty().get(), None);
    }
}
