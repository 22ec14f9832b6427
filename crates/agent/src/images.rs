//! Built-in images: finding them, and what they boot with.

use std::path::{Path, PathBuf};

use diorama_api::{ApiError, ErrorKind, Folders};
use serde::Deserialize;

/// The images that Diorama brings itself.
pub const BUILT_IN_IMAGES: &[&str] = &["micro"];

/// A built-in image on this computer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) cmdline: String,
}

#[derive(Deserialize)]
struct Description {
    kernel: PathBuf,
    initrd: PathBuf,
    cmdline: String,
}

/// Finds a built-in image in the folders' image folders.
pub(crate) fn find(folders: &Folders, name: &str) -> Result<Image, ApiError> {
    let candidates = folders.image_folders();
    for folder in &candidates {
        let folder = folder.join(name);
        let description = folder.join("image.json");
        match std::fs::read(&description) {
            Ok(text) => return read(&folder, &description, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(ApiError::new(ErrorKind::Io, format!("{}: {error}", description.display())));
            }
        }
    }
    let looked: Vec<String> =
        candidates.iter().map(|folder| folder.join(name).display().to_string()).collect();
    Err(ApiError::new(
        ErrorKind::Unsupported,
        format!("the built-in image `{name}` is not there (looked in {})", looked.join(", ")),
    )
    .hint("build it with `make images` in Diorama's source folder, or install Diorama with `make install`"))
}

fn read(folder: &Path, file: &Path, text: &[u8]) -> Result<Image, ApiError> {
    let description: Description = serde_json::from_slice(text).map_err(|error| {
        ApiError::new(ErrorKind::Corrupt, format!("{}: {error}", file.display()))
            .hint("build the image again with `make images`")
    })?;
    let image = Image {
        kernel: folder.join(description.kernel),
        initrd: folder.join(description.initrd),
        cmdline: description.cmdline,
    };
    for part in [&image.kernel, &image.initrd] {
        if !part.is_file() {
            return Err(ApiError::new(ErrorKind::Corrupt, format!("{} is missing", part.display()))
                .hint("build the image again with `make images`"));
        }
    }
    Ok(image)
}
