//! Errors as they cross the process boundary.

use serde::{Deserialize, Serialize};

/// What kind of failure an [`ApiError`] is; scripts match on these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// A named environment, machine or snapshot does not exist.
    NotFound,
    /// A name could mean several things.
    Ambiguous,
    /// A name is taken.
    NameInUse,
    /// Another operation holds the environment.
    Busy,
    /// The environment or machine is not in a state that allows this.
    WrongState,
    /// The request itself is wrong.
    Invalid,
    /// The environment file is wrong.
    EnvironmentFile,
    /// A program, device or permission that is needed is missing.
    Unsupported,
    /// A QEMU process failed or died.
    Machine,
    /// A guest did not answer through its agent.
    Guest,
    /// The cut failed and was undone; the machines run on.
    CutFailed,
    /// Stored data is damaged or missing.
    Corrupt,
    /// The store is encrypted, and what was given, or nothing, does not open it.
    Locked,
    /// Nobody who is trusted has signed the snapshot.
    Untrusted,
    /// A disk or memory file system is full.
    NoSpace,
    /// The operation was cancelled and undone.
    Cancelled,
    /// The agent cannot be reached or started.
    Agent,
    /// The operating system refused something.
    Io,
    /// A defect of Diorama.
    Internal,
}

/// A failure: what happened, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The class of failure.
    pub kind: ErrorKind,
    /// What happened, with the values involved.
    pub message: String,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The same error with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The body of an error response, and what `--json` prints: `{"error": {…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The failure.
    pub error: ApiError,
}
