//! A store: its backend, its format, its index.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::backend::sealed::Sealed;
use crate::backend::{Backend, Recovered};
use crate::catalog::Summaries;
use crate::concurrent;
use crate::error::{Damage, StoreError};
use crate::index::Index;
use crate::keys::{self, KEYS, Keyring, PassphraseCost, Secret};
use crate::known::KnownRoots;
use crate::location::AsLocation;
use crate::pack::{self, FOOTER_BYTES, MAGIC, PACK_BYTES_MAX, PackError, PackId, Table};
use crate::signature::SigningKey;
use crate::write::Writer;

const FORMAT: &str = "diorama-store/1";
/// The same, with everything sealed.
const FORMAT_ENCRYPTED: &str = "diorama-store/1+encrypted";
pub(crate) const FORMAT_KEY: &str = "format";
/// The longest that it is read.
pub(crate) const FORMAT_BYTES_MAX: u64 = 256;
/// Everything that a store's folder may have in it.
const OURS: [&str; 13] = [
    "format",
    "lock",
    "incoming",
    "packs",
    "doomed",
    "snapshots",
    "names",
    "aliases",
    "receipts",
    "cache",
    "sessions",
    "signatures",
    KEYS,
];
/// A pack's end is read to have its table: most are shorter than this, and what is read in vain costs less than
/// another request.
const TAIL_BYTES: u64 = 448 << 10;
/// Where packs are.
pub(crate) const PACKS: &str = "packs";
/// Where there is an empty object for each pack that is about to go.
pub(crate) const DOOMED: &str = "doomed";

/// A store of snapshots. Cheap to clone; usable from several threads, and by several processes at once.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    backend: Arc<dyn Backend>,
    index: RwLock<Index>,
    known: KnownRoots,
    summaries: Mutex<Summaries>,
    /// Read while a part is fetched; written while packs are removed.
    fetching: RwLock<()>,
    /// Of an encrypted store.
    keyring: Option<Keyring>,
    /// The format has been found to be ours.
    checked: AtomicBool,
    signer: Option<SigningKey>,
}

/// How a store is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// What opens it: an encrypted store needs it, and no other is opened with it. Then, too, no store is made where
    /// there is none.
    pub secret: Option<Secret>,
    /// What signs the snapshots that are written.
    pub signer: Option<SigningKey>,
}

/// A pack that the index could not take in.
#[derive(Debug)]
pub(crate) struct BadPack {
    pub(crate) id: PackId,
    pub(crate) error: StoreError,
}

impl Store {
    /// Opens the store that is there, makes it where there is none, and removes what a crash has left.
    pub fn open(location: &(impl AsLocation + ?Sized)) -> Result<Self, StoreError> {
        Self::open_with(location, &OpenOptions::default())
    }

    /// The same, where it may be encrypted.
    pub fn open_with(
        location: &(impl AsLocation + ?Sized),
        options: &OpenOptions,
    ) -> Result<Self, StoreError> {
        Self::open_in(location.as_location().backend()?, options)
    }

    /// The same, also when the server does not let us just now: then everything fails until it does. With a secret it
    /// is needed at once, for the keys are there.
    pub fn open_later(
        location: &(impl AsLocation + ?Sized),
        options: &OpenOptions,
    ) -> Result<Self, StoreError> {
        let backend = location.as_location().backend()?;
        match Self::open_in(Arc::clone(&backend), options) {
            Err(error @ StoreError::Remote { .. }) if options.secret.is_none() => {
                tracing::warn!(%error, "the store cannot be used");
                Ok(Self::unopened(backend, None, options.signer.clone()))
            }
            opened => opened,
        }
    }

    /// The store that is in this backend, made where there is none.
    pub fn with_backend(backend: Arc<dyn Backend>) -> Result<Self, StoreError> {
        Self::open_in(backend, &OpenOptions::default())
    }

    /// The same, where it may be encrypted.
    pub fn open_in(backend: Arc<dyn Backend>, options: &OpenOptions) -> Result<Self, StoreError> {
        let keyring = settle_format(&backend, options)?;
        Self::with_keyring(backend, keyring, options.signer.clone())
    }

    /// Makes an encrypted store there, which this secret opens. There must be none.
    pub fn create_encrypted(
        location: &(impl AsLocation + ?Sized),
        secret: &Secret,
        cost: PassphraseCost,
        label: &str,
    ) -> Result<Self, StoreError> {
        Self::create_encrypted_in(location.as_location().backend()?, secret, cost, label)
    }

    /// The same in any backend.
    pub fn create_encrypted_in(
        backend: Arc<dyn Backend>,
        secret: &Secret,
        cost: PassphraseCost,
        label: &str,
    ) -> Result<Self, StoreError> {
        match find_format(&*backend)? {
            Found::Nothing => {}
            Found::Plain | Found::Encrypted => {
                return Err(StoreError::AlreadyAStore { path: backend.locate("") });
            }
        }
        // The slot first: from then on nobody takes it for a store without a key.
        let keyring = Keyring::make(Arc::clone(&backend), secret, cost, label)?;
        write_format(&*backend, FORMAT_ENCRYPTED)?;
        Self::with_keyring(backend, Some(keyring), None)
    }

    /// The store, once its format is known.
    fn with_keyring(
        backend: Arc<dyn Backend>,
        keyring: Option<Keyring>,
        signer: Option<SigningKey>,
    ) -> Result<Self, StoreError> {
        let store = Self::unopened(backend, keyring, signer);
        store.inner.checked.store(true, Ordering::Relaxed);
        for error in &store.recover()?.failed {
            tracing::warn!(%error, "cannot remove what a crash has left in the store");
        }
        store.look_again()?;
        Ok(store)
    }

    fn unopened(below: Arc<dyn Backend>, keyring: Option<Keyring>, signer: Option<SigningKey>) -> Self {
        let backend: Arc<dyn Backend> = match &keyring {
            Some(keyring) => Arc::new(Sealed::new(below, keyring.master())),
            None => below,
        };
        let seed = RandomState::new().hash_one(std::process::id());
        Self {
            inner: Arc::new(Inner {
                backend,
                index: RwLock::new(Index::new(seed)),
                known: KnownRoots::default(),
                summaries: Mutex::default(),
                fetching: RwLock::default(),
                keyring,
                checked: AtomicBool::new(false),
                signer,
            }),
        }
    }

    /// Removes what writers have left whose processes died. What they had published already is left to
    /// [`Store::collect`](crate::Store::collect).
    pub fn recover(&self) -> Result<Recovered, StoreError> {
        self.backend().recover()
    }

    /// Starts writing a snapshot.
    pub fn begin(&self) -> Result<Writer, StoreError> {
        self.check_format()?;
        // The session first: from here on nothing that the index holds can go.
        let session = self.backend().begin()?;
        self.refresh()?;
        Ok(Writer::new(self.clone(), session))
    }

    /// How much may still be written, in bytes; as much as one likes where that is not known.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.backend().free_bytes()?.unwrap_or(u64::MAX))
    }

    /// The keys of an encrypted store; `None` where it is not encrypted.
    pub fn keyring(&self) -> Option<&Keyring> {
        self.inner.keyring.as_ref()
    }

    /// What signs the snapshots that are written.
    pub fn signer(&self) -> Option<&SigningKey> {
        self.inner.signer.as_ref()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.inner.backend
    }

    pub(crate) fn known(&self) -> &KnownRoots {
        &self.inner.known
    }

    pub(crate) fn summaries(&self) -> &Mutex<Summaries> {
        &self.inner.summaries
    }

    /// While this is held, this process removes no packs.
    pub(crate) fn hold_packs(&self) -> RwLockReadGuard<'_, ()> {
        self.inner.fetching.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody in this process holds packs.
    pub(crate) fn release_packs(&self) -> RwLockWriteGuard<'_, ()> {
        self.inner.fetching.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        // Whoever panicked within a change has been logged; the index then lacks chunks, at worst.
        self.inner.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.inner.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the index in line with what is in the backend. Returns the packs that cannot be used.
    pub(crate) fn refresh(&self) -> Result<Vec<BadPack>, StoreError> {
        self.check_format()?;
        // Doomed ones first: a pack that is there and not doomed now was not doomed when it was listed.
        let doomed = self.doomed()?;
        let mut present = BTreeSet::new();
        let mut new = Vec::new();
        for object in self.backend().list(PACKS)? {
            // Whatever is not called like a pack is not one.
            let Ok(id) = object.name.parse::<PackId>() else { continue };
            if self.index().contains_pack(&id) {
                present.insert(id);
            } else {
                new.push((id, object.bytes));
            }
        }
        let mut bad = Vec::new();
        // Not all at once: their tables take memory twice until the index has them.
        let at_once = self.backend().reading().at_once;
        for some in new.chunks(at_once.max(16)) {
            let tables =
                concurrent::try_each(some, at_once, |(id, bytes)| match self.read_table(id, *bytes) {
                    Err(error) if !error.is_damage() => Err(error),
                    read => Ok(read),
                })?;
            for ((id, _), table) in some.iter().zip(tables) {
                match table {
                    Ok(table) => {
                        self.index_mut().add(*id, table, doomed.contains(id))?;
                        present.insert(*id);
                    }
                    // Somebody collected it just now.
                    Err(StoreError::Corrupt { damage: Damage::Missing, .. }) => {}
                    Err(error) => bad.push(BadPack { id: *id, error }),
                }
            }
        }
        self.index_mut().settle(&present, &doomed);
        Ok(bad)
    }

    pub(crate) fn doomed(&self) -> Result<BTreeSet<PackId>, StoreError> {
        let doomed = self.backend().list(DOOMED)?;
        Ok(doomed.iter().filter_map(|object| object.name.parse().ok()).collect())
    }

    /// A pack's table, from the pack alone.
    pub(crate) fn read_table(&self, id: &PackId, pack_bytes: u64) -> Result<Table, StoreError> {
        let key = pack_key(id);
        let corrupt = |problem| StoreError::corrupt(&self.backend().locate(&key), Damage::Pack(problem));
        let least = (MAGIC.len() + FOOTER_BYTES) as u64;
        if pack_bytes < least || pack_bytes > PACK_BYTES_MAX {
            return Err(corrupt(PackError::NotAPack));
        }
        let mut tail = vec![0; pack_bytes.min(TAIL_BYTES) as usize];
        let tail_at = pack_bytes - tail.len() as u64;
        self.backend().read_range(&key, tail_at, &mut tail)?;
        let mut magic = [0; MAGIC.len()];
        if tail_at == 0 {
            magic.copy_from_slice(&tail[..MAGIC.len()]);
        } else {
            self.backend().read_range(&key, 0, &mut magic)?;
        }
        if magic != *MAGIC {
            return Err(corrupt(PackError::NotAPack));
        }
        let mut footer = [0; FOOTER_BYTES];
        let footer_at = tail.len() - FOOTER_BYTES;
        footer.copy_from_slice(&tail[footer_at..]);
        // Bounded by the pack's length.
        let table_bytes = pack::table_bytes(&footer, pack_bytes).map_err(corrupt)?;
        if table_bytes <= footer_at as u64 {
            let table = &tail[footer_at - table_bytes as usize..footer_at];
            return Table::decode(id, table, pack_bytes).map_err(corrupt);
        }
        let mut table = vec![0; table_bytes as usize - footer_at];
        self.backend().read_range(&key, tail_at + footer_at as u64 - table_bytes, &mut table)?;
        table.extend_from_slice(&tail[..footer_at]);
        Table::decode(id, &table, pack_bytes).map_err(corrupt)
    }

    /// Looks once whether this is a store of our format; makes it one if there is nothing.
    fn check_format(&self) -> Result<(), StoreError> {
        if !self.inner.checked.load(Ordering::Relaxed) {
            settle_format(&self.inner.backend, &OpenOptions::default())?;
            self.inner.checked.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

pub(crate) fn pack_key(id: &PackId) -> String {
    format!("{PACKS}/{id}")
}

pub(crate) fn doomed_key(id: &PackId) -> String {
    format!("{DOOMED}/{id}")
}

/// What is where a store should be.
enum Found {
    /// Nothing, or what is left of making a store.
    Nothing,
    Plain,
    Encrypted,
}

/// Finds that there is a store that these options open, or makes one. Returns the keys of an encrypted one.
fn settle_format(backend: &Arc<dyn Backend>, options: &OpenOptions) -> Result<Option<Keyring>, StoreError> {
    Ok(match find_format(&**backend)? {
        Found::Plain if options.secret.is_some() => {
            return Err(StoreError::NotEncrypted { path: backend.locate("") });
        }
        Found::Nothing if options.secret.is_some() => {
            return Err(StoreError::NoStore { path: backend.locate("") });
        }
        Found::Plain => None,
        Found::Nothing => {
            write_format(&**backend, FORMAT)?;
            None
        }
        Found::Encrypted => {
            let missing = || StoreError::KeyMissing { path: backend.locate("") };
            let secret = options.secret.as_ref().ok_or_else(missing)?;
            let keyring = Keyring::open(Arc::clone(backend), secret)?;
            write_format(&**backend, FORMAT_ENCRYPTED)?;
            Some(keyring)
        }
    })
}

fn find_format(backend: &dyn Backend) -> Result<Found, StoreError> {
    let Some(found) = backend.read(FORMAT_KEY, FORMAT_BYTES_MAX)? else {
        // Making a store may have been interrupted at any step; anything else than its traces is not ours.
        let ours = |name: &str| OURS.contains(&name) || name.starts_with(".tmp");
        if backend.list("")?.iter().any(|object| !ours(&object.name)) {
            return Err(StoreError::NotAStore { path: backend.locate("") });
        }
        return Ok(if keys::exist(backend)? { Found::Encrypted } else { Found::Nothing });
    };
    let found = String::from_utf8_lossy(&found).trim_end().to_owned();
    match &*found {
        FORMAT => Ok(Found::Plain),
        FORMAT_ENCRYPTED => Ok(Found::Encrypted),
        _ => Err(StoreError::UnsupportedStore { path: backend.locate(""), found, expected: FORMAT }),
    }
}

/// Writes it, if nobody has.
fn write_format(backend: &dyn Backend, format: &str) -> Result<(), StoreError> {
    // Read first: mostly it is there, and creating costs more.
    if backend.read(FORMAT_KEY, FORMAT_BYTES_MAX)?.is_none() {
        backend.create(FORMAT_KEY, format!("{format}\n").as_bytes())?;
    }
    let found = backend.read(FORMAT_KEY, FORMAT_BYTES_MAX)?.unwrap_or_default();
    let found = String::from_utf8_lossy(&found).trim_end().to_owned();
    if found == format {
        return Ok(());
    }
    // Somebody else was faster, with another.
    Err(StoreError::AlreadyAStore { path: backend.locate("") })
}
