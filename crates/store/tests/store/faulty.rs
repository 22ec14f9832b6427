//! A backend whose operations fail when they are told to.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use diorama_store::backend::{Backend, Object, Reading, Recovered, Session};
use diorama_store::*;

/// What happens at the operation that is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails without having done anything; later ones work.
    Before,
    /// It is done, and fails all the same; later ones work.
    After,
    /// It and all that come later fail: the process has died.
    Dead,
}

/// Told of each change that was made, by its number.
type Watch = Box<dyn Fn(usize) + Send + Sync>;

pub struct Switchboard {
    count: AtomicUsize,
    at: AtomicUsize,
    fault: Fault,
    /// It happened.
    pub hit: AtomicBool,
    /// While it looks, nothing else happens.
    watch: Option<(Mutex<usize>, Watch)>,
}

impl fmt::Debug for Switchboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switchboard").field("fault", &self.fault).finish_non_exhaustive()
    }
}

/// A folder behind a [`Switchboard`].
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Backend>,
    board: Arc<Switchboard>,
}

#[derive(Debug)]
struct FaultySession {
    inner: Option<Box<dyn Session>>,
    board: Arc<Switchboard>,
}

impl Switchboard {
    /// Counts from when it is armed.
    pub fn new(fault: Fault) -> Arc<Self> {
        let (count, at) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        Arc::new(Self { count, at, fault, hit: AtomicBool::new(false), watch: None })
    }

    /// Nothing fails; `watch` looks after each change.
    #[allow(dead_code, reason = "what only a folder's tests need")]
    pub fn watched(watch: impl Fn(usize) + Send + Sync + 'static) -> Arc<Self> {
        let (count, at) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        let watch = Some((Mutex::new(0), Box::new(watch) as Watch));
        Arc::new(Self { count, at, fault: Fault::Before, hit: AtomicBool::new(false), watch })
    }

    /// The operation after this many more fails.
    pub fn arm(&self, after: usize) {
        self.count.store(0, Ordering::Relaxed);
        self.at.store(after, Ordering::Relaxed);
    }

    fn change<T>(&self, operation: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let Some((number, watch)) = &self.watch else { return self.run(operation) };
        let mut number = number.lock().unwrap();
        let done = self.run(operation);
        *number += 1;
        watch(*number);
        done
    }

    fn run<T>(&self, operation: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let at = self.at.load(Ordering::Relaxed);
        let failed = || StoreError::Io {
            action: "pretend to reach",
            path: PathBuf::new(),
            source: std::io::Error::other("a fault that a test made"),
        };
        if count < at || (count > at && self.fault != Fault::Dead) {
            return operation();
        }
        self.hit.store(true, Ordering::Relaxed);
        if self.fault == Fault::After {
            operation()?;
        }
        Err(failed())
    }
}

impl Faulty {
    pub fn new(inner: Arc<dyn Backend>, board: &Arc<Switchboard>) -> Arc<Self> {
        Arc::new(Self { inner, board: Arc::clone(board) })
    }
}

impl Backend for Faulty {
    fn locate(&self, key: &str) -> PathBuf {
        self.inner.locate(key)
    }

    fn read(&self, key: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.board.run(|| self.inner.read(key, limit_bytes))
    }

    fn read_range(&self, key: &str, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.board.run(|| self.inner.read_range(key, offset, buffer))
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError> {
        self.board.run(|| self.inner.list(folder))
    }

    fn length(&self, key: &str) -> Result<Option<u64>, StoreError> {
        self.board.run(|| self.inner.length(key))
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.board.change(|| self.inner.create(key, bytes))
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.board.change(|| self.inner.replace(key, bytes))
    }

    fn remove(&self, key: &str, only: Option<&[u8]>) -> Result<bool, StoreError> {
        self.board.change(|| self.inner.remove(key, only))
    }

    fn begin(&self) -> Result<Box<dyn Session>, StoreError> {
        let inner = Some(self.board.change(|| self.inner.begin())?);
        Ok(Box::new(FaultySession { inner, board: Arc::clone(&self.board) }))
    }

    fn sessions(&self) -> Result<usize, StoreError> {
        self.board.run(|| self.inner.sessions())
    }

    fn recover(&self) -> Result<Recovered, StoreError> {
        self.board.change(|| self.inner.recover())
    }

    fn reading(&self) -> Reading {
        self.inner.reading()
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.board.run(|| self.inner.free_bytes())
    }
}

impl FaultySession {
    fn inner(&self) -> &dyn Session {
        self.inner.as_deref().unwrap()
    }
}

impl Session for FaultySession {
    fn stage(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.board.change(|| self.inner().stage(key, bytes))
    }

    /// Each key is an operation of its own: it can fail between two.
    fn publish(&self, keys: &[String]) -> Result<(), StoreError> {
        keys.iter().try_for_each(|key| self.board.change(|| self.inner().publish(std::slice::from_ref(key))))
    }

    fn check(&self) -> Result<(), StoreError> {
        self.board.run(|| self.inner().check())
    }

    fn confirm(&self) -> Result<(), StoreError> {
        self.board.change(|| self.inner().confirm())
    }

    fn end(mut self: Box<Self>) -> Result<(), StoreError> {
        let inner = self.inner.take().unwrap();
        self.board.change(|| inner.end())
    }
}
