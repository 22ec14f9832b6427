//! When a guest waits for a page: another process's userfaultfd descriptors, to be polled and nothing else.
//!
//! While QEMU captures a running machine, whoever writes to a page that is not saved yet waits, and the descriptor that QEMU
//! has of it is readable (userfaultfd(2)) until its capture thread takes notice.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::process::ProcessId;

/// What `/proc/PID/fd` calls such a descriptor.
const LINK: &str = "anon_inode:[userfaultfd]";

/// The descriptors through which a process hears of its page faults. Polling them disturbs nothing.
#[derive(Debug, Default)]
pub struct Userfaults(Vec<OwnedFd>);

impl Userfaults {
    /// Those that the process has now. They are to be dropped with the capture: while one is open, what it protects may stay so.
    ///
    /// # Errors
    /// What the kernel says: this process may not trace that one (pidfd_getfd(2), ptrace(2)), or the kernel is older than 5.6.
    pub fn of(process: ProcessId) -> io::Result<Self> {
        let pidfd = process.pidfd().map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid))? {
            let path = entry?.path();
            // One that has been closed meanwhile is none.
            if !std::fs::read_link(&path).is_ok_and(|link| link == Path::new(LINK)) {
                continue;
            }
            let number: Option<RawFd> = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let Some(number) = number {
                found.push(duplicate(&pidfd, number)?);
            }
        }
        Ok(Self(found))
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Waits until somebody waits for a page, for at most `limit`. Returns whether somebody does.
    pub fn wait(&self, limit: Duration) -> bool {
        let mut polls: Vec<_> = self.0.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        // Interrupted, or an error: as if the time were over.
        ppoll(&mut polls, Some(TimeSpec::from_duration(limit)), None).unwrap_or(0) > 0
            && polls
                .iter()
                .any(|poll| poll.revents().is_some_and(|events| events.contains(PollFlags::POLLIN)))
    }
}

fn duplicate(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes numbers only.
    let copy = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_process_without_them_has_none_and_the_time_passes() {
        let me = ProcessId::of(std::process::id()).expect("readable").expect("this process is there");
        let faults = Userfaults::of(me).expect("one's own");
        assert!(faults.is_empty());
        let began = Instant::now();
        assert!(!faults.wait(Duration::from_millis(5)));
        assert!(began.elapsed() >= Duration::from_millis(5));
    }
}
