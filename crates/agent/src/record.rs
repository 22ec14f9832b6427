//! What the agent remembers of an environment on disk, so that the next agent can take it back.
//!
//! One JSON file an environment, `environments/NAME/environment.json`, replaced atomically. It is written before
//! anything that depends on it is begun: a reader may find that less has happened than the record says, never more.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use diorama_api::{ApiError, ErrorKind};
use diorama_cluster::directory::FencingToken;
use diorama_qemu::command_line::DiskFormat;
use diorama_qemu::process::ProcessId;
use diorama_store::SnapshotId;
use diorama_topology::Environment;
use serde::{Deserialize, Serialize};

use crate::problem::io_error;

const FILE: &str = "environment.json";

/// An environment as the agent remembers it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) specification: Environment,
    pub(crate) phase: Phase,
    /// Counts the sets of QEMU processes that this environment has had; folders and sockets are named by it.
    pub(crate) generation: u32,
    /// At least as high as any colour that was ever used.
    pub(crate) epoch: u32,
    /// Where the environment is in the tree of snapshots.
    pub(crate) snapshot: Option<SnapshotId>,
    pub(crate) started: Option<String>,
    /// In the order of the specification; empty when down.
    pub(crate) machines: Vec<MachineRecord>,
    /// Processes that these replaced and that may not be gone yet.
    #[serde(default)]
    pub(crate) retiring: Vec<ProcessRecord>,
    /// By machine.
    pub(crate) disks: BTreeMap<String, Vec<DiskRecord>>,
    /// How the environment is spread, when this host has a part of it: the specification is of that part.
    #[serde(default)]
    pub(crate) span: Option<SpanRecord>,
    /// The cut that this host has reported and whose outcome it does not know.
    #[serde(default)]
    pub(crate) doubt: Option<Doubt>,
}

/// How an environment is spread over hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SpanRecord {
    /// Random; another one each time the machines are launched. Names the tunnels' sessions.
    pub(crate) id: u64,
    /// The whole environment.
    pub(crate) whole: Environment,
    /// By their numbers as participants of cuts.
    pub(crate) hosts: Vec<SpanHost>,
    /// This host's number.
    pub(crate) me: u32,
    /// The networks' numbers on the wire, in the order of the specification.
    pub(crate) vnis: Vec<u32>,
    /// Of the lock under which it was launched.
    pub(crate) token: FencingToken,
}

/// One host of an environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SpanHost {
    /// As the cluster knows it.
    pub(crate) name: String,
    /// Where its tunnels end.
    pub(crate) tunnel: SocketAddr,
    /// Its machines.
    pub(crate) machines: Vec<String>,
}

/// A cut in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Doubt {
    pub(crate) attempt: [u8; 16],
    pub(crate) epoch: u32,
    /// The number of the host that knows, or can find out.
    pub(crate) initiator: u32,
}

/// Whether machines run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Its machines' processes exist, unless they died.
    Up,
    /// Only its disks exist.
    Down,
}

/// One machine's process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct MachineRecord {
    pub(crate) process: ProcessRecord,
    pub(crate) hardware: HardwareRecord,
    pub(crate) boot: BootRecord,
    /// Why it stands still, if it does so on purpose.
    pub(crate) rest: Option<Rest>,
}

/// A process for all time on this boot of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    pub(crate) pid: u32,
    pub(crate) start_time_ticks: u64,
}

/// The virtual hardware; a snapshot restores on no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HardwareRecord {
    pub(crate) machine_type: String,
    pub(crate) cpu_model: String,
    pub(crate) accelerator: AcceleratorRecord,
    pub(crate) vcpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) tb_size_mib: u32,
}

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AcceleratorRecord {
    Kvm,
    Tcg,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum BootRecord {
    Kernel { kernel: PathBuf, initrd: Option<PathBuf>, cmdline: String },
    Disk,
}

/// Why a machine stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rest {
    /// `diorama pause`.
    Paused,
    /// The guest powered itself off.
    Shutdown,
}

/// One disk: a base that is never written, and overlays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskRecord {
    pub(crate) name: String,
    pub(crate) virtual_bytes: u64,
    pub(crate) base: Option<BaseRecord>,
    /// The lowest first; the last one is written to.
    pub(crate) layers: Vec<LayerRecord>,
}

/// An image of the user's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseRecord {
    pub(crate) path: PathBuf,
    pub(crate) format: FormatRecord,
}

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FormatRecord {
    Raw,
    Qcow2,
}

/// An overlay of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) file: PathBuf,
    /// The number in QEMU's node name.
    pub(crate) node: usize,
}

impl Record {
    /// Reads an environment's folder; `None` when there is no record in it.
    pub(crate) fn load(folder: &Path) -> Result<Option<Self>, ApiError> {
        let file = folder.join(FILE);
        let text = match std::fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(&file, &error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            ApiError::new(ErrorKind::Corrupt, format!("{}: {error}", file.display()))
                .hint("the environment's record is damaged; its machines must be stopped by hand")
        })
    }

    /// Replaces the record.
    pub(crate) fn save(&self, folder: &Path) -> Result<(), ApiError> {
        let file = folder.join(FILE);
        let new = folder.join("environment.json.new");
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?;
        let write = || {
            let mut out = std::fs::File::create(&new)?;
            out.write_all(&text)?;
            out.sync_data()?;
            std::fs::rename(&new, &file)
        };
        write().map_err(|error| io_error(&file, &error))
    }
}

impl From<ProcessId> for ProcessRecord {
    fn from(id: ProcessId) -> Self {
        Self { pid: id.pid, start_time_ticks: id.start_time_ticks }
    }
}

impl From<ProcessRecord> for ProcessId {
    fn from(record: ProcessRecord) -> Self {
        Self { pid: record.pid, start_time_ticks: record.start_time_ticks }
    }
}

impl From<FormatRecord> for DiskFormat {
    fn from(format: FormatRecord) -> Self {
        match format {
            FormatRecord::Raw => DiskFormat::Raw,
            FormatRecord::Qcow2 => DiskFormat::Qcow2,
        }
    }
}

impl From<DiskFormat> for FormatRecord {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Raw => FormatRecord::Raw,
            DiskFormat::Qcow2 => FormatRecord::Qcow2,
        }
    }
}

impl AcceleratorRecord {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl Record {
    /// The processes of its machines.
    pub(crate) fn processes(&self) -> Vec<ProcessRecord> {
        self.machines.iter().map(|machine| machine.process).collect()
    }
}
