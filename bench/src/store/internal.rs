//! What QEMU's own snapshots take: `snapshot-save`, which puts memory and devices into the machine's qcow2 image, and stops
//! the machine for as long as that takes.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diorama_qemu::qmp::{Client, QmpError};
use serde_json::{Value, json};

use super::Total;
use crate::failure::Failure;
use crate::lab::{self, Lab, say};
use crate::load::MACHINES;

const ANSWER: Duration = Duration::from_secs(10);
const SAVED: Duration = Duration::from_secs(60);
/// Between two snapshots.
const INTERVAL: Duration = Duration::from_secs(5);

/// Takes `count` snapshots of every machine, and weighs its images before and after.
pub(super) fn measure(lab: &Lab, environment: &str, count: u32) -> Result<Total, Failure> {
    let mut images = Vec::new();
    for (index, machine) in MACHINES.iter().enumerate() {
        let mut monitor =
            connect(&monitor_path(lab, environment, index)?).map_err(|e| refused(machine, &e))?;
        images.push(active_image(&mut monitor).map_err(|e| refused(machine, &e))?);
    }
    let weigh = || -> Result<u64, Failure> {
        images.iter().try_fold(0, |sum, (_, file)| {
            let found =
                std::fs::metadata(file).map_err(Failure::io(format!("cannot weigh {}", file.display())))?;
            Ok(sum + found.blocks() * 512)
        })
    };
    let before = weigh()?;
    let mut first_bytes = None;
    for number in 1..=count {
        say(format!("store: snapshot {number} of {count} in the images themselves"));
        for (index, machine) in MACHINES.iter().enumerate() {
            let path = monitor_path(lab, environment, index)?;
            save(&path, &images[index].0, &format!("i{number}")).map_err(|e| refused(machine, &e))?;
        }
        first_bytes.get_or_insert(weigh()?.saturating_sub(before));
        lab::sleep(INTERVAL)?;
    }
    Ok(Total {
        what: "snapshots within qcow2 (5 s apart)",
        bytes: weigh()?.saturating_sub(before),
        first_bytes,
        whole_ms: None,
    })
}

/// The monitor that is free while no snapshot is taken.
fn monitor_path(lab: &Lab, environment: &str, index: usize) -> Result<PathBuf, Failure> {
    let folder = lab.runtime().join("e").join(environment);
    let entries =
        std::fs::read_dir(&folder).map_err(Failure::io(format!("cannot read {}", folder.display())))?;
    let name = format!("m{index}.cut");
    let paths = entries.flatten().map(|entry| entry.path().join(&name));
    paths.into_iter().find(|path| path.exists()).ok_or_else(|| Failure::Guest {
        machine: MACHINES[index].to_owned(),
        problem: format!("no {name} below {}", folder.display()),
    })
}

fn connect(path: &Path) -> Result<Client, QmpError> {
    Client::connect(path, Instant::now() + ANSWER)
}

/// The node and the file of the disk's active layer.
fn active_image(monitor: &mut Client) -> Result<(String, PathBuf), QmpError> {
    let nodes = monitor.execute("query-named-block-nodes", json!({"flat": true}), ANSWER)?;
    let text = |driver: &str, field: &str| {
        let nodes = nodes.as_array().into_iter().flatten();
        let writable = nodes.into_iter().find(|node| node["drv"] == driver && node["ro"] == false);
        writable.and_then(|node| node[field].as_str()).unwrap_or_default().to_owned()
    };
    Ok((text("qcow2", "node-name"), PathBuf::from(text("file", "file"))))
}

fn save(path: &Path, node: &str, tag: &str) -> Result<(), QmpError> {
    let mut monitor = connect(path)?;
    let arguments = json!({"job-id": tag, "tag": tag, "vmstate": node, "devices": [node]});
    monitor.execute("snapshot-save", arguments, ANSWER)?;
    let deadline = Instant::now() + SAVED;
    loop {
        let event = monitor.wait_event(&["JOB_STATUS_CHANGE"], deadline)?;
        if event.data["id"] == tag && event.data["status"] == "concluded" {
            break;
        }
    }
    let jobs = monitor.execute("query-jobs", Value::Null, ANSWER)?;
    let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == tag);
    let error = job.and_then(|job| job["error"].as_str()).map(str::to_owned);
    monitor.execute("job-dismiss", json!({"id": tag}), ANSWER)?;
    match error {
        None => Ok(()),
        Some(desc) => {
            Err(QmpError::Command { command: "snapshot-save".to_owned(), class: "job".to_owned(), desc })
        }
    }
}

fn refused(machine: &str, error: &QmpError) -> Failure {
    Failure::Guest { machine: machine.to_owned(), problem: error.to_string() }
}
