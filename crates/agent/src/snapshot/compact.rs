//! Keeping disk chains short: each snapshot adds a layer, and a guest's read may have to look into all of them.
//!
//! When a chain has grown to [`MAX_LAYERS`], QEMU copies all layers above the base into the active one (`block-stream`)
//! while the machine runs, and the chain is one layer again. Snapshots have their own links to the old layers.

use std::time::{Duration, Instant};

use diorama_api::{ApiError, ErrorKind};
use diorama_qemu::command_line::{file_node, format_node};
use diorama_qemu::qmp::QmpError;
use serde_json::json;

use super::Attempt;
use crate::launch::COMMAND_LIMIT;
use crate::problem::qmp_error;
use crate::record::DiskRecord;

/// How many overlays a disk may have before they are merged.
const MAX_LAYERS: usize = 8;
/// How long the client may have gone before merging notices.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

impl Attempt<'_> {
    /// Merges the chains that have grown too long.
    pub(super) fn compact_disks(&mut self) -> Result<(), ApiError> {
        let machines: Vec<String> =
            self.record.specification.machines.iter().map(|machine| machine.name.to_string()).collect();
        for machine in machines {
            let disks = self.record.disks.get(&machine).cloned().unwrap_or_default();
            for (index, disk) in disks.iter().enumerate() {
                if disk.layers.len() < MAX_LAYERS || self.agent.is_frozen(&self.slot, &machine) {
                    continue;
                }
                self.operation.step("merging disk layers");
                self.merge(&machine, disk)?;
                self.note_merged(&machine, index)?;
            }
        }
        Ok(())
    }

    fn merge(&self, machine: &str, disk: &DiskRecord) -> Result<(), ApiError> {
        let failed = |error: QmpError| qmp_error(machine, &error);
        let Some(active) = disk.layers.last() else { return Ok(()) };
        let job = format!("merge-{}", disk.name);
        let mut arguments = json!({"job-id": job, "device": format_node(&disk.name, active.node)});
        if disk.base.is_some() {
            arguments["base-node"] = format_node(&disk.name, 0).into();
        }
        let mut state = self.slot.state();
        let monitor = state
            .machine(machine)
            .and_then(|machine| machine.monitor.as_mut())
            .ok_or_else(|| ApiError::new(ErrorKind::Machine, format!("machine {machine} has no monitor")))?;
        monitor.take_events();
        monitor.execute("block-stream", arguments, COMMAND_LIMIT).map_err(failed)?;
        let ended = loop {
            match monitor
                .wait_event(&["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"], Instant::now() + CHECK_INTERVAL)
            {
                Ok(event) if event.data["device"] == job.as_str() => break event,
                Ok(_) => {}
                Err(QmpError::Timeout { .. }) if self.operation.is_cancelled() => {
                    monitor
                        .execute("block-job-cancel", json!({"device": job}), COMMAND_LIMIT)
                        .map_err(failed)?;
                }
                Err(QmpError::Timeout { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        };
        self.operation.check()?;
        if let Some(error) = ended.data["error"].as_str() {
            return Err(ApiError::new(
                ErrorKind::Io,
                format!("the layers of disk {machine}/{} cannot be merged: {error}", disk.name),
            )
            .hint("the machine runs on; make room on the disk and try again"));
        }
        // Only names are left of the layers between; what cannot be removed does no harm.
        for layer in disk.layers.iter().rev().skip(1) {
            for node in [format_node(&disk.name, layer.node), file_node(&disk.name, layer.node)] {
                if let Err(error) = monitor.execute("blockdev-del", json!({"node-name": node}), COMMAND_LIMIT)
                {
                    tracing::debug!(node, %error, "a merged layer's node stays");
                }
            }
        }
        Ok(())
    }

    fn note_merged(&mut self, machine: &str, index: usize) -> Result<(), ApiError> {
        let Some(disk) = self.record.disks.get_mut(machine).and_then(|disks| disks.get_mut(index)) else {
            return Ok(());
        };
        let Some(active) = disk.layers.pop() else { return Ok(()) };
        let merged = std::mem::replace(&mut disk.layers, vec![active]);
        self.record.save(&self.slot.folder(&self.agent.folders))?;
        self.slot.state().record = Some(self.record.clone());
        for layer in merged {
            if let Err(error) = std::fs::remove_file(&layer.file) {
                tracing::warn!(file = %layer.file.display(), %error, "a merged layer cannot be removed");
            }
        }
        Ok(())
    }
}
