//! The prepare round: all slow work, while machines run.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use diorama_api::{ApiError, CaptureMode, ErrorKind, MachineState};
use diorama_qemu::command_line::{DiskFormat, DiskLayer, blockdev, format_node};
use diorama_qemu::memory;
use diorama_qemu::migration::CAPTURE_THREAD;
use diorama_qemu::process::{Policy, thread_sleeps, threads_named, threads_of};
use diorama_qemu::qmp::{Client, Parts, QmpError};
use serde_json::{Value, json};

use super::turns::{Turns, threads_beside};
use super::{Attempt, Machine};
use crate::Agent;
use crate::capture::{Capture, CaptureError, Gating};
use crate::dataplane::{Command, CutJob, CutMachine, Goal, Monitor, Resume, SegmentId, wait_until_read};
use crate::disks::{new_layer, reconcile};
use crate::haste::{HURRIED, Haste, Service};
use crate::keeper::Keeper;
use crate::launch::{COMMAND_LIMIT, SocketPaths};
use crate::memory::HostMemory;
use crate::pace::{Breaks, Share};
use crate::priority::schedule_this_thread;
use crate::problem::{cut_error, io_error, no_space, qmp_error, store_error};
use crate::record::{DiskRecord, Record};
use crate::slot::Slot;
use crate::takeover::{MIGRATION_POLL, migration_runs};
use crate::up::{disk_folder, socket_folder};

/// The name under which QEMU gets the capture's socket.
const CAPTURE_FD: &str = "capture";
/// What pre-copy may take for its last round, in milliseconds: as little as can be said.
const DOWNTIME_LIMIT_MS: u64 = 1;
/// The first QEMU that writes a live capture's beginning under its big lock ("migration: Take the BQL around
/// qemu_savevm_state_setup").
const SETUP_LOCKED_SINCE: (u64, u64, u64) = (9, 0, 0);
/// The first QEMU after whose live capture a machine is as it was before, standing in our case ("migration: preserve
/// suspended for bg_migration"); before, it always ran.
const LEFT_AS_FOUND_SINCE: (u64, u64, u64) = (8, 2, 50);
/// What putting memory into huge pages takes. These threads are real-time ones, which guests wait for.
const COLLAPSE_SHARE: Share =
    Share { idle_eighths: 1, most_percent: 50, longest_rest: Duration::from_millis(200) };
/// How long it may take to read all memory once. Past this the pause is longer, and nothing worse.
const READ_BOUND: Duration = Duration::from_secs(10);
const READ_POLL: Duration = Duration::from_millis(1);
/// How long most of a machine's memory may take to come, at the least, and for each GiB.
const PRECOPY_BOUND: Duration = Duration::from_secs(60);
const PRECOPY_BOUND_A_GIB: Duration = Duration::from_secs(20);
/// Disk space that a snapshot leaves free, in bytes.
const DISK_RESERVE_BYTES: u64 = 64 << 20;

fn precopy_bound(memory_bytes: u64) -> Duration {
    let gib = u32::try_from(memory_bytes >> 30).unwrap_or(u32::MAX);
    PRECOPY_BOUND.saturating_add(PRECOPY_BOUND_A_GIB.saturating_mul(gib))
}

/// What one machine needs to be prepared; kept apart from the attempt so that machines are prepared side by side.
struct Plan {
    index: usize,
    name: String,
    memory_bytes: u64,
    capture: CaptureMode,
    /// Whether its memory is put into huge pages.
    collapse: bool,
    ram_path: PathBuf,
    service: Service,
    cut_monitor: PathBuf,
    pivot_monitor: PathBuf,
    overlay_folder: PathBuf,
    disks: Vec<DiskRecord>,
}

impl Attempt<'_> {
    pub(super) fn prepare(&mut self) -> Result<(), ApiError> {
        self.operation.step("preparing");
        self.operation.check()?;
        let needed = self.expected_bytes();
        self.check_space(needed)?;
        self.writer = Some(self.agent.store.begin().map_err(store_error)?);
        let keep = self.agent.slots.snapshots_in_use();
        let files = self.agent.cache.begin(needed, &keep)?;
        let ram_folder = files.folder().to_owned();
        self.files = Some(files);
        self.machines = self
            .record
            .specification
            .machines
            .iter()
            .zip(&self.states)
            .map(|(machine, state)| Machine {
                name: machine.name.to_string(),
                runs: *state == MachineState::Running,
                frozen: self.agent.is_frozen(&self.slot, machine.name.as_str()),
                capture: None,
                overlays: Vec::new(),
                pivoted: false,
                migrating: false,
                armed: false,
                powered_off: false,
            })
            .collect();
        let prepared = match self.prepare_machines(&ram_folder) {
            Err(error) if self.may_fall_back && error.kind == ErrorKind::Unsupported => {
                self.operation
                    .warn(format!("{}; using pre-copy, which pauses machines longer", error.message));
                self.capture = CaptureMode::Precopy;
                self.may_fall_back = false;
                self.undo_preparation(&ram_folder)?;
                self.prepare_machines(&ram_folder)
            }
            result => result,
        };
        prepared?;
        self.ready = Some(self.cut_machines()?);
        Ok(())
    }

    fn prepare_machines(&mut self, ram_folder: &std::path::Path) -> Result<(), ApiError> {
        let sockets = socket_folder(&self.slot, &self.agent.folders, self.record.generation);
        let folder = self.slot.folder(&self.agent.folders);
        // Half of what is free at the most, for all machines together: untouched memory is backed then.
        let mut huge_budget = HostMemory::now().map_or(0, |memory| memory.available) / 2;
        let services = self.services();
        let plane = &self.agent.plane;
        self.haste.get_or_insert_with(|| Haste::begin(services.clone(), plane));
        let plans: Vec<Plan> = self
            .machines
            .iter()
            .zip(services)
            .enumerate()
            .filter(|(_, (machine, _))| !machine.frozen)
            .map(|(index, (machine, service))| {
                let memory_bytes = self.record.specification.machines[index].memory_bytes;
                let left = huge_budget.checked_sub(memory_bytes);
                huge_budget = left.unwrap_or(huge_budget);
                Plan {
                    index,
                    name: machine.name.clone(),
                    memory_bytes,
                    capture: if machine.runs { self.capture } else { CaptureMode::Stop },
                    collapse: left.is_some(),
                    ram_path: ram_folder.join(&machine.name),
                    service,
                    cut_monitor: SocketPaths::new(&sockets, index).cut_monitor,
                    pivot_monitor: SocketPaths::new(&sockets, index).pivot_monitor,
                    overlay_folder: disk_folder(&folder, self.record.generation).join(&machine.name),
                    disks: self.record.disks.get(&machine.name).cloned().unwrap_or_default(),
                }
            })
            .collect();
        if self.capture == CaptureMode::Live {
            let keeper = Keeper::start().map_err(|error| {
                ApiError::new(
                    ErrorKind::Io,
                    format!("a process to keep live captures cannot be started: {error}"),
                )
            })?;
            self.keeper = Some(keeper);
        }
        let keeper = self.keeper.as_ref();
        let turns = Turns::new(threads_beside(true).min(plans.len()));
        let turns = &turns;
        let results: Vec<(usize, Prepared)> = std::thread::scope(|scope| {
            let preparations: Vec<_> = plans
                .iter()
                .map(|plan| scope.spawn(move || (plan.index, prepare_one(plan, keeper, turns))))
                .collect();
            preparations
                .into_iter()
                .map(|preparation| preparation.join().expect("preparing does not panic"))
                .collect()
        });
        let mut failure = None;
        for (index, prepared) in results {
            let machine = &mut self.machines[index];
            machine.overlays = prepared.overlays;
            machine.capture = prepared.capture;
            machine.migrating = prepared.migrating;
            machine.powered_off = machine.runs && prepared.powered_off;
            machine.armed = machine.migrating && machine.is_captured_live(self.capture);
            match prepared.monitor {
                Ok(monitor) => self.monitors.push(Monitors {
                    machine: index,
                    cut: monitor,
                    pivot: prepared.pivot_monitor,
                }),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => self.operation.check(),
        }
    }

    fn services(&self) -> Vec<Service> {
        let state = self.slot.state();
        let connected = state.running.iter().flat_map(|running| &running.machines);
        let vcpu_threads = connected.map(|machine| machine.vcpu_threads.clone());
        let processes = self.record.machines.iter().map(|machine| machine.process.into());
        processes.zip(vcpu_threads).map(|(process, vcpu_threads)| Service { process, vcpu_threads }).collect()
    }

    /// Takes back what was prepared, to prepare anew.
    fn undo_preparation(&mut self, ram_folder: &std::path::Path) -> Result<(), ApiError> {
        self.end_captures();
        self.remove_unused_overlays();
        for machine in &self.machines {
            let path = ram_folder.join(&machine.name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io_error(&path, &error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends every capture that is under way; nothing of it is kept. Live ones are read to their end.
    pub(super) fn end_captures(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::error!(error = error.message, "captures were let through without a drain");
        }
        self.ready = None;
        self.finish_resting();
        for machine in &self.machines {
            if machine.migrating && !machine.is_captured_live(self.capture) {
                self.agent.end_migration(&self.slot, &machine.name);
            }
            if let Some(capture) = &machine.capture {
                capture.discard();
            }
        }
        for machine in &mut self.machines {
            // Waits for the thread.
            machine.capture = None;
            machine.migrating = false;
        }
        self.keeper = None;
    }

    /// Lets live captures through that wait at their gates: their machines stand still for a moment, as in a cut.
    fn disarm(&mut self) -> Result<(), ApiError> {
        let armed: Vec<usize> =
            (0..self.machines.len()).filter(|index| self.machines[*index].armed).collect();
        if armed.is_empty() {
            return Ok(());
        }
        // The monitors go first: QEMU takes one connection to each.
        self.monitors.clear();
        self.ready = None;
        let sockets = socket_folder(&self.slot, &self.agent.folders, self.record.generation);
        for index in &armed {
            let path = SocketPaths::new(&sockets, *index).cut_monitor;
            match Client::connect(&path, Instant::now() + COMMAND_LIMIT) {
                Ok(cut) => self.monitors.push(Monitors { machine: *index, cut, pivot: None }),
                // Its capture ends with it.
                Err(error) => tracing::warn!(machine = self.machines[*index].name, %error, "not disarmed"),
            }
        }
        let (segment, mut machines) = self.cut_machines()?;
        machines.retain(|machine| machine.armed && machine.monitor.is_some());
        let job = CutJob { goal: Goal::Disarm, machines, bound: super::LIVE_BOUND };
        let outcome = self.agent.plane.cut(segment, job).recv().expect("the data plane answers every cut");
        for machine in &mut self.machines {
            machine.armed = false;
        }
        self.keep_off(&outcome);
        outcome.failure.as_ref().map_or(Ok(()), |failure| Err(cut_error(failure)))
    }

    /// What the data plane needs for the cut.
    pub(super) fn cut_machines(&mut self) -> Result<(SegmentId, Vec<CutMachine>), ApiError> {
        let mut monitors = std::mem::take(&mut self.monitors);
        let state = self.slot.state();
        let running = state.running.as_ref().ok_or_else(|| {
            ApiError::new(ErrorKind::WrongState, format!("environment `{}` has no machines", self.slot.name))
        })?;
        let mut machines = Vec::new();
        for (index, machine) in self.machines.iter_mut().enumerate() {
            let connected = &running.machines[index];
            let monitors =
                monitors.iter().position(|of| of.machine == index).map(|at| monitors.swap_remove(at));
            let left_as_found =
                monitors.as_ref().is_some_and(|monitors| monitors.cut.version() >= LEFT_AS_FOUND_SINCE);
            let socket_error = |error: std::io::Error| {
                ApiError::new(ErrorKind::Machine, format!("machine {}: its monitor: {error}", machine.name))
                    .hint("QEMU has probably died: `diorama status` shows it. The other machines run on")
            };
            let (cut, pivot_monitor) = match monitors {
                Some(monitors) => (Some(monitors.cut), monitors.pivot),
                None => (None, None),
            };
            let mut monitor = cut.map(Client::into_parts).transpose().map_err(socket_error)?;
            let mut pivot_monitor =
                pivot_monitor.map(Client::into_parts).transpose().map_err(socket_error)?;
            let mut stop = None;
            let mut after_stop = Vec::new();
            if let Some(parts) = &mut pivot_monitor {
                let mut command = pivot(&self.record, machine, parts);
                command.announce(parts).map_err(socket_error)?;
                after_stop.push(command);
            }
            let switched_off = monitor
                .as_ref()
                .is_some_and(|parts| parts.events.iter().any(|event| event.name == "SHUTDOWN"));
            if let Some(parts) = &mut monitor {
                if machine.runs {
                    let mut command = Command::new(parts, Monitor::Cut, "stop", Value::Null);
                    command.announce(parts).map_err(socket_error)?;
                    stop = Some(command);
                }
                if !machine.migrating {
                    let arguments = json!({"uri": format!("fd:{CAPTURE_FD}")});
                    after_stop.push(Command::new(parts, Monitor::Cut, "migrate", arguments));
                }
            }
            let gate = machine.capture.as_ref().map(Capture::gate).transpose();
            machines.push(CutMachine {
                name: machine.name.clone(),
                ports: connected.ports.clone(),
                monitor,
                pivot_monitor,
                stop,
                vcpu_threads: connected.vcpu_threads.clone(),
                service_threads: threads_of(self.record.machines[index].process.pid, &connected.vcpu_threads),
                after_stop,
                resume: match (machine.runs, self.capture) {
                    (false, _) => Resume::Never,
                    (true, CaptureMode::Live) if left_as_found => Resume::OnceSaved,
                    (true, CaptureMode::Live) => Resume::ByItself,
                    (true, CaptureMode::Precopy | CaptureMode::Stop) => Resume::AfterMigration,
                },
                gate: gate.map_err(|error| ApiError::new(ErrorKind::Io, error.to_string()))?,
                armed: machine.armed,
                powered_off: machine.powered_off || switched_off,
            });
        }
        let segment = running.segment;
        drop(state);
        for machine in &machines {
            for parts in machine.monitor.iter().chain(&machine.pivot_monitor) {
                wait_until_read(parts);
            }
        }
        Ok((segment, machines))
    }

    /// Removes the overlays that no pivot has made active; takes those into the record that one has, although nobody
    /// heard of it.
    pub(super) fn remove_unused_overlays(&mut self) {
        let folder = disk_folder(&self.slot.folder(&self.agent.folders), self.record.generation);
        let mut late_pivots = false;
        for machine in &mut self.machines {
            let overlays = std::mem::take(&mut machine.overlays);
            let disks = self.record.disks.get_mut(&machine.name).into_iter().flatten();
            for (disk, overlay) in disks.zip(overlays) {
                let layers = disk.layers.len();
                let mut state = self.slot.state();
                let monitor = state.machine(&machine.name).and_then(|machine| machine.monitor.as_mut());
                let result = match monitor {
                    Some(monitor) => reconcile(monitor, disk, &folder.join(&machine.name)),
                    None => Ok(()),
                };
                // When QEMU does not say, the file stays: it may be in use.
                if let Err(error) = result {
                    tracing::warn!(file = %overlay.file.display(), %error, "an unused overlay may be left");
                }
                late_pivots |= disk.layers.len() != layers;
            }
        }
        if late_pivots && let Err(error) = self.record.save(&self.slot.folder(&self.agent.folders)) {
            tracing::error!(error = error.message, "the record lacks a disk's layer");
        }
    }

    /// About how many bytes of memory the snapshot will have: what the machines' processes occupy.
    fn expected_bytes(&self) -> u64 {
        let resident = |pid: u32| -> Option<u64> {
            let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
            let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
            Some(pages * 4096)
        };
        let machines = self.record.machines.iter().zip(&self.record.specification.machines);
        machines
            .map(|(machine, spec)| {
                resident(machine.process.pid).map_or(spec.memory_bytes, |bytes| bytes.min(spec.memory_bytes))
            })
            .sum()
    }

    fn check_space(&self, needed: u64) -> Result<(), ApiError> {
        let free = self.agent.store.free_bytes().map_err(store_error)?;
        if free < needed + DISK_RESERVE_BYTES {
            return Err(no_space(format!(
                "the snapshot may need {} MiB on disk, and {} MiB are free",
                (needed + DISK_RESERVE_BYTES) >> 20,
                free >> 20,
            )));
        }
        Ok(())
    }
}

/// One transaction that makes every overlay the active layer of its disk.
fn pivot(record: &Record, machine: &Machine, monitor: &mut Parts) -> Command {
    let disks = record.disks.get(&machine.name).into_iter().flatten();
    let actions: Vec<_> = disks
        .zip(&machine.overlays)
        .map(|(disk, overlay)| {
            let active = disk.layers.last().map_or(0, |layer| layer.node);
            json!({"type": "blockdev-snapshot", "data": {
                "node": format_node(&disk.name, active),
                "overlay": format_node(&disk.name, overlay.node),
            }})
        })
        .collect();
    Command::new(monitor, Monitor::Pivot, "transaction", json!({"actions": actions}))
}

/// What preparing one machine made, whether or not all of it succeeded.
struct Prepared {
    overlays: Vec<crate::record::LayerRecord>,
    capture: Option<Capture>,
    migrating: bool,
    /// Its guest has switched it off already.
    powered_off: bool,
    monitor: Result<Client, ApiError>,
    /// If it has disks.
    pivot_monitor: Option<Client>,
}

/// The connections that one machine is cut through.
pub(super) struct Monitors {
    /// The machine's place.
    machine: usize,
    cut: Client,
    pivot: Option<Client>,
}

fn prepare_one(plan: &Plan, keeper: Option<&Keeper>, turns: &Turns) -> Prepared {
    let mut prepared = Prepared {
        overlays: Vec::new(),
        capture: None,
        migrating: false,
        powered_off: false,
        monitor: Err(unprepared(&plan.name)),
        pivot_monitor: None,
    };
    prepared.monitor = fill(plan, keeper, turns, &mut prepared);
    prepared
}

fn fill(
    plan: &Plan,
    keeper: Option<&Keeper>,
    turns: &Turns,
    prepared: &mut Prepared,
) -> Result<Client, ApiError> {
    let failed = |error: QmpError| qmp_error(&plan.name, &error);
    // QEMU takes a hundredth of a second of two threads over these commands, with its guest's lock in its hands.
    let turn = turns.take();
    let mut monitor = Client::connect(&plan.cut_monitor, Instant::now() + COMMAND_LIMIT).map_err(failed)?;
    let live = plan.capture == CaptureMode::Live;
    // From here on this monitor hears of it.
    let status = monitor.execute("query-status", Value::Null, COMMAND_LIMIT).map_err(failed)?;
    prepared.powered_off = status["status"] == "shutdown";
    let capabilities = json!({"capabilities": [
        {"capability": "events", "state": true},
        // On since it was restored lazily, if it was; the two exclude one another.
        {"capability": "postcopy-ram", "state": false},
        {"capability": "background-snapshot", "state": live},
    ]});
    match monitor.execute("migrate-set-capabilities", capabilities, COMMAND_LIMIT) {
        Err(QmpError::Command { desc, .. }) if live => {
            return Err(ApiError::new(
                ErrorKind::Unsupported,
                format!("machine {}: memory cannot be captured live ({desc})", plan.name),
            )
            .hint("`--capture precopy` works; `diorama doctor` says what live capture needs"));
        }
        result => result.map_err(failed)?,
    };
    if !live {
        let parameters = json!({"max-bandwidth": i64::MAX, "downtime-limit": DOWNTIME_LIMIT_MS});
        monitor.execute("migrate-set-parameters", parameters, COMMAND_LIMIT).map_err(failed)?;
    }
    for disk in &plan.disks {
        prepare_disk(plan, disk, prepared, &mut monitor)?;
    }
    if !prepared.overlays.is_empty() {
        let pivot_monitor = Client::connect(&plan.pivot_monitor, Instant::now() + COMMAND_LIMIT);
        prepared.pivot_monitor = Some(pivot_monitor.map_err(failed)?);
    }
    let gating = match plan.capture {
        CaptureMode::Live if monitor.version() < SETUP_LOCKED_SINCE => Gating::FromStart,
        CaptureMode::Precopy => Gating::AfterMost,
        CaptureMode::Live | CaptureMode::Stop => Gating::Open,
    };
    let service = live.then(|| plan.service.clone());
    let (capture, theirs) =
        Capture::start(&plan.name, plan.ram_path.clone(), plan.memory_bytes, gating, service)
            .map_err(|error| capture_error(&error))?;
    if let (true, Some(keeper)) = (live, keeper) {
        keeper.keep(capture.stream()).map_err(|error| {
            ApiError::new(
                ErrorKind::Io,
                format!("machine {}: its capture cannot be kept: {error}", plan.name),
            )
        })?;
    }
    let capture = prepared.capture.insert(capture);
    monitor.send_fd(theirs.as_fd(), CAPTURE_FD, COMMAND_LIMIT).map_err(failed)?;
    drop(theirs);
    if live {
        collapse(plan, turns.count());
    }
    drop(turn);
    if live
        && gating == Gating::Open
        && let Err(error) = memory::touch(plan.service.process, plan.memory_bytes)
    {
        // QEMU does it, within the pause.
        tracing::debug!(machine = plan.name, %error, "memory is not mapped beforehand");
    }
    if gating != Gating::Open {
        let arguments = json!({"uri": format!("fd:{CAPTURE_FD}")});
        let begun = monitor.execute("migrate", arguments, COMMAND_LIMIT);
        // Without an answer it may have begun.
        prepared.migrating = !matches!(begun, Err(QmpError::Command { .. }));
        if live && prepared.migrating {
            capture.must_be_read_out();
        }
        begun.map_err(failed)?;
        match gating {
            Gating::FromStart => wait_until_it_waits(plan.service.process.pid),
            Gating::AfterMost | Gating::Open => {
                let limit = precopy_bound(plan.memory_bytes);
                if !capture.wait_for_gate(limit) {
                    return Err(ApiError::new(
                        ErrorKind::Machine,
                        format!("machine {}: most of its memory did not come within {limit:?}", plan.name),
                    )
                    .hint("QEMU may hang: `diorama status` shows whether it answers. The machines run on"));
                }
            }
        }
    }
    Ok(monitor)
}

fn prepare_disk(
    plan: &Plan,
    disk: &DiskRecord,
    prepared: &mut Prepared,
    monitor: &mut Client,
) -> Result<(), ApiError> {
    let Some(active) = disk.layers.last() else { return Ok(()) };
    // What is dirty now need not be written while the machine stands still.
    std::fs::File::open(&active.file)
        .and_then(|file| file.sync_data())
        .map_err(|error| io_error(&active.file, &error))?;
    let node = active.node + 1;
    let overlay = new_layer(&plan.overlay_folder, &disk.name, node, disk.virtual_bytes)?;
    let layer = DiskLayer { path: overlay.file.clone(), format: DiskFormat::Qcow2 };
    prepared.overlays.push(overlay);
    let arguments = blockdev(&disk.name, node, &layer, false, None)
        .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?;
    monitor
        .execute("blockdev-add", arguments, COMMAND_LIMIT)
        .map_err(|error| qmp_error(&plan.name, &error))?;
    Ok(())
}

/// Puts the machine's memory into huge pages, which takes most of the pause away; where that cannot be, the pause is
/// longer, and nothing worse.
fn collapse(plan: &Plan, threads: usize) {
    if !plan.collapse {
        tracing::debug!(machine = plan.name, "too little memory is free for huge pages");
        return;
    }
    // Whoever waits for a processor with a huge page half done has the machine's page faults wait, too.
    schedule_this_thread(HURRIED, "it has a guest's page faults wait");
    let mut breaks = Breaks::new(COLLAPSE_SHARE, threads);
    let collapsed = memory::collapse(plan.service.process, plan.memory_bytes, || breaks.take());
    schedule_this_thread(Policy::Normal { nice: 0 }, "preparing");
    if let Err(error) = collapsed {
        tracing::debug!(machine = plan.name, %error, "memory stays in small pages");
    }
}

/// Waits until QEMU has read all memory once and waits for its reader: its capture thread sleeps then. Nothing tells
/// when that is, so it is looked at; a wrong answer costs pause, not correctness.
fn wait_until_it_waits(pid: u32) {
    let deadline = Instant::now() + READ_BOUND;
    let mut asleep = 0;
    while asleep < 2 && Instant::now() < deadline {
        std::thread::sleep(READ_POLL);
        match capture_thread_sleeps(pid) {
            Some(true) => asleep += 1,
            Some(false) => asleep = 0,
            // Not started yet.
            None => {}
        }
    }
}

fn capture_thread_sleeps(pid: u32) -> Option<bool> {
    thread_sleeps(pid, *threads_named(pid, CAPTURE_THREAD).first()?)
}

/// A capture's failure, as the user reads it.
pub(super) fn capture_error(error: &CaptureError) -> ApiError {
    if error.is_no_space() {
        return no_space(format!("{error}; the memory does not fit"));
    }
    match error {
        CaptureError::RamFile { path, source } => io_error(path, source),
        _ => ApiError::new(ErrorKind::Machine, error.to_string())
            .hint("QEMU may have died: `diorama status` shows it. The other machines run on"),
    }
}

fn unprepared(machine: &str) -> ApiError {
    ApiError::new(ErrorKind::Internal, format!("machine {machine} was not prepared"))
}

impl Agent {
    /// Stops a migration that nobody wants any more, and waits until it has ended. The machine's monitor may be gone with
    /// the machine.
    pub(super) fn end_migration(&self, slot: &Slot, machine: &str) {
        if let Some(monitor) = slot.state().machine(machine).and_then(|machine| machine.monitor.as_mut())
            && let Err(error) = monitor.execute("migrate_cancel", Value::Null, COMMAND_LIMIT)
        {
            tracing::info!(machine, %error, "cancelling a capture");
        }
        let deadline = Instant::now() + COMMAND_LIMIT;
        while Instant::now() < deadline {
            let mut state = slot.state();
            let monitor = state.machine(machine).and_then(|machine| machine.monitor.as_mut());
            if !monitor.is_some_and(|monitor| migration_runs(monitor).unwrap_or(false)) {
                return;
            }
            drop(state);
            std::thread::sleep(MIGRATION_POLL);
        }
        tracing::error!(machine, "a cancelled capture does not end");
    }
}
