//! Connections to a machine's network interfaces, one Unix socket each (`-netdev stream`).

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::qmp::{Client, QmpError};

/// How often a socket is looked for that QEMU is about to make.
const POLL: Duration = Duration::from_millis(1);

/// Why interfaces could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// Its socket is not there, or refuses.
    #[error("the network interface's socket {} cannot be connected: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The monitor did not say that they are connected.
    #[error(transparent)]
    Monitor(#[from] QmpError),
}

/// Connects all of a machine's interfaces, in this order. The machine must not have run yet, and nobody may have connected one.
///
/// The kernel accepts before QEMU does, and QEMU 7.2 crashes when it has a frame to send before its `-netdev stream` has so much as
/// begun to listen in its own eyes (a low-priority callback that a busy computer delays past `cont`): so this waits until QEMU says
/// that it knows.
///
/// # Errors
/// When a socket does not take a connection by the deadline, also since QEMU has ended; and what the monitor says.
pub fn connect(
    sockets: &[PathBuf],
    monitor: &mut Client,
    deadline: Instant,
) -> Result<Vec<UnixStream>, NicError> {
    let nics = sockets.iter().map(|path| connect_one(path, deadline)).collect::<Result<Vec<_>, _>>()?;
    for _ in &nics {
        monitor.wait_event(&["NETDEV_STREAM_CONNECTED"], deadline)?;
    }
    Ok(nics)
}

/// QEMU binds and listens in a thread of its own and announces it nowhere, so it is tried until then.
fn connect_one(path: &Path, deadline: Instant) -> Result<UnixStream, NicError> {
    loop {
        match UnixStream::connect(path) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(POLL);
            }
            result => {
                return result.map_err(|source| NicError::Socket { path: path.to_owned(), source });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_does_not_come_is_an_error() {
        let path = tempfile::tempdir().expect("folder").path().join("nic");
        let error = connect_one(&path, Instant::now() + Duration::from_millis(20)).expect_err("no socket");
        assert!(error.to_string().contains("/nic cannot be connected: No such file"), "{error}");
    }
}
