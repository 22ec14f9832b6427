//! Stopping an environment.

use diorama_api::{ApiError, DownReport, DownRequest, ErrorKind};

use crate::Agent;
use crate::operation::Operation;
use crate::record::{Phase, Record};
use crate::up::{remove_tree, remove_unreferenced_disks, socket_folder};

impl Agent {
    /// Stops an environment, wherever it is.
    pub(crate) fn down(
        &self,
        name: &str,
        request: DownRequest,
        operation: &Operation,
    ) -> Result<DownReport, ApiError> {
        match self.environment_record(name) {
            Some(known) => self.down_in_cluster(&known, request, operation),
            None => self.down_here(name, request, operation),
        }
    }

    /// Stops what this host has of an environment; what is down already is as good. Without disks to keep, nothing of it
    /// remains here.
    pub(crate) fn down_here(
        &self,
        name: &str,
        request: DownRequest,
        operation: &Operation,
    ) -> Result<DownReport, ApiError> {
        let (slot, _guard) = self.slots.enter(name, "stopping", operation)?;
        let Some(record) = slot.state().record.clone() else {
            // Begun and never made.
            self.slots.remove(&slot.name);
            return Err(ApiError::new(ErrorKind::NotFound, format!("there is no environment `{name}`")));
        };
        let folder = slot.folder(&self.folders);
        operation.step("stopping machines");
        let running = slot.state().running.take();
        let mut machines_stopped = 0;
        if let Some(running) = running {
            let sockets = socket_folder(&slot, &self.folders, record.generation);
            machines_stopped = self.stop_machines(running, &record.processes(), &sockets);
        }
        remove_tree(&slot.runtime_folder(&self.folders));
        let disks = disk_names(&record);
        let mut report = DownReport {
            environment: slot.name.clone(),
            machines_stopped,
            disks_kept: Vec::new(),
            disks_removed: Vec::new(),
        };
        if request.volumes || disks.is_empty() {
            report.disks_removed = disks;
            remove_tree(&folder);
            self.slots.remove(&slot.name);
        } else {
            report.disks_kept = disks;
            let record = Record { phase: Phase::Down, machines: Vec::new(), ..record };
            record.save(&folder)?;
            remove_unreferenced_disks(&folder, &record);
            remove_tree(&folder.join("log"));
            remove_tree(&folder.join("console"));
            slot.state().record = Some(record);
        }
        Ok(report)
    }
}

fn disk_names(record: &Record) -> Vec<String> {
    let of = |(machine, disks): (&String, &Vec<crate::record::DiskRecord>)| -> Vec<String> {
        disks.iter().map(|disk| format!("{machine}/{}", disk.name)).collect()
    };
    record.disks.iter().flat_map(of).collect()
}
