//! Blobs: files that many snapshots share by content.
//!
//! `<root>/blobs/<blake3>` is only an index. Each snapshot has a link of its own in its folder, so the number of
//! links says whether a blob is in use: with one, only the index has it. Where the file system has no hard links,
//! every snapshot has a copy and the index stays empty.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use blake3::Hash;

use crate::error::StoreError;
use crate::files::{self, is_unlinkable};
use crate::root::Store;
use crate::write::hash_file;

/// Gives the blob with this hash, if the store has it undamaged, the name `destination`.
pub(crate) fn take(store: &Store, hash: &Hash, destination: &Path) -> Result<bool, StoreError> {
    let indexed = store.blobs().join(hash.to_hex().as_str());
    match fs::hard_link(&indexed, destination) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound || is_unlinkable(&error) => {
            return Ok(false);
        }
        Err(error) => return Err(StoreError::io("link", destination, error)),
    }
    let sound = match files::open_stored_of_any_length(destination) {
        Ok(file) => hash_file(store, &file, destination)? == *hash,
        Err(StoreError::Corrupt { .. }) => false,
        Err(error) => return Err(error),
    };
    if !sound {
        fs::remove_file(destination).map_err(|e| StoreError::io("remove", destination, e))?;
    }
    Ok(sound)
}

/// Puts a durable blob into the index, in place of what may be there.
pub(crate) fn offer(store: &Store, hash: &Hash, blob: &Path) -> Result<(), StoreError> {
    let indexed = store.blobs().join(hash.to_hex().as_str());
    // A folder of its own gives the link a name that nobody else uses; recovery removes it if this is interrupted.
    let aside = store.new_incoming()?;
    let linked =
        fs::hard_link(blob, aside.join("blob")).and_then(|()| fs::rename(aside.join("blob"), &indexed));
    let offered = match linked {
        Ok(()) => Ok(()),
        // Then this blob is not shared; nothing else is lost.
        Err(error) if is_unlinkable(&error) => Ok(()),
        // Somebody recovered the store just now and took the folder away; the same holds.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreError::io("link", &indexed, error)),
    };
    files::remove_tree(&aside)?;
    offered
}
