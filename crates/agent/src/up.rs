//! Starting an environment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diorama_api::{ApiError, EnvironmentStatus, ErrorKind, Folders, UpRequest};
use diorama_switch::{Epoch, PortId};
use diorama_topology::{Boot, Environment, Files, Machine, SourceFile};
use serde_json::Value;

use crate::Agent;
use crate::images;
use crate::launch::{COMMAND_LIMIT, LaunchPlan, Launched, MachinePlan, explain};
use crate::operation::Operation;
use crate::problem::io_error;
use crate::record::{BootRecord, DiskRecord, MachineRecord, Phase, Record, Rest};
use crate::slot::Slot;
use crate::span::{Joining, PartRequest};
use crate::{disks, record};

/// The folder of one generation's sockets.
pub(crate) fn socket_folder(slot: &Slot, folders: &Folders, generation: u32) -> PathBuf {
    slot.runtime_folder(folders).join(format!("g{generation}"))
}

/// The folder of the disks that one generation made.
pub(crate) fn disk_folder(folder: &Path, generation: u32) -> PathBuf {
    folder.join("disks").join(format!("g{generation}"))
}

impl Agent {
    /// Starts an environment and returns when every machine runs. One that runs already, from the same file, is as
    /// good.
    pub(crate) fn up(
        &self,
        request: UpRequest,
        operation: &Operation,
    ) -> Result<EnvironmentStatus, ApiError> {
        let specification = request.specification;
        check(&specification)?;
        if self.cluster().is_some() {
            return self.up_in_cluster(specification, operation);
        }
        let (slot, guard) = self.slots.enter_or_insert(&specification.name, "starting", operation)?;
        let kept = slot.state().record.clone();
        if let Some(kept) = &kept
            && kept.phase == Phase::Up
        {
            drop(guard);
            return self.already_up(&slot, kept, &specification);
        }
        let result = self.start(&slot, specification, None, kept.as_ref(), operation);
        if let Err(error) = result {
            self.forget_generation(&slot, kept.as_ref());
            return Err(error);
        }
        drop(guard);
        self.status(slot.name.as_str())
    }

    fn already_up(
        &self,
        slot: &Arc<Slot>,
        record: &Record,
        specification: &Environment,
    ) -> Result<EnvironmentStatus, ApiError> {
        if record.specification == *specification {
            return self.status(slot.name.as_str());
        }
        Err(ApiError::new(
            ErrorKind::NameInUse,
            format!("an environment `{}` runs already, and its file said otherwise", slot.name),
        )
        .hint("stop it with `diorama down`, or start this one under another name with `--name`"))
    }

    /// Starts an environment, or with `part` this host's part of one.
    pub(crate) fn start(
        &self,
        slot: &Arc<Slot>,
        specification: Environment,
        part: Option<&PartRequest>,
        kept: Option<&Record>,
        operation: &Operation,
    ) -> Result<(), ApiError> {
        let folder = slot.folder(&self.folders);
        let generation = kept.map_or(1, |kept| kept.generation + 1);
        let mut record = Record {
            phase: Phase::Up,
            generation,
            epoch: kept.map_or(0, |kept| kept.epoch).max(part.map_or(0, |part| part.epoch)),
            snapshot: None,
            started: None,
            machines: Vec::new(),
            retiring: Vec::new(),
            disks: BTreeMap::new(),
            span: part.map(|part| part.span.clone()),
            doubt: None,
            specification,
        };
        operation.step("preparing disks");
        let mut warnings = Vec::new();
        let mut machines = Vec::new();
        for machine in &record.specification.machines {
            let hardware = self.hardware.choose(machine, &mut warnings)?;
            let disks = make_disks(machine, &disk_folder(&folder, generation), kept)?;
            record.disks.insert(machine.name.to_string(), disks.clone());
            let whole = part.map_or(&record.specification, |part| &part.span.whole);
            let boot = self.boot(whole, machine)?;
            machines.push(MachinePlan { hardware, boot, disks, from: None });
        }
        for warning in warnings {
            operation.warn(warning);
        }
        operation.step("starting machines");
        let described: Vec<_> =
            machines.iter().map(|machine| (machine.hardware.clone(), machine.boot.clone())).collect();
        let mut launched = self.launch(
            LaunchPlan {
                specification: &record.specification,
                machines,
                epoch: Epoch(record.epoch),
                runtime_folder: socket_folder(slot, &self.folders, generation),
                log_folder: folder.join("log"),
                console_folder: folder.join("console"),
                joining: part.map(|part| Joining { slot, span: &part.span, doubt: None }),
            },
            operation,
        )?;
        record.machines = launched
            .processes
            .iter()
            .zip(described)
            .map(|(process, (hardware, boot))| MachineRecord {
                process: *process,
                hardware,
                boot,
                rest: None,
            })
            .collect();
        record.started = Some(now());
        record.save(&folder)?;
        operation.check()?;
        if let Some(part) = part {
            self.wait_for_others(launched.running().segment, part.span.id, operation)?;
        }
        self.resume_all(&mut launched, &BTreeMap::new(), |_| {})?;
        let mut state = slot.state();
        state.running = Some(launched.keep());
        state.record = Some(record);
        Ok(())
    }

    /// Lets all launched machines run, but those that rest, and opens their ports.
    pub(crate) fn resume_all(
        &self,
        launched: &mut Launched<'_>,
        resting: &BTreeMap<String, Rest>,
        mut ready: impl FnMut(&str),
    ) -> Result<(), ApiError> {
        let running = launched.running();
        let segment = running.segment;
        // Frames in flight come before anything that the machines send from now on.
        self.plane.call(move |plane| plane.begin_replay(segment));
        let mut open: Vec<PortId> = Vec::new();
        for machine in &mut running.machines {
            // A machine that shut down takes its frames, as its card would; one that is paused gets them later.
            if resting.get(&machine.name) != Some(&Rest::Paused) {
                open.extend(&machine.ports);
            }
            if resting.contains_key(&machine.name) {
                continue;
            }
            let monitor = machine.monitor.as_mut().expect("just launched");
            monitor
                .execute("cont", Value::Null, COMMAND_LIMIT)
                .map_err(|error| explain(&machine.name, &error, machine.spawned.as_mut()))?;
            ready(&machine.name);
        }
        self.plane.call(move |plane| plane.release(segment, &open));
        Ok(())
    }

    /// Removes what a failed start or restore made, and the environment if it was new.
    pub(crate) fn forget_generation(&self, slot: &Slot, kept: Option<&Record>) {
        let folder = slot.folder(&self.folders);
        match kept {
            Some(kept) => {
                // The record on disk may already speak of processes that are gone.
                if let Err(error) = kept.save(&folder) {
                    tracing::error!(%error, "an environment's record cannot be put back");
                }
                remove_unreferenced_disks(&folder, kept);
            }
            None => {
                remove_tree(&folder);
                remove_tree(&slot.runtime_folder(&self.folders));
                self.slots.remove(&slot.name);
            }
        }
    }

    fn boot(&self, environment: &Environment, machine: &Machine) -> Result<BootRecord, ApiError> {
        match &machine.boot {
            Boot::BuiltIn { image } => {
                let image = images::find(&self.folders, image)?;
                Ok(BootRecord::Kernel {
                    kernel: image.kernel,
                    initrd: Some(image.initrd),
                    cmdline: format!("{} {}", image.cmdline, guest_arguments(environment, machine)),
                })
            }
            Boot::Kernel { kernel, initrd, cmdline } => Ok(BootRecord::Kernel {
                kernel: kernel.clone(),
                initrd: initrd.clone(),
                cmdline: cmdline.clone(),
            }),
            Boot::DiskImage { .. } => Ok(BootRecord::Disk),
        }
    }
}

/// What the `micro` image reads of its kernel's command line: names and addresses.
fn guest_arguments(environment: &Environment, machine: &Machine) -> String {
    let mut arguments = vec![format!("diorama.hostname={}", machine.name)];
    for nic in &machine.nics {
        if let Some(address) = &nic.address {
            arguments.push(format!("diorama.nic={},{address}", nic.mac));
        }
    }
    for other in &environment.machines {
        if let Some(address) = other.nics.iter().find_map(|nic| nic.address) {
            arguments.push(format!("diorama.host={},{}", other.name, address.ip()));
        }
    }
    arguments.join(" ")
}

fn make_disks(machine: &Machine, folder: &Path, kept: Option<&Record>) -> Result<Vec<DiskRecord>, ApiError> {
    let kept = kept.and_then(|kept| kept.disks.get(machine.name.as_str()));
    disks::wanted(machine)
        .iter()
        .map(|wanted| {
            let kept = kept.and_then(|disks| disks.iter().find(|disk| disk.name == wanted.name));
            let mut disk = disks::make(wanted, &folder.join(machine.name.as_str()), kept)?;
            disks::renumber(&mut disk);
            Ok(disk)
        })
        .collect()
}

/// Removes disk folders that no layer of the record lies in.
pub(crate) fn remove_unreferenced_disks(folder: &Path, record: &record::Record) {
    let disks = folder.join("disks");
    let layers: Vec<&Path> = record
        .disks
        .values()
        .flatten()
        .flat_map(|disk| &disk.layers)
        .map(|layer| layer.file.as_path())
        .collect();
    for entry in std::fs::read_dir(&disks).into_iter().flatten().flatten() {
        if !layers.iter().any(|layer| layer.starts_with(entry.path())) {
            remove_tree(&entry.path());
        }
    }
    // Only an empty one goes.
    let _ = std::fs::remove_dir(&disks);
}

/// Removes a folder with everything in it; one that is not there is as good.
pub(crate) fn remove_tree(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::error!("{}", io_error(folder, &error));
        }
        _ => {}
    }
}

/// The time, for people and manifests.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().to_string()
}

struct RealFiles;

impl Files for RealFiles {
    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }
}

/// The client has checked its file; other callers of the API may not have.
fn check(specification: &Environment) -> Result<(), ApiError> {
    let invalid = |message: String| ApiError::new(ErrorKind::Invalid, message);
    let text = specification.to_yaml().map_err(|error| invalid(error.to_string()))?;
    let source = SourceFile { name: "the request", text: &text, folder: Path::new("/") };
    let parsed =
        diorama_topology::parse(&source, &RealFiles, images::BUILT_IN_IMAGES).map_err(|problems| {
            let problems: Vec<String> = problems.iter().map(|problem| problem.message.clone()).collect();
            invalid(format!("the environment is not valid: {}", problems.join("; ")))
        })?;
    if parsed != *specification {
        return Err(invalid("the environment is not in the form that its file would give".to_owned()));
    }
    Ok(())
}
