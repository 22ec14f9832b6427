//! Who vouches for a snapshot: Ed25519 signatures of its id, which covers every byte of it.
//!
//! `signatures/<id>` is a line of JSON beside the manifest: the signer's public key and the signature. It is there before
//! the manifest, so that no snapshot of a signing writer is ever without; what is left of one that never was goes with the
//! next collection. Which keys are to be trusted is for the caller to say.
//!
//! Keys are files in the formats that everybody has: PKCS#8 and SubjectPublicKeyInfo in PEM, as
//! `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::{Damage, StoreError};
use crate::id::SnapshotId;
use crate::keys::hex;
use crate::root::Store;
use crate::seal::random_bytes;

const SIGNATURES: &str = "signatures";
const FORMAT: &str = "diorama-signature/1";
/// The longest that there can be.
pub(crate) const OBJECT_BYTES_MAX: u64 = 4 << 10;
const KEY_FILE_BYTES_MAX: u64 = 1 << 20;
/// More signers than anybody trusts.
const PUBLIC_KEYS_MAX: usize = 1024;
/// What stands before 32 bytes of private or public Ed25519 key: the shortest encoding that RFC 8410 has.
const PRIVATE_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
const PRIVATE_LABEL: &str = "PRIVATE KEY";
const PUBLIC_LABEL: &str = "PUBLIC KEY";

/// Who signs. Displayed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

/// What signs.
#[derive(Clone)]
pub struct SigningKey(Arc<Ed25519KeyPair>);

/// Why a file gives no keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// It holds something else.
    #[error("{} holds no {expected}", path.display())]
    Contents {
        /// The file, or what it is called.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
    },
}

/// What is known of a snapshot's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    /// It has none.
    None,
    /// Whoever has this key has signed exactly this snapshot.
    By(PublicKey),
    /// There is something in the signature's place that is none of this snapshot.
    Wrong {
        /// Where.
        object: PathBuf,
        /// What is wrong.
        damage: Damage,
    },
}

#[derive(Serialize, Deserialize)]
struct Stored {
    format: String,
    #[serde(with = "hex")]
    key: Vec<u8>,
    #[serde(with = "hex")]
    signature: Vec<u8>,
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(of {})", self.public())
    }
}

impl PublicKey {
    /// All public keys of a file: one after another in PEM, with whatever text between them.
    ///
    /// # Errors
    /// When it cannot be read, has none, or one that is not Ed25519.
    pub fn read_all(path: &Path) -> Result<Vec<Self>, KeyFileError> {
        Self::parse_all(&read(path)?, path)
    }

    /// The same of a text; `path` is what to call it.
    ///
    /// # Errors
    /// When there is none, or one that is not Ed25519.
    pub fn parse_all(text: &str, path: &Path) -> Result<Vec<Self>, KeyFileError> {
        let keys = pem_blocks(text, PUBLIC_LABEL)
            .take(PUBLIC_KEYS_MAX)
            .map(|der| der.as_deref().and_then(|der| der.strip_prefix(&PUBLIC_PREFIX)?.try_into().ok()))
            .map(|key| key.map(Self))
            .collect::<Option<Vec<_>>>();
        keys.filter(|keys| !keys.is_empty()).ok_or_else(|| KeyFileError::Contents {
            path: path.to_owned(),
            expected: "Ed25519 public key in PEM",
        })
    }

    /// The text of a file that holds it.
    pub fn to_pem(&self) -> String {
        pem(PUBLIC_LABEL, &[&PUBLIC_PREFIX[..], &self.0].concat())
    }

    fn has_signed(&self, id: &SnapshotId, signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(&message(id), signature).is_ok()
    }
}

impl SigningKey {
    /// Reads a private key.
    ///
    /// # Errors
    /// When it cannot be read, or is none of Ed25519 that is not encrypted.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let text = Zeroizing::new(read(path)?);
        let expected = "Ed25519 private key in PEM (PKCS#8, not encrypted)";
        let none = || KeyFileError::Contents { path: path.to_owned(), expected };
        let der = Zeroizing::new(pem_blocks(&text, PRIVATE_LABEL).next().flatten().ok_or_else(none)?);
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|_| none())?;
        Ok(Self(Arc::new(pair)))
    }

    /// A new private key, as the text of a file that holds it, and its public key.
    pub fn generate() -> (Zeroizing<String>, PublicKey) {
        let seed = Zeroizing::new(random_bytes::<32>());
        let der = Zeroizing::new([&PRIVATE_PREFIX[..], &*seed].concat());
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).expect("it was just encoded");
        (Zeroizing::new(pem(PRIVATE_LABEL, &der)), Self(Arc::new(pair)).public())
    }

    /// Whose signatures it makes.
    pub fn public(&self) -> PublicKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(key)
    }

    /// The object that says that it vouches for this snapshot.
    pub(crate) fn sign(&self, id: &SnapshotId) -> Vec<u8> {
        let signature = self.0.sign(&message(id)).as_ref().to_vec();
        let stored = Stored { format: FORMAT.to_owned(), key: self.public().0.to_vec(), signature };
        let mut bytes = serde_json::to_vec(&stored).expect("a signature is plain data");
        bytes.push(b'\n');
        bytes
    }
}

impl Store {
    /// Who has signed a snapshot. No key and nothing but the store is needed to find out.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn signature(&self, id: &SnapshotId) -> Result<Signature, StoreError> {
        let key = signature_key(id);
        let object = self.backend().locate(&key);
        let bytes = match self.backend().read(&key, OBJECT_BYTES_MAX) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Signature::None),
            Err(StoreError::Corrupt { file, damage }) => {
                return Ok(Signature::Wrong { object: file, damage });
            }
            Err(error) => return Err(error),
        };
        Ok(signer_of(id, &bytes)
            .map_or(Signature::Wrong { object, damage: Damage::Signature }, Signature::By))
    }

    /// Puts a signature here that another store, or a file, had: [`Store::signature_bytes`].
    ///
    /// # Errors
    /// When it is none of this snapshot, or cannot be written.
    pub fn put_signature(&self, id: &SnapshotId, object: &[u8]) -> Result<(), StoreError> {
        if signer_of(id, object).is_none() {
            let object = self.backend().locate(&signature_key(id));
            return Err(StoreError::corrupt(&object, Damage::Signature));
        }
        self.backend().replace(&signature_key(id), object)
    }

    /// A signature as it is stored, to be put elsewhere.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn signature_bytes(&self, id: &SnapshotId) -> Result<Option<Vec<u8>>, StoreError> {
        self.backend().read(&signature_key(id), OBJECT_BYTES_MAX)
    }

    /// The same, where it is one of this snapshot.
    pub(crate) fn sound_signature(&self, id: &SnapshotId) -> Result<Option<Vec<u8>>, StoreError> {
        match self.signature_bytes(id) {
            Ok(bytes) => Ok(bytes.filter(|bytes| signer_of(id, bytes).is_some())),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The snapshots that have a signature, if they are there.
    pub(crate) fn signed(&self) -> Result<Vec<SnapshotId>, StoreError> {
        Ok(self.backend().list(SIGNATURES)?.iter().filter_map(|object| object.name.parse().ok()).collect())
    }
}

pub(crate) fn signer_of(id: &SnapshotId, object: &[u8]) -> Option<PublicKey> {
    let stored: Stored = serde_json::from_slice(object).ok()?;
    let key = PublicKey(stored.key.try_into().ok()?);
    (stored.format == FORMAT && key.has_signed(id, &stored.signature)).then_some(key)
}

pub(crate) fn signature_key(id: &SnapshotId) -> String {
    format!("{SIGNATURES}/{id}")
}

/// What is signed. The words keep a signature from meaning anything elsewhere.
fn message(id: &SnapshotId) -> Vec<u8> {
    format!("diorama snapshot {id}\n").into_bytes()
}

fn read(path: &Path) -> Result<String, KeyFileError> {
    use std::io::Read;
    let failed = |source| KeyFileError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

fn pem(label: &str, der: &[u8]) -> String {
    // Ed25519 keys fit on one line.
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

/// What is in the blocks of this label; `None` where it is nothing that can be decoded.
fn pem_blocks<'a>(text: &'a str, label: &str) -> impl Iterator<Item = Option<Vec<u8>>> + 'a {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    text.split(begin.as_str()).skip(1).map(str::to_owned).collect::<Vec<_>>().into_iter().map(move |rest| {
        let (inside, _) = rest.split_once(end.as_str())?;
        let digits: Zeroizing<String> = Zeroizing::new(inside.split_whitespace().collect());
        STANDARD.decode(digits.as_bytes()).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys of RFC 8410, section 10.
    const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\n\
        MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
    const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\n\
        MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";

    #[test]
    fn keys_are_in_the_formats_that_everybody_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, PRIVATE).unwrap();
        let public = PublicKey::parse_all(PUBLIC, &path).unwrap();
        assert_eq!(SigningKey::read(&path).unwrap().public(), public[0]);
        assert_eq!(public[0].to_pem(), PUBLIC);
        let (text, key) = SigningKey::generate();
        std::fs::write(&path, &*text).unwrap();
        assert_eq!(SigningKey::read(&path).unwrap().public(), key);
        let several = format!("# alice\n{PUBLIC}\nbob:\n{}", key.to_pem());
        assert_eq!(PublicKey::parse_all(&several, &path).unwrap(), [public[0], key]);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        for text in [
            "",
            "nothing",
            PRIVATE,
            &PUBLIC.replace("MCow", "MCox"),
            &PUBLIC.replace("END", "ENDE"),
            &format!("{PUBLIC}{}", PUBLIC.replace("ZuE=", "Zu")),
        ] {
            assert_ne!(text, PUBLIC);
            let refused = PublicKey::parse_all(text, &path);
            assert!(matches!(refused, Err(KeyFileError::Contents { .. })), "{text}: {refused:?}");
        }
        for text in ["", PUBLIC, &PRIVATE.replace("MC4C", "MC4D"), &PRIVATE.replace("BEGIN", "BEGUN")] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(SigningKey::read(&path), Err(KeyFileError::Contents { .. })), "{text}");
        }
        assert!(matches!(SigningKey::read(folder.path()), Err(KeyFileError::Read { .. })));
    }
}
