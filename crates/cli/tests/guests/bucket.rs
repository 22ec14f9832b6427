//! Snapshots in a bucket: what one computer has snapshotted, another restores that shares nothing else with it, in a cluster
//! and without.

use crate::hosts::{Hosts, hosts_of, machine_states, until_lost};
use crate::lab::Lab;
use crate::s3_server::{BUCKET, Server};
use crate::traffic::{self, PAIR};

/// They may be on any host.
const WIDE: &str = "\
name: wide
machines:
  server: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.1/24}]}
  client: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.2/24}]}
  third: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.3/24}], disks: [{name: data, size: 16MiB}]}
networks:
  lan: {}
";

const VARIABLES: [&str; 4] = ["AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"];

/// A lab whose store is a bucket.
pub fn lab(server: &Server) -> Lab {
    let mut lab = Lab::new();
    lab.set("DIORAMA_STORE", &format!("s3://{BUCKET}/{}/lab", std::process::id()));
    for name in VARIABLES {
        lab.set(name, &server.variable(name).unwrap());
    }
    lab
}

/// A small one, which nobody has to run a machine for.
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../store/tests/store/kept/export-2.diorama");

/// From folder to bucket, from bucket to bucket, encrypted there, and back into a folder.
#[test]
fn snapshots_are_pushed_and_pulled() {
    let server = Server::shared();
    let place = |name: &str| format!("s3://{BUCKET}/{}/{name}", std::process::id());
    let [mut one, mut two, mut three] = [(); 3].map(|()| Lab::new());
    for lab in [&mut one, &mut two, &mut three] {
        VARIABLES.iter().for_each(|name| lab.set(name, &server.variable(name).unwrap()));
    }
    let imported = one.ok(&["import", KEPT]);
    let (plain, sealed) = (place("plain"), place("sealed"));
    let refused = one.refused(&["store", "pull", "kept", "--from", &plain]);
    assert!(refused.kind == "not-found" && refused.message.contains(&plain), "{refused:?}");
    let pushed = one.ok(&["store", "push", "kept", "--to", &plain]);
    let arrived = &pushed["snapshots"][0];
    assert_eq!((&arrived["id"], &arrived["was_there"]), (&imported["id"], &false.into()), "{pushed}");
    let again = one.ok(&["store", "push", "kept", "--to", &plain]);
    assert_eq!(
        (&again["snapshots"][0]["was_there"], &again["snapshots"][0]["new_bytes"]),
        (&true.into(), &0.into())
    );

    let key = two.folder().join("key").display().to_string();
    two.set("DIORAMA_STORE", &sealed);
    two.set("DIORAMA_STORE_KEY_FILE", &key);
    two.ok(&["store", "key", "new", &key]);
    two.ok(&["store", "init", "--encrypt"]);
    two.ok(&["store", "pull", "pair/kept", "--from", &plain, "--name", "sealed"]);
    two.verify("sealed");
    assert_eq!(two.snapshots(), ["sealed"]);

    let refused = three.refused(&["store", "pull", "sealed", "--from", &sealed]);
    assert_eq!(refused.kind, "locked", "{refused:?}");
    three.ok(&["store", "pull", "sealed", "--from", &sealed, "--key-file", &key]);
    three.verify("sealed");
    let shown = three.ok(&["snapshot", "show", "sealed"]);
    assert_eq!((&shown["id"], &shown["signature"]["state"]), (&imported["id"], &"valid".into()), "{shown}");
    assert_eq!(three.ok(&["store", "check", "--read-data"])["ok"], true);
    for lab in [one, two, three] {
        lab.finish();
    }
}

#[test]
fn another_computer_restores_from_the_bucket_alone() {
    let mut server = Server::start();
    let one = lab(&server);
    let report = one.ok(&["doctor"]);
    let checks = report["checks"].as_array().unwrap();
    let store = checks.iter().find(|check| check["name"] == "snapshot store").unwrap();
    assert_eq!(store["status"], "ok", "{store}");
    one.up(PAIR);
    // It is pinged, and may not have booted yet.
    one.shell("pair", "server", "true");
    one.shell("pair", "client", "echo before > /tmp/mark; sync");
    one.shell("pair", "client", "ping -c 2 -W 5 10.0.0.1");
    let snapshot = one.snapshot("pair", &["kept"]);
    one.verify("kept");
    one.shell("pair", "client", "echo after > /tmp/mark");

    // Another home: no cache, no record, nothing but the bucket.
    let two = lab(&server);
    assert_eq!(two.snapshots(), ["kept"]);
    two.ok(&["restore", "pair/kept"]);
    assert_eq!(two.shell("pair", "client", "cat /tmp/mark"), "before\n");
    two.shell("pair", "client", "ping -c 2 -W 5 10.0.0.1");
    let second = two.snapshot("pair", &["second"]);
    assert_eq!(second["parent"], snapshot["id"]);
    // Memory that one has captured and the other has restored is there once.
    let new = |report: &serde_json::Value| report["bytes"]["new"].as_u64().unwrap();
    assert!(new(&second) < new(&snapshot) / 2, "{second}");
    assert_eq!(one.shell("pair", "client", "cat /tmp/mark"), "after\n");

    // The server goes away: machines run on, and what needs it says so.
    server.kill();
    let refused = one.refused(&["-e", "pair", "snapshot", "create", "lost"]);
    assert!(refused.message.contains("cannot be reached") && !refused.hint.is_empty(), "{refused:?}");
    one.shell("pair", "client", "ping -c 2 -W 5 10.0.0.1");
    two.kill_agent();
    two.shell("pair", "client", "ping -c 2 -W 5 10.0.0.1");
    let doctor = two.run(&["doctor", "--json"]);
    assert!(doctor.stdout.contains("cannot be reached"), "{doctor:?}");
    server.start_again();
    one.ok(&["restore", "-e", "pair", "second"]);
    assert_eq!(one.shell("pair", "client", "cat /tmp/mark"), "before\n");
    one.ok(&["down", "--all", "--volumes"]);
    one.ok(&["agent", "stop"]);
    two.finish();
}

/// No host keeps the data of a snapshot for itself: what one has captured, others restore when it is gone.
#[test]
fn a_cluster_restores_a_lost_host_from_the_bucket_alone() {
    let server = Server::shared();
    let hosts = Hosts::of((0..3).map(|_| lab(&server)).collect());
    hosts.labs[0].up(WIDE);
    hosts.labs[1].shell("wide", "third", "echo kept | dd of=/dev/vda conv=fsync 2>&1");
    let places = machine_states(&hosts.labs[2]);
    assert!(hosts_of(&places) > 1, "{places:?}");
    let before = traffic::start(&hosts.labs[0], "wide");
    for lab in &hosts.labs {
        let snapshot = lab.snapshot("wide", &[]);
        assert_eq!(snapshot["cut"]["hosts"], hosts_of(&places), "{snapshot}");
        traffic::goes_on_whole(lab, "wide", &before);
    }
    hosts.labs[1].snapshot("wide", &["whole"]);
    hosts.labs[2].verify("whole");

    // The host of the machine with the disk is gone, and all that it had.
    let third = &places[2].0;
    let lost = hosts.labs.iter().zip(["h1", "h2", "h3"]).position(|(_, name)| name == third).unwrap();
    let (one, two) = (&hosts.labs[(lost + 1) % 3], &hosts.labs[(lost + 2) % 3]);
    hosts.labs[lost].kill_everything();
    until_lost(one, third);
    one.ok(&["restore", "-e", "wide", "whole"]);
    let places = machine_states(two);
    assert!(places.iter().all(|(host, state)| host != third && state == "running"), "{places:?}");
    traffic::goes_on_from_here(two, "wide", &before);
    assert_eq!(one.shell("wide", "third", "head -c 4 /dev/vda"), "kept");

    // It goes on from there, and so does the host that was lost.
    let next = two.snapshot("wide", &["next"]);
    assert_eq!(next["cut"]["hosts"], hosts_of(&places), "{next}");
    let back = &hosts.labs[lost];
    back.verify("next");
    back.ok(&["restore", "-e", "wide", "next"]);
    traffic::goes_on_from_here(back, "wide", &before);
    let checked = back.ok(&["store", "check", "--read-data"]);
    assert_eq!(checked["ok"], true, "{checked}");
    back.ok(&["down", "-e", "wide", "--volumes"]);
    hosts.finish();
}
