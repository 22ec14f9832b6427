//! Machines that run while their memory is still on its way from the store.
//!
//! One [`Load`] for each `restore --lazy` or `fork --lazy`, however many environments it makes: what two machines share is
//! read once. Each machine is a [`Target`]: a QEMU that waits in a postcopy migration (`diorama_qemu::migration::postcopy`),
//! and whose source we are.
//!
//! ```text
//! target   opening --PONG--> ready --every page sent, closing sent--> complete
//!             \________________\____ QEMU has gone, or is not wanted any more ____> gone
//! ```
//!
//! Threads: one for each target reads its return path and answers what needs no store (zero pages); a few workers read
//! groups of pages and send them to every target that has them. What guests wait for goes first; the rest begins with
//! [`Load::begin`], when all machines run, and has only one worker while guests wait for something.
//!
//! Invariants: a page is checked by the store before it is sent, and sent once; an error that may pass is tried again
//! for as long as anybody wants the load; a page that is lost for good is said of its machine, and everything else is
//! still sent; a machine that is complete needs neither this agent nor the store.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use diorama_qemu::command_line::RAM_BLOCK;
use diorama_qemu::migration::PAGE_SIZE_BYTES;
use diorama_qemu::migration::postcopy::{self, Opening, Pages, READY, Reply, ReplyReader};
use diorama_store::{LazyMemory, LostPage, StoreError};

use crate::failpoint::reach;

const PAGE: u64 = PAGE_SIZE_BYTES as u64;
/// Workers: so many requests to the store are under way at once.
const WORKERS: usize = 6;
/// Of these, how many may read what nobody waits for.
const BACKGROUND: usize = 4;
/// The same while somebody waits for something, or has done so a moment ago.
const BACKGROUND_BESIDE: usize = 1;
/// How long that moment is.
const MOMENT: Duration = Duration::from_millis(50);
/// How much is read at once of what nobody waits for, in stored bytes.
const RUN_BYTES: u32 = 1 << 20;
/// The same while somebody waits.
const RUN_BYTES_BESIDE: u32 = 256 << 10;
/// How much is read for a page that somebody waits for: what follows it is mostly wanted next.
const DEMAND_BYTES: u32 = 128 << 10;
/// How much is sent with one call.
const SEND_PAGES: usize = 64;
/// A QEMU reads its stream at once, whatever its guest does. One that does not is broken.
const SEND_LIMIT: Duration = Duration::from_secs(60);
/// A store that answers later than this is said to be waited for.
const SILENCE: Duration = Duration::from_secs(3);
/// Between two tries of what the store could not give.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Load {
    memory: LazyMemory,
    targets: Mutex<Vec<Arc<Target>>>,
    work: Mutex<Work>,
    wake: Condvar,
}

#[derive(Debug)]
struct Work {
    /// Groups that guests wait for, the longest first.
    demands: VecDeque<usize>,
    /// Being read.
    reading: BTreeSet<usize>,
    /// Of them, how many workers read for a guest.
    urgent: usize,
    /// Since when nothing has come that a guest waits for.
    silent_since: Option<Instant>,
    background: usize,
    /// When somebody last waited.
    demanded: Option<Instant>,
    /// By group: it needs not be read any more.
    done: Vec<bool>,
    /// No group before this one is still to be read.
    next: usize,
    /// All machines were added.
    kept: bool,
    begun: bool,
    ended: bool,
    /// What the store said last, while it does not give what is asked for.
    trouble: Option<String>,
}

/// Something to read.
struct Task {
    run: Range<usize>,
    urgent: bool,
    /// All machines were there when it began, so that nobody has to read it again.
    for_all: bool,
}

/// One machine of a load.
#[derive(Debug)]
struct Target {
    /// Its place in the memory.
    machine: usize,
    ram_section: u32,
    /// To QEMU. Held while something is sent.
    stream: Mutex<UnixStream>,
    /// The same, to shut it down.
    control: UnixStream,
    /// A bit for each page.
    sent: Vec<AtomicU64>,
    /// Pages that are not zero and were not sent yet.
    left: AtomicU64,
    total: u64,
    gone: AtomicBool,
    state: Mutex<TargetState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct TargetState {
    ready: bool,
    complete: bool,
    closing: bool,
    /// Pages that can never be sent, by the first of them.
    lost: Option<String>,
    /// Its QEMU has gone, or what it says makes no sense.
    broken: Option<String>,
}

/// A machine's hold on its load: dropping it says that the machine is not wanted any more.
#[derive(Debug)]
pub(crate) struct Loading {
    /// Its threads hold it, as long as there is something to do.
    load: Weak<Load>,
    target: Arc<Target>,
}

/// How far a machine's load is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LoadState {
    pub(crate) loaded_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) complete: bool,
    /// What it waits for, when that is not just time.
    pub(crate) waits_for: Option<String>,
    /// Why it will never be complete.
    pub(crate) failed: Option<String>,
}

/// The command's hold on a load: dropped before [`Pending::begin`], the load ends.
#[derive(Debug)]
pub(crate) struct Pending(Arc<Load>);

impl Pending {
    /// Starts a load's workers. They wait.
    pub(crate) fn new(memory: LazyMemory) -> Self {
        let groups = memory.groups();
        let load = Arc::new(Load {
            memory,
            targets: Mutex::default(),
            work: Mutex::new(Work {
                demands: VecDeque::new(),
                reading: BTreeSet::new(),
                urgent: 0,
                silent_since: None,
                background: 0,
                demanded: None,
                done: vec![false; groups],
                next: 0,
                kept: false,
                begun: false,
                ended: false,
                trouble: None,
            }),
            wake: Condvar::new(),
        });
        for _ in 0..WORKERS {
            let load = Arc::clone(&load);
            std::thread::spawn(move || load.work());
        }
        Self(load)
    }

    /// The load, to add machines to.
    pub(crate) fn load(&self) -> &Arc<Load> {
        &self.0
    }

    /// All machines were added and run: now everything else is loaded.
    pub(crate) fn begin(&self) {
        lock(&self.0.work).kept = true;
        let load = Arc::clone(&self.0);
        std::thread::spawn(move || {
            reach(format_args!("load background"));
            let mut work = lock(&load.work);
            work.begun = true;
            let nothing = work.done.is_empty();
            drop(work);
            load.wake.notify_all();
            if nothing {
                load.close_targets();
            }
            load.leave();
        });
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut work = lock(&self.0.work);
        if !work.kept {
            work.ended = true;
            self.0.wake.notify_all();
        }
    }
}

impl Load {
    /// Begins to serve a machine (by its place in the memory) whose QEMU reads from the other end of `stream`.
    pub(crate) fn add(
        self: &Arc<Self>,
        machine: usize,
        opening: &Opening,
        stream: UnixStream,
    ) -> std::io::Result<Loading> {
        let pages = self.memory.pages_of(machine);
        let replies = stream.try_clone()?;
        let control = stream.try_clone()?;
        stream.set_write_timeout(Some(SEND_LIMIT))?;
        let target = Arc::new(Target {
            machine,
            ram_section: opening.ram_section,
            stream: Mutex::new(stream),
            control,
            sent: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            left: AtomicU64::new(self.memory.pages(machine)),
            total: self.memory.pages(machine),
            gone: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let loading = Loading { load: Arc::downgrade(self), target: Arc::clone(&target) };
        // From the moment that workers know of it, they send it what others ask for, too: that comes after the opening.
        let mut stream = lock(&target.stream);
        lock(&self.targets).push(Arc::clone(&target));
        let (load, answering) = (Arc::clone(self), Arc::clone(&target));
        std::thread::spawn(move || load.answer(&answering, replies));
        reach(format_args!("load opening"));
        // QEMU reads all of it before it asks for anything that the devices' state needs.
        stream.write_all(&opening.bytes)?;
        Ok(loading)
    }

    /// Reads a target's return path to its end.
    fn answer(&self, target: &Target, mut replies: UnixStream) {
        let mut reader = ReplyReader::default();
        let mut chunk = [0; 16 << 10];
        let end = loop {
            match replies.read(&mut chunk) {
                Ok(0) => break "QEMU has closed it".to_owned(),
                Ok(length) => reader.feed(&chunk[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => break error.to_string(),
            }
            let taken = loop {
                match reader.next_reply() {
                    Ok(Some(reply)) => {
                        if let Err(error) = self.take(target, reply) {
                            break Err(error);
                        }
                    }
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error.to_string()),
                }
            };
            if let Err(error) = taken {
                break error;
            }
        };
        target.end(&end);
        self.leave();
    }

    fn take(&self, target: &Target, reply: Reply) -> Result<(), String> {
        match reply {
            Reply::Pong { value } => {
                if value == READY {
                    lock(&target.state).ready = true;
                    target.changed.notify_all();
                }
            }
            Reply::Shut { status } => {
                // It closes the stream next.
                if status != 0 || !lock(&target.state).closing {
                    return Err(format!("QEMU has ended it with status {status}"));
                }
            }
            Reply::Request { block, offset, bytes } => {
                let mut zeros = Pages::new(target.ram_section);
                for page in offset / PAGE..(offset + u64::from(bytes)) / PAGE {
                    if block != RAM_BLOCK {
                        // What the device state has of other blocks has been sent with it; the rest was never written.
                        zeros.zero(&block, page * PAGE);
                        continue;
                    }
                    let Some(bit) = target.bit(page) else {
                        return Err(format!("QEMU asks for page {page}, which is none"));
                    };
                    match self.memory.group_of(target.machine, page) {
                        None if target.mark(bit) => zeros.zero(&block, page * PAGE),
                        None => {}
                        Some(group) => self.demand(target, bit, group),
                    }
                }
                if zeros.count() > 0 {
                    target.send(&zeros.finish()).map_err(|error| error.to_string())?;
                }
            }
        }
        Ok(())
    }

    fn demand(&self, target: &Target, bit: (usize, u64), group: usize) {
        if target.is_marked(bit) {
            return;
        }
        let mut work = lock(&self.work);
        work.demanded = Some(Instant::now());
        // Also when it is being read: perhaps that began before this machine was there. It waits until then.
        if !work.done[group] && !work.demands.contains(&group) {
            work.demands.push_back(group);
            self.wake.notify_one();
        }
    }

    /// A worker: until the load has ended.
    fn work(&self) {
        let mut pause = RETRY_FIRST;
        while let Some(task) = self.next_task() {
            let read = self.read(&task);
            let mut work = lock(&self.work);
            for group in task.run.clone() {
                work.reading.remove(&group);
            }
            *(if task.urgent { &mut work.urgent } else { &mut work.background }) -= 1;
            match read {
                Ok(()) => {
                    pause = RETRY_FIRST;
                    work.trouble = None;
                    work.silent_since = (work.urgent > 0).then(Instant::now);
                    if task.for_all {
                        work.done[task.run].fill(true);
                    }
                    let all = work.done.iter().skip(work.next).position(|done| !done);
                    work.next = all.map_or(work.done.len(), |at| work.next + at);
                    let complete = work.next == work.done.len() && work.reading.is_empty();
                    self.wake.notify_all();
                    if complete && work.begun {
                        drop(work);
                        self.close_targets();
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "memory of running machines cannot be read; it is tried again");
                    work.trouble = Some(error.to_string());
                    if task.urgent {
                        work.demands.push_front(task.run.start);
                    }
                    // Not at once, unless there is nothing left to do it for.
                    let ended = |work: &mut Work| !work.ended;
                    let waited = self.wake.wait_timeout_while(work, pause, ended);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                    pause = (pause * 2).min(RETRY_MOST);
                }
            }
        }
    }

    fn next_task(&self) -> Option<Task> {
        let mut work = lock(&self.work);
        loop {
            if work.ended {
                return None;
            }
            let Work { demands, done, reading, .. } = &mut *work;
            demands.retain(|group| !done[*group]);
            let next = demands.iter().position(|group| !reading.contains(group));
            if let Some(group) = next.and_then(|at| demands.remove(at)) {
                work.urgent += 1;
                work.silent_since.get_or_insert_with(Instant::now);
                return Some(self.claim(&mut work, group, DEMAND_BYTES, true));
            }
            let mut wait = Duration::from_secs(60);
            if work.begun && work.next < work.done.len() {
                let since = work.demanded.map(|demanded| demanded.elapsed());
                let beside = work.urgent > 0 || since.is_some_and(|since| since < MOMENT);
                let (most, bytes) =
                    if beside { (BACKGROUND_BESIDE, RUN_BYTES_BESIDE) } else { (BACKGROUND, RUN_BYTES) };
                if work.background < most {
                    let free = |group: &usize| !work.done[*group] && !work.reading.contains(group);
                    if let Some(group) = (work.next..work.done.len()).find(free) {
                        work.background += 1;
                        return Some(self.claim(&mut work, group, bytes, false));
                    }
                } else if beside {
                    wait = MOMENT;
                }
            }
            let waited = self.wake.wait_timeout(work, wait);
            work = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes a group, and those behind it that are worth reading with it.
    fn claim(&self, work: &mut Work, group: usize, bytes: u32, urgent: bool) -> Task {
        let mut run = self.memory.run(group, bytes);
        let free = |group: &usize| !work.done[*group] && !work.reading.contains(group);
        run.end = run.clone().find(|group| !free(group)).unwrap_or(run.end).max(group + 1);
        work.reading.extend(run.clone());
        Task { run, urgent, for_all: work.begun }
    }

    /// Reads groups and sends them to whom they are for.
    fn read(&self, task: &Task) -> Result<(), StoreError> {
        let targets: Vec<Arc<Target>> = lock(&self.targets).clone();
        let mut batches: Vec<Option<Pages>> = targets.iter().map(|_| None).collect();
        let lost = self.memory.read(task.run.clone(), &mut |machine, page, bytes| {
            for (target, batch) in targets.iter().zip(&mut batches) {
                let wanted = target.machine == machine && !target.gone.load(Ordering::Relaxed);
                let Some(bit) = target.bit(page).filter(|_| wanted) else { continue };
                if !target.mark(bit) {
                    continue;
                }
                target.left.fetch_sub(1, Ordering::Relaxed);
                let pages = batch.get_or_insert_with(|| Pages::new(target.ram_section));
                pages.page(RAM_BLOCK, page * PAGE, bytes);
                if pages.count() >= SEND_PAGES {
                    target.flush(batch);
                }
            }
        });
        // Marked pages have to be sent, whatever became of the others.
        for (target, batch) in targets.iter().zip(&mut batches) {
            target.flush(batch);
        }
        for lost in lost? {
            for target in targets.iter().filter(|target| target.machine == lost.machine) {
                target.lose(&lost);
            }
        }
        Ok(())
    }

    /// Everything that can be had was sent.
    fn close_targets(&self) {
        for target in lock(&self.targets).iter() {
            let mut state = lock(&target.state);
            // One that lacks a page must not end: QEMU would give its guest zeros instead.
            if state.closing || state.lost.is_some() || target.left.load(Ordering::Relaxed) > 0 {
                continue;
            }
            state.closing = true;
            drop(state);
            if let Err(error) = target.send(&postcopy::closing(target.ram_section)) {
                target.end(&error.to_string());
            }
        }
    }

    /// After a target has ended: the load ends with the last one.
    fn leave(&self) {
        lock(&self.targets).retain(|target| !target.gone.load(Ordering::Relaxed));
        let mut work = lock(&self.work);
        if work.begun && lock(&self.targets).is_empty() {
            work.ended = true;
        }
        self.wake.notify_all();
    }
}

impl Work {
    /// What guests wait for, when that is not just time.
    fn trouble(&self) -> Option<String> {
        let silent = self.silent_since.map(|since| since.elapsed()).filter(|silent| *silent > SILENCE);
        let silent = silent.map(|silent| format!("the store has not answered for {} s", silent.as_secs()));
        self.trouble.clone().or(silent)
    }
}

impl Target {
    /// A page's place among the bits; none for what is no page.
    fn bit(&self, page: u64) -> Option<(usize, u64)> {
        let word = usize::try_from(page / 64).ok()?;
        (word < self.sent.len()).then_some((word, 1 << (page % 64)))
    }

    /// Whether this call is the one that marks it as sent.
    fn mark(&self, (word, bit): (usize, u64)) -> bool {
        self.sent[word].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    fn is_marked(&self, (word, bit): (usize, u64)) -> bool {
        self.sent[word].load(Ordering::Relaxed) & bit != 0
    }

    fn send(&self, bytes: &[u8]) -> std::io::Result<()> {
        lock(&self.stream).write_all(bytes)
    }

    fn flush(&self, batch: &mut Option<Pages>) {
        if let Some(pages) = batch.take()
            && let Err(error) = self.send(&pages.finish())
        {
            self.end(&error.to_string());
        }
    }

    fn lose(&self, lost: &LostPage) {
        let mut state = lock(&self.state);
        if state.lost.is_none() {
            tracing::error!(page = lost.page, error = %lost.error, "memory of a running machine is lost");
            state.lost = Some(lost.error.to_string());
        }
        self.changed.notify_all();
    }

    fn end(&self, why: &str) {
        let mut state = lock(&self.state);
        // When everything was sent, QEMU closes the stream by itself.
        if state.closing {
            state.complete = true;
        } else if state.broken.is_none() {
            state.broken = Some(why.to_owned());
        }
        self.gone.store(true, Ordering::Relaxed);
        self.changed.notify_all();
        drop(state);
        // Others may wait in a read or a write. It may be shut down already.
        let _ = self.control.shutdown(Shutdown::Both);
    }
}

impl Loading {
    /// Waits until the devices are loaded, so that the machine is about to stand ready. False when it never will.
    pub(crate) fn wait_ready(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let waits = |state: &mut TargetState| !state.ready && state.broken.is_none();
        let waited = self.target.changed.wait_timeout_while(lock(&self.target.state), left, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.ready
    }

    /// How far it is.
    pub(crate) fn state(&self) -> LoadState {
        let trouble = self.load.upgrade().and_then(|load| lock(&load.work).trouble());
        let state = lock(&self.target.state);
        let total_bytes = self.target.total * PAGE;
        let loaded_bytes = total_bytes - self.target.left.load(Ordering::Relaxed) * PAGE;
        LoadState {
            loaded_bytes,
            total_bytes,
            complete: state.complete,
            waits_for: trouble.filter(|_| !state.complete),
            failed: state.lost.clone().or_else(|| state.broken.clone()).filter(|_| !state.complete),
        }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.target.end("it is not wanted any more");
        if let Some(load) = self.load.upgrade() {
            load.leave();
        }
    }
}

/// A thread that panicked while it held one of these locks has left a whole value.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
