//! The priority of the agent's own threads and of QEMU's. Only root may raise it, and whoever is allowed to
//! (limits.conf(5)); for others nothing changes.

use diorama_qemu::process::{Policy, set_thread_policy};

/// Schedules the calling thread so; `what` it does is for the log, if it may not. Returns whether it may.
pub(crate) fn schedule_this_thread(policy: Policy, what: &'static str) -> bool {
    let thread = nix::unistd::gettid().as_raw().cast_unsigned();
    match set_thread_policy(thread, policy) {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(what, %error, "a thread keeps its priority");
            false
        }
    }
}

/// Schedules these threads so.
pub(crate) fn schedule_threads(threads: &[u32], policy: Policy) {
    for thread in threads {
        if let Err(error) = set_thread_policy(*thread, policy) {
            tracing::debug!(thread, ?policy, %error, "a thread keeps its priority");
        }
    }
}
