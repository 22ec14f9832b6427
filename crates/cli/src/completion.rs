//! Names that a shell can complete: asks the agent if one runs, and proposes nothing otherwise. Never starts one, never
//! waits long, never prints.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::time::Duration;

use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use diorama_api::{Client, ClientError, Folders};

/// The variable by which the shell's script asks this program for completions.
pub const VARIABLE: &str = "DIORAMA_COMPLETE";

/// How long a user who pressed Tab may wait.
const DEADLINE: Duration = Duration::from_millis(300);

/// Environments' names.
pub fn environments() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        candidates(typed, async |client| {
            let environments = client.environments().await?;
            Ok(environments.into_iter().map(|environment| environment.name.to_string()).collect())
        })
    })
}

/// Machines' names, of all environments: which one is meant stands elsewhere on the line.
pub fn machines() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        candidates(typed, async |client| {
            let environments = client.environments().await?;
            Ok(environments.into_iter().flat_map(|e| e.machines).map(|machine| machine.name).collect())
        })
    })
}

/// Snapshots' names.
pub fn snapshots() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        candidates(typed, async |client| {
            Ok(client.snapshots().await?.snapshots.into_iter().map(|snapshot| snapshot.name).collect())
        })
    })
}

fn candidates(
    typed: &OsStr,
    ask: impl AsyncFnOnce(Client) -> Result<BTreeSet<String>, ClientError>,
) -> Vec<CompletionCandidate> {
    let names = || {
        let client = Client::new(&Folders::from_process().ok()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        runtime.block_on(async { tokio::time::timeout(DEADLINE, ask(client)).await.ok()?.ok() })
    };
    let typed = typed.to_string_lossy();
    names()
        .unwrap_or_default()
        .into_iter()
        .filter(|name| name.starts_with(&*typed) && !name.contains(char::is_control))
        .map(CompletionCandidate::new)
        .collect()
}
