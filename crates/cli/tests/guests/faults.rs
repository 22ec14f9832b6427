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

/// Puts other bytes in a file's place. Not into the file: others link it.
fn replace(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::remove_file(file).unwrap();
    std::fs::write(file, bytes).unwrap();
}

/// The last byte that is not zero, changed: in a sparse file too it is one that was stored.
fn flip(bytes: &mut [u8]) {
    let at = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[at] ^= 1;
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
    let spare = lab.folder().join("spare");
    let report = lab.snapshot("pair", &["victim"]);
    let id = report["id"].as_str().unwrap().to_owned();
    let folder = lab.home().join("store/snapshots").join(&id);
    let cached = lab.runtime().join("ram").join(&id);
    let copy = |from: &Path, to: &Path| {
        let copied =
            std::process::Command::new("cp").args(["-r", "--sparse=always"]).arg(from).arg(to).status();
        assert!(copied.unwrap().success());
    };
    copy(&folder, &spare);

    let layer = PathBuf::from("disks/client/data").join(&entries(&folder.join("disks/client/data"))[0]);
    let files = [
        Path::new("ram/server"),
        Path::new("state/client"),
        Path::new("frames"),
        Path::new("manifest.json"),
        &layer,
    ];
    for file in files {
        for (how, change) in [("flipped", (|bytes| flip(bytes)) as fn(&mut Vec<u8>)), ("cut short", halve)] {
            let what = format!("{} {how}", file.display());
            // Nothing in flight leaves nothing to damage.
            if std::fs::metadata(folder.join(file)).unwrap().len() == 0 {
                continue;
            }
            replace(&folder.join(file), change);
            // Memory that is still in the cache hides what happened to the store's.
            std::fs::remove_dir_all(&cached)
                .or_else(|error| match error.kind() {
                    std::io::ErrorKind::NotFound => Ok(()),
                    _ => Err(error),
                })
                .unwrap();
            for command in [&["restore"][..], &["fork"]] {
                let left = lab.run(&[command, &[&id, "--json"]].concat());
                assert_eq!(left.status, Some(1), "{command:?} with {what}: {left:?}");
                let refusal = refusal(&left);
                assert_eq!(refusal.kind, "corrupt", "{command:?} with {what}: {refusal:?}");
            }
            let verified = lab.run(&["snapshot", "verify", &id, "--json"]);
            assert_eq!(verified.status, Some(1), "verify with {what}: {verified:?}");
            let status = lab.ok(&["status"]);
            assert_eq!(status["environments"].as_array().map(Vec::len), Some(1), "{what}");
            assert_eq!(lab.states("pair"), ["running"; 2], "{what}");
            lab.assert_nothing_partial();
            std::fs::remove_dir_all(&folder).unwrap();
            copy(&spare, &folder);
        }
        arrived = traffic::goes_on(&lab, "pair", &arrived);
    }
    // As it was, it is sound.
    lab.verify("victim");
    lab.ok(&["restore", "victim"]);
    let now = until("traffic", || traffic::look(&lab, "pair"));
    assert_eq!(now.connection, arrived.connection);
    traffic::goes_on(&lab, "pair", &now);
    lab.shell("pair", "client", "traffic disk-check --file /dev/vda");
    lab.finish();
}
