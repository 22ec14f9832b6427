//! Who is who: the cluster's authority, hosts' keys and certificates, join tokens, TLS.
//!
//! A host *is* its key: [`HostId`] is derived from the public key, so that no certificate can claim another host's. The
//! authority says by a certificate that a host with that id was admitted under a name; the [`Members`] say who still
//! belongs. Both are asked at every connection: see [`tls`].

mod authority;
mod credentials;
mod members;
pub mod tls;
mod token;

use std::fmt;
use std::str::FromStr;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

pub use authority::{Authority, AuthorityError, CERTIFICATE_LIFETIME, Certificate};
pub use credentials::{Credentials, CredentialsError, HostKey};
pub use members::{MAX_ADDRESSES, Member, Members};
pub use token::{JoinToken, TokenError};

/// A host's public key: Ed25519, 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub [u8; 32]);

/// What stands before the 32 bytes in an X.509 public key (RFC 8410).
const ED25519_SPKI_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

impl PublicKey {
    /// From an X.509 SubjectPublicKeyInfo; `None` when it is not an Ed25519 key.
    pub(crate) fn from_spki(der: &[u8]) -> Option<Self> {
        der.strip_prefix(&ED25519_SPKI_PREFIX)?.try_into().ok().map(Self)
    }

    /// The id of the host that has it.
    pub fn host_id(&self) -> HostId {
        let digest = digest(&SHA256, &[&ED25519_SPKI_PREFIX[..], &self.0].concat());
        let mut id = [0; 16];
        id.copy_from_slice(&digest.as_ref()[..16]);
        HostId(id)
    }
}

/// Names a host for as long as it is a member: half of its public key's SHA-256. As text, 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostId(pub [u8; 16]);

/// A SHA-256, as text 64 hexadecimal digits: of the authority's certificate, it names the cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of any bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, bytes).as_ref());
        Self(fingerprint)
    }
}

/// A text is not the hexadecimal digits that it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not {expected_bytes} bytes as hexadecimal digits")]
pub struct NotHexadecimal {
    /// How many bytes it should name.
    pub expected_bytes: usize,
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(crate) fn from_hex<const N: usize>(text: &str) -> Result<[u8; N], NotHexadecimal> {
    let wrong = NotHexadecimal { expected_bytes: N };
    let digit = |character: u8| match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(wrong),
    };
    if text.len() != 2 * N {
        return Err(wrong);
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(bytes)
}

/// 64 random bits as text.
pub(crate) fn random_text() -> Result<String, AuthorityError> {
    Ok(to_hex(&authority::random::<8>()?))
}

macro_rules! hexadecimal {
    ($type:ident) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&to_hex(&self.0))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }

        impl FromStr for $type {
            type Err = NotHexadecimal;

            fn from_str(text: &str) -> Result<Self, NotHexadecimal> {
                from_hex(text).map(Self)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NotHexadecimal;

            fn try_from(text: String) -> Result<Self, NotHexadecimal> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}

hexadecimal!(HostId);
hexadecimal!(Fingerprint);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_as_text() {
        let id = PublicKey([7; 32]).host_id();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_ne!(id, PublicKey([8; 32]).host_id());
        for wrong in ["", "00", &"g".repeat(32), &"A".repeat(32), &"é".repeat(16), &"0".repeat(33)] {
            assert_eq!(wrong.parse::<HostId>(), Err(NotHexadecimal { expected_bytes: 16 }), "{wrong}");
        }
        assert!(serde_json::from_str::<Fingerprint>("\"xy\"").is_err());
    }

    #[test]
    fn only_ed25519_keys_are_taken() {
        let spki = [&ED25519_SPKI_PREFIX[..], &[9; 32]].concat();
        assert_eq!(PublicKey::from_spki(&spki), Some(PublicKey([9; 32])));
        assert_eq!(PublicKey::from_spki(&spki[..43]), None);
        assert_eq!(PublicKey::from_spki(&[spki, vec![0]].concat()), None);
        assert_eq!(PublicKey::from_spki(&[]), None);
    }
}
