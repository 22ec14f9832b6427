//! Snapshots carried to another computer: by a file, by a pipe, from store to store.

use std::process::Stdio;

use crate::lab::{Lab, entries, interrupt, ran, refusal, until};
use crate::traffic::{self, PAIR};

/// Whether a command of this lab's has its standard input or output in the agent's hands.
fn pipes(lab: &Lab) -> bool {
    entries(&lab.runtime()).iter().any(|name| name.starts_with("pipe-"))
}

#[test]
fn a_snapshot_goes_on_elsewhere() {
    let (here, there) = (Lab::new(), Lab::new());
    here.up(PAIR);
    let arrived = traffic::start(&here, "pair");
    let snapshot = here.snapshot("pair", &["base", "-m", "to go"]);
    let id = snapshot["id"].as_str().unwrap();
    traffic::goes_on_whole(&here, "pair", &arrived);

    // By a file, which is not written over, nor left half-written.
    let exported = here.ok(&["export", "base"]);
    let file = here.folder().join("base.diorama");
    assert_eq!(exported["file"], file.to_str().unwrap());
    assert_eq!(exported["file_bytes"], std::fs::metadata(&file).unwrap().len());
    assert_eq!(here.refused(&["export", "base"]).kind, "name-in-use");
    here.ok(&["export", "base", "--force"]);
    let file = file.to_str().unwrap();
    assert_eq!(here.refused(&["export", "base", "-o", "/nowhere/at/all"]).kind, "io");
    assert!(entries(here.folder()).iter().all(|name| !name.contains("partial")));

    // A damaged one is refused, and nothing of it is there.
    let mut bytes = std::fs::read(file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    let damaged = there.folder().join("damaged.diorama");
    std::fs::write(&damaged, &bytes).unwrap();
    let refused = there.refused(&["import", damaged.to_str().unwrap()]);
    assert_eq!(refused.kind, "corrupt", "{refused:?}");
    std::fs::write(&damaged, &bytes[..at]).unwrap();
    let refused = there.refused(&["import", damaged.to_str().unwrap()]);
    assert!(refused.message.contains("cut off"), "{refused:?}");
    assert_eq!(there.snapshots(), [""; 0]);
    there.assert_nothing_partial();
    assert_eq!(there.ok(&["store", "check", "--read-data"])["ok"], true);

    let imported = there.ok(&["import", file]);
    assert_eq!((imported["id"].as_str(), &imported["was_there"]), (Some(id), &false.into()));
    assert_eq!(imported["new_chunks"], imported["chunks"]);
    there.verify("base");
    there.ok(&["restore", "base"]);
    traffic::goes_on_from_here(&there, "pair", &arrived);
    let shown = there.ok(&["snapshot", "show", "base"]);
    assert_eq!((&shown["message"], &shown["cut"]), (&"to go".into(), &snapshot["cut"]));

    // Through a pipe, where it is already.
    let mut export = here.command(&["export", "base", "-o", "-"]).stdout(Stdio::piped()).spawn().unwrap();
    let import = there
        .command(&["import", "-", "--json"])
        .stdin(export.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let left = ran(import.wait_with_output().unwrap());
    assert!(export.wait().unwrap().success());
    assert_eq!(left.status, Some(0), "{left:?}");
    let again: serde_json::Value = serde_json::from_str(&left.stdout).unwrap();
    assert_eq!((&again["was_there"], &again["new_bytes"]), (&true.into(), &0.into()), "{again}");
    // Standard input that ends too early.
    let left = there.run_with_input(&["import", "-", "--json"], &bytes[..1000]);
    assert_eq!((left.status, refusal(&left).kind.as_str()), (Some(1), "corrupt"));
    let left = here.run(&["export", "base", "-o", "-", "--json"]);
    assert_eq!(left.status, Some(2), "{left:?}");

    // A reader that never reads, and Ctrl-C.
    let export = here.begin_without_json(&["export", "base", "-o", "-"]);
    until("a socket for it", || pipes(&here).then_some(()));
    interrupt(&export);
    assert_eq!(ran(export.wait_with_output().unwrap()).status, Some(130));
    assert!(!pipes(&here));

    // From store to store, both ways: only what is new.
    let other = here.folder().join("other-store");
    let other = other.to_str().unwrap();
    let pushed = here.ok(&["store", "push", "base", "--to", other]);
    assert_eq!(pushed["snapshots"][0]["new_chunks"], pushed["snapshots"][0]["chunks"]);
    here.snapshot("pair", &["later"]);
    let pushed = here.ok(&["store", "push", "base", "later", "--to", other]);
    let (base, later) = (&pushed["snapshots"][0], &pushed["snapshots"][1]);
    assert_eq!((&base["was_there"], &base["new_bytes"]), (&true.into(), &0.into()));
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    assert!(number(&later["new_chunks"]) > 0 && number(&later["new_chunks"]) < number(&later["chunks"]) / 2);
    there.ok(&["store", "pull", "later", "--from", other, "--name", "theirs"]);
    let mut names = there.snapshots();
    names.sort();
    assert_eq!(names, ["base", "theirs"]);
    there.verify("theirs");
    there.ok(&["restore", "theirs"]);
    traffic::goes_on_from_here(&there, "pair", &arrived);
    let refused = there.refused(&["store", "pull", "nothing", "--from", other]);
    assert_eq!(refused.kind, "not-found", "{refused:?}");
    let refused = there.refused(&["store", "pull", "base", "--from", "/nowhere"]);
    assert_eq!(refused.kind, "not-found", "{refused:?}");
    here.finish();
    there.finish();
}
