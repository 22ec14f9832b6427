//! What a second snapshot of machines that do nothing adds to the store, against the pages that changed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use diorama_api::SnapshotReport;
use diorama_store::{SnapshotId, Store};

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, table};
use crate::lab::{self, Lab, say};
use crate::load::{self, Load};

const ENVIRONMENT: &str = "bench";
const PAGE: usize = 4096;
/// Pages that are compared at once.
const CHUNK: usize = 256 * PAGE;

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Pairs of snapshots
    #[arg(long, default_value_t = 5)]
    count: u32,
    /// Seconds between two
    #[arg(long, default_value_t = 10)]
    interval: u64,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let count = if common.quick { 1 } else { arguments.count };
    let lab = Lab::new()?;
    say("idle: starting four machines");
    load::start(&lab, ENVIRONMENT, common.memory, Load::Idle)?;
    lab::sleep(Duration::from_secs(20))?;
    let mut reports: Vec<SnapshotReport> = Vec::new();
    for number in 0..=count {
        say(format!("idle: snapshot {} of {}", number + 1, count + 1));
        reports.push(lab.run(&["-e", ENVIRONMENT, "snapshot", "create"])?);
        lab::sleep(Duration::from_secs(arguments.interval))?;
    }
    load::stop(&lab, ENVIRONMENT)?;
    let store = Store::open(&lab.home().join("store"))?;
    let mut rows = Vec::new();
    let mut json = Vec::new();
    for pair in reports.windows(2) {
        let [first, second] = pair else { continue };
        let changed = changed_pages(&store, lab.home(), first, second)?;
        let target = changed * PAGE as u64 * 6 / 5 + (64 << 10);
        rows.push(vec![
            second.name.clone(),
            changed.to_string(),
            (second.bytes.new >> 10).to_string(),
            (target >> 10).to_string(),
            format!("{:.2}", second.bytes.new as f64 / target as f64),
        ]);
        json.push(serde_json::json!({"changed_pages": changed, "new_bytes": second.bytes.new, "target_bytes": target}));
    }
    let text = format!(
        "Idle: four machines of {} MiB that do nothing, snapshots {} s apart. The target is 1.2 times the changed pages, and 64 KiB.\n{}",
        common.memory,
        arguments.interval,
        table(&["snapshot", "pages changed", "new, KiB", "target, KiB", "of the target"], &rows)
    );
    Ok(Outcome { name: "idle", json: serde_json::Value::Array(json), text, violations: Vec::new() })
}

fn changed_pages(
    store: &Store,
    folder: &Path,
    first: &SnapshotReport,
    second: &SnapshotReport,
) -> Result<u64, Failure> {
    let mut changed = 0;
    for machine in &first.machines {
        let [one, other] = [first, second].map(|report| memory(store, folder, &report.id, &machine.name));
        let (one, other) = (one?, other?);
        let [mut a, mut b] = [vec![0; CHUNK], vec![0; CHUNK]];
        let mut offset = 0;
        while offset < machine.ram_bytes {
            let bytes = CHUNK.min(usize::try_from(machine.ram_bytes - offset).unwrap_or(CHUNK));
            for (file, buffer) in [(&one, &mut a), (&other, &mut b)] {
                file.read_exact_at(&mut buffer[..bytes], offset)
                    .map_err(Failure::io("cannot read memory"))?;
            }
            let pages = a[..bytes].chunks(PAGE).zip(b[..bytes].chunks(PAGE));
            changed += pages.filter(|(one, other)| one != other).count() as u64;
            offset += bytes as u64;
        }
    }
    Ok(changed)
}

fn memory(store: &Store, folder: &Path, id: &str, machine: &str) -> Result<File, Failure> {
    let file = tempfile::tempfile_in(folder).map_err(Failure::io("cannot make a file for memory"))?;
    let loaded = store.load(&id.parse::<SnapshotId>()?)?;
    store.copy_ram(&loaded, machine, &file, &mut |_, _| {})?;
    Ok(file)
}
