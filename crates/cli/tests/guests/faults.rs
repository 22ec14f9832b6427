//! What can go wrong outside Diorama: QEMU, guests, damaged files. Each is a clear error; what runs, runs on.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;

use crate::lab::{self, Lab, document, entries, kill_and_wait, ran, refusal, until};
use crate::traffic::{self, PAIR};

#[test]
fn no_usable_qemu() {
    let mut lab = Lab::new();
    let file = lab.write("diorama.yaml", PAIR);
    let up = ["up", file.to_str().unwrap()];
    // The only stand-in of these tests: an old QEMU cannot be had.
    let old = lab.write("qemu-old", "#!/bin/sh\necho 'QEMU emulator version 6.2.0'\n");
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o755)).unwrap();
    let cases = [
        ("DIORAMA_QEMU", "/nonexistent/qemu", "/nonexistent/qemu"),
        ("PATH", "/nonexistent", "qemu"),
        ("DIORAMA_QEMU", old.to_str().unwrap(), "6.2"),
    ];
    for (variable, value, said) in cases {
        lab.set(variable, value);
        let refusal = lab.refused(&up);
        assert_eq!(refusal.kind, "unsupported", "{refusal:?}");
        assert!(refusal.message.contains(said) && refusal.hint.contains("DIORAMA_QEMU"), "{refusal:?}");
        assert_eq!(lab.ok(&["status"])["environments"].as_array().map(Vec::len), Some(0));
        let doctor = lab.run(&["doctor", "--json"]);
        assert_eq!((doctor.status, &document(&doctor)["ok"]), (Some(1), &false.into()));
        lab.ok(&["agent", "stop"]);
        lab.unset(variable);
    }
    lab.ok(&up);
    lab.finish();
}

/// What has become of a capture whose agent died says nothing of its machine.
#[test]
fn an_agent_killed_within_a_capture_by_precopy_loses_no_machine() {
    let mut lab = Lab::new();
    let failpoint = lab.folder().join("failpoint");
    lab.set("DIORAMA_FAILPOINT", failpoint.to_str().unwrap());
    lab.up("name: one\nmachines:\n  only: {image: micro, memory: 96MiB}\n");
    lab.shell("one", "only", "echo here > /tmp/here");
    std::fs::write(&failpoint, "kill cut saving").unwrap();
    let agent = lab.agent_pid();
    let command = lab.begin(&["snapshot", "create", "lost", "--capture", "precopy"]);
    let lost = ran(command.wait_with_output().unwrap());
    assert!(failpoint.with_extension("reached").exists(), "{lost:?}");
    assert_ne!(lost.status, Some(0));
    lab::wait_for_end(agent);
    assert_eq!(lab.states("one"), ["running"], "{}", lab.agent_log());
    lab.assert_nothing_partial();
    assert_eq!(lab.shell("one", "only", "cat /tmp/here"), "here\n");
    lab.snapshot("one", &["whole"]);
    lab.verify("whole");
    lab.finish();
}

#[test]
fn a_machine_killed_within_a_snapshot() {
    let lab = Lab::new();
    lab.up(PAIR);
    let arrived = traffic::start(&lab, "pair");
    lab.snapshot("pair", &["good"]);
    for (delay_ms, machine) in [(10, "client"), (150, "server"), (350, "client")] {
        let name = format!("after-{delay_ms}");
        let pid = Pid::from_raw(lab.pid("pair", machine));
        let command = lab.begin(&["snapshot", "create", &name]);
        std::thread::sleep(Duration::from_millis(delay_ms));
        kill_and_wait(pid);
        let left = ran(command.wait_with_output().unwrap());
        lab.assert_nothing_partial();
        // Past the machine's capture its death does not matter any more.
        let exists = lab.snapshots().contains(&name);
        assert_eq!(left.status, Some(i32::from(!exists)), "{name}: {left:?}");
        if exists {
            lab.verify(&name);
        } else {
            let refusal = refusal(&left);
            assert!(["machine", "cut-failed", "wrong-state"].contains(&refusal.kind.as_str()), "{refusal:?}");
        }
        // The other one runs on, and the environment can be brought back.
        let states = lab.states("pair");
        let (dead, other) = if machine == "server" { (0, 1) } else { (1, 0) };
        assert_eq!(
            (states[dead].as_str(), states[other].as_str()),
            ("dead", "running"),
            "{}",
            lab.agent_log()
        );
        lab.shell("pair", ["server", "client"][other], "true");
        lab.ok(&["restore", "good"]);
        let now = until("traffic", || traffic::look(&lab, "pair"));
        assert_eq!(now.connection, arrived.connection);
        traffic::goes_on(&lab, "pair", &now);
    }
    lab.snapshot("pair", &["again"]);
    lab.finish();
}

#[test]
fn a_guest_that_never_answers() {
    let lab = Lab::new();
    let image = lab::micro();
    // The same kernel and files, but nothing that starts a network or an agent.
    lab.up(&format!(
        "name: mute\nmachines:\n  mute:\n    kernel: {0}/kernel\n    initrd: {0}/initrd\n    \
         cmdline: console=ttyS0 quiet rdinit=/bin/sh\n    memory: 96MiB\n    nics: [lan]\n  \
         loud: {{image: micro, memory: 96MiB, nics: [{{network: lan, address: 10.0.0.1/24}}]}}\n\
         networks: {{lan: {{}}}}\n",
        image.display()
    ));
    let ask = || refusal(&lab.run(&["exec", "--json", "--wait", "2", "mute", "--", "true"]));
    assert_eq!(ask().kind, "guest");
    // Frames that the mute machine never takes.
    lab.shell("mute", "loud", "ping -b -c 3 -W 1 10.0.0.255 >/dev/null; true");
    let report = lab.snapshot("mute", &["mute"]);
    assert_eq!(report["capture"], "live");
    lab.verify("mute");
    lab.ok(&["restore", "mute"]);
    lab.shell("mute", "loud", "ping -b -c 3 -W 1 10.0.0.255 >/dev/null; true");
    // Neither is it in an agent's way that it reads nothing.
    lab.kill_agent();
    assert_eq!(lab.states("mute"), ["running"; 2], "{}", lab.agent_log());
    assert_eq!(ask().kind, "guest");
    lab.snapshot("mute", &["mute-2"]);
    lab.finish();
}

#[test]
fn a_guest_whose_agent_has_gone() {
    let lab = Lab::new();
    lab.up(PAIR);
    let arrived = traffic::start(&lab, "pair");
    lab.shell(
        "pair",
        "client",
        "(sleep 1; sed -i /agent/d /etc/inittab; kill -HUP 1; killall qemu-ga agent) </dev/null >/dev/null 2>&1 &",
    );
    let ask = || lab.run(&["exec", "--json", "--wait", "1", "client", "--", "true"]);
    let left = until("silence", || Some(ask()).filter(|left| left.status != Some(0)));
    assert_eq!(refusal(&left).kind, "guest");
    lab.snapshot("pair", &["silent"]);
    let arrived = traffic::goes_on(&lab, "pair", &arrived);
    lab.ok(&["restore", "silent"]);
    let now = until("traffic", || traffic::look(&lab, "pair"));
    assert_eq!(now.connection, arrived.connection);
    traffic::goes_on(&lab, "pair", &now);
    lab.finish();
}

/// Puts other bytes in a file's place.
fn replace(file: &Path, change: fn(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
}

fn halve(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() / 2);
}

#[test]
fn damaged_snapshots_are_refused_and_nothing_else_is_touched() {
    let lab = Lab::new();
    lab.up(&PAIR.replace("10.0.0.2/24}]", "10.0.0.2/24}], disks: [{name: data, size: 64MiB}]"));
    let mut arrived = traffic::start(&lab, "pair");
    lab.shell("pair", "client", "traffic disk --file /dev/vda --rate 4MiB --size 2MiB --seconds 1");
    let report = lab.snapshot("pair", &["victim"]);
    let id = report["id"].as_str().unwrap().to_owned();
    let store = lab.home().join("store");
    // Nothing but this snapshot: pages and clusters in one pack or more, trees in another.
    let mut packs: Vec<(u64, PathBuf)> = entries(&store.join("packs"))
        .iter()
        .map(|pack| store.join("packs").join(pack))
        .map(|pack| (std::fs::metadata(&pack).unwrap().len(), pack))
        .collect();
    packs.sort();
    assert!(packs.len() >= 2, "{packs:?}");
    let manifest = store.join("snapshots").join(format!("{id}.json"));
    let objects = [packs.first().unwrap().1.clone(), packs.last().unwrap().1.clone(), manifest];
    // What is still in the caches hides what happened to the store's.
    let forget = || {
        for folder in [lab.runtime().join("ram").join(&id), lab.home().join("files")] {
            for file in entries(&folder) {
                std::fs::remove_file(folder.join(file)).unwrap();
            }
        }
        let _ = std::fs::remove_dir(lab.runtime().join("ram").join(&id));
    };
    for object in &objects {
        let spare = std::fs::read(object).unwrap();
        for (how, change) in [("flipped", (|bytes| flip(bytes)) as fn(&mut Vec<u8>)), ("cut short", halve)] {
            let what = format!("{} {how}", object.display());
            replace(object, change);
            forget();
            for command in [&["restore"][..], &["fork"]] {
                let left = lab.run(&[command, &[&id, "--json"]].concat());
                assert_eq!(left.status, Some(1), "{command:?} with {what}: {left:?}");
                let refusal = refusal(&left);
                assert_eq!(refusal.kind, "corrupt", "{command:?} with {what}: {refusal:?}");
            }
            for command in
                [&["snapshot", "verify", &id, "--json"][..], &["store", "check", "--read-data", "--json"]]
            {
                let checked = lab.run(command);
                assert_eq!(checked.status, Some(1), "{command:?} with {what}: {checked:?}");
                let name = object.file_name().unwrap().to_str().unwrap();
                assert!(checked.stdout.contains(name), "{command:?} with {what}: {checked:?}");
            }
            let status = lab.ok(&["status"]);
            assert_eq!(status["environments"].as_array().map(Vec::len), Some(1), "{what}");
            assert_eq!(lab.states("pair"), ["running"; 2], "{what}");
            lab.assert_nothing_partial();
            std::fs::write(object, &spare).unwrap();
        }
        arrived = traffic::goes_on(&lab, "pair", &arrived);
    }
    // As it was, it is sound, and comes back from the store alone.
    forget();
    lab.verify("victim");
    lab.ok(&["restore", "victim"]);
    let now = until("traffic", || traffic::look(&lab, "pair"));
    assert_eq!(now.connection, arrived.connection);
    traffic::goes_on(&lab, "pair", &now);
    lab.shell("pair", "client", "traffic disk-check --file /dev/vda");
    lab.finish();
}

/// Snapshots come and go; what is kept is whole, and what is not gives its space back.
#[test]
fn the_store_is_looked_after() {
    let lab = Lab::new();
    lab.up(PAIR);
    let arrived = traffic::start(&lab, "pair");
    for name in ["one", "two", "three", "four"] {
        lab.snapshot("pair", &[name]);
    }
    let full = lab.ok(&["store", "stats"]);
    assert_eq!(full["snapshots"], 4);
    // Four snapshots share most of what they hold.
    assert!(full["stored_bytes"].as_u64() < full["logical_bytes"].as_u64().map(|bytes| bytes / 8), "{full}");
    let plan = lab.ok(&["snapshot", "prune", "--keep-last", "2", "--dry-run"]);
    assert_eq!(plan["removed"].as_array().map(Vec::len), Some(2), "{plan}");
    assert_eq!(lab.snapshots().len(), 4);
    let pruned = lab.ok(&["snapshot", "prune", "--keep-last", "2"]);
    assert_eq!(pruned["removed"], plan["removed"]);
    assert!(pruned["freed_bytes"].as_u64() > Some(0), "{pruned}");
    assert_eq!(lab.snapshots(), ["three", "four"]);
    let checked = lab.ok(&["store", "check", "--read-data"]);
    assert_eq!((&checked["ok"], &checked["snapshots"]), (&true.into(), &2.into()), "{checked}");
    let collected = lab.ok(&["store", "gc", "--max-unused", "0"]);
    assert_eq!(collected["deferred"], false, "{collected}");
    let none = lab.run(&["snapshot", "prune", "--json"]);
    assert_eq!((none.status, refusal(&none).kind.as_str()), (Some(2), "invalid"), "{none:?}");
    lab.verify("three");
    lab.ok(&["restore", "three"]);
    let now = until("traffic", || traffic::look(&lab, "pair"));
    assert_eq!(now.connection, arrived.connection);
    traffic::goes_on(&lab, "pair", &now);
    lab.finish();
}
