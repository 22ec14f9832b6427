//! From nothing to machines that stand ready: processes started, state loaded, ports connected and held.
//!
//! Used by `up`, `restore` and `fork` alike. Nothing runs yet when it returns, so that all machines can be continued
//! together, and no frame is lost between a machine's first and its port's connection.
//!
//! Invariant: until [`Launched::keep`], dropping what was launched kills every process and removes every socket.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diorama_api::{ApiError, ErrorKind};
use diorama_qemu::capability::Qemu;
use diorama_qemu::command_line::{self, BootSource, Listener, MachineConfig, NicConfig, RamSource, Sockets};
use diorama_qemu::migration::postcopy::Opening;
use diorama_qemu::nic::{self, NicError};
use diorama_qemu::process::{self, Policy, ProcessId, Spawned};
use diorama_qemu::qmp::{Client, QmpError};
use diorama_qemu::time_stamp_counter;
use diorama_switch::{Epoch, NetworkConfig, NetworkId, PortId, Switch};
use diorama_topology::Environment;
use serde_json::{Value, json};

use crate::Agent;
use crate::dataplane::{Segment, VCPU_NICE};
use crate::disks;
use crate::lazy::{Load, Loading};
use crate::operation::Operation;
use crate::priority::schedule_threads;
use crate::problem::{io_error, qmp_error};
use crate::record::{AcceleratorRecord, BootRecord, DiskRecord, HardwareRecord, ProcessRecord};
use crate::slot::{Running, RunningMachine};
use crate::span::Joining;

/// How long QEMU may take until its monitor answers, and to load a machine's state.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a monitor command may take.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How often QEMU is asked whether it has loaded a machine's devices.
const LOADED_POLL: Duration = Duration::from_millis(1);
/// How long a killed process may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// One set of processes for an environment.
pub(crate) struct LaunchPlan<'a> {
    pub(crate) specification: &'a Environment,
    /// In the order of the specification.
    pub(crate) machines: Vec<MachinePlan>,
    /// What the ports begin with.
    pub(crate) epoch: Epoch,
    /// Where sockets go.
    pub(crate) runtime_folder: PathBuf,
    /// Where QEMU's own messages go.
    pub(crate) log_folder: PathBuf,
    /// Where consoles are logged.
    pub(crate) console_folder: PathBuf,
    /// The other hosts, when this is a part.
    pub(crate) joining: Option<Joining<'a>>,
}

/// One machine of the plan.
pub(crate) struct MachinePlan {
    pub(crate) hardware: HardwareRecord,
    pub(crate) boot: BootRecord,
    pub(crate) disks: Vec<DiskRecord>,
    /// Where its memory and devices come from; nowhere for a machine that boots.
    pub(crate) from: Option<Saved>,
}

/// A machine's saved state.
pub(crate) enum Saved {
    /// The memory to map, and the device state to load.
    Mapped { ram: PathBuf, state: Vec<u8> },
    /// The devices' state to load, and who sends the memory: of which machine.
    Lazy { load: Arc<Load>, machine: usize, opening: Opening },
}

/// Machines that stand ready.
#[derive(Debug)]
pub(crate) struct Launched<'a> {
    agent: &'a Agent,
    runtime_folder: PathBuf,
    running: Option<Running>,
    pub(crate) processes: Vec<ProcessRecord>,
}

/// The sockets of a machine's process, by its place in the specification.
pub(crate) struct SocketPaths {
    pub(crate) monitor: PathBuf,
    pub(crate) cut_monitor: PathBuf,
    pub(crate) pivot_monitor: PathBuf,
    pub(crate) console: PathBuf,
    pub(crate) guest_agent: PathBuf,
}

impl SocketPaths {
    pub(crate) fn new(folder: &Path, machine: usize) -> Self {
        let path = |what: &str| folder.join(format!("m{machine}.{what}"));
        Self {
            monitor: path("qmp"),
            cut_monitor: path("cut"),
            pivot_monitor: path("pivot"),
            console: path("console"),
            guest_agent: path("agent"),
        }
    }
}

/// The socket of one NIC.
pub(crate) fn nic_socket(folder: &Path, machine: usize, nic: usize) -> PathBuf {
    folder.join(format!("m{machine}.net{nic}"))
}

/// The file that a machine's console is logged to.
pub(crate) fn console_log(folder: &Path, machine: &str) -> PathBuf {
    folder.join(format!("{machine}.log"))
}

/// The switch of an environment: networks and ports in the order of the specification.
pub(crate) fn build_switch(
    specification: &Environment,
    epoch: Epoch,
) -> (Switch, Vec<NetworkId>, Vec<Vec<PortId>>) {
    let mut switch = Switch::new(epoch);
    let networks: Vec<NetworkId> = specification
        .networks
        .iter()
        .map(|network| {
            let mut config = NetworkConfig::new(network.mtu, random_u64());
            config.queue_bytes = usize::try_from(network.queue_bytes).unwrap_or(usize::MAX);
            switch.add_network(config)
        })
        .collect();
    let ports = specification
        .machines
        .iter()
        .map(|machine| {
            let port = |nic: &diorama_topology::Nic| {
                let index = specification.networks.iter().position(|network| network.name == nic.network);
                switch.add_port(networks[index.expect("a valid specification names its networks")])
            };
            machine.nics.iter().map(port).collect()
        })
        .collect();
    (switch, networks, ports)
}

/// The vCPU threads of a machine, put behind everything that carries frames.
pub(crate) fn find_vcpu_threads(monitor: &mut Client) -> Result<Vec<u32>, QmpError> {
    let answer = monitor.execute("query-cpus-fast", Value::Null, COMMAND_LIMIT)?;
    let threads: Vec<u32> = answer
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|cpu| u32::try_from(cpu["thread-id"].as_u64()?).ok())
        .collect();
    schedule_threads(&threads, Policy::Normal { nice: VCPU_NICE });
    Ok(threads)
}

impl Agent {
    /// Launches every machine of the plan, at once.
    pub(crate) fn launch(
        &self,
        mut plan: LaunchPlan<'_>,
        operation: &Operation,
    ) -> Result<Launched<'_>, ApiError> {
        let qemu = self.hardware.qemu()?;
        // Restored machines have theirs in the cache.
        let machines = plan.specification.machines.iter().zip(&plan.machines);
        let new = machines.filter(|(_, machine)| machine.from.is_none());
        let new_bytes = new.map(|(machine, _)| machine.memory_bytes).sum();
        self.cache.yield_memory(new_bytes, || self.slots.snapshots_in_use());
        for folder in [&plan.runtime_folder, &plan.log_folder, &plan.console_folder] {
            std::fs::create_dir_all(folder).map_err(|error| io_error(folder, &error))?;
        }
        let (switch, networks, ports) = build_switch(plan.specification, plan.epoch);
        let macs =
            plan.specification.machines.iter().flat_map(|machine| &machine.nics).map(|nic| nic.mac.bytes());
        let all_ports: Vec<(PortId, [u8; 6])> = ports.iter().flatten().copied().zip(macs).collect();
        let held: Vec<PortId> = all_ports.iter().map(|(port, _)| *port).collect();
        let segment_networks = networks.clone();
        let segment = self.plane.call(move |plane| {
            plane.attach(|id| {
                let mut segment = Segment::new(id, switch, segment_networks, all_ports);
                segment.hold(&held);
                segment
            })
        });
        // From here on, dropping this undoes everything.
        let mut launched = Launched {
            agent: self,
            runtime_folder: plan.runtime_folder.clone(),
            running: Some(Running { segment, networks, peers: Vec::new(), part: None, machines: Vec::new() }),
            processes: Vec::new(),
        };
        if let Some(joining) = plan.joining {
            let running = launched.running();
            let (peers, part) = self.join_hosts(segment, &running.networks, joining)?;
            running.peers = peers;
            running.part = Some(part);
        }
        let machines = std::mem::take(&mut plan.machines);
        let results: Vec<Result<Started, ApiError>> = std::thread::scope(|scope| {
            let plan = &plan;
            let qemu = &qemu;
            let starts: Vec<_> = machines
                .into_iter()
                .enumerate()
                .map(|(index, machine)| scope.spawn(move || start(qemu, plan, index, machine, operation)))
                .collect();
            starts.into_iter().map(|start| start.join().expect("starting does not panic")).collect()
        });
        let mut failure = None;
        for (result, ports) in results.into_iter().zip(ports) {
            match result {
                Ok(started) => launched.add(started, ports).unwrap_or_else(|error| {
                    failure.get_or_insert(error);
                }),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(launched),
        }
    }
}

impl Launched<'_> {
    /// What runs, while it is not kept yet.
    pub(crate) fn running(&mut self) -> &mut Running {
        self.running.as_mut().expect("present until it is kept")
    }

    /// Hands the machines over: from now on they are the environment's.
    pub(crate) fn keep(mut self) -> Running {
        self.running.take().expect("kept once")
    }

    fn add(&mut self, started: Started, ports: Vec<PortId>) -> Result<(), ApiError> {
        let segment = self.running().segment;
        self.processes.push(started.spawned.id().into());
        let name = started.name.clone();
        self.running().machines.push(RunningMachine {
            name: started.name,
            monitor: Some(started.monitor),
            ports: ports.clone(),
            vcpu_threads: started.vcpu_threads,
            guest: Arc::default(),
            spawned: Some(started.spawned),
            given_up: None,
            loading: started.loading,
        });
        for (port, stream) in ports.into_iter().zip(started.nics) {
            self.agent.plane.call(move |plane| plane.connect(segment, port, stream, false)).map_err(
                |error| machine_error(&name, format!("its network port cannot be connected: {error}")),
            )?;
        }
        Ok(())
    }
}

impl Drop for Launched<'_> {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.agent.stop_machines(running, &self.processes, &self.runtime_folder);
        }
    }
}

/// Machines that have been told to go.
pub(crate) struct Stopping {
    machines: Vec<RunningMachine>,
    processes: Vec<ProcessRecord>,
    sockets: PathBuf,
    /// How many were still alive.
    pub(crate) alive: u32,
}

impl Agent {
    /// Kills an environment's processes and removes its sockets. Returns how many were still alive.
    pub(crate) fn stop_machines(&self, running: Running, processes: &[ProcessRecord], sockets: &Path) -> u32 {
        let stopping = self.begin_stopping(running, processes, sockets);
        let alive = stopping.alive;
        stopping.finish();
        alive
    }

    /// Takes an environment's machines off the network and kills them, without waiting until they are gone.
    pub(crate) fn begin_stopping(
        &self,
        running: Running,
        processes: &[ProcessRecord],
        sockets: &Path,
    ) -> Stopping {
        let segment = running.segment;
        self.sessions.remove(segment);
        self.plane.call(move |plane| plane.detach(segment));
        let mut alive = 0;
        for process in processes {
            let id = ProcessId::from(*process);
            alive += u32::from(id.is_alive().unwrap_or(false));
            if let Err(error) = id.kill() {
                tracing::error!(pid = id.pid, %error, "a machine's process cannot be killed");
            }
        }
        Stopping {
            machines: running.machines,
            processes: processes.to_vec(),
            sockets: sockets.to_owned(),
            alive,
        }
    }
}

impl Stopping {
    /// Waits until the processes are gone, and removes their sockets.
    pub(crate) fn finish(self) {
        let deadline = Instant::now() + KILL_LIMIT;
        for mut machine in self.machines {
            if let Some(spawned) = &mut machine.spawned
                && let Err(error) = spawned.kill(deadline)
            {
                tracing::error!(machine = machine.name, %error, "a machine's process cannot be killed");
            }
        }
        for process in self.processes {
            if let Err(error) = ProcessId::from(process).wait_gone(deadline) {
                tracing::error!(%error, "a machine's process does not go");
            }
        }
        crate::up::remove_tree(&self.sockets);
    }
}

/// One started machine.
struct Started {
    name: String,
    spawned: Spawned,
    monitor: Client,
    vcpu_threads: Vec<u32>,
    nics: Vec<UnixStream>,
    loading: Option<Loading>,
}

/// Kills the process unless it is disarmed.
struct KillOnDrop(Option<Spawned>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(spawned) = &mut self.0
            && let Err(error) = spawned.kill(Instant::now() + KILL_LIMIT)
        {
            tracing::error!(%error, "a machine that did not start cannot be killed");
        }
    }
}

fn start(
    qemu: &Qemu,
    plan: &LaunchPlan<'_>,
    index: usize,
    machine: MachinePlan,
    operation: &Operation,
) -> Result<Started, ApiError> {
    let specification = &plan.specification.machines[index];
    let name = specification.name.to_string();
    let paths = SocketPaths::new(&plan.runtime_folder, index);
    let mut fds = Vec::new();
    let mut listener = |path: &Path| -> Result<Listener, ApiError> {
        let socket = OwnedFd::from(UnixListener::bind(path).map_err(|error| io_error(path, &error))?);
        let listener = Listener::Fd(socket.as_raw_fd());
        fds.push(socket);
        Ok(listener)
    };
    let sockets = Sockets {
        qmp: listener(&paths.monitor)?,
        qmp_cut: listener(&paths.cut_monitor)?,
        qmp_pivot: listener(&paths.pivot_monitor)?,
        serial: listener(&paths.console)?,
        serial_log: console_log(&plan.console_folder, &name),
        guest_agent: listener(&paths.guest_agent)?,
    };
    let nics: Vec<NicConfig> = specification
        .nics
        .iter()
        .enumerate()
        .map(|(nic, spec)| NicConfig {
            mac: spec.mac.bytes(),
            mtu: plan.specification.network(spec.network.as_str()).map_or(1500, |network| network.mtu),
            socket: nic_socket(&plan.runtime_folder, index, nic),
        })
        .collect();
    let nic_sockets: Vec<PathBuf> = nics.iter().map(|nic| nic.socket.clone()).collect();
    let saved = machine.from;
    // Not what is stored: where the machine is restored, the frequency may be another, and is read when it boots again.
    let command_line = |cmdline: String| match machine.hardware.accelerator {
        AcceleratorRecord::Kvm => cmdline,
        AcceleratorRecord::Tcg => time_stamp_counter::with_frequency(&cmdline),
    };
    let config = MachineConfig {
        name: format!("{}/{name}", plan.specification.name),
        machine_type: machine.hardware.machine_type,
        cpu_model: machine.hardware.cpu_model,
        accelerator: match machine.hardware.accelerator {
            AcceleratorRecord::Kvm => diorama_qemu::capability::Accelerator::Kvm,
            AcceleratorRecord::Tcg => diorama_qemu::capability::Accelerator::Tcg,
        },
        vcpus: machine.hardware.vcpus,
        memory_bytes: machine.hardware.memory_bytes,
        boot: match machine.boot {
            BootRecord::Kernel { kernel, initrd, cmdline } => {
                BootSource::Kernel { kernel, initrd, cmdline: command_line(cmdline) }
            }
            BootRecord::Disk => BootSource::Disk,
        },
        nics,
        disks: machine.disks.iter().map(disks::config).collect(),
        ram: match &saved {
            Some(Saved::Mapped { ram, .. }) => RamSource::File { path: ram.clone() },
            Some(Saved::Lazy { .. }) | None => RamSource::Anonymous,
        },
        sockets,
        incoming: saved.is_some(),
        sandbox: qemu.sandbox,
        tb_size_mib: machine.hardware.tb_size_mib,
        // Another one each time a machine is launched: a guest that was forked or rolled back reseeds its random numbers.
        vmgenid: Some(random_bytes()),
    };
    let arguments =
        command_line::arguments(&config).map_err(|error| machine_error(&name, error.to_string()))?;
    operation.check()?;
    let log = plan.log_folder.join(format!("{name}.qemu.log"));
    let spawned = process::spawn(&qemu.binary, &arguments, &log, fds)
        .map_err(|error| machine_error(&name, error.to_string()))?;
    let mut spawned = KillOnDrop(Some(spawned));
    let deadline = Instant::now() + START_LIMIT;
    let connected = || -> Result<(Client, Vec<u32>, Option<Loading>), QmpError> {
        let mut monitor = Client::connect(&paths.monitor, deadline)?;
        let loading = match saved {
            Some(Saved::Mapped { state, .. }) => {
                load(&mut monitor, state, deadline)?;
                None
            }
            Some(Saved::Lazy { load, machine, opening }) => {
                Some(load_devices(&mut monitor, &load, machine, &opening, deadline)?)
            }
            None => None,
        };
        let threads = find_vcpu_threads(&mut monitor)?;
        Ok((monitor, threads, loading))
    };
    let (mut monitor, vcpu_threads, loading) =
        connected().map_err(|error| explain(&name, &error, spawned.0.as_mut()))?;
    let nics = nic::connect(&nic_sockets, &mut monitor, deadline).map_err(|error| match error {
        NicError::Socket { path, source } => io_error(&path, &source),
        NicError::Monitor(error) => explain(&name, &error, spawned.0.as_mut()),
    })?;
    let spawned = spawned.0.take().expect("armed until here");
    Ok(Started { name, spawned, monitor, vcpu_threads, nics, loading })
}

/// A monitor's failure; when QEMU has died, in QEMU's own last words.
pub(crate) fn explain(name: &str, error: &QmpError, spawned: Option<&mut Spawned>) -> ApiError {
    match (error, spawned) {
        (QmpError::Disconnected { .. }, Some(spawned)) => {
            machine_error(name, spawned.explain_end(Instant::now() + KILL_LIMIT).to_string())
        }
        _ => qmp_error(name, error),
    }
}

/// Feeds a machine its device state and waits until it is loaded.
fn load(monitor: &mut Client, state: Vec<u8>, deadline: Instant) -> Result<(), QmpError> {
    let io = |source| QmpError::Socket { during: "loading the device state".to_owned(), source };
    monitor.execute(
        "migrate-set-capabilities",
        json!({"capabilities": [{"capability": "events", "state": true}]}),
        COMMAND_LIMIT,
    )?;
    let (reader, writer) = nix::unistd::pipe().map_err(|error| io(error.into()))?;
    monitor.send_fd(reader.as_fd(), "state", COMMAND_LIMIT)?;
    drop(reader);
    std::thread::scope(|scope| {
        let feeder = scope.spawn(move || {
            use std::io::Write;
            std::fs::File::from(writer).write_all(&state)
        });
        let loaded = monitor
            .execute("migrate-incoming", json!({"uri": "fd:state"}), COMMAND_LIMIT)
            .and_then(|_| wait_loaded(monitor, deadline));
        // A QEMU that refuses the state closes the pipe; its own words, if any, say more.
        let fed = feeder.join().expect("writing does not panic");
        loaded.and_then(|()| fed.map_err(io))
    })
}

/// Feeds a machine its devices' state, and waits until it stands ready: its memory comes as it is wanted.
fn load_devices(
    monitor: &mut Client,
    load: &Arc<Load>,
    machine: usize,
    opening: &Opening,
    deadline: Instant,
) -> Result<Loading, QmpError> {
    let io = |source| QmpError::Socket { during: "loading the device state".to_owned(), source };
    let capabilities = json!({"capabilities": [
        {"capability": "events", "state": true},
        {"capability": "postcopy-ram", "state": true},
    ]});
    monitor.execute("migrate-set-capabilities", capabilities, COMMAND_LIMIT)?;
    let (ours, theirs) = UnixStream::pair().map_err(io)?;
    monitor.send_fd(theirs.as_fd(), "state", COMMAND_LIMIT)?;
    drop(theirs);
    monitor.execute("migrate-incoming", json!({"uri": "fd:state"}), COMMAND_LIMIT)?;
    let added = load.add(machine, opening, ours).and_then(|loading| match loading.wait_ready(deadline) {
        true => Ok(loading),
        false => Err(std::io::ErrorKind::TimedOut.into()),
    });
    let loading = match added {
        Ok(loading) => loading,
        Err(error) => {
            // A QEMU that refuses the state ends, and its own words say why.
            let left = deadline.saturating_duration_since(Instant::now());
            monitor.execute("query-status", Value::Null, left.max(LOADED_POLL))?;
            return Err(io(error));
        }
    };
    // The devices are loaded; what is left is QEMU's next turn of its main loop.
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let status = monitor.execute("query-status", Value::Null, left.max(LOADED_POLL))?;
        if status["status"] != "inmigrate" {
            return Ok(loading);
        }
        std::thread::sleep(LOADED_POLL);
    }
}

fn wait_loaded(monitor: &mut Client, deadline: Instant) -> Result<(), QmpError> {
    loop {
        let event = monitor.wait_event(&["MIGRATION"], deadline)?;
        match event.data["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => {
                return Err(QmpError::Command {
                    command: "migrate-incoming".to_owned(),
                    class: "GenericError".to_owned(),
                    desc: "QEMU could not load the machine's state".to_owned(),
                });
            }
            _ => {}
        }
    }
}

fn machine_error(name: &str, message: String) -> ApiError {
    ApiError::new(ErrorKind::Machine, format!("machine {name}: {message}")).hint(
        "`diorama doctor` checks QEMU; the environment file names the machine's image, memory and disks",
    )
}

fn random_u64() -> u64 {
    u64::from_ne_bytes(random_bytes())
}

/// Random bytes of the kernel.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: the pointer and the length are of one array.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Up to 256 bytes come whole once the kernel's generator is ready, as it is long before any agent runs.
    assert_eq!(usize::try_from(filled), Ok(N), "the kernel has no random numbers");
    bytes
}
