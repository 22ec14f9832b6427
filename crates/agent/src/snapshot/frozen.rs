//! Machines that stood still when they were captured, and still do.
//!
//! QEMU captures a stopped machine once and then refuses (its state is *postmigrate*) until it has run again. Since
//! nothing of it can change meanwhile, its first capture serves every later snapshot: it is copied into
//! `environments/NAME/frozen/MACHINE/` as soon as it is complete, also when the snapshot comes to nothing, and stored again
//! from there. When the machine is resumed, it is removed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use diorama_api::{ApiError, MachineState};
use serde_json::Value;

use super::Attempt;
use crate::Agent;
use crate::dataplane::CutOutcome;
use crate::launch::COMMAND_LIMIT;
use crate::operation::Operation;
use crate::problem::io_error;
use crate::record::Rest;
use crate::slot::Slot;
use crate::up::remove_tree;

const RAM: &str = "ram";
const STATE: &str = "state";

/// How long the capture of a machine that stands still may take, whether or not anybody waits for it.
pub(super) const CAPTURE_BOUND: Duration = Duration::from_secs(120);

impl Attempt<'_> {
    /// Writes down which machines are captured at rest: from now on their QEMU says only that they were captured. Returns
    /// whether the record has changed.
    pub(super) fn note_resting(&mut self) -> bool {
        let mut changed = false;
        for (index, machine) in self.machines.iter().enumerate() {
            let record = &mut self.record.machines[index];
            if machine.runs || record.rest.is_some() || !self.agent.is_frozen(&self.slot, &machine.name) {
                continue;
            }
            record.rest = Some(match self.states[index] {
                MachineState::Shutdown => Rest::Shutdown,
                _ => Rest::Paused,
            });
            changed = true;
        }
        changed
    }

    /// Lets captures of machines at rest come to their end, and keeps them: their QEMU would not make another, whatever
    /// becomes of this snapshot.
    pub(super) fn finish_resting(&mut self) {
        let Some(files) = &self.files else { return };
        let folder = files.folder().to_owned();
        for machine in self.machines.iter_mut().filter(|machine| !machine.runs && machine.migrating) {
            let Some(capture) = machine.capture.take() else { continue };
            match capture.finish_within(CAPTURE_BOUND) {
                Ok(captured) => self.agent.freeze(
                    &self.slot,
                    &machine.name,
                    &folder.join(&machine.name),
                    &captured.state,
                    self.operation,
                ),
                Err(error) => tracing::info!(machine = machine.name, %error, "a capture at rest failed"),
            }
        }
    }

    /// Machines that their guests have switched off just before the cut stay off. QEMU before 8.2.50 lets a machine run
    /// after a live capture, whatever it did before.
    pub(super) fn keep_off(&mut self, outcome: &CutOutcome) {
        for result in outcome.machines.iter().filter(|result| result.powered_off) {
            let Some(index) = self.machines.iter().position(|machine| machine.name == result.name) else {
                continue;
            };
            let mut state = self.slot.state();
            if let Some(monitor) = state.machine(&result.name).and_then(|machine| machine.monitor.as_mut())
                && let Err(error) = monitor.execute("stop", Value::Null, COMMAND_LIMIT)
            {
                tracing::warn!(machine = result.name, %error, "a machine that was switched off may run");
            }
            drop(state);
            self.states[index] = MachineState::Shutdown;
            self.record.machines[index].rest = Some(Rest::Shutdown);
        }
    }
}

impl Agent {
    /// Whether a machine was captured while it stood still, and has not run since.
    pub(super) fn is_frozen(&self, slot: &Slot, machine: &str) -> bool {
        self.frozen_folder(slot, machine).join(STATE).is_file()
    }

    /// Forgets a frozen capture: its machine runs again.
    pub(crate) fn thaw(&self, slot: &Slot, machine: &str) {
        remove_tree(&self.frozen_folder(slot, machine));
    }

    /// Puts a frozen machine's memory at `ram` and returns its device state.
    pub(super) fn thaw_copy(&self, slot: &Slot, machine: &str, ram: &Path) -> Result<Vec<u8>, ApiError> {
        let folder = self.frozen_folder(slot, machine);
        copy_sparse(&folder.join(RAM), ram)?;
        let state = folder.join(STATE);
        std::fs::read(&state).map_err(|error| io_error(&state, &error))
    }

    /// Keeps the capture of a machine at rest.
    pub(super) fn freeze(&self, slot: &Slot, machine: &str, ram: &Path, state: &[u8], operation: &Operation) {
        if let Err(error) = self.try_freeze(slot, machine, ram, state) {
            self.thaw(slot, machine);
            operation.warn(format!(
                "machine {machine} cannot be captured again until it is resumed: {}",
                error.message
            ));
        }
    }

    fn try_freeze(&self, slot: &Slot, machine: &str, ram: &Path, state: &[u8]) -> Result<(), ApiError> {
        let folder = self.frozen_folder(slot, machine);
        // What an attempt has left that failed half-way.
        remove_tree(&folder);
        std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        copy_sparse(ram, &folder.join(RAM))?;
        // The state is written last, as a whole: with it there is a frozen capture, and not before.
        let (new, path) = (folder.join("state.new"), folder.join(STATE));
        std::fs::write(&new, state)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|error| io_error(&path, &error))
    }

    fn frozen_folder(&self, slot: &Slot, machine: &str) -> PathBuf {
        slot.folder(&self.folders).join("frozen").join(machine)
    }
}

/// Copies a RAM file and leaves its holes.
fn copy_sparse(source: &Path, destination: &Path) -> Result<(), ApiError> {
    use std::os::unix::fs::FileExt;
    let from = std::fs::File::open(source).map_err(|error| io_error(source, &error))?;
    let to = std::fs::File::create_new(destination).map_err(|error| io_error(destination, &error))?;
    let length = from.metadata().map_err(|error| io_error(source, &error))?.len();
    to.set_len(length).map_err(|error| io_error(destination, &error))?;
    let mut chunk = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < length {
        let read = from.read_at(&mut chunk, offset).map_err(|error| io_error(source, &error))?;
        if read == 0 {
            break;
        }
        for (index, page) in chunk[..read].chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                to.write_all_at(page, offset + index as u64 * 4096)
                    .map_err(|error| io_error(destination, &error))?;
            }
        }
        offset += read as u64;
    }
    Ok(())
}
