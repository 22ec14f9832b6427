//! Steps at which a debug build of the agent can be made to die or to wait: tests of what is left then, and of what happens
//! meanwhile, hit a state for certain and not by chance. Release builds have none of it.
//!
//! The variable `DIORAMA_FAILPOINT` names a file, which a test writes: `kill STEP` or `wait STEP`. The agent that reaches the
//! step renames the file, adding `.reached`. Then it kills itself, or waits until that file is gone.

/// The agent is at a step. They are named after the protocol's states: `participant prepared`, `initiator writing`, …
#[cfg(not(debug_assertions))]
pub(crate) fn reach(_step: std::fmt::Arguments<'_>) {}

/// The agent is at a step. They are named after the protocol's states: `participant prepared`, `initiator writing`, …
#[cfg(debug_assertions)]
pub(crate) fn reach(step: std::fmt::Arguments<'_>) {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let Some(file) = FILE.get_or_init(|| std::env::var_os("DIORAMA_FAILPOINT").map(PathBuf::from)) else {
        return;
    };
    let Ok(text) = std::fs::read_to_string(file) else { return };
    let Some((what, wanted)) = text.trim().split_once(' ') else { return };
    if wanted != step.to_string() {
        return;
    }
    let reached = file.with_extension("reached");
    if std::fs::rename(file, &reached).is_err() {
        // Another thread was there first.
        return;
    }
    tracing::warn!(what, step = wanted, "a failpoint is reached");
    if what == "kill" {
        // As by power that is cut: nothing is flushed, nobody is told.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        // The signal may go to another thread first; this one does nothing more.
        loop {
            std::thread::park();
        }
    }
    while reached.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
