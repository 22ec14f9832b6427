//! Bringing snapshots back: in place, after `down`, or as forks.
//!
//! The new machines are launched beside the old ones and stand ready, frames in flight loaded, before anything of the
//! old is touched. So whatever can fail fails while the environment still runs. Then the old machines are killed and
//! the new ones continued, all at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diorama_api::{
    ApiError, ErrorKind, ForkReport, ForkRequest, MachineReady, RestoreReport, RestoreRequest,
};
use diorama_qemu::capability::{BackgroundSnapshot, KvmState, background_snapshot_usable, kvm_usable};
use diorama_qemu::command_line::RAM_BLOCK;
use diorama_qemu::migration::postcopy;
use diorama_qemu::qmp::{Client, QmpError};
use diorama_store::{LayerFormat, LazyMemory, MachineState, Stored, StoredFrame};
use diorama_switch::{Epoch, PeerId, PortId, Time};
use diorama_topology::{Environment, EnvironmentName, MacAddress};
use serde_json::Value;

use crate::Agent;
use crate::dataplane::prefer_others;
use crate::disks::link_and_extend;
use crate::launch::{COMMAND_LIMIT, LaunchPlan, Launched, MachinePlan, Saved};
use crate::lazy::{Loading, Pending};
use crate::operation::Operation;
use crate::problem::{io_error, qmp_error, store_error};
use crate::ram_cache::Loaded;
use crate::record::{
    AcceleratorRecord, BaseRecord, BootRecord, DiskRecord, FormatRecord, HardwareRecord, LayerRecord,
    MachineRecord, Phase, Record, Rest,
};
use crate::slot::{OperationGuard, Slot, environment_name};
use crate::span::{Joining, PartRequest};
use crate::takeover::MIGRATION_POLL;
use crate::up::{disk_folder, now, remove_tree, remove_unreferenced_disks, socket_folder};

/// The most forks that one command makes: beyond this it is a mistake.
pub(crate) const MAX_FORKS: u32 = 1000;
/// How many environments are forked side by side.
const FORKS_AT_ONCE: usize = 4;

/// How often a load is asked how far it is, for somebody who waits for its end.
const LOAD_POLL: Duration = Duration::from_millis(20);

/// Where machines get their memory from.
pub(crate) enum Memory {
    /// Files, to be mapped.
    Mapped(Loaded),
    /// The store, while they run; by their places.
    Lazy { load: Pending, machines: Vec<String> },
}

/// The machines to launch, and the disks that they get, by machine.
type Planned = (Vec<MachinePlan>, BTreeMap<String, Vec<DiskRecord>>);

impl Agent {
    /// Takes an environment back to a snapshot, or brings it up from it.
    pub(crate) fn restore(
        &self,
        environment: Option<&str>,
        request: &RestoreRequest,
        operation: &Operation,
    ) -> Result<RestoreReport, ApiError> {
        let started = before(request.elapsed_us);
        let id = self.resolve_snapshot(&request.snapshot, environment)?;
        let stored = self.load_trusted(&id)?;
        let name = match environment {
            Some(name) => environment_name(name)?,
            None => stored.manifest.specification.name.clone(),
        };
        if self.cluster().is_some() {
            refuse_lazy_in_cluster(request.lazy)?;
            return self.restore_in_cluster(name, id, request.elapsed_us, operation);
        }
        let (slot, guard) = self.slots.enter_or_insert(&name, "restoring", operation)?;
        let result = self.find_memory(&stored, request.lazy, operation).and_then(|memory| {
            let report = self.revive(&slot, &stored, &memory, None, started, operation)?;
            memory.begin_load();
            Ok(report)
        });
        self.clean_up(&slot, result, guard)
    }

    /// Makes new environments of a snapshot.
    pub(crate) fn fork(&self, request: &ForkRequest, operation: &Operation) -> Result<ForkReport, ApiError> {
        let started = before(request.elapsed_us);
        let id = self.resolve_snapshot(&request.snapshot, request.environment.as_deref())?;
        let stored = self.load_trusted(&id)?;
        if self.cluster().is_some() {
            refuse_lazy_in_cluster(request.lazy)?;
            return self.fork_in_cluster(id, &stored.manifest.specification.name, request, operation);
        }
        let slots = self.reserve_names(&stored.manifest.specification.name, request, operation)?;
        let memory = match self.find_memory(&stored, request.lazy, operation) {
            Ok(memory) => memory,
            Err(error) => {
                for (slot, _guard) in slots {
                    self.slots.remove(&slot.name);
                }
                return Err(error);
            }
        };
        operation.step("forking");
        let mut results = Vec::new();
        let mut slots = slots.into_iter();
        loop {
            let batch: Vec<(Arc<Slot>, OperationGuard)> = slots.by_ref().take(FORKS_AT_ONCE).collect();
            if batch.is_empty() {
                break;
            }
            let (stored, memory) = (&stored, &memory);
            results.extend(std::thread::scope(|scope| {
                let forks: Vec<_> = batch
                    .into_iter()
                    .map(|(slot, guard)| {
                        scope.spawn(move || {
                            let result = self.revive(&slot, stored, memory, None, started, operation);
                            (Arc::clone(&slot), self.clean_up(&slot, result, guard))
                        })
                    })
                    .collect();
                forks.into_iter().map(|fork| fork.join().expect("forking does not panic")).collect::<Vec<_>>()
            }));
        }
        // All or none: what was made is undone when one of them failed.
        if results.iter().any(|(_, result)| result.is_err()) {
            let mut first = None;
            for (slot, result) in results {
                match result {
                    Ok(_) => {
                        let request = diorama_api::DownRequest { volumes: true };
                        if let Err(error) = self.down(slot.name.as_str(), request, operation) {
                            tracing::error!(environment = %slot.name, %error, "a fork could not be undone");
                        }
                    }
                    Err(error) => {
                        first.get_or_insert(error);
                    }
                }
            }
            return Err(first.expect("one of them failed"));
        }
        memory.begin_load();
        Ok(ForkReport { environments: results.into_iter().filter_map(|(_, result)| result.ok()).collect() })
    }

    /// Launches a snapshot's machines in a slot, or with `part` those of this host's part, and lets them run in the place of
    /// what runs there.
    pub(crate) fn revive(
        &self,
        slot: &Arc<Slot>,
        stored: &Stored,
        memory: &Memory,
        part: Option<&PartRequest>,
        started: Instant,
        operation: &Operation,
    ) -> Result<RestoreReport, ApiError> {
        let folder = slot.folder(&self.folders);
        let old = slot.state().record.clone();
        let generation = old.as_ref().map_or(1, |old| old.generation + 1);
        let specification = match part {
            Some(part) => part.span.part(),
            None => stored.manifest.specification.renamed(slot.name.clone()),
        };
        let epoch = old
            .as_ref()
            .map_or(0, |old| old.epoch)
            .max(part.map_or(0, |part| part.epoch))
            .max(stored.manifest.cut.epoch);
        let mut frames = self.store.read_frames(stored).map_err(store_error)?;
        frames.retain(|frame| specification.machine(&frame.machine).is_some());
        operation.step("starting machines");
        let mut yielding = Yielding::new(slot);
        let (plans, disks) =
            self.plan(slot, stored, memory, &specification, &disk_folder(&folder, generation))?;
        let described: Vec<(HardwareRecord, BootRecord)> =
            plans.iter().map(|plan| (plan.hardware.clone(), plan.boot.clone())).collect();
        let mut launched = self.launch(
            LaunchPlan {
                specification: &specification,
                machines: plans,
                epoch: Epoch(epoch),
                runtime_folder: socket_folder(slot, &self.folders, generation),
                log_folder: folder.join("log"),
                console_folder: folder.join("console"),
                joining: part.map(|part| Joining { slot, span: &part.span, doubt: None }),
            },
            operation,
        )?;
        self.load_switch(&mut launched, stored, &specification, part, &frames)?;
        let mut resting = resting(stored);
        resting.retain(|machine, _| specification.machine(machine).is_some());
        let machines = launched.processes.iter().zip(described).zip(&specification.machines).map(
            |((process, (hardware, boot)), machine)| MachineRecord {
                process: *process,
                hardware,
                boot,
                rest: resting.get(machine.name.as_str()).copied(),
            },
        );
        let mut record = Record {
            phase: Phase::Up,
            generation,
            epoch,
            snapshot: Some(stored.id),
            started: Some(now()),
            machines: machines.collect(),
            retiring: old.as_ref().map(Record::processes).unwrap_or_default(),
            disks,
            span: part.map(|part| part.span.clone()),
            doubt: None,
            specification,
        };
        operation.check()?;
        if let Some(part) = part {
            self.wait_for_others(launched.running().segment, part.span.id, operation)?;
        }
        record.save(&folder)?;
        // From here on there is no way back.
        let stopping = slot.state().running.take().zip(old.as_ref()).map(|(running, old)| {
            let sockets = socket_folder(slot, &self.folders, old.generation);
            self.begin_stopping(running, &old.processes(), &sockets)
        });
        // Their threads are gone, and their numbers may be others'.
        yielding.0.clear();
        let mut ready = Vec::new();
        let resumed = self.resume_all(&mut launched, &resting, |machine| {
            ready.push(MachineReady { name: machine.to_owned(), ready_ms: milliseconds(started.elapsed()) });
        });
        let ready_ms = milliseconds(started.elapsed());
        for machine in resting.keys() {
            ready.push(MachineReady { name: machine.clone(), ready_ms });
        }
        let mut state = slot.state();
        state.running = Some(launched.keep());
        state.record = Some(record.clone());
        drop(state);
        if let Some(stopping) = stopping {
            stopping.finish();
        }
        remove_tree(&folder.join("frozen"));
        remove_unreferenced_disks(&folder, &record);
        record.retiring.clear();
        record.save(&folder)?;
        slot.state().record = Some(record);
        resumed?;
        Ok(RestoreReport {
            environment: slot.name.to_string(),
            snapshot: stored.id.to_string(),
            ready_ms,
            machines: ready,
            in_flight_replayed: frames.len() as u64,
            lazy: matches!(memory, Memory::Lazy { .. }),
        })
    }

    /// After a failure, what was there before is there again.
    pub(crate) fn clean_up<T>(
        &self,
        slot: &Arc<Slot>,
        result: Result<T, ApiError>,
        guard: OperationGuard,
    ) -> Result<T, ApiError> {
        if result.is_err() {
            let record = slot.state().record.clone();
            self.forget_generation(slot, record.as_ref());
        }
        drop(guard);
        result
    }

    /// Where a snapshot's machines get their memory from: the RAM cache, into which it is loaded, or the store, while they
    /// run.
    fn find_memory(
        &self,
        stored: &Stored,
        lazy: Option<bool>,
        operation: &Operation,
    ) -> Result<Memory, ApiError> {
        if lazy == Some(true) && !self.cache.holds_all(stored) && self.can_load_lazily(operation)? {
            operation.step("looking at memory");
            let machines: Vec<String> =
                stored.manifest.machines.iter().map(|machine| machine.name.clone()).collect();
            let names: Vec<&str> = machines.iter().map(String::as_str).collect();
            let load = LazyMemory::open(&self.store, stored, &names).map_err(store_error)?;
            return Ok(Memory::Lazy { load: Pending::new(load), machines });
        }
        self.load_memory(stored, |_| true, operation).map(Memory::Mapped)
    }

    /// Whether QEMU may watch what its guests touch; says so if not.
    fn can_load_lazily(&self, operation: &Operation) -> Result<bool, ApiError> {
        let qemu = self.hardware.qemu()?;
        let usable = matches!(
            background_snapshot_usable(&qemu),
            BackgroundSnapshot::Usable { .. } | BackgroundSnapshot::NoWriteProtection
        );
        if !usable {
            operation.warn(
                "machines cannot run before their memory is there, as userfaultfd is not permitted here: all of it is \
                 loaded first (`diorama doctor` says how to permit it)",
            );
        }
        Ok(usable)
    }

    /// Waits until all memory of an environment's machines is there, as most of what is done with machines needs.
    pub(crate) fn wait_for_memory(&self, slot: &Slot, operation: &Operation) -> Result<(), ApiError> {
        loop {
            let (mut loaded, mut total, mut incomplete) = (0, 0, false);
            let machines = slot.state().running.as_ref().map_or(0, |running| running.machines.len());
            for index in 0..machines {
                let mut state = slot.state();
                let Some(machine) =
                    state.running.as_mut().and_then(|running| running.machines.get_mut(index))
                else {
                    continue;
                };
                let Some(load) = machine.loading.as_ref().map(Loading::state) else { continue };
                if let Some(failed) = load.failed {
                    return Err(ApiError::new(
                        ErrorKind::WrongState,
                        format!("machine {}: its memory cannot be loaded: {failed}", machine.name),
                    )
                    .hint("`diorama restore` another snapshot, or `diorama down`"));
                }
                if load.complete {
                    if let Some(monitor) = &mut machine.monitor {
                        wait_load_ended(monitor).map_err(|error| qmp_error(&machine.name, &error))?;
                    }
                    machine.loading = None;
                }
                incomplete |= !load.complete;
                loaded += load.loaded_bytes;
                total += load.total_bytes;
            }
            if !incomplete {
                return Ok(());
            }
            operation.check()?;
            operation.bytes("waiting for memory", loaded, total);
            std::thread::sleep(LOAD_POLL);
        }
    }

    /// Brings the memory of some of a snapshot's machines into the RAM cache.
    pub(crate) fn load_memory(
        &self,
        stored: &Stored,
        wanted: impl Fn(&str) -> bool,
        operation: &Operation,
    ) -> Result<Loaded, ApiError> {
        let keep = self.slots.snapshots_in_use();
        self.cache.load(&self.store, stored, &wanted, &keep, operation)
    }

    fn plan(
        &self,
        slot: &Slot,
        stored: &Stored,
        memory: &Memory,
        specification: &Environment,
        disk_folder: &Path,
    ) -> Result<Planned, ApiError> {
        // Until all files have a second name in the environment's folder.
        let _held = self.files.hold();
        let mut plans = Vec::new();
        let mut all_disks = BTreeMap::new();
        for machine in &specification.machines {
            let name = machine.name.as_str();
            let saved = stored.manifest.machine(name).ok_or_else(|| {
                ApiError::new(ErrorKind::Corrupt, format!("the snapshot's manifest lacks machine {name}"))
            })?;
            let disks = self
                .stored_disks(saved)?
                .iter()
                .map(|disk| link_and_extend(disk, &disk_folder.join(name)))
                .collect::<Result<Vec<_>, _>>()?;
            all_disks.insert(name.to_owned(), disks.clone());
            plans.push(MachinePlan {
                hardware: self.stored_hardware(name, &saved.hardware)?,
                boot: self.stored_boot(slot, saved)?,
                disks,
                from: Some(saved_state(
                    memory,
                    saved,
                    self.store.read_state(stored, name).map_err(store_error)?,
                )?),
            });
        }
        Ok((plans, all_disks))
    }

    fn stored_hardware(
        &self,
        machine: &str,
        saved: &diorama_store::Hardware,
    ) -> Result<HardwareRecord, ApiError> {
        let qemu = self.hardware.qemu()?;
        let unsupported = |what: String, hint: &str| {
            Err(ApiError::new(
                ErrorKind::Unsupported,
                format!("machine {machine} cannot be restored here: {what}"),
            )
            .hint(hint))
        };
        let accelerator = match saved.accelerator.as_str() {
            "kvm" => AcceleratorRecord::Kvm,
            _ => AcceleratorRecord::Tcg,
        };
        if accelerator == AcceleratorRecord::Kvm && kvm_usable() != KvmState::Usable {
            return unsupported(
                "it ran under KVM".to_owned(),
                "restore it on a computer with KVM (`diorama doctor`)",
            );
        }
        if !qemu.machine_types.contains(&saved.machine_type) {
            return unsupported(
                format!("this QEMU does not know the machine type {}", saved.machine_type),
                "install a QEMU that does",
            );
        }
        Ok(HardwareRecord {
            machine_type: saved.machine_type.clone(),
            cpu_model: saved.cpu_model.clone(),
            accelerator,
            vcpus: saved.vcpus,
            memory_bytes: saved.memory_bytes,
            tb_size_mib: saved.tb_size_mib.unwrap_or(crate::hardware::TB_SIZE_MIB),
        })
    }

    /// Kernel and initrd, linked into the environment's folder: a reboot needs them, and so does the next snapshot.
    fn stored_boot(&self, slot: &Slot, saved: &diorama_store::MachineRecord) -> Result<BootRecord, ApiError> {
        let Some(kernel) = &saved.kernel else { return Ok(BootRecord::Disk) };
        let folder = slot.folder(&self.folders).join("boot");
        std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
        let link = |blob: &diorama_store::FileRecord| -> Result<PathBuf, ApiError> {
            let path = folder.join(blob.root.to_string());
            if !path.is_file() {
                let load = |file: &std::fs::File| self.store.copy_blob(blob, file);
                let source = self.files.get(&self.store, &blob.root, blob.bytes, load)?;
                diorama_store::link_file(&source, &path).map_err(store_error)?;
            }
            Ok(path)
        };
        Ok(BootRecord::Kernel {
            kernel: link(kernel)?,
            initrd: saved.initrd.as_ref().map(link).transpose()?,
            cmdline: saved.cmdline.clone().unwrap_or_default(),
        })
    }

    /// A machine's disks, their layers as whole files in the cache.
    fn stored_disks(&self, saved: &diorama_store::MachineRecord) -> Result<Vec<DiskRecord>, ApiError> {
        let layer = |(node, layer): (usize, &diorama_store::LayerRecord)| {
            let load = |file: &std::fs::File| self.store.copy_layer(layer, file, &mut |_, _| {});
            let file = self.files.get(&self.store, &layer.root, layer.bytes, load)?;
            Ok(LayerRecord { file, node })
        };
        let disk = |disk: &diorama_store::DiskRecord| {
            let base = disk.base.as_ref().map(|base| self.check_base(base)).transpose()?;
            let layers = disk.layers.iter().enumerate().map(layer).collect::<Result<_, ApiError>>()?;
            Ok(DiskRecord { name: disk.name.clone(), virtual_bytes: disk.virtual_bytes, base, layers })
        };
        saved.disks.iter().map(disk).collect()
    }

    /// A base is not stored: it must be where it was, and as it was; by its time, or else by its hash.
    pub(crate) fn check_base(&self, base: &diorama_store::BaseRecord) -> Result<BaseRecord, ApiError> {
        let path = base.path.display();
        let host = self.cluster().map_or_else(String::new, |cluster| format!("host {}: ", cluster.name));
        let metadata = std::fs::metadata(&base.path).map_err(|error| {
            ApiError::new(ErrorKind::NotFound, format!("{host}the disk image {path} is not there: {error}"))
                .hint("the snapshot needs the image that its disk was made of; put it back")
        })?;
        let is_same = metadata.len() == base.bytes
            && (crate::snapshot::modified(&metadata) == base.modified
                || match &base.blake3 {
                    Some(hash) => self.user_files.look(&base.path, &Operation::unattended())?.blake3 == *hash,
                    None => false,
                });
        if !is_same {
            let message =
                format!("{host}the disk image {path} is not what it was when the snapshot was taken");
            let hint = match base.blake3 {
                Some(_) => "put the image there as it was",
                None => "put the image back as it was (with its time: `cp -p`)",
            };
            return Err(ApiError::new(ErrorKind::Corrupt, message).hint(hint));
        }
        let format = match base.format {
            LayerFormat::Raw => FormatRecord::Raw,
            LayerFormat::Qcow2 => FormatRecord::Qcow2,
        };
        Ok(BaseRecord { path: base.path.clone(), format })
    }

    /// Puts what the switch knew and the frames in flight into the launched segment.
    fn load_switch(
        &self,
        launched: &mut Launched<'_>,
        stored: &Stored,
        specification: &Environment,
        part: Option<&PartRequest>,
        frames: &[StoredFrame],
    ) -> Result<(), ApiError> {
        let running = launched.running();
        // The host that has a machine which this one has not.
        let peer = |machine: &str| -> Option<PeerId> {
            let hosts = &part?.span.hosts;
            let number = hosts.iter().position(|host| host.machines.iter().any(|known| known == machine))?;
            let (_, peer) = running.peers.iter().find(|(known, _)| known.0 as usize == number)?;
            Some(*peer)
        };
        let port = |machine: &str, nic: u16| -> Result<PortId, ApiError> {
            running
                .machines
                .iter()
                .find(|running| running.name == machine)
                .and_then(|running| running.ports.get(usize::from(nic)).copied())
                .ok_or_else(|| {
                    ApiError::new(
                        ErrorKind::Corrupt,
                        format!("the snapshot names NIC {nic} of {machine}, which is none"),
                    )
                })
        };
        let mut learned = Vec::new();
        let mut learned_at_peers = Vec::new();
        for network in &stored.manifest.networks {
            let Some(index) =
                specification.networks.iter().position(|known| known.name.as_str() == network.name)
            else {
                continue;
            };
            for entry in &network.learned {
                let mac: MacAddress = entry.mac.parse().map_err(|error: diorama_topology::MacError| {
                    ApiError::new(ErrorKind::Corrupt, format!("the snapshot's address table: {error}"))
                })?;
                match peer(&entry.machine) {
                    Some(peer) => learned_at_peers.push((running.networks[index], mac.bytes(), peer)),
                    None => {
                        learned.push((
                            running.networks[index],
                            mac.bytes(),
                            port(&entry.machine, entry.nic)?,
                        ));
                    }
                }
            }
        }
        let mut replays = Vec::new();
        for frame in frames {
            let to = port(&frame.machine, frame.nic)?;
            replays.push((to, Epoch(frame.colour), frame.after_cut_ns, frame.bytes.clone()));
        }
        let segment = running.segment;
        self.plane.call(move |plane| {
            let Some(segment) = plane.segment(segment) else { return };
            for (network, mac, port) in learned {
                if let Err(error) = segment.switch_mut().learn(network, mac, port, Time(0)) {
                    tracing::debug!(%error, "an address is learned anew");
                }
            }
            for (network, mac, peer) in learned_at_peers {
                if let Err(error) = segment.switch_mut().learn_at_peer(network, mac, peer, Time(0)) {
                    tracing::debug!(%error, "an address is learned anew");
                }
            }
            for (to, colour, after_ns, frame) in replays {
                segment.queue_replay(to, colour, after_ns, frame);
            }
        });
        Ok(())
    }

    /// Takes the names of new forks, all or none.
    fn reserve_names(
        &self,
        original: &EnvironmentName,
        request: &ForkRequest,
        operation: &Operation,
    ) -> Result<Vec<(Arc<Slot>, OperationGuard)>, ApiError> {
        let count = request.count.unwrap_or(1);
        if count == 0 || count > MAX_FORKS {
            return Err(ApiError::new(ErrorKind::Invalid, format!("cannot make {count} forks at once"))
                .hint(format!("between 1 and {MAX_FORKS}")));
        }
        let names = match (&request.name, count) {
            (Some(name), 1) => vec![name.clone()],
            (Some(name), _) => (1..=count).map(|number| format!("{name}-{number}")).collect(),
            (None, _) => (1_u32..)
                .map(|number| format!("{original}-fork-{number}"))
                .filter(|name| name.parse().is_ok_and(|name| !self.slots.contains(&name)))
                .take(count as usize)
                .collect(),
        };
        let mut reserved: Vec<(Arc<Slot>, OperationGuard)> = Vec::new();
        let result = names.iter().try_for_each(|text| {
            let name =
                environment_name(text).map_err(|error| error.hint("choose a short one with `--name`"))?;
            if self.slots.contains(&name) {
                return Err(ApiError::new(
                    ErrorKind::NameInUse,
                    format!("there is an environment `{name}` already"),
                )
                .hint("choose another name with `--name`, or stop that one with `diorama down --volumes`"));
            }
            reserved.push(self.slots.enter_or_insert(&name, "forking", operation)?);
            Ok(())
        });
        if let Err(error) = result {
            for (slot, _guard) in reserved {
                self.slots.remove(&slot.name);
            }
            return Err(error);
        }
        Ok(reserved)
    }
}

impl Memory {
    /// All machines run: what they have not asked for is loaded as well.
    fn begin_load(&self) {
        if let Memory::Lazy { load, .. } = self {
            load.begin();
        }
    }
}

/// A machine's saved state, as it is launched from.
fn saved_state(
    memory: &Memory,
    machine: &diorama_store::MachineRecord,
    state: Vec<u8>,
) -> Result<Saved, ApiError> {
    match memory {
        Memory::Mapped(loaded) => Ok(Saved::Mapped { ram: loaded.folder.join(&machine.name), state }),
        Memory::Lazy { load, machines } => {
            let corrupt = |what: String| {
                ApiError::new(ErrorKind::Corrupt, format!("the device state of {}: {what}", machine.name))
            };
            let opening = postcopy::opening(&state, RAM_BLOCK, machine.hardware.memory_bytes)
                .map_err(|error| corrupt(error.to_string()))?;
            let place = machines.iter().position(|name| *name == machine.name);
            let place = place.ok_or_else(|| corrupt("the machine is not in the manifest".to_owned()))?;
            Ok(Saved::Lazy { load: Arc::clone(load.load()), machine: place, opening })
        }
    }
}

/// QEMU says that it has all memory a moment before it takes a new migration.
fn wait_load_ended(monitor: &mut Client) -> Result<(), QmpError> {
    let deadline = Instant::now() + COMMAND_LIMIT;
    loop {
        let answer = monitor.execute("query-migrate", Value::Null, COMMAND_LIMIT)?;
        if answer["status"] != "postcopy-active" || Instant::now() > deadline {
            return Ok(());
        }
        std::thread::sleep(MIGRATION_POLL);
    }
}

fn refuse_lazy_in_cluster(lazy: Option<bool>) -> Result<(), ApiError> {
    if lazy != Some(true) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::Unsupported,
        "in a cluster machines cannot run before their memory is there",
    )
    .hint("leave out `--lazy`"))
}

/// While it lives, an environment's machines run only when nothing else wants to: others are about to take their place.
struct Yielding(Vec<u32>);

impl Yielding {
    fn new(slot: &Slot) -> Self {
        let machines = slot.state().running.as_ref().map(|running| {
            running.machines.iter().flat_map(|machine| machine.vcpu_threads.iter().copied()).collect()
        });
        let threads: Vec<u32> = machines.unwrap_or_default();
        prefer_others(&threads, true);
        Self(threads)
    }
}

impl Drop for Yielding {
    fn drop(&mut self) {
        prefer_others(&self.0, false);
    }
}

fn resting(stored: &Stored) -> BTreeMap<String, Rest> {
    stored
        .manifest
        .machines
        .iter()
        .filter_map(|machine| {
            let rest = match machine.state {
                MachineState::Running => return None,
                MachineState::Paused => Rest::Paused,
                MachineState::Shutdown => Rest::Shutdown,
            };
            Some((machine.name.clone(), rest))
        })
        .collect()
}

pub(crate) fn before(elapsed_us: u64) -> Instant {
    let now = Instant::now();
    now.checked_sub(Duration::from_micros(elapsed_us)).unwrap_or(now)
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
