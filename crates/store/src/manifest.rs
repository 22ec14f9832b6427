//! What a manifest says: the types on disk, and the rules that every manifest keeps.
//!
//! These types belong to the format and to nothing else; whoever runs machines turns its own types into these.
//! A manifest is hostile until [`Manifest::check`] has passed: every name is then a plain one, and every size is bounded.
//! It names contents by their trees' roots, and no files: none can lead outside the store.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use diorama_topology::Environment;
use serde::{Deserialize, Serialize};

use crate::address::Address;
use crate::frames::MAX_FRAMES_FILE_BYTES;
use crate::id::SnapshotId;
use crate::tree::{PAGE_BYTES, Shape};

/// The `format` of a manifest that this program writes and reads.
pub const FORMAT: &str = "diorama-snapshot/1";

/// The longest manifest: a thousand machines with every record take a tenth of it.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// The largest memory of one machine.
pub(crate) const MAX_RAM_BYTES: u64 = 4 << 40;
/// The longest device state, which is read into memory as a whole.
pub(crate) const MAX_STATE_BYTES: u64 = 1 << 30;

/// The longest layer of a disk, kernel or initrd.
pub(crate) const MAX_FILE_BYTES: u64 = 64 << 40;

const NAME_BYTES_MAX: usize = 64;
const SNAPSHOT_NAME_BYTES_MAX: usize = 128;

/// Everything about one snapshot; its bytes' hash is the snapshot's id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// Unique in its environment; see [`check_snapshot_name`].
    pub name: String,
    /// What the user had to say about it; may be empty.
    pub message: String,
    /// The environment's name.
    pub environment: String,
    /// The snapshot that the environment was restored from or had taken before. It may have been removed since.
    pub parent: Option<SnapshotId>,
    /// When, as RFC 3339 in UTC.
    pub created: String,
    /// How memory was captured.
    pub capture: Capture,
    /// What was done with the frames in flight.
    pub in_flight_policy: InFlightPolicy,
    /// The environment as it was described.
    pub specification: Environment,
    /// The cut.
    pub cut: CutRecord,
    /// The machines, in the specification's order.
    pub machines: Vec<MachineRecord>,
    /// The networks, in the specification's order.
    pub networks: Vec<NetworkRecord>,
    /// The frames in flight.
    pub frames: FileRecord,
    /// What the snapshot takes.
    pub bytes: Bytes,
}

/// What is written beside the manifest once the snapshot is durable. Not covered by the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// From the request until the snapshot was committed and durable, in milliseconds.
    pub create_ms: u64,
}

/// How memory was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    /// Write-protected, and saved while the machine runs on.
    Live,
    /// Copied while the machine runs, stopped for the last pages.
    Precopy,
    /// The machine stopped until all was saved.
    Stop,
}

/// What was done with the frames in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InFlightPolicy {
    /// They are in the snapshot.
    Record,
    /// They are counted in [`Dropped::cut_drop`], and not in the snapshot.
    Drop,
}

/// The cut that the snapshot captures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutRecord {
    /// The environment's epoch after the cut.
    pub epoch: u32,
    /// Latest minus earliest machine's cut instant, in microseconds.
    pub skew_us: u64,
    /// On how many hosts machines ran.
    pub hosts: u32,
    /// The attempt that it came of, as 32 hexadecimal digits: by it, a host finds out what became of a cut.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub attempt: String,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// Its name in the specification.
    pub name: String,
    /// The host it ran on.
    pub host: String,
    /// What it was doing.
    pub state: MachineState,
    /// How long its virtual CPUs were stopped, in microseconds.
    pub pause_us: u64,
    /// How long no frame could reach it, in microseconds.
    pub stall_us: u64,
    /// The wait for QEMU to read everything written to it hit its bound.
    pub drain_incomplete: bool,
    /// What it ran on.
    pub hardware: Hardware,
    /// Its memory.
    pub ram: RamRecord,
    /// Everything else that QEMU saved of it.
    pub device_state: FileRecord,
    /// Its disks, in the order of attachment.
    pub disks: Vec<DiskRecord>,
    /// The kernel it booted directly, where it did.
    pub kernel: Option<FileRecord>,
    /// That kernel's initial RAM disk.
    pub initrd: Option<FileRecord>,
    /// That kernel's command line.
    pub cmdline: Option<String>,
}

/// What a machine was doing at the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// It ran.
    Running,
    /// A user had paused it.
    Paused,
    /// The guest had shut down.
    Shutdown,
}

/// What has to be the same for a machine to be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// As QEMU reports it, such as `7.2.22`.
    pub qemu_version: String,
    /// Versioned, such as `pc-q35-7.2`.
    pub machine_type: String,
    /// Named, such as `qemu64`.
    pub cpu_model: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// How many virtual CPUs.
    pub vcpus: u32,
    /// How much memory.
    pub memory_bytes: u64,
    /// TCG's translation buffer, in MiB, where it was set.
    pub tb_size_mib: Option<u32>,
}

/// A machine's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRecord {
    /// The machine's memory.
    pub bytes: u64,
    /// In pages that are not all zeros.
    pub used_bytes: u64,
    /// The root of its tree over pages.
    pub root: Address,
}

/// Everything else that has contents: device state, frames, a kernel, an initrd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its length.
    pub bytes: u64,
    /// The root of its tree over clusters.
    pub root: Address,
}

/// One disk: immutable layers over an optional base that the snapshot does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name in the specification.
    pub name: String,
    /// Lowest first; the guest continues on a new layer above the last.
    pub layers: Vec<LayerRecord>,
    /// The image below the lowest layer.
    pub base: Option<BaseRecord>,
    /// The disk's size in the guest.
    pub virtual_bytes: u64,
}

/// One immutable layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// What the file holds.
    pub format: LayerFormat,
    /// The file's length.
    pub bytes: u64,
    /// The root of its tree over clusters.
    pub root: Address,
}

/// What a layer's file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerFormat {
    /// A qcow2 image; its backing file's name in the header means nothing here.
    Qcow2,
    /// The disk's bytes.
    Raw,
}

/// An image that the user named and that has to be there, unchanged, for a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// Where it was.
    pub path: PathBuf,
    /// What it holds.
    pub format: LayerFormat,
    /// Its length.
    pub bytes: u64,
    /// Its modification time, as RFC 3339 in UTC.
    pub modified: String,
    /// Its BLAKE3 hash, where somebody took the time.
    pub blake3: Option<String>,
}

/// One network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Its name in the specification.
    pub name: String,
    /// What became of every frame.
    pub accounting: Accounting,
    /// What the switch had learned.
    pub learned: Vec<LearnedRecord>,
}

/// What became of every copy of a frame that the network owed before the cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounting {
    /// Copies owed: one per receiver of each frame sent.
    pub sent_before: u64,
    /// Copies delivered.
    pub delivered_before: u64,
    /// Copies recorded in the snapshot.
    pub in_flight: u64,
    /// Copies dropped, by reason.
    pub dropped: Dropped,
    /// What is left over: owed, minus all the others. 0, or frames vanished (or, below 0, appeared).
    pub unaccounted: i64,
}

/// Copies dropped, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// A queue was full.
    pub queue_full: u64,
    /// An emulated link lost it.
    pub link_loss: u64,
    /// The wire between two hosts lost it.
    pub wire_loss: u64,
    /// The receiver was gone.
    pub no_receiver: u64,
    /// It was in flight at the cut, and [`InFlightPolicy::Drop`] was asked for.
    pub cut_drop: u64,
}

/// One address that the switch had learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LearnedRecord {
    /// As `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Where it was seen.
    pub machine: String,
    /// At which of the machine's NICs, from 0.
    pub nic: u16,
}

/// What a snapshot takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// The length of every part of it.
    pub logical: u64,
    /// What the store holds that it did not hold before, compressed.
    pub new: u64,
}

/// Which rule a manifest breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestProblem {
    /// A format that this program does not know.
    #[error("its format is {found:?} instead of {FORMAT:?}")]
    Format {
        /// What it says.
        found: String,
    },
    /// A name that cannot be one.
    #[error("the {what} name {name:?} {problem}")]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: NameProblem,
    },
    /// Two things with one name.
    #[error("two {what}s are called {name:?}")]
    Duplicate {
        /// What they are.
        what: &'static str,
        /// Their name.
        name: String,
    },
    /// A size over the limit.
    #[error("{part} of {bytes} bytes is over the limit of {limit_bytes}")]
    TooLarge {
        /// Such as `ram/server`.
        part: String,
        /// Its size.
        bytes: u64,
        /// What is allowed.
        limit_bytes: u64,
    },
    /// Memory that is not in whole pages.
    #[error("{part} has {bytes} bytes, which are not whole pages")]
    Pages {
        /// Whose.
        part: String,
        /// Its size.
        bytes: u64,
    },
}

/// What is wrong with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameProblem {
    /// It is empty.
    Empty,
    /// It is longer than this many bytes.
    TooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// It contains a character that it must not.
    Character(char),
    /// It starts with something other than a letter or a digit.
    Start,
    /// It looks like a snapshot's id.
    LooksLikeAnId,
}

impl fmt::Display for NameProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "is empty"),
            Self::TooLong { limit_bytes } => write!(f, "is longer than {limit_bytes} bytes"),
            Self::Character(c) => write!(f, "contains {c:?}"),
            Self::Start => write!(f, "does not start with a letter or digit"),
            Self::LooksLikeAnId => write!(f, "looks like a snapshot's id"),
        }
    }
}

/// Whether a snapshot may have this name: letters, digits, `.`, `_` and `-`, starting with a letter or digit, up to
/// 128 bytes, and not 64 hexadecimal digits.
pub fn check_snapshot_name(name: &str) -> Result<(), NameProblem> {
    check_characters(name, SNAPSHOT_NAME_BYTES_MAX, |c| c.is_ascii_alphanumeric() || "._-".contains(c))?;
    if name.parse::<SnapshotId>().is_ok() {
        return Err(NameProblem::LooksLikeAnId);
    }
    Ok(())
}

/// Whether a machine, disk, network or environment may have this name. It becomes part of a path: no dots.
pub(crate) fn check_part_name(name: &str) -> Result<(), NameProblem> {
    check_characters(name, NAME_BYTES_MAX, |c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

fn check_characters(
    name: &str,
    limit_bytes: usize,
    allowed: impl Fn(char) -> bool,
) -> Result<(), NameProblem> {
    if name.len() > limit_bytes {
        return Err(NameProblem::TooLong { limit_bytes });
    }
    if let Some(c) = name.chars().find(|c| !allowed(*c)) {
        return Err(NameProblem::Character(c));
    }
    match name.chars().next() {
        None => Err(NameProblem::Empty),
        Some(c) if !c.is_ascii_alphanumeric() => Err(NameProblem::Start),
        Some(_) => Ok(()),
    }
}

/// One part of a snapshot: something with contents, whatever its role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What messages call it, such as `ram/server`, `disks/server/root/0.qcow2` or `frames`.
    pub name: String,
    /// How it is cut up.
    pub shape: Shape,
    /// The root of its tree.
    pub root: Address,
}

/// Why bytes are no manifest that can be read.
#[derive(Debug)]
pub(crate) enum Unreadable {
    /// Not what a manifest looks like, from here on.
    NotOne { line: usize, column: usize },
    /// It breaks a rule, or is another version's.
    Rules(ManifestProblem),
}

impl Manifest {
    /// What a manifest's bytes say, once all its rules are found kept.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Unreadable> {
        #[derive(Deserialize)]
        struct FormatOnly {
            format: String,
        }
        let not_one =
            |error: serde_json::Error| Unreadable::NotOne { line: error.line(), column: error.column() };
        // The format first: another version's manifest need not look like ours.
        let found = serde_json::from_slice::<FormatOnly>(bytes).map_err(not_one)?.format;
        if found != FORMAT {
            return Err(Unreadable::Rules(ManifestProblem::Format { found }));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(not_one)?;
        manifest.check().map_err(Unreadable::Rules)?;
        Ok(manifest)
    }

    /// The machine of this name.
    pub fn machine(&self, name: &str) -> Option<&MachineRecord> {
        self.machines.iter().find(|machine| machine.name == name)
    }

    /// The bytes to store: the snapshot's id is their hash.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        // Only a map with keys that are not strings, or a failing Serialize, can fail; the types have neither.
        let mut bytes = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        bytes.push(b'\n');
        bytes
    }

    /// Every part. A kernel or initrd that several machines use is there once.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut seen = BTreeSet::new();
        for machine in &self.machines {
            let own = machine.parts().into_iter();
            // Kernels and initrds are the only parts that machines share.
            parts.extend(own.filter(|part| seen.insert(part.name.clone())));
        }
        parts.push(self.frames.part(FRAMES_PART.to_owned()));
        parts
    }

    /// Whether it keeps every rule, so that its names and sizes can be used.
    pub(crate) fn check(&self) -> Result<(), ManifestProblem> {
        if self.format != FORMAT {
            return Err(ManifestProblem::Format { found: self.format.clone() });
        }
        check_snapshot_name(&self.name).map_err(|problem| ManifestProblem::Name {
            what: "snapshot",
            name: self.name.clone(),
            problem,
        })?;
        part_name("environment", &self.environment)?;
        unique("machine", self.machines.iter().map(|m| &m.name))?;
        unique("network", self.networks.iter().map(|n| &n.name))?;
        for machine in &self.machines {
            machine.check()?;
        }
        at_most(FRAMES_PART, self.frames.bytes, MAX_FRAMES_FILE_BYTES)
    }
}

impl MachineRecord {
    /// Every part of it.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let mut parts = vec![self.ram.part(&self.name), self.device_state.part(state_part(&self.name))];
        for disk in &self.disks {
            for (index, layer) in disk.layers.iter().enumerate() {
                parts.push(layer.part(&self.name, &disk.name, index));
            }
        }
        for blob in [&self.kernel, &self.initrd].into_iter().flatten() {
            parts.push(blob.part(blob_part(&blob.root)));
        }
        parts
    }

    fn check(&self) -> Result<(), ManifestProblem> {
        let part = ram_part(&self.name);
        at_most(&part, self.ram.bytes, MAX_RAM_BYTES)?;
        if !self.ram.bytes.is_multiple_of(PAGE_BYTES) {
            return Err(ManifestProblem::Pages { part, bytes: self.ram.bytes });
        }
        at_most(&state_part(&self.name), self.device_state.bytes, MAX_STATE_BYTES)?;
        unique("disk", self.disks.iter().map(|disk| &disk.name))?;
        for disk in &self.disks {
            for (index, layer) in disk.layers.iter().enumerate() {
                let part = layer_part(&self.name, &disk.name, index, layer.format);
                at_most(&part, layer.bytes, MAX_FILE_BYTES)?;
            }
        }
        for blob in [&self.kernel, &self.initrd].into_iter().flatten() {
            at_most(&blob_part(&blob.root), blob.bytes, MAX_FILE_BYTES)?;
        }
        Ok(())
    }
}

impl RamRecord {
    /// As a part of this machine's.
    pub fn part(&self, machine: &str) -> Part {
        Part { name: ram_part(machine), shape: Shape::memory(self.bytes), root: self.root }
    }
}

impl FileRecord {
    pub(crate) fn part(&self, name: String) -> Part {
        Part { name, shape: Shape::file(self.bytes), root: self.root }
    }
}

impl LayerRecord {
    /// As layer `index` of a disk.
    pub fn part(&self, machine: &str, disk: &str, index: usize) -> Part {
        let name = layer_part(machine, disk, index, self.format);
        Part { name, shape: Shape::file(self.bytes), root: self.root }
    }
}

impl LayerFormat {
    /// As in a file's name, and as QEMU calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl Accounting {
    /// Copies owed, minus every copy that is accounted for.
    pub fn balance(&self) -> i128 {
        i128::from(self.sent_before)
            - i128::from(self.delivered_before)
            - i128::from(self.in_flight)
            - self.dropped.total()
    }
}

impl Dropped {
    /// For all reasons together. Wider than each: these are numbers from a file.
    pub fn total(&self) -> i128 {
        [self.queue_full, self.link_loss, self.wire_loss, self.no_receiver, self.cut_drop]
            .into_iter()
            .map(i128::from)
            .sum()
    }
}

pub(crate) const FRAMES_PART: &str = "frames";

pub(crate) fn ram_part(machine: &str) -> String {
    format!("ram/{machine}")
}

pub(crate) fn state_part(machine: &str) -> String {
    format!("state/{machine}")
}

pub(crate) fn layer_part(machine: &str, disk: &str, index: usize, format: LayerFormat) -> String {
    format!("disks/{machine}/{disk}/{index}.{}", format.as_str())
}

pub(crate) fn blob_part(root: &Address) -> String {
    format!("blobs/{root}")
}

fn at_most(part: &str, bytes: u64, limit_bytes: u64) -> Result<(), ManifestProblem> {
    if bytes <= limit_bytes {
        return Ok(());
    }
    Err(ManifestProblem::TooLarge { part: part.to_owned(), bytes, limit_bytes })
}

fn part_name(what: &'static str, name: &str) -> Result<(), ManifestProblem> {
    check_part_name(name).map_err(|problem| ManifestProblem::Name { what, name: name.to_owned(), problem })
}

fn unique<'a>(what: &'static str, names: impl Iterator<Item = &'a String>) -> Result<(), ManifestProblem> {
    let mut seen = BTreeSet::new();
    for name in names {
        part_name(what, name)?;
        if !seen.insert(name) {
            return Err(ManifestProblem::Duplicate { what, name: name.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_names() {
        for name in ["a", "before-upgrade", "v1.2_x", "0", "dead", &"x".repeat(128)] {
            assert_eq!(check_snapshot_name(name), Ok(()), "{name}");
        }
        for (name, problem) in [
            ("", NameProblem::Empty),
            ("a/b", NameProblem::Character('/')),
            ("..", NameProblem::Start),
            ("-x", NameProblem::Start),
            ("a b", NameProblem::Character(' ')),
            ("\u{1b}[2J", NameProblem::Character('\u{1b}')),
            (&"x".repeat(129), NameProblem::TooLong { limit_bytes: 128 }),
            (&"a".repeat(64), NameProblem::LooksLikeAnId),
        ] {
            assert_eq!(check_snapshot_name(name), Err(problem), "{name}");
        }
    }

    #[test]
    fn part_names_are_single_path_components_without_dots() {
        for name in ["", ".", "..", "a/b", "a.blocks", "-", "\0", "é"] {
            assert!(check_part_name(name).is_err(), "{name:?}");
        }
    }
}
