//! Machines that stood still when they were captured, and still do.
//!
//! QEMU captures a stopped machine once and then refuses (its state is *postmigrate*) until it has run again. Since
//! nothing of it can change meanwhile, its first capture serves every later snapshot: it is copied into
//! `environments/NAME/frozen/MACHINE/` and stored again from there. When the machine is resumed, it is removed.

use std::path::{Path, PathBuf};

use diorama_api::ApiError;
use diorama_store::SnapshotId;

use super::Attempt;
use crate::Agent;
use crate::problem::{io_error, store_error};
use crate::record::Rest;
use crate::slot::Slot;
use crate::up::remove_tree;

const RAM: &str = "ram";
const STATE: &str = "state";

impl Attempt<'_> {
    /// Keeps the captures of machines that stand still.
    pub(super) fn freeze_resting(&mut self, id: &SnapshotId) {
        let resting: Vec<usize> = (0..self.machines.len())
            .filter(|index| !self.machines[*index].runs && !self.machines[*index].frozen)
            .collect();
        for index in resting {
            if self.record.machines[index].rest.is_none() {
                // It shut down by itself; from now on its QEMU says only that it was captured.
                self.record.machines[index].rest = Some(match self.states[index] {
                    diorama_api::MachineState::Shutdown => Rest::Shutdown,
                    _ => Rest::Paused,
                });
            }
            let machine = self.machines[index].name.clone();
            if let Err(error) = self.agent.freeze(&self.slot, &machine, id) {
                self.operation.warn(format!(
                    "machine {machine} cannot be captured again until it is resumed: {}",
                    error.message
                ));
            }
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

    fn freeze(&self, slot: &Slot, machine: &str, id: &SnapshotId) -> Result<(), ApiError> {
        let stored = self.store.load(id).map_err(store_error)?;
        let folder = self.frozen_folder(slot, machine);
        std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        let ram = folder.join(RAM);
        let file = std::fs::File::create(&ram).map_err(|error| io_error(&ram, &error))?;
        self.store.copy_ram(&stored, machine, &file, &mut |_, _| {}).map_err(store_error)?;
        // The state is written last, as a whole: with it there is a frozen capture, and not before.
        let state = self.store.read_state(&stored, machine).map_err(store_error)?;
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
