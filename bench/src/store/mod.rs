//! What snapshots of machines at work take in the store, and how fast memory goes in and comes out.
//!
//! Four machines run under a light load and write to their disks, and are snapshotted again and again. Then the same memory
//! and the same layers of disks are put into a store of their own, by one thread, and the memory is read back: so that
//! nothing else is in the figures. Beside it stands what zstd makes of all different pages and clusters in one piece, what
//! restic and borg make of the same files, where they are installed, and what QEMU's own snapshots within a qcow2 image take
//! ([`internal`]).

mod internal;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use diorama_api::SnapshotReport;
use diorama_store::{
    Address, CLUSTER_BYTES, LayerRecord, MachineRecord, Manifest, OpenOptions, PAGE_BYTES, PassphraseCost,
    Piece, Secret, SnapshotId, Store, StoreError,
};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, table};
use crate::lab::{self, Lab, say};
use crate::load::{self, Load};

const ENVIRONMENT: &str = "bench";
const MIB: f64 = 1_048_576.0;

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Snapshots
    #[arg(long, default_value_t = 10)]
    count: u32,
    /// Seconds between two
    #[arg(long, default_value_t = 60)]
    interval: u64,
}

/// One snapshot, by one thread.
#[derive(Debug, Serialize)]
struct Row {
    /// All memory, zeros included.
    logical_bytes: u64,
    /// In pages that are not all zeros.
    used_bytes: u64,
    /// What it added to the store.
    new_bytes: u64,
    /// The memory, until it was durable.
    ingest_ms: f64,
    /// Memory and disks, until all was durable.
    whole_ms: f64,
    restore_ms: f64,
}

/// What somebody makes of all snapshots together.
#[derive(Debug, Serialize)]
struct Total {
    what: &'static str,
    bytes: u64,
    /// After the first snapshot; after all of them less that is what the later ones added.
    first_bytes: Option<u64>,
    /// What putting all snapshots in took, by one processor; where that can be said.
    whole_ms: Option<f64>,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let count = if common.quick { 3 } else { arguments.count };
    let interval = Duration::from_secs(if common.quick { 5 } else { arguments.interval });
    let lab = Lab::new()?;
    say("store: starting four machines");
    load::start(&lab, ENVIRONMENT, common.memory, Load::Writing)?;
    let mut ids = Vec::new();
    for number in 1..=count {
        lab::sleep(interval)?;
        say(format!("store: snapshot {number} of {count}"));
        let name = format!("s{number}");
        let report: SnapshotReport = lab.run(&["-e", ENVIRONMENT, "snapshot", "create", &name])?;
        ids.push(report.id.parse::<SnapshotId>()?);
    }
    let internal = internal::measure(&lab, ENVIRONMENT, count)?;
    load::stop(&lab, ENVIRONMENT)?;

    let source = Store::open(&lab.home().join("store"))?;
    let files = lab.home().join("contents");
    let mut snapshots = Vec::new();
    for id in &ids {
        let manifest = source.load(id)?.manifest;
        let folder = files.join(id.to_string());
        fs::create_dir_all(&folder).map_err(Failure::io("cannot make a folder for contents"))?;
        let create =
            |name: String| File::create(folder.join(name)).map_err(Failure::io("cannot write contents"));
        for machine in &manifest.machines {
            let file = create(machine.name.clone())?;
            let loaded =
                source.load(id).and_then(|s| source.copy_ram(&s, &machine.name, &file, &mut |_, _| {}));
            loaded?;
            for (disk, index, layer) in layers(machine) {
                let file = create(layer_file(&machine.name, disk, index))?;
                source.copy_layer(layer, &file, &mut |_, _| {})?;
            }
        }
        snapshots.push((manifest, folder));
    }
    let target = lab.home().join("alone");
    let sealed = lab.home().join("sealed");
    let secret = Secret::key(vec![1; 32].into())?;
    Store::create_encrypted(&sealed, &secret, PassphraseCost::default(), "")?;
    let encrypted = OpenOptions { secret: Some(secret), signer: None };
    let mut rows = Vec::new();
    let mut encrypted_rows = Vec::new();
    say("store: putting memory in and reading it back, not encrypted and encrypted by turns");
    for (manifest, folder) in &snapshots {
        rows.push(one(&target, &OpenOptions::default(), manifest, folder)?);
        encrypted_rows.push(one(&sealed, &encrypted, manifest, folder)?);
    }
    let mut totals = vec![
        Total {
            what: "this store",
            bytes: tree_bytes(&target.join("packs"))?,
            first_bytes: rows.first().map(|row| row.new_bytes),
            whole_ms: Some(rows.iter().map(|row| row.whole_ms).sum()),
        },
        whole(&snapshots)?,
    ];
    let folders: Vec<&Path> = snapshots.iter().map(|(_, folder)| folder.as_path()).collect();
    totals.extend(restic(lab.home(), &folders)?);
    totals.extend(borg(lab.home(), &folders)?);
    totals.push(internal);
    let index = Store::open(&target).and_then(|store| store.stats())?;
    let many = if common.quick { 1_000 } else { 10_000 };
    let list_ms = list(&snapshots[0].0, many)?;
    let json = serde_json::json!({
        "listed": many, "list_ms": list_ms, "memory_mib": common.memory, "snapshots": rows, "encrypted_snapshots": encrypted_rows,
        "totals": totals,
        "index_bytes_a_chunk": index.index_bytes as f64 / index.chunks.max(1) as f64,
    });
    let mut text = text(common.memory, interval, &rows, &totals);
    text.push('\n');
    text.push_str(&encryption(&[
        ("not encrypted", tree_bytes(&target.join("packs"))?, &rows),
        ("encrypted", tree_bytes(&sealed.join("packs"))?, &encrypted_rows),
    ]));
    text.push_str(&format!(
        "\nThe index takes {:.1} bytes of memory a chunk ({} chunks).\n",
        index.index_bytes as f64 / index.chunks.max(1) as f64,
        index.chunks
    ));
    text.push_str(&format!("A new process lists {many} snapshots in {list_ms:.0} ms.\n"));
    Ok(Outcome { name: "store", json, text, violations: Vec::new() })
}

/// The layers of a machine's disks: the disk's name, which layer, and the layer.
fn layers(machine: &MachineRecord) -> impl Iterator<Item = (&str, usize, &LayerRecord)> {
    machine.disks.iter().flat_map(|disk| {
        disk.layers.iter().enumerate().map(|(index, layer)| (disk.name.as_str(), index, layer))
    })
}

fn layer_file(machine: &str, disk: &str, index: usize) -> String {
    format!("{machine}.{disk}.{index}")
}

/// Puts one snapshot in and takes its memory out again. The times are those of the memory, and of making all durable.
fn one(target: &Path, options: &OpenOptions, manifest: &Manifest, folder: &Path) -> Result<Row, StoreError> {
    let store = Store::open_with(target, options)?;
    let mut manifest = manifest.clone();
    let started = Instant::now();
    let writer = store.begin()?;
    let mut row =
        Row { logical_bytes: 0, used_bytes: 0, new_bytes: 0, ingest_ms: 0.0, whole_ms: 0.0, restore_ms: 0.0 };
    for machine in &mut manifest.machines {
        let path = folder.join(&machine.name);
        let file = File::open(&path).map_err(|source| StoreError::Io { action: "open", path, source })?;
        machine.ram = writer.put_ram(&machine.name, &file, machine.ram.bytes, &mut |_, _| {})?;
        machine.device_state = writer.put_bytes(Piece::DeviceState, &machine.name, b"")?;
        (machine.kernel, machine.initrd) = (None, None);
        row.logical_bytes += machine.ram.bytes;
        row.used_bytes += machine.ram.used_bytes;
    }
    row.ingest_ms = started.elapsed().as_secs_f64() * 1e3;
    let all = started;
    for machine in &mut manifest.machines {
        for disk in &mut machine.disks {
            for (index, layer) in disk.layers.iter_mut().enumerate() {
                let file = folder.join(layer_file(&machine.name, &disk.name, index));
                *layer = writer.put_layer(&machine.name, &disk.name, index, layer.format, &file)?;
            }
        }
    }
    manifest.frames = writer.put_frames(&[])?;
    let started = Instant::now();
    manifest.bytes = writer.seal()?;
    row.new_bytes = manifest.bytes.new;
    let id = writer.commit(manifest)?;
    row.ingest_ms += started.elapsed().as_secs_f64() * 1e3;
    row.whole_ms = all.elapsed().as_secs_f64() * 1e3;

    let stored = store.load(&id)?;
    let out = tempfile::Builder::new().prefix("dio-bench-").tempfile_in("/dev/shm").map_err(|source| {
        StoreError::Io { action: "create a file in", path: PathBuf::from("/dev/shm"), source }
    })?;
    let started = Instant::now();
    for machine in &stored.manifest.machines {
        store.copy_ram(&stored, &machine.name, out.as_file(), &mut |_, _| {})?;
    }
    row.restore_ms = started.elapsed().as_secs_f64() * 1e3;
    Ok(row)
}

/// How long a process that has just opened a store of so many snapshots takes to list them.
fn list(template: &Manifest, count: usize) -> Result<f64, Failure> {
    say(format!("store: listing {count} snapshots"));
    let folder = lab::folder(Path::new("/dev/shm"))?;
    let store = Store::open(folder.path())?;
    for number in 0..count {
        let writer = store.begin()?;
        let mut manifest = template.clone();
        manifest.name = format!("s{number}");
        manifest.machines.clear();
        manifest.frames = writer.put_frames(&[])?;
        manifest.bytes = writer.seal()?;
        writer.commit(manifest)?;
    }
    // The first list of all leaves the cache behind.
    store.list()?;
    let store = Store::open(folder.path())?;
    let started = Instant::now();
    assert_eq!(store.list()?.len(), count);
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

/// What zstd makes of every different page and cluster, in one piece.
fn whole(snapshots: &[(Manifest, PathBuf)]) -> Result<Total, Failure> {
    say("store: compressing all different pages and clusters in one piece");
    let mut seen = HashSet::new();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).map_err(Failure::io("cannot compress"))?;
    let mut first_bytes = None;
    for (manifest, folder) in snapshots {
        for machine in &manifest.machines {
            let file = File::open(folder.join(&machine.name)).map_err(Failure::io("cannot read memory"))?;
            let mut put = |file: &File, bytes: u64, leaf: u64| -> std::io::Result<()> {
                let mut buffer = vec![0; usize::try_from(leaf).expect("a leaf is small")];
                for offset in (0..bytes).step_by(buffer.len()) {
                    let length = buffer.len().min(usize::try_from(bytes - offset).unwrap_or(usize::MAX));
                    let leaf = &mut buffer[..length];
                    file.read_exact_at(leaf, offset)?;
                    if leaf.iter().any(|byte| *byte != 0) && seen.insert(Address::of(leaf)) {
                        encoder.write_all(leaf)?;
                    }
                }
                Ok(())
            };
            put(&file, machine.ram.bytes, PAGE_BYTES).map_err(Failure::io("cannot compress memory"))?;
            for (disk, index, layer) in layers(machine) {
                let file = File::open(folder.join(layer_file(&machine.name, disk, index)));
                file.and_then(|file| put(&file, layer.bytes, CLUSTER_BYTES))
                    .map_err(Failure::io("cannot compress a disk's layer"))?;
            }
        }
        first_bytes.get_or_insert(encoder.get_ref().len() as u64);
    }
    let bytes = encoder.finish().map_err(Failure::io("cannot compress"))?.len() as u64;
    Ok(Total { what: "zstd -1 of all different pages and clusters", bytes, first_bytes, whole_ms: None })
}

fn restic(home: &Path, folders: &[&Path]) -> Result<Option<Total>, Failure> {
    let repository = home.join("restic");
    let restic = |arguments: &[&str]| {
        let mut command = Command::new("restic");
        command.args(["--quiet", "--no-cache", "--repo"]).arg(&repository).args(arguments);
        // One processor, as everybody here has.
        command.env("RESTIC_PASSWORD", "bench").env("GOMAXPROCS", "1");
        command
    };
    let backup = |folder: &Path| {
        let mut command = restic(&["backup", "."]);
        command.current_dir(folder);
        command
    };
    other("restic", &repository, restic(&["init"]), folders, backup)
}

fn borg(home: &Path, folders: &[&Path]) -> Result<Option<Total>, Failure> {
    let repository = home.join("borg");
    let borg = || {
        let mut command = Command::new("borg");
        command
            .env("BORG_BASE_DIR", home.join("borg-base"))
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        command
    };
    let mut init = borg();
    init.args(["init", "--encryption=none"]).arg(&repository);
    let backup = |folder: &Path| {
        let mut command = borg();
        let archive = format!("{}::{{now:%s.%f}}", repository.display());
        command.args(["create", "--compression=zstd,1", &archive, "."]).current_dir(folder);
        command
    };
    other("borg", &repository, init, folders, backup)
}

/// What another program's repository takes; `None` where it is not installed.
fn other(
    what: &'static str,
    repository: &Path,
    mut init: Command,
    folders: &[&Path],
    backup: impl Fn(&Path) -> Command,
) -> Result<Option<Total>, Failure> {
    let run = |command: &mut Command| -> Result<bool, Failure> {
        match command.output() {
            Ok(output) if output.status.success() => Ok(true),
            Ok(output) => Err(Failure::Command {
                command: what.to_owned(),
                reason: String::from_utf8_lossy(&output.stderr).into_owned(),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Failure::io(format!("cannot run {what}"))(error)),
        }
    };
    if !run(&mut init)? {
        say(format!("store: {what} is not installed"));
        return Ok(None);
    }
    let mut first_bytes = None;
    let mut whole_ms = 0.0;
    for folder in folders {
        say(format!("store: {what} takes {}", folder.display()));
        let started = Instant::now();
        run(&mut backup(folder))?;
        whole_ms += started.elapsed().as_secs_f64() * 1e3;
        let bytes = tree_bytes(repository)?;
        first_bytes.get_or_insert(bytes);
    }
    Ok(Some(Total { what, bytes: tree_bytes(repository)?, first_bytes, whole_ms: Some(whole_ms) }))
}

fn tree_bytes(folder: &Path) -> Result<u64, Failure> {
    let mut total = 0;
    for entry in fs::read_dir(folder).map_err(Failure::io(format!("cannot read {}", folder.display())))? {
        let entry = entry.map_err(Failure::io("cannot read a folder"))?;
        let found = entry.metadata().map_err(Failure::io("cannot read a folder"))?;
        total += if found.is_dir() { tree_bytes(&entry.path())? } else { found.len() };
    }
    Ok(total)
}

/// All snapshots together, with and without.
fn encryption(stores: &[(&str, u64, &[Row])]) -> String {
    let row = |(what, bytes, rows): &(&str, u64, &[Row])| {
        let used: u64 = rows.iter().map(|row| row.used_bytes).sum();
        let (ingest_ms, restore_ms): (f64, f64) =
            (rows.iter().map(|row| row.ingest_ms).sum(), rows.iter().map(|row| row.restore_ms).sum());
        let rate = |ms: f64| format!("{:.0}", used as f64 / 1e3 / ms);
        vec![
            (*what).to_owned(),
            format!("{:.1}", *bytes as f64 / MIB),
            format!("{ingest_ms:.0}"),
            rate(ingest_ms),
            format!("{restore_ms:.0}"),
            rate(restore_ms),
        ]
    };
    let header = ["all snapshots", "MiB", "in, ms", "MB/s used", "out, ms", "MB/s used"];
    table(&header, &stores.iter().map(row).collect::<Vec<_>>())
}

fn text(memory_mib: u64, interval: Duration, rows: &[Row], totals: &[Total]) -> String {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / MIB);
    let rate = |bytes: u64, ms: f64| format!("{:.0}", bytes as f64 / 1e3 / ms);
    let snapshots: Vec<_> = (1..)
        .zip(rows)
        .map(|(number, row): (usize, &Row)| {
            vec![
                number.to_string(),
                mib(row.used_bytes),
                mib(row.new_bytes),
                rate(row.used_bytes, row.ingest_ms),
                rate(row.logical_bytes, row.ingest_ms),
                rate(row.used_bytes, row.restore_ms),
                rate(row.logical_bytes, row.restore_ms),
            ]
        })
        .collect();
    let header = ["snapshot", "MiB used", "MiB new", "in, MB/s used", "of all", "out, MB/s used", "of all"];
    let ours = totals.first().map_or(1.0, |total| total.bytes as f64);
    let ours_ms: f64 = rows.iter().map(|row| row.whole_ms).sum();
    let sums: Vec<_> = totals
        .iter()
        .map(|total| {
            let first = total.first_bytes.unwrap_or(0);
            let later = (total.bytes - first) / (rows.len() as u64 - 1).max(1);
            let time = |show: &dyn Fn(f64) -> String| total.whole_ms.map_or_else(|| "-".to_owned(), show);
            vec![
                total.what.to_owned(),
                mib(total.bytes),
                mib(first),
                mib(later),
                format!("{:.2}", ours / total.bytes as f64),
                time(&|ms| format!("{:.1}", ms / 1e3)),
                time(&|ms| format!("{:.1}", ms / ours_ms)),
            ]
        })
        .collect();
    format!(
        "Store: four machines of {memory_mib} MiB at work, a snapshot every {} s; in by one thread\n{}\n{}",
        interval.as_secs(),
        table(&header, &snapshots),
        table(
            &["what", "MiB in all", "the first", "each later", "this store / it", "in, s", "it / this store"],
            &sums
        ),
    )
}
