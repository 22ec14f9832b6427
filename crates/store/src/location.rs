//! Where a store is: what a user names, and the backend that this means.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::Backend;
use crate::backend::folder::Folder;
use crate::backend::s3::{S3, S3Settings};
use crate::error::StoreError;
use crate::files;
use crate::root::{FORMAT_BYTES_MAX, FORMAT_KEY};

/// Where a store is.
#[derive(Debug, Clone)]
pub enum Location {
    /// A folder, which is made where it is not there.
    Folder(PathBuf),
    /// A bucket, or what begins with a prefix in one.
    S3(Box<S3Settings>),
}

impl Location {
    /// What a user has written: `s3://BUCKET` or `s3://BUCKET/PREFIX`, or the path of a folder. `variable` says what an
    /// environment variable holds: endpoint and credentials of S3 are in those that its tools share.
    ///
    /// # Errors
    /// When it looks like an URL and is none of these, or a variable makes no sense.
    pub fn parse(
        text: impl AsRef<OsStr>,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, StoreError> {
        let text = text.as_ref();
        let Some((scheme, _)) = text.to_str().and_then(|text| text.split_once("://")) else {
            return Ok(Self::Folder(text.into()));
        };
        match scheme {
            "s3" => S3Settings::parse(text.to_str().unwrap_or_default(), variable).map(Self::from),
            _ => Err(StoreError::BadLocation {
                location: text.to_string_lossy().into_owned(),
                problem: "it is neither s3://BUCKET/PREFIX nor a folder",
            }),
        }
    }

    /// The backend that is there. A folder is made where it is not there; of a server nothing is asked yet.
    ///
    /// # Errors
    /// When the folder cannot be made, or the settings make no sense.
    pub fn backend(&self) -> Result<Arc<dyn Backend>, StoreError> {
        Ok(match self {
            Self::Folder(path) => {
                files::create_folders(path)?;
                Arc::new(Folder::open(path)?)
            }
            Self::S3(settings) => Arc::new(S3::open(settings)?),
        })
    }

    /// Whether there is a store, of whatever version. Makes nothing.
    ///
    /// # Errors
    /// When the place cannot be reached.
    pub fn has_store(&self) -> Result<bool, StoreError> {
        match self {
            Self::Folder(path) => Ok(path.join(FORMAT_KEY).is_file()),
            Self::S3(settings) => Ok(S3::open(settings)?.read(FORMAT_KEY, FORMAT_BYTES_MAX)?.is_some()),
        }
    }

    /// Looks whether the place can be reached, and changes nothing.
    ///
    /// # Errors
    /// When it cannot.
    pub fn reach(&self) -> Result<(), StoreError> {
        match self {
            Self::Folder(path) => {
                std::fs::read_dir(path).map(drop).map_err(|e| StoreError::io("list", path, e))
            }
            Self::S3(settings) => S3::open(settings)?.list("").map(drop),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::S3(settings) => write!(f, "{settings}"),
        }
    }
}

impl From<S3Settings> for Location {
    fn from(settings: S3Settings) -> Self {
        Self::S3(Box::new(settings))
    }
}

/// What says where a store is: a location, or the path of a folder.
pub trait AsLocation {
    /// The location.
    fn as_location(&self) -> Location;
}

impl AsLocation for Location {
    fn as_location(&self) -> Location {
        self.clone()
    }
}

impl AsLocation for Path {
    fn as_location(&self) -> Location {
        Location::Folder(self.to_owned())
    }
}

impl AsLocation for PathBuf {
    fn as_location(&self) -> Location {
        Location::Folder(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Location, StoreError> {
        Location::parse(text, &|name| match name {
            "AWS_ENDPOINT_URL" => Some("http://127.0.0.1:9000/".to_owned()),
            "AWS_SECRET_ACCESS_KEY" => Some("very secret".to_owned()),
            _ => None,
        })
    }

    #[test]
    fn folders_and_buckets_are_told_apart() {
        for path in ["/srv/store", "store", "s3:/x", "./s3"] {
            assert!(
                matches!(parse(path), Ok(Location::Folder(folder)) if folder == Path::new(path)),
                "{path}"
            );
        }
        for (text, shown) in [
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3://my.bucket-1/some/prefix/", "s3://my.bucket-1/some/prefix"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), shown);
        }
        for bad in [
            "s3://",
            "s3:///prefix",
            "s3://UPPER",
            "s3://b/a//b",
            "s3://b/..",
            "s3://bucket/a b",
            "gs://bucket",
            "http://x/y",
        ] {
            assert!(matches!(parse(bad), Err(StoreError::BadLocation { .. })), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", parse("s3://bucket/prefix").unwrap());
        assert!(!shown.contains("very secret") && shown.contains("http://127.0.0.1:9000"), "{shown}");
    }
}
