//! The initiator's lock: one at a time, and lost before it is another's.

use std::time::Duration;

use diorama_cluster::Directory;
use diorama_cluster::directory::{DirectoryError, EtcdConfig, InitiatorLock};

use crate::etcd::Etcd;
use crate::wire::Wire;
use crate::{CLUSTER, LIMIT, PREFIX, environment, host, name, options, shows};

fn open(etcd: &Etcd, number: u8) -> Directory {
    Directory::etcd(&etcd.config(), CLUSTER, host(number), options()).unwrap()
}

/// Takes the lock as soon as it can be had.
async fn take(directory: &Directory, environment: &str) -> InitiatorLock {
    let taken = async {
        loop {
            match directory.lock(&name(environment), "test").await {
                Ok(lock) => return lock,
                Err(DirectoryError::Held { .. } | DirectoryError::Unavailable { .. }) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(LIMIT, taken).await.expect("the lock can be had")
}

#[tokio::test]
async fn one_holds_it_at_a_time() {
    let etcd = Etcd::start();
    let (one, two) = (open(&etcd, 1), open(&etcd, 2));
    let first = take(&one, "pair").await;
    two.fresh(LIMIT).await.unwrap();
    let held = two.lock(&name("pair"), "snapshot").await.unwrap_err();
    let DirectoryError::Held { lock, .. } = &held else { panic!("{held}") };
    assert_eq!((lock.holder, lock.purpose.as_str()), (host(1), "test"));
    assert!(held.to_string().contains(&host(1).to_string()), "{held}");
    let other = two.lock(&name("other"), "snapshot").await.unwrap();
    assert_eq!(first.check(), Ok(first.token()));
    // Longer than a lease: it is kept alive.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(first.check(), Ok(first.token()));
    let token = first.token();
    first.release().await.unwrap();
    let second = two.lock(&name("pair"), "snapshot").await.unwrap();
    assert!(second.token() > token && second.token() > other.token());
    // Dropped, it is given back as well.
    drop(second);
    let third = take(&one, "pair").await;
    assert!(third.token() > token);
}

#[tokio::test]
async fn of_many_that_want_it_one_gets_it() {
    let etcd = Etcd::start();
    let directories: Vec<Directory> = (1..=8).map(|number| open(&etcd, number)).collect();
    for directory in &directories {
        directory.fresh(LIMIT).await.unwrap();
    }
    for _ in 0..10 {
        let mut attempts = tokio::task::JoinSet::new();
        for directory in directories.clone() {
            attempts.spawn(async move { directory.lock(&name("pair"), "race").await });
        }
        let results = attempts.join_all().await;
        let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!((won.len(), lost.len()), (1, 7));
        for error in lost {
            assert!(matches!(error, Err(DirectoryError::Held { .. })), "{error:?}");
        }
        for lock in won {
            lock.unwrap().release().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_holder_that_is_cut_off_knows_before_another_can_hold_it() {
    let etcd = Etcd::start();
    let wire = Wire::to(etcd.address()).await;
    let near = EtcdConfig::at([format!("http://{}", wire.address())]);
    let one = Directory::etcd(&near, CLUSTER, host(1), options()).unwrap();
    let two = open(&etcd, 2);
    two.fresh(LIMIT).await.unwrap();
    let lock = take(&one, "pair").await;
    let made = one.put_environment(&environment("pair", 1), None, &lock).await.unwrap();

    wire.cut();
    let watcher = async {
        // Whenever the other gets it, this one must have lost it.
        let second = take(&two, "pair").await;
        assert!(lock.check().is_err(), "two hold it");
        second
    };
    let (second, lost) = tokio::join!(watcher, lock.lost());
    assert_eq!(lost.environment, name("pair"));
    assert!(second.token() > lock.token());
    let taken_over = two.put_environment(&environment("pair", 2), Some(made), &second).await.unwrap();

    // The wire is mended: what was lost stays lost, and nothing is written under it.
    wire.mend();
    one.fresh(LIMIT).await.unwrap();
    assert!(lock.check().is_err());
    assert!(matches!(
        one.put_environment(&environment("pair", 1), Some(taken_over), &lock).await,
        Err(DirectoryError::LockLost(_))
    ));
    drop(lock);
    assert!(second.check().is_ok(), "giving back what was lost takes nothing from who holds it");
    assert!(matches!(one.lock(&name("pair"), "again").await, Err(DirectoryError::Held { .. })));
    drop(second);
    take(&one, "pair").await;
}

#[tokio::test]
async fn etcd_itself_refuses_a_holder_whose_lock_is_gone() {
    let etcd = Etcd::start();
    let one = open(&etcd, 1);
    let lock = take(&one, "pair").await;
    // Taken away by hand: until the watch says so the holder cannot know, but etcd does.
    etcd.delete(&format!("{PREFIX}locks/pair"));
    let written = one.put_environment(&environment("pair", 1), None, &lock).await;
    assert!(matches!(written, Err(DirectoryError::LockLost(_))), "{written:?}");
    tokio::time::timeout(LIMIT, lock.lost()).await.expect("it is told");
    assert!(one.view().environments.is_empty());
}

#[tokio::test]
async fn a_lock_given_back_while_etcd_is_away_is_free_afterwards() {
    let mut etcd = Etcd::start();
    let (one, two) = (open(&etcd, 1), open(&etcd, 2));
    let lock = take(&one, "pair").await;
    two.fresh(LIMIT).await.unwrap();
    etcd.kill();
    shows(&one, "stale", |view| !view.is_fresh()).await;
    assert!(lock.release().await.is_err(), "it says that it could not");
    etcd.start_again();
    take(&two, "pair").await;
}

#[tokio::test]
async fn a_lock_outlives_a_short_absence_of_etcd() {
    let etcd = Etcd::start();
    let wire = Wire::to(etcd.address()).await;
    let near = EtcdConfig::at([format!("http://{}", wire.address())]);
    let options = diorama_cluster::directory::Options { lease: Duration::from_secs(30), remembered: None };
    let one = Directory::etcd(&near, CLUSTER, host(1), options).unwrap();
    let lock = take(&one, "pair").await;
    wire.cut();
    let error = one.put_environment(&environment("pair", 1), None, &lock).await.unwrap_err();
    assert!(matches!(error, DirectoryError::Unavailable { .. }), "{error}");
    assert_eq!(lock.check(), Ok(lock.token()), "its lease goes on");
    wire.mend();
    shows(&one, "fresh", |view| view.is_fresh()).await;
    assert_eq!(lock.check(), Ok(lock.token()));
    one.put_environment(&environment("pair", 1), None, &lock).await.unwrap();
}

#[tokio::test]
async fn a_lock_of_a_process_that_died_is_free_when_its_host_is_back() {
    let etcd = Etcd::start();
    let two = open(&etcd, 2);
    two.fresh(LIMIT).await.unwrap();
    // Longer than this test waits for anything.
    let long = || diorama_cluster::directory::Options { lease: 3 * LIMIT, remembered: None };
    let one = Directory::etcd(&etcd.config(), CLUSTER, host(1), long()).unwrap();
    let lock = take(&one, "pair").await;
    let token = lock.token();
    // As by a SIGKILL: nothing is given back, and the lease goes on.
    std::mem::forget(lock);
    let other = take(&two, "other").await;
    assert!(matches!(two.lock(&name("pair"), "snapshot").await, Err(DirectoryError::Held { .. })));
    let _again = Directory::etcd(&etcd.config(), CLUSTER, host(1), long()).unwrap();
    assert!(take(&two, "pair").await.token() > token);
    assert_eq!(other.check(), Ok(other.token()), "another host's lock is left alone");
}
