//! A monitor's command of a cut, most of which QEMU has read before its time comes.
//!
//! QEMU takes its monitor's bytes one at a time, each with several system calls: about 10 µs a byte, so 3 ms for the
//! pivot of one disk, within the pause. A command takes effect with its last closing brace. So all but that is sent while
//! the machine runs, and one byte when it must happen.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use diorama_qemu::qmp::{Parts, encode};
use serde_json::Value;

/// How long QEMU may take to read what is sent beforehand; what it has not read by then it reads later.
const READ_BOUND: Duration = Duration::from_millis(50);
const READ_POLL: Duration = Duration::from_micros(200);

/// Which of a machine's two monitors for cuts. Each takes one command at a time, the next only when that is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Monitor {
    /// Stops and resumes the machine, and tells what happens to it.
    Cut,
    /// Pivots its disks.
    Pivot,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) id: u64,
    pub(crate) monitor: Monitor,
    /// What is still to be sent.
    rest: Vec<u8>,
}

impl Command {
    /// A command of which nothing is sent yet.
    pub(crate) fn new(parts: &mut Parts, monitor: Monitor, name: &'static str, arguments: Value) -> Self {
        let id = parts.next_id;
        parts.next_id += 1;
        Self { name, id, monitor, rest: encode(id, name, arguments) }
    }

    /// Sends all but the end. No other command may be sent on that monitor before [`Command::finish`].
    pub(crate) fn announce(&mut self, parts: &Parts) -> std::io::Result<()> {
        let end = self.rest.iter().rposition(|byte| *byte == b'}').unwrap_or(0);
        let (beginning, end) = self.rest.split_at(end);
        write_whole(&parts.stream, beginning)?;
        self.rest = end.to_vec();
        Ok(())
    }

    /// Sends what is left.
    pub(super) fn finish(&self, parts: &Parts) -> std::io::Result<()> {
        write_whole(&parts.stream, &self.rest)
    }
}

/// Waits until QEMU has read what was announced.
pub(crate) fn wait_until_read(parts: &Parts) {
    let deadline = Instant::now() + READ_BOUND;
    while !is_read(&parts.stream) && Instant::now() < deadline {
        std::thread::sleep(READ_POLL);
    }
}

/// Whether the other side has read everything that was written to a socket.
pub(super) fn is_read(stream: &UnixStream) -> bool {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ writes one int through the pointer; the socket is open while it is borrowed.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    result == 0 && bytes == 0
}

/// Writes without waiting: the monitor's socket is as good as empty, so it takes a command whole.
fn write_whole(mut stream: &UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    let written = stream.write(bytes)?;
    if written == bytes.len() { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use diorama_qemu::qmp::Decoder;

    use super::*;

    #[test]
    fn an_announced_command_lacks_one_brace() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut parts = Parts { stream: ours, decoder: Decoder::new(), events: Vec::new(), next_id: 7 };
        let arguments = serde_json::json!({"actions": [{"a": "}"}]});
        let mut command = Command::new(&mut parts, Monitor::Pivot, "transaction", arguments);
        assert_eq!((command.id, parts.next_id), (7, 8));
        let whole = command.rest.clone();
        command.announce(&parts).unwrap();
        assert!(!is_read(&parts.stream));
        let mut bytes = vec![0; 4096];
        let length = theirs.read(&mut bytes).unwrap();
        assert!(is_read(&parts.stream));
        assert!(serde_json::from_slice::<Value>(&bytes[..length]).is_err(), "not a command yet");
        command.finish(&parts).unwrap();
        let length = length + theirs.read(&mut bytes[length..]).unwrap();
        assert_eq!(bytes[..length], whole);
        assert_eq!(serde_json::from_slice::<Value>(&bytes[..length]).unwrap()["execute"], "transaction");
    }
}
