//! Machines that stand still: captured so, brought back so, and fit to run again.

use crate::interrupts::interrupted;
use crate::lab::{Lab, until};

const REST: &str = "\
name: rest
machines:
  awake: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.1/24}]}
  paused: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.2/24}]}
  off: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.3/24}]}
networks:
  lan: {}
";

const STATES: [&str; 3] = ["running", "paused", "shutdown"];

#[test]
fn paused_and_shut_down_machines_come_back_as_they_were() {
    let lab = Lab::new();
    lab.up(REST);
    lab.shell("rest", "awake", "true");
    lab.shell("rest", "paused", "echo here > /tmp/here; ping -c 1 -W 5 10.0.0.1");
    lab.shell("rest", "off", "(sleep 1; poweroff -f) >/dev/null 2>&1 &");
    until("a shutdown", || (lab.states("rest")[2] == "shutdown").then_some(()));
    lab.ok(&["pause", "paused"]);
    assert_eq!(lab.states("rest"), STATES);

    // The second one cannot ask QEMU again, and the third follows a restore.
    for name in ["first", "second"] {
        let report = lab.snapshot("rest", &[name]);
        let states: Vec<&str> =
            report["machines"].as_array().unwrap().iter().map(|one| one["state"].as_str().unwrap()).collect();
        assert_eq!(states, STATES);
        assert_eq!(lab.states("rest"), STATES);
        lab.verify(name);
    }
    for name in ["second", "first"] {
        lab.ok(&["restore", name]);
        assert_eq!(lab.states("rest"), STATES, "{name}");
        lab.shell("rest", "awake", "true");
    }
    lab.snapshot("rest", &["third"]);
    lab.verify("third");

    // An agent that knows of them only what is written down.
    lab.kill_agent();
    assert_eq!(lab.states("rest"), STATES);
    lab.ok(&["resume", "paused"]);
    assert_eq!(lab.states("rest"), ["running", "running", "shutdown"]);
    assert_eq!(lab.shell("rest", "paused", "cat /tmp/here; ping -c 1 -W 5 10.0.0.1 >/dev/null"), "here\n");

    // Once it has run it is captured anew.
    lab.shell("rest", "paused", "echo later > /tmp/here");
    lab.ok(&["pause", "paused"]);
    lab.snapshot("rest", &["fourth"]);
    lab.ok(&["restore", "fourth"]);
    assert_eq!(lab.states("rest"), STATES);
    lab.ok(&["resume", "paused"]);
    assert_eq!(lab.shell("rest", "paused", "cat /tmp/here"), "later\n");
    lab.finish();
}

#[test]
fn resuming_after_a_capture_at_rest() {
    let lab = Lab::new();
    lab.up(crate::traffic::PAIR);
    let arrived = crate::traffic::start(&lab, "pair");
    lab.ok(&["pause"]);
    lab.snapshot("pair", &["still"]);
    lab.ok(&["resume"]);
    let arrived = crate::traffic::goes_on_whole(&lab, "pair", &arrived);
    lab.snapshot("pair", &["moving"]);
    crate::traffic::goes_on_whole(&lab, "pair", &arrived);
    lab.ok(&["restore", "still"]);
    assert_eq!(lab.states("pair"), ["paused"; 2]);
    lab.ok(&["resume"]);
    crate::traffic::goes_on_from_here(&lab, "pair", &arrived);
    lab.finish();
}

/// QEMU captures a machine at rest once. A snapshot that comes to nothing must not be that once.
#[test]
fn a_machine_at_rest_is_captured_again_after_a_failure() {
    let lab = Lab::new();
    lab.up(REST);
    for machine in ["awake", "paused", "off"] {
        lab.shell("rest", machine, "echo here > /tmp/here");
    }
    lab.ok(&["pause", "paused"]);
    // Cancelled at one time or another: before the capture, within it, or when it is stored.
    for delay_ms in [150, 300, 500, 800] {
        let ran = interrupted(&lab, &["snapshot", "create", "nothing"], delay_ms);
        if ran.status == Some(0) {
            lab.ok(&["snapshot", "rm", "nothing"]);
        }
    }
    lab.snapshot("rest", &["whole"]);
    lab.verify("whole");
    lab.ok(&["restore", "whole"]);
    lab.ok(&["resume", "paused"]);
    assert_eq!(lab.shell("rest", "paused", "cat /tmp/here"), "here\n");
    lab.finish();
}

#[test]
fn a_machine_that_is_switched_off_around_the_cut_stays_off() {
    let lab = Lab::new();
    let one = "name: one\nmachines:\n  only: {image: micro, memory: 96MiB}\n";
    lab.up(one);
    lab.shell("one", "only", "true");
    lab.snapshot("one", &["base"]);
    for delay in ["0.1", "0.2", "0.3", "0.45", "0.6"] {
        lab.ok(&["restore", "base"]);
        lab.shell("one", "only", &format!("(sleep {delay}; poweroff -f) >/dev/null 2>&1 &"));
        lab.snapshot("one", &["moment"]);
        until("it to be off, and not on again", || (lab.states("one") == ["shutdown"]).then_some(()));
        // The snapshot has it on, if it was when it was cut, or off: then it is off when it is brought back.
        let was = lab.ok(&["snapshot", "show", "moment"])["machines"][0]["state"].clone();
        lab.ok(&["restore", "moment"]);
        if was == "shutdown" {
            assert_eq!(lab.states("one"), ["shutdown"], "{delay}");
        }
        until("it to be off", || (lab.states("one") == ["shutdown"]).then_some(()));
        lab.ok(&["snapshot", "rm", "moment"]);
    }
    lab.finish();
}
