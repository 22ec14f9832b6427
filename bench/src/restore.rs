//! From the command to running machines: restore and fork, and what an idle fork takes.

use std::fs;
use std::time::Duration;

use clap::Args;
use diorama_api::{ForkReport, RestoreReport, SnapshotReport};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, Summary, table};
use crate::lab::{self, Lab, say};
use crate::load::{self, Load, MACHINES};

const ENVIRONMENT: &str = "bench";
/// After a fork, before its memory is looked at: the guests are idle by then.
const IDLE: Duration = Duration::from_secs(5);

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Restores of each kind, and forks of each number
    #[arg(long, default_value_t = 10)]
    count: u32,
    /// How many forks are made at once, at most (1, 2, 4, …)
    #[arg(long, default_value_t = 8)]
    forks: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { count: 10, forks: 8 }
    }
}

#[derive(Debug, Serialize)]
struct RestoreRow {
    memory: &'static str,
    ready_ms: Summary,
}

#[derive(Debug, Serialize)]
struct ForkRow {
    forks: u32,
    ready_ms: Summary,
    /// (this − one fork) / (forks − 1) / machines: what each further fork adds for each machine.
    further_ms_a_machine: Option<f64>,
}

/// Memory of one machine of an idle fork, in MiB.
#[derive(Debug, Serialize)]
struct MemoryRow {
    forks: u32,
    pss_mib: Summary,
    private_mib: Summary,
    shared_mib: Summary,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let count = if common.quick { 2 } else { arguments.count };
    let lab = Lab::new()?;
    say("restore: starting four machines");
    load::start(&lab, ENVIRONMENT, common.memory, Load::Light)?;
    let base: SnapshotReport = lab.run(&["-e", ENVIRONMENT, "snapshot", "create", "base"])?;
    let mut restores = Vec::new();
    for (memory, cold) in [("in the RAM cache", false), ("from the store", true)] {
        say(format!("restore: {count} restores, memory {memory}"));
        let mut ready = Sample::default();
        for _ in 0..count {
            if cold {
                empty_ram_cache(&lab)?;
            }
            let report: RestoreReport = lab.run(&["-e", ENVIRONMENT, "restore", &base.id])?;
            ready.push(report.ready_ms as f64);
        }
        restores.push(RestoreRow { memory, ready_ms: ready.summary() });
    }
    // Forks of guests that do nothing, with nothing beside them.
    load::stop(&lab, ENVIRONMENT)?;
    load::start(&lab, ENVIRONMENT, common.memory, Load::Idle)?;
    lab::sleep(IDLE)?;
    let idle: SnapshotReport = lab.run(&["-e", ENVIRONMENT, "snapshot", "create", "idle"])?;
    load::stop(&lab, ENVIRONMENT)?;
    let (forks, memory) = forks(&lab, &idle.id, count, arguments.forks)?;
    let json = serde_json::json!({
        "memory_mib": common.memory, "ram_used_bytes": idle.machines.iter().map(|m| m.ram_used_bytes).sum::<u64>(),
        "restores": restores, "forks": forks, "memory": memory,
    });
    let text = text(common.memory, &restores, &forks, &memory);
    Ok(Outcome { name: "restore", json, text, violations: Vec::new() })
}

fn forks(
    lab: &Lab,
    snapshot: &str,
    count: u32,
    most: u32,
) -> Result<(Vec<ForkRow>, Vec<MemoryRow>), Failure> {
    let mut rows: Vec<ForkRow> = Vec::new();
    let mut memory = Vec::new();
    let numbers = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n <= most);
    for number in numbers {
        say(format!("restore: {count} times {number} forks"));
        let text = number.to_string();
        let mut ready = Sample::default();
        for n in 0..count {
            let report: ForkReport =
                lab.run(&["fork", snapshot, "--count", &text, "--name", &format!("fork{n}")])?;
            ready.push(report.environments.iter().map(|fork| fork.ready_ms).max().unwrap_or(0) as f64);
            let names: Vec<&str> = report.environments.iter().map(|fork| fork.environment.as_str()).collect();
            if n + 1 == count {
                lab::sleep(IDLE)?;
                memory.push(memory_of(lab, &names)?);
            }
            for name in names {
                load::stop(lab, name)?;
            }
        }
        let one = rows.first().map(|row| row.ready_ms.median);
        rows.push(ForkRow {
            forks: number,
            ready_ms: ready.summary(),
            further_ms_a_machine: one
                .map(|one| (ready.median() - one) / f64::from(number - 1) / MACHINES.len() as f64),
        });
    }
    Ok((rows, memory))
}

fn memory_of(lab: &Lab, environments: &[&str]) -> Result<MemoryRow, Failure> {
    let (mut pss, mut private, mut shared) = (Sample::default(), Sample::default(), Sample::default());
    for environment in environments {
        for pid in load::pids(lab, environment)? {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = fs::read_to_string(&path).map_err(Failure::io(format!("cannot read {path}")))?;
            let mib = |names: &[&str]| {
                let kib = |line: &str| line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
                text.lines()
                    .filter(|line| {
                        names
                            .iter()
                            .any(|name| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(':')))
                    })
                    .filter_map(kib)
                    .sum::<f64>()
                    / 1024.0
            };
            pss.push(mib(&["Pss"]));
            private.push(mib(&["Private_Clean", "Private_Dirty"]));
            shared.push(mib(&["Shared_Clean", "Shared_Dirty"]));
        }
    }
    Ok(MemoryRow {
        forks: environments.len() as u32,
        pss_mib: pss.summary(),
        private_mib: private.summary(),
        shared_mib: shared.summary(),
    })
}

/// Snapshots' memory is then loaded from the store, and checked, again. The kernel's cache of the disk stays.
pub(crate) fn empty_ram_cache(lab: &Lab) -> Result<(), Failure> {
    let folder = lab.runtime().join("ram");
    let entries = fs::read_dir(&folder).map_err(Failure::io(format!("cannot read {}", folder.display())))?;
    for entry in entries.flatten() {
        let path = entry.path();
        fs::remove_dir_all(&path).map_err(Failure::io(format!("cannot remove {}", path.display())))?;
    }
    Ok(())
}

fn text(memory_mib: u64, restores: &[RestoreRow], forks: &[ForkRow], memory: &[MemoryRow]) -> String {
    let restores: Vec<_> = restores
        .iter()
        .map(|row| {
            vec![
                row.memory.to_owned(),
                row.ready_ms.count.to_string(),
                format!("{:.0}", row.ready_ms.median),
                format!("{:.0}", row.ready_ms.max),
            ]
        })
        .collect();
    let forks: Vec<_> = forks
        .iter()
        .map(|row| {
            vec![
                row.forks.to_string(),
                row.ready_ms.count.to_string(),
                format!("{:.0}", row.ready_ms.median),
                format!("{:.0}", row.ready_ms.max),
                row.further_ms_a_machine.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}")),
            ]
        })
        .collect();
    let memory: Vec<_> = memory
        .iter()
        .map(|row| {
            let mut line = vec![row.forks.to_string()];
            for sample in [&row.pss_mib, &row.private_mib, &row.shared_mib] {
                line.extend([format!("{:.1}", sample.median), format!("{:.1}", sample.max)]);
            }
            line
        })
        .collect();
    format!(
        "Restore in place of four machines of {memory_mib} MiB under light load: milliseconds from the command's start\n\
         until all run.\n\n{}\n\n\
         Forks of four idle machines of {memory_mib} MiB, with nothing else running: milliseconds from the command's\n\
         start until the last machine of the last fork runs.\n\n{}\n\n\
         Memory of one machine of an idle fork, {} s after the fork, MiB (QEMU and guest together).\n\n{}\n",
        table(&["memory", "restores", "median", "max"], &restores),
        table(&["forks", "times", "median", "max", "each further fork, a machine"], &forks),
        IDLE.as_secs(),
        table(&["forks", "PSS", "max", "private", "max", "shared", "max"], &memory)
    )
}
