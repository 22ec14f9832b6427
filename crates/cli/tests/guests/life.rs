//! An environment's life: up, looked at, worked in, paused, down.

use crate::lab::{Lab, document, refusal, until};

const ROUTED: &str = "\
name: routed
machines:
  left: {image: micro, memory: 96MiB, nics: [{network: west, address: 10.1.0.2/24}]}
  router:
    image: micro
    memory: 96MiB
    nics: [{network: west, address: 10.1.0.1/24}, {network: east, address: 10.2.0.1/24}]
  right:
    image: micro
    memory: 96MiB
    nics: [{network: east, address: 10.2.0.2/24}]
    disks: [{name: data, size: 64MiB}]
networks:
  west: {mtu: 9000}
  east: {}
";

#[test]
fn three_machines_on_two_networks() {
    let lab = Lab::new();
    let up = lab.up(ROUTED);
    assert_eq!(up["state"], "up");
    assert_eq!(lab.states("routed"), ["running"; 3]);
    let first = lab.pid("routed", "left");
    // The same file once more is as good as once.
    lab.up(ROUTED);
    assert_eq!(lab.pid("routed", "left"), first);
    let other = lab.write("other.yaml", &ROUTED.replace("64MiB", "65MiB"));
    assert_eq!(lab.refused(&["up", other.to_str().unwrap()]).kind, "name-in-use");

    // Frames of either network stay in it, and pass through the router once it forwards.
    lab.shell("routed", "left", "ip route add default via 10.1.0.1");
    lab.shell("routed", "right", "ip route add default via 10.2.0.1");
    // Waits until it has booted.
    lab.shell("routed", "router", "true");
    lab.shell("routed", "left", "ping -c 1 -W 5 10.1.0.1");
    assert_ne!(lab.try_shell("routed", "left", "ping -c 1 -W 1 10.2.0.2").status, Some(0));
    lab.shell("routed", "router", "echo 1 > /proc/sys/net/ipv4/ip_forward");
    lab.shell("routed", "left", "ping -c 2 -W 5 10.2.0.2");
    // The mtu of a network is its machines'.
    lab.shell("routed", "left", "ping -c 1 -W 5 -s 8900 10.1.0.1");
    let status = lab.status("routed");
    assert_eq!(status["networks"][0]["mtu"], 9000);
    assert!(status["networks"][1]["delivered_frames"].as_u64().unwrap() >= 4, "{status}");
    assert!(status["machines"][1]["nics"][0]["received_bytes"].as_u64().unwrap() > 8900, "{status}");

    lab.shell("routed", "right", "echo kept | dd of=/dev/vda conv=fsync bs=512 seek=8 2>/dev/null");
    let down = lab.ok(&["down"]);
    assert_eq!(down["environments"][0]["machines_stopped"], 3);
    assert_eq!(down["environments"][0]["disks_kept"][0], "right/data");
    assert_eq!(lab.status("routed")["state"], "down");
    // Down once more is as good as once.
    assert_eq!(lab.ok(&["down"])["environments"][0]["machines_stopped"], 0);
    assert_eq!(lab.refused(&["snapshot", "create"]).kind, "wrong-state");

    lab.up(ROUTED);
    let read = lab.shell("routed", "right", "dd if=/dev/vda bs=512 skip=8 count=1 2>/dev/null | head -c 4");
    assert_eq!(read, "kept");
    let down = lab.ok(&["down", "--volumes"]);
    assert_eq!(down["environments"][0]["disks_removed"][0], "right/data");
    assert_eq!(lab.refused(&["-e", "routed", "status"]).kind, "not-found");
    lab.finish();
}

/// It need not find that out while it boots: on a busy computer Linux would measure a sixth of it now and then, and its clock go
/// six times too fast.
#[test]
fn an_emulated_machine_is_told_how_fast_its_clock_is() {
    let lab = Lab::new();
    lab.up(SOLO);
    let cmdline = lab.shell("solo", "box", "cat /proc/cmdline");
    let told: Vec<&str> =
        cmdline.split_whitespace().filter_map(|word| word.strip_prefix("tsc_early_khz=")).collect();
    let processors = std::fs::read_to_string("/proc/cpuinfo").expect("readable");
    let constant = ["constant_tsc", "nonstop_tsc"].iter().all(|flag| processors.contains(flag));
    let emulated = lab.status("solo")["machines"][0]["accelerator"] == "tcg";
    assert_eq!(told.len(), usize::from(emulated && constant), "{cmdline}");
    for khz in told {
        let (mhz, rest) = khz.split_at(khz.len() - 3);
        let log = lab.shell("solo", "box", "dmesg");
        assert!(log.contains(&format!("tsc: Detected {mhz}.{rest} MHz")), "{khz} and {log}");
    }
    lab.finish();
}

const SOLO: &str = "\
name: solo
machines:
  box: {image: micro, memory: 96MiB, cpus: 2, nics: [lan]}
networks: {lan: {}}
";

#[test]
fn commands_in_a_guest_pass_everything_through() {
    let lab = Lab::new();
    lab.up(SOLO);
    let exec = |command: &[&str]| lab.run(&[&["exec", "--wait", "90", "box", "--"], command].concat());

    let ran = exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.status, ran.stdout.as_str(), ran.stderr.as_str()), (Some(7), "out\n", "err\n"));
    assert_eq!(exec(&["sh", "-c", "kill -TERM $$"]).status, Some(143));
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let ran = lab.run_with_input(&["exec", "-i", "box", "--", "sha256sum"], &bytes);
    let here = ran.stdout.split(' ').next().unwrap().to_owned();
    let file = lab.folder().join("bytes");
    std::fs::write(&file, &bytes).unwrap();
    let there = std::process::Command::new("sha256sum").arg(&file).output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&there).starts_with(&here) && here.len() == 64, "{here}");
    let report = document(&lab.run(&["exec", "--json", "box", "--", "nproc"]));
    assert_eq!((&report["exit_code"], &report["stdout"]), (&0.into(), &"2\n".into()), "{report}");
    // What cannot be run is not the command's own failure.
    assert_eq!(refusal(&lab.run(&["exec", "--json", "box", "--", "/nowhere"])).kind, "guest");
    assert_eq!(refusal(&lab.run(&["exec", "--json", "nobody", "--", "true"])).kind, "not-found");

    let log = until("the console's log", || {
        let log = lab.run(&["logs", "box"]).stdout;
        log.contains("diorama micro: box ready").then_some(log)
    });
    assert!(log.lines().count() > 0);

    lab.ok(&["pause"]);
    assert_eq!(lab.states("solo"), ["paused"]);
    let refusal = refusal(&lab.run(&["exec", "--json", "--wait", "1", "box", "--", "true"]));
    assert!(refusal.kind == "wrong-state" && refusal.hint.contains("diorama resume"), "{refusal:?}");
    lab.ok(&["resume"]);
    assert_eq!(lab.states("solo"), ["running"]);
    assert_eq!(exec(&["true"]).status, Some(0));
    lab.finish();
}

#[test]
fn what_is_not_there_is_said_so() {
    let lab = Lab::new();
    for arguments in [
        &["-e", "ghost", "down"][..],
        &["-e", "ghost", "snapshot", "create"],
        &["-e", "ghost", "pause"],
        &["restore", "ghost"],
        &["fork", "ghost"],
        &["snapshot", "rm", "ghost"],
        &["snapshot", "verify", "ghost"],
    ] {
        let refusal = lab.refused(arguments);
        assert_eq!(refusal.kind, "not-found", "{arguments:?}: {refusal:?}");
        assert!(!refusal.hint.is_empty(), "{arguments:?}: {refusal:?}");
    }
    lab.finish();
}
