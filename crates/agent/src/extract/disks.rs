//! A disk: its layers, and what is wanted of the image under them, as one image.
//!
//! First each layer's tables are read, from the top down, and every cluster of the guest's gets its place; then each
//! layer is poured once, and what has a place is written there. A cluster costs eight bytes of memory meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use diorama_api::{ApiError, DiskForm, ErrorKind};
use diorama_qemu::command_line::DiskFormat;
use diorama_qemu::qcow2::{Backing, FileBytes, Image, ImageError, ImageWriter, MAX_VIRTUAL_BYTES};
use diorama_store::{BaseRecord, DiskRecord, LayerFormat, MachineRecord};
use nix::unistd::{Whence, lseek};

use super::Work;
use super::layers::{CLUSTER_BYTES, Mapped, image_error, map};
use crate::problem::io_error;
use crate::transfer::{NewFile, attended_error};

/// A layer's cluster, and where it goes, in clusters of the file that is written.
type Place = (u32, u32);

/// What is being written.
enum Form {
    Qcow2(ImageWriter),
    /// Every cluster at its own place.
    Raw,
}

impl Form {
    /// The place of a cluster of the guest's, as a cluster of the file.
    fn place(&mut self, cluster: u32) -> u32 {
        match self {
            // A disk of 64 TiB has 2^30 clusters.
            Self::Qcow2(writer) => (writer.allocate(cluster.into()) / CLUSTER_BYTES) as u32,
            Self::Raw => cluster,
        }
    }
}

impl Work<'_> {
    /// Fills the file with a disk's image. Returns the image of the user's that it needs beside it.
    pub(super) fn disk(
        &mut self,
        machine: &MachineRecord,
        disk: &DiskRecord,
        to: &mut NewFile,
    ) -> Result<Option<PathBuf>, ApiError> {
        let name = format!("disk {} of {}", disk.name, machine.name);
        let virtual_bytes = disk.virtual_bytes;
        if virtual_bytes > MAX_VIRTUAL_BYTES {
            return Err(ApiError::new(ErrorKind::Unsupported, format!("{name} has {virtual_bytes} bytes")));
        }
        let flatten = self.copies_images();
        let base = disk.base.as_ref();
        if let Some(base) = base {
            match self.agent.check_base(base) {
                Ok(_) => {}
                Err(error) if flatten => return Err(error),
                // What is written is right all the same, as soon as the image is back.
                Err(error) => self.operation.warn(format!("{name}: {}", error.message)),
            }
        }
        let mut form = match self.request.disks {
            DiskForm::Qcow2 => Form::Qcow2(ImageWriter::new(virtual_bytes)),
            DiskForm::Raw => Form::Raw,
        };
        let mut decided = Bits::new(virtual_bytes.div_ceil(CLUSTER_BYTES));
        let mut places: Vec<Vec<Place>> = Vec::new();
        for (index, layer) in disk.layers.iter().enumerate().rev() {
            let part = layer.part(&machine.name, &disk.name, index);
            let reader = self.agent.store.reader(part);
            let mut of_layer = Vec::new();
            map(&name, layer, virtual_bytes, reader, |cluster, mapped| {
                if !decided.insert(cluster) {
                    return;
                }
                match (mapped, &mut form) {
                    (Mapped::At(at), form) => of_layer.push((at, form.place(cluster))),
                    // Where nothing is below, nothing is zeros too.
                    (Mapped::Zero, Form::Qcow2(writer)) if base.is_some() && !flatten => {
                        writer.zero(cluster.into());
                    }
                    (Mapped::Zero, _) => {}
                }
            })?;
            of_layer.sort_unstable();
            places.push(of_layer);
        }
        places.reverse();
        for (index, (layer, places)) in disk.layers.iter().zip(&places).enumerate() {
            if !places.is_empty() {
                let part = layer.part(&machine.name, &disk.name, index);
                self.pour_layer(&part, places, virtual_bytes, to)?;
            }
            self.advance(layer.bytes);
        }
        if flatten && let Some(base) = base {
            self.copy_base(&name, base, virtual_bytes, &decided, &mut form, to)?;
        }
        let path = to.path().to_owned();
        let below = base.filter(|_| !flatten);
        let file = &*to.file();
        match form {
            Form::Raw => file.set_len(virtual_bytes),
            Form::Qcow2(writer) => writer.finish(
                file,
                below.map(|base| Backing { path: &base.path, format: disk_format(base.format) }),
            ),
        }
        .map_err(|error| io_error(&path, &error))?;
        Ok(below.map(|base| base.path.clone()))
    }

    fn pour_layer(
        &self,
        part: &diorama_store::Part,
        places: &[Place],
        virtual_bytes: u64,
        to: &mut NewFile,
    ) -> Result<(), ApiError> {
        let path = to.path().to_owned();
        let file = &*to.file();
        let operation = self.operation;
        let is_raw = self.request.disks == DiskForm::Raw;
        let sink = |offset: u64, run: &[u8]| -> io::Result<()> {
            operation.check_io()?;
            let mut at = offset;
            let end = offset + run.len() as u64;
            while at < end {
                let cluster = at / CLUSTER_BYTES;
                let next = end.min((cluster + 1) * CLUSTER_BYTES);
                let bytes = &run[(at - offset) as usize..(next - offset) as usize];
                let first = places.partition_point(|place| u64::from(place.0) < cluster);
                for (_, to) in places[first..].iter().take_while(|place| u64::from(place.0) == cluster) {
                    let into = u64::from(*to) * CLUSTER_BYTES + at % CLUSTER_BYTES;
                    // A raw disk may end within a cluster.
                    let fits = if is_raw { virtual_bytes.saturating_sub(into) } else { u64::MAX };
                    let bytes = &bytes[..bytes.len().min(usize::try_from(fits).unwrap_or(usize::MAX))];
                    file.write_all_at(bytes, into)?;
                }
                at = next;
            }
            Ok(())
        };
        self.agent
            .store
            .pour(part, &path, &sink, &mut |done, _| {
                operation.bytes("extracting", self.done.saturating_add(done).min(self.total), self.total);
            })
            .map_err(|error| attended_error(operation, error))
    }

    /// Copies what no layer has decided from the image below.
    fn copy_base(
        &mut self,
        name: &str,
        base: &BaseRecord,
        virtual_bytes: u64,
        decided: &Bits,
        form: &mut Form,
        to: &mut NewFile,
    ) -> Result<(), ApiError> {
        let file = File::open(&base.path).map_err(|error| io_error(&base.path, &error))?;
        let mut below = Below::open(file, base.format).map_err(|error| image_error(name, error))?;
        let path = to.path().to_owned();
        let into = &*to.file();
        let mut buffer = vec![0; CLUSTER_BYTES as usize];
        let bytes = virtual_bytes.min(below.bytes());
        let mut cluster = 0;
        while cluster * CLUSTER_BYTES < bytes {
            if cluster % 256 == 0 {
                self.operation.check()?;
            }
            let skipped = below.data_from(cluster * CLUSTER_BYTES) / CLUSTER_BYTES;
            if skipped > cluster {
                cluster = skipped;
                continue;
            }
            let number = cluster as u32;
            let at = cluster * CLUSTER_BYTES;
            cluster += 1;
            if decided.contains(number) {
                continue;
            }
            let buffer = &mut buffer[..CLUSTER_BYTES.min(bytes - at) as usize];
            below.read(at, buffer).map_err(|error| image_error(name, error))?;
            if buffer.iter().all(|byte| *byte == 0) {
                continue;
            }
            let place = u64::from(form.place(number)) * CLUSTER_BYTES;
            into.write_all_at(buffer, place).map_err(|error| io_error(&path, &error))?;
        }
        Ok(())
    }
}

/// An image of the user's.
enum Below {
    Raw(File, u64),
    Qcow2(Box<Image<FileBytes>>),
}

impl Below {
    fn open(file: File, format: LayerFormat) -> Result<Self, ImageError> {
        match format {
            LayerFormat::Raw => {
                let bytes = file.metadata()?.len();
                Ok(Self::Raw(file, bytes))
            }
            LayerFormat::Qcow2 => Ok(Self::Qcow2(Box::new(Image::open(FileBytes::new(file)?)?))),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Raw(_, bytes) => *bytes,
            Self::Qcow2(image) => image.virtual_bytes(),
        }
    }

    /// The first offset from here on that is not known to be in a hole.
    fn data_from(&self, offset: u64) -> u64 {
        match self {
            Self::Raw(file, bytes) => match lseek(file.as_fd(), offset.cast_signed(), Whence::SeekData) {
                Ok(at) => at.cast_unsigned(),
                Err(nix::errno::Errno::ENXIO) => *bytes + CLUSTER_BYTES,
                Err(_) => offset,
            },
            Self::Qcow2(_) => offset,
        }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        match self {
            Self::Raw(file, _) => Ok(file.read_exact_at(buffer, offset)?),
            Self::Qcow2(image) => image.read(offset, buffer),
        }
    }
}

fn disk_format(format: LayerFormat) -> DiskFormat {
    match format {
        LayerFormat::Raw => DiskFormat::Raw,
        LayerFormat::Qcow2 => DiskFormat::Qcow2,
    }
}

/// A set of clusters.
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u64) -> Self {
        Self(vec![0; count.div_ceil(64) as usize])
    }

    /// Whether it was not in there yet. What is out of bounds never is.
    fn insert(&mut self, number: u32) -> bool {
        let Some(word) = self.0.get_mut(number as usize / 64) else { return false };
        let bit = 1 << (number % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn contains(&self, number: u32) -> bool {
        self.0.get(number as usize / 64).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }
}
