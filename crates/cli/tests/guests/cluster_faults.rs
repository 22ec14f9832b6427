//! What an environment on three hosts outlives: agents that are killed at each step of a snapshot, hosts that are cut off,
//! etcd that is away, tunnels that lose, and a clock that is wrong.
//!
//! After each fault the same must be so ([`World::is_sound`]): every machine runs, the traffic goes on, no host has or shows
//! part of a snapshot, the store is whole, and the next snapshot succeeds with every frame accounted for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{Cluster, eventually};
use crate::lab::{Lab, Ran, entries, ran, refusal, until};
use crate::underlay::Weather;

/// The traffic is between `server` and `client`, so that the host in the middle can be cut off without it.
const ENVIRONMENT: &str = "\
name: wide
machines:
  server: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.1/24}], host: h1}
  middle: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.2/24}], host: h2}
  client: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.3/24}], host: h3}
networks:
  lan: {}
";
const ONE: usize = 0;
const TWO: usize = 1;
const THREE: usize = 2;

/// A participant's states, and the stages of its local cut.
const PARTICIPANT_STEPS: [&str; 9] = [
    "participant preparing",
    "participant prepared",
    "participant cutting",
    "cut stopping",
    "cut saving",
    "participant capturing",
    "participant in doubt",
    "participant keeping",
    "participant discarding",
];
/// An initiator's states, and the moment at which all others have been told to cut.
const INITIATOR_STEPS: [&str; 7] = [
    "initiator preparing",
    "initiator taking",
    "initiator called",
    "initiator collecting",
    "initiator writing",
    "initiator committing",
    "initiator aborting",
];
const LIBFAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// What has come of the traffic.
#[derive(Debug, Clone)]
struct Arrived {
    connection: Value,
    bytes: u64,
    received: u64,
}

struct World {
    cluster: Cluster,
    arrived: Arrived,
    /// Numbers snapshots.
    taken: u32,
    began: Instant,
}

impl World {
    fn new() -> Self {
        let began = Instant::now();
        let cluster = Cluster::new(3);
        let one = &cluster.labs[ONE];
        let file = one.write("wide.yaml", ENVIRONMENT);
        one.ok(&["up", file.to_str().unwrap()]);
        one.shell(
            "wide",
            "server",
            "traffic tcp-serve --port 7000 --status /tmp/tcp </dev/null >/dev/null 2>&1 & \
             traffic udp-recv --port 7001 --status /tmp/udp </dev/null >/dev/null 2>&1 & \
             until grep -q waiting /tmp/tcp 2>/dev/null; do sleep 0.1; done",
        );
        one.shell(
            "wide",
            "client",
            "ping -c 1 -W 10 10.0.0.1 >/dev/null; \
             traffic tcp-send --to 10.0.0.1:7000 --rate 200KiB </dev/null >/dev/null 2>&1 & \
             traffic udp-send --to 10.0.0.1:7001 --rate 100 </dev/null >/dev/null 2>&1 &",
        );
        let arrived = until("traffic", || arrived(one));
        let mut world = Self { cluster, arrived, taken: 0, began };
        world.is_sound("nothing", ONE);
        world
    }

    fn lab(&self, place: usize) -> &Lab {
        &self.cluster.labs[place]
    }

    /// Begins a snapshot on a host that a fault will meet; returns its name too.
    fn begin_snapshot(&mut self, place: usize) -> (String, Child) {
        self.taken += 1;
        let name = format!("meets-{}", self.taken);
        let child = self.lab(place).begin(&["snapshot", "create", "-e", "wide", &name]);
        (name, child)
    }

    /// What came of that snapshot: all of it, or nothing, and its command did not claim more than is so.
    #[track_caller]
    fn judge(&self, name: &str, ended: &Ran) {
        let exists = self.snapshots().iter().any(|known| known == name);
        assert!(exists || ended.status != Some(0), "{name} is not there: {ended:?}");
        if exists {
            let verified = self.lab(THREE).ok(&["snapshot", "verify", "-e", "wide", name]);
            assert_eq!(
                (&verified["ok"], &verified["frames"]["unaccounted"]),
                (&true.into(), &0.into()),
                "{verified}"
            );
            self.lab(THREE).ok(&["snapshot", "rm", "-e", "wide", name]);
        }
    }

    #[track_caller]
    fn snapshots(&self) -> Vec<String> {
        let list = self.lab(THREE).ok(&["snapshot", "list"]);
        assert_eq!(list["damaged"].as_array().map(Vec::len), Some(0), "{list}");
        let all = list["snapshots"].as_array().unwrap();
        all.iter().map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
    }

    /// See the module. The next snapshot is asked of the host at `place`.
    #[track_caller]
    fn is_sound(&mut self, after: &str, place: usize) -> Value {
        let lab = self.lab(place);
        eventually("every machine to run", || {
            let status = lab.status("wide");
            let machines = status["machines"].as_array().unwrap();
            let run = machines.iter().all(|machine| machine["state"] == "running");
            if run { Ok(()) } else { Err(status.to_string()) }
        });
        let before = self.arrived.clone();
        self.arrived = until("more traffic", || {
            arrived(self.lab(ONE)).filter(|now| now.bytes > before.bytes && now.received > before.received)
        });
        assert_eq!(self.arrived.connection, before.connection, "after {after}: another session");

        self.taken += 1;
        let name = format!("after-{}", self.taken);
        let lab = self.lab(place);
        let mut report = Value::Null;
        // What is left of the cut before may still be undone, and sessions come anew.
        eventually("the next snapshot", || {
            let ended = lab.run(&["snapshot", "create", "-e", "wide", &name, "--json"]);
            if ended.status == Some(0) {
                report = serde_json::from_str(&ended.stdout).unwrap();
                return Ok(());
            }
            let refusal = refusal(&ended);
            assert!(
                matches!(refusal.kind.as_str(), "busy" | "cut-failed" | "agent"),
                "after {after}: {refusal:?}\n{}",
                lab.agent_log()
            );
            Err(format!("{refusal:?}"))
        });
        assert_eq!(report["frames"]["unaccounted"], 0, "after {after}: {report}");
        assert_eq!((&report["cut"]["hosts"], report["machines"].as_array().unwrap().len()), (&3.into(), 3));
        let verified = self.lab(THREE).ok(&["snapshot", "verify", "-e", "wide", &name]);
        assert_eq!(verified["ok"], true, "after {after}: {verified}");
        self.lab(TWO).ok(&["snapshot", "rm", "-e", "wide", &name]);
        for lab in &self.cluster.labs {
            until("no cut in doubt", || (!in_doubt(lab)).then_some(()));
            let left: Vec<String> = entries(&lab.runtime().join("ram"))
                .into_iter()
                .filter(|name| name.starts_with("new-"))
                .collect();
            assert_eq!(left, [""; 0], "after {after}: {}", lab.agent_log());
        }
        assert_eq!(entries(&self.cluster.store().join("incoming")), [""; 0], "after {after}");
        let checked = self.lab(ONE).ok(&["store", "check"]);
        assert_eq!(checked["ok"], true, "after {after}: {checked}");
        println!("{:4} s: sound after {after}", self.began.elapsed().as_secs());
        report
    }

    /// Kills the agent of a host when it reaches a step of a snapshot that another, or it, takes.
    fn kill_at(&mut self, step: &str, victim: usize, initiator: usize) {
        if !is_wanted(step) {
            return;
        }
        let gives_up = step.ends_with("discarding") || step.ends_with("aborting");
        if gives_up {
            // Another host holds the snapshot up until it is cancelled.
            let other = if victim == TWO { ONE } else { TWO };
            self.cluster.arm(other, "wait", "participant capturing");
            self.cluster.arm(victim, "kill", step);
            let (name, child) = self.begin_snapshot(initiator);
            self.cluster.until_reached(other);
            interrupt(&child);
            self.cluster.until_reached(victim);
            self.cluster.go_on(other);
            let ended = ran(child.wait_with_output().unwrap());
            self.cluster.restart_agent(victim);
            self.judge(&name, &ended);
        } else {
            self.cluster.arm(victim, "kill", step);
            let (name, child) = self.begin_snapshot(initiator);
            self.cluster.until_reached(victim);
            self.cluster.restart_agent(victim);
            let ended = ran(child.wait_with_output().unwrap());
            self.judge(&name, &ended);
        }
        self.is_sound(&format!("{step}, h{} killed, of h{}", victim + 1, initiator + 1), (victim + 1) % 3);
    }

    /// Cuts the host in the middle off when it reaches a step, until the cluster finds it lost.
    fn cut_off_at(&mut self, step: &str, initiator: usize) {
        if !is_wanted(step) {
            return;
        }
        self.cluster.arm(TWO, "wait", step);
        let (name, child) = self.begin_snapshot(initiator);
        self.cluster.until_reached(TWO);
        self.cluster.underlay.cut_off(Some(TWO));
        self.cluster.go_on(TWO);
        until("the host to be lost", || {
            let list = self.lab(ONE).ok(&["host", "list"]);
            let hosts = list["hosts"].as_array().unwrap();
            hosts.iter().any(|host| host["name"] == "h2" && host["state"] == "lost").then_some(())
        });
        // Its machine runs, and the others are as before.
        let status = self.lab(ONE).status("wide");
        let states: Vec<&str> = status["machines"]
            .as_array()
            .unwrap()
            .iter()
            .map(|machine| machine["state"].as_str().unwrap())
            .collect();
        assert_eq!(states, ["running", "lost", "running"], "{status}");
        assert_eq!(self.lab(TWO).machine_processes(), 1);
        let lost_at = Instant::now();
        let ended = ran(child.wait_with_output().unwrap());
        // A host that is lost is waited for no longer. (One that is cut off itself cannot tell.)
        assert!(initiator == TWO || lost_at.elapsed() < SETTLED, "{:?}: {ended:?}", lost_at.elapsed());
        self.cluster.underlay.cut_off(None);
        self.cluster.until_all_ready();
        self.judge(&name, &ended);
        self.is_sound(&format!("{step}, h2 cut off, of h{}", initiator + 1), THREE);
    }

    fn finish(self) {
        self.lab(ONE).ok(&["down", "-e", "wide", "--volumes"]);
        self.cluster.finish();
    }
}

/// Agents die in each state, on the initiator's host and on another.
#[test]
fn an_agent_may_die_at_each_step() {
    let mut world = World::new();
    for step in PARTICIPANT_STEPS {
        world.kill_at(step, TWO, ONE);
    }
    for step in INITIATOR_STEPS {
        world.kill_at(step, TWO, TWO);
    }
    world.finish();
}

#[test]
fn the_network_etcd_and_clocks_may_fail() {
    // Before the world, so that it goes after it.
    let _left = FaketimeFiles::new();
    let mut world = World::new();

    // A host is cut off: while it prepares, has been told to take, and is about to report.
    for step in ["participant preparing", "participant cutting", "participant in doubt"] {
        world.cut_off_at(step, ONE);
    }
    world.cut_off_at("initiator collecting", TWO);

    // Tunnels lose, and packets overtake each other.
    for (lost_per_mille, overtaken_per_mille) in [(10, 0), (200, 0), (0, 300), (10, 100)] {
        world.cluster.underlay.set(Weather { lost_per_mille, overtaken_per_mille, ..Weather::default() });
        let report = world.is_sound(
            &format!("{lost_per_mille} of 1000 packets lost, {overtaken_per_mille} overtaken"),
            ONE,
        );
        if lost_per_mille == 200 {
            assert!(report["frames"]["dropped"]["wire_loss"].as_u64().unwrap() > 0, "{report}");
        }
    }
    world.cluster.underlay.set(Weather::default());

    // etcd is started again in the middle of a snapshot.
    world.cluster.arm(TWO, "wait", "participant capturing");
    let (name, child) = world.begin_snapshot(ONE);
    world.cluster.until_reached(TWO);
    world.cluster.stop_etcd();
    world.cluster.start_etcd();
    world.cluster.go_on(TWO);
    let ended = ran(child.wait_with_output().unwrap());
    world.judge(&name, &ended);
    world.is_sound("etcd started again", TWO);

    // etcd is away for longer than a lease, from the middle of a snapshot on: nobody may decide it.
    world.cluster.arm(TWO, "wait", "participant capturing");
    let (name, child) = world.begin_snapshot(ONE);
    world.cluster.until_reached(TWO);
    world.cluster.stop_etcd();
    std::thread::sleep(LEASE);
    world.cluster.go_on(TWO);
    let ended = ran(child.wait_with_output().unwrap());
    assert_eq!(refusal(&ended).kind, "cut-failed", "{ended:?}");
    // Without etcd: machines run, traffic goes on, and what would change the cluster is refused.
    let before = world.arrived.clone();
    world.arrived = until("more traffic", || arrived(world.lab(ONE)).filter(|now| now.bytes > before.bytes));
    let refused = world.lab(THREE).refused(&["snapshot", "create", "-e", "wide", "without-etcd"]);
    assert_eq!(refused.kind, "agent", "{refused:?}");
    world.cluster.start_etcd();
    world.cluster.until_all_ready();
    world.judge(&name, &ended);
    world.is_sound("etcd away for longer than a lease", THREE);

    // The clock of a host is wrong by an hour, either way.
    assert!(
        Path::new(LIBFAKETIME).exists(),
        "{LIBFAKETIME} is missing (Debian: faketime; `make setup` installs it)"
    );
    for wrong in ["+1h", "-1h"] {
        let lab = &mut world.cluster.labs[THREE];
        lab.set("LD_PRELOAD", LIBFAKETIME);
        lab.set("FAKETIME", wrong);
        // Elapsed time is what the kernel says.
        lab.set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        lab.set("DONT_FAKE_MONOTONIC", "1");
        world.cluster.restart_agent(THREE);
        for initiator in [ONE, THREE] {
            let report =
                world.is_sound(&format!("h3's clock set {wrong}, asked of h{}", initiator + 1), initiator);
            assert!(report["cut"]["skew_us"].as_u64().unwrap() < 60_000_000, "{report}");
        }
    }
    for variable in ["LD_PRELOAD", "FAKETIME", "FAKETIME_DONT_FAKE_MONOTONIC", "DONT_FAKE_MONOTONIC"] {
        world.cluster.labs[THREE].unset(variable);
    }
    world.cluster.restart_agent(THREE);
    world.is_sound("h3's clock set right", THREE);
    world.finish();
}

/// What libfaketime leaves in shared memory for each process that was killed: removed with this.
struct FaketimeFiles(BTreeSet<PathBuf>);

impl FaketimeFiles {
    fn new() -> Self {
        Self(Self::there())
    }

    fn there() -> BTreeSet<PathBuf> {
        let named = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("faketime_shm_") || name.starts_with("sem.faketime_sem_")
        };
        let entries = std::fs::read_dir("/dev/shm").unwrap();
        entries.flatten().map(|entry| entry.path()).filter(named).collect()
    }
}

impl Drop for FaketimeFiles {
    fn drop(&mut self) {
        for path in Self::there().difference(&self.0) {
            // Another process of the agent may have removed its own just now.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Each step on each host, of snapshots that each host takes; and each host in the middle cut off at each step.
#[test]
#[ignore = "takes long: `make test-long`"]
fn everything_may_fail_everywhere() {
    let mut world = World::new();
    for initiator in [ONE, TWO, THREE] {
        for step in PARTICIPANT_STEPS {
            for victim in [ONE, TWO, THREE] {
                world.kill_at(step, victim, initiator);
            }
        }
        for step in INITIATOR_STEPS {
            world.kill_at(step, initiator, initiator);
        }
        for step in PARTICIPANT_STEPS.into_iter().filter(|step| *step != "participant discarding") {
            world.cut_off_at(step, initiator);
        }
    }
    for step in INITIATOR_STEPS.into_iter().filter(|step| *step != "initiator aborting") {
        world.cut_off_at(step, TWO);
    }
    world.finish();
}

/// Longer than any host's lease, which is 10 s.
const LEASE: Duration = Duration::from_secs(12);

/// What the undoing of a cut takes at most on hosts that are there; who waits for one that is not waits 10 s.
const SETTLED: Duration = Duration::from_secs(6);

/// Whether a step is to be tried: all are, unless `FAULTS_STEP` says which (by a part of its name).
fn is_wanted(step: &str) -> bool {
    std::env::var("FAULTS_STEP").map_or(true, |part| step.contains(&part))
}

/// What has arrived at the server by now. It must all be right, but for what is lost or late.
#[track_caller]
fn arrived(lab: &Lab) -> Option<Arrived> {
    let text = lab.try_shell("wide", "server", "cat /tmp/tcp /tmp/udp 2>/dev/null; true").stdout;
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let (tcp, udp) = (lines.next()?, lines.next()?);
    if tcp["state"] == "waiting" || udp["received"].is_null() {
        return None;
    }
    assert_eq!(tcp["state"], "open", "{tcp}");
    assert_eq!((&tcp["bad_bytes"], &tcp["connections"]), (&0.into(), &1.into()), "{tcp}");
    assert_eq!((&udp["duplicated"], &udp["strangers"]), (&0.into(), &0.into()), "{udp}");
    let (bytes, received) = (tcp["bytes"].as_u64()?, udp["received"].as_u64()?);
    (bytes > 0 && received > 0).then(|| Arrived { connection: tcp["connection"].clone(), bytes, received })
}

/// Whether the host waits to be told what became of a cut.
fn in_doubt(lab: &Lab) -> bool {
    let record = std::fs::read(lab.home().join("environments/wide/environment.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    !record["doubt"].is_null()
}

fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}
