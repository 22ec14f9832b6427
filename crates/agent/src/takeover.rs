//! Taking back the machines of an agent that ended, by a crash or a stop.
//!
//! Machines run on without their agent; only their network stands still. For each machine that lives: its monitor is
//! connected; its ports are connected; it is stopped for a moment, which makes QEMU send whatever it holds for the
//! network (the rest of a half-sent frame may be first, and is skipped); and it is continued.
//!
//! A machine that stands still without a reason in its record was left so by an agent that died within a cut: it is
//! continued as well.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diorama_api::ApiError;
use diorama_qemu::process::{Policy, ProcessId, threads_of};
use diorama_qemu::qmp::{Client, QmpError};
use diorama_switch::{Epoch, PortId};
use diorama_topology::EnvironmentName;
use serde_json::Value;

use crate::Agent;
use crate::dataplane::{Segment, SegmentId};
use crate::disks::reconcile;
use crate::launch::{COMMAND_LIMIT, SocketPaths, build_switch, find_vcpu_threads, nic_socket};
use crate::priority::schedule_threads;
use crate::problem::io_error;
use crate::record::{Phase, Record};
use crate::slot::{RUNTIME_FOLDER, Running, RunningMachine, Slot};
use crate::span::Joining;
use crate::up::{disk_folder, remove_tree, remove_unreferenced_disks, socket_folder};

/// How long QEMU may take to see that its old peer has gone.
const PORT_LIMIT: Duration = Duration::from_secs(3);
/// How long a capture of the agent before may take to end; nobody wants it, so it is only read.
const CAPTURE_LIMIT: Duration = Duration::from_secs(120);
/// How often a migration is asked whether it has ended: QEMU tells only those who asked for its events before.
pub(crate) const MIGRATION_POLL: Duration = Duration::from_millis(5);
/// How long a machine may take to answer a new agent.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

impl Agent {
    /// Takes back every environment that has a record.
    pub(crate) fn take_over_all(&self) -> Result<(), ApiError> {
        let folder = self.folders.environments();
        std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        let mut unreadable = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(|error| io_error(&folder, &error))?.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            match Record::load(&entry.path()) {
                // Begun and never finished: nothing of it ever ran.
                Ok(None) => remove_tree(&entry.path()),
                Ok(Some(record)) => {
                    let slot = self.slots.get_or_insert(&name);
                    self.take_over(&slot, record);
                }
                Err(error) => {
                    tracing::error!(environment = %name, %error, "an environment is left alone");
                    unreadable.push(name);
                }
            }
        }
        self.end_unknown_machines(&unreadable);
        self.remove_ownerless_sockets(&folder);
        Ok(())
    }

    /// Kills machines that were started with these folders and that no record knows: their agent died before it could
    /// write them down. Each has its console's log among its arguments.
    fn end_unknown_machines(&self, unreadable: &[EnvironmentName]) {
        let known: Vec<u32> = self
            .slots
            .all()
            .iter()
            .filter_map(|slot| slot.state().record.clone())
            .flat_map(|record| record.processes())
            .map(|process| ProcessId::from(process).pid)
            .collect();
        // Commas are doubled in QEMU's options.
        let log = format!("logfile={}/", self.folders.environments().display()).replace(',', ",,");
        let spared: Vec<String> = unreadable.iter().map(|name| format!("{log}{name}/")).collect();
        let Ok(processes) = std::fs::read_dir("/proc") else { return };
        for entry in processes.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments);
            if known.contains(&pid)
                || !arguments.contains(&log)
                || spared.iter().any(|log| arguments.contains(log))
            {
                continue;
            }
            tracing::warn!(pid, "a machine that no record knows is ended");
            if let Ok(Some(process)) = ProcessId::of(pid)
                && let Err(error) = process.kill()
            {
                tracing::error!(%error, "it cannot be killed");
            }
        }
    }

    /// Removes the sockets of environments whose agent died before they had a record.
    fn remove_ownerless_sockets(&self, environments: &Path) {
        let Ok(folders) = std::fs::read_dir(self.folders.runtime().join(RUNTIME_FOLDER)) else { return };
        for folder in folders.flatten() {
            if !environments.join(folder.file_name()).exists() {
                remove_tree(&folder.path());
            }
        }
    }

    fn take_over(&self, slot: &Arc<Slot>, mut record: Record) {
        let folder = slot.folder(&self.folders);
        for process in std::mem::take(&mut record.retiring) {
            if let Err(error) = ProcessId::from(process).kill() {
                tracing::error!(%error, "a replaced machine cannot be killed");
            }
        }
        if record.phase == Phase::Up {
            // Frames of an unfinished cut may have had this colour already.
            let (switch, networks, ports) = build_switch(&record.specification, Epoch(record.epoch));
            let macs = record
                .specification
                .machines
                .iter()
                .flat_map(|machine| &machine.nics)
                .map(|nic| nic.mac.bytes());
            let all_ports: Vec<(PortId, [u8; 6])> = ports.iter().flatten().copied().zip(macs).collect();
            let segment_networks = networks.clone();
            let segment = self
                .plane
                .call(move |plane| plane.attach(|id| Segment::new(id, switch, segment_networks, all_ports)));
            let mut running =
                Running { segment, networks, peers: Vec::new(), part: None, machines: Vec::new() };
            if let Some(span) = &record.span {
                if let Err(error) = self.admit(&slot.name, span.token) {
                    tracing::error!(environment = %slot.name, %error, "a part of an earlier launch");
                }
                slot.state().record = Some(record.clone());
                let joining = Joining { slot, span, doubt: record.doubt };
                match self.join_hosts(segment, &running.networks, joining) {
                    Ok((peers, part)) => {
                        running.peers = peers;
                        running.part = Some(part);
                    }
                    Err(error) => {
                        let error = error.message;
                        tracing::error!(environment = %slot.name, error, "cut off from the other hosts");
                    }
                }
            }
            for (index, ports) in ports.into_iter().enumerate() {
                let name = record.specification.machines[index].name.to_string();
                let taken = self.take_machine(slot, &mut record, index, segment, &ports);
                let mut given_up = None;
                let (monitor, vcpu_threads) = match taken {
                    Ok((monitor, threads)) => (Some(monitor), threads),
                    Err(error) => {
                        tracing::warn!(environment = %slot.name, machine = name, %error, "a machine is gone");
                        if let TakeError::Unloaded = error {
                            given_up = Some(error.to_string());
                            let process = ProcessId::from(record.machines[index].process);
                            if let Err(error) = process.kill() {
                                tracing::error!(%error, "it cannot be killed");
                            }
                        }
                        (None, Vec::new())
                    }
                };
                running.machines.push(RunningMachine {
                    name,
                    monitor,
                    ports,
                    vcpu_threads,
                    guest: Arc::default(),
                    spawned: None,
                    given_up,
                    loading: None,
                });
            }
            remove_other_generations(&slot.runtime_folder(&self.folders), record.generation);
            tracing::info!(environment = %slot.name, machines = running.machines.len(), "taken back");
            slot.state().running = Some(running);
        }
        remove_unreferenced_disks(&folder, &record);
        if let Err(error) = record.save(&folder) {
            tracing::error!(environment = %slot.name, %error, "the record cannot be saved");
        }
        slot.state().record = Some(record);
    }

    fn take_machine(
        &self,
        slot: &Slot,
        record: &mut Record,
        index: usize,
        segment: SegmentId,
        ports: &[PortId],
    ) -> Result<(Client, Vec<u32>), TakeError> {
        let machine = &record.machines[index];
        if !ProcessId::from(machine.process).is_alive().unwrap_or(false) {
            return Err(TakeError::Dead);
        }
        let sockets = socket_folder(slot, &self.folders, record.generation);
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut monitor = Client::connect(&SocketPaths::new(&sockets, index).monitor, deadline)?;
        wait_for_capture(&mut monitor)?;
        refuse_unloaded(&mut monitor)?;
        let status = monitor.execute("query-status", Value::Null, COMMAND_LIMIT)?;
        // A machine that is off takes no frames: QEMU has stopped reading, and does not see that its peer has gone.
        let off = machine.rest == Some(crate::record::Rest::Shutdown) || status["status"] == "shutdown";
        let ports = if off { &[] } else { ports };
        let mut streams = Vec::new();
        for nic in 0..ports.len() {
            let path = nic_socket(&sockets, index, nic);
            streams.push(UnixStream::connect(&path).map_err(|source| TakeError::Port { source })?);
        }
        // Only a connection that QEMU has taken gets what it holds.
        for _ in ports {
            match monitor.wait_event(&["NETDEV_STREAM_CONNECTED"], Instant::now() + PORT_LIMIT) {
                Ok(_) => {}
                // A guest without a driver: QEMU reads no frames, and so does not see that the old peer has gone. The
                // connection waits and is taken when the guest takes frames.
                Err(QmpError::Timeout { .. }) => tracing::warn!(index, "a port is connected later"),
                Err(error) => return Err(error.into()),
            }
        }
        let was_running = status["running"] == true;
        if was_running {
            monitor.execute("stop", Value::Null, COMMAND_LIMIT)?;
        }
        for (port, stream) in ports.iter().copied().zip(streams) {
            self.plane
                .call(move |plane| plane.connect(segment, port, stream, true))
                .map_err(|source| TakeError::Port { source })?;
        }
        let name = record.specification.machines[index].name.to_string();
        let folder = disk_folder(&slot.folder(&self.folders), record.generation).join(&name);
        for disk in record.disks.get_mut(&name).into_iter().flatten() {
            reconcile(&mut monitor, disk, &folder)?;
        }
        let threads = find_vcpu_threads(&mut monitor)?;
        // The agent before may have died within a cut or a live capture, when they went before everything else.
        schedule_threads(&threads_of(machine.process.pid, &threads), Policy::Normal { nice: 0 });
        match machine_rest(record, index) {
            Some(crate::record::Rest::Paused) => {
                let held = ports.to_vec();
                self.plane.call(move |plane| {
                    if let Some(segment) = plane.segment(segment) {
                        segment.hold(&held);
                    }
                });
            }
            Some(crate::record::Rest::Shutdown) => {}
            None => {
                let status = monitor.execute("query-status", Value::Null, COMMAND_LIMIT)?;
                let stands = matches!(
                    status["status"].as_str(),
                    Some("paused" | "postmigrate" | "prelaunch" | "finish-migrate")
                );
                if was_running || stands {
                    monitor.execute("cont", Value::Null, COMMAND_LIMIT)?;
                }
            }
        }
        Ok((monitor, threads))
    }
}

/// The agent before may have died within a snapshot: its captures are read to their ends (see [`crate::keeper`]), and the
/// machine is stopped meanwhile by QEMU itself, so that nothing is done with it before.
fn wait_for_capture(monitor: &mut Client) -> Result<(), QmpError> {
    let deadline = Instant::now() + CAPTURE_LIMIT;
    while migration_runs(monitor)? {
        if Instant::now() > deadline {
            tracing::error!("a capture of the agent before does not end; it is cancelled");
            monitor.execute("migrate_cancel", Value::Null, COMMAND_LIMIT)?;
            return Ok(());
        }
        std::thread::sleep(MIGRATION_POLL);
    }
    Ok(())
}

/// A machine that was restored lazily, and whose agent died before all of its memory was there, cannot go on.
fn refuse_unloaded(monitor: &mut Client) -> Result<(), TakeError> {
    let answer = monitor.execute("query-migrate", Value::Null, COMMAND_LIMIT)?;
    let unloaded = match answer["status"].as_str() {
        Some("postcopy-active" | "postcopy-paused" | "postcopy-recover") => true,
        // The same is said of a capture that has failed, which harms no machine: that has put the capability out.
        Some("failed") => has_postcopy(monitor)?,
        _ => false,
    };
    if unloaded { Err(TakeError::Unloaded) } else { Ok(()) }
}

fn has_postcopy(monitor: &mut Client) -> Result<bool, QmpError> {
    let answer = monitor.execute("query-migrate-capabilities", Value::Null, COMMAND_LIMIT)?;
    let mut all = answer.as_array().into_iter().flatten();
    Ok(all.any(|one| one["capability"] == "postcopy-ram" && one["state"] == true))
}

/// Whether QEMU still works on a migration.
pub(crate) fn migration_runs(monitor: &mut Client) -> Result<bool, QmpError> {
    let answer = monitor.execute("query-migrate", Value::Null, COMMAND_LIMIT)?;
    let status = answer["status"].as_str();
    Ok(matches!(
        status,
        Some("setup" | "active" | "cancelling" | "device" | "pre-switchover" | "wait-unplug")
    ))
}

/// Sockets of machines that an agent was starting when it died.
fn remove_other_generations(folder: &Path, generation: u32) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name() != *format!("g{generation}") {
            remove_tree(&entry.path());
        }
    }
}

/// Why a machine cannot be taken back.
#[derive(Debug, thiserror::Error)]
enum TakeError {
    #[error("its process has ended")]
    Dead,
    #[error(transparent)]
    Monitor(#[from] QmpError),
    #[error("its memory was still being loaded when the agent ended")]
    Unloaded,
    #[error("its network port cannot be connected: {source}")]
    Port { source: std::io::Error },
}

fn machine_rest(record: &Record, index: usize) -> Option<crate::record::Rest> {
    record.machines[index].rest
}
