//! Measures Diorama: what docs/benchmarks.md has in tables is printed by this program, unless it says otherwise.
//!
//! | module | owns |
//! | --- | --- |
//! | [`lab`] | private folders, the real `diorama` binary, and what is left behind: nothing |
//! | [`load`] | four machines, and the traffic in them |
//! | [`standstill`] | when programs in guests are seen at work, from outside |
//! | [`interruption`] | when the computer itself stood still |
//! | [`figures`] | medians, maxima, tables |
//! | [`snapshot`], [`consistency`], [`restore`], [`lazy`], [`store`], [`collection`], [`idle`], [`switch`], [`protect`], [`cluster`], [`tunnel`] | one benchmark each |
//!
//! Standard output carries tables, or with `--json` one JSON document; what is being done goes to standard error.
//! Exit status: 0 measured (figures are not judged), 1 failed, or the consistency that snapshots promise is broken.

mod cluster;
mod collection;
mod consistency;
mod failure;
mod figures;
mod idle;
mod interruption;
mod lab;
mod lazy;
mod load;
mod protect;
mod restore;
#[allow(dead_code, reason = "as tests need it")]
#[path = "../../testing/s3_server.rs"]
mod s3_server;
#[allow(dead_code, reason = "as tests need it")]
#[path = "../../testing/scratch.rs"]
mod scratch;
mod snapshot;
mod standstill;
mod store;
mod switch;
mod tunnel;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::failure::Failure;
use crate::figures::Outcome;

/// Measure Diorama on this computer.
#[derive(Debug, Parser)]
#[command(name = "diorama-bench")]
struct Arguments {
    #[command(subcommand)]
    benchmark: Benchmark,
    #[command(flatten)]
    common: Common,
}

/// What all benchmarks take.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// Print one JSON document instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Measure less: a look at whether everything works, not figures to quote
    #[arg(long, global = true)]
    quick: bool,
    /// Memory of each machine, in MiB
    #[arg(long, global = true, default_value_t = 256, value_name = "MIB")]
    memory: u64,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    /// What a snapshot costs running machines: pause, stall, skew, against stopping and pre-copy
    Snapshot(snapshot::Arguments),
    /// What the guests' traffic sees of snapshots and restores (nothing, or this fails)
    Consistency(consistency::Arguments),
    /// From the command to running machines: restore and fork, and what an idle fork takes
    Restore(restore::Arguments),
    /// Restores that load memory first, against those that load it while machines run: from a folder, from a bucket
    Lazy(lazy::Arguments),
    /// What snapshots take in the store, and how fast they go in and come out
    Store(store::Arguments),
    /// What collecting takes of time and memory with many snapshots and chunks
    Collection(collection::Arguments),
    /// What a second snapshot of machines that do nothing adds to the store
    Idle(idle::Arguments),
    /// Frames a second through two ports, against vde_switch and a Linux bridge (as root)
    Switch(switch::Arguments),
    /// Snapshots across three hosts: skew, stall, and what the traffic between them suffers (as root)
    Cluster(cluster::Arguments),
    /// Packets a second between two hosts, against VXLAN and plain UDP (as root)
    Tunnel(tunnel::Arguments),
    /// Write protection of memory in small and in huge pages (as root)
    Protect(protect::Arguments),
    /// Most of them, in the order protect, switch, tunnel, restore, consistency, snapshot, cluster; not store, collection, idle
    All(All),
    /// The data plane alone between two sockets, for `switch`
    #[command(hide = true)]
    DataPlane { sockets: Vec<PathBuf> },
    /// Collecting in a process of its own, for `collection`
    #[command(hide = true)]
    CollectStore(collection::Collect),
}

/// Every benchmark's arguments but their defaults.
#[derive(Debug, Clone, Args)]
struct All {}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    lab::end_on_signals();
    match run(arguments) {
        Ok(violations) if violations.is_empty() => ExitCode::SUCCESS,
        Ok(violations) => {
            for violation in violations {
                eprintln!("VIOLATION: {violation}");
            }
            ExitCode::FAILURE
        }
        Err(failure) => {
            eprintln!("diorama-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<Vec<String>, Failure> {
    let common = &arguments.common;
    let outcomes = match arguments.benchmark {
        Benchmark::Snapshot(arguments) => vec![snapshot::run(&arguments, common)?],
        Benchmark::Consistency(arguments) => vec![consistency::run(&arguments, common)?],
        Benchmark::Restore(arguments) => vec![restore::run(&arguments, common)?],
        Benchmark::Lazy(arguments) => vec![lazy::run(&arguments, common)?],
        Benchmark::Store(arguments) => vec![store::run(&arguments, common)?],
        Benchmark::Collection(arguments) => vec![collection::run(&arguments, common)?],
        Benchmark::Idle(arguments) => vec![idle::run(&arguments, common)?],
        Benchmark::Switch(arguments) => vec![switch::run(&arguments, common)?],
        Benchmark::Cluster(arguments) => vec![cluster::run(&arguments, common)?],
        Benchmark::Tunnel(arguments) => vec![tunnel::run(&arguments, common)?],
        Benchmark::Protect(arguments) => vec![protect::run(&arguments)?],
        Benchmark::All(_) => vec![
            protect::run(&protect::Arguments::default())?,
            switch::run(&switch::Arguments::default(), common)?,
            tunnel::run(&tunnel::Arguments::default(), common)?,
            restore::run(&restore::Arguments::default(), common)?,
            consistency::run(&consistency::Arguments::default(), common)?,
            snapshot::run(&snapshot::Arguments::default(), common)?,
            cluster::run(&cluster::Arguments::default(), common)?,
        ],
        Benchmark::CollectStore(arguments) => {
            collection::collect(arguments.store())?;
            return Ok(Vec::new());
        }
        Benchmark::DataPlane { sockets } => {
            switch::run_data_plane(&sockets)?;
            return Ok(Vec::new());
        }
    };
    print(&outcomes, common.json);
    Ok(outcomes.into_iter().flat_map(|outcome| outcome.violations).collect())
}

fn print(outcomes: &[Outcome], json: bool) {
    if json {
        let document: serde_json::Map<_, _> =
            outcomes.iter().map(|outcome| (outcome.name.to_owned(), outcome.json.clone())).collect();
        println!("{}", serde_json::Value::Object(document));
    } else {
        for outcome in outcomes {
            println!("{}", outcome.text);
        }
    }
}
