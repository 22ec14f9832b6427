//! What a manifest says: the types on disk, and the rules that every manifest keeps.
//!
//! These types belong to the format and to nothing else; whoever runs machines turns its own types into these.
//! A manifest is hostile until [`Manifest::check`] has passed: each file it names is then at the one path that the
//! file's role allows, every name is a plain one, and every size is bounded.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use diorama_topology::Environment;
use serde::{Deserialize, Serialize};

use crate::blocks::{BLOCK_BYTES, PAGE_BYTES};
use crate::frames::MAX_FRAMES_FILE_BYTES;
use crate::id::SnapshotId;

/// The `format` of a manifest that this program writes and reads.
pub const FORMAT: &str = "diorama-snapshot/0";

/// The longest manifest: a thousand machines with every record take a tenth of it.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// The largest memory of one machine.
pub(crate) const MAX_RAM_BYTES: u64 = 4 << 40;
/// The longest device state, which is read into memory as a whole.
pub(crate) const MAX_STATE_BYTES: u64 = 1 << 30;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutRecord {
    /// The environment's epoch after the cut.
    pub epoch: u32,
    /// Latest minus earliest machine's cut instant, in microseconds.
    pub skew_us: u64,
    /// On how many hosts machines ran.
    pub hosts: u32,
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
    pub kernel: Option<BlobRecord>,
    /// That kernel's initial RAM disk.
    pub initrd: Option<BlobRecord>,
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

/// A machine's memory: a sparse flat file, and the hash of each of its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRecord {
    /// `ram/<machine>`.
    pub file: String,
    /// The machine's memory.
    pub bytes: u64,
    /// In pages that are not all zeros.
    pub used_bytes: u64,
    /// `ram/<machine>.blocks`: 32 bytes of BLAKE3 for each block; holes count as zeros, the last block may be short.
    pub blocks: String,
    /// [`BLOCK_BYTES`].
    pub block_bytes: u64,
    /// The BLAKE3 hash of the `blocks` file.
    pub root: String,
}

/// A file of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Relative to the snapshot's folder.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Its BLAKE3 hash.
    pub blake3: String,
}

/// A kernel or initrd, shared by all snapshots that use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// `blobs/<blake3>`, in the snapshot's folder.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Its BLAKE3 hash.
    pub blake3: String,
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
    /// `disks/<machine>/<disk>/<n>.<format>`.
    pub file: String,
    /// What the file holds.
    pub format: LayerFormat,
    /// The file's length.
    pub bytes: u64,
    /// The file's BLAKE3 hash.
    pub blake3: String,
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
    /// The length of every file in it.
    pub logical: u64,
    /// What the disk holds that no snapshot held before.
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
    /// A file at another path than its role has.
    #[error("it names {found:?} where only {expected:?} can be")]
    Path {
        /// What it says.
        found: String,
        /// What the layout says.
        expected: String,
    },
    /// Not the hexadecimal digits of a hash.
    #[error("{found:?} is no hash")]
    Hash {
        /// What it says.
        found: String,
    },
    /// A size over the limit.
    #[error("{file} of {bytes} bytes is over the limit of {limit_bytes}")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
        /// What is allowed.
        limit_bytes: u64,
    },
    /// Memory hashed in blocks of another size, or not in whole pages.
    #[error("{file} has {bytes} bytes in blocks of {block_bytes}")]
    Blocks {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
        /// The blocks' size.
        block_bytes: u64,
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

/// One file that a manifest names, whatever its role.
pub(crate) struct NamedFile<'a> {
    pub(crate) file: &'a str,
    pub(crate) bytes: u64,
    /// The hash of the file, or for RAM of its list of block hashes.
    pub(crate) blake3: &'a str,
    pub(crate) role: Role<'a>,
}

#[derive(Clone, Copy)]
pub(crate) enum Role<'a> {
    Ram(&'a RamRecord),
    State,
    Layer,
    Blob,
    Frames,
}

impl Manifest {
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

    /// Every file it names. A blob that several machines use is named once.
    pub(crate) fn files(&self) -> Vec<NamedFile<'_>> {
        let mut files = Vec::new();
        let mut blobs = BTreeSet::new();
        for machine in &self.machines {
            files.push(NamedFile {
                file: &machine.ram.file,
                bytes: machine.ram.bytes,
                blake3: &machine.ram.root,
                role: Role::Ram(&machine.ram),
            });
            files.push(machine.device_state.named(Role::State));
            for layer in machine.disks.iter().flat_map(|disk| &disk.layers) {
                files.push(NamedFile {
                    file: &layer.file,
                    bytes: layer.bytes,
                    blake3: &layer.blake3,
                    role: Role::Layer,
                });
            }
            for blob in [&machine.kernel, &machine.initrd].into_iter().flatten() {
                if blobs.insert(&blob.file) {
                    files.push(NamedFile {
                        file: &blob.file,
                        bytes: blob.bytes,
                        blake3: &blob.blake3,
                        role: Role::Blob,
                    });
                }
            }
        }
        files.push(self.frames.named(Role::Frames));
        files
    }

    /// Whether it keeps every rule, so that its paths and sizes can be used.
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
        self.frames.check("frames".to_owned(), MAX_FRAMES_FILE_BYTES)
    }
}

impl MachineRecord {
    fn check(&self) -> Result<(), ManifestProblem> {
        let ram = &self.ram;
        same_path(&ram.file, ram_path(&self.name))?;
        same_path(&ram.blocks, blocks_path(&self.name))?;
        check_hash(&ram.root)?;
        at_most(&ram.file, ram.bytes, MAX_RAM_BYTES)?;
        if ram.block_bytes != BLOCK_BYTES || !ram.bytes.is_multiple_of(PAGE_BYTES) {
            return Err(ManifestProblem::Blocks {
                file: ram.file.clone(),
                bytes: ram.bytes,
                block_bytes: ram.block_bytes,
            });
        }
        self.device_state.check(state_path(&self.name), MAX_STATE_BYTES)?;
        unique("disk", self.disks.iter().map(|disk| &disk.name))?;
        for disk in &self.disks {
            for (index, layer) in disk.layers.iter().enumerate() {
                let path = layer_path(&self.name, &disk.name, index, layer.format);
                same_path(&layer.file, path)?;
                check_hash(&layer.blake3)?;
            }
        }
        for blob in [&self.kernel, &self.initrd].into_iter().flatten() {
            check_hash(&blob.blake3)?;
            same_path(&blob.file, blob_path(&blob.blake3))?;
        }
        Ok(())
    }
}

impl FileRecord {
    fn named<'a>(&'a self, role: Role<'a>) -> NamedFile<'a> {
        NamedFile { file: &self.file, bytes: self.bytes, blake3: &self.blake3, role }
    }

    fn check(&self, path: String, limit_bytes: u64) -> Result<(), ManifestProblem> {
        same_path(&self.file, path)?;
        check_hash(&self.blake3)?;
        at_most(&self.file, self.bytes, limit_bytes)
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

pub(crate) const FRAMES_PATH: &str = "frames";

pub(crate) fn ram_path(machine: &str) -> String {
    format!("ram/{machine}")
}

pub(crate) fn blocks_path(machine: &str) -> String {
    format!("ram/{machine}.blocks")
}

pub(crate) fn state_path(machine: &str) -> String {
    format!("state/{machine}")
}

pub(crate) fn layer_path(machine: &str, disk: &str, index: usize, format: LayerFormat) -> String {
    format!("disks/{machine}/{disk}/{index}.{}", format.as_str())
}

pub(crate) fn blob_path(blake3: &str) -> String {
    format!("blobs/{blake3}")
}

fn same_path(found: &str, expected: String) -> Result<(), ManifestProblem> {
    if found == expected {
        return Ok(());
    }
    Err(ManifestProblem::Path { found: found.to_owned(), expected })
}

/// Lower case only: a hash is compared, and named in paths, as text.
fn check_hash(text: &str) -> Result<(), ManifestProblem> {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() == 64 && text.bytes().all(digit) {
        return Ok(());
    }
    Err(ManifestProblem::Hash { found: text.to_owned() })
}

fn at_most(file: &str, bytes: u64, limit_bytes: u64) -> Result<(), ManifestProblem> {
    if bytes <= limit_bytes {
        return Ok(());
    }
    Err(ManifestProblem::TooLarge { file: file.to_owned(), bytes, limit_bytes })
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
