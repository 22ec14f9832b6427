//! From the crates' precise errors to what the user reads: a kind, a message, and what to do.

use std::path::Path;

use diorama_api::{ApiError, ErrorKind};
use diorama_qemu::qmp::QmpError;
use diorama_store::{ArchiveProblem, RemoteProblem, StoreError};

use crate::dataplane::CutFailure;

/// An input or output error on a file, with advice where there is some.
pub(crate) fn io_error(path: &Path, error: &std::io::Error) -> ApiError {
    let message = format!("{}: {error}", path.display());
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => no_space(message),
        _ => ApiError::new(ErrorKind::Io, message),
    }
}

/// A full file system.
pub(crate) fn no_space(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::NoSpace, message).hint(
        "make room (`diorama snapshot rm`, `diorama down --volumes`), or set DIORAMA_HOME to a larger disk",
    )
}

/// A failure of the store.
pub(crate) fn store_error(error: StoreError) -> ApiError {
    let message = error.to_string();
    match error {
        StoreError::NoSpace { .. } => no_space(message),
        StoreError::Missing { .. } => {
            ApiError::new(ErrorKind::NotFound, message).hint("`diorama snapshot list` shows what there is")
        }
        StoreError::NotFound { near, .. } => {
            let hint = if near.is_empty() {
                "`diorama snapshot list` shows what there is".to_owned()
            } else {
                format!("did you mean {}?", near.join(", "))
            };
            ApiError::new(ErrorKind::NotFound, message).hint(hint)
        }
        StoreError::Ambiguous { matches, .. } => {
            let names: Vec<String> = matches
                .iter()
                .map(|(name, id)| if name.is_empty() { id.short() } else { format!("{name} ({})", id.short()) })
                .collect();
            ApiError::new(ErrorKind::Ambiguous, message).hint(format!("say which: {}", names.join(", ")))
        }
        StoreError::NameInUse { .. } => ApiError::new(ErrorKind::NameInUse, message)
            .hint("choose another name, or delete that one with `diorama snapshot rm`"),
        StoreError::Archive { problem, .. } => match problem {
            ArchiveProblem::NotAnArchive => ApiError::new(ErrorKind::Corrupt, message)
                .hint("`diorama export` writes files that can be imported"),
            ArchiveProblem::Version { .. } => ApiError::new(ErrorKind::Unsupported, message)
                .hint("another version of Diorama wrote it"),
            _ => ApiError::new(ErrorKind::Corrupt, message)
                .hint("nothing of it was taken in: export it once more, or copy the file again"),
        },
        StoreError::Stopped => ApiError::new(ErrorKind::Cancelled, message),
        StoreError::BadName { .. } => ApiError::new(ErrorKind::Invalid, message)
            .hint("a name has letters, digits, `.`, `_` and `-`, and starts with a letter or digit"),
        StoreError::CannotCollect { .. } => ApiError::new(ErrorKind::Corrupt, message).hint(
            "`diorama store check` says what is damaged; `diorama snapshot rm` removes a snapshot that cannot be mended",
        ),
        StoreError::Corrupt { .. } | StoreError::PartDamaged { .. } => ApiError::new(ErrorKind::Corrupt, message).hint(
            "the stored data is damaged: `diorama snapshot verify` lists everything that is wrong; another snapshot \
             may be whole",
        ),
        StoreError::KeyMissing { .. } => ApiError::new(ErrorKind::Locked, message).hint(
            "set DIORAMA_STORE_PASSPHRASE_FILE to a file that holds the passphrase, or DIORAMA_STORE_KEY_FILE to a key file; \
             at a terminal, commands ask",
        ),
        StoreError::WrongKey { .. } => ApiError::new(ErrorKind::Locked, message).hint(
            "nothing was changed; is it the passphrase or key file of this store? DIORAMA_STORE says which store it is",
        ),
        StoreError::NotEncrypted { .. } => ApiError::new(ErrorKind::Locked, message).hint(
            "if this is the store that you mean, unset DIORAMA_STORE_PASSPHRASE_FILE and DIORAMA_STORE_KEY_FILE; if you \
             left an encrypted one here, somebody has exchanged it",
        ),
        StoreError::NoStore { .. } => ApiError::new(ErrorKind::NotFound, message)
            .hint("`diorama store init --encrypt` makes one; DIORAMA_STORE says where"),
        StoreError::AlreadyAStore { .. } => ApiError::new(ErrorKind::WrongState, message).hint(
            "a store is encrypted from its beginning or never: name another folder in DIORAMA_STORE, or remove this one if \
             nothing in it is needed",
        ),
        StoreError::NoSuchKey { .. } => {
            ApiError::new(ErrorKind::NotFound, message).hint("`diorama store key list` shows what there is")
        }
        StoreError::LastKey { .. } => {
            ApiError::new(ErrorKind::WrongState, message).hint("add another with `diorama store key add` first")
        }
        StoreError::BadLocation { .. } => ApiError::new(ErrorKind::Invalid, message)
            .hint("DIORAMA_STORE is a folder or s3://BUCKET/PREFIX; README.md says which variables go with it"),
        StoreError::Remote { problem, .. } => {
            let error = ApiError::new(ErrorKind::Io, message);
            match remote_hint(problem) {
                Some(hint) => error.hint(hint),
                None => error,
            }
        }
        StoreError::SessionLost { .. } => ApiError::new(ErrorKind::Io, message)
            .hint("nothing of this snapshot is left; take it again once the store can be reached"),
        StoreError::NotAStore { .. } | StoreError::UnsupportedStore { .. } | StoreError::UnsupportedSnapshot { .. } => {
            ApiError::new(ErrorKind::Unsupported, message)
                .hint("another version of Diorama wrote this, or DIORAMA_HOME is not what you think")
        }
        _ => ApiError::new(ErrorKind::Io, message),
    }
}

/// What to do about a server that does not do what it is asked.
fn remote_hint(problem: RemoteProblem) -> Option<&'static str> {
    Some(match problem {
        RemoteProblem::Unreachable | RemoteProblem::Silent => {
            "is AWS_ENDPOINT_URL right, and does the server run? Machines run on meanwhile; `diorama doctor` tries again"
        }
        RemoteProblem::Failing => "look at the server; machines run on meanwhile",
        RemoteProblem::NoBucket => {
            "make the bucket with the server's own tools, or name another in DIORAMA_STORE"
        }
        RemoteProblem::NoCredentials => "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        RemoteProblem::Denied => {
            "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right, and may they read, write, list and delete in this \
             bucket? An agent keeps the ones it was started with: `diorama agent stop`"
        }
        RemoteProblem::Unconditional => {
            "use a server that knows them: Amazon S3, MinIO, Ceph, Cloudflare R2 and SeaweedFS do in their present versions"
        }
        RemoteProblem::Misconfigured => "README.md says which variables are used",
        _ => return None,
    })
}

/// A failure of a QEMU monitor.
pub(crate) fn qmp_error(machine: &str, error: &QmpError) -> ApiError {
    let error = ApiError::new(ErrorKind::Machine, format!("machine {machine}: {error}"));
    error.hint("`diorama status` shows whether it still runs; its QEMU log is in the environment's folder")
}

/// A cut that was undone.
pub(crate) fn cut_error(failure: &CutFailure) -> ApiError {
    let kind = match failure {
        CutFailure::MonitorClosed { .. } => ErrorKind::Machine,
        CutFailure::Busy => ErrorKind::Busy,
        _ => ErrorKind::CutFailed,
    };
    ApiError::new(kind, failure.to_string()).hint(
        "nothing of this snapshot remains, and the machines that live run on; `diorama status` shows them",
    )
}
