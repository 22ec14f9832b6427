//! A process that outlives the agent by as long as a live capture takes.
//!
//! A live capture has to be read to its end, or its machine may stop for ever (see [`crate::capture`]). So while an
//! agent captures live, a small process of the same program holds a copy of each capture's socket. It reads nothing while
//! the agent lives. When the agent is done it says so, and the process ends; when the agent dies it falls silent, and the
//! process reads every capture to its end, throws the bytes away, and ends.
//!
//! It costs one process for the time of a snapshot, and needs no privilege.

use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::capture::read_out;

/// Said by an agent that has read its captures itself.
const DONE: u8 = b'd';
/// Said with each socket.
const SOCKET: u8 = b's';
/// More captures than a snapshot has machines.
const CAPTURES_MAX: usize = 4096;

/// The agent's side: dropping it says that all captures have been read.
#[derive(Debug)]
pub(crate) struct Keeper {
    socket: UnixStream,
    process: Child,
}

impl Keeper {
    /// Starts the process.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // The program as it runs, also when its file has been replaced since.
        let process = Command::new("/proc/self/exe")
            .args(["agent", "keep-captures"])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            // What is sent to the agent's process group must not end this.
            .process_group(0)
            .spawn()?;
        Ok(Self { socket: ours, process })
    }

    /// Gives it a copy of a capture's socket.
    pub(crate) fn keep(&self, capture: &UnixStream) -> std::io::Result<()> {
        let fds = [capture.as_raw_fd()];
        let data = [std::io::IoSlice::new(&[SOCKET])];
        let rights = [ControlMessage::ScmRights(&fds)];
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &data, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        if sent == 1 { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // If it has ended by itself there is nothing left to tell it.
        let _ = (&self.socket).write_all(&[DONE]);
        if let Err(error) = self.process.wait() {
            tracing::warn!(%error, "the process that keeps captures was lost");
        }
    }
}

/// The process itself: takes sockets from standard input until the agent is done or dead.
///
/// # Errors
/// When standard input is not the agent's socket.
pub fn keep_captures() -> std::io::Result<()> {
    let agent = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut captures = Vec::new();
    loop {
        let mut byte = [0];
        let mut room = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let mut data = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(agent.as_raw_fd(), &mut data, Some(&mut room), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for rights in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = rights {
                // SAFETY: the kernel has just made these descriptors for us, and nothing else knows them.
                captures
                    .extend(fds.into_iter().map(|fd| UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) })));
            }
        }
        let bytes = message.bytes;
        match bytes {
            0 => break,
            _ if byte[0] == DONE => return Ok(()),
            _ if captures.len() > CAPTURES_MAX => return Err(std::io::ErrorKind::InvalidInput.into()),
            _ => {}
        }
    }
    let readers: Vec<_> =
        captures.into_iter().map(|mut capture| std::thread::spawn(move || read_out(&mut capture))).collect();
    for reader in readers {
        // One that failed has nobody to tell.
        let _ = reader.join();
    }
    Ok(())
}
