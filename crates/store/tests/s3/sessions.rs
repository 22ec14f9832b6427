//! Sessions without locks: of other processes, dead and alive; expired; and judged by others while they commit.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use diorama_store::backend::s3::S3Settings;
use diorama_store::*;

use crate::place::{self, server};
use crate::proxy::Proxy;
use crate::sample::*;
use crate::scratch;

/// Times are told by the second here, so that less would not do.
const EXPIRY: Duration = Duration::from_secs(4);
const LIMIT: Duration = Duration::from_secs(60);
const PREFIX: &str = "DIORAMA_TEST_PREFIX";
const ENDPOINT: &str = "DIORAMA_TEST_ENDPOINT";

fn short(mut settings: S3Settings) -> S3Settings {
    settings.timing.renew = Duration::from_millis(400);
    settings.timing.expiry = EXPIRY;
    settings.timing.in_flight = Duration::from_secs(2);
    settings
}

fn collect(sample: &Sample) -> Collected {
    sample.store.collect(CollectOptions::default(), &mut none).unwrap()
}

/// A writer in a process of its own, that has put everything and waits.
struct Other {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start(settings: &S3Settings) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sessions::a_writer_for_other_tests", "--ignored", "--nocapture"])
            .env(PREFIX, &settings.prefix)
            .env(ENDPOINT, settings.endpoint.as_ref().unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut other = Self { child, input, output };
        assert_eq!(other.says(), "ready");
        other
    }

    /// The next word that is meant for us, and not the test runner's.
    fn says(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the other process has ended");
            if let Some((_, word)) = line.split_once("says: ") {
                return word.trim().to_owned();
            }
        }
    }

    fn go_on(&mut self) {
        self.input.as_mut().unwrap().write_all(b"go on\n").unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        scratch::sweep();
    }
}

#[test]
#[ignore = "other tests run it, as another process"]
fn a_writer_for_other_tests() {
    let (Ok(prefix), Ok(endpoint)) = (std::env::var(PREFIX), std::env::var(ENDPOINT)) else { return };
    let sample = Sample::in_place(short(place::at(&endpoint, &prefix)));
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "other", 2).unwrap();
    println!("says: ready");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    match writer.commit(manifest) {
        Ok(id) => println!("says: {id}"),
        Err(error) => println!("says: {error}"),
    }
}

#[test]
fn a_collector_waits_for_a_living_writer_of_another_process() {
    let settings = short(place::settings(server(), "living"));
    let sample = Sample::in_place(settings.clone());
    let old = sample.commit("old", 2);
    let mut other = Other::start(&settings);
    // It has found everything there; now nothing but its session holds it.
    sample.store.remove(&old).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < EXPIRY * 2 {
        let collected = collect(&sample);
        assert!(collected.deferred && collected.removed_packs == 0, "{collected:?}");
        thread::sleep(Duration::from_millis(300));
    }
    other.go_on();
    let id: SnapshotId = other.says().parse().unwrap();
    let store = sample.reopened();
    sample.restores(&store, &id, 2).unwrap();
    let collected = collect(&sample);
    assert!(!collected.deferred && collected.removed_packs == 0, "{collected:?}");
    sample.restores(&sample.reopened(), &id, 2).unwrap();
}

#[test]
fn what_a_dead_writer_left_goes_when_its_session_has_expired() {
    let settings = short(place::settings(server(), "dead"));
    let sample = Sample::in_place(settings.clone());
    let other = Other::start(&settings);
    assert_eq!(sample.names_in("sessions").len(), 1);
    drop(other);
    let begun = Instant::now();
    let collected = loop {
        let collected = collect(&sample);
        if !collected.deferred {
            break collected;
        }
        assert!(begun.elapsed() < LIMIT, "{collected:?}");
        thread::sleep(Duration::from_millis(300));
    };
    assert!(begun.elapsed() >= EXPIRY / 2, "it was given time");
    assert!(collected.removed_packs > 0, "{collected:?}");
    assert_eq!(sample.names_in("packs"), [""; 0]);
    // Only that it was ended is still known.
    let sessions = sample.names_in("sessions");
    assert!(sessions.len() == 1 && sessions[0].ends_with(".verdict"), "{sessions:?}");
}

/// A writer is cut off, and another host takes it for dead. When it is back, it must not commit.
#[test]
fn a_writer_that_was_cut_off_does_not_commit() {
    let settings = short(place::settings(server(), "cut-off"));
    let sample = Sample::in_place(settings.clone());
    let old = sample.commit("old", 2);
    let proxy = Proxy::new(server().address());
    let mut through = settings.clone();
    through.endpoint = Some(proxy.endpoint());
    let store = Store::open(&Location::from(through)).unwrap();
    let writer = store.begin().unwrap();
    let manifest = sample.put_all(&writer, "new", 2).unwrap();
    sample.store.remove(&old).unwrap();
    assert!(collect(&sample).deferred);
    proxy.weather.refused.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    while collect(&sample).deferred {
        assert!(begun.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(sample.names_in("packs"), [""; 0]);
    proxy.weather.refused.store(false, Ordering::Relaxed);
    let lost = writer.commit(manifest);
    assert!(matches!(lost, Err(StoreError::SessionLost { .. })), "{lost:?}");
    assert_eq!(sample.store.list().unwrap().len(), 0);
    assert_eq!(sample.names_in("snapshots"), [""; 0]);
    // It can begin anew, also under the same name.
    let writer = store.begin().unwrap();
    let manifest = sample.put_all(&writer, "new", 2).unwrap();
    let id = writer.commit(manifest).unwrap();
    sample.restores(&sample.reopened(), &id, 2).unwrap();
}

/// Whatever both believe of the time: of a commit and a judgement one comes first, and the other knows it.
#[test]
fn who_comes_first_decides() {
    let settings = place::settings(server(), "verdict");
    let sample = Sample::in_place(settings.clone());
    let session = |sample: &Sample| {
        let sessions = sample.names_in("sessions");
        sessions.into_iter().find(|name| !name.contains('.')).unwrap()
    };
    // Judged dead, and it does not know.
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "late", 1).unwrap();
    let verdict = format!("sessions/{}.verdict", session(&sample));
    assert!(sample.backend.create(&verdict, b"ended\n").unwrap());
    let lost = writer.commit(manifest);
    assert!(matches!(lost, Err(StoreError::SessionLost { .. })), "{lost:?}");
    assert_eq!(sample.names_in("snapshots"), [""; 0]);
    assert_eq!(sample.names_in("names/pair"), [""; 0]);
    assert!(sample.backend.read(&verdict, 100).unwrap().is_some(), "it is remembered");
    sample.backend.remove(&verdict, None).unwrap();

    // Expired, but its manifest may be on its way: it counts until that cannot be any more.
    let settings = short(settings);
    let collector = Store::open(&Location::from(settings)).unwrap();
    sample.backend.create("sessions/0123", b"process 1\n").unwrap();
    sample.backend.create("sessions/0123.verdict", b"commits\n").unwrap();
    let begun = Instant::now();
    let options = CollectOptions::default();
    // There is something to collect: what the first one had staged.
    assert!(collector.collect(options, &mut none).unwrap().deferred);
    while collector.collect(options, &mut none).unwrap().deferred {
        assert!(begun.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(300));
    }
    assert!(begun.elapsed() >= EXPIRY / 2);
    assert_eq!(sample.names_in("sessions"), ["0123.verdict"]);
}
