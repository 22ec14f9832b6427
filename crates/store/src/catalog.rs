//! Which snapshots there are, and which one a user means.
//!
//! `snapshots/<id>.json` is a snapshot; `names/<environment>/<name>` holds the id of the one that has this name there,
//! so that of several writers one gets a name. A snapshot that came from elsewhere may have another name here than its
//! manifest says: `aliases/<id>` holds it. What a list says of each snapshot is kept in memory and in
//! `cache/summaries`, since a manifest never changes: an entry is used as long as its manifest's length and time are
//! those that it was made of. Losing that file costs time and nothing else.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::address::Address;
use crate::backend::Object;
use crate::concurrent;
use crate::error::StoreError;
use crate::id::SnapshotId;
use crate::manifest::{Bytes, Manifest, Receipt, check_snapshot_name};
use crate::root::Store;

/// The fewest digits of an id that are taken for one.
const PREFIX_DIGITS_MIN: usize = 4;
const SNAPSHOTS: &str = "snapshots";
/// An id.
pub(crate) const NAME_BYTES_MAX: u64 = 64;
/// Where the names of snapshots are that are called otherwise here than in their manifests.
const ALIASES: &str = "aliases";
/// The longest name.
const ALIAS_BYTES_MAX: u64 = 128;
const SUMMARIES_KEY: &str = "cache/summaries";
/// 10,000 snapshots take about 4 MiB.
const SUMMARIES_BYTES_MAX: u64 = 256 << 20;
/// The cache is written again when a list had to read this many manifests, and a fiftieth of all.
const STALE_ENTRIES_MAX: usize = 32;
/// How many similar names an error offers.
const NEAR_MAX: usize = 5;

/// One snapshot in a list.
#[derive(Debug)]
pub enum Summary {
    /// Its manifest is whole. (Only [`Store::verify`] looks further.)
    Intact(Entry),
    /// Its manifest cannot be used. It can still be removed.
    Damaged {
        /// Its id, from its manifest's key.
        id: SnapshotId,
        /// Why.
        error: StoreError,
    },
}

/// What a list says of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// Its environment's name.
    pub environment: String,
    /// The snapshot before it, which may have been removed.
    pub parent: Option<SnapshotId>,
    /// When, as RFC 3339 in UTC.
    pub created: String,
    /// What the user had to say about it.
    pub message: String,
    /// What it takes.
    pub bytes: Bytes,
    /// How many machines it has.
    pub machines: usize,
}

/// A snapshot that has been opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Its id.
    pub id: SnapshotId,
    /// What it says of itself.
    pub manifest: Manifest,
    /// Its name here: that of the manifest, unless it came from elsewhere under another.
    pub name: String,
    /// What was written after it was durable; may be lost.
    pub receipt: Option<Receipt>,
}

/// Entries of snapshots seen before.
#[derive(Debug, Default)]
pub(crate) struct Summaries {
    loaded: bool,
    known: HashMap<SnapshotId, Summarised>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Summarised {
    /// The manifest that it was made of: its length, and when it was written, in nanoseconds after 1970.
    version: (u64, u64),
    entry: Entry,
}

impl Store {
    /// All snapshots, oldest first; damaged ones last. One that is removed meanwhile is left out.
    pub fn list(&self) -> Result<Vec<Summary>, StoreError> {
        let objects = self.backend().list(SNAPSHOTS)?;
        let mut aliases = self.aliases()?;
        let mut cache = self.summaries().lock().unwrap_or_else(PoisonError::into_inner);
        if !cache.loaded {
            cache.known = self.read_summaries();
            cache.loaded = true;
        }
        let mut present = HashMap::with_capacity(objects.len());
        let mut summaries = Vec::with_capacity(objects.len());
        let mut unknown = Vec::new();
        for object in &objects {
            // What is not called like a snapshot's manifest is none.
            let Some(id) = snapshot_of(&object.name) else { continue };
            let version = version(object);
            match cache.known.remove(&id) {
                Some(known) if known.version == version => {
                    summaries.push(Summary::Intact(renamed(known.entry.clone(), &mut aliases)));
                    present.insert(id, known);
                }
                _ => unknown.push((id, version)),
            }
        }
        let read = unknown.len();
        let entries = self.read_entries(&unknown)?;
        for ((id, version), entry) in unknown.into_iter().zip(entries) {
            match entry {
                Ok(entry) => {
                    present.insert(id, Summarised { version, entry: entry.clone() });
                    summaries.push(Summary::Intact(renamed(entry, &mut aliases)));
                }
                Err(StoreError::Missing { .. }) => {}
                Err(error) => summaries.push(Summary::Damaged { id, error }),
            }
        }
        cache.known = present;
        if read > STALE_ENTRIES_MAX + summaries.len() / 50 {
            self.write_summaries(&cache.known);
        }
        drop(cache);
        summaries.sort_by(|a, b| a.key().cmp(&b.key()));
        Ok(summaries)
    }

    /// Opens a snapshot. Its manifest is checked, its parts when they are read.
    pub fn load(&self, id: &SnapshotId) -> Result<Stored, StoreError> {
        let manifest = self.read_manifest(id)?;
        let name = self.alias(id)?.unwrap_or_else(|| manifest.name.clone());
        let stored = Stored { id: *id, manifest, name, receipt: self.read_receipt(id) };
        // Another process may have taken it.
        if !self.knows(&stored) {
            self.refresh()?;
        }
        Ok(stored)
    }

    /// Whether there is such a snapshot, damaged or not.
    pub fn exists(&self, id: &SnapshotId) -> Result<bool, StoreError> {
        Ok(self.backend().length(&manifest_key(id))?.is_some())
    }

    /// The snapshot that a user means by `environment/name`, a name, an id, or at least four digits of one.
    ///
    /// In this order: a full id; a name in the `environment` at hand; a name in any, if only one has it; the start
    /// of an id, if only one has it.
    pub fn resolve(&self, query: &str, environment: Option<&str>) -> Result<SnapshotId, StoreError> {
        if let Ok(id) = query.parse::<SnapshotId>()
            && self.exists(&id)?
        {
            return Ok(id);
        }
        let summaries = self.list()?;
        let entries: Vec<&Entry> = summaries.iter().filter_map(Summary::entry).collect();
        let named = |environment: Option<&str>, name: &str| -> Vec<&Entry> {
            let here = |e: &&&Entry| environment.is_none_or(|wanted| e.environment == wanted);
            let found = entries.iter().filter(here).filter(|e| e.name == name);
            found.copied().collect()
        };
        let mut candidates = match query.split_once('/') {
            Some((environment, name)) => named(Some(environment), name),
            None => named(environment, query),
        };
        if candidates.is_empty() && environment.is_some() && !query.contains('/') {
            candidates = named(None, query);
        }
        if !candidates.is_empty() {
            return only(query, candidates.iter().map(|e| (e.full_name(), e.id)));
        }
        if query.len() >= PREFIX_DIGITS_MIN && query.bytes().all(|b| b.is_ascii_hexdigit()) {
            let prefix = query.to_ascii_lowercase();
            let found: Vec<&Summary> =
                summaries.iter().filter(|s| s.id().to_string().starts_with(&prefix)).collect();
            if !found.is_empty() {
                let name = |s: &Summary| s.entry().map_or_else(String::new, Entry::full_name);
                return only(query, found.iter().map(|s| (name(s), s.id())));
            }
        }
        Err(StoreError::NotFound { query: query.to_owned(), near: near(query, &entries) })
    }

    /// Who has this name. Ask before the work of a snapshot; commit asks again.
    pub fn find_name(&self, environment: &str, name: &str) -> Result<Option<SnapshotId>, StoreError> {
        let holder = match self.backend().read(&name_key(environment, name), NAME_BYTES_MAX) {
            Ok(Some(holder)) => holder,
            Ok(None) => return Ok(None),
            // A damaged one leads nowhere.
            Err(error) if error.is_damage() => return Ok(None),
            Err(error) => return Err(error),
        };
        let id = std::str::from_utf8(&holder).ok().and_then(|text| text.parse::<SnapshotId>().ok());
        Ok(match id {
            Some(id) if self.exists(&id)? => Some(id),
            _ => None,
        })
    }

    /// What a snapshot is called here, where that is not what its manifest says.
    pub(crate) fn alias(&self, id: &SnapshotId) -> Result<Option<String>, StoreError> {
        let bytes = match self.backend().read(&alias_key(id), ALIAS_BYTES_MAX) {
            Ok(bytes) => bytes,
            // Then it goes by its own name.
            Err(error) if error.is_damage() => None,
            Err(error) => return Err(error),
        };
        let name = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
        Ok(name.filter(|name| check_snapshot_name(name).is_ok()))
    }

    /// All of them. There are few.
    fn aliases(&self) -> Result<HashMap<SnapshotId, String>, StoreError> {
        let mut aliases = HashMap::new();
        for object in self.backend().list(ALIASES)? {
            let Ok(id) = object.name.parse() else { continue };
            if let Some(name) = self.alias(&id)? {
                aliases.insert(id, name);
            }
        }
        Ok(aliases)
    }

    /// The ids of all manifests.
    pub(crate) fn ids(&self) -> Result<Vec<SnapshotId>, StoreError> {
        Ok(self.backend().list(SNAPSHOTS)?.iter().filter_map(|object| snapshot_of(&object.name)).collect())
    }

    fn knows(&self, stored: &Stored) -> bool {
        let index = self.index();
        let parts = stored.manifest.parts();
        parts.iter().all(|part| part.root.is_zero() || index.find(&part.root).is_some())
    }

    /// What lists say of these, or what is wrong with each.
    fn read_entries(
        &self,
        snapshots: &[(SnapshotId, (u64, u64))],
    ) -> Result<Vec<Result<Entry, StoreError>>, StoreError> {
        let at_once = self.backend().reading().at_once;
        concurrent::try_each(snapshots, at_once, |(id, _)| match self.read_manifest(id) {
            Ok(manifest) => Ok(Ok(Entry::new(*id, manifest))),
            // No snapshot is damaged because a server cannot be reached.
            Err(error @ StoreError::Remote { .. }) => Err(error),
            Err(error) => Ok(Err(error)),
        })
    }

    fn read_summaries(&self) -> HashMap<SnapshotId, Summarised> {
        let Ok(Some(bytes)) = self.backend().read(SUMMARIES_KEY, SUMMARIES_BYTES_MAX) else {
            return HashMap::new();
        };
        // The hash of all that follows stands before it: a damaged cache must not show other names.
        let Some((hash, rest)) = bytes.split_at_checked(65) else { return HashMap::new() };
        if hash != format!("{}\n", Address::of(rest)).as_bytes() {
            return HashMap::new();
        }
        let lines = rest.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        lines.map(|summarised: Summarised| (summarised.entry.id, summarised)).collect()
    }

    fn write_summaries(&self, known: &HashMap<SnapshotId, Summarised>) {
        let mut bytes = Vec::new();
        for summarised in known.values() {
            serde_json::to_writer(&mut bytes, summarised).expect("an entry is plain data");
            bytes.push(b'\n');
        }
        let mut file = format!("{}\n", Address::of(&bytes)).into_bytes();
        file.append(&mut bytes);
        if let Err(error) = self.backend().replace(SUMMARIES_KEY, &file) {
            tracing::debug!(%error, "the list of snapshots is not cached");
        }
    }
}

/// The key of a snapshot's manifest.
pub(crate) fn manifest_key(id: &SnapshotId) -> String {
    format!("{SNAPSHOTS}/{id}.json")
}

/// The key of what was written after it was durable.
pub(crate) fn receipt_key(id: &SnapshotId) -> String {
    format!("receipts/{id}.json")
}

/// The key of the object that says who has a name; both have been checked to be names.
pub(crate) fn name_key(environment: &str, name: &str) -> String {
    format!("names/{environment}/{name}")
}

/// The key of the object that says what a snapshot is called here.
pub(crate) fn alias_key(id: &SnapshotId) -> String {
    format!("{ALIASES}/{id}")
}

/// What a list says of a snapshot that may have another name here than its manifest says.
fn renamed(entry: Entry, aliases: &mut HashMap<SnapshotId, String>) -> Entry {
    let name = aliases.remove(&entry.id).unwrap_or(entry.name);
    Entry { name, ..entry }
}

fn snapshot_of(name: &str) -> Option<SnapshotId> {
    name.strip_suffix(".json")?.parse().ok()
}

fn version(object: &Object) -> (u64, u64) {
    let since = object.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (object.bytes, u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

impl Summary {
    /// The snapshot's id.
    pub fn id(&self) -> SnapshotId {
        match self {
            Self::Intact(entry) => entry.id,
            Self::Damaged { id, .. } => *id,
        }
    }

    /// What is known of it, unless it is damaged.
    pub fn entry(&self) -> Option<&Entry> {
        match self {
            Self::Intact(entry) => Some(entry),
            Self::Damaged { .. } => None,
        }
    }

    fn key(&self) -> (bool, &str, SnapshotId) {
        match self {
            Self::Intact(entry) => (false, &entry.created, entry.id),
            Self::Damaged { id, .. } => (true, "", *id),
        }
    }
}

impl Entry {
    fn new(id: SnapshotId, manifest: Manifest) -> Self {
        Self {
            id,
            name: manifest.name,
            environment: manifest.environment,
            parent: manifest.parent,
            created: manifest.created,
            message: manifest.message,
            bytes: manifest.bytes,
            machines: manifest.machines.len(),
        }
    }

    /// `environment/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.environment, self.name)
    }
}

/// The one, or an error that lists all.
fn only(query: &str, found: impl Iterator<Item = (String, SnapshotId)>) -> Result<SnapshotId, StoreError> {
    let matches: Vec<_> = found.collect();
    match matches[..] {
        [(_, id)] => Ok(id),
        _ => Err(StoreError::Ambiguous { query: query.to_owned(), matches }),
    }
}

/// Names that a typing error away is `query`, or that contain it; nearest first.
fn near(query: &str, entries: &[&Entry]) -> Vec<String> {
    // A query can be anything, and the distance takes time quadratic in its length.
    let query: String = query.chars().take(200).collect();
    let limit = query.chars().count().div_ceil(3).max(1);
    let mut near: Vec<(usize, String)> = entries
        .iter()
        .filter_map(|entry| {
            let full = entry.full_name();
            let name = if query.contains('/') { &full } else { &entry.name };
            let distance = strsim::osa_distance(&query, name);
            let contains = !query.is_empty() && name.contains(&query);
            (distance <= limit || contains).then_some((distance, full))
        })
        .collect();
    near.sort();
    near.truncate(NEAR_MAX);
    near.into_iter().map(|(_, name)| name).collect()
}
