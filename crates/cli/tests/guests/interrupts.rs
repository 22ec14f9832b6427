//! Ctrl-C at any time, and two operations at once: what was begun is undone, what runs runs on.

use std::time::Duration;

use crate::lab::{Lab, Ran, interrupt, ran, refusal, until};
use crate::traffic::{self, PAIR};

/// Runs a command and interrupts it after a while.
pub(crate) fn interrupted(lab: &Lab, arguments: &[&str], delay_ms: u64) -> Ran {
    let command = lab.begin(arguments);
    std::thread::sleep(Duration::from_millis(delay_ms));
    // It may have ended before; nobody has waited for it, so its id is still its own.
    interrupt(&command);
    let left = ran(command.wait_with_output().unwrap());
    assert!(matches!(left.status, Some(0 | 130)), "{arguments:?} after {delay_ms} ms: {left:?}");
    left
}

#[test]
fn starting_is_undone() {
    let lab = Lab::new();
    let file = lab.write("diorama.yaml", PAIR);
    lab.ok(&["status"]);
    let mut undone = 0;
    for delay_ms in [40, 150] {
        let left = interrupted(&lab, &["up", file.to_str().unwrap()], delay_ms);
        if left.status == Some(0) {
            lab.ok(&["down", "--volumes"]);
            continue;
        }
        undone += 1;
        until("nothing", || {
            let nothing = lab.ok(&["status"])["environments"].as_array().unwrap().is_empty();
            (nothing && lab.machine_processes() == 0).then_some(())
        });
    }
    assert!(undone > 0, "every `up` was too fast to be interrupted");
    lab.up(PAIR);
    lab.finish();
}

#[test]
fn snapshots_restores_and_forks_are_undone() {
    let lab = Lab::new();
    lab.up(PAIR);
    let mut arrived = traffic::start(&lab, "pair");
    let mut expected = Vec::new();
    let mut undone = [0; 3];
    for delay_ms in [40, 150, 300, 600] {
        let name = format!("after-{delay_ms}");
        let left = interrupted(&lab, &["snapshot", "create", &name], delay_ms);
        lab.wait_idle("pair");
        lab.assert_nothing_partial();
        // It may be committed when the news of the interruption comes.
        let snapshots = lab.snapshots();
        if snapshots.contains(&name) {
            expected.push(name.clone());
            lab.verify(&name);
        } else {
            assert_eq!(left.status, Some(130), "{left:?}");
            undone[0] += 1;
        }
        assert_eq!(snapshots, expected);
        lab.wait_ordinary("pair", "server");
        lab.wait_ordinary("pair", "client");
        arrived = traffic::goes_on_whole(&lab, "pair", &arrived);
    }
    if !expected.iter().any(|name| name == "base") {
        lab.snapshot("pair", &["base"]);
    }

    for delay_ms in [40, 150] {
        let machines = [lab.pid("pair", "server"), lab.pid("pair", "client")];
        let left = interrupted(&lab, &["restore", "base"], delay_ms);
        lab.wait_idle("pair");
        // Either time went back, or it did not.
        let now = [lab.pid("pair", "server"), lab.pid("pair", "client")];
        if now == machines {
            assert_eq!(left.status, Some(130), "{left:?}");
            undone[1] += 1;
        } else {
            assert!(now[0] != machines[0] && now[1] != machines[1], "half of it went back");
        }
        until("the old machines' end", || (lab.machine_processes() == 2).then_some(()));
        let now = until("traffic", || traffic::look(&lab, "pair"));
        assert_eq!(now.connection, arrived.connection);
        traffic::goes_on_whole(&lab, "pair", &now);
    }

    for delay_ms in [40, 150] {
        let left = interrupted(&lab, &["fork", "base", "--count", "3", "--name", "fork"], delay_ms);
        let forks = || {
            let status = lab.ok(&["status"]);
            let all = status["environments"].as_array().unwrap().clone();
            // None of them is still being made or unmade.
            all.iter().all(|one| one["operation"].is_null()).then_some(all.len() - 1)
        };
        let forks = until("all forks or none", || forks().filter(|forks| [0, 3].contains(forks)));
        if forks == 0 {
            assert_eq!(left.status, Some(130), "{left:?}");
            undone[2] += 1;
        } else {
            for fork in ["fork-1", "fork-2", "fork-3"] {
                lab.ok(&["-e", fork, "down", "--volumes"]);
            }
        }
        until("the forks' end", || (lab.machine_processes() == 2).then_some(()));
    }
    assert!(undone.iter().all(|undone| *undone > 0), "never interrupted: {undone:?}");
    let now = traffic::look(&lab, "pair").unwrap();
    traffic::goes_on_whole(&lab, "pair", &now);
    lab.finish();
}

#[test]
fn one_operation_at_a_time() {
    let lab = Lab::new();
    let file = lab.write("diorama.yaml", PAIR);
    lab.ok(&["status"]);
    let busy = |what: &str, arguments: &[&str]| {
        until(what, || {
            let status = lab.ok(&["status"]);
            let one = status["environments"].as_array().unwrap().first()?.clone();
            one["operation"].is_string().then_some(())
        });
        let refusal = lab.refused(arguments);
        assert_eq!(refusal.kind, "busy", "{refusal:?}");
        assert!(!refusal.hint.is_empty(), "{refusal:?}");
    };

    let command = lab.begin(&["up", file.to_str().unwrap()]);
    busy("a start", &["-e", "pair", "snapshot", "create"]);
    let left = ran(command.wait_with_output().unwrap());
    assert_eq!(left.status, Some(0), "{left:?}");

    let arrived = traffic::start(&lab, "pair");
    let command = lab.begin(&["snapshot", "create", "first"]);
    busy("a snapshot", &["snapshot", "create", "second"]);
    assert_eq!(lab.refused(&["restore", "first"]).kind, "not-found", "it is not there yet");
    let left = ran(command.wait_with_output().unwrap());
    assert_eq!(left.status, Some(0), "{left:?}");
    assert_eq!(lab.snapshots(), ["first"]);
    traffic::goes_on_whole(&lab, "pair", &arrived);
    lab.verify("first");

    // A name that appears while a snapshot of that name is under way cannot be: another environment has its own.
    assert_eq!(refusal(&lab.run(&["snapshot", "create", "first", "--json"])).kind, "name-in-use");
    lab.finish();
}
