//! One port's socket to QEMU's `-netdev stream`.
//!
//! States: *connected* (a stream, and what was read of the next frame), or *down* (no stream; frames owed to
//! the port are dropped as `no_receiver`).

use std::io::{ErrorKind, IoSlice, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use diorama_switch::{FrameReader, LENGTH_BYTES, MAX_STREAM_FRAME, PortId, StreamError, Switch, Time};

/// How much is read of a socket at once, in bytes.
const READ_BYTES: usize = 512 * 1024;
/// The longest frame with its length prefix that can be left over between two reads, in bytes.
const LONGEST_FRAME_BYTES: usize = LENGTH_BYTES + MAX_STREAM_FRAME;

/// The buffer that all ports are read through, one after another.
#[derive(Debug)]
pub(super) struct Scratch(Box<[u8]>);

impl Scratch {
    pub(super) fn new() -> Self {
        Self(vec![0; LONGEST_FRAME_BYTES + READ_BYTES].into_boxed_slice())
    }
}

/// What one read of a port brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    /// There may be more.
    More,
    /// Everything that QEMU has sent so far is read.
    Empty,
    /// QEMU closed the socket, or the framing is lost.
    Closed,
}

/// The connected state of a port.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    /// The beginning of a frame whose rest has not come yet, its length prefix included.
    partial: Vec<u8>,
    /// Whether epoll watches for room to write.
    pub(super) watches_writable: bool,
}

impl Link {
    pub(super) fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, partial: Vec::new(), watches_writable: false })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the last byte read was the end of a frame.
    pub(super) fn at_frame_boundary(&self) -> bool {
        self.partial.is_empty()
    }

    /// Reads once and hands whole frames to the switch.
    pub(super) fn read(
        &mut self,
        scratch: &mut Scratch,
        switch: &mut Switch,
        port: PortId,
        now: Time,
    ) -> ReadOutcome {
        let kept = self.partial.len();
        scratch.0[..kept].copy_from_slice(&self.partial);
        let room = &mut scratch.0[kept..kept + READ_BYTES];
        let read = match nix::sys::socket::recv(
            self.stream.as_raw_fd(),
            room,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(0) => return ReadOutcome::Closed,
            Ok(read) => read,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return ReadOutcome::Empty,
            Err(_) => return ReadOutcome::Closed,
        };
        self.partial.clear();
        match feed(&scratch.0[..kept + read], switch, port, now) {
            Ok(used) => self.partial.extend_from_slice(&scratch.0[used..kept + read]),
            Err(error) => {
                tracing::error!(?port, %error, "a port's stream lost its framing; the port is down");
                return ReadOutcome::Closed;
            }
        }
        if read < READ_BYTES { ReadOutcome::Empty } else { ReadOutcome::More }
    }

    /// Writes as much of the port's queue as QEMU's socket takes. `Ok(true)`: some is left for want of room.
    pub(super) fn flush(&mut self, switch: &mut Switch, port: PortId, now: Time) -> std::io::Result<bool> {
        loop {
            let [first, second] = switch.writable(port);
            if first.is_empty() && second.is_empty() {
                return Ok(false);
            }
            match (&self.stream).write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => switch.written(port, written, now),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether QEMU has read everything that was written to it.
    pub(super) fn is_drained(&self) -> bool {
        super::command::is_read(&self.stream)
    }

    /// Sends one frame past the switch: only for a drained link of a held port.
    pub(super) fn send_directly(&self, frame: &[u8]) -> std::io::Result<()> {
        let length = u32::try_from(frame.len()).expect("a probe is short").to_be_bytes();
        let written = (&self.stream).write_vectored(&[IoSlice::new(&length), IoSlice::new(frame)])?;
        if written == length.len() + frame.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
    }

    /// Reads what QEMU sends first after another agent's connection broke, while the machine is stopped: maybe
    /// the rest of a frame that was half sent then, and maybe whole frames after it. Returns how many bytes
    /// were the torn frame's.
    pub(super) fn resynchronise(
        &mut self,
        scratch: &mut Scratch,
        switch: &mut Switch,
        port: PortId,
        mac: [u8; 6],
        now: Time,
    ) -> Result<usize, ReadOutcome> {
        let mut length = 0;
        while length < scratch.0.len() {
            match nix::sys::socket::recv(
                self.stream.as_raw_fd(),
                &mut scratch.0[length..],
                nix::sys::socket::MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) => return Err(ReadOutcome::Closed),
                Ok(read) => length += read,
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return Err(ReadOutcome::Closed),
            }
        }
        let chunk = &scratch.0[..length];
        // Nothing that looks like frames: all of it is the torn frame's rest.
        let torn = diorama_switch::resync(chunk, mac).unwrap_or(length);
        match feed(&chunk[torn..], switch, port, now) {
            Ok(_) => Ok(torn),
            Err(_) => Err(ReadOutcome::Closed),
        }
    }
}

/// Hands every whole frame of `bytes` to the switch and returns how many bytes they took.
fn feed(bytes: &[u8], switch: &mut Switch, port: PortId, now: Time) -> Result<usize, StreamError> {
    let mut reader = FrameReader::new(bytes);
    for frame in reader.by_ref() {
        switch.ingress(port, frame?, now);
    }
    Ok(reader.consumed())
}
