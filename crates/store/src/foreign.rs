//! Snapshots by several writers: hosts that share the store each put their own machines, and one of them commits.
//!
//! A host's writer publishes what it has put ([`Writer::publish`]) and stays open until the outcome is known, so that a
//! collection takes none of it. The committing writer adopts the others' machines ([`Writer::adopt`]), which looks for every
//! chunk of theirs.

use std::collections::btree_map::Entry;
use std::path::Path;

use crate::error::{Damage, StoreError};
use crate::manifest::{FRAMES_PART, MachineRecord};
use crate::root::Store;
use crate::write::Writer;
use crate::{FileRecord, SnapshotId, StoredFrame, Summary};

impl Writer {
    /// Makes durable what has been put, for another writer's snapshot. Nothing is put after this.
    ///
    /// # Errors
    /// When something could not be put, or the backend fails.
    pub fn publish(&self) -> Result<(), StoreError> {
        if let Some(part) = &self.ledger().failed {
            return Err(StoreError::WriterFailed { part: part.clone() });
        }
        self.target().publish()
    }

    /// Takes a machine into this snapshot that another writer has published.
    ///
    /// # Errors
    /// When something of it is not in the store.
    pub fn adopt(&self, machine: &MachineRecord) -> Result<(), StoreError> {
        for part in machine.parts() {
            if !self.target().has_tree(&part.shape, &part.root)? {
                return Err(StoreError::NotWritten { part: part.name });
            }
            let mut ledger = self.ledger();
            match ledger.parts.entry(part.name.clone()) {
                Entry::Vacant(vacant) => vacant.insert(Some((part.shape.bytes, part.root))),
                // Kernels and initrds are shared.
                Entry::Occupied(known) if *known.get() == Some((part.shape.bytes, part.root)) => continue,
                Entry::Occupied(_) => return Err(StoreError::WrittenTwice { part: part.name }),
            };
        }
        Ok(())
    }
}

impl Store {
    /// Takes in what other writers have published since.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn look_again(&self) -> Result<(), StoreError> {
        for bad in self.refresh()? {
            tracing::warn!(pack = %bad.id.short(), error = %bad.error, "a pack cannot be used");
        }
        Ok(())
    }

    /// Frames that a writer has published.
    ///
    /// # Errors
    /// When they are damaged or not there.
    pub fn frames_of(&self, record: &FileRecord) -> Result<Vec<StoredFrame>, StoreError> {
        let bytes = self.fetch_bytes(&record.part(FRAMES_PART.to_owned()))?;
        crate::frames::decode(&bytes).map_err(|error| {
            StoreError::corrupt(Path::new(FRAMES_PART), Damage::Frames(error)).within(FRAMES_PART, None)
        })
    }

    /// The snapshot that came of an attempt, if one did.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn find_attempt(&self, attempt: &str) -> Result<Option<SnapshotId>, StoreError> {
        let mut entries: Vec<(String, SnapshotId)> = self
            .list()?
            .iter()
            .filter_map(Summary::entry)
            .map(|entry| (entry.created.clone(), entry.id))
            .collect();
        // Most often it is the latest.
        entries.sort_by(|a, b| b.cmp(a));
        for (_, id) in entries {
            if self.load(&id).is_ok_and(|stored| stored.manifest.cut.attempt == attempt) {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }
}
