//! From addresses back to contents, each checked against its address.
//!
//! Single nodes are read through a [`NodeCache`]; whole files by [`Store::fetch`], which first traces the tree, then
//! sorts what it needs by where it is, and reads, decompresses and checks each group once, several at a time.
//! A chunk whose group is damaged is looked for in other packs before it counts as lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::address::Address;
use crate::error::{Damage, StoreError};
use crate::index::{ChunkNumber, Found, Pack};
use crate::manifest::Part;
use crate::pack::{Group, Opener};
use crate::root::{Store, pack_key};
use crate::tree::{self, Place, Visitor};

/// How many groups of nodes are kept: 8 MiB.
const CACHED_GROUPS: usize = 256;
/// How many leaves are traced before they are fetched: their list takes 32 MiB.
const LEAVES_AT_ONCE: usize = 4 << 20;
/// The most threads that fetch one file, where they do not wait for a backend.
const WORKERS_MAX: usize = 8;

/// Groups read lately.
#[derive(Debug, Default)]
pub(crate) struct NodeCache {
    /// Latest last.
    groups: Vec<CachedGroup>,
    opener: Opener,
}

/// A group by its pack's first chunk and its number, and its raw bytes.
type CachedGroup = ((ChunkNumber, usize), Arc<Vec<u8>>);

impl NodeCache {
    fn keep(&mut self, key: (ChunkNumber, usize), group: Arc<Vec<u8>>) {
        if self.groups.len() >= CACHED_GROUPS {
            self.groups.remove(0);
        }
        self.groups.push((key, group));
    }
}

/// A place in a part that cannot be had.
#[derive(Debug)]
pub(crate) struct Loss {
    /// In bytes.
    pub(crate) offset: u64,
    /// The damage, without the part's name.
    pub(crate) error: StoreError,
}

/// Takes runs of leaves, from several threads: the first leaf's offset, and their bytes.
pub(crate) type Sink<'a> = &'a (dyn Fn(u64, &[u8]) -> Result<(), StoreError> + Sync);

/// A leaf to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Want {
    number: ChunkNumber,
    /// Which leaf. The longest file has 2^30.
    leaf: u32,
}

impl Store {
    /// A chunk's place.
    pub(crate) fn find(&self, address: &Address) -> Result<Found, StoreError> {
        let index = self.index();
        let found = index.find(address).and_then(|number| index.locate(number));
        found.ok_or_else(|| {
            let packs = self.backend().locate(crate::root::PACKS);
            StoreError::corrupt(&packs, Damage::NoChunk { address: *address })
        })
    }

    /// A node that has to have this many children.
    pub(crate) fn node(
        &self,
        address: &Address,
        children: usize,
        cache: &mut NodeCache,
    ) -> Result<Vec<u8>, StoreError> {
        let bytes = self.chunk(address, cache)?;
        if bytes.len() != children * Address::BYTES {
            return Err(self.misfit(&self.find(address)?.pack, address));
        }
        Ok(bytes)
    }

    /// What is wrong with a chunk that is whole, and not of its place's length.
    pub(crate) fn misfit(&self, pack: &Pack, address: &Address) -> StoreError {
        let file = self.backend().locate(&pack_key(&pack.id));
        StoreError::corrupt(&file, Damage::Node { address: *address })
    }

    /// A chunk's bytes.
    pub(crate) fn chunk(&self, address: &Address, cache: &mut NodeCache) -> Result<Vec<u8>, StoreError> {
        let found = self.find(address)?;
        match self.chunk_at(&found, address, cache) {
            Err(error) if error.is_damage() => {
                self.refresh_if_gone(&error)?;
                self.find_elsewhere(&found, address, cache).ok_or(error)
            }
            read => read,
        }
    }

    /// All of a part, in memory: for what the format bounds.
    pub(crate) fn fetch_bytes(&self, part: &Part) -> Result<Vec<u8>, StoreError> {
        // As long as the manifest says, and that is at most 1 GiB: but zeros cost nobody anything to claim, so that
        // memory is touched only where there is something.
        let bytes = std::sync::Mutex::new(vec![0; part.shape.bytes as usize]);
        let losses = self.fetch(
            part,
            &|offset, run| {
                let mut bytes = bytes.lock().expect("copying does not panic");
                bytes[offset as usize..offset as usize + run.len()].copy_from_slice(run);
                Ok(())
            },
            &mut |_| {},
        )?;
        first_loss(part, losses)?;
        Ok(bytes.into_inner().expect("copying does not panic"))
    }

    /// Gives all leaves of a part that are not zeros to `sink`; `progress` gets their lengths. Returns what is lost.
    pub(crate) fn fetch(
        &self,
        part: &Part,
        sink: Sink<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<Loss>, StoreError> {
        let _held = self.hold_packs();
        let mut trace = Trace {
            store: self,
            part,
            nodes: NodeCache::default(),
            wants: Vec::new(),
            losses: Vec::new(),
            sink,
            progress,
        };
        tree::walk(&part.shape, &part.root, &mut trace)?;
        trace.fetch()?;
        trace.losses.sort_by_key(|loss| loss.offset);
        Ok(trace.losses)
    }

    /// Reads, decompresses and checks a group as a whole.
    pub(crate) fn read_group(
        &self,
        pack: &Pack,
        group: usize,
        opener: &mut Opener,
        raw: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        let key = pack_key(&pack.id);
        let stored = &pack.table.groups[group];
        let mut bytes = vec![0; stored.stored_bytes as usize];
        self.backend().read_range(&key, stored.offset.into(), &mut bytes)?;
        self.open_group(pack, group, &bytes, opener, raw)
    }

    pub(crate) fn open_group(
        &self,
        pack: &Pack,
        group: usize,
        stored: &[u8],
        opener: &mut Opener,
        raw: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        pack.table.open_group(group, stored, opener, raw).map_err(|problem| {
            StoreError::corrupt(&self.backend().locate(&pack_key(&pack.id)), Damage::Pack(problem))
        })
    }

    fn chunk_at(
        &self,
        found: &Found,
        address: &Address,
        cache: &mut NodeCache,
    ) -> Result<Vec<u8>, StoreError> {
        let key = (found.pack.first, found.group);
        let group = match cache.groups.iter().rposition(|(known, _)| *known == key) {
            Some(at) => {
                let entry = cache.groups.remove(at);
                let group = Arc::clone(&entry.1);
                cache.groups.push(entry);
                group
            }
            None => {
                let group = match self.read_neighbours(&found.pack, found.group, cache)? {
                    Some(group) => group,
                    None => {
                        let mut raw = Vec::new();
                        self.read_group(&found.pack, found.group, &mut cache.opener, &mut raw)?;
                        Arc::new(raw)
                    }
                };
                cache.keep(key, Arc::clone(&group));
                group
            }
        };
        let bytes = chunk_of(found, &group);
        self.check_chunk(found, address, bytes)?;
        Ok(bytes.to_vec())
    }

    /// Reads a group together with those around it, where the backend likes that, and keeps these. `None` where it does
    /// not, or some of it cannot be had: then the group is read alone.
    fn read_neighbours(
        &self,
        pack: &Pack,
        wanted: usize,
        cache: &mut NodeCache,
    ) -> Result<Option<Arc<Vec<u8>>>, StoreError> {
        let most = self.backend().reading().node_bytes;
        let groups = &pack.table.groups;
        // Blocks of the pack, whichever of its groups is wanted: a tree's upper nodes stand behind its lower ones.
        let block = |group: &Group| u64::from(group.offset).checked_div(most);
        let here = block(&groups[wanted]);
        if here.is_none() {
            return Ok(None);
        }
        let first = groups[..wanted].iter().rposition(|group| block(group) != here).map_or(0, |at| at + 1);
        let end = wanted + groups[wanted..].iter().take_while(|group| block(group) == here).count();
        let (start, stop) = (groups[first].offset, groups[end - 1].end());
        let mut stored = vec![0; (stop - start) as usize];
        match self.backend().read_range(&pack_key(&pack.id), start.into(), &mut stored) {
            Ok(()) => {}
            Err(error) if error.is_damage() => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut found = None;
        for (group, at) in groups.iter().enumerate().take(end).skip(first) {
            let bytes = &stored[(at.offset - start) as usize..(at.end() - start) as usize];
            let mut raw = Vec::new();
            if self.open_group(pack, group, bytes, &mut cache.opener, &mut raw).is_err() {
                continue;
            }
            let raw = Arc::new(raw);
            if group == wanted {
                found = Some(raw);
            } else if !cache.groups.iter().any(|(known, _)| *known == (pack.first, group)) {
                cache.keep((pack.first, group), raw);
            }
        }
        Ok(found)
    }

    pub(crate) fn check_chunk(
        &self,
        found: &Found,
        address: &Address,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        if Address::of(bytes) == *address {
            return Ok(());
        }
        let problem = crate::pack::PackError::Chunk { chunk: found.chunk, address: *address };
        Err(StoreError::corrupt(&self.backend().locate(&pack_key(&found.pack.id)), Damage::Pack(problem)))
    }

    /// Another process may have repacked what it removed.
    pub(crate) fn refresh_if_gone(&self, error: &StoreError) -> Result<(), StoreError> {
        if matches!(error, StoreError::Corrupt { damage: Damage::Missing, .. }) {
            self.refresh()?;
        }
        Ok(())
    }

    /// The same chunk in another pack, if one has it undamaged.
    pub(crate) fn find_elsewhere(
        &self,
        not: &Found,
        address: &Address,
        cache: &mut NodeCache,
    ) -> Option<Vec<u8>> {
        let others = self.index().others(address, &not.pack.id);
        others.iter().find_map(|found| self.chunk_at(found, address, cache).ok())
    }
}

/// The first loss of a part, as an error.
pub(crate) fn first_loss(part: &Part, losses: Vec<Loss>) -> Result<(), StoreError> {
    match losses.into_iter().next() {
        Some(loss) => Err(loss.error.within(&part.name, Some(loss.offset))),
        None => Ok(()),
    }
}

fn chunk_of<'a>(found: &Found, group: &'a [u8]) -> &'a [u8] {
    let at = found.pack.table.offset_in_group(found.group, found.chunk);
    &group[at..at + found.pack.table.chunk_bytes(found.chunk)]
}

/// Finds what a part is made of.
struct Trace<'a> {
    store: &'a Store,
    part: &'a Part,
    nodes: NodeCache,
    wants: Vec<Want>,
    losses: Vec<Loss>,
    sink: Sink<'a>,
    progress: &'a mut dyn FnMut(u64),
}

impl Visitor for Trace<'_> {
    type Error = StoreError;

    fn node(&mut self, address: &Address, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        match self.store.node(address, place.children, &mut self.nodes) {
            Ok(node) => Ok(Some(node)),
            Err(error) if error.is_damage() => {
                self.losses.push(Loss { offset: self.part.shape.offset(place.first_leaf), error });
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn leaf(&mut self, leaf: u64, address: &Address) -> Result<(), StoreError> {
        match self.store.index().find(address) {
            Some(number) => self.wants.push(Want { number, leaf: leaf as u32 }),
            None => {
                let file = self.store.backend().locate(crate::root::PACKS);
                let error = StoreError::corrupt(&file, Damage::NoChunk { address: *address });
                self.losses.push(Loss { offset: self.part.shape.offset(leaf), error });
            }
        }
        if self.wants.len() >= LEAVES_AT_ONCE { self.fetch() } else { Ok(()) }
    }
}

/// Groups of one pack that are read at once, and the leaves that they hold. Between two may be some that nobody wants.
struct Run<'a> {
    pack: Arc<Pack>,
    groups: Vec<(usize, &'a [Want])>,
}

impl Run<'_> {
    fn start(&self) -> u32 {
        self.groups.first().map_or(0, |(group, _)| self.pack.table.groups[*group].offset)
    }

    fn end(&self) -> u32 {
        self.groups.last().map_or(0, |(group, _)| self.pack.table.groups[*group].end())
    }
}

impl Trace<'_> {
    fn fetch(&mut self) -> Result<(), StoreError> {
        let mut wants = std::mem::take(&mut self.wants);
        wants.sort_unstable();
        let runs = self.runs(&wants)?;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let waiting = self.store.backend().reading().at_once.min(runs.len());
        let workers = cores.min(WORKERS_MAX).min(runs.len() / 4).max(waiting).max(1);
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let (store, part, sink) = (self.store, self.part, self.sink);
        let work = |done: &mut dyn FnMut(u64)| -> Result<Vec<Loss>, StoreError> {
            let mut worker = Worker { store, part, sink, opener: Opener::new(), losses: Vec::new() };
            while !stop.load(Ordering::Relaxed)
                && let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let fetched = worker.run(run);
                stop.fetch_or(fetched.is_err(), Ordering::Relaxed);
                done(fetched?);
            }
            Ok(worker.losses)
        };
        if workers == 1 {
            self.losses.extend(work(self.progress)?);
            return Ok(());
        }
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let threads: Vec<_> = (0..workers)
                .map(|_| {
                    let (sender, work) = (sender.clone(), &work);
                    scope.spawn(move || work(&mut |bytes| sender.send(bytes).expect("the receiver waits")))
                })
                .collect();
            drop(sender);
            for bytes in receiver {
                (self.progress)(bytes);
            }
            for thread in threads {
                self.losses.extend(thread.join().expect("fetching does not panic")?);
            }
            Ok(())
        })
    }

    /// Cuts sorted wants up by group, and joins groups that are adjacent, or nearly so.
    fn runs<'w>(&mut self, wants: &'w [Want]) -> Result<Vec<Run<'w>>, StoreError> {
        let reading = self.store.backend().reading();
        let mut runs: Vec<Run<'w>> = Vec::new();
        let mut rest = wants;
        while let Some(first) = rest.first() {
            let found = self.store.index().locate(first.number);
            let Some(found) = found else {
                let packs = self.store.backend().locate(crate::root::PACKS);
                return Err(StoreError::corrupt(&packs, Damage::Missing).within(&self.part.name, None));
            };
            let group = &found.pack.table.groups[found.group];
            let end = found.pack.first + group.chunk_range().end as u32;
            let (these, others) = rest.split_at(rest.partition_point(|want| want.number < end));
            rest = others;
            if let Some(run) = runs.last_mut()
                && run.pack.id == found.pack.id
                && u64::from(group.offset - run.end()) <= reading.gap_bytes
                && u64::from(group.end() - run.start()) <= reading.run_bytes
            {
                run.groups.push((found.group, these));
            } else {
                runs.push(Run { pack: found.pack, groups: vec![(found.group, these)] });
            }
        }
        Ok(runs)
    }
}

struct Worker<'a> {
    store: &'a Store,
    part: &'a Part,
    sink: Sink<'a>,
    opener: Opener,
    losses: Vec<Loss>,
}

impl Worker<'_> {
    /// Returns how many bytes of the part it was.
    fn run(&mut self, run: &Run<'_>) -> Result<u64, StoreError> {
        let table = &run.pack.table;
        let start = run.start();
        let mut stored = vec![0; (run.end() - start) as usize];
        let read = self.store.backend().read_range(&pack_key(&run.pack.id), start.into(), &mut stored);
        let whole = match read {
            Ok(()) => true,
            // Perhaps only a part of it cannot be read: each group by itself.
            Err(error) if error.is_damage() => false,
            Err(error) => return Err(error),
        };
        let mut raw = Vec::new();
        let mut done = 0;
        for (group, wants) in &run.groups {
            let at = &table.groups[*group];
            let opened = if whole {
                let bytes = &stored[(at.offset - start) as usize..(at.end() - start) as usize];
                self.store.open_group(&run.pack, *group, bytes, &mut self.opener, &mut raw)
            } else {
                self.store.read_group(&run.pack, *group, &mut self.opener, &mut raw)
            };
            match opened {
                Ok(()) => self.group(run, *group, wants, &raw)?,
                Err(error) if error.is_damage() => {
                    self.store.refresh_if_gone(&error)?;
                    self.each_elsewhere(run, *group, wants, &error)?;
                }
                Err(error) => return Err(error),
            }
            done += wants.iter().map(|want| self.part.shape.leaf_length(want.leaf.into())).sum::<u64>();
        }
        Ok(done)
    }

    /// Checks each chunk once, and hands leaves that follow one another in the part and in the group on together.
    fn group(&mut self, run: &Run<'_>, group: usize, wants: &[Want], raw: &[u8]) -> Result<(), StoreError> {
        let table = &run.pack.table;
        let mut at = 0;
        let mut chunk = table.groups[group].first_chunk as usize;
        // The run of leaves so far: its offset in the part, and where it is in the group.
        let mut pending: Option<(u64, std::ops::Range<usize>)> = None;
        let mut checked = None;
        for want in wants {
            let wanted = (want.number - run.pack.first) as usize;
            while chunk < wanted {
                at += table.chunk_bytes(chunk);
                chunk += 1;
            }
            let end = at + table.chunk_bytes(chunk);
            let bytes = &raw[at..end];
            let leaf = u64::from(want.leaf);
            let address = &table.addresses[chunk];
            if checked != Some(chunk) {
                let found = Found { pack: Arc::clone(&run.pack), chunk, group };
                match self.store.check_chunk(&found, address, bytes) {
                    Ok(()) => checked = Some(chunk),
                    Err(error) => {
                        self.elsewhere(run, group, want, &error)?;
                        continue;
                    }
                }
            }
            let offset = self.part.shape.offset(leaf);
            if bytes.len() as u64 != self.part.shape.leaf_length(leaf) {
                let error = self.store.misfit(&run.pack, address);
                self.losses.push(Loss { offset, error });
                continue;
            }
            match &mut pending {
                Some((start, range)) if range.end == at && *start + range.len() as u64 == offset => {
                    range.end = end;
                }
                _ => {
                    if let Some((start, range)) = pending.replace((offset, at..end)) {
                        (self.sink)(start, &raw[range])?;
                    }
                }
            }
        }
        match pending {
            Some((start, range)) => (self.sink)(start, &raw[range]),
            None => Ok(()),
        }
    }

    fn each_elsewhere(
        &mut self,
        run: &Run<'_>,
        group: usize,
        wants: &[Want],
        error: &StoreError,
    ) -> Result<(), StoreError> {
        wants.iter().try_for_each(|want| self.elsewhere(run, group, want, error))
    }

    /// A leaf whose chunk is damaged here: from another pack, or lost.
    fn elsewhere(
        &mut self,
        run: &Run<'_>,
        group: usize,
        want: &Want,
        error: &StoreError,
    ) -> Result<(), StoreError> {
        let chunk = (want.number - run.pack.first) as usize;
        let found = Found { pack: Arc::clone(&run.pack), chunk, group };
        let address = run.pack.table.addresses[chunk];
        let leaf = u64::from(want.leaf);
        let offset = self.part.shape.offset(leaf);
        match self.store.find_elsewhere(&found, &address, &mut NodeCache::default()) {
            Some(bytes) if bytes.len() as u64 == self.part.shape.leaf_length(leaf) => {
                (self.sink)(offset, &bytes)
            }
            _ => {
                let StoreError::Corrupt { file, damage } = error else {
                    unreachable!("only damage leads here");
                };
                let error = StoreError::Corrupt { file: file.clone(), damage: damage.clone() };
                self.losses.push(Loss { offset, error });
                Ok(())
            }
        }
    }
}
