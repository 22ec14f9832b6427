//! Bytes between the agent and what only this process has: its standard input or output, a named pipe, a device.
//!
//! The agent is told of a unix socket in the runtime folder, connects to it, and this passes bytes on. Invariant: when
//! the command ends, whichever way, the socket is gone, by which the agent learns of it.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use diorama_api::{ErrorKind, Folders, Stream};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;

use crate::failure::Failure;

/// What stands for standard input or output.
pub const STANDARD: &str = "-";

/// Whether a file of this name is for this process to open: the agent may see another one by the name, or none.
pub fn is_own(path: &Path) -> bool {
    path == Path::new(STANDARD)
        || std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// A socket that the agent is to connect to.
#[derive(Debug)]
pub struct Pipe {
    path: PathBuf,
    listener: UnixListener,
}

impl Pipe {
    /// Listens. Within an event loop.
    ///
    /// # Errors
    /// When there can be no socket.
    pub fn new(folders: &Folders) -> Result<Self, Failure> {
        let path = folders.runtime().join(format!("pipe-{}.sock", std::process::id()));
        // One that a process of the same number has left.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .map_err(|error| Failure::io(format!("cannot listen on {}: {error}", path.display())))?;
        Ok(Self { path, listener })
    }

    /// What the agent is told.
    pub fn stream(&self) -> Stream {
        Stream::Socket(self.path.clone())
    }

    /// Passes on what the agent writes, until it closes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn pour_into(&self, mut to: impl AsyncWrite + Unpin) -> Result<(), Failure> {
        // An agent that goes away says so in its answer.
        let Ok((mut agent, _)) = self.listener.accept().await else { return Ok(()) };
        let copied = async {
            tokio::io::copy(&mut agent, &mut to).await?;
            to.flush().await
        };
        copied.await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::NobodyReads,
            _ => Failure::io(format!("cannot write the export: {error}")),
        })
    }

    /// Gives the agent what there is to read.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn pour_out_of(&self, mut from: impl AsyncRead + Unpin) -> Result<(), Failure> {
        use tokio::io::AsyncReadExt;
        let Ok((mut agent, _)) = self.listener.accept().await else { return Ok(()) };
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = from
                .read(&mut buffer)
                .await
                .map_err(|error| Failure::io(format!("cannot read the export: {error}")))?;
            // An agent that does not want more says why in its answer.
            if read == 0 || agent.write_all(&buffer[..read]).await.is_err() {
                let _ = agent.shutdown().await;
                return Ok(());
            }
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // Nothing is left to do if it is gone.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// This process's standard output.
///
/// # Errors
/// When it is closed.
pub fn standard_output() -> Result<File, Failure> {
    own(io::stdout().as_fd())
}

/// This process's standard input.
///
/// # Errors
/// When it is closed.
pub fn standard_input() -> Result<File, Failure> {
    own(io::stdin().as_fd())
}

fn own(descriptor: BorrowedFd<'_>) -> Result<File, Failure> {
    let owned = descriptor.try_clone_to_owned();
    let owned = owned.map_err(|error| Failure::io(format!("a standard stream cannot be used: {error}")))?;
    Ok(File::from_std(owned.into()))
}

/// Refuses to fill a terminal with bytes.
///
/// # Errors
/// When standard output is one.
pub fn refuse_terminal() -> Result<(), Failure> {
    if io::stdout().is_terminal() {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "an export is not for a terminal",
            "name a file with --output, or send standard output into one",
        ));
    }
    Ok(())
}
