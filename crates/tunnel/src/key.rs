//! Keys: fresh ones to seal with, those of the other host to open with.
//!
//! Owns the secrets and the two ciphers. Nonces are made here, from packet numbers; that no number repeats under one key is
//! the tunnel's business, and that no key seals in two tunnels is ensured by there being no way to copy a [`SendingKey`].

use std::fmt;

use diorama_switch::geneve::KeyId;
use ring::{
    aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};

/// A key handed over: identifier, cipher and secret, in bytes.
pub const KEY_BYTES: usize = 2 + 1 + SECRET_BYTES;

pub(crate) const TAG_BYTES: usize = 16;

const SECRET_BYTES: usize = 32;

/// How packets are sealed. Both have keys of 32 bytes and tags of 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cipher {
    /// Fast where the processor has instructions for it.
    Aes256Gcm,
    /// Fast everywhere else.
    ChaCha20Poly1305,
}

impl Cipher {
    /// Whether this processor has instructions for AES and GCM.
    pub fn has_fast_aes() -> bool {
        #[cfg(target_arch = "x86_64")]
        return std::arch::is_x86_feature_detected!("aes")
            && std::arch::is_x86_feature_detected!("pclmulqdq");
        #[cfg(target_arch = "aarch64")]
        return std::arch::is_aarch64_feature_detected!("aes")
            && std::arch::is_aarch64_feature_detected!("pmull");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        return false;
    }

    /// The best for a tunnel between two hosts, of which each has told [`Cipher::has_fast_aes`].
    pub fn for_hosts(here: bool, there: bool) -> Self {
        if here && there { Self::Aes256Gcm } else { Self::ChaCha20Poly1305 }
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Aes256Gcm => 1,
            Self::ChaCha20Poly1305 => 2,
        }
    }
}

/// There is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The system gave no random bytes.
    #[error("the system gave no random bytes for a key")]
    NoRandomness,
    /// What was handed over has another length.
    #[error("a key of {len} bytes was handed over; it has {KEY_BYTES}")]
    Length {
        /// Its length, in bytes.
        len: usize,
    },
    /// What was handed over is for a cipher that this version does not have.
    #[error("a key for the unknown cipher {code} was handed over")]
    Cipher {
        /// The cipher's number.
        code: u8,
    },
}

/// A key to seal with. Fresh and random, for one tunnel and direction: there is no way to make it twice.
pub struct SendingKey {
    id: KeyId,
    cipher: Cipher,
    secret: [u8; SECRET_BYTES],
    key: LessSafeKey,
}

impl SendingKey {
    /// A new key. `id` tells it from the other keys of this tunnel and direction: one more than the last, round the end.
    pub fn generate(id: KeyId, cipher: Cipher) -> Result<Self, KeyError> {
        let mut secret = [0; SECRET_BYTES];
        SystemRandom::new().fill(&mut secret).map_err(|_| KeyError::NoRandomness)?;
        Ok(Self { id, cipher, secret, key: aead_key(cipher, &secret) })
    }

    /// What the receiver needs. Secret: to be sent on an authenticated and encrypted channel, and not to be kept.
    pub fn to_bytes(&self) -> [u8; KEY_BYTES] {
        let mut bytes = [0; KEY_BYTES];
        bytes[..2].copy_from_slice(&self.id.0.to_be_bytes());
        bytes[2] = self.cipher.code();
        bytes[3..].copy_from_slice(&self.secret);
        bytes
    }

    /// What packets call it.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Encrypts `body` in place and returns the tag. None if it is too long to be a packet.
    #[inline]
    pub(crate) fn seal(&self, sequence: u64, header: &[u8], body: &mut [u8]) -> Option<[u8; TAG_BYTES]> {
        let tag =
            self.key.seal_in_place_separate_tag(nonce(self.id, sequence), Aad::from(header), body).ok()?;
        tag.as_ref().try_into().ok()
    }
}

impl fmt::Debug for SendingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendingKey")
            .field("id", &self.id)
            .field("cipher", &self.cipher)
            .finish_non_exhaustive()
    }
}

/// A key to open with: what the sender has handed over.
pub struct ReceivingKey {
    id: KeyId,
    cipher: Cipher,
    key: LessSafeKey,
}

impl ReceivingKey {
    /// From [`SendingKey::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let bytes: &[u8; KEY_BYTES] = bytes.try_into().map_err(|_| KeyError::Length { len: bytes.len() })?;
        let [a, b, code, secret @ ..] = bytes;
        let cipher = [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305].into_iter().find(|c| c.code() == *code);
        let cipher = cipher.ok_or(KeyError::Cipher { code: *code })?;
        Ok(Self { id: KeyId(u16::from_be_bytes([*a, *b])), cipher, key: aead_key(cipher, secret) })
    }

    /// What packets call it.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Decrypts `sealed`, ciphertext and tag, in place; None if it is not genuine.
    #[inline]
    pub(crate) fn open<'p>(
        &self,
        sequence: u64,
        header: &[u8],
        sealed: &'p mut [u8],
    ) -> Option<&'p mut [u8]> {
        self.key.open_in_place(nonce(self.id, sequence), Aad::from(header), sealed).ok()
    }
}

impl fmt::Debug for ReceivingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivingKey")
            .field("id", &self.id)
            .field("cipher", &self.cipher)
            .finish_non_exhaustive()
    }
}

fn aead_key(cipher: Cipher, secret: &[u8; SECRET_BYTES]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(cipher.algorithm(), secret).expect("both ciphers have keys of 32 bytes"))
}

/// Keys are never shared by tunnels or directions, so the number alone makes it unique; the key's name is there for the
/// case that a secret ever had two.
#[inline]
fn nonce(key: KeyId, sequence: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..2].copy_from_slice(&key.0.to_be_bytes());
    nonce[NONCE_LEN - 8..].copy_from_slice(&sequence.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_seals_the_other_opens_and_nobody_else() {
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            let ours = SendingKey::generate(KeyId(7), cipher).unwrap();
            let theirs = ReceivingKey::from_bytes(&ours.to_bytes()).unwrap();
            let another = SendingKey::generate(KeyId(7), cipher).unwrap();
            let another = ReceivingKey::from_bytes(&another.to_bytes()).unwrap();
            assert_eq!(theirs.id(), KeyId(7));
            let mut body = *b"frame";
            let tag = ours.seal(9, b"header", &mut body).unwrap();
            assert_ne!(&body, b"frame");
            let sealed = [&body[..], &tag].concat();
            let opens = |key: &ReceivingKey, sequence, header: &[u8]| {
                key.open(sequence, header, &mut sealed.clone()).map(|body| body.to_vec())
            };
            assert_eq!(opens(&theirs, 9, b"header").as_deref(), Some(&b"frame"[..]));
            assert_eq!(opens(&theirs, 10, b"header"), None);
            assert_eq!(opens(&theirs, 9, b"Header"), None);
            assert_eq!(opens(&another, 9, b"header"), None);
        }
    }

    #[test]
    fn what_is_no_key_is_refused_and_secrets_are_not_shown() {
        let key = SendingKey::generate(KeyId(1), Cipher::Aes256Gcm).unwrap();
        let mut bytes = key.to_bytes();
        assert_eq!(ReceivingKey::from_bytes(&bytes[1..]).unwrap_err(), KeyError::Length { len: 34 });
        assert_eq!(format!("{key:?}"), "SendingKey { id: KeyId(1), cipher: Aes256Gcm, .. }");
        bytes[2] = 3;
        assert_eq!(ReceivingKey::from_bytes(&bytes).unwrap_err(), KeyError::Cipher { code: 3 });
    }
}
