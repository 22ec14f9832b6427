//! Snapshots of an environment on three hosts: how far apart its machines are cut, and what that costs their traffic.
//!
//! Six machines, two on each of three hosts ([`hosts`]); a TCP session and a numbered UDP stream in each of three pairs, all of
//! them across tunnels. Cuts, and then as long without any: what was sent again or lost more often with cuts than without is
//! put down to them, and when each was sent is told. Each snapshot is removed a while after it was durable, and then everything is left
//! alone: a removal frees the memory that is cached of it, and a computer that is a virtual machine may give free memory back (free page
//! reporting), and stand still for that, two seconds later. What is sent again then is told apart. All hosts share this computer's clock, so the
//! skew is true; they also share its processors, which real hosts do not.

pub(crate) mod hosts;

use std::time::{Duration, Instant};

use clap::Args;
use diorama_api::{EnvironmentStatus, MachineReport, SnapshotReport};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, Summary, ms, table};
use crate::interruption::{Interruption, Interruptions};
use crate::lab::{self, Lab, say};
use crate::load::{self, Program, Reading, cores_used};
use crate::snapshot::remove;
use hosts::{HOSTS, Hosts};

const ENVIRONMENT: &str = "bench";
/// Machines, host by host; the addresses are 10.0.0.1 and on.
const MACHINES: [(&str, usize); 6] = [("a", 1), ("b", 2), ("c", 3), ("d", 1), ("e", 2), ("f", 3)];
/// From and to: each pair on two hosts.
const PAIRS: [(&str, &str, &str); 3] =
    [("a", "b", "10.0.0.2"), ("c", "d", "10.0.0.4"), ("e", "f", "10.0.0.6")];
/// How long programs in guests may take to start.
const READY: Duration = Duration::from_secs(90);
/// How long after the computer stood still a segment that is sent again is put down to that.
const AFTER_INTERRUPTION: Duration = Duration::from_millis(100);
/// How often programs in guests say how they are, in milliseconds. (They write a file for that, which takes emulated machines as long
/// as a dozen datagrams.)
const STATUS_MS: u32 = 500;
/// How wrong times by a guest's clock may be: as long as it takes to ask for it.
const CLOCK_ERROR: Duration = Duration::from_millis(50);
/// How long guests are left alone after they were asked, and after a snapshot was durable.
const SETTLE: Duration = Duration::from_secs(4);
/// How long after a snapshot was removed.
const SETTLE_REMOVED: Duration = Duration::from_secs(6);

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Cuts
    #[arg(long, default_value_t = 100)]
    count: u32,
    /// Datagrams a second of each UDP stream
    #[arg(long, default_value_t = 50)]
    datagrams: u32,
    /// Bytes a second of each TCP session
    #[arg(long, default_value = "32KiB")]
    bytes: String,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { count: 100, datagrams: 50, bytes: "32KiB".to_owned() }
    }
}

/// What the traffic suffered within a time.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Suffered {
    seconds: f64,
    tcp_bytes: u64,
    tcp_retransmits: u64,
    udp_received: u64,
    udp_lost: u64,
    udp_duplicated: u64,
    udp_reordered: u64,
    bad_bytes: u64,
    /// How often a processor of the computer stood still, and for how long in all; `None` where that cannot be seen.
    interruptions: Option<Interrupted>,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Interrupted {
    count: u64,
    ms: f64,
    longest_ms: f64,
}

#[derive(Debug, Serialize)]
struct Findings {
    cuts: u32,
    memory_mib: u64,
    cores_used: f64,
    skew_us: Summary,
    /// Of the machines of one host, as far as that can be told: by the cut of the whole, from the least to the most.
    stall_us: Summary,
    pause_us: Summary,
    create_ms: Summary,
    in_flight: u64,
    unaccounted: i64,
    drain_incomplete: u32,
    sent_again: Vec<SentAgain>,
    sent_again_without: Vec<SentAgain>,
    with_cuts: Suffered,
    without: Suffered,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let count = if common.quick { 5 } else { arguments.count };
    say("cluster: starting three hosts");
    let hosts = Hosts::new()?;
    let findings = measure(&hosts, count, arguments, common.memory)?;
    let mut violations = Vec::new();
    if findings.unaccounted != 0 {
        violations.push(format!("cluster: {} frames unaccounted", findings.unaccounted));
    }
    if findings.with_cuts.bad_bytes + findings.without.bad_bytes > 0 {
        violations.push("cluster: bytes of a TCP session are wrong".to_owned());
    }
    if findings.with_cuts.udp_duplicated > findings.without.udp_duplicated {
        violations.push(format!("cluster: {} datagrams came twice", findings.with_cuts.udp_duplicated));
    }
    let json = serde_json::json!({ "findings": findings });
    Ok(Outcome { name: "cluster", json, text: text(&findings), violations })
}

fn measure(hosts: &Hosts, count: u32, arguments: &Arguments, memory_mib: u64) -> Result<Findings, Failure> {
    let one = hosts.lab(0);
    say(format!("cluster: starting six machines of {memory_mib} MiB"));
    let file = one.write("bench.yaml", &specification(memory_mib))?;
    let _: EnvironmentStatus = one.run(&["up", &file.to_string_lossy()])?;
    start_traffic(one, arguments)?;
    let used = cores_used(one, ENVIRONMENT)?;
    say(format!("cluster: machines use {used:.2} cores"));

    let mut samples: [Sample; 4] = Default::default();
    let [skews, stalls, pauses, creates] = &mut samples;
    let (mut in_flight, mut unaccounted, mut drain_incomplete) = (0, 0, 0);
    let mut snapshots = Vec::new();
    let interruptions = Interruptions::watch();
    let found = || interruptions.as_ref().map(Interruptions::found);
    let before = Looked::take(one)?;
    // What reading does to guests is not to be taken for the first snapshot's doing.
    lab::sleep(SETTLE)?;
    for cut in 0..count {
        // Each host is the initiator in turn.
        let lab = hosts.lab(cut as usize % HOSTS);
        let asked = Instant::now();
        let report: SnapshotReport =
            lab.run(&["-e", ENVIRONMENT, "snapshot", "create", "--capture", "live"])?;
        let durable = Instant::now();
        lab::sleep(SETTLE)?;
        let pause = |machine: &MachineReport| (machine.name.clone(), Duration::from_micros(machine.pause_us));
        snapshots.push(Taken {
            asked,
            durable,
            removed: Instant::now(),
            pauses: report.machines.iter().map(pause).collect(),
        });
        remove(lab, ENVIRONMENT, &report.id)?;
        lab::sleep(SETTLE_REMOVED)?;
        skews.push(report.cut.skew_us as f64);
        creates.push(report.create_ms as f64);
        in_flight += report.frames.in_flight;
        unaccounted += report.frames.unaccounted.abs();
        for machine in &report.machines {
            stalls.push(machine.stall_us as f64);
            pauses.push(machine.pause_us as f64);
            drain_incomplete += u32::from(machine.drain_incomplete);
        }
        if (cut + 1) % 10 == 0 {
            say(format!("cluster: {} cuts, skew {} ms in the median", cut + 1, ms(skews.median())));
        }
    }
    let between = Looked::take(one)?;
    let sent_again = SentAgain::between(&before, &between, &snapshots, &found().unwrap_or_default());
    sent_again.iter().for_each(SentAgain::say);
    let length = between.at.duration_since(before.at);
    say(format!("cluster: the same without cuts, {:.0} s", length.as_secs_f64()));
    lab::sleep(length)?;
    let after = Looked::take(one)?;
    let sent_again_without = SentAgain::between(&between, &after, &[], &found().unwrap_or_default());
    sent_again_without.iter().for_each(SentAgain::say);
    Ok(Findings {
        cuts: count,
        memory_mib,
        cores_used: used,
        skew_us: skews.summary(),
        stall_us: stalls.summary(),
        pause_us: pauses.summary(),
        create_ms: creates.summary(),
        in_flight,
        unaccounted,
        drain_incomplete,
        sent_again,
        sent_again_without,
        with_cuts: Suffered::between(&before, &between, found().as_deref()),
        without: Suffered::between(&between, &after, found().as_deref()),
    })
}

fn start_traffic(lab: &Lab, arguments: &Arguments) -> Result<(), Failure> {
    let (datagrams, bytes) = (arguments.datagrams, &arguments.bytes);
    let start = |machine: &str, first: &str, programs: [String; 2]| {
        let programs = programs.map(|program| {
            format!("setsid traffic {program} --status-every {STATUS_MS} </dev/null >/dev/null 2>&1 &")
        });
        lab.guest(ENVIRONMENT, machine, &format!("mkdir -p /run/load; {first} {}", programs.join(" ")))
    };
    for (_, to, _) in PAIRS {
        let udp = "udp-recv --port 7000 --status /run/load/udp.json".to_owned();
        let tcp = "tcp-serve --port 7001 --status /run/load/tcp.json".to_owned();
        start(to, "", [udp, tcp])?;
    }
    for (from, _, address) in PAIRS {
        let udp = format!("udp-send --to {address}:7000 --rate {datagrams} --status /run/load/udp.json");
        let tcp = format!("tcp-send --to {address}:7001 --rate {bytes} --status /run/load/tcp.json");
        start(from, &format!("ping -c 1 -W 30 {address} >/dev/null;"), [udp, tcp])?;
    }
    let end = Instant::now() + READY;
    while Instant::now() < end {
        // Not there yet is no failure.
        if let Ok(reading) = Reading::take(lab, ENVIRONMENT, MACHINES.map(|(machine, _)| machine))
            && reading.sum("udp-recv", |program| program.received) > 0
            && reading.of_kind("tcp-serve").filter(|program| program.bytes > 0).count() == PAIRS.len()
        {
            return lab::sleep(Duration::from_secs(3));
        }
        lab::sleep(Duration::from_millis(300))?;
    }
    Err(Failure::TooLate("traffic between the guests".to_owned(), READY.as_secs()))
}

/// What all programs say, and when.
struct Looked {
    at: Instant,
    /// When each machine was started, by its clock, which stands still with it.
    started: Vec<Instant>,
    reading: Reading,
}

impl Looked {
    fn take(lab: &Lab) -> Result<Self, Failure> {
        let at = Instant::now();
        let (mut started, mut programs) = (Vec::new(), Vec::new());
        // One after the other: guests that all answer at once hold each other up.
        for (machine, _) in MACHINES {
            programs.push(load::read(lab, ENVIRONMENT, machine)?);
            started.push(Self::started(lab, machine)?);
        }
        Ok(Self { at, started, reading: Reading(programs) })
    }

    fn started(lab: &Lab, machine: &str) -> Result<Instant, Failure> {
        let asked = Instant::now();
        let text = lab.guest(ENVIRONMENT, machine, "cat /proc/uptime")?;
        let uptime = text.split(' ').next().and_then(|seconds| seconds.parse().ok());
        let uptime = uptime.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        // It looked somewhere between the two.
        uptime.and_then(|uptime| (asked + asked.elapsed() / 2).checked_sub(uptime)).ok_or_else(|| {
            Failure::Guest { machine: machine.to_owned(), problem: format!("/proc/uptime: {text}") }
        })
    }
}

/// When a snapshot was asked for, and durable, and its removal asked for.
#[derive(Debug)]
struct Taken {
    asked: Instant,
    durable: Instant,
    removed: Instant,
    /// How long each machine stood still in it, and so did its clock.
    pauses: Vec<(String, Duration)>,
}

/// A segment that was sent again.
#[derive(Debug, Serialize)]
struct SentAgain {
    machine: &'static str,
    /// Seconds since the first reading.
    at_s: f64,
    /// The snapshot that was asked for last before.
    snapshot: Option<Since>,
    /// For how long the computer had stood still just before, in milliseconds; 0: it had not, or that cannot be seen.
    interrupted_ms: f64,
}

/// A snapshot, and when after it something happened.
#[derive(Debug, Serialize)]
struct Since {
    /// Counted from 0.
    number: usize,
    /// Seconds since it was asked for.
    asked_s: f64,
    /// Seconds from then until it was durable.
    durable_s: f64,
    /// Whether its removal had been asked for.
    removed: bool,
}

impl Since {
    /// The last that had been asked for by then.
    fn the_last(then: Instant, snapshots: &[Taken]) -> Option<Self> {
        let (number, taken) = snapshots.iter().enumerate().rfind(|(_, taken)| taken.asked <= then)?;
        Some(Self {
            number,
            asked_s: (then - taken.asked).as_secs_f64(),
            durable_s: (taken.durable - taken.asked).as_secs_f64(),
            removed: then > taken.removed + CLOCK_ERROR,
        })
    }
}

/// For how long the machine, and so its clock, has stood still in snapshots since then.
fn stood_still_since(then: Instant, machine: &str, snapshots: &[Taken]) -> Duration {
    let pauses = snapshots.iter().filter(|taken| taken.asked > then).flat_map(|taken| &taken.pauses);
    pauses.filter(|(name, _)| name == machine).map(|(_, pause)| *pause).sum()
}

/// For how long the computer stood still just before.
fn interrupted_before(then: Instant, interruptions: &[Interruption]) -> Duration {
    let just_before = |found: &&Interruption| {
        then + CLOCK_ERROR >= found.end && then.saturating_duration_since(found.end) <= AFTER_INTERRUPTION
    };
    interruptions.iter().filter(just_before).map(|found| found.length).sum()
}

impl SentAgain {
    /// All between two readings.
    fn between(
        before: &Looked,
        after: &Looked,
        snapshots: &[Taken],
        interruptions: &[Interruption],
    ) -> Vec<Self> {
        let mut found = Vec::new();
        let readings = before.reading.0.iter().zip(&after.reading.0).zip(&after.started);
        for ((machine, _), ((known, programs), started)) in MACHINES.iter().zip(readings) {
            // What was read before has begun with what was known then.
            let new = known.iter().zip(programs).flat_map(|(known, program)| {
                program.retransmitted_ms.iter().skip(known.retransmitted_ms.len())
            });
            for uptime_ms in new {
                let then = *started + Duration::from_millis(*uptime_ms);
                let then = then - stood_still_since(then, machine, snapshots);
                found.push(Self {
                    machine,
                    at_s: then.saturating_duration_since(before.at).as_secs_f64(),
                    snapshot: Since::the_last(then, snapshots),
                    interrupted_ms: interrupted_before(then, interruptions).as_secs_f64() * 1e3,
                });
            }
        }
        found
    }

    fn is_after_removal(&self) -> bool {
        self.snapshot.as_ref().is_some_and(|since| since.removed)
    }

    fn say(&self) {
        let Self { machine, at_s, snapshot, interrupted_ms } = self;
        let when = match snapshot {
            None => format!("{at_s:.2} s after programs were asked, without a snapshot"),
            Some(Since { number, asked_s, durable_s, removed }) => format!(
                "{asked_s:.2} s after snapshot {number} was asked for, which was durable after {durable_s:.2} s{}",
                if *removed { " and is removed" } else { "" },
            ),
        };
        let why = match interrupted_ms {
            0.0 => String::new(),
            ms => format!("; a processor of the computer had just stood still for {ms:.0} ms"),
        };
        say(format!("cluster: {machine} sent a segment again {when}{why}"));
    }
}

impl Suffered {
    fn between(before: &Looked, after: &Looked, interruptions: Option<&[Interruption]>) -> Self {
        let grown = |kind: &str, field: fn(&Program) -> u64| {
            after.reading.sum(kind, field).saturating_sub(before.reading.sum(kind, field))
        };
        Self {
            seconds: after.at.duration_since(before.at).as_secs_f64(),
            tcp_bytes: grown("tcp-serve", |program| program.bytes),
            tcp_retransmits: grown("tcp-send", |program| program.retransmits)
                + grown("tcp-serve", |program| program.retransmits),
            udp_received: grown("udp-recv", |program| program.received),
            udp_lost: grown("udp-recv", |program| program.lost),
            udp_duplicated: grown("udp-recv", |program| program.duplicated + program.too_old),
            udp_reordered: grown("udp-recv", |program| program.reordered),
            bad_bytes: grown("tcp-serve", |program| program.bad_bytes),
            interruptions: interruptions.map(|all| Interrupted::between(all, before.at, after.at)),
        }
    }
}

impl Interrupted {
    fn between(all: &[Interruption], from: Instant, to: Instant) -> Self {
        let within = all.iter().filter(|found| (from..to).contains(&found.end));
        within.fold(Self::default(), |sum, found| {
            let ms = found.length.as_secs_f64() * 1e3;
            Self { count: sum.count + 1, ms: sum.ms + ms, longest_ms: sum.longest_ms.max(ms) }
        })
    }
}

fn specification(memory_mib: u64) -> String {
    let machines: String = MACHINES
        .iter()
        .zip(1..)
        .map(|((machine, host), number)| {
            format!(
                "  {machine}: {{image: micro, memory: {memory_mib}MiB, host: h{host}, nics: [{{network: lan, address: 10.0.0.{number}/24}}]}}\n"
            )
        })
        .collect();
    format!("name: {ENVIRONMENT}\nmachines:\n{machines}networks:\n  lan: {{}}\n")
}

fn text(findings: &Findings) -> String {
    let figure = |name: &str, summary: &Summary, show: fn(f64) -> String, target: &str| {
        vec![name.to_owned(), show(summary.median), show(summary.max), target.to_owned()]
    };
    let rows = [
        figure("skew", &findings.skew_us, ms, "2"),
        figure("stall", &findings.stall_us, ms, "8"),
        figure("pause", &findings.pause_us, ms, ""),
        figure("until durable", &findings.create_ms, |value| format!("{value:.0}"), ""),
    ];
    let suffered = |name: &str, field: fn(&Suffered) -> String| {
        vec![name.to_owned(), field(&findings.with_cuts), field(&findings.without)]
    };
    let traffic = [
        suffered("seconds", |suffered| format!("{:.0}", suffered.seconds)),
        suffered("TCP bytes checked", |suffered| suffered.tcp_bytes.to_string()),
        suffered("TCP retransmissions", |suffered| suffered.tcp_retransmits.to_string()),
        vec![
            "times some were, from a removal to the next snapshot".to_owned(),
            findings.sent_again.iter().filter(|sent| sent.is_after_removal()).count().to_string(),
            String::new(),
        ],
        suffered("a processor stood still, times (longest, ms)", |suffered| {
            suffered
                .interruptions
                .map_or("not seen".to_owned(), |found| format!("{} ({:.0})", found.count, found.longest_ms))
        }),
        suffered("UDP datagrams received", |suffered| suffered.udp_received.to_string()),
        suffered("UDP lost", |suffered| suffered.udp_lost.to_string()),
        suffered("UDP reordered", |suffered| suffered.udp_reordered.to_string()),
    ];
    format!(
        "{} live snapshots of six machines of {} MiB on three hosts (network namespaces of one computer), which used {:.2} cores\n\
         before: {} frames in flight recorded, {} unaccounted, {} machines cut undrained. Milliseconds:\n\n{}\n\n{}\n",
        findings.cuts,
        findings.memory_mib,
        findings.cores_used,
        findings.in_flight,
        findings.unaccounted,
        findings.drain_incomplete,
        table(&["", "median", "max", "target (median)"], &rows),
        table(&["", "with cuts", "without"], &traffic),
    )
}
