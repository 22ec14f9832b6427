//! From what was captured to a snapshot in the store.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use diorama_api::{ApiError, CaptureMode, ErrorKind, InFlightPolicy, MachineState};
use diorama_cut::loopback::Event;
use diorama_cut::report::NetworkFrames;
use diorama_cut::{Drops, Frames, MachineReport};
use diorama_qemu::process::Policy;
use diorama_store::{
    Accounting, BaseRecord, Capture as StoredCapture, CutRecord, DiskRecord, Dropped, FORMAT, FileRecord,
    Hardware, LayerFormat, LearnedRecord, MachineRecord, Manifest, NetworkRecord, Piece, StoredFrame, Writer,
};
use diorama_switch::{NetworkId, PeerId, PortId};

use super::frozen::CAPTURE_BOUND;
use super::part::HostPart;
use super::prepare::capture_error;
use super::turns::{Turns, threads_beside};
use super::{Attempt, Machine};
use crate::Agent;
use crate::capture::Capture;
use crate::dataplane::CutOutcome;
use crate::hardware;
use crate::operation::Operation;
use crate::pace::{Breaks, Share};
use crate::priority::schedule_this_thread;
use crate::problem::{io_error, store_error};
use crate::record::{self, BootRecord, FormatRecord, Record};
use crate::slot::Slot;

/// The niceness of storing: guests go first.
const STORE_NICE: i32 = 10;
/// What storing takes. A piece that took long had to wait for something itself.
const STORE_SHARE: Share =
    Share { idle_eighths: 8, most_percent: 100, longest_rest: Duration::from_millis(20) };

impl Attempt<'_> {
    /// Puts the frames in flight into the store and says how they add up.
    ///
    /// `sent` is what other hosts sent before the cut.
    pub(super) fn store_frames(
        &mut self,
        sent: Vec<(PeerId, NetworkId, u64)>,
    ) -> Result<Vec<NetworkFrames>, ApiError> {
        self.stop_recording(sent);
        let stopped = self.stopped.as_ref().ok_or_else(|| defect("frames without a cut"))?;
        if let Some(recording) = &stopped.recording
            && !recording.is_complete()
        {
            return Err(ApiError::new(
                ErrorKind::CutFailed,
                format!("the frames in flight do not fit the recording ({} bytes)", recording.bytes),
            ));
        }
        let frames: Vec<StoredFrame> = stopped
            .recording
            .iter()
            .flat_map(|recording| &recording.frames)
            .filter_map(|frame| {
                let (machine, nic) = self.port_owner(frame.to)?;
                Some(StoredFrame {
                    network: self.record.specification.networks[usize::from(frame.network.0)]
                        .name
                        .to_string(),
                    machine,
                    nic,
                    colour: frame.colour.0,
                    after_cut_ns: frame.after_cut_ns,
                    bytes: frame.bytes.to_vec(),
                })
            })
            .collect();
        let writer = self.writer.as_ref().ok_or_else(|| defect("frames without a writer"))?;
        self.frames = Some(writer.put_frames(&frames).map_err(store_error)?);
        Ok(stopped
            .accounting
            .iter()
            .map(|(network, accounting)| NetworkFrames {
                network: diorama_cut::report::NetworkId(network.0),
                frames: Frames {
                    sent_before: accounting.sent_before,
                    delivered_before: accounting.delivered_before,
                    in_flight: accounting.in_flight,
                    dropped: Drops {
                        queue_full: accounting.dropped.queue_full,
                        link_loss: accounting.dropped.link_loss,
                        wire_loss: accounting.dropped.wire_loss,
                        no_receiver: accounting.dropped.no_receiver,
                        cut_drop: accounting.dropped.cut_drop,
                    },
                },
            })
            .collect())
    }

    /// Waits for the captures and stores what they brought, all machines side by side.
    pub(super) fn store_machines(&mut self) -> Event {
        match self.try_store_machines() {
            Ok(written) => {
                let reports = written
                    .iter()
                    .map(|machine| MachineReport { machine: machine.name.clone(), captured: Vec::new() });
                let event = Event::CaptureDone(reports.collect());
                self.written = written;
                event
            }
            Err(error) => self.failed(error, Event::CaptureFailed),
        }
    }

    pub(super) fn try_store_machines(&mut self) -> Result<Vec<MachineRecord>, ApiError> {
        let captures: Vec<Option<Capture>> =
            self.machines.iter_mut().map(|machine| machine.capture.take()).collect();
        self.operation.step("storing");
        let writer = self.writer.as_ref().ok_or_else(|| defect("machines without a writer"))?;
        let ram_folder = self.files.as_ref().ok_or_else(|| defect("machines without memory"))?.folder();
        let beside_guests = self.machines.iter().any(|machine| machine.runs);
        let job = Job {
            agent: self.agent,
            slot: &self.slot,
            record: &self.record,
            writer,
            ram_folder,
            operation: self.operation,
            turns: Turns::new(threads_beside(beside_guests)),
            beside_guests,
        };
        let parts = std::thread::scope(|scope| {
            let parts: Vec<_> = captures
                .into_iter()
                .enumerate()
                .map(|(index, capture)| {
                    let (job, machine) = (&job, &self.machines[index]);
                    scope.spawn(move || job.store(index, machine, capture))
                })
                .collect();
            parts.into_iter().map(|part| part.join().expect("storing does not panic")).collect::<Vec<_>>()
        });
        self.haste = None;
        // Every part ends before any error is reported: threads must not outlive the attempt.
        let mut records: Vec<MachineRecord> = parts.into_iter().collect::<Result<_, _>>()?;
        let outcome = self.outcome.as_ref().ok_or_else(|| defect("machines without a cut"))?;
        for ((record, result), state) in records.iter_mut().zip(&outcome.machines).zip(&self.states) {
            record.pause_us = result.pause_us;
            record.stall_us = result.stall_us;
            record.drain_incomplete = result.drain_incomplete;
            record.state = match state {
                MachineState::Paused => diorama_store::MachineState::Paused,
                MachineState::Shutdown => diorama_store::MachineState::Shutdown,
                _ => diorama_store::MachineState::Running,
            };
        }
        Ok(records)
    }

    /// The point of no return.
    pub(super) fn write_manifest(&mut self) -> Result<(), ApiError> {
        self.operation.step("committing");
        let manifest = self.manifest()?;
        let writer = self.writer.take().ok_or_else(|| defect("a manifest without a writer"))?;
        let id = writer.commit(manifest).map_err(store_error)?;
        let create_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.agent.note_created(&id, create_ms);
        self.id = Some(id);
        Ok(())
    }

    fn manifest(&mut self) -> Result<Manifest, ApiError> {
        let outcome = self.outcome.as_ref().ok_or_else(|| defect("a manifest without a cut"))?;
        let stopped = self.stopped.as_ref().ok_or_else(|| defect("a manifest without accounts"))?;
        let writer = self.writer.as_ref().ok_or_else(|| defect("a manifest without a writer"))?;
        let bytes = writer.seal().map_err(store_error)?;
        let cut_times: Vec<u64> = outcome
            .machines
            .iter()
            .zip(&self.machines)
            .filter(|(_, machine)| machine.runs)
            .filter_map(|(result, _)| Some(result.cut_at?.0))
            .collect();
        let skew_ns = match (cut_times.iter().max(), cut_times.iter().min()) {
            (Some(latest), Some(earliest)) => latest - earliest,
            _ => 0,
        };
        let networks = self.record.specification.networks.iter().enumerate().map(|(index, network)| {
            let accounting = stopped.accounting.iter().find(|(id, _)| usize::from(id.0) == index);
            NetworkRecord {
                name: network.name.to_string(),
                accounting: accounting
                    .map(|(_, accounting)| stored_accounting(accounting))
                    .unwrap_or_default(),
                learned: self.learned(outcome, index),
            }
        });
        Ok(Manifest {
            format: FORMAT.to_owned(),
            name: self.name.clone(),
            message: self.message.clone(),
            environment: self.slot.name.to_string(),
            parent: self.record.snapshot,
            created: self.created.clone(),
            capture: match self.capture {
                CaptureMode::Live => StoredCapture::Live,
                CaptureMode::Precopy => StoredCapture::Precopy,
                CaptureMode::Stop => StoredCapture::Stop,
            },
            in_flight_policy: match self.in_flight {
                InFlightPolicy::Record => diorama_store::InFlightPolicy::Record,
                InFlightPolicy::Drop => diorama_store::InFlightPolicy::Drop,
            },
            networks: networks.collect(),
            specification: self.record.specification.clone(),
            cut: CutRecord {
                epoch: self.record.epoch,
                skew_us: skew_ns / 1000,
                hosts: 1,
                attempt: self.attempt.clone(),
            },
            frames: self.frames.clone().ok_or_else(|| defect("a manifest without frames"))?,
            bytes,
            machines: std::mem::take(&mut self.written),
        })
    }

    /// What this host adds to the snapshot of an environment that spans several.
    pub(super) fn host_part(&self) -> Result<HostPart, ApiError> {
        let outcome = self.outcome.as_ref().ok_or_else(|| defect("a report without a cut"))?;
        let networks = 0..self.record.specification.networks.len();
        Ok(HostPart {
            frames: self.frames.clone().ok_or_else(|| defect("a report without frames"))?,
            bytes: self
                .writer
                .as_ref()
                .ok_or_else(|| defect("a report without a writer"))?
                .seal()
                .map_err(store_error)?,
            learned: networks.map(|index| self.learned(outcome, index)).collect(),
        })
    }

    fn learned(&self, outcome: &CutOutcome, network: usize) -> Vec<LearnedRecord> {
        outcome
            .learned
            .iter()
            .filter(|(id, _, _)| usize::from(id.0) == network)
            .filter_map(|(_, mac, port)| {
                let (machine, nic) = self.port_owner(*port)?;
                let mac = diorama_topology::MacAddress::new(*mac).ok()?.to_string();
                Some(LearnedRecord { mac, machine, nic })
            })
            .collect()
    }

    /// Which machine's which NIC a port is.
    fn port_owner(&self, port: PortId) -> Option<(String, u16)> {
        let state = self.slot.state();
        state.running.as_ref()?.machines.iter().find_map(|machine| {
            let nic = machine.ports.iter().position(|known| *known == port)?;
            Some((machine.name.clone(), u16::try_from(nic).ok()?))
        })
    }
}

/// What storing one machine needs.
struct Job<'a> {
    agent: &'a Agent,
    slot: &'a Slot,
    record: &'a Record,
    writer: &'a Writer,
    ram_folder: &'a Path,
    operation: &'a Operation,
    turns: Turns,
    /// Whether machines run meanwhile.
    beside_guests: bool,
}

impl Job<'_> {
    fn store(
        &self,
        index: usize,
        machine: &Machine,
        capture: Option<Capture>,
    ) -> Result<MachineRecord, ApiError> {
        schedule_this_thread(Policy::Normal { nice: STORE_NICE }, "storing");
        let spec = &self.record.specification.machines[index];
        let up = &self.record.machines[index];
        let ram_path = self.ram_folder.join(&machine.name);
        let state = match capture {
            Some(capture) if machine.runs => {
                self.wait(&capture)?;
                capture.finish().map_err(|error| capture_error(&error))?.state
            }
            // Cancelled or not: there is no other of a machine at rest.
            Some(capture) => {
                let captured = capture.finish_within(CAPTURE_BOUND);
                let state = captured.map_err(|error| capture_error(&error))?.state;
                self.agent.freeze(self.slot, &machine.name, &ram_path, &state, self.operation);
                state
            }
            None => self.agent.thaw_copy(self.slot, &machine.name, &ram_path)?,
        };
        let _turn = self.turns.take();
        self.operation.check()?;
        let ram = File::open(&ram_path).map_err(|error| io_error(&ram_path, &error))?;
        let mut breaks = self.beside_guests.then(|| Breaks::new(STORE_SHARE, self.turns.count()));
        let ram = self
            .writer
            .put_ram(&machine.name, &ram, spec.memory_bytes, &mut |done, total| {
                self.operation.bytes("storing memory", done, total);
                if let Some(breaks) = &mut breaks {
                    breaks.take();
                }
            })
            .map_err(store_error)?;
        let device_state =
            self.writer.put_bytes(Piece::DeviceState, &machine.name, &state).map_err(store_error)?;
        let disks = self.record.disks.get(&machine.name).into_iter().flatten();
        let disks = disks
            // The last layer is the overlay that began at the cut; a frozen machine has none.
            .map(|disk| {
                self.store_disk(&machine.name, disk, disk.layers.len() - usize::from(machine.pivoted))
            })
            .collect::<Result<_, _>>()?;
        let (kernel, initrd, cmdline) = match &up.boot {
            BootRecord::Disk => (None, None, None),
            BootRecord::Kernel { kernel, initrd, cmdline } => (
                Some(self.store_blob(kernel)?),
                initrd.as_deref().map(|initrd| self.store_blob(initrd)).transpose()?,
                Some(cmdline.clone()),
            ),
        };
        Ok(MachineRecord {
            name: machine.name.clone(),
            host: self.agent.host_name(),
            state: diorama_store::MachineState::Running,
            pause_us: 0,
            stall_us: 0,
            drain_incomplete: false,
            hardware: Hardware {
                qemu_version: hardware::version(&*self.agent.hardware.qemu()?),
                machine_type: up.hardware.machine_type.clone(),
                cpu_model: up.hardware.cpu_model.clone(),
                accelerator: up.hardware.accelerator.name().to_owned(),
                vcpus: up.hardware.vcpus,
                memory_bytes: up.hardware.memory_bytes,
                tb_size_mib: Some(up.hardware.tb_size_mib),
            },
            ram,
            device_state,
            disks,
            kernel,
            initrd,
            cmdline,
        })
    }

    fn store_blob(&self, file: &Path) -> Result<FileRecord, ApiError> {
        let stored = self.writer.put_blob(file).map_err(store_error)?;
        self.agent.files.offer(&stored.root, file);
        Ok(stored)
    }

    /// Waits for a capture's end, but not longer than anybody waits for the snapshot.
    fn wait(&self, capture: &Capture) -> Result<(), ApiError> {
        while !capture.wait_finished(std::time::Duration::from_millis(100)) {
            self.operation.check()?;
        }
        Ok(())
    }

    fn store_disk(
        &self,
        machine: &str,
        disk: &record::DiskRecord,
        layers: usize,
    ) -> Result<DiskRecord, ApiError> {
        let layers = disk.layers[..layers]
            .iter()
            .enumerate()
            .map(|(index, layer)| {
                let stored = self
                    .writer
                    .put_layer(machine, &disk.name, index, LayerFormat::Qcow2, &layer.file)
                    .map_err(store_error)?;
                self.agent.files.offer(&stored.root, &layer.file);
                Ok(stored)
            })
            .collect::<Result<_, ApiError>>()?;
        Ok(DiskRecord {
            name: disk.name.clone(),
            layers,
            base: disk.base.as_ref().map(|base| self.stored_base(base)).transpose()?,
            virtual_bytes: disk.virtual_bytes,
        })
    }

    fn stored_base(&self, base: &record::BaseRecord) -> Result<BaseRecord, ApiError> {
        let metadata = std::fs::metadata(&base.path).map_err(|error| io_error(&base.path, &error))?;
        // On another host it has another time, and is known by its hash. It was read when the machine was started.
        let looked = match self.agent.cluster() {
            Some(_) => Some(self.agent.user_files.look(&base.path, &Operation::unattended())?),
            None => None,
        };
        Ok(BaseRecord {
            path: base.path.clone(),
            format: match base.format {
                FormatRecord::Raw => LayerFormat::Raw,
                FormatRecord::Qcow2 => LayerFormat::Qcow2,
            },
            bytes: metadata.len(),
            modified: modified(&metadata),
            blake3: looked.map(|file| file.blake3),
        })
    }
}

/// When a file was last written, as manifests say it.
pub(crate) fn modified(metadata: &std::fs::Metadata) -> String {
    metadata
        .modified()
        .ok()
        .and_then(|time| jiff::Timestamp::try_from(time).ok())
        .map(|time| time.to_string())
        .unwrap_or_default()
}

fn stored_accounting(accounting: &diorama_switch::Accounting) -> Accounting {
    Accounting {
        sent_before: accounting.sent_before,
        delivered_before: accounting.delivered_before,
        in_flight: accounting.in_flight,
        dropped: Dropped {
            queue_full: accounting.dropped.queue_full,
            link_loss: accounting.dropped.link_loss,
            wire_loss: accounting.dropped.wire_loss,
            no_receiver: accounting.dropped.no_receiver,
            cut_drop: accounting.dropped.cut_drop,
        },
        unaccounted: accounting.unaccounted(),
    }
}

pub(super) fn defect(what: &str) -> ApiError {
    ApiError::new(ErrorKind::Internal, format!("a defect in the snapshot's order of steps: {what}"))
}
