//! The agent killed: its machines outlive it, and the next command's agent takes them back.

use std::time::Duration;

use nix::unistd::Pid;

use crate::lab::{Lab, kill_and_wait, until};
use crate::traffic::{self, PAIR};

#[test]
fn the_next_agent_takes_the_machines_back() {
    let lab = Lab::new();
    lab.up(PAIR);
    let mut arrived = traffic::start(&lab, "pair");
    let machines = [lab.pid("pair", "server"), lab.pid("pair", "client")];
    let agent = lab.agent_pid();
    lab.kill_agent();
    assert_eq!(lab.states("pair"), ["running"; 2]);
    assert_ne!(lab.agent_pid(), agent);
    assert_eq!([lab.pid("pair", "server"), lab.pid("pair", "client")], machines);
    arrived = traffic::goes_on(&lab, "pair", &arrived);
    let report = lab.snapshot("pair", &["taken-back"]);
    assert_eq!(report["capture"], "live");
    arrived = traffic::goes_on_whole(&lab, "pair", &arrived);

    // A stop by force is the same, but politely.
    lab.ok(&["agent", "stop", "--force"]);
    arrived = traffic::goes_on(&lab, "pair", &arrived);

    // One machine dies while nobody looks.
    lab.kill_agent();
    kill_and_wait(Pid::from_raw(machines[1]));
    let status = lab.status("pair");
    assert_eq!(
        (&status["state"], &status["machines"][1]["state"]),
        (&"degraded".into(), &"dead".into()),
        "{status}"
    );
    assert_eq!(status["machines"][0]["state"], "running");
    assert!(status["machines"][1]["reason"].is_string(), "{status}");
    lab.shell("pair", "server", "true");
    let refusal = lab.refused(&["snapshot", "create"]);
    assert_eq!(refusal.kind, "wrong-state");
    assert!(refusal.message.contains("client") && refusal.hint.contains("restore"), "{refusal:?}");
    lab.assert_nothing_partial();

    lab.ok(&["restore", "taken-back"]);
    assert_eq!(lab.states("pair"), ["running"; 2]);
    let now = traffic::look(&lab, "pair").unwrap();
    assert_eq!(now.connection, arrived.connection);
    traffic::goes_on_whole(&lab, "pair", &now);
    lab.finish();
}

#[test]
fn an_agent_killed_within_a_snapshot_leaves_nothing_of_it() {
    let lab = Lab::new();
    lab.up(PAIR);
    let mut arrived = traffic::start(&lab, "pair");
    let mut expected = Vec::new();
    // From the preparation over the cut to the storing.
    for delay_ms in [60, 150, 300, 500] {
        let name = format!("after-{delay_ms}");
        let mut command = lab.begin(&["snapshot", "create", &name]);
        std::thread::sleep(Duration::from_millis(delay_ms));
        lab.kill_agent();
        command.wait().unwrap();
        assert_eq!(lab.states("pair"), ["running"; 2], "{name}: {}", lab.agent_log());
        lab.assert_nothing_partial();
        // It exists, whole, or not at all.
        let snapshots = lab.snapshots();
        if snapshots.contains(&name) {
            expected.push(name.clone());
            lab.verify(&name);
        }
        assert_eq!(snapshots, expected);
        lab.wait_ordinary("pair", "server");
        lab.wait_ordinary("pair", "client");
        arrived = traffic::goes_on(&lab, "pair", &arrived);
    }
    lab.snapshot("pair", &["whole"]);
    arrived = traffic::goes_on_whole(&lab, "pair", &arrived);
    lab.verify("whole");
    lab.ok(&["restore", "whole"]);
    traffic::goes_on_from_here(&lab, "pair", &arrived);
    lab.finish();
}

#[test]
fn an_agent_killed_while_machines_start_leaves_none() {
    let lab = Lab::new();
    let file = lab.write("diorama.yaml", PAIR);
    lab.ok(&["status"]);
    for delay_ms in [60, 200] {
        let mut command = lab.begin(&["up", file.to_str().unwrap()]);
        std::thread::sleep(Duration::from_millis(delay_ms));
        lab.kill_agent();
        command.wait().unwrap();
        let all = lab.ok(&["status"]);
        let up = all["environments"].as_array().unwrap().len();
        // Either it is taken back with both machines, or no process of it is left.
        let processes = if up == 1 { 2 } else { 0 };
        until("only what is known of runs", || (lab.machine_processes() == processes).then_some(()));
        lab.ok(&["down", "--all", "--volumes"]);
    }
    lab.finish();
}
