//! Taking one machine's migration stream apart while QEMU writes it.
//!
//! The capture thread does nothing but read, parse and write pages into the RAM file: while it is late, the guest's writes
//! wait. Hashing and storing follow when it is done. While the guest runs it [takes memory itself](live), at a
//! [pace](crate::pace) that leaves processors to guests.
//!
//! A *gate* keeps QEMU waiting for its reader, and so decides when it goes on:
//!
//! - in a live capture, `migrate` is sent while the machine runs. QEMU then reads every page once, which takes tens of
//!   milliseconds for each GiB, and writes the stream's beginning; but the socket was filled to the brim before it
//!   was handed over, so there it waits, without holding up the machine. When the machine has been stopped, the gate
//!   opens, and all that is left in the pause is saving the devices and protecting the memory. (From QEMU 9.0 on, the
//!   beginning is written under the big lock, and waiting would hang the monitor: `migrate` is sent after the stop.)
//! - in pre-copy, the gate closes when most of the memory has come, and so keeps QEMU from finishing by itself: the
//!   end must come at the cut, after the machine was drained and stopped by us.
//!
//! **A live capture, once begun, is read to its end**, wanted or not. While it lasts, whoever writes to a page that is
//! not saved yet waits until QEMU's capture thread has saved it. That thread ends when it is cancelled or its reader has
//! gone, and leaves the protection in place: then QEMU's main thread may wait for ever, with the big lock in its hands
//! (QEMU 7.2, and later). So a capture that failed or was given up goes on reading and throws away what it reads; and
//! the [`crate::keeper`] does that for an agent that has died.

mod live;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use diorama_qemu::migration::{RamFile, Splitter, StreamError};
use nix::sys::socket::{setsockopt, sockopt};

use self::live::{Live, Ready};
use crate::haste::Service;

/// How much is read of the stream at once.
const CHUNK_BYTES: usize = 1 << 20;
/// What is asked for as the socket's buffer on QEMU's side; the kernel gives what it allows.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// The most device state that a machine may have. A few MiB are usual.
const MOST_STATE_BYTES: usize = 256 << 20;
/// In pre-copy, the part of the memory that comes before the gate closes, in percent.
const GATE_PERCENT: u64 = 90;

/// How long QEMU may write nothing to a capture that is only read to its end, before it is taken for stuck.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// When the capture waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gating {
    /// Never.
    Open,
    /// From the first byte on, and QEMU finds the socket full: a live capture.
    FromStart,
    /// When most of the memory has come.
    AfterMost,
}

/// What came of a capture.
#[derive(Debug)]
pub(crate) struct Captured {
    /// The rest of the stream: a migration stream of its own, without main memory.
    pub(crate) state: Vec<u8>,
}

/// Why a capture failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaptureError {
    #[error("machine {machine}: the migration stream cannot be read: {source}")]
    Read { machine: String, source: std::io::Error },
    #[error("the capture was given up")]
    GivenUp,
    #[error("machine {machine}: {source}")]
    Stream { machine: String, source: StreamError },
    #[error("{path}: {source}")]
    RamFile { path: PathBuf, source: std::io::Error },
}

impl CaptureError {
    /// Whether a file system is full.
    pub(crate) fn is_no_space(&self) -> bool {
        match self {
            Self::RamFile { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            Self::Stream { source: StreamError::Sink(source), .. } => {
                source.kind() == std::io::ErrorKind::StorageFull
            }
            _ => false,
        }
    }
}

/// A capture under way.
#[derive(Debug)]
pub(crate) struct Capture {
    stream: UnixStream,
    gate: Arc<Gate>,
    /// Whether QEMU may have begun a live capture, which has to be read to its end.
    read_out: bool,
    thread: Option<JoinHandle<Result<Captured, CaptureError>>>,
}

/// Opens the gate of one capture, from another thread.
#[derive(Debug)]
pub(crate) struct GateHandle {
    gate: Arc<Gate>,
    /// Our end, to take the filler from.
    stream: UnixStream,
}

impl GateHandle {
    /// Makes room for the stream's beginning, so that QEMU goes on. The pages that follow fill the socket and wait:
    /// nobody is to copy pages while another machine still stands. The filler is taken here and not by the capture's
    /// thread, which would have to wake up first.
    pub(crate) fn set_ajar(&mut self) {
        let mut left = self.gate.take_filler();
        let mut chunk = [0; 4096];
        while left > 0 {
            let room = left.min(chunk.len());
            match (&self.stream).read(&mut chunk[..room]) {
                Ok(0) => break,
                Ok(read) => left -= read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // The capture's thread will find the same.
                Err(_) => break,
            }
        }
    }

    /// Lets the rest of the stream in.
    pub(crate) fn open(&mut self) {
        self.set_ajar();
        self.gate.open();
    }

    /// Whether memory has begun to come: the machine's state is saved, and its memory protected.
    pub(crate) fn memory_comes(&self) -> bool {
        self.gate.memory_comes.load(Ordering::Acquire)
    }
}

#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// Nobody wants what still comes.
    discarding: AtomicBool,
    memory_comes: AtomicBool,
}

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    /// What is in the socket before the stream, in bytes, and still to be taken out.
    filler_bytes: usize,
    /// The stream has come to the gate, or to its end.
    reached: bool,
    /// The thread is done.
    ended: bool,
}

impl Capture {
    /// Starts the thread. Returns the socket's other end, for QEMU. A `live` stream is read to its end whatever happens, and at the
    /// [pace](crate::pace) that its guest can bear.
    pub(crate) fn start(
        machine: &str,
        ram_path: PathBuf,
        memory_bytes: u64,
        gating: Gating,
        live: Option<Service>,
    ) -> Result<(Self, OwnedFd), CaptureError> {
        let name = machine.to_owned();
        let failed = |source| CaptureError::Read { machine: name.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let filler_bytes = match gating {
            Gating::FromStart => fill(&theirs).map_err(failed)?,
            Gating::Open | Gating::AfterMost => {
                set_buffer(&theirs, SOCKET_BUFFER_BYTES);
                0
            }
        };
        let theirs_too = theirs.try_clone().map_err(failed)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&ram_path)
            .map_err(|source| CaptureError::RamFile { path: ram_path.clone(), source })?;
        let gate = Arc::new(Gate::default());
        gate.set(|state| {
            state.open = gating == Gating::Open;
            state.filler_bytes = filler_bytes;
        });
        let mut reader = ours.try_clone().map_err(failed)?;
        let thread = {
            let (machine, gate) = (machine.to_owned(), Arc::clone(&gate));
            std::thread::Builder::new()
                .name(format!("capture {machine}"))
                .spawn(move || {
                    let is_live = live.is_some();
                    let gated = Gated { gate: &gate, gating, live, theirs: theirs_too };
                    let result = split(&machine, &mut reader, file, ram_path, memory_bytes, gated);
                    if result.is_err()
                        && is_live
                        && let Err(error) = read_out(&mut reader)
                    {
                        tracing::error!(machine, %error, "a capture that nobody wants does not end");
                    }
                    gate.set(|state| {
                        state.reached = true;
                        state.ended = true;
                    });
                    // So that QEMU does not wait for a reader that has given up.
                    let _ = reader.shutdown(Shutdown::Both);
                    result
                })
                .map_err(failed)?
        };
        Ok((Self { stream: ours, gate, read_out: false, thread: Some(thread) }, OwnedFd::from(theirs)))
    }

    /// Our end of the socket.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// QEMU has begun a live capture, or may have: from now on it is read to its end.
    pub(crate) fn must_be_read_out(&mut self) {
        self.read_out = true;
    }

    /// Waits until the stream has come to the gate or to its end, for at most `limit`. Returns whether it has.
    pub(crate) fn wait_for_gate(&self, limit: Duration) -> bool {
        let state = self.gate.state.lock().expect("nothing panics with it");
        let (state, _) = self
            .gate
            .changed
            .wait_timeout_while(state, limit, |state| !state.reached)
            .expect("nothing panics with it");
        state.reached
    }

    /// What opens the gate.
    pub(crate) fn gate(&self) -> std::io::Result<GateHandle> {
        Ok(GateHandle { gate: Arc::clone(&self.gate), stream: self.stream.try_clone()? })
    }

    /// Throws away what still comes, from now on; dropping waits for the end.
    pub(crate) fn discard(&self) {
        self.gate.discarding.store(true, Ordering::Relaxed);
        if !self.read_out {
            // Wakes the thread, whatever it waits for.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        self.gate.open();
    }

    /// Waits for the stream's end, for at most `limit`: then the capture has failed.
    pub(crate) fn finish_within(self, limit: Duration) -> Result<Captured, CaptureError> {
        if !self.wait_finished(limit) {
            self.discard();
        }
        self.finish()
    }

    /// Waits until the thread has ended, well or not, for at most `limit`.
    pub(crate) fn wait_finished(&self, limit: Duration) -> bool {
        let state = self.gate.state.lock().expect("nothing panics with it");
        let (state, _) = self
            .gate
            .changed
            .wait_timeout_while(state, limit, |state| !state.ended)
            .expect("nothing panics with it");
        state.ended
    }

    /// Waits for the stream's end.
    pub(crate) fn finish(mut self) -> Result<Captured, CaptureError> {
        self.thread.take().expect("taken only here").join().expect("a capture thread does not panic")
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.discard();
            let _ = thread.join();
        }
    }
}

impl Gate {
    fn set(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.state.lock().expect("nothing panics with it"));
        self.changed.notify_all();
    }

    fn open(&self) {
        self.set(|state| state.open = true);
    }

    fn take_filler(&self) -> usize {
        std::mem::take(&mut self.state.lock().expect("nothing panics with it").filler_bytes)
    }

    /// Waits at the gate until it is open.
    fn pass(&self) {
        let mut state = self.state.lock().expect("nothing panics with it");
        state.reached = true;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| !state.open).expect("nothing panics with it"));
    }
}

/// Device state as it comes, within bounds: a guest decides part of what is in it.
struct DeviceState(Vec<u8>);

impl Write for DeviceState {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_STATE_BYTES {
            return Err(std::io::Error::other("the device state is too large"));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the thread knows of its gate.
struct Gated<'a> {
    gate: &'a Gate,
    gating: Gating,
    /// Whose machine is captured live, if it is.
    live: Option<Service>,
    /// QEMU's end.
    theirs: UnixStream,
}

/// Writes into QEMU's end until it takes no more, and says how much that was.
fn fill(theirs: &UnixStream) -> std::io::Result<usize> {
    // As small as the kernel lets it be: what fits is what has to be taken out again within the pause.
    setsockopt(theirs, sockopt::SndBuf, &1)?;
    theirs.set_nonblocking(true)?;
    let chunk = [0; 1024];
    let mut filled = 0;
    let result = loop {
        match (&*theirs).write(&chunk) {
            Ok(written) => filled += written,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break Ok(filled),
            Err(error) => break Err(error),
        }
    };
    theirs.set_nonblocking(false)?;
    result
}

fn set_buffer(theirs: &impl AsFd, bytes: usize) {
    // Root may have more than the usual bound; others take what they get.
    if setsockopt(theirs, sockopt::SndBufForce, &bytes).is_err() {
        let _ = setsockopt(theirs, sockopt::SndBuf, &bytes);
    }
}

/// What `/proc/PID/fd` calls a socket, in whichever process.
fn socket_link(socket: &UnixStream) -> std::io::Result<PathBuf> {
    Ok(PathBuf::from(format!("socket:[{}]", nix::sys::stat::fstat(socket)?.st_ino)))
}

/// Takes what still comes to its end, and keeps none of it.
pub(crate) fn read_out(stream: &mut UnixStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn split(
    machine: &str,
    stream: &mut UnixStream,
    file: File,
    ram_path: PathBuf,
    memory_bytes: u64,
    gated: Gated<'_>,
) -> Result<Captured, CaptureError> {
    let mut ram = RamFile::new(file, memory_bytes, DeviceState(Vec::new()))
        .map_err(|source| CaptureError::RamFile { path: ram_path, source })?;
    let mut splitter = Splitter::new("ram0", memory_bytes);
    let mut chunk = vec![0; CHUNK_BYTES];
    let gate_pages = memory_bytes / 4096 * GATE_PERCENT / 100;
    let mut passed = gated.gating != Gating::AfterMost;
    let failed = |source| CaptureError::Read { machine: machine.to_owned(), source };
    let splits = |source| CaptureError::Stream { machine: machine.to_owned(), source };
    let mut ready = gated.live.as_ref().map(|service| Ready::new(machine, service, memory_bytes));
    if gated.gating == Gating::FromStart {
        gated.gate.pass();
    }
    if let Some(ready) = &ready {
        ready.set_buffer(&gated.theirs);
    }
    let theirs = socket_link(&gated.theirs).map_err(failed)?;
    // Or this end would keep the socket open when QEMU has closed it.
    drop(gated.theirs);
    let mut live: Option<Live> = None;
    loop {
        if gated.gate.discarding.load(Ordering::Relaxed) {
            return Err(CaptureError::GivenUp);
        }
        let read = match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        splitter.feed(&chunk[..read], &mut ram).map_err(splits)?;
        if splitter.pages_seen() > 0 {
            gated.gate.memory_comes.store(true, Ordering::Release);
            if splitter.ram_complete() {
                if let Some(live) = live.take() {
                    live.finish(&mut ram).map_err(|source| splits(StreamError::Sink(source)))?;
                }
            } else {
                live = live.or_else(|| Some(Live::begin(ready.take()?, &theirs)));
                if let Some(live) = &mut live {
                    live.wait(splitter.pages_seen(), &mut ram)
                        .map_err(|source| splits(StreamError::Sink(source)))?;
                }
            }
        }
        if !passed && splitter.pages_seen() >= gate_pages {
            gated.gate.pass();
            passed = true;
        }
    }
    splitter.finish().map_err(splits)?;
    let (_, DeviceState(state)) = ram.into_inner();
    Ok(Captured { state })
}
