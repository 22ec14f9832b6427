//! Where each chunk is: the packs' tables, and a hash table over them.
//!
//! A chunk has a number of its own: its pack's first number and its place in the pack. The hash table holds these
//! numbers alone and looks addresses up in the packs' tables, so that a chunk takes 34 bytes of table and 5 to 11 of
//! hash table.
//!
//! Invariants:
//! * Numbers are given once: those of a pack that went are not given again while the store is open.
//! * Of a chunk that several packs hold, the hash table names one that is not doomed, if there is one.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use hashbrown::HashTable;

use crate::address::Address;
use crate::error::StoreError;
use crate::pack::{PackId, PackKind, Table};

/// A chunk's number.
pub(crate) type ChunkNumber = u32;

/// A pack that the index knows.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) id: PackId,
    pub(crate) table: Table,
    /// The number of its first chunk.
    pub(crate) first: ChunkNumber,
}

#[derive(Debug)]
struct Slot {
    first: ChunkNumber,
    /// `None` once the pack is gone.
    pack: Option<Arc<Pack>>,
    doomed: bool,
}

#[derive(Debug)]
pub(crate) struct Index {
    /// By first number.
    slots: Vec<Slot>,
    by_id: HashMap<PackId, usize>,
    numbers: HashTable<ChunkNumber>,
    next: ChunkNumber,
    /// So that a guest cannot choose pages that all fall into one place.
    seed: u64,
}

/// A chunk's place.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) pack: Arc<Pack>,
    /// Its number in the pack.
    pub(crate) chunk: usize,
    pub(crate) group: usize,
}

impl Index {
    pub(crate) fn new(seed: u64) -> Self {
        Self { slots: Vec::new(), by_id: HashMap::new(), numbers: HashTable::new(), next: 0, seed: seed | 1 }
    }

    /// Takes in a pack; one that it has already is left as it is.
    pub(crate) fn add(&mut self, id: PackId, table: Table, doomed: bool) -> Result<(), StoreError> {
        if self.by_id.contains_key(&id) {
            return Ok(());
        }
        let count = u32::try_from(table.len()).unwrap_or(u32::MAX);
        let Some(next) = self.next.checked_add(count) else {
            return Err(StoreError::TooLarge {
                what: "number of chunks",
                bytes: u64::from(self.next) + u64::from(count),
                limit_bytes: u32::MAX.into(),
            });
        };
        let first = self.next;
        self.next = next;
        let slot = self.slots.len();
        self.by_id.insert(id, slot);
        self.slots.push(Slot { first, pack: Some(Arc::new(Pack { id, table, first })), doomed });
        self.enter(slot);
        Ok(())
    }

    /// Brings it in line with what is there: packs not in `present` are gone, those in `doomed` are doomed.
    pub(crate) fn settle(&mut self, present: &BTreeSet<PackId>, doomed: &BTreeSet<PackId>) {
        let mut changed = false;
        for slot in &mut self.slots {
            let Some(id) = slot.pack.as_ref().map(|pack| pack.id) else { continue };
            if !present.contains(&id) {
                slot.pack = None;
                self.by_id.remove(&id);
                changed = true;
            } else if slot.doomed != doomed.contains(&id) {
                slot.doomed = !slot.doomed;
                changed = true;
            }
        }
        if changed {
            self.numbers.clear();
            for slot in 0..self.slots.len() {
                self.enter(slot);
            }
        }
    }

    pub(crate) fn contains_pack(&self, id: &PackId) -> bool {
        self.by_id.contains_key(id)
    }

    pub(crate) fn find(&self, address: &Address) -> Option<ChunkNumber> {
        self.numbers.find(self.hash(address), |number| self.address(*number) == Some(address)).copied()
    }

    /// Whether a new snapshot may rely on this chunk: it is in a pack that is not about to go.
    pub(crate) fn is_usable(&self, address: &Address) -> bool {
        self.find(address).is_some_and(|number| !self.slots[self.slot_of(number)].doomed)
    }

    /// Where a chunk is; `None` if its pack is gone.
    pub(crate) fn locate(&self, number: ChunkNumber) -> Option<Found> {
        let slot = &self.slots[self.slot_of(number)];
        let pack = Arc::clone(slot.pack.as_ref()?);
        let chunk = (number - slot.first) as usize;
        let group = pack.table.group_of(chunk);
        Some(Found { pack, chunk, group })
    }

    /// Every other place of a chunk. It looks through everything: for when the first is damaged.
    pub(crate) fn others(&self, address: &Address, not: &PackId) -> Vec<Found> {
        self.packs()
            .filter(|(pack, _)| pack.id != *not)
            .filter_map(|(pack, _)| {
                let chunk = pack.table.addresses.iter().position(|other| other == address)?;
                Some(Found { group: pack.table.group_of(chunk), pack: Arc::clone(pack), chunk })
            })
            .collect()
    }

    /// Every pack, and whether it is doomed.
    pub(crate) fn packs(&self) -> impl Iterator<Item = (&Arc<Pack>, bool)> {
        self.slots.iter().filter_map(|slot| Some((slot.pack.as_ref()?, slot.doomed)))
    }

    /// How many chunks there are, each counted once.
    pub(crate) fn chunks(&self) -> usize {
        self.numbers.len()
    }

    /// How much memory it takes, about.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let tables: usize = self
            .packs()
            .map(|(pack, _)| {
                size_of::<Pack>()
                    + pack.table.len() * crate::pack::TABLE_CHUNK_BYTES
                    + pack.table.groups.len() * size_of::<crate::pack::Group>()
            })
            .sum();
        (tables + self.numbers.allocation_size() + self.slots.len() * (size_of::<Slot>() + 48)) as u64
    }

    /// How many bytes packs of this kind have.
    pub(crate) fn stored_bytes(&self, kind: PackKind) -> u64 {
        self.packs()
            .filter(|(pack, _)| pack.table.kind == kind)
            .map(|(pack, _)| pack.table.pack_bytes())
            .sum()
    }

    fn enter(&mut self, slot: usize) {
        let Slot { first, pack: Some(pack), doomed } = &self.slots[slot] else { return };
        let (first, pack, doomed) = (*first, Arc::clone(pack), *doomed);
        for (number, address) in (first..).zip(&pack.table.addresses) {
            let hash = self.hash(address);
            let slots = &self.slots;
            let known = self.numbers.find_mut(hash, |known| address_in(slots, *known) == Some(address));
            match known {
                Some(known) => {
                    if !doomed && slots[slot_in(slots, *known)].doomed {
                        *known = number;
                    }
                }
                None => {
                    let seed = self.seed;
                    self.numbers.insert_unique(hash, number, |number| {
                        spread(seed, address_in(slots, *number).expect("every number stands for a chunk"))
                    });
                }
            }
        }
    }

    fn hash(&self, address: &Address) -> u64 {
        spread(self.seed, address)
    }

    fn address(&self, number: ChunkNumber) -> Option<&Address> {
        address_in(&self.slots, number)
    }

    fn slot_of(&self, number: ChunkNumber) -> usize {
        slot_in(&self.slots, number)
    }
}

fn slot_in(slots: &[Slot], number: ChunkNumber) -> usize {
    slots.partition_point(|slot| slot.first <= number) - 1
}

fn address_in(slots: &[Slot], number: ChunkNumber) -> Option<&Address> {
    let slot = &slots[slot_in(slots, number)];
    slot.pack.as_ref()?.table.addresses.get((number - slot.first) as usize)
}

fn spread(seed: u64, address: &Address) -> u64 {
    let mixed = (address.prefix() ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// A set of chunks by number.
#[derive(Debug, Default)]
pub(crate) struct ChunkSet {
    words: Vec<u64>,
}

impl ChunkSet {
    /// Whether it was not in there yet.
    pub(crate) fn insert(&mut self, number: ChunkNumber) -> bool {
        let word = number as usize / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let bit = 1_u64 << (number % 64);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn contains(&self, number: ChunkNumber) -> bool {
        self.words.get(number as usize / 64).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{GroupBuilder, PackBuilder};

    fn pack(nonce: u8, chunks: std::ops::Range<u32>) -> (PackId, Table) {
        let mut group = GroupBuilder::new(PackKind::Data);
        let mut pack = PackBuilder::new(PackKind::Data, [nonce; 16]);
        for chunk in chunks {
            let bytes = chunk.to_le_bytes().repeat(256);
            if !group.fits(bytes.len()) {
                pack.add(group.seal().unwrap());
            }
            group.push(Address::of(&bytes), &bytes);
        }
        pack.add(group.seal().unwrap());
        let (id, _, table) = pack.finish();
        (id, table)
    }

    fn address(chunk: u32) -> Address {
        Address::of(&chunk.to_le_bytes().repeat(256))
    }

    #[test]
    fn chunks_are_found_where_they_are_and_elsewhere_when_that_is_doomed() {
        let mut index = Index::new(42);
        let (a, table_a) = pack(1, 0..500);
        let (b, table_b) = pack(2, 400..900);
        index.add(a, table_a.clone(), false).unwrap();
        index.add(b, table_b, false).unwrap();
        index.add(a, table_a, true).unwrap();
        assert_eq!((index.chunks(), index.next), (900, 1000));
        let pack_of = |index: &Index, chunk| {
            index.find(&address(chunk)).and_then(|number| index.locate(number)).map(|found| {
                assert_eq!(found.pack.table.addresses[found.chunk], address(chunk));
                found.pack.id
            })
        };
        assert_eq!([0, 450, 899, 900].map(|chunk| pack_of(&index, chunk)), [Some(a), Some(a), Some(b), None]);
        let both = BTreeSet::from([a, b]);
        index.settle(&both, &BTreeSet::from([a]));
        assert_eq!([0, 450, 899].map(|chunk| pack_of(&index, chunk)), [Some(a), Some(b), Some(b)]);
        assert_eq!([0, 450].map(|chunk| index.is_usable(&address(chunk))), [false, true]);
        assert_eq!(index.others(&address(450), &b).len(), 1);
        index.settle(&BTreeSet::from([b]), &BTreeSet::new());
        assert_eq!([0, 450, 899].map(|chunk| pack_of(&index, chunk)), [None, Some(b), Some(b)]);
        assert_eq!(index.chunks(), 500);
    }

    #[test]
    fn a_chunk_takes_at_most_sixty_bytes() {
        let mut index = Index::new(7);
        for nonce in 0..40_u8 {
            let from = u32::from(nonce) * 8192;
            let (id, table) = pack(nonce, from..from + 8192);
            index.add(id, table, false).unwrap();
            let each = index.memory_bytes() / index.chunks() as u64;
            assert!(each <= 60, "{each} bytes for each of {}", index.chunks());
        }
    }

    #[test]
    fn sets() {
        let mut set = ChunkSet::default();
        assert!(set.insert(0) && set.insert(1000) && !set.insert(1000));
        assert!(set.contains(0) && set.contains(1000) && !set.contains(999) && !set.contains(5000));
        assert_eq!(set.len(), 2);
    }
}
