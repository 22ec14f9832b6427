//! Too little room, on disk or in memory. These tests mount small file systems, as only root can; others are told so.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::posix_fallocate;

use crate::lab::{Lab, entries, is_root, ran, refusal, until};
use crate::traffic::{self, PAIR};

/// Takes all room that a file system has left.
fn fill(folder: &Path) {
    take(folder, "filler", i64::MAX);
}

/// Takes room without writing it, which would be too slow to come in between; at most `most` bytes.
fn take(folder: &Path, name: &str, most: i64) {
    let file = File::create(folder.join(name)).unwrap();
    let (mut length, mut chunk) = (0, 64 << 20);
    while chunk >= 4096 && length < most {
        match posix_fallocate(&file, length, chunk) {
            Ok(()) => length += chunk,
            Err(_) => chunk /= 2,
        }
    }
}

fn make_room(folder: &Path) {
    std::fs::remove_file(folder.join("filler")).unwrap();
}

#[test]
fn a_full_disk_undoes_a_snapshot() {
    if !is_root("mount a small file system") {
        return;
    }
    let mut lab = Lab::new();
    let home = lab.home();
    lab.mount(&home, 900);
    lab.up(PAIR);
    let mut arrived = traffic::start(&lab, "pair");

    // Full before it begins.
    fill(&home);
    let no_room = lab.refused(&["snapshot", "create", "before"]);
    assert_eq!(no_room.kind, "no-space", "{no_room:?}");
    make_room(&home);
    arrived = traffic::goes_on_whole(&lab, "pair", &arrived);

    // Full while it is being stored. There is just enough for it to begin.
    take(&home, "ballast", 500 << 20);
    let incoming = home.join("store/incoming");
    let command = lab.begin(&["snapshot", "create", "within"]);
    let begun = Instant::now();
    while entries(&incoming).is_empty() && begun.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(1));
    }
    fill(&home);
    let left = ran(command.wait_with_output().unwrap());
    assert_eq!(left.status, Some(1), "{left:?}");
    assert_eq!(refusal(&left).kind, "no-space", "{left:?}");
    // Whatever it had written is given back, and everything else still works.
    lab.assert_nothing_partial();
    assert_eq!(lab.snapshots(), [""; 0]);
    arrived = traffic::goes_on_whole(&lab, "pair", &arrived);
    make_room(&home);
    std::fs::remove_file(home.join("ballast")).unwrap();
    lab.snapshot("pair", &["after"]);
    lab.verify("after");

    // Restores need little, but not nothing; the running environment does not pay for it.
    fill(&home);
    let left = lab.run(&["restore", "after", "--json"]);
    if left.status != Some(0) {
        assert_eq!(refusal(&left).kind, "no-space", "{left:?}");
        arrived = traffic::goes_on_whole(&lab, "pair", &arrived);
    }
    make_room(&home);
    lab.ok(&["restore", "after"]);
    traffic::goes_on_from_here(&lab, "pair", &arrived);
    lab.finish();
}

#[test]
fn too_little_memory_for_the_cache() {
    if !is_root("mount a small file system") {
        return;
    }
    let mut lab = Lab::new();
    let runtime = lab.runtime();
    lab.mount(&runtime, 400);
    lab.up(PAIR);
    let mut arrived = traffic::start(&lab, "pair");

    // It fills while pages are being copied.
    let ram = runtime.join("ram");
    let command = lab.begin(&["snapshot", "create", "within"]);
    until("the capture's files", || {
        let folders = entries(&ram);
        let folder = folders.iter().find(|name| name.starts_with("new-"))?;
        (!entries(&ram.join(folder)).is_empty()).then_some(())
    });
    fill(&runtime);
    let left = ran(command.wait_with_output().unwrap());
    assert_eq!(left.status, Some(1), "{left:?}");
    assert_eq!(refusal(&left).kind, "no-space", "{left:?}");
    lab.assert_nothing_partial();
    assert_eq!(lab.snapshots(), [""; 0]);
    arrived = traffic::goes_on(&lab, "pair", &arrived);

    // Known to be too little: memory goes to the disk, at once and back.
    let spilled = lab.snapshot("pair", &["spilled"]);
    assert_eq!(spilled["capture"], "live");
    lab.verify("spilled");
    arrived = traffic::goes_on(&lab, "pair", &arrived);
    lab.ok(&["restore", "spilled"]);
    let now = until("traffic", || traffic::look(&lab, "pair"));
    assert_eq!(now.connection, arrived.connection);
    arrived = traffic::goes_on(&lab, "pair", &now);

    // Machines that run from disk are still captured, one way or another.
    make_room(&runtime);
    lab.snapshot("pair", &["from-disk"]);
    arrived = traffic::goes_on(&lab, "pair", &arrived);
    lab.ok(&["restore", "spilled"]);
    let now = until("traffic", || traffic::look(&lab, "pair"));
    assert_eq!(now.connection, arrived.connection);
    traffic::goes_on(&lab, "pair", &now);
    lab.finish();
}
