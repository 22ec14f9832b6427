//! Snapshots out of the store and into it: one file each way, and other stores.
//!
//! A file is written beside its place and renamed; what has no name to be renamed to (the client's standard output) is
//! written as it comes, and its end says that it is whole.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use diorama_api::{
    ApiError, ArrivalReport, ErrorKind, ExportReport, ExportRequest, ImportRequest, SecretFile, Stream,
    TransferReport, TransferRequest,
};
use diorama_store::{Arrived, BaseRecord, Location, OpenOptions, Signature, SnapshotId, Store, StoreError};
use tempfile::NamedTempFile;

use crate::Agent;
use crate::operation::Operation;
use crate::problem::{io_error, store_error};
use crate::store_keys::SecretSource;

/// What is written at once.
const BUFFER_BYTES: usize = 1 << 20;

impl Agent {
    /// Writes a snapshot into one file.
    pub(crate) fn export_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
        request: &ExportRequest,
        operation: &Operation,
    ) -> Result<ExportReport, ApiError> {
        let id = self.resolve_snapshot(query, environment)?;
        let stored = self.store.load(&id).map_err(store_error)?;
        warn_of_signature(&self.store, &id, operation)?;
        operation.step("exporting");
        if self.store.keyring().is_some() {
            operation
                .warn("an exported file is not encrypted, as the store is: keep it where only you read it");
        }
        let write = |out: &mut dyn Write| {
            let mut out = BufWriter::with_capacity(BUFFER_BYTES, Attended { inner: out, operation });
            self.store
                .export(&id, &mut out, &mut |done, total| operation.bytes("exporting", done, total))
                .map_err(|error| attended_error(operation, error))
        };
        let (file, exported) = match &request.to {
            Stream::Socket(socket) => {
                let mut stream = connect(socket)?;
                (None, write(&mut stream)?)
            }
            Stream::File(path) => {
                let mut file = NewFile::create(path, request.force)?;
                let exported = write(file.file())?;
                file.keep()?;
                (Some(path.clone()), exported)
            }
        };
        let images = images(&exported.bases);
        warn_of_images(&images, operation);
        Ok(ExportReport {
            id: id.to_string(),
            name: stored.name,
            environment: stored.manifest.environment,
            file,
            file_bytes: exported.file_bytes,
            chunks: exported.chunks,
            images,
        })
    }

    /// Takes in a snapshot from a file.
    pub(crate) fn import_snapshot(
        &self,
        request: &ImportRequest,
        operation: &Operation,
    ) -> Result<ArrivalReport, ApiError> {
        operation.step("importing");
        let (input, total): (Box<dyn Read>, u64) = match &request.from {
            Stream::Socket(socket) => (Box::new(connect(socket)?), 0),
            Stream::File(path) => {
                let file = File::open(path).map_err(|error| io_error(path, &error))?;
                let length = file.metadata().map_err(|error| io_error(path, &error))?.len();
                (Box::new(file), length)
            }
        };
        let mut input = Attended { inner: input, operation };
        let mut progress = |done: u64, _: u64| operation.bytes("importing", done, total.max(done));
        let arrived = self
            .store
            .import(&mut input, request.name.as_deref(), &mut progress)
            .map_err(|error| attended_error(operation, error))?;
        Ok(self.arrived(arrived, operation))
    }

    /// Copies snapshots to another store.
    pub(crate) fn push_snapshots(
        &self,
        request: &TransferRequest,
        operation: &Operation,
    ) -> Result<TransferReport, ApiError> {
        let other = other_store(request, true)?;
        if self.store.keyring().is_some() && other.keyring().is_none() {
            operation.warn(format!(
                "the store in {} is not encrypted, as this one is: whoever reads it reads the machines' memory",
                request.location
            ));
        }
        self.transfer(request, &self.store, &other, operation)
    }

    /// Copies snapshots from another store.
    pub(crate) fn pull_snapshots(
        &self,
        request: &TransferRequest,
        operation: &Operation,
    ) -> Result<TransferReport, ApiError> {
        self.transfer(request, &other_store(request, false)?, &self.store, operation)
    }

    fn transfer(
        &self,
        request: &TransferRequest,
        from: &Store,
        to: &Store,
        operation: &Operation,
    ) -> Result<TransferReport, ApiError> {
        if request.name.is_some() && request.snapshots.len() != 1 {
            return Err(ApiError::new(ErrorKind::Invalid, "a name is for one snapshot")
                .hint("copy the others with another command"));
        }
        // All of them are known before any is copied.
        let ids = request
            .snapshots
            .iter()
            .map(|query| from.resolve(query, request.environment.as_deref()).map_err(store_error))
            .collect::<Result<Vec<_>, _>>()?;
        let mut snapshots = Vec::new();
        for (id, query) in ids.iter().zip(&request.snapshots) {
            operation.check()?;
            warn_of_signature(from, id, operation)?;
            let step = format!("copying {query}");
            operation.step(&step);
            let mut progress = |done, total| operation.bytes(&step, done, total);
            let arrived = from
                .copy_to(id, to, request.name.as_deref(), &|| operation.is_cancelled(), &mut progress)
                .map_err(|error| attended_error(operation, error))?;
            snapshots.push(self.arrived(arrived, operation));
        }
        Ok(TransferReport { location: request.location.clone(), snapshots })
    }

    fn arrived(&self, arrived: Arrived, operation: &Operation) -> ArrivalReport {
        let images = images(&arrived.bases);
        warn_of_images(&images, operation);
        ArrivalReport {
            id: arrived.id.to_string(),
            name: arrived.name,
            environment: arrived.environment,
            was_there: arrived.was_there,
            logical_bytes: arrived.logical_bytes,
            chunks: arrived.chunks,
            new_chunks: arrived.new_chunks,
            new_bytes: arrived.new_bytes,
            images,
        }
    }
}

/// Opens another store; one that is only read has to be there.
fn other_store(request: &TransferRequest, create: bool) -> Result<Store, ApiError> {
    let location =
        Location::parse(&request.location, &|name| std::env::var(name).ok()).map_err(store_error)?;
    if !create && !location.has_store().map_err(store_error)? {
        return Err(ApiError::new(ErrorKind::NotFound, format!("there is no snapshot store in {location}"))
            .hint("the folder of a store is `store` in the DIORAMA_HOME that it belongs to, or what DIORAMA_STORE names"));
    }
    let source = match &request.secret {
        Some(SecretFile::Passphrase(path)) => Some(SecretSource::PassphraseFile(path.clone())),
        Some(SecretFile::Key(path)) => Some(SecretSource::KeyFile(path.clone())),
        None => None,
    };
    let secret = source.map(|source| source.read()).transpose()?;
    Store::open_with(&location, &OpenOptions { secret, signer: None }).map_err(|error| match error {
        StoreError::KeyMissing { .. } => ApiError::new(ErrorKind::Locked, error.to_string())
            .hint("name what opens it with --key-file or --passphrase-file"),
        error => store_error(error),
    })
}

/// A new file that appears as a whole or not at all.
pub(crate) struct NewFile {
    file: NamedTempFile,
    path: PathBuf,
    force: bool,
}

impl NewFile {
    /// Begins one at `path`. With `force` it replaces what is there.
    pub(crate) fn create(path: &Path, force: bool) -> Result<Self, ApiError> {
        if !force && std::fs::symlink_metadata(path).is_ok() {
            return Err(is_there(path));
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        // For this user alone, as guests' memory is nobody else's business.
        let file = tempfile::Builder::new()
            .prefix(".diorama-")
            .suffix(".partial")
            .tempfile_in(folder)
            .map_err(|error| io_error(folder, &error))?;
        Ok(Self { file, path: path.to_owned(), force })
    }

    pub(crate) fn file(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Whether something is there that it takes the place of.
    pub(crate) fn replaces(&self) -> bool {
        self.force && std::fs::symlink_metadata(&self.path).is_ok()
    }

    /// Where it will be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it durable and gives it its name.
    pub(crate) fn keep(self) -> Result<(), ApiError> {
        let Self { file, path, force } = self;
        file.as_file().sync_all().map_err(|error| io_error(&path, &error))?;
        let kept = if force { file.persist(&path) } else { file.persist_noclobber(&path) };
        kept.map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => is_there(&path),
            _ => io_error(&path, &error.error),
        })?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| io_error(folder, &error))
    }
}

fn is_there(path: &Path) -> ApiError {
    ApiError::new(ErrorKind::NameInUse, format!("{} is there already", path.display()))
        .hint("`--force` writes over it")
}

/// What stops reading and writing as soon as nobody waits for it any more.
pub(crate) struct Attended<'a, T> {
    pub(crate) inner: T,
    pub(crate) operation: &'a Operation,
}

impl<T: Read> Read for Attended<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.operation.check_io()?;
        self.inner.read(buffer)
    }
}

impl<T: Write> Write for Attended<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.operation.check_io()?;
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A failure of the store, unless it failed because nobody waits for it any more.
pub(crate) fn attended_error(operation: &Operation, error: StoreError) -> ApiError {
    if let Err(cancelled) = operation.check() {
        return cancelled;
    }
    match error {
        StoreError::NameInUse { .. } => {
            ApiError::new(ErrorKind::NameInUse, error.to_string()).hint("`--name` calls it otherwise there")
        }
        error => store_error(error),
    }
}

fn connect(socket: &Path) -> Result<UnixStream, ApiError> {
    UnixStream::connect(socket).map_err(|error| io_error(socket, &error))
}

fn images(bases: &[BaseRecord]) -> Vec<PathBuf> {
    let mut images: Vec<PathBuf> = bases.iter().map(|base| base.path.clone()).collect();
    images.sort();
    images.dedup();
    images
}

/// A signature that says nothing stays behind.
fn warn_of_signature(store: &Store, id: &SnapshotId, operation: &Operation) -> Result<(), ApiError> {
    if let Signature::Wrong { object, damage } = store.signature(id).map_err(store_error)? {
        operation.warn(format!(
            "the snapshot goes without its signature, which is wrong: {}: {damage}",
            object.display()
        ));
    }
    Ok(())
}

fn warn_of_images(images: &[PathBuf], operation: &Operation) {
    if images.is_empty() {
        return;
    }
    let names: Vec<String> = images.iter().map(|image| image.display().to_string()).collect();
    operation.warn(format!(
        "the snapshot needs these disk images, which do not come along: {}. Bring them too, to the same paths, with \
         their times (`cp -p`)",
        names.join(", ")
    ));
}
