//! A machine's memory: an ELF core file, or main memory as it is.

use std::io;
use std::os::unix::fs::FileExt;

use diorama_api::{ApiError, ErrorKind, MemoryForm};
use diorama_qemu::core_file::{self, Segment};
use diorama_store::MachineRecord;
use serde_json::json;

use super::Work;
use crate::problem::io_error;
use crate::transfer::{NewFile, attended_error};

impl Work<'_> {
    /// Fills the file with a machine's memory. What is zero is a hole.
    pub(super) fn memory(&mut self, machine: &MachineRecord, to: &mut NewFile) -> Result<(), ApiError> {
        let hardware = &machine.hardware;
        let bytes = machine.ram.bytes;
        let path = to.path().to_owned();
        let (segments, head) = match self.request.memory {
            MemoryForm::Raw => {
                let whole = vec![Segment { physical: 0, offset: 0, bytes }];
                (whole, core_file::Head { bytes: Vec::new(), offsets: vec![0], file_bytes: bytes })
            }
            MemoryForm::Elf => {
                let segments = core_file::segments(&hardware.machine_type, bytes).map_err(|error| {
                    ApiError::new(ErrorKind::Unsupported, format!("machine {}: {error}", machine.name))
                        .hint("`--raw-memory` writes main memory without saying where the guest has it")
                })?;
                let manifest = &self.stored.manifest;
                let note = json!({
                    "format": "diorama-core/1",
                    "snapshot": self.stored.id.to_string(),
                    "name": self.stored.name,
                    "environment": manifest.environment,
                    "machine": machine.name,
                    "created": manifest.created,
                    "machine_type": hardware.machine_type,
                    "cpu_model": hardware.cpu_model,
                    "vcpus": hardware.vcpus,
                    "memory_bytes": bytes,
                });
                let head = core_file::head(&segments, &note.to_string());
                (segments, head)
            }
        };
        let file = &*to.file();
        file.set_len(head.file_bytes)
            .and_then(|()| file.write_all_at(&head.bytes, 0))
            .map_err(|error| io_error(&path, &error))?;
        let operation = self.operation;
        let sink = |offset: u64, run: &[u8]| -> io::Result<()> {
            operation.check_io()?;
            let end = offset + run.len() as u64;
            for (segment, at) in segments.iter().zip(&head.offsets) {
                let (from, to) = (offset.max(segment.offset), end.min(segment.offset + segment.bytes));
                if from < to {
                    let part = &run[(from - offset) as usize..(to - offset) as usize];
                    file.write_all_at(part, at + (from - segment.offset))?;
                }
            }
            Ok(())
        };
        let mut poured = 0;
        let store = &self.agent.store;
        let (done, total) = (self.done, self.total);
        store
            .pour(&machine.ram.part(&machine.name), &path, &sink, &mut |bytes, all| {
                // The last word counts zeros too.
                if bytes < all {
                    poured = bytes;
                    operation.bytes("extracting", done.saturating_add(bytes).min(total), total);
                }
            })
            .map_err(|error| attended_error(operation, error))?;
        self.advance(poured.max(machine.ram.used_bytes));
        Ok(())
    }
}
