//! The memory of a snapshot's machines, read a group of pages at a time, in any order.
//!
//! [`LazyMemory::open`] traces the trees (the only thing that has to be waited for) and sorts what there is by where it is
//! stored. Pages that are the same, in one machine or in several, are read once. Every page is checked against its
//! address before it is handed out. What is lost for good is said of each page; other errors leave everything as it
//! was, and the same can be asked for again.
//!
//! While it lives, it counts as a writer: collectors anywhere leave packs alone that it may need, even when the snapshot
//! is removed meanwhile.

use std::ops::Range;
use std::sync::Arc;

use crate::address::Address;
use crate::catalog::Stored;
use crate::concurrent::try_each;
use crate::error::{Damage, StoreError};
use crate::fetch::NodeCache;
use crate::index::{ChunkNumber, Found, Pack};
use crate::manifest::Part;
use crate::pack::Opener;
use crate::root::{Store, pack_key};
use crate::tree::{self, PAGE_BYTES, Place, Visitor};
use crate::write::Writer;

/// How many machines are traced at once.
const TRACED_AT_ONCE: usize = 16;
/// What is not wanted is read as well when it is shorter than this and lies between what is, in bytes.
const GAP_BYTES: u32 = 16 << 10;
/// In the table of pages: the page is zero.
const ZERO: u32 = u32::MAX;

/// See the module.
#[derive(Debug)]
pub struct LazyMemory {
    store: Store,
    machines: Vec<Machine>,
    /// By where they are stored.
    wants: Vec<Want>,
    groups: Vec<Group>,
    /// Keeps collectors from what is still to be read.
    _writer: Writer,
}

#[derive(Debug)]
struct Machine {
    part: Part,
    /// For each page the group that has it, or [`ZERO`].
    group: Vec<u32>,
    /// How many pages are not zero.
    pages: u64,
}

/// A page of a machine, and the chunk that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Want {
    number: ChunkNumber,
    machine: u16,
    page: u32,
}

#[derive(Debug)]
struct Group {
    pack: Arc<Pack>,
    group: usize,
    wants: Range<usize>,
}

/// A page that cannot be had.
#[derive(Debug)]
pub struct LostPage {
    /// Which machine, by its place among those that were asked for.
    pub machine: usize,
    /// Which page.
    pub page: u64,
    /// Why.
    pub error: StoreError,
}

/// Takes pages: the machine by its place, the page's number, its bytes.
pub type PageSink<'a> = &'a mut dyn FnMut(usize, u64, &[u8; PAGE_BYTES as usize]);

impl LazyMemory {
    /// Finds out what there is of the named machines' memory.
    ///
    /// # Errors
    /// When a node is damaged or the store cannot be reached, or nothing can be written to it.
    pub fn open(store: &Store, stored: &Stored, machines: &[&str]) -> Result<Self, StoreError> {
        let writer = store.begin()?;
        let parts = machines
            .iter()
            .map(|name| Ok(stored.machine(name)?.ram.part(name)))
            .collect::<Result<Vec<Part>, StoreError>>()?;
        let traced = try_each(&parts, TRACED_AT_ONCE, |part| {
            let mut trace = Trace { store, part, nodes: NodeCache::default(), pages: Vec::new() };
            tree::walk(&part.shape, &part.root, &mut trace)?;
            Ok::<_, StoreError>(trace.pages)
        })?;
        let mut wants = Vec::with_capacity(traced.iter().map(Vec::len).sum());
        for (machine, pages) in traced.iter().enumerate() {
            let machine = machine as u16;
            wants.extend(pages.iter().map(|&(number, page)| Want { number, machine, page }));
        }
        wants.sort_unstable();
        let mut machines: Vec<Machine> = parts
            .into_iter()
            .zip(&traced)
            .map(|(part, pages)| Machine {
                group: vec![ZERO; part.shape.leaves() as usize],
                part,
                pages: pages.len() as u64,
            })
            .collect();
        let groups = grouped(store, &wants)?;
        for (number, group) in groups.iter().enumerate() {
            for want in &wants[group.wants.clone()] {
                machines[usize::from(want.machine)].group[want.page as usize] = number as u32;
            }
        }
        Ok(Self { store: store.clone(), machines, wants, groups, _writer: writer })
    }

    /// How many groups there are.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// How many pages a machine has that are not zero.
    pub fn pages(&self, machine: usize) -> u64 {
        self.machines[machine].pages
    }

    /// How many pages a machine has, zero or not.
    pub fn pages_of(&self, machine: usize) -> u64 {
        self.machines[machine].part.shape.leaves()
    }

    /// The group that has a page; `None` when the page is zero.
    pub fn group_of(&self, machine: usize, page: u64) -> Option<usize> {
        let group = self.machines[machine].group.get(usize::try_from(page).ok()?)?;
        (*group != ZERO).then_some(*group as usize)
    }

    /// Groups from `first` on that are worth reading in one request of at most `bytes`, or the first one alone.
    pub fn run(&self, first: usize, bytes: u32) -> Range<usize> {
        let at = |number: usize| {
            let group: &Group = &self.groups[number];
            (&group.pack, &group.pack.table.groups[group.group])
        };
        let (pack, begin) = at(first);
        let mut end = first + 1;
        while end < self.groups.len() {
            let ((next_pack, next), (_, last)) = (at(end), at(end - 1));
            if next_pack.id != pack.id
                || next.offset - last.end() > GAP_BYTES
                || next.end() - begin.offset > bytes
            {
                break;
            }
            end += 1;
        }
        first..end
    }

    /// Reads a run of groups and hands out all of their pages that anybody wants, but those that are lost.
    ///
    /// # Errors
    /// When the store cannot be read: then it may be tried again.
    pub fn read(&self, run: Range<usize>, sink: PageSink<'_>) -> Result<Vec<LostPage>, StoreError> {
        let groups = &self.groups[run];
        let (Some(first), Some(last)) = (groups.first(), groups.last()) else { return Ok(Vec::new()) };
        let pack = &first.pack;
        let start = pack.table.groups[first.group].offset;
        let mut stored = vec![0; (pack.table.groups[last.group].end() - start) as usize];
        let whole = match self.store.backend().read_range(&pack_key(&pack.id), start.into(), &mut stored) {
            Ok(()) => true,
            // Perhaps only some of it cannot be read: each group by itself.
            Err(error) if error.is_damage() => false,
            Err(error) => return Err(error),
        };
        let mut opener = Opener::new();
        let mut raw = Vec::new();
        let mut lost = Vec::new();
        for group in groups {
            let at = &pack.table.groups[group.group];
            let opened = if whole {
                let bytes = &stored[(at.offset - start) as usize..(at.end() - start) as usize];
                self.store.open_group(pack, group.group, bytes, &mut opener, &mut raw)
            } else {
                self.store.read_group(pack, group.group, &mut opener, &mut raw)
            };
            match opened {
                Ok(()) => self.hand_out(group, &raw, sink, &mut lost)?,
                Err(error) if error.is_damage() => {
                    self.store.refresh_if_gone(&error)?;
                    for want in &self.wants[group.wants.clone()] {
                        self.elsewhere(group, want, &error, sink, &mut lost);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(lost)
    }

    fn hand_out(
        &self,
        group: &Group,
        raw: &[u8],
        sink: PageSink<'_>,
        lost: &mut Vec<LostPage>,
    ) -> Result<(), StoreError> {
        let (pack, table) = (&group.pack, &group.pack.table);
        let mut checked: Option<(usize, &[u8; PAGE_BYTES as usize])> = None;
        for want in &self.wants[group.wants.clone()] {
            let chunk = (want.number - pack.first) as usize;
            if let Some((known, page)) = checked
                && known == chunk
            {
                sink(usize::from(want.machine), want.page.into(), page);
                continue;
            }
            let address = &table.addresses[chunk];
            let at = table.offset_in_group(group.group, chunk);
            let bytes = &raw[at..at + table.chunk_bytes(chunk)];
            let found = Found { pack: Arc::clone(pack), chunk, group: group.group };
            match self.store.check_chunk(&found, address, bytes) {
                Ok(()) => match bytes.try_into() {
                    Ok(page) => {
                        checked = Some((chunk, page));
                        sink(usize::from(want.machine), want.page.into(), page);
                    }
                    // Whole, and no page.
                    Err(_) => lost.push(self.lost(want, self.store.misfit(pack, address))),
                },
                Err(error) if error.is_damage() => self.elsewhere(group, want, &error, sink, lost),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A page whose chunk is damaged here: from another pack, or lost.
    fn elsewhere(
        &self,
        group: &Group,
        want: &Want,
        error: &StoreError,
        sink: PageSink<'_>,
        lost: &mut Vec<LostPage>,
    ) {
        let chunk = (want.number - group.pack.first) as usize;
        let found = Found { pack: Arc::clone(&group.pack), chunk, group: group.group };
        let address = &group.pack.table.addresses[chunk];
        let other = self.store.find_elsewhere(&found, address, &mut NodeCache::default());
        match other.as_deref().map(TryInto::try_into) {
            Some(Ok(page)) => sink(usize::from(want.machine), want.page.into(), page),
            _ => {
                let StoreError::Corrupt { file, damage } = error else {
                    unreachable!("only damage leads here");
                };
                let error = StoreError::Corrupt { file: file.clone(), damage: damage.clone() };
                lost.push(self.lost(want, error));
            }
        }
    }

    fn lost(&self, want: &Want, error: StoreError) -> LostPage {
        let machine = usize::from(want.machine);
        let part = &self.machines[machine].part;
        let offset = part.shape.offset(want.page.into());
        LostPage { machine, page: want.page.into(), error: error.within(&part.name, Some(offset)) }
    }
}

/// Cuts sorted wants up by group.
fn grouped(store: &Store, wants: &[Want]) -> Result<Vec<Group>, StoreError> {
    let index = store.index();
    let mut groups = Vec::new();
    let mut at = 0;
    while let Some(first) = wants.get(at) {
        let Some(found) = index.locate(first.number) else {
            let packs = store.backend().locate(crate::root::PACKS);
            return Err(StoreError::corrupt(&packs, Damage::Missing));
        };
        let end = found.pack.first + found.pack.table.groups[found.group].chunk_range().end as u32;
        let next = at + wants[at..].partition_point(|want| want.number < end);
        groups.push(Group { pack: found.pack, group: found.group, wants: at..next });
        at = next;
    }
    Ok(groups)
}

/// Lists the pages of one machine. Damaged nodes end it: nothing runs yet.
struct Trace<'a> {
    store: &'a Store,
    part: &'a Part,
    nodes: NodeCache,
    pages: Vec<(ChunkNumber, u32)>,
}

impl Visitor for Trace<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        let node = self.store.node(address, place.children, &mut self.nodes);
        let offset = self.part.shape.offset(place.first_leaf);
        node.map(Some).map_err(|error| error.within(&self.part.name, Some(offset)))
    }

    fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), StoreError> {
        let Some(number) = self.store.index().find(address) else {
            let packs = self.store.backend().locate(crate::root::PACKS);
            let error = StoreError::corrupt(&packs, Damage::NoChunk { address: *address });
            return Err(error.within(&self.part.name, Some(self.part.shape.offset(leaf))));
        };
        self.pages.push((number, leaf as u32));
        Ok(())
    }
}
