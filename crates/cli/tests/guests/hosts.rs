//! Environments that span hosts: three agents on loopback addresses of their own, and a real etcd.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{LIMIT, Lab, Refusal, entries, refusal, until};

const ENVIRONMENT: &str = "\
name: wide
machines:
  a: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.1/24}], host: h1}
  b: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.2/24}], host: h2}
  c: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.3/24}]}
networks:
  lan: {}
";

/// Ends with the test.
struct Etcd {
    process: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Etcd {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (address, peer) = (free_address(), free_address());
        let (client, peer) = (format!("http://{address}"), format!("http://{peer}"));
        let process = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "etcd",
                "--name",
                "test",
                "--logger",
                "zap",
                "--log-level",
                "error",
            ])
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv and etcd run (Debian: util-linux, etcd-server)");
        let deadline = Instant::now() + LIMIT;
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "etcd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { process, address, _folder: folder }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A cluster of labs that share a store; the first has made it.
struct Hosts {
    labs: Vec<Lab>,
    _etcd: Etcd,
    _store: tempfile::TempDir,
}

impl Hosts {
    fn new(count: usize) -> Self {
        let etcd = Etcd::start();
        let store = tempfile::TempDir::with_prefix("diorama-store-").unwrap();
        let mut labs: Vec<Lab> = (0..count).map(|_| Lab::new()).collect();
        let mut token = String::new();
        for (number, lab) in (1..).zip(&mut labs) {
            lab.set("DIORAMA_STORE", store.path().to_str().unwrap());
            let (name, address) = (format!("h{number}"), free_address().to_string());
            let host = ["--name", name.as_str(), "--address", address.as_str()];
            if number == 1 {
                let etcd = format!("http://{}", etcd.address);
                lab.ok(&[&["host", "init", "--etcd", &etcd], &host[..]].concat());
                let uses = count.to_string();
                token = lab.ok(&["host", "token", "--uses", &uses])["token"].as_str().unwrap().to_owned();
            } else {
                lab.ok(&[&["host", "join", &token], &host[..]].concat());
            }
        }
        for lab in &labs {
            until("every host to be there", || {
                let hosts = lab.ok(&["host", "list"]);
                let ready = hosts["hosts"].as_array().unwrap().iter().filter(|host| host["state"] == "ready");
                (ready.count() == count).then_some(())
            });
        }
        Self { labs, _etcd: etcd, _store: store }
    }

    fn finish(self) {
        for lab in self.labs {
            // A host that was away finds out by itself that its part is wanted no more.
            lab.ok(&["host", "list"]);
            until("no part of an environment", || {
                entries(&lab.home().join("environments")).is_empty().then_some(())
            });
            lab.finish();
        }
    }
}

fn machine_states(lab: &Lab) -> Vec<(String, String)> {
    let status = lab.ok(&["status", "-e", "wide"]);
    let machines = status["environments"][0]["machines"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    machines.iter().map(|machine| (text(&machine["host"]), text(&machine["state"]))).collect()
}

#[track_caller]
fn pings(lab: &Lab, machine: &str, address: &str) {
    lab.shell("wide", machine, &format!("ping -c 3 -W 5 {address}"));
}

/// A command that is wrong in itself.
#[track_caller]
fn wrong(lab: &Lab, arguments: &[&str]) -> Refusal {
    let ran = lab.run(&[arguments, &["--json"]].concat());
    assert_eq!(ran.status, Some(2), "{arguments:?}: {ran:?}");
    refusal(&ran)
}

#[test]
fn an_environment_spans_hosts_and_outlives_one() {
    let hosts = Hosts::new(3);
    let [one, two, three] = &hosts.labs[..] else { unreachable!() };
    let file = one.folder().join("wide.yaml");
    std::fs::write(&file, ENVIRONMENT).unwrap();
    let file = file.to_str().unwrap();

    one.ok(&["up", file]);
    assert_eq!(machine_states(three).len(), 3);
    assert!(machine_states(three).iter().all(|(_, state)| state == "running"));
    // Each machine from a host that it is not on; what goes between them goes by the tunnels.
    pings(three, "a", "10.0.0.2");
    pings(one, "b", "10.0.0.3");
    pings(two, "c", "10.0.0.1");
    let flow = "ping -i 0.02 10.0.0.2 > /tmp/flow 2>&1 & echo begun";
    two.shell("wide", "a", flow);

    // From each host, at one cut of all.
    for (lab, name) in [(one, "from-one"), (two, "from-two"), (three, "from-three")] {
        let snapshot = lab.ok(&["snapshot", "create", "-e", "wide", name]);
        assert_eq!(snapshot["cut"]["hosts"].as_u64(), Some(hosts_of(&machine_states(lab))), "{snapshot}");
        assert_eq!(snapshot["machines"].as_array().unwrap().len(), 3);
        assert_eq!(snapshot["frames"]["unaccounted"], 0, "{snapshot}");
        assert!(snapshot["frames"]["sent_before"].as_u64().unwrap() > 0);
    }
    let verified = three.ok(&["snapshot", "verify", "-e", "wide", "from-two"]);
    assert_eq!(verified["ok"], true, "{verified}");

    // An agent that dies takes its part back, with its tunnels.
    two.kill_agent();
    two.ok(&["status"]);
    pings(one, "b", "10.0.0.1");
    one.ok(&["snapshot", "create", "-e", "wide", "after-takeover"]);

    one.ok(&["restore", "-e", "wide", "from-three"]);
    pings(three, "a", "10.0.0.2");

    // A second environment of the same snapshot beside the first.
    let forked = two.ok(&["fork", "-e", "wide", "from-two", "--name", "copy"]);
    assert_eq!(forked["environments"][0]["machines"].as_array().unwrap().len(), 3, "{forked}");
    three.shell("copy", "a", "ping -c 3 -W 5 10.0.0.2");
    one.ok(&["down", "-e", "copy", "--volumes"]);

    // A machine that names a host goes nowhere else, so the whole environment cannot be on the rest.
    two.kill_everything();
    until_lost(one);
    assert!(machine_states(one).iter().any(|(_, state)| state == "lost"));
    let refused = three.refused(&["snapshot", "create", "-e", "wide", "without-one"]);
    assert_eq!(refused.kind, "cut-failed", "{refused:?}");
    let list = one.ok(&["snapshot", "list"]);
    let names: Vec<&str> = list["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|snapshot| snapshot["name"].as_str())
        .collect();
    assert!(!names.contains(&"without-one"), "{names:?}");
    let refused = one.refused(&["restore", "-e", "wide", "from-two"]);
    assert!(refused.message.contains("no host can have the machine `b`"), "{refused:?}");

    one.ok(&["down", "-e", "wide", "--volumes"]);
    assert_eq!(three.ok(&["status"])["environments"].as_array().unwrap().len(), 0);
    hosts.finish();
}

#[test]
fn an_environment_moves_to_the_hosts_that_are_left() {
    let hosts = Hosts::new(2);
    let [one, two] = &hosts.labs[..] else { unreachable!() };
    let file = one.folder().join("wide.yaml");
    let text = ENVIRONMENT.replace(", host: h1", "").replace(", host: h2", "");
    let text = text.replace("10.0.0.3/24}]}", "10.0.0.3/24}], disks: [{name: data, size: 16MiB}]}");
    std::fs::write(&file, text).unwrap();
    two.ok(&["up", file.to_str().unwrap()]);
    assert_eq!(hosts_of(&machine_states(one)), 2);
    pings(one, "a", "10.0.0.2");
    // Down and up again, with the disk that its host has kept.
    one.shell("wide", "c", "echo kept | dd of=/dev/vda conv=fsync 2>&1");
    let down = two.ok(&["down", "-e", "wide"]);
    assert_eq!(down["environments"][0]["disks_kept"], serde_json::json!(["c/data"]), "{down}");
    assert_eq!(one.ok(&["status", "-e", "wide"])["environments"][0]["state"], "down");
    one.ok(&["up", file.to_str().unwrap()]);
    assert_eq!(two.shell("wide", "c", "head -c 4 /dev/vda"), "kept");
    pings(one, "a", "10.0.0.2");
    one.ok(&["snapshot", "create", "-e", "wide", "whole"]);

    two.kill_everything();
    until_lost(one);
    one.ok(&["restore", "-e", "wide", "whole"]);
    assert_eq!(machine_states(one), vec![("h1".to_owned(), "running".to_owned()); 3]);
    for (machine, address) in [("a", "10.0.0.2"), ("b", "10.0.0.3"), ("c", "10.0.0.1")] {
        pings(one, machine, address);
    }
    // The host comes back, and has nothing of it.
    two.ok(&["host", "list"]);
    assert_eq!(hosts_of(&machine_states(two)), 1);
    one.ok(&["down", "-e", "wide", "--volumes"]);
    hosts.finish();
}

#[test]
fn who_may_not_join_is_told_why() {
    let hosts = Hosts::new(1);
    let [one] = &hosts.labs[..] else { unreachable!() };
    let stranger = Lab::new();
    let address = free_address().to_string();
    let host = ["--name", "stranger", "--address", address.as_str()];
    let refused = wrong(&stranger, &[&["host", "join", "no-token"], &host[..]].concat());
    assert!(refused.hint.contains("diorama host token"), "{refused:?}");
    let refused = stranger.refused(&["host", "list"]);
    assert!(refused.message.contains("in no cluster"), "{refused:?}");
    let token = one.ok(&["host", "token"])["token"].as_str().unwrap().to_owned();
    let taken = ["--name", "h1", "--address", address.as_str()];
    let refused = wrong(&stranger, &[&["host", "join", &token], &taken[..]].concat());
    assert!(refused.message.contains("another host `h1`"), "{refused:?}");
    stranger.ok(&[&["host", "join", &token], &host[..]].concat());
    let refused = stranger.refused(&[&["host", "join", &token], &host[..]].concat());
    assert!(refused.message.contains("already"), "{refused:?}");
    one.ok(&["host", "drain", "stranger"]);
    one.ok(&["host", "remove", "stranger"]);
    assert_eq!(one.ok(&["host", "list"])["hosts"].as_array().unwrap().len(), 1);
    stranger.finish();
    hosts.finish();
}

fn hosts_of(states: &[(String, String)]) -> u64 {
    let mut hosts: Vec<&str> = states.iter().map(|(host, _)| host.as_str()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts.len() as u64
}

fn until_lost(lab: &Lab) {
    until("the host to be lost", || {
        let list = lab.ok(&["host", "list"]);
        let hosts = list["hosts"].as_array().unwrap();
        hosts.iter().any(|host| host["state"] == "lost").then_some(())
    });
}
