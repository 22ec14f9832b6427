//! The agent itself, and what this computer can do.

use serde::{Deserialize, Serialize};

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// Diorama's version.
    pub version: String,
    /// The agent's process.
    pub pid: u32,
    /// The host's name.
    pub host: String,
    /// How many environments run.
    pub environments: u32,
    /// What the user should know of this host's cluster: that it was left, or cannot be reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Stop the agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopAgentRequest {
    /// Stop although environments run: their machines run on without a network until the next command.
    #[serde(default)]
    pub force: bool,
}

/// What this computer can do: `diorama doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// Whether environments can run here at all.
    pub ok: bool,
    /// Each thing looked at.
    pub checks: Vec<DoctorCheck>,
}

/// One thing that `doctor` looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorCheck {
    /// A short name: `qemu`, `kvm`, `userfaultfd`, …
    pub name: String,
    /// How it stands.
    pub status: CheckStatus,
    /// What was found.
    pub found: String,
    /// How to mend it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// How a check stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Works, but something is slower or missing.
    Warning,
    /// Environments cannot run.
    Failed,
}
