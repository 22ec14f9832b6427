//! What an environment on three hosts outlives: agents that are killed at each step of a snapshot, hosts that are cut off,
//! etcd that is away, tunnels that lose, and a clock that is wrong.
//!
//! After each fault the same must be so ([`World::is_sound`]): every machine runs, the traffic goes on, no host has or shows
//! part of a snapshot, the store is whole, and the next snapshot succeeds with every frame accounted for.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{Cluster, eventually};
use crate::hosts::{until_lost, until_ready};
use crate::lab::{Lab, Ran, interrupt, is_root, ran, refusal, until};
use crate::traffic::{self, Arrived, Rate, STATUS};
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
const MAKE_HOSTS: &str = "make network namespaces";
const LIBFAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// What gets through when a fifth of all packets is lost.
const RATE: Rate = Rate { bytes: "200KiB", datagrams: 100 };

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
        traffic::begin(one, "wide", RATE);
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
        let lab = self.lab(THREE);
        let exists = lab.snapshots().iter().any(|known| known == name);
        assert!(exists || ended.status != Some(0), "{name} is not there: {ended:?}");
        if exists {
            lab.verify(name);
            lab.ok(&["snapshot", "rm", "-e", "wide", name]);
        }
    }

    /// See the module. The next snapshot is asked of the host at `place`.
    #[track_caller]
    fn is_sound(&mut self, after: &str, place: usize) -> Value {
        let lab = self.lab(place);
        eventually("every machine to run", || {
            let states = lab.states("wide");
            let run = states.iter().all(|state| state == "running");
            if run { Ok(()) } else { Err(format!("{states:?}")) }
        });
        let before = self.arrived.clone();
        self.arrived = until("more traffic", || arrived(self.lab(ONE)).filter(|now| now.is_beyond(&before)));
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
        self.lab(THREE).verify(&name);
        self.lab(TWO).ok(&["snapshot", "rm", "-e", "wide", &name]);
        for lab in &self.cluster.labs {
            until("no cut in doubt", || (!in_doubt(lab)).then_some(()));
            lab.assert_nothing_partial();
        }
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
        until_lost(self.lab(ONE), "h2");
        // Its machine runs, and the others are as before.
        assert_eq!(self.lab(ONE).states("wide"), ["running", "lost", "running"]);
        assert_eq!(self.lab(TWO).machine_processes(), 1);
        let lost_at = Instant::now();
        let ended = ran(child.wait_with_output().unwrap());
        // A host that is lost is waited for no longer. (One that is cut off itself cannot tell.)
        assert!(initiator == TWO || lost_at.elapsed() < SETTLED, "{:?}: {ended:?}", lost_at.elapsed());
        self.cluster.underlay.cut_off(None);
        until_ready(&self.cluster.labs);
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
    if !is_root(MAKE_HOSTS) {
        return;
    }
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
    if !is_root(MAKE_HOSTS) {
        return;
    }
    let mut world = World::new();
    world.cluster.clean_up_after_faketime();

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
    until_ready(&world.cluster.labs);
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
    let printed = lab.try_shell("wide", "server", STATUS).stdout;
    traffic::read(&printed).map(|(arrived, _)| arrived).filter(Arrived::has_both)
}

/// Whether the host waits to be told what became of a cut.
fn in_doubt(lab: &Lab) -> bool {
    let record = std::fs::read(lab.home().join("environments/wide/environment.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    !record["doubt"].is_null()
}
