//! How long a guest's packets may be, so that each frame fits one packet of the network that carries it. Tunnels never
//! fragment: a frame in two packets is lost with either.

use diorama_switch::{FRAME_OVERHEAD, geneve::HEADER_BYTES};

use crate::{key::TAG_BYTES, tunnel::Protection};

/// The least MTU that guests are given, in bytes: what every IPv4 host must be able to take.
pub const LEAST_GUEST_MTU: u16 = 576;

const UDP_BYTES: usize = 8;

/// What carries the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ip {
    /// A header of 20 bytes: no options.
    V4,
    /// A header of 40 bytes: no extensions.
    V6,
}

/// No useful guest MTU fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "tunnels over an MTU of {underlay_mtu} bytes cannot carry guests' packets of {LEAST_GUEST_MTU} bytes: it takes {needed}"
)]
pub struct MtuError {
    /// The MTU of the network between the hosts, in bytes.
    pub underlay_mtu: u16,
    /// What it would have to be, in bytes.
    pub needed: usize,
}

/// What a tunnel adds to a frame, in bytes: IP, UDP, Geneve with our option, and the tag.
pub const fn packet_overhead(ip: Ip, protection: Protection) -> usize {
    let ip_bytes = match ip {
        Ip::V4 => 20,
        Ip::V6 => 40,
    };
    let tag_bytes = match protection {
        Protection::Sealed => TAG_BYTES,
        Protection::Open => 0,
    };
    ip_bytes + UDP_BYTES + HEADER_BYTES + tag_bytes
}

/// The largest MTU of a network that spans hosts, in bytes, given that of the network between them. The guests' frames may
/// have two VLAN tags beyond: that is what the switch lets in.
pub fn guest_mtu(underlay_mtu: u16, ip: Ip, protection: Protection) -> Result<u16, MtuError> {
    let overhead = packet_overhead(ip, protection) + FRAME_OVERHEAD;
    let needed = usize::from(LEAST_GUEST_MTU) + overhead;
    if usize::from(underlay_mtu) < needed {
        return Err(MtuError { underlay_mtu, needed });
    }
    Ok(underlay_mtu - overhead as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_the_underlay_exactly() {
        for (underlay, ip, protection, expected) in [
            (1500, Ip::V4, Protection::Sealed, 1406),
            (1500, Ip::V4, Protection::Open, 1422),
            (1500, Ip::V6, Protection::Sealed, 1386),
            (9000, Ip::V4, Protection::Sealed, 8906),
            (670, Ip::V4, Protection::Sealed, 576),
            (u16::MAX, Ip::V6, Protection::Open, 65_437),
        ] {
            let mtu = guest_mtu(underlay, ip, protection).unwrap();
            assert_eq!(mtu, expected, "{underlay} {ip:?} {protection:?}");
            let frame = usize::from(mtu) + FRAME_OVERHEAD;
            assert_eq!(frame + packet_overhead(ip, protection), usize::from(underlay));
        }
        let error = MtuError { underlay_mtu: 669, needed: 670 };
        assert_eq!(guest_mtu(669, Ip::V4, Protection::Sealed), Err(error));
        assert_eq!(guest_mtu(0, Ip::V6, Protection::Open).unwrap_err().needed, 674);
    }
}
