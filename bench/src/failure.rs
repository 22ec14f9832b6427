//! Why a benchmark could not measure.

use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("`{command}` failed: {reason}")]
    Command { command: String, reason: String },
    #[error("`{command}` did not print what was expected of it: {reason}")]
    Output { command: String, reason: String },
    #[error("there is no {}: `make build images` makes it, DIORAMA names another", .0.display())]
    NoBinary(PathBuf),
    #[error("{0} did not happen within {1} seconds")]
    TooLate(String, u64),
    #[error("machine {machine}: {problem}")]
    Guest { machine: String, problem: String },
    #[error("{0} needs root")]
    NeedsRoot(&'static str),
    #[error("the switch under test passed no frame within a second")]
    NoFrames,
    #[error("the store: {0}")]
    Store(#[from] diorama_store::StoreError),
    #[error("what `diorama` printed as a snapshot's id: {0}")]
    Id(#[from] diorama_store::ParseIdError),
    #[error("the key: {0}")]
    Secret(#[from] diorama_store::SecretError),
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// For `map_err`: an error of the operating system while doing `what`.
    pub(crate) fn io<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }
}
