//! How objects of an encrypted store are sealed: AES-256-GCM under keys that each serve one object. Pure.
//!
//! ```text
//! master key ──┬── "names"    names' keys: what environments and snapshots are called
//!              ├── "proofs"   key slots: see `keys`
//!              ├── "whole" ── object's key, salt ──> one message under nonce 0
//!              └── "pack" ─── object's key ────────> segments of 16 KiB under nonces 0, 1, 2, …
//! ```
//!
//! Invariants:
//! * No nonce is used twice under one key with different contents. A *whole* object has 24 random bytes of its own, which
//!   its key is derived from: one message to a key. A *pack*'s key is derived from its name, which is the hash of
//!   its table, which holds the hash of each of its groups: one name, one content.
//! * An object opens under the name that it was sealed under, and under no other: its name is in its key, and a segment's
//!   place is in its nonce. That a pack ends where it ended is for its table to say.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// How many bytes of a pack are sealed together. The least that is read: small, since a group may be.
pub(crate) const SEGMENT_BYTES: u64 = 16 << 10;
/// What sealing adds to each message.
pub(crate) const TAG_BYTES: usize = 16;
const SEALED_SEGMENT_BYTES: u64 = SEGMENT_BYTES + TAG_BYTES as u64;
const SALT_BYTES: usize = 24;
/// What a whole object is longer by.
pub(crate) const WHOLE_OVERHEAD_BYTES: u64 = (SALT_BYTES + TAG_BYTES) as u64;

/// A secret of 32 bytes, overwritten when it is dropped.
pub(crate) type Key = Zeroizing<[u8; 32]>;

/// What the whole store is sealed under. Random, and stored only wrapped.
#[derive(Clone)]
pub(crate) struct MasterKey(pub(crate) Key);

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey")
    }
}

impl MasterKey {
    pub(crate) fn random() -> Self {
        Self(Zeroizing::new(random_bytes()))
    }

    /// A key for one purpose alone.
    pub(crate) fn derive(&self, purpose: &'static str) -> Key {
        Zeroizing::new(blake3::derive_key(purpose, &*self.0))
    }
}

/// Random bytes for a new key file.
pub fn random_key() -> Zeroizing<[u8; 32]> {
    Zeroizing::new(random_bytes())
}

/// Bytes from the system's random numbers.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system has random numbers");
    bytes
}

/// Seals and opens.
pub(crate) struct Sealer {
    whole: Key,
    pack: Key,
    names: Key,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    pub(crate) fn new(master: &MasterKey) -> Self {
        Self {
            whole: master.derive("diorama-store/1 whole objects"),
            pack: master.derive("diorama-store/1 packs"),
            names: master.derive("diorama-store/1 names"),
        }
    }

    /// A name that only who has the key can tell from another.
    pub(crate) fn hide(&self, name: &str) -> String {
        blake3::keyed_hash(&self.names, name.as_bytes()).to_hex()[..32].to_owned()
    }

    /// A whole object as it is stored.
    pub(crate) fn seal(&self, name: &str, plain: &[u8]) -> Vec<u8> {
        let salt: [u8; SALT_BYTES] = random_bytes();
        let mut sealed = Vec::with_capacity(plain.len() + WHOLE_OVERHEAD_BYTES as usize);
        sealed.extend_from_slice(&salt);
        sealed.extend_from_slice(plain);
        let tag = self.whole_key(name, &salt).seal(0, &mut sealed[SALT_BYTES..]);
        sealed.extend_from_slice(tag.as_ref());
        sealed
    }

    /// What a stored object holds; `None` if it is not the one that was sealed under this name.
    pub(crate) fn open(&self, name: &str, mut sealed: Vec<u8>) -> Option<Vec<u8>> {
        let (salt, rest) = sealed.split_at_mut_checked(SALT_BYTES)?;
        let plain_bytes = self.whole_key(name, salt).open(0, rest)?;
        sealed.drain(..SALT_BYTES);
        sealed.truncate(plain_bytes);
        Some(sealed)
    }

    /// A pack as it is stored.
    pub(crate) fn seal_pack(&self, name: &str, plain: &[u8]) -> Vec<u8> {
        let key = self.pack_key(name);
        let mut sealed = Vec::with_capacity(sealed_bytes(plain.len() as u64) as usize);
        for (index, segment) in (0..).zip(plain.chunks(SEGMENT_BYTES as usize)) {
            let start = sealed.len();
            sealed.extend_from_slice(segment);
            let tag = key.seal(index, &mut sealed[start..]);
            sealed.extend_from_slice(tag.as_ref());
        }
        sealed
    }

    /// Opens stored segments of a pack, from number `first` on, in place: returns where the first differs from what was
    /// sealed there, as an offset in the pack.
    pub(crate) fn open_segments(
        &self,
        name: &str,
        first: u64,
        sealed: &mut [u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), u64> {
        let key = self.pack_key(name);
        for (index, segment) in (first..).zip(sealed.chunks_mut(SEALED_SEGMENT_BYTES as usize)) {
            let plain_bytes = key.open(index, segment).ok_or(index * SEGMENT_BYTES)?;
            each(&segment[..plain_bytes]);
        }
        Ok(())
    }

    fn whole_key(&self, name: &str, salt: &[u8]) -> ObjectKey {
        // The salt's length is fixed, so that no two pairs give one input.
        let mut hasher = blake3::Hasher::new_keyed(&self.whole);
        hasher.update(salt).update(name.as_bytes());
        ObjectKey::new(&Zeroizing::new(*hasher.finalize().as_bytes()))
    }

    fn pack_key(&self, name: &str) -> ObjectKey {
        ObjectKey::new(&Zeroizing::new(*blake3::keyed_hash(&self.pack, name.as_bytes()).as_bytes()))
    }
}

/// The key of one object, or of one key slot.
pub(crate) struct ObjectKey(LessSafeKey);

impl ObjectKey {
    pub(crate) fn new(key: &Key) -> Self {
        Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &**key).expect("32 bytes are a key")))
    }

    /// Encrypts in place. Each index is used once.
    pub(crate) fn seal(&self, index: u64, bytes: &mut [u8]) -> Tag {
        self.seal_with(index, b"", bytes)
    }

    /// The same, bound to `about`, which is not encrypted.
    pub(crate) fn seal_with(&self, index: u64, about: &[u8], bytes: &mut [u8]) -> Tag {
        let sealed = self.0.seal_in_place_separate_tag(nonce(index), Aad::from(about), bytes);
        sealed.expect("far below what one key may seal")
    }

    /// Decrypts in place what ends with its tag; returns how many bytes there were.
    pub(crate) fn open(&self, index: u64, bytes: &mut [u8]) -> Option<usize> {
        self.open_with(index, b"", bytes)
    }

    pub(crate) fn open_with(&self, index: u64, about: &[u8], bytes: &mut [u8]) -> Option<usize> {
        self.0.open_in_place(nonce(index), Aad::from(about), bytes).ok().map(|plain| plain.len())
    }
}

fn nonce(index: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&index.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// How long a pack of this length is once it is sealed.
pub(crate) fn sealed_bytes(plain_bytes: u64) -> u64 {
    plain_bytes + plain_bytes.div_ceil(SEGMENT_BYTES) * TAG_BYTES as u64
}

/// How long a pack is whose sealed form has this length; `None`: no sealed pack has.
pub(crate) fn plain_bytes(sealed_bytes: u64) -> Option<u64> {
    let (whole, rest) = (sealed_bytes / SEALED_SEGMENT_BYTES, sealed_bytes % SEALED_SEGMENT_BYTES);
    let last = match rest {
        0 => 0,
        _ => rest.checked_sub(TAG_BYTES as u64).filter(|last| *last > 0)?,
    };
    Some(whole * SEGMENT_BYTES + last)
}

/// Which segments hold a range of a pack of this length: the first one's number, and where they are in the sealed form.
pub(crate) fn covering(offset: u64, length: u64, plain_bytes: u64) -> (u64, std::ops::Range<u64>) {
    let first = offset / SEGMENT_BYTES;
    let end = (offset + length).div_ceil(SEGMENT_BYTES) * SEALED_SEGMENT_BYTES;
    (first, first * SEALED_SEGMENT_BYTES..end.min(sealed_bytes(plain_bytes)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealer() -> Sealer {
        Sealer::new(&MasterKey(Zeroizing::new([7; 32])))
    }

    #[test]
    fn a_whole_object_opens_under_its_name_alone() {
        let sealer = sealer();
        let sealed = sealer.seal("names/a", b"contents");
        assert_eq!(sealed.len() as u64, 8 + WHOLE_OVERHEAD_BYTES);
        assert_eq!(sealer.open("names/a", sealed.clone()).as_deref(), Some(&b"contents"[..]));
        assert_eq!(sealer.open("names/b", sealed.clone()), None);
        let other = Sealer::new(&MasterKey(Zeroizing::new([8; 32])));
        assert_eq!(other.open("names/a", sealed.clone()), None);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(sealer.open("names/a", changed), None, "byte {at}");
            assert_eq!(sealer.open("names/a", sealed[..at].to_vec()), None, "cut at {at}");
        }
        // The same again is sealed differently.
        assert_ne!(sealer.seal("names/a", b"contents"), sealed);
    }

    #[test]
    fn lengths() {
        for plain in [0, 1, 16_383, 16_384, 16_385, 5 << 20] {
            assert_eq!(plain_bytes(sealed_bytes(plain)), Some(plain));
        }
        for sealed in [1, 16, 16_401, 16_416] {
            assert_eq!(plain_bytes(sealed), None, "{sealed}");
        }
    }

    proptest! {
        #[test]
        fn any_range_of_a_pack_can_be_read(length in 1_usize..60_000, a in 0.0..1.0, b in 0.0..1.0, flip: usize) {
            let sealer = sealer();
            let plain: Vec<u8> = (0..length).map(|at| (at * 7 / 3) as u8).collect();
            let mut sealed = sealer.seal_pack("packs/x", &plain);
            prop_assert_eq!(sealed.len() as u64, sealed_bytes(length as u64));
            let (a, b) = ((length as f64 * a) as usize, (length as f64 * b) as usize);
            let (from, to) = (a.min(b), a.max(b) + 1);
            let read = |name: &str, sealed: &[u8]| {
                let (first, range) = covering(from as u64, (to - from) as u64, length as u64);
                let mut part = sealed[range.start as usize..range.end as usize].to_vec();
                let mut out = Vec::new();
                sealer.open_segments(name, first, &mut part, |bytes| out.extend_from_slice(bytes))?;
                let skip = from - (first * SEGMENT_BYTES) as usize;
                Ok::<_, u64>(out[skip..skip + to - from].to_vec())
            };
            let whole = read("packs/x", &sealed);
            prop_assert_eq!(whole.as_deref(), Ok(&plain[from..to]));
            prop_assert!(read("packs/y", &sealed).is_err());
            // A changed byte is found by whoever reads its segment, and by nobody else.
            let flip = flip % sealed.len();
            sealed[flip] ^= 0x20;
            let (_, range) = covering(from as u64, (to - from) as u64, length as u64);
            prop_assert_eq!(read("packs/x", &sealed).is_err(), range.contains(&(flip as u64)));
        }
    }
}
