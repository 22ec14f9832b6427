//! Threads that a cut waits for. What one of them is late, hosts are cut apart, and with the processors busy an ordinary
//! thread is late by whole time slices, whatever its niceness: that counts among the threads of one session alone where the
//! kernel groups them by session (autogroup), and each machine is a session of its own.

use diorama_qemu::process::Policy;

use crate::priority::schedule_this_thread;

/// The calling thread goes before all ordinary ones, for as long as this lives. Only root may; for others nothing changes.
#[derive(Debug)]
pub(crate) struct Urgent {
    after: Policy,
}

impl Urgent {
    /// From now on; `after` is the policy that the thread comes back to.
    pub(crate) fn begin(after: Policy) -> Self {
        schedule(Policy::First);
        Self { after }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        schedule(self.after);
    }
}

fn schedule(policy: Policy) {
    schedule_this_thread(policy, "a cut waits for it");
}
