//! Reading, writing, and what happens when etcd is not there.

use std::time::Duration;

use diorama_cluster::Directory;
use diorama_cluster::directory::{
    DirectoryError, EnvironmentRecord, EtcdConfig, Freshness, MAX_RECORD_BYTES, Options, Revision,
};

use crate::etcd::Etcd;
use crate::wire::Wire;
use crate::{CLUSTER, LIMIT, PREFIX, environment, host, member, name, options, shows, status};

fn open(etcd: &Etcd, number: u8) -> Directory {
    Directory::etcd(&etcd.config(), CLUSTER, host(number), options()).unwrap()
}

/// Writes something new, as whoever starts an environment does.
async fn put(directory: &Directory, id: &str) -> Result<Revision, DirectoryError> {
    let lock = directory.lock(&name(id), "up").await?;
    let put = directory.put_environment(&environment(id, 1), None, &lock).await;
    lock.release().await?;
    put
}

#[tokio::test]
async fn hosts_see_each_other_come_and_go() {
    let etcd = Etcd::start();
    let one = open(&etcd, 1);
    one.announce(status(100));
    one.fresh(LIMIT).await.unwrap();
    assert!(one.view().hosts.is_empty(), "not a member yet");
    one.found(&member(1)).await.unwrap();
    assert!(matches!(one.found(&member(2)).await, Err(DirectoryError::Exists { .. })));
    shows(&one, "its own status", |view| view.is_alive(host(1))).await;

    let two = open(&etcd, 2);
    let view = two.fresh(LIMIT).await.unwrap();
    assert_eq!(view.members.get(host(1)), Some(&member(1)));
    assert_eq!(view.hosts[&host(1)].value.free_memory_bytes, 100);
    one.announce(status(50));
    shows(&two, "a new status", |view| view.hosts[&host(1)].value.free_memory_bytes == 50).await;

    two.change_member(host(1), |member| member.draining = true).await.unwrap();
    assert!(two.view().members.get(host(1)).unwrap().draining, "a write is seen by its writer at once");
    shows(&one, "the change", |view| view.members.get(host(1)).unwrap().draining).await;
    assert!(one.view().candidates(&[].into())[0].draining);
    let missing = two.change_member(host(3), |_| ()).await.unwrap_err();
    assert_eq!(missing, DirectoryError::Missing { what: format!("host {}", host(3)) });

    // Without a word its lease ends; with one, at once.
    drop(one);
    shows(&two, "a lost host", |view| !view.is_alive(host(1)) && view.members.get(host(1)).is_some()).await;
    let one = open(&etcd, 1);
    one.announce(status(1));
    shows(&two, "it is back", |view| view.is_alive(host(1))).await;
    one.leave().await.unwrap();
    shows(&two, "it has left", |view| !view.is_alive(host(1))).await;

    let one = open(&etcd, 1);
    one.announce(status(1));
    shows(&two, "it is back", |view| view.is_alive(host(1))).await;
    let mut members = two.members();
    members.borrow_and_update();
    two.remove_member(host(1)).await.unwrap();
    assert!(members.has_changed().unwrap() && members.borrow().get(host(1)).is_none());
    shows(&one, "it knows", |view| view.members.is_empty()).await;
    // It may say what it wants: it is not there any more.
    one.announce(status(7));
    put(&two, "s").await.unwrap();
    shows(&one, "something later", |view| !view.environments.is_empty()).await;
    assert!(!one.view().hosts.contains_key(&host(1)));
    assert_eq!(one.view().removed[&host(1)].value.name.as_str(), "h1", "it can tell this from lost data");
    one.forget_removed(host(1)).await.unwrap();
    shows(&two, "it has heard of it", |view| view.removed.is_empty()).await;
    two.found(&member(1)).await.unwrap();
    two.remove_member(host(1)).await.unwrap();
    two.found(&member(1)).await.unwrap();
    assert!(two.view().removed.is_empty(), "it is back");
}

#[tokio::test]
async fn writes_are_based_on_what_is_there() {
    let etcd = Etcd::start();
    let (one, two) = (open(&etcd, 1), open(&etcd, 2));
    one.fresh(LIMIT).await.unwrap();
    two.fresh(LIMIT).await.unwrap();
    let lock = one.lock(&name("pair"), "up").await.unwrap();
    let made = one.put_environment(&environment("pair", 1), None, &lock).await.unwrap();
    assert!(matches!(
        one.put_environment(&environment("pair", 2), None, &lock).await,
        Err(DirectoryError::Exists { .. })
    ));
    assert!(matches!(
        one.put_environment(&environment("other", 1), None, &lock).await,
        Err(DirectoryError::LockLost(_))
    ));
    assert_eq!(*one.view().environments["pair"].value, environment("pair", 1));
    assert_eq!(one.view().environments["pair"].revision, made);
    let moved = one.put_environment(&environment("pair", 2), Some(made), &lock).await.unwrap();
    let conflict = DirectoryError::Conflict { what: "the environment `pair`".into() };
    assert_eq!(one.put_environment(&environment("pair", 3), Some(made), &lock).await, Err(conflict.clone()));
    assert_eq!(*one.view().environments["pair"].value, environment("pair", 2), "who fails sees why");
    assert_eq!(one.remove_environment(&name("pair"), made, &lock).await, Err(conflict));

    let detailed = |bytes: usize| EnvironmentRecord {
        detail: serde_json::Value::String("x".repeat(bytes)),
        ..environment("pair", 1)
    };
    let large = one.put_environment(&detailed(MAX_RECORD_BYTES), Some(moved), &lock).await;
    assert!(matches!(large, Err(DirectoryError::TooLarge { .. })), "{large:?}");
    // The longest that fits does fit.
    let empty = serde_json::to_string(&detailed(0)).unwrap().len();
    let longest = one.put_environment(&detailed(MAX_RECORD_BYTES - empty), Some(moved), &lock).await.unwrap();
    one.remove_environment(&name("pair"), longest, &lock).await.unwrap();
    shows(&two, "it is gone", |view| view.environments.is_empty()).await;
}

/// etcd's answer to a watch that begins names the revision that etcd has reached, before it sends what led there.
#[tokio::test]
async fn a_view_shows_all_that_led_to_its_revision() {
    let etcd = Etcd::start();
    let writer = open(&etcd, 1);
    writer.fresh(LIMIT).await.unwrap();
    let lock = writer.lock(&name("pair"), "up").await.unwrap();
    let mut written = vec![writer.put_environment(&environment("pair", 1), None, &lock).await.unwrap()];
    let readers = async {
        let mut seen = Vec::new();
        let wire = Wire::long(etcd.address(), Duration::from_millis(5)).await;
        let far = EtcdConfig::at([format!("http://{}", wire.address())]);
        for number in 2..5 {
            let reader = Directory::etcd(&far, CLUSTER, host(number), options()).unwrap();
            let mut view = reader.watch();
            let follows = async {
                loop {
                    view.changed().await.unwrap();
                    let view = view.borrow_and_update();
                    if view.is_fresh() {
                        seen.push((view.revision, view.environments["pair"].revision));
                    }
                }
            };
            // Longer than etcd takes to send what a new watch has missed.
            let _ = tokio::time::timeout(Duration::from_millis(300), follows).await;
        }
        seen
    };
    let writes = async {
        loop {
            let based_on = written.last().copied();
            written.push(writer.put_environment(&environment("pair", 1), based_on, &lock).await.unwrap());
        }
    };
    let seen = tokio::select! { seen = readers => seen, () = writes => unreachable!() };
    assert!(seen.len() > 10, "{} views", seen.len());
    for (revision, shown) in seen {
        let due = written.iter().rev().find(|written| **written <= revision).unwrap();
        assert!(shown >= *due, "at revision {revision}: the change of {shown}, not that of {due}");
    }
}

#[tokio::test]
async fn many_entries_and_what_is_none_of_ours() {
    let etcd = Etcd::start();
    let one = open(&etcd, 1);
    one.fresh(LIMIT).await.unwrap();
    // More than one page.
    for number in 0..450 {
        let id = format!("s{number}");
        etcd.put(
            &format!("{PREFIX}environments/{id}"),
            serde_json::to_string(&environment(&id, 1)).unwrap().as_bytes(),
        );
    }
    etcd.put(&format!("{PREFIX}environments/bad"), b"{");
    etcd.put(&format!("{PREFIX}members/xyz"), b"null");
    etcd.put(&format!("{PREFIX}environments/..%2f"), &[0xff, 0xfe]);
    etcd.put(&format!("{PREFIX}future/thing"), b"something newer");
    etcd.put("/diorama/v1/bbbbbbbbbbbbbbbb/environments/s", b"another cluster's");
    let two = open(&etcd, 2);
    let view = two.fresh(LIMIT).await.unwrap();
    assert_eq!(view.environments.len(), 450);
    assert_eq!(view.unreadable, ["environments/bad", "members/xyz"]);
    shows(&one, "the same by a watch", |view| view.environments.len() == 450).await;
    etcd.put(&format!("{PREFIX}environments/s1"), b"{");
    shows(&one, "what turned unreadable", |view| view.unreadable.contains(&"environments/s1".to_owned()))
        .await;
    assert_eq!(one.view().environments.len(), 449);
    etcd.delete(&format!("{PREFIX}environments/s1"));
    etcd.delete(&format!("{PREFIX}environments/bad"));
    shows(&one, "it is gone", |view| view.unreadable == ["members/xyz"]).await;
}

#[tokio::test]
async fn etcd_dies_and_comes_back() {
    let mut etcd = Etcd::start();
    let (one, two) = (open(&etcd, 1), open(&etcd, 2));
    one.announce(status(100));
    one.fresh(LIMIT).await.unwrap();
    one.found(&member(1)).await.unwrap();
    put(&one, "s").await.unwrap();
    for directory in [&one, &two] {
        shows(directory, "host and environment", |view| {
            view.is_alive(host(1)) && !view.environments.is_empty()
        })
        .await;
    }

    etcd.kill();
    shows(&one, "stale", |view| !view.is_fresh()).await;
    shows(&two, "stale", |view| !view.is_fresh()).await;
    let view = one.view();
    assert!(view.is_alive(host(1)) && view.environments.contains_key("s"), "the last that was known");
    let Freshness::Stale { since, .. } = &view.freshness else { panic!("stale") };
    let error = put(&one, "t").await.unwrap_err();
    assert!(matches!(error, DirectoryError::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains(&etcd.address().to_string()), "says where: {error}");
    let error = one.fresh(Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, DirectoryError::Unavailable { .. }), "{error}");
    let still = one.view();
    let Freshness::Stale { since: still, .. } = &still.freshness else { panic!("stale") };
    assert_eq!(since, still, "since when it was lost, not since the last attempt");
    // Longer than the lease.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(matches!(one.lock(&name("pair"), "x").await, Err(DirectoryError::Unavailable { .. })));

    etcd.start_again();
    one.fresh(LIMIT).await.unwrap();
    shows(&two, "fresh again, the host there again", |view| view.is_fresh() && view.is_alive(host(1))).await;
    put(&one, "t").await.unwrap();
    shows(&two, "changes arrive again", |view| view.environments.contains_key("t")).await;
}

#[tokio::test]
async fn etcd_that_does_not_answer() {
    let etcd = Etcd::start();
    let one = open(&etcd, 1);
    one.fresh(LIMIT).await.unwrap();
    let lock = one.lock(&name("s"), "up").await.unwrap();
    etcd.freeze();
    let error = one.put_environment(&environment("s", 1), None, &lock).await.unwrap_err();
    assert!(matches!(error, DirectoryError::Unavailable { perhaps_done: true, .. }), "{error}");
    shows(&one, "stale", |view| !view.is_fresh()).await;
    etcd.resume();
    shows(&one, "fresh", |view| view.is_fresh()).await;
    // Perhaps it was: then the view shows it, and the same write says so.
    let done = one.view().environments.contains_key("s");
    drop(lock);
    shows(&one, "the lock given back", |view| view.locks.is_empty()).await;
    let again = put(&one, "s").await;
    assert_eq!(done, matches!(again, Err(DirectoryError::Exists { .. })), "{again:?}");
}

#[tokio::test]
async fn an_agent_that_starts_without_etcd_knows_its_cluster() {
    let mut etcd = Etcd::start();
    let remembered = etcd.folder("remembered");
    let options = || Options { remembered: Some(remembered.clone()), ..options() };
    let one = Directory::etcd(&etcd.config(), CLUSTER, host(1), options()).unwrap();
    one.announce(status(1));
    one.fresh(LIMIT).await.unwrap();
    one.found(&member(1)).await.unwrap();
    let written = tokio::time::timeout(LIMIT, async {
        while !std::fs::read_to_string(&remembered).is_ok_and(|text| text.contains("members/")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    written.await.expect("the view is written down");
    drop(one);
    etcd.kill();
    let one = Directory::etcd(&etcd.config(), CLUSTER, host(1), options()).unwrap();
    let view = one.view();
    assert!(!view.is_fresh());
    assert_eq!(view.members.get(host(1)), Some(&member(1)));
    assert_eq!(one.members().borrow().len(), 1, "TLS knows who may talk");
    assert!(view.hosts.is_empty(), "who is there is of the moment");
    etcd.start_again();
    one.announce(status(1));
    shows(&one, "all of it", |view| view.is_fresh() && view.is_alive(host(1))).await;

    std::fs::write(&remembered, "{").unwrap();
    let damaged = Directory::etcd(&etcd.config(), CLUSTER, host(1), options()).unwrap_err().to_string();
    assert!(damaged.contains("remembered"), "{damaged}");
}

#[tokio::test]
async fn nothing_is_written_down_after_the_end() {
    let etcd = Etcd::start();
    for round in 0..20 {
        let folder = etcd.folder(&format!("remembered{round}"));
        let options = Options { remembered: Some(folder.join("view")), ..options() };
        let one = Directory::etcd(&etcd.config(), CLUSTER, host(1), options).unwrap();
        let files = || std::fs::read_dir(&folder).map_or(0, Iterator::count);
        let begun = tokio::time::timeout(LIMIT, async {
            while files() == 0 {
                tokio::task::yield_now().await;
            }
        });
        begun.await.expect("it is being written down");
        one.end().await;
        std::fs::remove_file(folder.join("view")).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(files(), 0);
    }
}

#[tokio::test]
async fn one_of_several_addresses_is_enough() {
    let (absent, etcd) = (Etcd::absent(), Etcd::start());
    let config =
        EtcdConfig::at([format!("http://{}", absent.address()), format!("http://{}", etcd.address())]);
    let one = Directory::etcd(&config, CLUSTER, host(1), options()).unwrap();
    one.fresh(LIMIT).await.unwrap();
    put(&one, "s").await.unwrap();

    let error =
        Directory::etcd(&EtcdConfig::at(["not an address"]), CLUSTER, host(1), options()).unwrap_err();
    assert!(error.to_string().contains("not an address"), "{error}");
    let none: [String; 0] = [];
    assert!(Directory::etcd(&EtcdConfig::at(none), CLUSTER, host(1), options()).is_err());
}

#[tokio::test]
async fn a_host_that_is_alone_needs_no_etcd() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("directory.json");
    let token = {
        let alone = Directory::local(&path, host(1)).unwrap();
        alone.announce(status(5));
        alone.fresh(LIMIT).await.unwrap();
        alone.found(&member(1)).await.unwrap();
        shows(&alone, "it is there", |view| view.is_alive(host(1))).await;
        let lock = alone.lock(&name("pair"), "up").await.unwrap();
        assert!(matches!(alone.lock(&name("pair"), "up").await, Err(DirectoryError::Held { .. })));
        alone.put_environment(&environment("pair", 1), None, &lock).await.unwrap();
        let made = alone.view().environments["pair"].revision;
        assert!(matches!(
            alone.put_environment(&environment("pair", 2), Some(made + 1), &lock).await,
            Err(DirectoryError::Conflict { .. })
        ));
        lock.token()
    };
    // As after a crash: the lock and the status went with the process, the rest stays.
    let alone = Directory::local(&path, host(1)).unwrap();
    let view = alone.fresh(LIMIT).await.unwrap();
    assert!(view.environments.contains_key("pair"));
    assert_eq!(view.members.get(host(1)), Some(&member(1)));
    assert!(view.hosts.is_empty());
    let lock = alone.lock(&name("pair"), "up").await.unwrap();
    assert!(lock.token() > token, "tokens never repeat");
    lock.release().await.unwrap();
    assert!(alone.view().locks.is_empty());
}
