//! What a disk's layers map where, read from the store.

use std::io;

use diorama_api::{ApiError, ErrorKind};
use diorama_qemu::qcow2::{Cluster, Image, ImageError, ReadAt};
use diorama_store::{LayerFormat, LayerRecord, PartReader, StoreError};

use crate::problem::store_error;

/// Layers and images that are made have clusters of this size, which is also the store's.
pub(crate) const CLUSTER_BYTES: u64 = diorama_store::CLUSTER_BYTES;

/// What a layer has at a guest's cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// Zeros, whatever is below.
    Zero,
    /// The cluster of this number in the layer's file.
    At(u32),
}

/// A layer as bytes at offsets.
#[derive(Debug)]
pub(crate) struct Layer(pub(crate) PartReader);

impl ReadAt for Layer {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer).map_err(io::Error::other)
    }

    fn length(&self) -> u64 {
        self.0.bytes()
    }
}

/// Calls `visit` with each of the guest's clusters that a layer has, in order.
pub(crate) fn map(
    name: &str,
    layer: &LayerRecord,
    virtual_bytes: u64,
    reader: PartReader,
    mut visit: impl FnMut(u32, Mapped),
) -> Result<(), ApiError> {
    if layer.format == LayerFormat::Raw {
        // As many as fit a number: a layer has at most 64 TiB.
        for cluster in 0..layer.bytes.min(virtual_bytes).div_ceil(CLUSTER_BYTES) {
            visit(cluster as u32, Mapped::At(cluster as u32));
        }
        return Ok(());
    }
    let mut image = open(name, virtual_bytes, reader)?;
    image
        .each_cluster(|cluster, found| {
            visit(cluster as u32, mapped(name, found)?);
            Ok(())
        })
        .map_err(|error: LayerError| error.into_api(name))
}

/// A layer's tables.
pub(crate) fn open(name: &str, virtual_bytes: u64, reader: PartReader) -> Result<Image<Layer>, ApiError> {
    let image = Image::open(Layer(reader)).map_err(|error| image_error(name, error))?;
    if image.cluster_bytes() != CLUSTER_BYTES || image.virtual_bytes() != virtual_bytes {
        return Err(ApiError::new(
            ErrorKind::Unsupported,
            format!(
                "{name} has {} bytes in clusters of {}, where {virtual_bytes} in clusters of {CLUSTER_BYTES} are expected",
                image.virtual_bytes(),
                image.cluster_bytes()
            ),
        ));
    }
    Ok(image)
}

/// What is at a cluster of the guest's; none where what is below shows.
pub(crate) fn at(name: &str, image: &mut Image<Layer>, cluster: u32) -> Result<Option<Mapped>, ApiError> {
    match image.at(cluster.into()).map_err(|error| image_error(name, error))? {
        Cluster::Unallocated => Ok(None),
        found => mapped(name, found).map(Some).map_err(|error| error.into_api(name)),
    }
}

fn mapped(name: &str, found: Cluster) -> Result<Mapped, LayerError> {
    match found {
        Cluster::Zero | Cluster::Unallocated => Ok(Mapped::Zero),
        // Within a file of at most 64 TiB, or past its end.
        Cluster::Data { offset } => Ok(Mapped::At(u32::try_from(offset / CLUSTER_BYTES).unwrap_or(u32::MAX))),
        Cluster::Compressed { .. } => Err(LayerError::Api(ApiError::new(
            ErrorKind::Unsupported,
            format!("{name} has compressed clusters, which no machine writes"),
        ))),
    }
}

enum LayerError {
    Image(ImageError),
    Api(ApiError),
}

impl From<ImageError> for LayerError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl LayerError {
    fn into_api(self, name: &str) -> ApiError {
        match self {
            Self::Image(error) => image_error(name, error),
            Self::Api(error) => error,
        }
    }
}

/// Damage in the store keeps its own words.
pub(crate) fn image_error(name: &str, error: ImageError) -> ApiError {
    match error {
        ImageError::Io(error) => match error.downcast::<StoreError>() {
            Ok(error) => store_error(error),
            Err(error) => ApiError::new(ErrorKind::Io, format!("{name}: {error}")),
        },
        ImageError::Unsupported { .. } => ApiError::new(ErrorKind::Unsupported, format!("{name}: {error}"))
            .hint("`qemu-img convert -O qcow2 OLD NEW` makes a plain image of almost any other"),
        _ => ApiError::new(ErrorKind::Corrupt, format!("{name}: {error}")),
    }
}
