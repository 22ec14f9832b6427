//! Four machines on one network, and what they do while they are measured.
//!
//! Every program in a guest writes its status to `/run/load/NAME.json` (see images/README.md).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use diorama_api::{EnvironmentStatus, MachineStatus};
use serde::Deserialize;

use crate::failure::Failure;
use crate::lab::{self, Lab};

/// The machines, in the order of their addresses 10.0.0.1 and on.
pub(crate) const MACHINES: [&str; 4] = ["a", "b", "c", "d"];
/// Tokens in the ring.
pub(crate) const TOKENS: usize = 32;
/// How long programs in guests may take to start or to show their status.
const READY: Duration = Duration::from_secs(60);

/// What the machines do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    /// Nothing.
    Idle,
    /// A paced UDP and a paced TCP stream in each pair: within the two cores.
    Light,
    /// The same, and every machine writes to a disk and to a part of its memory.
    Writing,
    /// As light, iperf3 as fast as it goes in each pair, and all machines writing to memory.
    Busy,
    /// Tokens as fast as they go round all machines, a UDP and a TCP stream.
    Ring,
}

/// Starts environment `name` from nothing and lets its machines do `load`.
pub(crate) fn start(lab: &Lab, name: &str, memory_mib: u64, load: Load) -> Result<(), Failure> {
    let file = lab.write(&format!("{name}.yaml"), &specification(name, memory_mib, load))?;
    let file = file.to_string_lossy().into_owned();
    let _: EnvironmentStatus = lab.run(&["up", &file])?;
    for machine in MACHINES {
        lab.guest(name, machine, "mkdir -p /run/load")?;
    }
    for (machine, program, command) in programs(load) {
        let status = format!("/run/load/{program}.json");
        let command = command.replace("STATUS", &format!("--status {status}"));
        let script = format!("setsid {command} </dev/null >/run/load/{program}.log 2>&1 &");
        lab.guest(name, machine, &script)?;
    }
    if load != Load::Idle {
        wait_for_traffic(lab, name)?;
    }
    Ok(())
}

/// Takes an environment down for good.
pub(crate) fn stop(lab: &Lab, name: &str) -> Result<(), Failure> {
    let _: serde_json::Value = lab.run(&["-e", name, "down", "--volumes"])?;
    Ok(())
}

/// How much of the processors the machines use, in cores, measured for a while.
pub(crate) fn cores_used(lab: &Lab, name: &str) -> Result<f64, Failure> {
    let pids = pids(lab, name)?;
    let used = || -> Duration { pids.iter().filter_map(|pid| lab::cpu_time(*pid)).sum() };
    let (before, start) = (used(), Instant::now());
    lab::sleep(Duration::from_secs(3))?;
    Ok((used() - before).as_secs_f64() / start.elapsed().as_secs_f64())
}

/// The QEMU processes.
pub(crate) fn pids(lab: &Lab, name: &str) -> Result<Vec<u32>, Failure> {
    Ok(machines(lab, name)?.iter().filter_map(|machine| machine.pid).collect())
}

/// The machines, as `status` has them.
pub(crate) fn machines(lab: &Lab, name: &str) -> Result<Vec<MachineStatus>, Failure> {
    #[derive(Deserialize)]
    struct Status {
        environments: Vec<EnvironmentStatus>,
    }
    let status: Status = lab.run(&["-e", name, "status"])?;
    Ok(status.environments.into_iter().flat_map(|environment| environment.machines).collect())
}

/// What one program in a guest says of itself. Fields that it does not have are 0.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Program {
    pub(crate) kind: String,
    pub(crate) state: String,
    pub(crate) connection: serde_json::Value,
    pub(crate) bytes: u64,
    pub(crate) retransmits: u64,
    /// When `retransmits` was seen to have grown, in milliseconds since the machine was started.
    pub(crate) retransmitted_ms: Vec<u64>,
    pub(crate) bad_bytes: u64,
    pub(crate) received: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) reordered: u64,
    pub(crate) too_old: u64,
    pub(crate) duplicates: u64,
    pub(crate) hops: u64,
    pub(crate) last_hops: BTreeMap<String, u64>,
}

/// What all programs of each machine say, machine by machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading(pub(crate) Vec<Vec<Program>>);

impl Reading {
    /// Asks all those machines at once.
    pub(crate) fn take<'a>(
        lab: &Lab,
        environment: &str,
        machines: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, Failure> {
        std::thread::scope(|scope| {
            let machines = machines.into_iter();
            let reads: Vec<_> =
                machines.map(|machine| scope.spawn(move || read(lab, environment, machine))).collect();
            let readings = reads.into_iter().map(|read| read.join().expect("reading does not panic"));
            readings.collect::<Result<Vec<_>, _>>().map(Self)
        })
    }

    /// Every program of that kind.
    pub(crate) fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Program> {
        self.0.iter().flatten().filter(move |program| program.kind == kind)
    }

    /// A figure of every program of that kind, summed.
    pub(crate) fn sum(&self, kind: &str, field: fn(&Program) -> u64) -> u64 {
        self.of_kind(kind).map(field).sum()
    }
}

/// What the programs of one machine say.
pub(crate) fn read(lab: &Lab, environment: &str, machine: &str) -> Result<Vec<Program>, Failure> {
    let text = lab.guest(environment, machine, "cat /run/load/*.json")?;
    serde_json::Deserializer::from_str(&text)
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::Guest { machine: machine.to_owned(), problem: format!("status: {error}") })
}

fn wait_for_traffic(lab: &Lab, name: &str) -> Result<(), Failure> {
    let end = Instant::now() + READY;
    while Instant::now() < end {
        // Not there yet is no failure: the shell finds no file until the program has written one.
        if let Ok(reading) = Reading::take(lab, name, MACHINES) {
            let flows = reading.of_kind("udp-recv").all(|program| program.received > 0)
                && reading.of_kind("tcp-serve").all(|program| program.bytes > 0)
                && reading.of_kind("token-ring").all(|program| program.last_hops.len() == TOKENS);
            if flows {
                return lab::sleep(Duration::from_secs(2));
            }
        }
        lab::sleep(Duration::from_millis(200))?;
    }
    Err(Failure::TooLate("traffic between the guests".to_owned(), READY.as_secs()))
}

/// Machine, program, command.
fn programs(load: Load) -> Vec<(&'static str, String, String)> {
    let mut programs = Vec::new();
    let mut add = |machine: &'static str, name: &str, command: String| {
        programs.push((machine, name.to_owned(), command))
    };
    let pairs: &[(&'static str, &'static str, &str)] = match load {
        Load::Idle => &[],
        Load::Light | Load::Writing | Load::Busy => &[("a", "b", "10.0.0.2"), ("c", "d", "10.0.0.4")],
        Load::Ring => &[("a", "c", "10.0.0.3"), ("b", "d", "10.0.0.4")],
    };
    // Emulated guests are slow: more than this is not within two cores.
    let (datagrams, bytes) =
        if matches!(load, Load::Light | Load::Writing) { (100, "64KiB") } else { (200, "256KiB") };
    for (from, to, address) in pairs {
        add(to, "udp-recv", "traffic udp-recv --port 7000 STATUS".into());
        add(to, "tcp-serve", "traffic tcp-serve --port 7001 STATUS".into());
        add(from, "udp-send", format!("traffic udp-send --to {address}:7000 --rate {datagrams} STATUS"));
        add(from, "tcp-send", format!("traffic tcp-send --to {address}:7001 --rate {bytes} STATUS"));
    }
    if load == Load::Writing {
        for machine in MACHINES {
            add(machine, "disk", "traffic disk --file /dev/vda --size 32MiB --rate 64KiB STATUS".into());
            add(machine, "memory", "traffic memory --bytes 8MiB --rate 20 STATUS".into());
        }
    }
    if load == Load::Busy {
        for (from, to, address) in pairs {
            add(to, "iperf", "iperf3 -s".into());
            add(from, "iperf", format!("sh -c 'until iperf3 -c {address} -t 86400; do sleep 1; done'"));
        }
        for machine in MACHINES {
            add(machine, "memory", "traffic memory --bytes 32MiB --rate 5000 STATUS".into());
        }
    }
    if load == Load::Ring {
        // The last one injects: the others must listen by then, and the probe waits until they do.
        for (at, machine) in MACHINES.iter().enumerate() {
            let next = (at + 1) % MACHINES.len() + 1;
            let inject = if at + 1 == MACHINES.len() { format!("--inject {TOKENS}") } else { String::new() };
            let command = format!(
                "traffic token-ring --listen 7002 --next 10.0.0.{next}:7002 --id {at} {inject} STATUS"
            );
            add(machine, "ring", command);
        }
    }
    programs
}

fn specification(name: &str, memory_mib: u64, load: Load) -> String {
    let disks = if load == Load::Writing { ", disks: [{name: data, size: 64MiB}]" } else { "" };
    let machines: String = MACHINES
        .iter()
        .zip(1..)
        .map(|(machine, host)| {
            format!(
                "  {machine}: {{image: micro, memory: {memory_mib}MiB, nics: [{{network: lan, address: 10.0.0.{host}/24}}]{disks}}}\n"
            )
        })
        .collect();
    format!("name: {name}\nmachines:\n{machines}networks:\n  lan: {{}}\n")
}
