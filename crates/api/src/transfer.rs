//! Snapshots out of a store, into one, and looked into without starting anything.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A file that the agent is to write or read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// This file, by its absolute path.
    File(PathBuf),
    /// Whatever the client has: it listens on this unix socket, and passes bytes on.
    Socket(PathBuf),
}

/// Write a snapshot into one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// Where to.
    pub to: Stream,
    /// Write over a file that is there.
    #[serde(default)]
    pub force: bool,
}

/// What exporting wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// The snapshot.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its environment.
    pub environment: String,
    /// The file; none for a stream.
    pub file: Option<PathBuf>,
    /// How long it is.
    pub file_bytes: u64,
    /// Different pages, clusters and nodes in it.
    pub chunks: u64,
    /// Disk images of the user's that the snapshot needs and the file does not hold.
    pub images: Vec<PathBuf>,
}

/// Take in a snapshot from a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportRequest {
    /// Where from.
    pub from: Stream,
    /// What to call it here; by its own name when absent.
    #[serde(default)]
    pub name: Option<String>,
}

/// A snapshot that has come into a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalReport {
    /// Its id, the same as where it came from.
    pub id: String,
    /// Its name where it is now.
    pub name: String,
    /// Its environment.
    pub environment: String,
    /// It was there already.
    pub was_there: bool,
    /// All of its memory and disks.
    pub logical_bytes: u64,
    /// Different pages, clusters and nodes that it has.
    pub chunks: u64,
    /// Of those, the ones that were not there.
    pub new_chunks: u64,
    /// What those take.
    pub new_bytes: u64,
    /// Disk images of the user's that it needs, and that do not come along.
    pub images: Vec<PathBuf>,
}

/// Copy snapshots to another store, or from one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferRequest {
    /// Names, ids or unique beginnings of ids, in the store that they are copied from.
    pub snapshots: Vec<String>,
    /// Which environment the names are of, where it matters.
    #[serde(default)]
    pub environment: Option<String>,
    /// Where the other store is: a folder's absolute path, or an URL.
    pub location: String,
    /// What to call it where it comes to: for a single one.
    #[serde(default)]
    pub name: Option<String>,
    /// What opens the other store, where it is encrypted.
    #[serde(default)]
    pub secret: Option<SecretFile>,
}

/// The file that opens an encrypted store, by its absolute path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecretFile {
    /// Its first line is a passphrase.
    Passphrase(PathBuf),
    /// Random bytes.
    Key(PathBuf),
}

/// What copying did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferReport {
    /// The other store.
    pub location: String,
    /// The snapshots, each where it came to.
    pub snapshots: Vec<ArrivalReport>,
}

/// How a machine's memory is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryForm {
    /// An ELF core file with segments at guest-physical addresses.
    #[default]
    Elf,
    /// The bytes of main memory, one after another.
    Raw,
}

/// How a disk is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskForm {
    /// A qcow2 image.
    #[default]
    Qcow2,
    /// The disk's bytes.
    Raw,
}

/// Something of a snapshot that can be extracted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Extract {
    /// The manifest, and the environment as a file.
    Description,
    /// Machines' memory.
    Memory,
    /// Machines' disks.
    Disks,
    /// The kernels and initrds that machines were booted with.
    Kernels,
    /// The frames in flight.
    Frames,
}

/// Write what a snapshot holds as ordinary files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractRequest {
    /// The folder, by its absolute path.
    pub to: PathBuf,
    /// Only of these machines; of all when empty.
    #[serde(default)]
    pub machines: Vec<String>,
    /// Only this; all when empty.
    #[serde(default)]
    pub what: Vec<Extract>,
    /// How memory is written.
    #[serde(default)]
    pub memory: MemoryForm,
    /// How disks are written.
    #[serde(default)]
    pub disks: DiskForm,
    /// Copy what disks have of the user's images, too. Raw disks always have it.
    #[serde(default)]
    pub flatten: bool,
    /// Write over files that are there.
    #[serde(default)]
    pub force: bool,
}

/// What extracting wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractReport {
    /// The snapshot.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The folder.
    pub to: PathBuf,
    /// The files.
    pub files: Vec<ExtractedFile>,
}

/// A file that was extracted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractedFile {
    /// What it holds.
    pub what: Extract,
    /// Whose; none of what belongs to the whole.
    pub machine: Option<String>,
    /// Which of the machine's disks.
    pub disk: Option<String>,
    /// The file, in the folder.
    pub path: PathBuf,
    /// How long it is.
    pub bytes: u64,
    /// What it takes on disk: holes are not counted.
    pub allocated_bytes: u64,
    /// The image of the user's that it needs beside it.
    pub backing: Option<PathBuf>,
}
