//! Environments as the agent holds them: one slot each.
//!
//! A slot has an *operation* (at most one at a time; everything that changes the environment is one) and a *state*
//! (record and running machines, behind a lock that is held for moments only).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use diorama_api::{ApiError, ErrorKind, Folders};
use diorama_cut::ParticipantId;
use diorama_qemu::process::Spawned;
use diorama_qemu::qmp;
use diorama_store::SnapshotId;
use diorama_switch::{NetworkId, PeerId, PortId};
use diorama_topology::EnvironmentName;

use crate::dataplane::SegmentId;
use crate::guest::GuestChannel;
use crate::lazy::Loading;
use crate::operation::Operation;
use crate::record::{Phase, Record};
use crate::snapshot::PartWorker;

/// Under the runtime folder, where the sockets of environments are. One letter: socket paths are short.
pub(crate) const RUNTIME_FOLDER: &str = "e";

/// How long a new operation waits for a cancelled one to be undone.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

/// All environments by name.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<BTreeMap<EnvironmentName, Arc<Slot>>>);

/// One environment.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: EnvironmentName,
    operation: Mutex<Option<Current>>,
    ended: Condvar,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Current {
    label: &'static str,
    operation: Operation,
}

/// What is known of an environment. Without a record it is being made for the first time.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) record: Option<Record>,
    pub(crate) running: Option<Running>,
}

/// The connections to an environment's machines.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) segment: SegmentId,
    /// In the order of the specification.
    pub(crate) networks: Vec<NetworkId>,
    /// Other hosts of the environment.
    pub(crate) peers: Vec<(ParticipantId, PeerId)>,
    /// Takes part in cuts with them.
    pub(crate) part: Option<PartWorker>,
    /// In the order of the specification.
    pub(crate) machines: Vec<RunningMachine>,
}

/// The connections to one machine.
#[derive(Debug)]
pub(crate) struct RunningMachine {
    pub(crate) name: String,
    /// The control monitor; none when the process was dead at a takeover, or closed it since.
    pub(crate) monitor: Option<qmp::Client>,
    /// In the order of the machine's NICs.
    pub(crate) ports: Vec<PortId>,
    pub(crate) vcpu_threads: Vec<u32>,
    pub(crate) guest: Arc<GuestChannel>,
    /// The process, when this agent started it: to be reaped.
    pub(crate) spawned: Option<Spawned>,
    /// Why it was ended at a takeover.
    pub(crate) given_up: Option<String>,
    /// While its memory is on its way; `None` once somebody has seen that all of it is there.
    pub(crate) loading: Option<Loading>,
}

/// Holds a slot's operation; dropping it ends the operation.
#[derive(Debug)]
pub(crate) struct OperationGuard {
    slot: Arc<Slot>,
}

/// Reads an environment's name.
pub(crate) fn environment_name(text: &str) -> Result<EnvironmentName, ApiError> {
    text.parse().map_err(|error| {
        ApiError::new(ErrorKind::Invalid, format!("`{text}` cannot be an environment's name: {error}"))
    })
}

impl Slots {
    /// An environment that exists.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Slot>, ApiError> {
        let slots = self.lock();
        match slots.iter().find(|(known, _)| known.as_str() == name) {
            Some((_, slot)) => Ok(Arc::clone(slot)),
            None => {
                let names: Vec<&str> = slots.keys().map(|name| name.as_str()).collect();
                let hint = if names.is_empty() {
                    "there is none; `diorama up` starts one from a file".to_owned()
                } else {
                    format!("there are: {}", names.join(", "))
                };
                Err(ApiError::new(ErrorKind::NotFound, format!("there is no environment `{name}`"))
                    .hint(hint))
            }
        }
    }

    /// An environment that may be new.
    pub(crate) fn get_or_insert(&self, name: &EnvironmentName) -> Arc<Slot> {
        let mut slots = self.lock();
        Arc::clone(slots.entry(name.clone()).or_insert_with(|| {
            Arc::new(Slot {
                name: name.clone(),
                operation: Mutex::default(),
                ended: Condvar::new(),
                state: Mutex::default(),
            })
        }))
    }

    /// Begins an operation on an environment that exists.
    pub(crate) fn enter(
        &self,
        name: &str,
        label: &'static str,
        operation: &Operation,
    ) -> Result<(Arc<Slot>, OperationGuard), ApiError> {
        self.begin(|| self.get(name), label, operation)
    }

    /// Begins an operation on an environment that may be new.
    pub(crate) fn enter_or_insert(
        &self,
        name: &EnvironmentName,
        label: &'static str,
        operation: &Operation,
    ) -> Result<(Arc<Slot>, OperationGuard), ApiError> {
        self.begin(|| Ok(self.get_or_insert(name)), label, operation)
    }

    fn begin(
        &self,
        find: impl Fn() -> Result<Arc<Slot>, ApiError>,
        label: &'static str,
        operation: &Operation,
    ) -> Result<(Arc<Slot>, OperationGuard), ApiError> {
        loop {
            let slot = find()?;
            let guard = slot.begin(label, operation)?;
            if self.is_current(&slot) {
                return Ok((slot, guard));
            }
        }
    }

    /// Whether the slot was not removed while somebody waited for it.
    fn is_current(&self, slot: &Arc<Slot>) -> bool {
        self.lock().get(&slot.name).is_some_and(|current| Arc::ptr_eq(current, slot))
    }

    /// Whether a name is taken.
    pub(crate) fn contains(&self, name: &EnvironmentName) -> bool {
        self.lock().contains_key(name)
    }

    /// Forgets an environment that has neither machines nor disks.
    pub(crate) fn remove(&self, name: &EnvironmentName) {
        self.lock().remove(name);
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Slot>> {
        self.lock().values().cloned().collect()
    }

    /// The names of those that have machines.
    pub(crate) fn running(&self) -> Vec<String> {
        let is_up =
            |slot: &Arc<Slot>| slot.state().record.as_ref().is_some_and(|record| record.phase == Phase::Up);
        self.all().iter().filter(|slot| is_up(slot)).map(|slot| slot.name.to_string()).collect()
    }

    /// Whether no environment runs and nothing is being done.
    pub(crate) fn is_idle(&self) -> bool {
        self.running().is_empty() && self.all().iter().all(|slot| slot.operation_label().is_none())
    }

    /// Tells all operations under way to give up.
    pub(crate) fn withdraw_operations(&self) {
        for slot in self.all() {
            if let Some(current) = lock(&slot.operation).as_ref() {
                current.operation.withdraw();
            }
        }
    }

    /// The snapshots that environments were last taken to or from.
    pub(crate) fn snapshots_in_use(&self) -> Vec<SnapshotId> {
        self.all().iter().filter_map(|slot| slot.state().record.as_ref()?.snapshot).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<EnvironmentName, Arc<Slot>>> {
        lock(&self.0)
    }
}

impl Slot {
    /// Begins an operation; an error when another one is under way.
    fn begin(
        self: &Arc<Self>,
        label: &'static str,
        operation: &Operation,
    ) -> Result<OperationGuard, ApiError> {
        // One that was cancelled is being undone: soon it is as if it had never been.
        let is_undone = |current: &mut Option<Current>| {
            current.as_ref().is_some_and(|current| current.operation.is_cancelled())
        };
        let (mut current, _) = self
            .ended
            .wait_timeout_while(lock(&self.operation), UNDO_LIMIT, is_undone)
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = current.as_ref() {
            return Err(ApiError::new(
                ErrorKind::Busy,
                format!("environment `{}` is busy: {} is under way", self.name, current.label),
            )
            .hint("wait until it is done, or interrupt it where it was started"));
        }
        *current = Some(Current { label, operation: operation.clone() });
        Ok(OperationGuard { slot: Arc::clone(self) })
    }

    /// What is being done with it.
    pub(crate) fn operation_label(&self) -> Option<&'static str> {
        lock(&self.operation).as_ref().map(|current| current.label)
    }

    /// Locks the state, for a moment.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A copy of the record of an environment that is up.
    pub(crate) fn record_if_up(&self) -> Result<Record, ApiError> {
        match &self.state().record {
            Some(record) if record.phase == Phase::Up => Ok(record.clone()),
            _ => Err(ApiError::new(
                ErrorKind::WrongState,
                format!("environment `{}` is not running", self.name),
            )
            .hint("`diorama up` starts it, `diorama restore SNAPSHOT` brings it back from a snapshot")),
        }
    }

    /// Its folder for records and disks.
    pub(crate) fn folder(&self, folders: &Folders) -> PathBuf {
        folders.environments().join(self.name.as_str())
    }

    /// Its folder for sockets.
    pub(crate) fn runtime_folder(&self, folders: &Folders) -> PathBuf {
        folders.runtime().join(RUNTIME_FOLDER).join(self.name.as_str())
    }
}

impl State {
    /// Whether a machine's memory is still on its way, or will never all be there.
    pub(crate) fn is_loading(&self) -> bool {
        let machines = self.running.iter().flat_map(|running| &running.machines);
        machines.filter_map(|machine| machine.loading.as_ref()).any(|loading| !loading.state().complete)
    }

    /// The running machine of that name.
    pub(crate) fn machine(&mut self, name: &str) -> Option<&mut RunningMachine> {
        self.running.as_mut()?.machines.iter_mut().find(|machine| machine.name == name)
    }
}

impl Drop for OperationGuard {
    fn drop(&mut self) {
        *lock(&self.slot.operation) = None;
        self.slot.ended.notify_all();
    }
}

/// A thread that panicked while it held one of these locks has left a whole value: they are changed by assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
