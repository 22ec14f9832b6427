//! The addresses of a NIC: its MAC and, where the file gives one, its IP address with the prefix length.
//!
//! Invariants: a [`MacAddress`] is unicast and not zero; an [`InterfaceAddress`] is one that a NIC may carry: neither
//! its network's own address nor its broadcast address, and no multicast, loopback or unspecified one.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::problem::Excerpt;

/// A NIC's hardware address, written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Why a text or six bytes are not a NIC's MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits with colons between.
    #[error("{} is not a MAC address", Excerpt(text))]
    Syntax {
        /// The text.
        text: String,
    },
    /// The group bit is set, or all bits are zero: no NIC can have it.
    #[error("{} is not the address of one NIC: it is zero, multicast or broadcast", hex(bytes))]
    NotUnicast {
        /// The address.
        bytes: [u8; 6],
    },
}

impl MacAddress {
    /// An address from its six bytes, in the order of transmission.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            Err(MacError::NotUnicast { bytes })
        } else {
            Ok(Self(bytes))
        }
    }

    /// The six bytes, in the order of transmission.
    pub fn bytes(&self) -> [u8; 6] {
        self.0
    }

    /// The address of a machine's NIC that names none: the same for the same names wherever it is computed, so that
    /// every fork has it too. `attempt` counts from zero and gives another address where one is already taken.
    pub(crate) fn generated(machine: &str, nic_index: usize, attempt: u64) -> Self {
        // FNV-1a, then a finaliser, since only 24 bits are kept and FNV's low bits mix badly on short inputs.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        let index = nic_index as u64;
        for byte in machine.bytes().chain([0xff]).chain(index.to_le_bytes()).chain(attempt.to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 33;
        let [low, middle, high, ..] = hash.to_le_bytes();
        Self([0x52, 0x54, 0x00, high, middle, low])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex(&self.0))
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax { text: text.to_owned() };
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(syntax)?;
            // from_str_radix alone would take `+1`.
            if pair.len() != 2 || !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| syntax())?;
        }
        if pairs.next().is_some() { Err(syntax()) } else { Self::new(bytes) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

/// A NIC's IP address with the length of its network's prefix, written `10.0.0.1/24` or `fd00::1/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceAddress {
    ip: IpAddr,
    prefix_bits: u8,
}

/// Why a text is not a NIC's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not an IP address, a slash and a number.
    #[error("{} is not an IP address with a prefix length", Excerpt(text))]
    Syntax {
        /// The text.
        text: String,
    },
    /// An IP address alone.
    #[error("{ip} lacks its prefix length")]
    NoPrefix {
        /// The address.
        ip: IpAddr,
    },
    /// A prefix longer than the address.
    #[error("/{prefix_bits} is too long a prefix for {ip}: at most /{max_bits}")]
    Prefix {
        /// The address.
        ip: IpAddr,
        /// The prefix length given.
        prefix_bits: u8,
        /// The longest there is for this kind of address.
        max_bits: u8,
    },
    /// All bits after the prefix are zero: the network itself.
    #[error("{ip}/{prefix_bits} is the network's own address, which no machine can have")]
    NetworkAddress {
        /// The address.
        ip: IpAddr,
        /// Its prefix length.
        prefix_bits: u8,
    },
    /// All bits after the prefix are one (IPv4).
    #[error("{ip}/{prefix_bits} is the network's broadcast address, which no machine can have")]
    BroadcastAddress {
        /// The address.
        ip: IpAddr,
        /// Its prefix length.
        prefix_bits: u8,
    },
    /// Multicast, loopback or unspecified.
    #[error("{ip} is a multicast, loopback or unspecified address, which no NIC can have")]
    NotUnicast {
        /// The address.
        ip: IpAddr,
    },
}

impl InterfaceAddress {
    /// An address that a NIC may carry.
    pub fn new(ip: IpAddr, prefix_bits: u8) -> Result<Self, AddressError> {
        // Both kinds of address as 128 bits, the host part at the bottom.
        let (bits, max_bits) = match ip {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        if prefix_bits > max_bits {
            return Err(AddressError::Prefix { ip, prefix_bits, max_bits });
        }
        if ip.is_multicast() || ip.is_loopback() || ip.is_unspecified() {
            return Err(AddressError::NotUnicast { ip });
        }
        // Two-address and one-address networks have no address of their own (RFC 3021, RFC 6164).
        let host_bits = u32::from(max_bits - prefix_bits);
        if host_bits >= 2 {
            let host_mask = 1u128.checked_shl(host_bits).unwrap_or(0).wrapping_sub(1);
            if bits & host_mask == 0 {
                return Err(AddressError::NetworkAddress { ip, prefix_bits });
            }
            if ip.is_ipv4() && bits & host_mask == host_mask {
                return Err(AddressError::BroadcastAddress { ip, prefix_bits });
            }
        }
        Ok(Self { ip, prefix_bits })
    }

    /// The IP address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// The length of the network's prefix, in bits.
    pub fn prefix_bits(&self) -> u8 {
        self.prefix_bits
    }
}

impl fmt::Display for InterfaceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.ip, self.prefix_bits))
    }
}

impl FromStr for InterfaceAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let syntax = || AddressError::Syntax { text: text.to_owned() };
        let Some((ip, prefix)) = text.split_once('/') else {
            return Err(text.parse().map_or_else(|_| syntax(), |ip| AddressError::NoPrefix { ip }));
        };
        let ip = ip.parse().map_err(|_| syntax())?;
        if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        Self::new(ip, prefix.parse().map_err(|_| syntax())?)
    }
}

impl TryFrom<String> for InterfaceAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<InterfaceAddress> for String {
    fn from(address: InterfaceAddress) -> String {
        address.to_string()
    }
}

fn hex(bytes: &[u8; 6]) -> String {
    let [a, b, c, d, e, f] = bytes;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        let mac: MacAddress = "52:54:00:AB:cd:01".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 1]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
        assert_eq!(serde_json::to_string(&mac).unwrap(), "\"52:54:00:ab:cd:01\"");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:01:02",
            "52-54-00-ab-cd-01",
            "+2:54:00:ab:cd:01",
            "g2:54:00:ab:cd:01",
            "5254:00:ab:cd:01:",
        ] {
            assert!(matches!(bad.parse::<MacAddress>(), Err(MacError::Syntax { .. })), "{bad}");
        }
        for group in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            assert!(matches!(group.parse::<MacAddress>(), Err(MacError::NotUnicast { .. })), "{group}");
        }
    }

    #[test]
    fn generated_macs_never_change() {
        // These stand in users' notes and in snapshots: a change here changes every guest's hardware.
        assert_eq!(MacAddress::generated("server", 0, 0).to_string(), "52:54:00:d5:22:6b");
        assert_eq!(MacAddress::generated("server", 1, 0).to_string(), "52:54:00:b9:37:af");
        assert_eq!(MacAddress::generated("server", 0, 1).to_string(), "52:54:00:a1:d8:2d");
    }

    #[test]
    fn interface_addresses() {
        for good in [
            "10.0.0.1/24",
            "10.0.1.0/16",
            "10.0.0.0/31",
            "10.0.0.255/32",
            "fd00::1/64",
            "fd00::/127",
            "10.0.0.1/0",
        ] {
            assert_eq!(good.parse::<InterfaceAddress>().unwrap().to_string(), good);
        }
        for (bad, message) in [
            ("", "`` is not an IP address with a prefix length"),
            ("10.0.0.1", "10.0.0.1 lacks its prefix length"),
            ("10.0.0.1/", "`10.0.0.1/` is not an IP address with a prefix length"),
            ("10.0.0.1/+8", "`10.0.0.1/+8` is not an IP address with a prefix length"),
            ("10.0.0.256/24", "`10.0.0.256/24` is not an IP address with a prefix length"),
            ("10.0.0.1/33", "/33 is too long a prefix for 10.0.0.1: at most /32"),
            ("fd00::1/129", "/129 is too long a prefix for fd00::1: at most /128"),
            ("10.0.0.0/24", "10.0.0.0/24 is the network's own address, which no machine can have"),
            ("fd00::/64", "fd00::/64 is the network's own address, which no machine can have"),
            ("10.0.0.255/24", "10.0.0.255/24 is the network's broadcast address, which no machine can have"),
            (
                "255.255.255.255/0",
                "255.255.255.255/0 is the network's broadcast address, which no machine can have",
            ),
            (
                "224.0.0.1/24",
                "224.0.0.1 is a multicast, loopback or unspecified address, which no NIC can have",
            ),
            ("::1/0", "::1 is a multicast, loopback or unspecified address, which no NIC can have"),
        ] {
            assert_eq!(bad.parse::<InterfaceAddress>().unwrap_err().to_string(), message);
        }
    }
}
