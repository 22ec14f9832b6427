//! A part of a snapshot read from anywhere in it, a little at a time, or as a whole and handed on as it comes.

use std::io;
use std::path::Path;

use crate::Progress;
use crate::address::Address;
use crate::error::StoreError;
use crate::fetch::{NodeCache, first_loss};
use crate::manifest::Part;
use crate::root::Store;
use crate::tree::{self, Shape};

/// Takes runs of bytes, from several threads: where they are in the part, and they. What is zero may be left out.
pub type Sink<'a> = &'a (dyn Fn(u64, &[u8]) -> io::Result<()> + Sync);

/// Reads here and there in a part. Everything is checked before it is handed out.
#[derive(Debug)]
pub struct PartReader {
    store: Store,
    part: Part,
    nodes: NodeCache,
    leaves: NodeCache,
}

impl Store {
    /// A reader of a part.
    pub fn reader(&self, part: Part) -> PartReader {
        let store = self.clone();
        PartReader { store, part, nodes: NodeCache::default(), leaves: NodeCache::default() }
    }

    /// Hands a whole part on as it comes, in no order. `destination` is what errors of the sink are said to be about.
    ///
    /// # Errors
    /// When the part is damaged, or the sink fails.
    pub fn pour(
        &self,
        part: &Part,
        destination: &Path,
        sink: Sink<'_>,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let total = part.shape.bytes;
        let mut done = 0;
        let losses = self.fetch(
            part,
            &|offset, bytes| sink(offset, bytes).map_err(|e| StoreError::io("write", destination, e)),
            &mut |bytes| {
                done += bytes;
                progress(done, total);
            },
        )?;
        first_loss(part, losses)?;
        progress(total, total);
        Ok(())
    }
}

impl PartReader {
    /// How long the part is.
    pub fn bytes(&self) -> u64 {
        self.part.shape.bytes
    }

    /// The address of the leaf that holds this byte: two with the same one have the same contents.
    ///
    /// # Errors
    /// When a node on the way is damaged.
    pub fn address_at(&mut self, offset: u64) -> Result<Address, StoreError> {
        assert!(offset < self.bytes(), "{offset} of {}", self.bytes());
        let Self { store, part, nodes, .. } = self;
        let leaf = offset / part.shape.leaf_bytes;
        let mut address = part.root;
        let mut first_leaf = 0;
        for level in (1..=part.shape.depth()).rev() {
            if address.is_zero() {
                break;
            }
            let expected = part.shape.children(level, first_leaf);
            let node = store
                .node(&address, expected, nodes)
                .map_err(|error| error.within(&part.name, Some(part.shape.offset(first_leaf))))?;
            let span = Shape::span(level);
            let child = (leaf - first_leaf) / span;
            first_leaf += child * span;
            // `node` has looked at the number of children.
            address = tree::children(&node, expected)
                .and_then(|mut children| children.nth(child as usize))
                .unwrap_or_default();
        }
        Ok(address)
    }

    /// Fills a buffer from `offset` on.
    ///
    /// # Errors
    /// When something there is damaged, or the part is not so long.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let bytes = self.bytes();
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > bytes) {
            let what = "a read past the end of a part";
            return Err(StoreError::TooLarge { what, bytes: buffer.len() as u64, limit_bytes: bytes });
        }
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let address = self.address_at(at)?;
            let shape = &self.part.shape;
            let leaf = at / shape.leaf_bytes;
            let within = (at - shape.offset(leaf)) as usize;
            let length = (shape.leaf_length(leaf) as usize - within).min(buffer.len() - done);
            let into = &mut buffer[done..done + length];
            if address.is_zero() {
                into.fill(0);
            } else {
                let whole = self
                    .store
                    .chunk(&address, &mut self.leaves)
                    .map_err(|error| error.within(&self.part.name, Some(at)))?;
                if whole.len() as u64 != shape.leaf_length(leaf) {
                    let found = self.store.find(&address)?;
                    return Err(self.store.misfit(&found.pack, &address).within(&self.part.name, Some(at)));
                }
                into.copy_from_slice(&whole[within..within + length]);
            }
            done += length;
        }
        Ok(())
    }
}
