//! Diorama's data plane, alone in a process of its own, between two unix sockets of the generator: what QEMU's
//! `-netdev stream` is to it otherwise.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::generator::{Side, Transport};
use super::{SWITCH_CORE, this_program};
use crate::failure::Failure;

const LENGTH_BYTES: usize = 4;
const READ_BYTES: usize = 512 << 10;
/// The priority that the agent gives its data plane, for whatever switch is under test.
pub(super) const NICE: &str = "-15";

/// A switch under test in a process of its own. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// Its sockets; removed with it.
    _folder: TempDir,
}

impl Process {
    /// Starts `command` on the switch's core, at the data plane's priority, with a standard input that stays open.
    pub(super) fn start(program: PathBuf, arguments: &[String], folder: TempDir) -> Result<Self, Failure> {
        let child = Command::new("taskset")
            .args(["--cpu-list", &SWITCH_CORE.to_string(), "nice", "-n", NICE])
            .arg(&program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(Failure::io(format!("cannot start {}", program.display())))?;
        Ok(Self { child, _folder: folder })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            crate::lab::say(format!("cannot end the switch under test: {error}"));
        }
    }
}

/// Starts it.
pub(super) fn start() -> Result<(Process, Streams), Failure> {
    let folder = tempfile::tempdir().map_err(Failure::io("cannot make a folder"))?;
    let paths = ["sender", "receiver"].map(|name| folder.path().join(name));
    let listeners = paths.each_ref().map(UnixListener::bind);
    let [sender, receiver] = listeners;
    let sender = sender.map_err(Failure::io("cannot listen"))?;
    let receiver = receiver.map_err(Failure::io("cannot listen"))?;
    let mut arguments = vec!["data-plane".to_owned()];
    arguments.extend(paths.iter().map(|path| path.to_string_lossy().into_owned()));
    let process = Process::start(this_program()?, &arguments, folder)?;
    let accept = |listener: UnixListener| -> Result<Stream, Failure> {
        let (stream, _) = listener.accept().map_err(Failure::io("the data plane does not connect"))?;
        stream.set_nonblocking(true).map_err(Failure::io("cannot make a socket nonblocking"))?;
        Ok(Stream { stream, unsent: Vec::new(), chunk: vec![0; READ_BYTES], kept: 0 })
    };
    Ok((process, Streams([accept(sender)?, accept(receiver)?])))
}

/// The child process: the data plane between sockets, until standard input ends.
pub(crate) fn run_data_plane(sockets: &[PathBuf]) -> Result<(), Failure> {
    let streams = sockets.iter().map(UnixStream::connect).collect::<Result<Vec<_>, _>>();
    let streams = streams.map_err(Failure::io("cannot connect"))?;
    diorama_agent::switch_streams(streams, 1500).map_err(Failure::io("cannot start the data plane"))?;
    io::stdin().read_to_end(&mut Vec::new()).map_err(Failure::io("cannot wait"))?;
    Ok(())
}

/// Both ports.
#[derive(Debug)]
pub(super) struct Streams([Stream; 2]);

#[derive(Debug)]
struct Stream {
    stream: UnixStream,
    /// The rest of a frame that the socket had no room for: it counts as sent.
    unsent: Vec<u8>,
    chunk: Vec<u8>,
    /// Bytes at the chunk's beginning that are the beginning of a frame.
    kept: usize,
}

impl Transport for Streams {
    const BATCH: usize = 64;

    fn send(&mut self, side: Side, frames: &[u8], size: usize) -> io::Result<usize> {
        self.0[side as usize].send(frames, size)
    }

    fn receive(&mut self, side: Side, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        self.0[side as usize].receive(each)
    }
}

impl Stream {
    fn send(&mut self, frames: &[u8], size: usize) -> io::Result<usize> {
        if !self.unsent.is_empty() {
            let written = or_zero((&self.stream).write(&self.unsent))?;
            self.unsent.drain(..written);
            if !self.unsent.is_empty() {
                return Ok(0);
            }
        }
        let length = u32::try_from(size).expect("frames are short").to_be_bytes();
        let slices: Vec<IoSlice<'_>> = frames
            .chunks_exact(size)
            .flat_map(|frame| [IoSlice::new(&length), IoSlice::new(frame)])
            .collect();
        let written = or_zero((&self.stream).write_vectored(&slices))?;
        let whole = LENGTH_BYTES + size;
        let begun = written.div_ceil(whole);
        if written % whole != 0 {
            let frame = &frames[(begun - 1) * size..begun * size];
            let both = [&length[..], frame].concat();
            self.unsent.extend_from_slice(&both[written % whole..]);
        }
        Ok(begun)
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let read = or_zero((&self.stream).read(&mut self.chunk[self.kept..]))?;
        let end = self.kept + read;
        let mut at = 0;
        while let Some(header) = self.chunk[at..end].first_chunk::<LENGTH_BYTES>() {
            let length = u32::from_be_bytes(*header) as usize;
            let Some(frame) = self.chunk[at + LENGTH_BYTES..end].get(..length) else { break };
            each(frame);
            at += LENGTH_BYTES + length;
        }
        self.chunk.copy_within(at..end, 0);
        self.kept = end - at;
        Ok(())
    }
}

/// How many bytes went; none when the call would block.
fn or_zero(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        result => result,
    }
}
