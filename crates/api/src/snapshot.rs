//! Snapshots: taking, looking at, proving, restoring and forking them.

use serde::{Deserialize, Serialize};

/// How memory is captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureMode {
    /// Milliseconds of pause; memory follows while the machine runs (needs userfaultfd).
    #[default]
    Live,
    /// Memory is copied before the cut until little is left; the machine stops for the rest.
    Precopy,
    /// The machine stands still while its memory is copied: the paper's way.
    Stop,
}

/// What becomes of frames in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InFlightPolicy {
    /// Recorded in the snapshot and delivered.
    #[default]
    Record,
    /// Dropped: the paper's way.
    Drop,
}

/// Take a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSnapshotRequest {
    /// Its name; chosen by the agent when absent.
    pub name: Option<String>,
    /// A note for people.
    pub message: Option<String>,
    /// How memory is captured; none lets the agent choose `live` and fall back to `precopy` with a warning.
    pub capture: Option<CaptureMode>,
    /// What becomes of frames in flight.
    #[serde(default)]
    pub in_flight: InFlightPolicy,
}

/// Everything known of a snapshot: `snapshot create --json` and `snapshot show --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The hash that names it.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The environment it was taken of.
    pub environment: String,
    /// The snapshot before it, if any.
    pub parent: Option<String>,
    /// When the cut was made (RFC 3339, UTC).
    pub created: String,
    /// Always `complete`: there is no other kind.
    pub state: String,
    /// A note for people.
    pub message: Option<String>,
    /// How memory was captured.
    pub capture: CaptureMode,
    /// What became of frames in flight.
    pub in_flight_policy: InFlightPolicy,
    /// The cut.
    pub cut: CutReport,
    /// Its machines.
    pub machines: Vec<MachineReport>,
    /// Frame accounting over all networks.
    pub frames: FramesReport,
    /// The same for each network.
    pub networks: Vec<NetworkReport>,
    /// What it takes.
    pub bytes: BytesReport,
    /// From the request until it was durable, in milliseconds.
    pub create_ms: u64,
    /// Who vouches for it.
    #[serde(default)]
    pub signature: SignatureReport,
}

/// Who vouches for a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignatureReport {
    /// Whether there is a signature.
    pub state: SignatureState,
    /// The signer's public key, in hexadecimal digits.
    pub key: Option<String>,
    /// Whether that is one of the agent's trusted keys; `null` where it has none.
    pub trusted: Option<bool>,
}

/// Whether there is a signature.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignatureState {
    /// There is none.
    #[default]
    None,
    /// There is one of exactly this snapshot.
    Valid,
    /// There is something that is none of this snapshot.
    Wrong,
}

/// When the machines were cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutReport {
    /// The environment's new epoch.
    pub epoch: u32,
    /// Latest minus earliest machine's cut instant.
    pub skew_us: u64,
    /// How many hosts took part.
    pub hosts: u32,
}

/// What the cut cost one machine, and what was captured of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineReport {
    /// Its name.
    pub name: String,
    /// The host that ran it.
    pub host: String,
    /// `running`, `paused` or `shutdown`: the state it was captured in.
    pub state: String,
    /// QEMU's STOP to RESUME, in microseconds; 0 for a machine that did not run.
    pub pause_us: u64,
    /// The time in which no frame could reach it, in microseconds.
    pub stall_us: u64,
    /// Whether QEMU did not read everything in time before the stop (a guest without a network driver, say).
    pub drain_incomplete: bool,
    /// Guest memory.
    pub ram_bytes: u64,
    /// Guest memory that is not zero.
    pub ram_used_bytes: u64,
    /// Its disks.
    pub disks: Vec<DiskReport>,
}

/// One captured disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// Its name.
    pub name: String,
    /// Bytes of its overlay files (the base is not counted).
    pub bytes: u64,
}

/// Frame conservation at the cut: copies per receiver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FramesReport {
    /// Copies that the network owed before the senders' cuts.
    pub sent_before: u64,
    /// Of those, delivered before the receivers' cuts.
    pub delivered_before: u64,
    /// Of those, in flight at the cut.
    pub in_flight: u64,
    /// Of those, dropped.
    pub dropped: DroppedReport,
    /// What is left; anything but 0 is a defect.
    pub unaccounted: i64,
}

/// Dropped copies by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedReport {
    /// The receiver's queue was full.
    pub queue_full: u64,
    /// Lost by link emulation.
    pub link_loss: u64,
    /// Lost between hosts.
    pub wire_loss: u64,
    /// Nobody to deliver to.
    pub no_receiver: u64,
    /// In flight at a cut taken with `--in-flight drop`.
    pub cut_drop: u64,
}

/// One network's accounting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// Its name.
    pub name: String,
    /// Its frames.
    pub frames: FramesReport,
}

/// What a snapshot takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesReport {
    /// All machines' memory and disks as the guests see them.
    pub logical: u64,
    /// Bytes that this snapshot added to the store.
    pub new: u64,
}

/// All snapshots, and where the environments are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotList {
    /// Complete snapshots, oldest first.
    pub snapshots: Vec<SnapshotSummary>,
    /// Snapshots whose manifest cannot be read.
    pub damaged: Vec<DamagedSnapshot>,
    /// Where each environment is in the tree.
    pub here: Vec<Here>,
}

/// A snapshot in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// The hash that names it.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The environment it was taken of.
    pub environment: String,
    /// The snapshot before it, if any (may have been deleted).
    pub parent: Option<String>,
    /// When (RFC 3339, UTC).
    pub created: String,
    /// A note for people.
    pub message: Option<String>,
    /// How many machines.
    pub machines: u32,
    /// Bytes in the store.
    pub stored_bytes: u64,
    /// Whether its memory is in the local cache, so that restore and fork are instant.
    pub cached: bool,
}

/// A snapshot that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedSnapshot {
    /// Its folder's name: the id it should have.
    pub id: String,
    /// What is wrong.
    pub problem: String,
}

/// "You are here": the snapshot that an environment comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Here {
    /// The environment.
    pub environment: String,
    /// The snapshot it was last taken to or from.
    pub snapshot: String,
}

/// What deleting did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveReport {
    /// The snapshot.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes given back.
    pub freed_bytes: u64,
}

/// Prove a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyRequest {
    /// Files of public keys, their texts: one of these keys must have signed it.
    #[serde(default)]
    pub signed_by: Vec<String>,
}

/// The proof of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The snapshot.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Bytes whose hash was computed.
    pub checked_bytes: u64,
    /// The accounting as checked.
    pub frames: FramesReport,
    /// Who vouches for it.
    #[serde(default)]
    pub signature: SignatureReport,
    /// What is wrong: which file, where, what.
    pub problems: Vec<VerifyProblem>,
}

/// One thing wrong with a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyProblem {
    /// The part of the snapshot: `manifest`, `ram/server`, `disks/server/root/0.qcow2`, …
    pub file: String,
    /// The first bad byte's position, where it is known.
    pub offset: Option<u64>,
    /// What is wrong.
    pub problem: String,
}

/// Two snapshots compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiffReport {
    /// The first.
    pub from: String,
    /// The second.
    pub to: String,
    /// Machines that both have.
    pub machines: Vec<MachineDiff>,
    /// Machines only in the first.
    pub only_from: Vec<String>,
    /// Machines only in the second.
    pub only_to: Vec<String>,
    /// Frames in flight in the first.
    pub in_flight_from: u64,
    /// Frames in flight in the second.
    pub in_flight_to: u64,
    /// Frames in flight in both: the same but for their times.
    #[serde(default)]
    pub in_flight_both: u64,
}

/// One machine in two snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDiff {
    /// Its name.
    pub name: String,
    /// 4 KiB pages of memory that differ.
    pub pages_changed: u64,
    /// Pages in all.
    pub pages: u64,
    /// Whether its devices' state differs.
    #[serde(default)]
    pub state_changed: bool,
    /// Bytes of disk layers that only the second has.
    pub disk_bytes_added: u64,
    /// Its disks, each as the guest sees it.
    #[serde(default)]
    pub disks: Vec<DiskDiff>,
}

/// One disk in two snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDiff {
    /// Its name.
    pub name: String,
    /// 64 KiB clusters that differ; null for a disk that only one of them has.
    pub clusters_changed: Option<u64>,
    /// Clusters in all, of the larger.
    pub clusters: u64,
}

/// Take an environment back to a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Name, id or unique beginning of an id.
    pub snapshot: String,
    /// Let machines run before their memory is there; null: where that wins.
    #[serde(default)]
    pub lazy: Option<bool>,
    /// How long the client has run before it sent this, in microseconds (for `ready_ms`).
    #[serde(default)]
    pub elapsed_us: u64,
}

/// What restoring did: `restore --json`, and each element of `fork --json`'s `environments`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The environment that runs now.
    pub environment: String,
    /// The snapshot it came from.
    pub snapshot: String,
    /// From the command's start until every machine ran.
    pub ready_ms: u64,
    /// Each machine.
    pub machines: Vec<MachineReady>,
    /// Frames in flight that were delivered again.
    pub in_flight_replayed: u64,
    /// Whether the machines run while their memory is still being loaded.
    #[serde(default)]
    pub lazy: bool,
}

/// When one machine ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineReady {
    /// Its name.
    pub name: String,
    /// From the command's start until it ran.
    pub ready_ms: u64,
}

/// Make new environments of a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkRequest {
    /// Name, id or unique beginning of an id.
    pub snapshot: String,
    /// Which environment the name is of, where it matters.
    #[serde(default)]
    pub environment: Option<String>,
    /// How many (1 when absent).
    #[serde(default)]
    pub count: Option<u32>,
    /// The new name; with several, `NAME-1` and so on.
    #[serde(default)]
    pub name: Option<String>,
    /// As for [`RestoreRequest`].
    #[serde(default)]
    pub lazy: Option<bool>,
    /// How long the client has run before it sent this, in microseconds (for `ready_ms`).
    #[serde(default)]
    pub elapsed_us: u64,
}

/// The new environments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkReport {
    /// One for each fork.
    pub environments: Vec<RestoreReport>,
}
