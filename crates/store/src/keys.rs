//! Who can open an encrypted store: its key slots.
//!
//! A store is encrypted from the moment it is made, or never. Everything in it is sealed under one random *master key*
//! (see [`crate::seal`]), which is stored only wrapped: once in each *slot*, an object `keys/<id>`, under a key that
//! comes of a passphrase (Argon2id) or of a file of random bytes. Slots are added and removed without touching anything
//! else; whoever has opened one once may have kept the master key, and can read what was and will be written.
//!
//! Invariants:
//! * A store has at least one slot, as far as removing goes.
//! * A slot says what it costs to try, within bounds: a hostile one takes neither all memory nor all time.
//! * A slot's proof is made with the master key: whoever has that finds every changed slot.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::address::Address;
use crate::backend::Backend;
use crate::error::{Damage, StoreError};
use crate::seal::{Key, MasterKey, ObjectKey, TAG_BYTES, random_bytes};

pub(crate) const KEYS: &str = "keys";
const FORMAT: &str = "diorama-key/1";
const SLOT_BYTES_MAX: u64 = 4 << 10;
/// Enough for everybody; a hostile store must not keep us trying.
const SLOTS_MAX: usize = 32;
const LABEL_BYTES_MAX: usize = 128;
const PASSPHRASE_BYTES_MIN: usize = 8;
const PASSPHRASE_BYTES_MAX: usize = 4096;
const KEY_FILE_BYTES_MIN: usize = 32;
const KEY_FILE_BYTES_MAX: usize = 64 << 10;

/// What opens an encrypted store. Overwritten when it is dropped, and shown by nothing.
#[derive(Clone)]
pub struct Secret(Kind);

#[derive(Clone)]
enum Kind {
    Passphrase(Zeroizing<Vec<u8>>),
    KeyFile(Zeroizing<Vec<u8>>),
}

/// Why something cannot be a [`Secret`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Too short to keep anything secret, or too long to be meant.
    #[error("a {what} has {min_bytes} to {max_bytes} bytes; this one has {actual_bytes}{}", over(*actual_bytes, *max_bytes))]
    Length {
        /// A passphrase or a key file.
        what: &'static str,
        /// The fewest.
        min_bytes: usize,
        /// The most.
        max_bytes: usize,
        /// How many there are.
        actual_bytes: usize,
    },
}

fn over(actual: usize, max: usize) -> &'static str {
    if actual > max { " or more" } else { "" }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.what())
    }
}

impl Secret {
    /// A passphrase: 8 bytes or more.
    ///
    /// # Errors
    /// When it is too short or too long.
    pub fn passphrase(text: Zeroizing<Vec<u8>>) -> Result<Self, SecretError> {
        let limits = (PASSPHRASE_BYTES_MIN, PASSPHRASE_BYTES_MAX);
        check_length("passphrase", text.len(), limits)?;
        Ok(Self(Kind::Passphrase(text)))
    }

    /// The passphrase in a file: what is before the first line's end.
    ///
    /// # Errors
    /// When it cannot be read, or is no passphrase.
    pub fn passphrase_file(path: &Path) -> Result<Self, SecretError> {
        let mut text = read_secret(path, PASSPHRASE_BYTES_MAX + 2)?;
        if let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            text.truncate(end);
        }
        if text.last() == Some(&b'\r') {
            text.pop();
        }
        Self::passphrase(text)
    }

    /// A key file: all of its bytes, 32 or more, which are taken to be random.
    ///
    /// # Errors
    /// When it cannot be read, or is too short.
    pub fn key_file(path: &Path) -> Result<Self, SecretError> {
        Self::key(read_secret(path, KEY_FILE_BYTES_MAX)?)
    }

    /// What a key file holds.
    ///
    /// # Errors
    /// When it is too short or too long.
    pub fn key(bytes: Zeroizing<Vec<u8>>) -> Result<Self, SecretError> {
        check_length("key file", bytes.len(), (KEY_FILE_BYTES_MIN, KEY_FILE_BYTES_MAX))?;
        Ok(Self(Kind::KeyFile(bytes)))
    }

    fn what(&self) -> &'static str {
        match self.0 {
            Kind::Passphrase(_) => "passphrase",
            Kind::KeyFile(_) => "key file",
        }
    }
}

fn check_length(what: &'static str, actual_bytes: usize, limits: (usize, usize)) -> Result<(), SecretError> {
    let (min_bytes, max_bytes) = limits;
    if (min_bytes..=max_bytes).contains(&actual_bytes) {
        return Ok(());
    }
    Err(SecretError::Length { what, min_bytes, max_bytes, actual_bytes })
}

/// One byte beyond `max_bytes` at most.
fn read_secret(path: &Path, max_bytes: usize) -> Result<Zeroizing<Vec<u8>>, SecretError> {
    let failed = |source| SecretError::Read { path: path.to_owned(), source };
    // Of its final size from the start: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(max_bytes + 64));
    let file = File::open(path).map_err(failed)?;
    file.take(max_bytes as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// What it costs to try one passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassphraseCost {
    /// Memory, in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for PassphraseCost {
    /// The second of RFC 9106's two recommendations: the first takes 2 GiB of memory, which belongs to machines here.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, passes: 3, lanes: 4 }
    }
}

impl PassphraseCost {
    fn is_bounded(&self) -> bool {
        self.memory_kib <= 1 << 20 && self.passes <= 64 && self.lanes <= 64
    }
}

/// One way into a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// Its id: 16 hexadecimal digits.
    pub id: String,
    /// What whoever made it called it.
    pub label: String,
    /// When, as RFC 3339 in UTC.
    pub created: String,
    /// Whether it takes a passphrase; else a key file.
    pub passphrase: bool,
}

/// A slot as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Slot {
    format: String,
    id: String,
    label: String,
    created: String,
    /// `None`: a key file.
    passphrase: Option<PassphraseCost>,
    /// Makes the wrapping key this slot's alone.
    salt: Address,
    /// The master key, encrypted, and a tag. Its length is fixed, so that it opens under one key or so, and nobody can
    /// try many with one slot.
    #[serde(with = "hex")]
    wrapped: Vec<u8>,
    /// The hash of all the rest, under a key of the master's.
    proof: Address,
}

impl Slot {
    fn new(
        master: &MasterKey,
        secret: &Secret,
        cost: PassphraseCost,
        label: &str,
    ) -> Result<Self, StoreError> {
        let passphrase = matches!(secret.0, Kind::Passphrase(_)).then_some(cost);
        let mut slot = Self {
            format: FORMAT.to_owned(),
            id: hex::encode(&random_bytes::<8>()),
            label: label.to_owned(),
            created: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            passphrase,
            salt: Address::from_bytes(random_bytes()),
            wrapped: Vec::new(),
            proof: Address::ZERO,
        };
        let key = slot.wrapping_key(secret).ok_or(StoreError::BadKeyCost)?;
        let mut wrapped = master.0.to_vec();
        // The wrapping key is used for this one message: its salt is new.
        let tag = ObjectKey::new(&key).seal_with(0, &slot.about(), &mut wrapped);
        wrapped.extend_from_slice(tag.as_ref());
        slot.wrapped = wrapped;
        slot.proof = slot.proof_by(master);
        Ok(slot)
    }

    fn read(backend: &dyn Backend, name: &str) -> Result<Self, StoreError> {
        let key = format!("{KEYS}/{name}");
        let damaged = || StoreError::corrupt(&backend.locate(&key), Damage::KeySlot);
        let missing = || StoreError::corrupt(&backend.locate(&key), Damage::Missing);
        let bytes = backend.read(&key, SLOT_BYTES_MAX)?.ok_or_else(missing)?;
        let slot: Self = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
        // Exactly what is written: nothing unsaid stands beside it.
        let whole = slot.to_bytes() == bytes
            && slot.format == FORMAT
            && slot.id == name
            && slot.wrapped.len() == 32 + TAG_BYTES
            && check_label(&slot.label).is_ok()
            && slot.passphrase.is_none_or(|cost| cost.is_bounded());
        if whole { Ok(slot) } else { Err(damaged()) }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("a slot is plain data");
        bytes.push(b'\n');
        bytes
    }

    /// What wrapping binds the master key to.
    fn about(&self) -> Vec<u8> {
        Self { wrapped: Vec::new(), proof: Address::ZERO, ..self.clone() }.to_bytes()
    }

    fn proof_by(&self, master: &MasterKey) -> Address {
        let key = master.derive("diorama-store/1 key slots");
        let bytes = Self { proof: Address::ZERO, ..self.clone() }.to_bytes();
        Address::from_bytes(*blake3::keyed_hash(&key, &bytes).as_bytes())
    }

    /// `None`: the secret is of the other kind, or the cost is none that can be.
    fn wrapping_key(&self, secret: &Secret) -> Option<Key> {
        let mut key = Key::default();
        match (&secret.0, self.passphrase) {
            (Kind::Passphrase(passphrase), Some(cost)) => {
                let params = argon2::Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).ok()?;
                let hasher = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
                hasher.hash_password_into(passphrase, self.salt.as_bytes(), &mut *key).ok()?;
            }
            (Kind::KeyFile(bytes), None) => {
                let secret = Zeroizing::new(blake3::derive_key("diorama-store/1 key file", bytes));
                *key = *blake3::keyed_hash(&secret, self.salt.as_bytes()).as_bytes();
            }
            _ => return None,
        }
        Some(key)
    }

    fn open(&self, secret: &Secret) -> Option<MasterKey> {
        let key = self.wrapping_key(secret)?;
        let mut wrapped = Zeroizing::new(self.wrapped.clone());
        let length = ObjectKey::new(&key).open_with(0, &self.about(), &mut wrapped)?;
        let mut master = Key::default();
        master.copy_from_slice(wrapped.get(..length)?);
        Some(MasterKey(master))
    }

    fn shown(&self) -> KeySlot {
        KeySlot {
            id: self.id.clone(),
            label: self.label.clone(),
            created: self.created.clone(),
            passphrase: self.passphrase.is_some(),
        }
    }
}

/// The slots of a store that has been opened.
#[derive(Debug, Clone)]
pub struct Keyring {
    backend: Arc<dyn Backend>,
    master: MasterKey,
}

impl Keyring {
    /// Makes slot and master key for a store that is being made.
    pub(crate) fn make(
        backend: Arc<dyn Backend>,
        secret: &Secret,
        cost: PassphraseCost,
        label: &str,
    ) -> Result<Self, StoreError> {
        let keyring = Self { backend, master: MasterKey::random() };
        keyring.add(secret, cost, label)?;
        Ok(keyring)
    }

    /// Finds the slot that a secret opens.
    pub(crate) fn open(backend: Arc<dyn Backend>, secret: &Secret) -> Result<Self, StoreError> {
        let mut damaged = None;
        let mut tried = 0;
        for name in names(&*backend)? {
            let slot = match Slot::read(&*backend, &name) {
                Ok(slot) => slot,
                Err(error) if error.is_damage() => {
                    damaged.get_or_insert(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            tried += usize::from(matches!(secret.0, Kind::Passphrase(_)) == slot.passphrase.is_some());
            if let Some(master) = slot.open(secret) {
                return Ok(Self { backend, master });
            }
        }
        match damaged {
            // It may have been the one.
            Some(error) => Err(error),
            None => {
                Err(StoreError::WrongKey { path: backend.locate(""), secret: secret.what(), slots: tried })
            }
        }
    }

    pub(crate) fn master(&self) -> &MasterKey {
        &self.master
    }

    /// All slots, oldest first, and what is wrong with those that are damaged.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn slots(&self) -> Result<(Vec<KeySlot>, Vec<StoreError>), StoreError> {
        let (mut slots, mut damaged) = (Vec::new(), Vec::new());
        for name in names(&*self.backend)? {
            match Slot::read(&*self.backend, &name) {
                Ok(slot) if slot.proof_by(&self.master) == slot.proof => slots.push(slot.shown()),
                Ok(_) => {
                    let file = self.backend.locate(&format!("{KEYS}/{name}"));
                    damaged.push(StoreError::corrupt(&file, Damage::KeySlot));
                }
                Err(error) if error.is_damage() => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        slots.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        Ok((slots, damaged))
    }

    /// Makes a slot that this secret opens.
    ///
    /// # Errors
    /// When there are too many, the label is none, or it cannot be written.
    pub fn add(&self, secret: &Secret, cost: PassphraseCost, label: &str) -> Result<KeySlot, StoreError> {
        check_label(label)?;
        if names(&*self.backend)?.len() >= SLOTS_MAX {
            return Err(StoreError::TooManyKeys { most: SLOTS_MAX });
        }
        let slot = Slot::new(&self.master, secret, cost, label)?;
        // Tried before anybody relies on it.
        assert!(slot.open(secret).is_some_and(|master| *master.0 == *self.master.0), "a slot opens");
        let created = self.backend.create(&format!("{KEYS}/{}", slot.id), &slot.to_bytes())?;
        assert!(created, "64 random bits are not met twice");
        Ok(slot.shown())
    }

    /// Removes a slot, damaged or not, by its id or a unique beginning of it; never the last that is whole.
    ///
    /// # Errors
    /// When there is no such slot, or no other.
    pub fn remove(&self, id: &str) -> Result<String, StoreError> {
        let names = names(&*self.backend)?;
        let mut found = names.iter().filter(|name| !id.is_empty() && name.starts_with(id));
        let name = match (found.next(), found.next()) {
            (Some(name), None) => name,
            _ => return Err(StoreError::NoSuchKey { id: id.to_owned() }),
        };
        let (whole, _) = self.slots()?;
        if whole.iter().all(|slot| slot.id == *name) {
            return Err(StoreError::LastKey { id: name.clone() });
        }
        self.backend.remove(&format!("{KEYS}/{name}"), None)?;
        Ok(name.clone())
    }
}

/// The slots' names; whatever is not called like one is none.
fn names(backend: &dyn Backend) -> Result<Vec<String>, StoreError> {
    let is_id = |name: &str| name.len() == 16 && hex::decode(name).is_some();
    let mut names: Vec<String> = backend.list(KEYS)?.into_iter().map(|object| object.name).collect();
    names.retain(|name| is_id(name));
    names.sort();
    names.truncate(SLOTS_MAX);
    Ok(names)
}

/// Whether there is a slot, damaged or not.
pub(crate) fn exist(backend: &dyn Backend) -> Result<bool, StoreError> {
    Ok(!names(backend)?.is_empty())
}

fn check_label(label: &str) -> Result<(), StoreError> {
    if label.len() <= LABEL_BYTES_MAX && !label.chars().any(char::is_control) {
        return Ok(());
    }
    Err(StoreError::TooLarge {
        what: "label of a key",
        bytes: label.len() as u64,
        limit_bytes: LABEL_BYTES_MAX as u64,
    })
}

pub(crate) mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(crate) fn encode(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Lower-case digits alone.
    pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let pairs = text.as_bytes().chunks(2);
        pairs.map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
    }

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        decode(&text).ok_or_else(|| de::Error::custom("not hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::passphrase(Zeroizing::new(text.as_bytes().to_vec())).unwrap()
    }

    #[test]
    fn a_slot_opens_for_its_secret_alone() {
        let master = MasterKey::random();
        let cheap = PassphraseCost { memory_kib: 64, passes: 1, lanes: 1 };
        let slot = Slot::new(&master, &secret("right and long"), cheap, "mine").unwrap();
        assert_eq!(*slot.open(&secret("right and long")).unwrap().0, *master.0);
        assert!(slot.open(&secret("wrong and long")).is_none());
        let key = Secret::key(Zeroizing::new(b"right and long".repeat(3))).unwrap();
        assert!(slot.open(&key).is_none(), "a key file is no passphrase");
        let other = Slot { label: "yours".into(), ..slot.clone() };
        assert!(other.open(&secret("right and long")).is_none(), "what is not encrypted is bound to it");
        assert_eq!(slot.proof, slot.proof_by(&master));
        let slot = Slot::new(&master, &key, cheap, "").unwrap();
        assert_eq!(*slot.open(&key).unwrap().0, *master.0);
    }

    /// The answer to RFC 9106's question (section 5.3, without its secret and data) is that of the `argon2` program:
    /// echo -n password | argon2 somesalt -id -t 2 -k 65536 -p 1 -l 32
    #[test]
    fn argon2_is_argon2() {
        let params = argon2::Params::new(65_536, 2, 1, Some(32)).unwrap();
        let mut key = [0; 32];
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into(b"password", b"somesalt", &mut key)
            .unwrap();
        assert_eq!(hex::encode(&key), "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7");
    }

    #[test]
    fn secrets_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        for (text, expected) in [
            ("correct horse\n", Some("correct horse")),
            ("correct horse", Some("correct horse")),
            ("correct horse\r\nbattery\n", Some("correct horse")),
            ("short\n", None),
            ("", None),
        ] {
            std::fs::write(&path, text).unwrap();
            match (Secret::passphrase_file(&path), expected) {
                (Ok(Secret(Kind::Passphrase(found))), Some(expected)) => {
                    assert_eq!(*found, expected.as_bytes());
                }
                (Err(SecretError::Length { .. }), None) => {}
                (found, _) => panic!("{text:?}: {found:?}"),
            }
        }
        std::fs::write(&path, [1; 31]).unwrap();
        assert!(matches!(Secret::key_file(&path), Err(SecretError::Length { actual_bytes: 31, .. })));
        std::fs::write(&path, [1; 32]).unwrap();
        assert!(Secret::key_file(&path).is_ok());
        std::fs::write(&path, vec![1; KEY_FILE_BYTES_MAX + 100]).unwrap();
        assert!(matches!(Secret::key_file(&path), Err(SecretError::Length { .. })));
        assert!(matches!(Secret::key_file(folder.path()), Err(SecretError::Read { .. })));
    }

    #[test]
    fn hexadecimal() {
        assert_eq!(hex::decode(&hex::encode(&[0, 255, 16])), Some(vec![0, 255, 16]));
        for text in ["0", "0g", "AB", "0x"] {
            assert_eq!(hex::decode(text), None, "{text}");
        }
    }
}
