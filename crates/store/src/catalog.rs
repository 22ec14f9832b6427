//! Which snapshots there are, and which one a user means.

use std::path::PathBuf;

use crate::error::StoreError;
use crate::files;
use crate::id::SnapshotId;
use crate::manifest::{Bytes, Manifest, Receipt};
use crate::read::{read_manifest, read_receipt};
use crate::root::Store;

/// The fewest digits of an id that are taken for one.
const PREFIX_DIGITS_MIN: usize = 4;
/// How many similar names an error offers.
const NEAR_MAX: usize = 5;

/// One snapshot in a list.
#[derive(Debug)]
pub enum Summary {
    /// Its manifest is whole. (Only [`Store::verify`] looks further.)
    Intact(Entry),
    /// Its manifest cannot be used. It can still be removed.
    Damaged {
        /// Its id, from its folder's name.
        id: SnapshotId,
        /// Why.
        error: StoreError,
    },
}

/// What a list says of a snapshot.
#[derive(Debug, Clone, PartialEq)]
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
    /// What was written after it was durable; may be lost.
    pub receipt: Option<Receipt>,
    /// Where it is.
    pub folder: PathBuf,
}

impl Store {
    /// All snapshots, oldest first; damaged ones last. One that is removed meanwhile is left out.
    pub fn list(&self) -> Result<Vec<Summary>, StoreError> {
        let mut summaries = Vec::new();
        for id in self.ids()? {
            match read_manifest(&self.folder(&id), &id) {
                Ok(manifest) => summaries.push(Summary::Intact(Entry::new(id, manifest))),
                Err(StoreError::Missing { .. }) => {}
                Err(_) if !self.folder(&id).exists() => {}
                Err(error) => summaries.push(Summary::Damaged { id, error }),
            }
        }
        summaries.sort_by(|a, b| a.key().cmp(&b.key()));
        Ok(summaries)
    }

    /// Opens a snapshot. Its manifest is checked, its other files when they are read.
    pub fn load(&self, id: &SnapshotId) -> Result<Stored, StoreError> {
        let folder = self.folder(id);
        Ok(Stored { id: *id, manifest: read_manifest(&folder, id)?, receipt: read_receipt(&folder), folder })
    }

    /// The snapshot that a user means by `environment/name`, a name, an id, or at least four digits of one.
    ///
    /// In this order: a full id; a name in the `environment` at hand; a name in any, if only one has it; the start
    /// of an id, if only one has it.
    pub fn resolve(&self, query: &str, environment: Option<&str>) -> Result<SnapshotId, StoreError> {
        if let Ok(id) = query.parse::<SnapshotId>()
            && self.folder(&id).is_dir()
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
        let has_it = |summary: &Summary| {
            summary.entry().is_some_and(|entry| entry.environment == environment && entry.name == name)
        };
        Ok(self.list()?.iter().find(|s| has_it(s)).map(Summary::id))
    }

    /// The ids of all folders. What is not called like an id is not a snapshot's.
    pub(crate) fn ids(&self) -> Result<Vec<SnapshotId>, StoreError> {
        Ok(files::list(&self.snapshots())?
            .iter()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect())
    }
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
