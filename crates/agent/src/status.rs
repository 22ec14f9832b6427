//! Looking at environments.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use diorama_api::{
    ApiError, DiskStatus, EnvironmentState, EnvironmentStatus, MachineLoading, MachineState, MachineStatus,
    NetworkStatus, NicStatus,
};
use diorama_qemu::process::{ProcessId, log_tail};
use diorama_qemu::qmp::QmpError;
use diorama_switch::{Dropped, NetworkCounters};
use serde_json::Value;

use crate::Agent;
use crate::dataplane::PortStatus;
use crate::record::{MachineRecord, Phase, Record, Rest};
use crate::slot::{RunningMachine, Slot};

/// How long a monitor may take to say how its machine is.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

impl Agent {
    /// Every environment.
    pub(crate) fn statuses(&self) -> Result<Vec<EnvironmentStatus>, ApiError> {
        let is_part = |slot: &Slot| slot.state().record.as_ref().is_some_and(|record| record.span.is_some());
        let mut statuses = Vec::new();
        let mut slots = self.slots.all();
        if self.cluster().is_some() {
            statuses = self.statuses_in_cluster()?;
            // Also what this host had before it joined.
            slots.retain(|slot| !is_part(slot) && self.environment_record(slot.name.as_str()).is_none());
        }
        statuses.extend(slots.iter().filter_map(|slot| self.slot_status(slot)));
        Ok(statuses)
    }

    /// One environment, wherever it is.
    pub(crate) fn status(&self, name: &str) -> Result<EnvironmentStatus, ApiError> {
        match self.environment_record(name) {
            Some(known) => self.status_in_cluster(&known.value),
            None => self.status_here(name),
        }
    }

    /// What this host has of an environment.
    pub(crate) fn status_here(&self, name: &str) -> Result<EnvironmentStatus, ApiError> {
        let slot = self.slots.get(name)?;
        self.slot_status(&slot).ok_or_else(|| {
            ApiError::new(diorama_api::ErrorKind::WrongState, format!("environment `{name}` is being made"))
                .hint("wait until `diorama up`, `restore` or `fork` is done")
        })
    }

    /// What each machine of a running environment does, in the order of the specification.
    pub(crate) fn machine_states(&self, slot: &Slot, record: &Record) -> Vec<(MachineState, Option<String>)> {
        let mut state = slot.state();
        let folder = slot.folder(&self.folders);
        record
            .machines
            .iter()
            .zip(&record.specification.machines)
            .map(|(machine, spec)| {
                let log = folder.join("log").join(format!("{}.qemu.log", spec.name));
                machine_state(machine, state.machine(spec.name.as_str()), &log)
            })
            .collect()
    }

    /// An environment that is being made for the first time: nothing of it is settled but its name.
    fn beginning(&self, slot: &Slot) -> Option<EnvironmentStatus> {
        let operation = slot.operation_label()?;
        Some(EnvironmentStatus {
            name: slot.name.clone(),
            state: EnvironmentState::Starting,
            epoch: 0,
            snapshot: None,
            started: None,
            operation: Some(operation.to_owned()),
            machines: Vec::new(),
            networks: Vec::new(),
            hosts: vec![self.host_name()],
        })
    }

    fn slot_status(&self, slot: &Slot) -> Option<EnvironmentStatus> {
        let record = slot.state().record.clone();
        let Some(record) = record else { return self.beginning(slot) };
        let states = self.machine_states(slot, &record);
        let (segment, ports, networks) = match &slot.state().running {
            Some(running) => (
                Some(running.segment),
                running.machines.iter().map(|machine| machine.ports.clone()).collect(),
                running.networks.clone(),
            ),
            None => (None, Vec::new(), Vec::new()),
        };
        let (ports, networks) = match segment {
            Some(segment) => self.plane.call(move |plane| {
                let Some(segment) = plane.segment(segment) else { return (Vec::new(), Vec::new()) };
                let ports: Vec<Vec<PortStatus>> = ports
                    .iter()
                    .map(|ports| ports.iter().map(|port| segment.port_status(*port)).collect())
                    .collect();
                let networks: Vec<NetworkCounters> =
                    networks.iter().map(|network| segment.network_counters(*network)).collect();
                (ports, networks)
            }),
            None => (Vec::new(), Vec::new()),
        };
        let machines: Vec<MachineStatus> = record
            .specification
            .machines
            .iter()
            .enumerate()
            .map(|(index, spec)| {
                let up = record.machines.get(index);
                let (state, reason) = states.get(index).cloned().unwrap_or((MachineState::Shutdown, None));
                MachineStatus {
                    name: spec.name.to_string(),
                    host: self.host_name(),
                    pid: up.filter(|_| state != MachineState::Dead).map(|machine| machine.process.pid),
                    state,
                    reason,
                    vcpus: up.map_or(spec.cpus, |machine| machine.hardware.vcpus),
                    memory_bytes: spec.memory_bytes,
                    accelerator: up.map_or("none", |machine| machine.hardware.accelerator.name()).to_owned(),
                    nics: nics(spec, ports.get(index)),
                    disks: disks(&record, spec.name.as_str()),
                    loading: loading(slot, spec.name.as_str()),
                }
            })
            .collect();
        let dead = machines.iter().any(|machine| machine.state == MachineState::Dead);
        Some(EnvironmentStatus {
            name: slot.name.clone(),
            state: match record.phase {
                Phase::Down => EnvironmentState::Down,
                Phase::Up if dead => EnvironmentState::Degraded,
                Phase::Up => EnvironmentState::Up,
            },
            epoch: record.epoch,
            snapshot: record.snapshot.map(|snapshot| snapshot.to_string()),
            started: record.started.clone(),
            operation: slot.operation_label().map(str::to_owned),
            networks: record
                .specification
                .networks
                .iter()
                .enumerate()
                .map(|(index, network)| {
                    let counters = networks.get(index).copied().unwrap_or_default();
                    NetworkStatus {
                        name: network.name.to_string(),
                        mtu: network.mtu,
                        // What goes to another host is owed there.
                        owed_frames: counters.owed.saturating_sub(counters.passed_on),
                        delivered_frames: counters.delivered,
                        queued_frames: counters.queued,
                        dropped: reasons(&counters.dropped, &[("invalid", counters.invalid_frames)]),
                    }
                })
                .collect(),
            machines,
            hosts: vec![self.host_name()],
        })
    }
}

fn machine_state(
    record: &MachineRecord,
    machine: Option<&mut RunningMachine>,
    log: &Path,
) -> (MachineState, Option<String>) {
    let alive = ProcessId::from(record.process).is_alive().unwrap_or(false);
    let Some(machine) = machine else { return (MachineState::Dead, None) };
    if !alive {
        if let Some(spawned) = &mut machine.spawned {
            spawned.reap();
        }
        if let Some(given_up) = &machine.given_up {
            return (MachineState::Dead, Some(given_up.clone()));
        }
        let last = log_tail(log);
        let reason = if last.is_empty() { "its QEMU process ended".to_owned() } else { last };
        return (MachineState::Dead, Some(reason));
    }
    if let Some(loading) = &machine.loading {
        // Its main loop may wait for memory, so that it cannot be asked.
        let state = loading.state();
        if let Some(failed) = state.failed {
            let reason = format!("its memory cannot be loaded: {failed}");
            return (MachineState::Crashed, Some(reason));
        }
        if !state.complete {
            let is = match record.rest {
                Some(Rest::Paused) => MachineState::Paused,
                Some(Rest::Shutdown) => MachineState::Shutdown,
                None => MachineState::Running,
            };
            return (is, state.waits_for.map(|what| format!("it waits for memory: {what}")));
        }
    }
    machine.loading = machine.loading.take().filter(|loading| !loading.state().complete);
    let Some(monitor) = &mut machine.monitor else {
        return (MachineState::Dead, Some("its QEMU does not answer any more".to_owned()));
    };
    let answer = match monitor.execute("query-status", Value::Null, ANSWER_LIMIT) {
        Ok(answer) => answer,
        // It has died just now.
        Err(QmpError::Disconnected { .. }) => {
            return (MachineState::Dead, Some("its QEMU process ended".to_owned()));
        }
        // Alive, but its main loop is stuck: nothing is known, so nothing is claimed but that.
        Err(error) => return (MachineState::Running, Some(error.to_string())),
    };
    match answer["status"].as_str().unwrap_or_default() {
        "shutdown" => (MachineState::Shutdown, None),
        // A machine whose memory was captured while it stood still says this.
        "postmigrate" | "paused" | "prelaunch" => match record.rest {
            Some(Rest::Shutdown) => (MachineState::Shutdown, None),
            _ => (MachineState::Paused, None),
        },
        "inmigrate" => (MachineState::Starting, None),
        status @ ("guest-panicked" | "internal-error" | "io-error") => {
            let reason = match status {
                "guest-panicked" => "its kernel panicked",
                "io-error" => "a disk of its could not be written: the host's disk may be full",
                _ => "QEMU cannot run it any further",
            };
            (MachineState::Crashed, Some(reason.to_owned()))
        }
        _ => (MachineState::Running, None),
    }
}

fn loading(slot: &Slot, machine: &str) -> Option<MachineLoading> {
    let state = slot.state().machine(machine)?.loading.as_ref()?.state();
    (!state.complete).then_some(MachineLoading {
        loaded_bytes: state.loaded_bytes,
        total_bytes: state.total_bytes,
        waits_for: state.waits_for,
    })
}

fn nics(spec: &diorama_topology::Machine, ports: Option<&Vec<PortStatus>>) -> Vec<NicStatus> {
    let nic = |(index, nic): (usize, &diorama_topology::Nic)| {
        let port = ports.and_then(|ports| ports.get(index));
        let counters = port.map(|port| port.counters).unwrap_or_default();
        NicStatus {
            network: nic.network.to_string(),
            mac: nic.mac.to_string(),
            address: nic.address.map(|address| address.to_string()),
            connected: port.is_some_and(|port| port.connected),
            sent_frames: counters.received_frames,
            sent_bytes: counters.received_bytes,
            received_frames: counters.delivered_frames,
            received_bytes: counters.delivered_bytes,
            queued_bytes: counters.queued_bytes,
            dropped: reasons(&counters.dropped, &[("runt", counters.runts), ("giant", counters.giants)]),
        }
    };
    spec.nics.iter().enumerate().map(nic).collect()
}

fn disks(record: &Record, machine: &str) -> Vec<DiskStatus> {
    let disk = |disk: &crate::record::DiskRecord| DiskStatus {
        name: disk.name.clone(),
        virtual_bytes: disk.virtual_bytes,
        layers: u32::try_from(disk.layers.len()).unwrap_or(u32::MAX),
    };
    record.disks.get(machine).into_iter().flatten().map(disk).collect()
}

fn reasons(dropped: &Dropped, others: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let known = [
        ("queue_full", dropped.queue_full),
        ("link_loss", dropped.link_loss),
        ("wire_loss", dropped.wire_loss),
        ("no_receiver", dropped.no_receiver),
        ("cut_drop", dropped.cut_drop),
    ];
    known
        .iter()
        .chain(others)
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| ((*reason).to_owned(), *count))
        .collect()
}
