//! Join tokens: what an operator carries from a member to a host that is to join.
//!
//! `diorama-join-1.ID.SECRET.FINGERPRINT@ADDRESS[,ADDRESS…]`: the id and the secret let the host in; the fingerprint of the
//! authority's certificate lets the host know the cluster before it shows the secret to anyone; the addresses are those
//! of a host that admits others. The directory holds the secret's SHA-256 alone.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::authority::{AuthorityError, random};
use super::members::MAX_ADDRESSES;
use super::{Fingerprint, from_hex, to_hex};

const PREFIX: &str = "diorama-join-1";
/// The longest token, in characters: the most addresses, each of IPv6 with a scope.
const TEXT_MAX: usize = 1024;

/// A join token. Its `Debug` hides the secret; its `Display` is the token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Names it in the directory.
    pub id: String,
    secret: [u8; 32],
    /// Of the authority's certificate.
    pub authority: Fingerprint,
    /// Where to join, in the order in which they are tried: 1 to [`MAX_ADDRESSES`].
    pub addresses: Vec<SocketAddr>,
}

/// Why a text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is not a token of this version.
    #[error("not a join token: it does not start with `{PREFIX}.`")]
    Prefix,
    /// A part is missing, too many or not of its form.
    #[error("not a whole join token: its {part} is missing or damaged")]
    Part {
        /// Which part.
        part: &'static str,
    },
}

impl JoinToken {
    /// A new token with a fresh secret.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub(crate) fn generate(
        authority: Fingerprint,
        addresses: Vec<SocketAddr>,
    ) -> Result<Self, AuthorityError> {
        Ok(Self { id: to_hex(&random::<6>()?), secret: random()?, authority, addresses })
    }

    /// What is shown to the host that admits.
    pub(crate) fn secret_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.secret)
    }

    /// What the directory keeps of the secret.
    pub(crate) fn secret_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.secret_text().as_bytes())
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}.{}@", self.id, self.secret_text(), self.authority)?;
        for (index, address) in self.addresses.iter().enumerate() {
            write!(f, "{}{address}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let part = |part| TokenError::Part { part };
        let text = text.trim();
        let rest =
            text.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.')).ok_or(TokenError::Prefix)?;
        if text.len() > TEXT_MAX {
            return Err(part("length"));
        }
        let (credentials, addresses) = rest.split_once('@').ok_or(part("address"))?;
        let mut parts = credentials.split('.');
        let id = parts.next().unwrap_or_default();
        from_hex::<6>(id).map_err(|_| part("id"))?;
        let secret = parts.next().and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
        let secret = secret.and_then(|bytes| bytes.try_into().ok()).ok_or(part("secret"))?;
        let authority =
            parts.next().and_then(|text| text.parse().ok()).ok_or(part("authority's fingerprint"))?;
        let addresses: Result<Vec<SocketAddr>, _> = addresses.split(',').map(str::parse).collect();
        let addresses = addresses.map_err(|_| part("address"))?;
        if parts.next().is_some() || addresses.len() > MAX_ADDRESSES {
            return Err(part("end"));
        }
        Ok(Self { id: id.to_owned(), secret, authority, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> JoinToken {
        let addresses = vec!["10.0.0.1:7440".parse().unwrap(), "[fd00::1]:7440".parse().unwrap()];
        JoinToken::generate(Fingerprint([3; 32]), addresses).unwrap()
    }

    #[test]
    fn a_token_survives_as_text_and_hides_from_logs() {
        let token = token();
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(&token.secret_text()));
        assert_ne!(token.secret_fingerprint(), self::token().secret_fingerprint());
    }

    #[test]
    fn what_is_wrong_with_a_token_is_said() {
        let text = token().to_string();
        let (credentials, _) = text.split_once('@').unwrap();
        let parts: Vec<&str> = credentials.split('.').collect();
        for (wrong, message) in [
            ("hello".to_owned(), "does not start"),
            (text.replace("join-1", "join-2"), "does not start"),
            (credentials.to_owned(), "address"),
            (format!("{credentials}@"), "address"),
            (format!("{credentials}@host:1"), "address"),
            (format!("{credentials}@{}", ["1.1.1.1:1"; 9].join(",")), "end"),
            (text.replace(parts[1], "zz"), "id"),
            (text.replace(parts[2], "AAAA"), "secret"),
            (text.replace(parts[3], "00"), "fingerprint"),
            (text.replace('@', ".x@"), "end"),
            (format!("{text}{}", ",1.1.1.1:1".repeat(200)), "length"),
        ] {
            let error = wrong.parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains(message), "{wrong}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text(text in "(diorama-join-1)?[.@,:a-f0-9A-Z_-]{0,120}") {
            let _ = text.parse::<JoinToken>();
        }
    }
}
