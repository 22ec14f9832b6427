//! Pausing and resuming machines.
//!
//! A pause drains and stops a machine as a cut does, so that no frame is lost in QEMU's own queues, and leaves its
//! ports held: what arrives meanwhile waits in the switch, up to the queue's bound.

use std::time::Duration;

use diorama_api::{ApiError, EnvironmentStatus, ErrorKind, MachineState, MachinesRequest};
use diorama_qemu::qmp::Client;
use serde_json::Value;

use crate::Agent;
use crate::dataplane::{Command, CutJob, CutMachine, Goal, Monitor, Resume};
use crate::launch::{COMMAND_LIMIT, SocketPaths};
use crate::operation::Operation;
use crate::problem::{cut_error, qmp_error};
use crate::record::{Record, Rest};
use crate::slot::Slot;
use crate::up::socket_folder;

/// How long machines may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(10);

impl Agent {
    /// Pauses machines (or lets paused ones run), wherever they are; those that are so already are as good.
    pub(crate) fn rest(
        &self,
        name: &str,
        request: &MachinesRequest,
        paused: bool,
        operation: &Operation,
    ) -> Result<EnvironmentStatus, ApiError> {
        match self.environment_record(name) {
            Some(known) => self.rest_in_cluster(&known.value, request, paused, operation),
            None => self.rest_here(name, request, paused, operation),
        }
    }

    /// Pauses machines of this host, or lets them run.
    pub(crate) fn rest_here(
        &self,
        name: &str,
        request: &MachinesRequest,
        paused: bool,
        operation: &Operation,
    ) -> Result<EnvironmentStatus, ApiError> {
        match paused {
            true => self.pause_here(name, request, operation)?,
            false => self.resume_here(name, request, operation)?,
        }
        self.status_here(name)
    }

    fn pause_here(
        &self,
        name: &str,
        request: &MachinesRequest,
        operation: &Operation,
    ) -> Result<(), ApiError> {
        let (slot, _guard) = self.slots.enter(name, "pausing", operation)?;
        self.wait_for_memory(&slot, operation)?;
        let mut record = slot.record_if_up()?;
        let chosen = choose(&record, request)?;
        let states = self.machine_states(&slot, &record);
        let folder = socket_folder(&slot, &self.folders, record.generation);
        let mut machines = Vec::new();
        let (segment, connections) = connections(&slot)?;
        for index in chosen {
            match states[index].0 {
                MachineState::Running => {}
                MachineState::Paused => continue,
                state => return Err(cannot(&record, index, "paused", state)),
            }
            let (machine, ports, vcpu_threads) = connections[index].clone();
            let mut monitor = Client::connect(&SocketPaths::new(&folder, index).cut_monitor, deadline())
                .and_then(|client| client.into_parts().map_err(socket_error))
                .map_err(|error| qmp_error(&machine, &error))?;
            record.machines[index].rest = Some(Rest::Paused);
            machines.push(CutMachine {
                name: machine,
                ports,
                stop: Some(Command::new(&mut monitor, Monitor::Cut, "stop", Value::Null)),
                monitor: Some(monitor),
                pivot_monitor: None,
                vcpu_threads,
                service_threads: Vec::new(),
                after_stop: Vec::new(),
                resume: Resume::Never,
                gate: None,
                armed: false,
                powered_off: false,
            });
        }
        if !machines.is_empty() {
            let job = CutJob { goal: Goal::Pause, machines, bound: STOP_LIMIT };
            let outcome = self.plane.cut(segment, job).recv().expect("the data plane answers");
            if let Some(failure) = outcome.failure {
                return Err(cut_error(&failure));
            }
            record.save(&slot.folder(&self.folders))?;
            slot.state().record = Some(record);
        }
        Ok(())
    }

    fn resume_here(
        &self,
        name: &str,
        request: &MachinesRequest,
        operation: &Operation,
    ) -> Result<(), ApiError> {
        let (slot, _guard) = self.slots.enter(name, "resuming", operation)?;
        self.wait_for_memory(&slot, operation)?;
        let mut record = slot.record_if_up()?;
        let states = self.machine_states(&slot, &record);
        let (segment, connections) = connections(&slot)?;
        let mut resumed = Vec::new();
        for index in choose(&record, request)? {
            match states[index].0 {
                MachineState::Paused => {}
                MachineState::Running => continue,
                // All machines asked for: those that have shut down stay so.
                MachineState::Shutdown if request.machines.is_empty() => continue,
                state => return Err(cannot(&record, index, "resumed", state)),
            }
            let (machine, ports, _) = &connections[index];
            let mut state = slot.state();
            let monitor = state.machine(machine).and_then(|machine| machine.monitor.as_mut());
            if let Some(monitor) = monitor {
                monitor
                    .execute("cont", Value::Null, COMMAND_LIMIT)
                    .map_err(|error| qmp_error(machine, &error))?;
            }
            drop(state);
            record.machines[index].rest = None;
            self.thaw(&slot, machine);
            resumed.extend(ports.iter().copied());
        }
        self.plane.call(move |plane| plane.release(segment, &resumed));
        record.save(&slot.folder(&self.folders))?;
        slot.state().record = Some(record);
        Ok(())
    }
}

type Connection = (String, Vec<diorama_switch::PortId>, Vec<u32>);

fn connections(slot: &Slot) -> Result<(crate::dataplane::SegmentId, Vec<Connection>), ApiError> {
    let state = slot.state();
    let running = state.running.as_ref().ok_or_else(|| {
        ApiError::new(ErrorKind::WrongState, format!("environment `{}` has no machines", slot.name))
    })?;
    let machines = running
        .machines
        .iter()
        .map(|machine| (machine.name.clone(), machine.ports.clone(), machine.vcpu_threads.clone()))
        .collect();
    Ok((running.segment, machines))
}

fn choose(record: &Record, request: &MachinesRequest) -> Result<Vec<usize>, ApiError> {
    let machines = &record.specification.machines;
    if request.machines.is_empty() {
        return Ok((0..machines.len()).collect());
    }
    request
        .machines
        .iter()
        .map(|name| {
            machines.iter().position(|machine| machine.name.as_str() == name).ok_or_else(|| {
                let names: Vec<&str> = machines.iter().map(|machine| machine.name.as_str()).collect();
                ApiError::new(ErrorKind::NotFound, format!("there is no machine `{name}`"))
                    .hint(format!("there are: {}", names.join(", ")))
            })
        })
        .collect()
}

fn cannot(record: &Record, index: usize, verb: &str, state: MachineState) -> ApiError {
    let machine = &record.specification.machines[index].name;
    let state = serde_json::to_value(state).ok();
    let state = state.as_ref().and_then(Value::as_str).unwrap_or("in another state").to_owned();
    ApiError::new(ErrorKind::WrongState, format!("machine {machine} cannot be {verb}: it is {state}"))
        .hint("`diorama status` shows every machine's state; `diorama restore` brings dead ones back")
}

fn deadline() -> std::time::Instant {
    std::time::Instant::now() + COMMAND_LIMIT
}

fn socket_error(source: std::io::Error) -> diorama_qemu::qmp::QmpError {
    diorama_qemu::qmp::QmpError::Socket { during: "preparing the cut".to_owned(), source }
}
