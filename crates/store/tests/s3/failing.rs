//! What goes wrong between a store and its server, and how it is said.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use diorama_store::backend::Backend;
use diorama_store::backend::s3::{S3, S3Settings};
use diorama_store::*;

use crate::place::{self, server};
use crate::proxy::Proxy;
use crate::s3_server::Server;
use crate::sample::*;

fn problem(result: Result<impl Sized, StoreError>) -> (RemoteProblem, String) {
    match result {
        Err(error @ StoreError::Remote { problem, .. }) => (problem, error.to_string()),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it worked"),
    }
}

fn open(settings: &S3Settings) -> Result<Store, StoreError> {
    Store::open(&Location::from(settings.clone()))
}

#[test]
fn settings_that_lead_nowhere_are_told_apart() {
    let good = place::settings(server(), "nowhere");
    let mut settings = good.clone();
    settings.bucket = "not-there".to_owned();
    let (kind, text) = problem(open(&settings));
    assert_eq!(kind, RemoteProblem::NoBucket, "{text}");
    assert!(text.contains("s3://not-there") && text.contains(&server().endpoint()), "{text}");

    let mut settings = good.clone();
    settings.credentials.as_mut().unwrap().secret_access_key = "another".to_owned();
    let (kind, text) = problem(open(&settings));
    assert_eq!(kind, RemoteProblem::Denied, "{text}");
    assert!(text.contains("SignatureDoesNotMatch") && !text.contains("another"), "{text}");
    settings.credentials.as_mut().unwrap().access_key_id = "nobody".to_owned();
    let (kind, text) = problem(open(&settings));
    assert_eq!(kind, RemoteProblem::Denied, "{text}");
    assert!(text.contains("InvalidAccessKeyId"), "{text}");

    let mut settings = good.clone();
    let nobody = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    settings.endpoint = Some(format!("http://{nobody}"));
    let begun = Instant::now();
    let (kind, text) = problem(open(&settings));
    assert_eq!(kind, RemoteProblem::Unreachable, "{text}");
    assert!(text.contains("refused") && text.contains("times"), "{text}");
    assert!(begun.elapsed() < settings.timing.first_patience + Duration::from_secs(10));
    // The agent starts all the same, and everything says why it fails.
    settings.timing.first_patience = Duration::from_millis(200);
    let later = Store::open_later(&Location::from(settings), &OpenOptions::default()).unwrap();
    assert_eq!(problem(later.begin()).0, RemoteProblem::Unreachable);
    assert_eq!(problem(later.list()).0, RemoteProblem::Unreachable);

    // Looking changes nothing.
    Location::from(good.clone()).reach().unwrap();
    assert_eq!(S3::open(&good).unwrap().list("").unwrap(), []);
}

#[test]
fn what_is_not_a_store_is_left_alone() {
    let settings = place::settings(server(), "foreign");
    let bucket = S3::open(&settings).unwrap();
    bucket.create("thesis.tex", b"...").unwrap();
    assert!(matches!(open(&settings), Err(StoreError::NotAStore { .. })));
    assert_eq!(bucket.list("").unwrap().len(), 1);
    bucket.remove("thesis.tex", None).unwrap();
    bucket.create("format", b"diorama-store/9\n").unwrap();
    assert!(matches!(open(&settings), Err(StoreError::UnsupportedStore { .. })));
}

/// Two processes' worth of clients, each of which has not seen the other.
#[test]
fn of_many_that_create_the_same_one_does() {
    let settings = place::settings(server(), "race");
    let buckets: Vec<S3> = (0..6).map(|_| S3::open(&settings).unwrap()).collect();
    for round in 0..10 {
        let key = format!("names/lab/{round}");
        let created: Vec<bool> = thread::scope(|scope| {
            let threads: Vec<_> = (0_u8..)
                .zip(&buckets)
                .map(|(number, bucket)| {
                    let key = &key;
                    scope.spawn(move || bucket.create(key, &[number]).unwrap())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let winner = created.iter().position(|created| *created).unwrap();
        assert_eq!(created.iter().filter(|created| **created).count(), 1, "{created:?}");
        assert_eq!(buckets[0].read(&key, 10).unwrap().unwrap(), [winner as u8]);
        assert!(!buckets[1].remove(&key, Some(&[winner as u8 + 1])).unwrap());
        assert!(buckets[1].remove(&key, Some(&[winner as u8])).unwrap());
        assert!(!buckets[1].remove(&key, None).unwrap());
    }
}

/// Connections break, again and again, wherever they are; everything works in the end.
#[test]
fn cut_connections_are_made_again() {
    let proxy = Proxy::new(server().address());
    let mut settings = place::settings(server(), "cut");
    settings.endpoint = Some(proxy.endpoint());
    let sample = Sample::in_place(settings.clone());
    // No pack of the second snapshot comes through on a connection that has carried one before.
    proxy.weather.cut_after.store(400_000, Ordering::Relaxed);
    let ids: Vec<SnapshotId> = (1..4).map(|seed| sample.commit(&format!("s{seed}"), seed)).collect();
    let store = sample.reopened();
    for (seed, id) in (1..).zip(&ids) {
        sample.restores(&store, id, seed).unwrap();
    }
    assert_eq!(store.list().unwrap().len(), 3);
    assert!(store.check(ALL, &mut none).unwrap().is_sound());
    assert!(proxy.weather.cuts.load(Ordering::Relaxed) > 3, "{:?}", proxy.weather);
}

#[test]
fn a_server_that_does_not_answer_is_given_up_and_nothing_remains() {
    let proxy = Proxy::new(server().address());
    let mut settings = place::settings(server(), "silent");
    settings.endpoint = Some(proxy.endpoint());
    settings.timing.attempt = Duration::from_millis(700);
    settings.timing.patience = Duration::from_millis(1500);
    let sample = Sample::in_place(settings.clone());
    let whole = sample.commit("whole", 1);
    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "lost", 2).unwrap();
    proxy.weather.stalled.store(true, Ordering::Relaxed);
    let (kind, text) = problem(writer.commit(manifest));
    assert!(matches!(kind, RemoteProblem::Silent | RemoteProblem::Unreachable), "{text}");
    proxy.weather.stalled.store(false, Ordering::Relaxed);
    let store = sample.reopened();
    assert_eq!(store.list().unwrap().len(), 1);
    sample.restores(&store, &whole, 1).unwrap();
    sample.commit("again", 2);
}

/// The server dies while packs are on their way, and comes back: in time, or too late.
#[test]
fn a_server_that_dies_in_a_commit_and_comes_back() {
    let mut server = Server::start();
    let settings = place::settings(&server, "dies");
    let sample = Sample::in_place(settings.clone());
    let whole = sample.commit("whole", 1);

    let writer = sample.store.begin().unwrap();
    let manifest = sample.put_all(&writer, "patient", 2).unwrap();
    server.kill();
    let committing = thread::spawn(move || writer.commit(manifest));
    thread::sleep(Duration::from_millis(300));
    server.start_again();
    let patient = committing.join().unwrap().unwrap();

    let mut hasty = settings.clone();
    hasty.timing.patience = Duration::from_millis(300);
    let store = open(&hasty).unwrap();
    let writer = store.begin().unwrap();
    let manifest = sample.put_all(&writer, "hasty", 3).unwrap();
    server.kill();
    let (kind, text) = problem(writer.commit(manifest));
    assert_eq!(kind, RemoteProblem::Unreachable, "{text}");
    server.start_again();

    let store = sample.reopened();
    assert_eq!(store.list().unwrap().len(), 2);
    sample.restores(&store, &whole, 1).unwrap();
    sample.restores(&store, &patient, 2).unwrap();
    assert!(store.check(ALL, &mut none).unwrap().is_sound());
    let writer = store.begin().unwrap();
    let manifest = sample.put_all(&writer, "hasty", 3).unwrap();
    writer.commit(manifest).unwrap();
}
