//! An encrypted store: another backend, with everything sealed that goes in.
//!
//! The store above sees plain objects under plain keys, and need not know. What is below:
//!
//! | key | as it is stored |
//! | --- | --- |
//! | `packs/<id>` | under the same key, sealed in segments, so that any range can be read |
//! | `names/<environment>/<name>` | `names/<hidden>/<hidden>`, sealed as a whole |
//! | everything else | under the same key, sealed as a whole |
//!
//! `format` and `keys/` are not read or written through this, nor what a bucket's backend keeps for itself: `sessions/` and
//! `cache/clock`.
//!
//! Invariant: what is handed out was sealed by somebody who has the store's key, under this very key.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Backend, Object, Reading, Recovered, Session};
use crate::error::{Damage, StoreError};
use crate::root::PACKS;
use crate::seal::{self, MasterKey, SEGMENT_BYTES, Sealer, WHOLE_OVERHEAD_BYTES};

/// The longest object that is sealed as a whole.
const WHOLE_BYTES_MAX: u64 = 256 << 20;

/// A backend whose objects are sealed.
#[derive(Debug)]
pub(crate) struct Sealed {
    inner: Arc<dyn Backend>,
    sealer: Arc<Sealer>,
    /// How long packs are: who reads a range need not ask again. A pack never changes, so that only damage makes this
    /// wrong.
    lengths: Mutex<HashMap<String, u64>>,
}

#[derive(Debug)]
struct SealedSession {
    inner: Box<dyn Session>,
    sealer: Arc<Sealer>,
}

impl Sealed {
    pub(crate) fn new(inner: Arc<dyn Backend>, master: &MasterKey) -> Self {
        Self { inner, sealer: Arc::new(Sealer::new(master)), lengths: Mutex::default() }
    }

    /// Where an object is below.
    fn key(&self, key: &str) -> String {
        match key.strip_prefix("names/").and_then(|rest| rest.split_once('/')) {
            // The second is hidden with the first: the same name is not the same elsewhere.
            Some((environment, _)) => {
                format!("names/{}/{}", self.sealer.hide(environment), self.sealer.hide(key))
            }
            None => key.to_owned(),
        }
    }

    fn broken(&self, key: &str, offset: Option<u64>) -> StoreError {
        StoreError::corrupt(&self.locate(key), Damage::Seal { offset })
    }

    fn lengths(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pack_bytes(&self, key: &str) -> Result<u64, StoreError> {
        if let Some(bytes) = self.lengths().get(key) {
            return Ok(*bytes);
        }
        match self.length(key)? {
            Some(bytes) => {
                self.lengths().insert(key.to_owned(), bytes);
                Ok(bytes)
            }
            None => Err(StoreError::corrupt(&self.locate(key), Damage::Missing)),
        }
    }
}

fn is_pack(key: &str) -> bool {
    key.strip_prefix(PACKS).is_some_and(|rest| rest.starts_with('/'))
}

impl Backend for Sealed {
    fn locate(&self, key: &str) -> PathBuf {
        self.inner.locate(&self.key(key))
    }

    fn read(&self, key: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let limit_bytes = limit_bytes.saturating_add(WHOLE_OVERHEAD_BYTES);
        let Some(sealed) = self.inner.read(&self.key(key), limit_bytes)? else { return Ok(None) };
        self.sealer.open(key, sealed).map(Some).ok_or_else(|| self.broken(key, None))
    }

    fn read_range(&self, key: &str, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let end = offset.saturating_add(buffer.len() as u64);
        if !is_pack(key) {
            let short = || StoreError::corrupt(&self.locate(key), Damage::Missing);
            let plain = self.read(key, WHOLE_BYTES_MAX)?.ok_or_else(short)?;
            let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
            let part = range.and_then(|(offset, end)| plain.get(offset..end));
            let actual_bytes = plain.len() as u64;
            let damage = Damage::Length { expected_bytes: end, actual_bytes };
            buffer.copy_from_slice(part.ok_or_else(|| StoreError::corrupt(&self.locate(key), damage))?);
            return Ok(());
        }
        let pack_bytes = self.pack_bytes(key)?;
        if end > pack_bytes {
            let damage = Damage::Length { expected_bytes: end, actual_bytes: pack_bytes };
            return Err(StoreError::corrupt(&self.locate(key), damage));
        }
        let (first, range) = seal::covering(offset, buffer.len() as u64, pack_bytes);
        let mut sealed = vec![0; (range.end - range.start) as usize];
        self.inner.read_range(key, range.start, &mut sealed)?;
        let mut skip = (offset - first * SEGMENT_BYTES) as usize;
        let mut rest = buffer;
        let opened = self.sealer.open_segments(key, first, &mut sealed, |plain| {
            let wanted = &plain[skip.min(plain.len())..];
            let length = wanted.len().min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(length);
            now.copy_from_slice(&wanted[..length]);
            (rest, skip) = (later, 0);
        });
        opened.map_err(|at| self.broken(key, Some(at)))
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError> {
        let mut objects = self.inner.list(folder)?;
        if folder == PACKS {
            let mut lengths = HashMap::with_capacity(objects.len());
            for object in &mut objects {
                // What no pack can have is left for its table to fail.
                object.bytes = seal::plain_bytes(object.bytes).unwrap_or(0);
                lengths.insert(format!("{PACKS}/{}", object.name), object.bytes);
            }
            *self.lengths() = lengths;
        } else {
            for object in &mut objects {
                object.bytes = object.bytes.saturating_sub(WHOLE_OVERHEAD_BYTES);
            }
        }
        Ok(objects)
    }

    fn length(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let sealed = self.inner.length(&self.key(key))?;
        Ok(sealed.map(|bytes| match is_pack(key) {
            true => seal::plain_bytes(bytes).unwrap_or(0),
            false => bytes.saturating_sub(WHOLE_OVERHEAD_BYTES),
        }))
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.inner.create(&self.key(key), &self.sealer.seal(key, bytes))
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.replace(&self.key(key), &self.sealer.seal(key, bytes))
    }

    fn remove(&self, key: &str, only: Option<&[u8]>) -> Result<bool, StoreError> {
        let below = self.key(key);
        let Some(only) = only else { return self.inner.remove(&below, None) };
        let limit_bytes = only.len() as u64 + WHOLE_OVERHEAD_BYTES;
        // One that cannot be read is not what it should be, and is kept.
        let Some(sealed) = self.inner.read(&below, limit_bytes).ok().flatten() else { return Ok(false) };
        if self.sealer.open(key, sealed.clone()).as_deref() != Some(only) {
            return Ok(false);
        }
        self.inner.remove(&below, Some(&sealed))
    }

    fn begin(&self) -> Result<Box<dyn Session>, StoreError> {
        Ok(Box::new(SealedSession { inner: self.inner.begin()?, sealer: Arc::clone(&self.sealer) }))
    }

    fn sessions(&self) -> Result<usize, StoreError> {
        self.inner.sessions()
    }

    fn recover(&self) -> Result<Recovered, StoreError> {
        self.inner.recover()
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.inner.free_bytes()
    }

    fn reading(&self) -> Reading {
        self.inner.reading()
    }
}

impl Session for SealedSession {
    fn stage(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        assert!(is_pack(key), "only packs are staged");
        self.inner.stage(key, &self.sealer.seal_pack(key, bytes))
    }

    fn publish(&self, keys: &[String]) -> Result<(), StoreError> {
        self.inner.publish(keys)
    }

    fn check(&self) -> Result<(), StoreError> {
        self.inner.check()
    }

    fn confirm(&self) -> Result<(), StoreError> {
        self.inner.confirm()
    }

    fn end(self: Box<Self>) -> Result<(), StoreError> {
        self.inner.end()
    }
}
