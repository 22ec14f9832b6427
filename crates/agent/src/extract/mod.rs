//! What a snapshot holds, as ordinary files, without starting anything.
//!
//! ```text
//! FOLDER/manifest.json, environment.yaml, frames.pcapng
//! FOLDER/MACHINE/memory.elf or memory.raw
//! FOLDER/MACHINE/kernel, initrd
//! FOLDER/MACHINE/disks/DISK.qcow2 or DISK.raw
//! ```
//!
//! Everything streams from the store; each file is written beside its place, and all get their names when the last is
//! whole. Invariant: on any failure nothing is left of it, and what was there before is as it was.

mod disks;
mod frames;
mod layers;
mod memory;

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use diorama_api::{
    ApiError, DiskForm, ErrorKind, Extract, ExtractReport, ExtractRequest, ExtractedFile, MemoryForm,
};
use diorama_store::{DiskRecord, MachineRecord, Stored};

use crate::Agent;
use crate::operation::Operation;
use crate::problem::{io_error, no_space, store_error};
use crate::transfer::NewFile;

pub(crate) use layers::{CLUSTER_BYTES, Layer, Mapped, at, map, open};

impl Agent {
    /// Extracts what is asked for.
    pub(crate) fn extract_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
        request: &ExtractRequest,
        operation: &Operation,
    ) -> Result<ExtractReport, ApiError> {
        let id = self.resolve_snapshot(query, environment)?;
        let stored = self.store.load(&id).map_err(store_error)?;
        let machines = chosen(&stored, &request.machines)?;
        let wanted = |what: Extract| request.what.is_empty() || request.what.contains(&what);
        let mut work = Work { agent: self, stored: &stored, request, operation, total: 0, done: 0 };
        work.total = work.measure(&machines, wanted, layer_bytes);
        // Layers hide what is in those below, and no disk has more than its size.
        let space = work.measure(&machines, wanted, |disk| {
            let base = disk.base.as_ref().filter(|_| work.copies_images()).map_or(0, |base| base.bytes);
            layer_bytes(disk).saturating_add(base).min(disk.virtual_bytes)
        });
        let mut folders = Folders::default();
        folders.make(&request.to)?;
        check_space(&request.to, space)?;
        let mut files = Vec::new();
        if wanted(Extract::Description) {
            let manifest = self.store.manifest_bytes(&id).map_err(store_error)?;
            files.push(work.small(Extract::Description, "manifest.json", &manifest)?);
            let file = stored.manifest.specification.to_yaml().map_err(|error| {
                ApiError::new(ErrorKind::Unsupported, format!("the environment cannot be a file: {error}"))
            })?;
            files.push(work.small(Extract::Description, "environment.yaml", file.as_bytes())?);
        }
        for machine in &machines {
            let folder = Path::new(&machine.name);
            if wanted(Extract::Memory) {
                folders.make(&request.to.join(folder))?;
                let name = match request.memory {
                    MemoryForm::Elf => "memory.elf",
                    MemoryForm::Raw => "memory.raw",
                };
                let (mut file, extracted) = work.begin(Extract::Memory, &folder.join(name), machine)?;
                work.memory(machine, &mut file)?;
                files.push((file, extracted));
            }
            if wanted(Extract::Kernels) {
                for (name, blob) in [("kernel", &machine.kernel), ("initrd", &machine.initrd)] {
                    let Some(blob) = blob else { continue };
                    folders.make(&request.to.join(folder))?;
                    let (mut file, extracted) = work.begin(Extract::Kernels, &folder.join(name), machine)?;
                    self.store.copy_blob(blob, file.file()).map_err(store_error)?;
                    work.advance(blob.bytes);
                    files.push((file, extracted));
                }
            }
            if wanted(Extract::Disks) {
                for disk in &machine.disks {
                    folders.make(&request.to.join(folder).join("disks"))?;
                    let end = match request.disks {
                        DiskForm::Qcow2 => "qcow2",
                        DiskForm::Raw => "raw",
                    };
                    let path = folder.join("disks").join(format!("{}.{end}", disk.name));
                    let (mut file, mut extracted) = work.begin(Extract::Disks, &path, machine)?;
                    extracted.backing = work.disk(machine, disk, &mut file)?;
                    extracted.disk = Some(disk.name.clone());
                    files.push((file, extracted));
                }
            }
        }
        if wanted(Extract::Frames) {
            let bytes = work.frames(&machines)?;
            files.push(work.small(Extract::Frames, "frames.pcapng", &bytes)?);
        }
        operation.check()?;
        let files = finish(files)?;
        folders.keep();
        Ok(ExtractReport { id: id.to_string(), name: stored.name, to: request.to.clone(), files })
    }
}

/// One extraction under way.
pub(crate) struct Work<'a> {
    agent: &'a Agent,
    stored: &'a Stored,
    request: &'a ExtractRequest,
    operation: &'a Operation,
    /// In bytes of parts.
    total: u64,
    done: u64,
}

/// A file that is written and not there yet, and what will be said of it.
type Written = (NewFile, ExtractedFile);

impl Work<'_> {
    /// Whether what disks have of the user's images is copied.
    fn copies_images(&self) -> bool {
        self.request.flatten || self.request.disks == DiskForm::Raw
    }

    /// How much there is of what is wanted, in bytes.
    fn measure(
        &self,
        machines: &[&MachineRecord],
        wanted: impl Fn(Extract) -> bool,
        of_disk: impl Fn(&DiskRecord) -> u64,
    ) -> u64 {
        let each = machines.iter().map(|machine| {
            let memory = if wanted(Extract::Memory) { machine.ram.used_bytes } else { 0 };
            let disks = machine.disks.iter().map(&of_disk).fold(0, u64::saturating_add);
            let disks = if wanted(Extract::Disks) { disks } else { 0 };
            let kernels = [&machine.kernel, &machine.initrd].into_iter().flatten().map(|blob| blob.bytes);
            let kernels = if wanted(Extract::Kernels) { kernels.sum() } else { 0_u64 };
            memory.saturating_add(disks).saturating_add(kernels)
        });
        each.fold(0, u64::saturating_add)
    }

    /// So many bytes of parts are done.
    fn advance(&mut self, bytes: u64) {
        self.done = self.done.saturating_add(bytes).min(self.total);
        self.operation.bytes("extracting", self.done, self.total);
    }

    fn begin(&self, what: Extract, path: &Path, machine: &MachineRecord) -> Result<Written, ApiError> {
        let (file, mut extracted) = self.file(what, path)?;
        extracted.machine = Some(machine.name.clone());
        Ok((file, extracted))
    }

    fn file(&self, what: Extract, path: &Path) -> Result<Written, ApiError> {
        self.operation.check()?;
        let file = NewFile::create(&self.request.to.join(path), self.request.force)?;
        let extracted = ExtractedFile {
            what,
            machine: None,
            disk: None,
            path: path.to_owned(),
            bytes: 0,
            allocated_bytes: 0,
            backing: None,
        };
        Ok((file, extracted))
    }

    fn small(&self, what: Extract, name: &str, bytes: &[u8]) -> Result<Written, ApiError> {
        use std::io::Write;
        let (mut file, extracted) = self.file(what, Path::new(name))?;
        file.file().write_all(bytes).map_err(|error| io_error(file.path(), &error))?;
        Ok((file, extracted))
    }
}

fn layer_bytes(disk: &DiskRecord) -> u64 {
    disk.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.bytes))
}

/// Gives all files their names.
fn finish(files: Vec<Written>) -> Result<Vec<ExtractedFile>, ApiError> {
    let mut kept: Vec<PathBuf> = Vec::new();
    let mut extracted = Vec::new();
    let mut keep = |(mut file, mut written): Written| -> Result<(), ApiError> {
        let path = file.path().to_owned();
        let metadata = file.file().metadata().map_err(|error| io_error(&path, &error))?;
        written.bytes = metadata.len();
        written.allocated_bytes = metadata.blocks() * 512;
        let replaces = file.replaces();
        file.keep()?;
        if !replaces {
            kept.push(path);
        }
        extracted.push(written);
        Ok(())
    };
    let result = files.into_iter().try_for_each(&mut keep);
    if result.is_err() {
        for path in kept {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(file = %path.display(), %error, "cannot remove what was extracted");
            }
        }
    }
    result.map(|()| extracted)
}

/// Folders that were made, from the outermost on; gone again unless they are kept.
#[derive(Debug, Default)]
struct Folders(Vec<PathBuf>);

impl Folders {
    fn make(&mut self, folder: &Path) -> Result<(), ApiError> {
        let mut missing = Vec::new();
        let mut at = Some(folder);
        while let Some(path) = at.filter(|path| std::fs::symlink_metadata(path).is_err()) {
            missing.push(path);
            at = path.parent();
        }
        for path in missing.into_iter().rev() {
            std::fs::DirBuilder::new().mode(0o700).create(path).map_err(|error| io_error(path, &error))?;
            self.0.push(path.to_owned());
        }
        Ok(())
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            // Somebody else may have put something into it.
            if let Err(error) = std::fs::remove_dir(folder) {
                tracing::warn!(folder = %folder.display(), %error, "cannot remove a folder that was made");
            }
        }
    }
}

/// The machines that are asked for, in the manifest's order.
fn chosen<'a>(stored: &'a Stored, names: &[String]) -> Result<Vec<&'a MachineRecord>, ApiError> {
    for name in names {
        if stored.manifest.machine(name).is_none() {
            let known: Vec<&str> =
                stored.manifest.machines.iter().map(|machine| machine.name.as_str()).collect();
            return Err(ApiError::new(
                ErrorKind::NotFound,
                format!("snapshot {} has no machine {name:?}", stored.id.short()),
            )
            .hint(format!("its machines are {}", known.join(", "))));
        }
    }
    let machines = stored.manifest.machines.iter();
    Ok(machines.filter(|machine| names.is_empty() || names.contains(&machine.name)).collect())
}

fn check_space(folder: &Path, needed_bytes: u64) -> Result<(), ApiError> {
    let found = nix::sys::statvfs::statvfs(folder).map_err(|error| io_error(folder, &error.into()))?;
    let free_bytes = found.blocks_available().saturating_mul(found.fragment_size());
    if free_bytes < needed_bytes {
        return Err(no_space(format!(
            "{} has {free_bytes} bytes free, and up to {needed_bytes} are needed",
            folder.display()
        )));
    }
    Ok(())
}
