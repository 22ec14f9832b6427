//! Environments: starting, stopping, looking at them, and working inside their machines.

use std::collections::BTreeMap;

use diorama_topology::{Environment, EnvironmentName};
use serde::{Deserialize, Serialize};

/// An answer with nothing in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Start an environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UpRequest {
    /// What to run: validated by the client, and once more by the agent.
    pub specification: Environment,
}

/// Stop an environment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownRequest {
    /// Remove its disks too.
    #[serde(default)]
    pub volumes: bool,
}

/// What stopping did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownReport {
    /// The environment.
    pub environment: EnvironmentName,
    /// How many machines were stopped.
    pub machines_stopped: u32,
    /// The disks that were kept, as `machine/disk`.
    pub disks_kept: Vec<String>,
    /// The disks that were removed, as `machine/disk`.
    pub disks_removed: Vec<String>,
}

/// Some machines of an environment; none named means all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachinesRequest {
    /// Machine names.
    #[serde(default)]
    pub machines: Vec<String>,
}

/// Whether an environment runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnvironmentState {
    /// Machines are being started.
    Starting,
    /// Every machine that should run does.
    Up,
    /// At least one machine's process has died.
    Degraded,
    /// Not running; its disks are kept.
    Down,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// Being started or restored.
    Starting,
    /// Its virtual CPUs run.
    Running,
    /// Stopped by `diorama pause`.
    Paused,
    /// The guest has powered itself off; its memory is still there.
    Shutdown,
    /// The guest crashed (panic device or internal error).
    Crashed,
    /// The QEMU process is gone.
    Dead,
    /// Its host is gone, or does not answer.
    Lost,
}

/// Everything known of one environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnvironmentStatus {
    /// Its name.
    pub name: EnvironmentName,
    /// Whether it runs.
    pub state: EnvironmentState,
    /// The epoch: how many cuts it has passed.
    pub epoch: u32,
    /// The snapshot it was last taken to or from, as a hexadecimal id.
    pub snapshot: Option<String>,
    /// When it was started, restored or forked (RFC 3339).
    pub started: Option<String>,
    /// What operation holds it now, if any.
    pub operation: Option<String>,
    /// Its machines, in the order of the file.
    pub machines: Vec<MachineStatus>,
    /// Its networks, in the order of the file.
    pub networks: Vec<NetworkStatus>,
    /// The hosts that run it.
    pub hosts: Vec<String>,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Its name.
    pub name: String,
    /// The host that runs it.
    pub host: String,
    /// What it does.
    pub state: MachineState,
    /// Why it is dead or crashed, when it is.
    pub reason: Option<String>,
    /// The QEMU process.
    pub pid: Option<u32>,
    /// Virtual CPUs, as started (may be more than asked for; see `doctor`).
    pub vcpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Its network interfaces.
    pub nics: Vec<NicStatus>,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// How much of its memory is there, while it is still being loaded; null otherwise.
    #[serde(default)]
    pub loading: Option<MachineLoading>,
}

/// A machine that runs while its memory is being loaded (`restore --lazy`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineLoading {
    /// What is there; pages of zeros do not count.
    pub loaded_bytes: u64,
    /// What there is.
    pub total_bytes: u64,
    /// What the load waits for, when the store does not give what it is asked for.
    pub waits_for: Option<String>,
}

/// One network interface and its port's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// The network it attaches to.
    pub network: String,
    /// Its hardware address.
    pub mac: String,
    /// The address handed to the guest.
    pub address: Option<String>,
    /// Whether the switch port is connected to QEMU.
    pub connected: bool,
    /// Frames and bytes from the machine.
    pub sent_frames: u64,
    /// Bytes from the machine.
    pub sent_bytes: u64,
    /// Frames to the machine.
    pub received_frames: u64,
    /// Bytes to the machine.
    pub received_bytes: u64,
    /// Bytes waiting to be read by QEMU.
    pub queued_bytes: u64,
    /// Frames not taken from the machine or not delivered to it, by reason; zero reasons are left out.
    pub dropped: BTreeMap<String, u64>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// What the guest sees.
    pub virtual_bytes: u64,
    /// How many overlays lie on its base.
    pub layers: u32,
}

/// One network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// Its name.
    pub name: String,
    /// The largest payload of a frame.
    pub mtu: u16,
    /// Copies of frames that the network owed its receivers.
    pub owed_frames: u64,
    /// Copies delivered.
    pub delivered_frames: u64,
    /// Copies waiting in queues.
    pub queued_frames: u64,
    /// Copies dropped by reason; zero reasons are left out.
    pub dropped: BTreeMap<String, u64>,
}

/// Run a command in a guest through its QEMU guest agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Standard input, base64; none closes it.
    #[serde(default)]
    pub stdin_base64: Option<String>,
    /// How long the guest's agent may take to answer at all, in milliseconds.
    #[serde(default)]
    pub agent_timeout_ms: Option<u64>,
}

/// What the command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecReport {
    /// Its exit status, when it exited.
    pub exit_code: Option<i32>,
    /// The signal that ended it, when one did.
    pub signal: Option<i32>,
    /// Standard output, base64.
    pub stdout_base64: String,
    /// Standard error, base64.
    pub stderr_base64: String,
    /// Whether the guest agent cut the output short (it keeps 16 MiB).
    pub truncated: bool,
}
