//! Disks: making them, stacking overlays, and keeping the stacks short.
//!
//! A disk is an optional base, which is never written, and overlays (qcow2 without a backing name in their headers:
//! the order is in the record). Only the last overlay is written. A snapshot freezes it and puts a new one on top.
//! Layers are immutable once frozen, so that snapshots and environments share them by hard links.

use std::path::{Path, PathBuf};

use diorama_api::{ApiError, ErrorKind};
use diorama_qemu::command_line::{DiskConfig, DiskLayer, file_node, format_node};
use diorama_qemu::disk::{self, DEFAULT_CLUSTER_BITS, DiskError};
use diorama_qemu::qmp::{Client, QmpError};
use diorama_topology::{Boot, Machine};
use serde_json::{Value, json};

use crate::launch::COMMAND_LIMIT;
use crate::problem::io_error;
use crate::record::{BaseRecord, DiskRecord, FormatRecord, LayerRecord};

/// The name of the disk that a machine with a disk image boots from.
pub(crate) const ROOT_DISK: &str = "root";

/// A disk as the file describes it.
pub(crate) struct Wanted<'a> {
    pub(crate) name: &'a str,
    size_bytes: Option<u64>,
    image: Option<&'a Path>,
}

/// The disks of a machine of the file, the one it boots from first.
pub(crate) fn wanted(machine: &Machine) -> Vec<Wanted<'_>> {
    let root = match &machine.boot {
        Boot::DiskImage { path } => Some(Wanted { name: ROOT_DISK, size_bytes: None, image: Some(path) }),
        _ => None,
    };
    let others = machine.disks.iter().map(|disk| Wanted {
        name: disk.name.as_str(),
        size_bytes: disk.size_bytes,
        image: disk.image.as_deref(),
    });
    root.into_iter().chain(others).collect()
}

/// Makes a new disk, or takes the one that an environment kept.
pub(crate) fn make(
    wanted: &Wanted<'_>,
    folder: &Path,
    kept: Option<&DiskRecord>,
) -> Result<DiskRecord, ApiError> {
    let base = wanted.image.map(probe).transpose()?;
    let virtual_bytes = match (&base, wanted.size_bytes) {
        (Some((_, base_bytes)), Some(size)) if size < *base_bytes => {
            return Err(ApiError::new(
                ErrorKind::Invalid,
                format!(
                    "disk {} of {size} bytes is smaller than its image ({base_bytes} bytes)",
                    wanted.name
                ),
            )
            .hint("leave its size out, or make it larger"));
        }
        (Some((_, base_bytes)), None) => *base_bytes,
        (_, Some(size)) => size,
        (None, None) => {
            return Err(ApiError::new(
                ErrorKind::Invalid,
                format!("disk {} has neither size nor image", wanted.name),
            ));
        }
    };
    let base = base.map(|(base, _)| base);
    if let Some(kept) = kept {
        if kept.virtual_bytes == virtual_bytes && kept.base == base {
            return Ok(kept.clone());
        }
        return Err(ApiError::new(
            ErrorKind::WrongState,
            format!("disk {} was kept with another size or image than the file names now", wanted.name),
        )
        .hint("`diorama down --volumes` removes the kept disks"));
    }
    let node = usize::from(base.is_some());
    let layer = new_layer(folder, wanted.name, node, virtual_bytes)?;
    Ok(DiskRecord { name: wanted.name.to_owned(), virtual_bytes, base, layers: vec![layer] })
}

/// Writes an empty overlay.
pub(crate) fn new_layer(
    folder: &Path,
    disk: &str,
    node: usize,
    virtual_bytes: u64,
) -> Result<LayerRecord, ApiError> {
    let folder = folder.join(disk);
    std::fs::create_dir_all(&folder).map_err(|error| io_error(&folder, &error))?;
    let file = folder.join(format!("{node}.qcow2"));
    disk::create_overlay(&file, virtual_bytes, DEFAULT_CLUSTER_BITS)
        .map_err(|error| disk_error(&file, &error))?;
    Ok(LayerRecord { file, node })
}

/// A disk as QEMU is told of it. Node numbers start anew with each process.
pub(crate) fn config(disk: &DiskRecord) -> DiskConfig {
    let base = disk.base.iter().map(|base| DiskLayer { path: base.path.clone(), format: base.format.into() });
    let layers = disk
        .layers
        .iter()
        .map(|layer| DiskLayer { path: layer.file.clone(), format: FormatRecord::Qcow2.into() });
    DiskConfig { name: disk.name.clone(), chain: base.chain(layers).collect() }
}

/// Numbers a disk's nodes as a new process names them.
pub(crate) fn renumber(disk: &mut DiskRecord) {
    let first = usize::from(disk.base.is_some());
    for (index, layer) in disk.layers.iter_mut().enumerate() {
        layer.node = first + index;
    }
}

/// Links a disk's frozen layers into another folder and puts an empty overlay on top.
pub(crate) fn link_and_extend(disk: &DiskRecord, folder: &Path) -> Result<DiskRecord, ApiError> {
    let target = folder.join(&disk.name);
    std::fs::create_dir_all(&target).map_err(|error| io_error(&target, &error))?;
    let mut linked = disk.clone();
    renumber(&mut linked);
    for (layer, source) in linked.layers.iter_mut().zip(&disk.layers) {
        layer.file = target.join(format!("{}.qcow2", layer.node));
        diorama_store::link_file(&source.file, &layer.file).map_err(crate::problem::store_error)?;
    }
    let node = usize::from(disk.base.is_some()) + linked.layers.len();
    linked.layers.push(new_layer(folder, &disk.name, node, disk.virtual_bytes)?);
    Ok(linked)
}

/// Checks an image of the user's.
fn probe(path: &Path) -> Result<(BaseRecord, u64), ApiError> {
    let probe = disk::probe(path)
        .and_then(|probe| probe.standalone(path))
        .map_err(|error| disk_error(path, &error))?;
    let base = BaseRecord { path: PathBuf::from(path), format: probe.format.into() };
    Ok((base, probe.virtual_size_bytes))
}

fn disk_error(path: &Path, error: &DiskError) -> ApiError {
    if let DiskError::Io { source, .. } = error {
        return io_error(path, source);
    }
    ApiError::new(ErrorKind::Invalid, error.to_string())
        .hint("`qemu-img convert -O qcow2 OLD NEW` makes a plain image of almost any other")
}

/// A cut that was broken off may have left an overlay that is active and not recorded, or one that is recorded nowhere
/// and in use by nobody: the first goes into the record, the second goes.
pub(crate) fn reconcile(monitor: &mut Client, disk: &mut DiskRecord, folder: &Path) -> Result<(), QmpError> {
    let Some(last) = disk.layers.last().map(|layer| layer.node) else { return Ok(()) };
    let next = last + 1;
    let node = format_node(&disk.name, next);
    let file = folder.join(&disk.name).join(format!("{next}.qcow2"));
    let blocks = monitor.execute("query-block", Value::Null, COMMAND_LIMIT)?;
    let is_active = blocks
        .as_array()
        .into_iter()
        .flatten()
        .any(|block| block["inserted"]["node-name"].as_str() == Some(node.as_str()));
    if is_active {
        disk.layers.push(LayerRecord { file, node: next });
        return Ok(());
    }
    for node in [node, file_node(&disk.name, next)] {
        // Most often there is no such node.
        let _ = monitor.execute("blockdev-del", json!({"node-name": node}), COMMAND_LIMIT);
    }
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(file = %file.display(), %error, "an unused overlay cannot be removed");
        }
        _ => {}
    }
    Ok(())
}
