//! What collecting takes of time and memory when there are many snapshots and chunks.
//!
//! A store is filled in memory: each snapshot has changed some pages of one machine since the one before. Then the older
//! half of the snapshots is removed, and a process of its own opens the store and collects; its peak of resident memory is
//! what the kernel says.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use diorama_store::{CollectOptions, Manifest, Piece, SnapshotId, Store, StoreError};
use serde::{Deserialize, Serialize};

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, table};
use crate::lab::{self, say};

const PAGE: u64 = 4096;
/// Of the machine's memory.
const PAGES: u64 = 512;

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Snapshots
    #[arg(long, default_value_t = 10_000)]
    snapshots: u64,
    /// Pages that are new in each of them
    #[arg(long, default_value_t = 100)]
    new_pages: u64,
}

/// What the collecting process says.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    open_ms: f64,
    collect_ms: f64,
    traced: usize,
    needed_chunks: u64,
    removed_packs: usize,
    freed_bytes: u64,
    peak_resident_bytes: u64,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let snapshots = if common.quick { arguments.snapshots / 20 } else { arguments.snapshots };
    let folder = lab::folder(Path::new("/dev/shm"))?;
    let path = folder.path().join("store");
    say(format!("collection: {snapshots} snapshots with {} new pages each", arguments.new_pages));
    let started = Instant::now();
    let ids = fill(folder.path(), &path, snapshots, arguments.new_pages)?;
    let fill_s = started.elapsed().as_secs_f64();
    let store = Store::open(&path)?;
    let before = store.stats()?;
    say("collection: removing the older half");
    for id in &ids[..ids.len() / 2] {
        store.remove(id)?;
    }
    drop(store);
    say("collection: collecting");
    let program = std::env::current_exe().map_err(Failure::io("cannot find this program"))?;
    let output = Command::new(program)
        .arg("collect-store")
        .arg(&path)
        .output()
        .map_err(Failure::io("cannot run this program again"))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Failure::Command { command: "collect-store".to_owned(), reason });
    }
    let report: Report = serde_json::from_slice(&output.stdout).map_err(|error| Failure::Output {
        command: "collect-store".to_owned(),
        reason: error.to_string(),
    })?;
    let rows = vec![vec![
        snapshots.to_string(),
        before.chunks.to_string(),
        before.packs.to_string(),
        report.traced.to_string(),
        report.removed_packs.to_string(),
        format!("{:.1}", report.open_ms / 1e3),
        format!("{:.1}", report.collect_ms / 1e3),
        (report.peak_resident_bytes >> 20).to_string(),
    ]];
    let header =
        ["snapshots", "chunks", "packs", "kept", "packs removed", "open, s", "collect, s", "peak, MiB"];
    let text = format!(
        "Collecting after the older half of the snapshots was removed; the store is in memory, and was filled in {fill_s:.0} s.\n{}",
        table(&header, &rows)
    );
    let json = serde_json::json!({
        "snapshots": snapshots, "chunks": before.chunks, "packs": before.packs, "fill_s": fill_s, "collecting": report,
    });
    Ok(Outcome { name: "collection", json, text, violations: Vec::new() })
}

/// The process that collects.
pub(crate) fn collect(path: &Path) -> Result<(), Failure> {
    let started = Instant::now();
    let store = Store::open(path)?;
    let open_ms = started.elapsed().as_secs_f64() * 1e3;
    let started = Instant::now();
    let collected = store.collect(CollectOptions::default(), &mut |_, _| {})?;
    let report = Report {
        open_ms,
        collect_ms: started.elapsed().as_secs_f64() * 1e3,
        traced: collected.plan.snapshots,
        needed_chunks: collected.plan.needed_chunks,
        removed_packs: collected.removed_packs,
        freed_bytes: collected.freed_bytes,
        peak_resident_bytes: peak_resident_bytes()?,
    };
    println!("{}", serde_json::to_string(&report).expect("a report is plain data"));
    Ok(())
}

fn peak_resident_bytes() -> Result<u64, Failure> {
    let what = "/proc/self/status";
    let status = std::fs::read_to_string(what).map_err(Failure::io(what))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| Failure::Output {
            command: what.to_owned(),
            reason: "it does not say how much memory was used".into(),
        })
}

fn fill(folder: &Path, path: &Path, snapshots: u64, new_pages: u64) -> Result<Vec<SnapshotId>, Failure> {
    let store = Store::open(path)?;
    let memory = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(folder.join("memory"))
        .map_err(Failure::io("cannot make memory"))?;
    memory.set_len(PAGES * PAGE).map_err(Failure::io("cannot make memory"))?;
    let mut page = [0; PAGE as usize];
    let mut ids = Vec::new();
    for snapshot in 0..snapshots {
        lab::check_interrupted()?;
        for new in snapshot * new_pages..(snapshot + 1) * new_pages {
            // Unlike every other, and as compressible as a guest's pages are (to about a third).
            let mut word = new.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for slot in page[..PAGE as usize / 3].chunks_exact_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                slot.copy_from_slice(&word.to_le_bytes());
            }
            memory.write_all_at(&page, new % PAGES * PAGE).map_err(Failure::io("cannot write memory"))?;
        }
        ids.push(commit(&store, &memory, snapshot)?);
    }
    Ok(ids)
}

fn commit(store: &Store, memory: &File, number: u64) -> Result<SnapshotId, StoreError> {
    let writer = store.begin()?;
    let ram = writer.put_ram("one", memory, PAGES * PAGE, &mut |_, _| {})?;
    let device_state = writer.put_bytes(Piece::DeviceState, "one", b"state")?;
    let frames = writer.put_frames(&[])?;
    let bytes = writer.seal()?;
    let manifest = serde_json::json!({
        "format": diorama_store::FORMAT, "name": format!("s{number}"), "message": "", "environment": "many",
        "parent": null, "created": "2026-01-01T00:00:00Z", "capture": "live", "in_flight_policy": "record",
        "specification": {
            "name": "many", "networks": [],
            "machines": [{
                "name": "one", "boot": {"kind": "built-in", "image": "micro"}, "cpus": 1,
                "memory_bytes": PAGES * PAGE, "cpu_model": null, "accelerator": "auto", "nics": [], "disks": [],
            }],
        },
        "cut": {"epoch": number, "skew_us": 0, "hosts": 1, "attempt": ""},
        "machines": [{
            "name": "one", "host": "here", "state": "running", "pause_us": 0, "stall_us": 0, "drain_incomplete": false,
            "hardware": {
                "qemu_version": "7.2.22", "machine_type": "pc-q35-7.2", "cpu_model": "qemu64", "accelerator": "tcg",
                "vcpus": 1, "memory_bytes": PAGES * PAGE, "tb_size_mib": null,
            },
            "ram": ram, "device_state": device_state, "disks": [], "kernel": null, "initrd": null, "cmdline": null,
        }],
        "networks": [], "frames": frames, "bytes": bytes,
    });
    let manifest: Manifest = serde_json::from_value(manifest).expect("a manifest's fields are these");
    writer.commit(manifest)
}

/// Its hidden command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Collect {
    store: PathBuf,
}

impl Collect {
    /// Where the store is.
    pub(crate) fn store(&self) -> &Path {
        &self.store
    }
}
