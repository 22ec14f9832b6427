//! How a snapshot comes back from a server: in few requests, many at once.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diorama_store::backend::{Backend, Object, Reading, Recovered, Session};
use diorama_store::*;

use crate::sample::*;
use crate::scratch;

/// A backend at the end of a long way, which is read as is said.
#[derive(Debug)]
struct Far {
    inner: Arc<dyn Backend>,
    reading: Reading,
    delay: Duration,
    reads: AtomicUsize,
}

impl Far {
    fn new(inner: &Arc<dyn Backend>, reading: Reading, delay: Duration) -> Arc<Self> {
        Arc::new(Self { inner: Arc::clone(inner), reading, delay, reads: AtomicUsize::new(0) })
    }

    fn way(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.delay);
    }
}

impl Backend for Far {
    fn locate(&self, key: &str) -> PathBuf {
        self.inner.locate(key)
    }

    fn read(&self, key: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.way();
        self.inner.read(key, limit_bytes)
    }

    fn read_range(&self, key: &str, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.way();
        self.inner.read_range(key, offset, buffer)
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError> {
        self.inner.list(folder)
    }

    fn length(&self, key: &str) -> Result<Option<u64>, StoreError> {
        self.inner.length(key)
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.inner.create(key, bytes)
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.replace(key, bytes)
    }

    fn remove(&self, key: &str, only: Option<&[u8]>) -> Result<bool, StoreError> {
        self.inner.remove(key, only)
    }

    fn begin(&self) -> Result<Box<dyn Session>, StoreError> {
        self.inner.begin()
    }

    fn sessions(&self) -> Result<usize, StoreError> {
        self.inner.sessions()
    }

    fn recover(&self) -> Result<Recovered, StoreError> {
        self.inner.recover()
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.inner.free_bytes()
    }

    fn reading(&self) -> Reading {
        self.reading
    }
}

fn memory(bytes: u64) -> std::fs::File {
    let ram = scratch::file();
    ram.write_all_at(&noise(3, bytes as usize), 0).unwrap();
    ram
}

/// How many reads, and how long.
fn restore(sample: &Sample, id: &SnapshotId, ram: &std::fs::File, far: &Arc<Far>) -> (usize, Duration) {
    let store = Store::with_backend(Arc::clone(far) as Arc<dyn Backend>).unwrap();
    let stored = store.load(id).unwrap();
    far.reads.store(0, Ordering::Relaxed);
    let copy = scratch::file();
    let begun = Instant::now();
    store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
    let took = begun.elapsed();
    assert!(contents(&copy) == contents(ram), "{}", sample.location);
    (far.reads.load(Ordering::Relaxed), took)
}

#[test]
fn restoring_takes_few_requests() {
    let sample = Sample::new();
    let ram = memory(48 * MIB);
    let id = sample.commit_memory(&sample.store, "large", &ram, b"state");
    let far = Far::new(&sample.backend, sample.backend.reading(), Duration::ZERO);
    // 384 groups of data in three packs, and 13 groups of nodes.
    let (reads, _) = restore(&sample, &id, &ram, &far);
    assert!((12..=20).contains(&reads), "{reads} reads");
}

#[test]
#[ignore = "a measurement: run it alone, with --nocapture"]
fn measure() {
    let sample = Sample::new();
    let ram = memory(256 * MIB);
    let id = sample.commit_memory(&sample.store, "large", &ram, b"state");
    let own = sample.backend.reading();
    let alone = Reading { at_once: 1, run_bytes: 1, gap_bytes: 0, node_bytes: 0 };
    println!("256 MiB, nothing in it compressible; each request waits before it goes to the server");
    for delay_ms in [0, 20] {
        for (what, reading) in [
            ("a request a group, as many at once as there are processors", alone),
            ("a request a group, 16 at once", Reading { at_once: 16, ..alone }),
            ("1 MiB, 16 at once", Reading { run_bytes: 1 << 20, ..own }),
            ("4 MiB, 16 at once, nodes alone", Reading { node_bytes: 0, ..own }),
            ("as it is: 4 MiB, 16 at once, nodes by the MiB", own),
        ] {
            let far = Far::new(&sample.backend, reading, Duration::from_millis(delay_ms));
            let (reads, took) = restore(&sample, &id, &ram, &far);
            println!("{delay_ms:3} ms  {reads:5} reads  {:6.2} s  {what}", took.as_secs_f64());
        }
    }
}
