//! The lines of an event stream.

use serde::{Deserialize, Serialize};

use crate::ApiError;

/// One line of an event stream; `T` is the operation's report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event<T> {
    /// Something moved on.
    Progress(Progress),
    /// Something that the user should know, but that does not stop the operation.
    Warning {
        /// What, and what to do about it.
        message: String,
    },
    /// The last line: the operation is done.
    Done {
        /// The operation's report.
        result: T,
    },
    /// The last line: the operation failed and was undone.
    Failed {
        /// Why.
        error: ApiError,
    },
}

/// How far one step of an operation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The step, in words for people: `preparing`, `cutting`, `storing memory`, …
    pub step: String,
    /// Units done, where the step can be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<u64>,
    /// Units in all, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// What is counted.
    #[serde(default)]
    pub unit: ProgressUnit,
}

/// What a [`Progress`] counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProgressUnit {
    /// Machines, files, items.
    #[default]
    Items,
    /// Bytes.
    Bytes,
}
