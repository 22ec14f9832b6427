//! What can go wrong, with the values in it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::address::Address;
use crate::archive::ArchiveProblem;
use crate::frames::FramesError;
use crate::id::SnapshotId;
use crate::manifest::{ManifestProblem, NameProblem};
use crate::pack::PackError;

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file system, or a quota, is full. What had been written of this file is removed.
    #[error("no space left for {}{}", path.display(), needed(*needed_bytes))]
    NoSpace {
        /// The file that did not fit.
        path: PathBuf,
        /// How many bytes the whole file may take, where that is known.
        needed_bytes: Option<u64>,
    },
    /// What should say where a store is does not.
    #[error("{location} is no place for a store: {problem}")]
    BadLocation {
        /// What was given.
        location: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A server did not do what it was asked.
    #[error("cannot {action} {object} at {server}: {problem}{}", said(detail))]
    Remote {
        /// What was tried, as a verb.
        action: &'static str,
        /// The object, or the bucket, as an URL.
        object: String,
        /// Where it was asked.
        server: String,
        /// What is wrong.
        problem: RemoteProblem,
        /// What the server, or the way to it, said of that.
        detail: String,
    },
    /// A writer has shown no sign of life for so long that others may have removed what it relied on.
    #[error(
        "{session} has ended: the store could not be reached for {silent_s} s, or another host took it for dead"
    )]
    SessionLost {
        /// The session's object.
        session: String,
        /// Since when it could not be renewed, in seconds.
        silent_s: u64,
    },
    /// A folder that holds something else.
    #[error("{} is not empty and holds no snapshot store", path.display())]
    NotAStore {
        /// The folder.
        path: PathBuf,
    },
    /// A store that another version of Diorama wrote.
    #[error("{} holds a store of format {found:?}; this program knows {expected:?}", path.display())]
    UnsupportedStore {
        /// The store's folder.
        path: PathBuf,
        /// What its `format` file says.
        found: String,
        /// What this program writes.
        expected: &'static str,
    },
    /// The store is encrypted, and there is nothing to open it with.
    #[error("the store {} is encrypted, and no passphrase or key file was given", path.display())]
    KeyMissing {
        /// The store.
        path: PathBuf,
    },
    /// The store is encrypted, and not for this passphrase or key file.
    #[error("this {secret} does not open the store {} (which has {slots} for a {secret})", path.display())]
    WrongKey {
        /// The store.
        path: PathBuf,
        /// A passphrase or a key file.
        secret: &'static str,
        /// How many key slots were tried.
        slots: usize,
    },
    /// Something to open a store with was given, and the store is open to everybody: it is not the one that was meant,
    /// or somebody has put it there.
    #[error("a passphrase or key file was given, but the store {} is not encrypted", path.display())]
    NotEncrypted {
        /// The store.
        path: PathBuf,
    },
    /// Something to open a store with was given, and there is none.
    #[error("a passphrase or key file was given, but there is no store in {}", path.display())]
    NoStore {
        /// The folder.
        path: PathBuf,
    },
    /// There is a store already where one was to be made.
    #[error("there is a store in {} already", path.display())]
    AlreadyAStore {
        /// The store.
        path: PathBuf,
    },
    /// No key slot, or more than one, has an id that begins so.
    #[error("no key of the store, or more than one, has an id that begins with {id:?}")]
    NoSuchKey {
        /// What was asked for.
        id: String,
    },
    /// Without this key slot nobody could open the store any more.
    #[error("{id} is the last key of the store: without it nobody could read it any more")]
    LastKey {
        /// The slot.
        id: String,
    },
    /// A store has a bounded number of key slots.
    #[error("the store has {most} keys, and can have no more")]
    TooManyKeys {
        /// How many.
        most: usize,
    },
    /// A passphrase cannot be hashed at this cost.
    #[error("a passphrase cannot be hashed with so much or so little memory, passes and lanes")]
    BadKeyCost,
    /// A snapshot that another version of Diorama wrote.
    #[error("snapshot {} has format {found:?}; this program knows {expected:?}", id.short())]
    UnsupportedSnapshot {
        /// The snapshot.
        id: SnapshotId,
        /// What its manifest says.
        found: String,
        /// What this program writes.
        expected: &'static str,
    },
    /// No snapshot has this id.
    #[error("there is no snapshot {id}")]
    Missing {
        /// The id asked for.
        id: SnapshotId,
    },
    /// No snapshot answers to these words.
    #[error("no snapshot is called {query:?}")]
    NotFound {
        /// What was asked for.
        query: String,
        /// `environment/name` of those with similar names, nearest first.
        near: Vec<String>,
    },
    /// Several snapshots answer to these words.
    #[error("{query:?} could be any of {} snapshots", matches.len())]
    Ambiguous {
        /// What was asked for.
        query: String,
        /// `environment/name` (empty for a damaged one) and id of each.
        matches: Vec<(String, SnapshotId)>,
    },
    /// The environment has a snapshot of this name.
    #[error("environment {environment} already has a snapshot called {name}: {}", id.short())]
    NameInUse {
        /// The environment.
        environment: String,
        /// The name.
        name: String,
        /// Who has it.
        id: SnapshotId,
    },
    /// A name that a snapshot, or a file's owner, cannot have.
    #[error("{name:?} cannot be a name here: {problem}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: NameProblem,
    },
    /// The snapshot with exactly this manifest is already stored.
    #[error("snapshot {} is already stored", id.short())]
    AlreadyStored {
        /// Its id.
        id: SnapshotId,
    },
    /// Stored data is not what was written.
    #[error("{} is damaged: {damage}", file.display())]
    Corrupt {
        /// The damaged object.
        file: PathBuf,
        /// How it is damaged.
        damage: Damage,
    },
    /// A part of a snapshot cannot be read, since something that holds it is damaged.
    #[error("{part} cannot be read{}: {source}", at(*offset))]
    PartDamaged {
        /// What of the snapshot, such as `ram/server`.
        part: String,
        /// Where in it, in bytes, if not everywhere.
        offset: Option<u64>,
        /// The damage.
        source: Box<StoreError>,
    },
    /// The manifest offered for commit contradicts itself or the layout.
    #[error("the manifest cannot be committed: {0}")]
    BadManifest(#[from] ManifestProblem),
    /// The manifest names a part that was not written, or written with other contents.
    #[error("the manifest names {part}, which was not written like that")]
    NotWritten {
        /// Such as `ram/server`.
        part: String,
    },
    /// A part was written that the manifest does not name.
    #[error("{part} was written, but the manifest does not name it")]
    NotInManifest {
        /// Such as `ram/server`.
        part: String,
    },
    /// The same part of a snapshot was written twice.
    #[error("{part} was already written")]
    WrittenTwice {
        /// Such as `ram/server`.
        part: String,
    },
    /// A part could not be written, so that there can be no snapshot.
    #[error("the snapshot cannot be committed: {part} was not written whole")]
    WriterFailed {
        /// Such as `ram/server`.
        part: String,
    },
    /// Space cannot be given back as long as it is not known what the snapshots need.
    #[error("the store is damaged, so that it is not known what can go: {source}")]
    CannotCollect {
        /// The first damage that was met.
        source: Box<StoreError>,
    },
    /// A file that should be an exported snapshot.
    #[error("the export is damaged at byte {offset}: {problem}")]
    Archive {
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        problem: ArchiveProblem,
    },
    /// Nobody wants it any more.
    #[error("it was stopped")]
    Stopped,
    /// The memory file has not the size that the machine has.
    #[error("the memory file of {machine} has {actual_bytes} bytes instead of {expected_bytes}")]
    RamLength {
        /// The machine.
        machine: String,
        /// What the machine has.
        expected_bytes: u64,
        /// What the file has.
        actual_bytes: u64,
    },
    /// A file changed while it was read into the store, although it has to be immutable by then.
    #[error("{} changed while it was stored", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
    },
    /// Not a regular file, so it cannot be stored.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// More than the format has room for.
    #[error("{what} of {bytes} bytes is over the limit of {limit_bytes}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// What is allowed.
        limit_bytes: u64,
    },
    /// Frames that cannot be stored.
    #[error("these frames cannot be stored")]
    Frames(#[from] FramesError),
    /// The snapshot has no machine of this name.
    #[error("snapshot {} has no machine {machine:?}", id.short())]
    NoSuchMachine {
        /// The snapshot.
        id: SnapshotId,
        /// The name asked for.
        machine: String,
    },
}

/// Why a server did not do what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteProblem {
    /// There is no way to it, or nobody listens.
    #[error("it cannot be reached")]
    Unreachable,
    /// It takes connections and does not answer.
    #[error("it does not answer")]
    Silent,
    /// It says that it cannot just now.
    #[error("it fails")]
    Failing,
    /// It has no such bucket.
    #[error("there is no such bucket")]
    NoBucket,
    /// Nobody said who asks.
    #[error("there are no credentials")]
    NoCredentials,
    /// It does not know who asks, or does not let them.
    #[error("access is denied")]
    Denied,
    /// It does not take the request.
    #[error("the request is refused")]
    Refused,
    /// It writes over what it was told to create.
    #[error("it does not know conditional writes (If-None-Match), which keep several writers apart")]
    Unconditional,
    /// The settings make no sense.
    #[error("the settings are wrong")]
    Misconfigured,
}

/// How a stored file differs from what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// It is not there.
    Missing,
    /// It is a link, folder, pipe or device.
    NotAFile,
    /// It was cut off, or something was appended.
    Length {
        /// What was written, in bytes.
        expected_bytes: u64,
        /// What is there, in bytes.
        actual_bytes: u64,
    },
    /// The contents have another hash.
    Contents {
        /// Where the first block with another hash starts; `None` where the format only has one hash for the whole file.
        offset: Option<u64>,
    },
    /// The device underneath could not read it.
    Unreadable {
        /// The first offset that could not be read, where known.
        offset: Option<u64>,
        /// What the system said.
        kind: io::ErrorKind,
    },
    /// Its hash is right, and yet it is not a list of frames.
    Frames(FramesError),
    /// Its hash is right, and yet it is no manifest.
    NotAManifest {
        /// Where parsing stopped: line and column, from 1.
        line: usize,
        /// See `line`.
        column: usize,
    },
    /// Its hash is right, and yet it contradicts itself or the layout.
    Manifest(ManifestProblem),
    /// It is no pack, or not the one it is named after.
    Pack(PackError),
    /// No pack holds this chunk.
    NoChunk {
        /// The chunk.
        address: Address,
    },
    /// It cannot be decrypted: it was changed, or sealed under another key, or is another object.
    Seal {
        /// Where the first piece starts that cannot; `None` where it is one piece.
        offset: Option<u64>,
    },
    /// It is no signature, or not one of this snapshot.
    Signature,
    /// It is no key slot of this store, or not as it was made.
    KeySlot,
    /// A node of a tree, whose hash is right, has another number of children than its place has.
    Node {
        /// The node.
        address: Address,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(f, "it is missing"),
            Self::NotAFile => write!(f, "it is not a regular file"),
            Self::Length { expected_bytes, actual_bytes } => {
                write!(f, "it has {actual_bytes} bytes instead of {expected_bytes}")
            }
            Self::Contents { offset: Some(at) } => {
                write!(f, "the block at offset {at} has changed")
            }
            Self::Contents { offset: None } => write!(f, "its contents have changed"),
            Self::Unreadable { offset: Some(at), kind } => {
                write!(f, "it cannot be read at offset {at}: {kind}")
            }
            Self::Unreadable { offset: None, kind } => write!(f, "it cannot be read: {kind}"),
            Self::Frames(error) => write!(f, "{error}"),
            Self::NotAManifest { line, column } => {
                write!(f, "no manifest, from line {line}, column {column}")
            }
            Self::Manifest(problem) => write!(f, "{problem}"),
            Self::Pack(problem) => write!(f, "{problem}"),
            Self::NoChunk { address } => write!(f, "no pack holds chunk {}", address.short()),
            Self::Seal { offset: Some(at) } => write!(f, "it cannot be decrypted at offset {at}"),
            Self::Seal { offset: None } => write!(f, "it cannot be decrypted"),
            Self::Signature => write!(f, "it is no signature of this snapshot"),
            Self::KeySlot => write!(f, "it is no key of this store, or has changed"),
            Self::Node { address } => write!(f, "node {} does not fit its place", address.short()),
        }
    }
}

impl StoreError {
    /// The error for a failed system call on `path`; a full file system becomes [`StoreError::NoSpace`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace { path: path.to_owned(), needed_bytes: None },
            _ => Self::Io { action, path: path.to_owned(), source },
        }
    }

    /// Adds how much would have been needed, where this is a lack of space.
    pub(crate) fn needing(self, bytes: u64) -> Self {
        match self {
            Self::NoSpace { path, .. } => Self::NoSpace { path, needed_bytes: Some(bytes) },
            other => other,
        }
    }

    pub(crate) fn corrupt(file: &Path, damage: Damage) -> Self {
        Self::Corrupt { file: file.to_owned(), damage }
    }

    /// Whether stored data is not what was written (and not: the system refused, or the request was wrong).
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Corrupt { .. } => true,
            Self::PartDamaged { source, .. } => source.is_damage(),
            _ => false,
        }
    }

    /// Says which part of a snapshot damage is met in; other errors are left as they are.
    pub(crate) fn within(self, part: &str, offset: Option<u64>) -> Self {
        match self {
            Self::Corrupt { .. } => {
                Self::PartDamaged { part: part.to_owned(), offset, source: Box::new(self) }
            }
            other => other,
        }
    }
}

fn at(offset: Option<u64>) -> String {
    offset.map_or_else(String::new, |offset| format!(" at offset {offset}"))
}

fn said(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(": {detail}") }
}

fn needed(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |bytes| format!(" (up to {bytes} bytes)"))
}
