//! Removing a snapshot: its manifest goes, and with it the snapshot. What it alone needed is given back by
//! [`Store::collect`].

use crate::catalog::{alias_key, manifest_key, name_key, receipt_key};
use crate::error::StoreError;
use crate::id::SnapshotId;
use crate::root::Store;
use crate::signature::signature_key;

impl Store {
    /// Removes a snapshot, damaged or not. Its children stay; their parent is then a snapshot that is not there.
    ///
    /// An error after the manifest went leaves it gone all the same; its name then leads nowhere, and can be taken.
    pub fn remove(&self, id: &SnapshotId) -> Result<(), StoreError> {
        // Of a damaged one nobody knows the name.
        let manifest = self.read_manifest(id).ok();
        let alias = self.alias(id)?;
        if !self.backend().remove(&manifest_key(id), None)? {
            return Err(StoreError::Missing { id: *id });
        }
        if let Some(manifest) = manifest {
            let name = alias.as_ref().unwrap_or(&manifest.name);
            let key = name_key(&manifest.environment, name);
            self.backend().remove(&key, Some(id.to_string().as_bytes()))?;
        }
        if alias.is_some() {
            self.backend().remove(&alias_key(id), None)?;
        }
        self.backend().remove(&signature_key(id), None)?;
        self.backend().remove(&receipt_key(id), None)?;
        Ok(())
    }
}
