//! `vde_switch` (Debian's vde2), spoken to as libvdeplug does: a control connection on which the client names its
//! datagram socket and the switch answers with its own; then one datagram for each frame.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::generator::{Side, Transport};
use super::ours::Process;
use crate::failure::Failure;
use crate::lab;

const MAGIC: u32 = 0xfeed_face;
const VERSION: u32 = 3;
/// Any free port of the switch.
const NEW_PORT: u32 = 0;
/// `struct sockaddr_un`: the family in two bytes, the path in 108.
const ADDRESS_BYTES: usize = 110;
const LARGEST_FRAME: usize = 2048;
/// Datagrams of one system call. A unix datagram socket holds `net.unix.max_dgram_qlen` (10) and a switch that finds
/// it full drops: more at once would measure that and not the switch.
const BATCH: usize = 8;
const READY: Duration = Duration::from_secs(5);

/// Starts it.
pub(super) fn start() -> Result<(Process, Datagrams), Failure> {
    let folder = tempfile::tempdir().map_err(Failure::io("cannot make a folder"))?;
    let control = folder.path().join("switch");
    let clients = ["sender", "receiver"].map(|name| folder.path().join(name));
    let arguments = ["--sock".to_owned(), control.to_string_lossy().into_owned()];
    let process = Process::start(PathBuf::from("vde_switch"), &arguments, folder)?;
    let [sender, receiver] = clients.map(|client| Plug::connect(&control, &client));
    Ok((process, Datagrams([sender?, receiver?])))
}

/// Both ports.
#[derive(Debug)]
pub(super) struct Datagrams([Plug; 2]);

impl Transport for Datagrams {
    const BATCH: usize = BATCH;

    fn send(&mut self, side: Side, frames: &[u8], size: usize) -> io::Result<usize> {
        self.0[side as usize].send(frames, size)
    }

    fn receive(&mut self, side: Side, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        self.0[side as usize].receive(each)
    }
}

/// One port.
#[derive(Debug)]
struct Plug {
    data: UnixDatagram,
    buffers: Box<[[u8; LARGEST_FRAME]; BATCH]>,
    /// The port lives as long as this connection.
    _control: UnixStream,
}

impl Plug {
    fn connect(control: &Path, client: &Path) -> Result<Self, Failure> {
        let data = UnixDatagram::bind(client).map_err(Failure::io("cannot bind a datagram socket"))?;
        let mut stream = connect(&control.join("ctl"))?;
        let mut request = Vec::new();
        for word in [MAGIC, VERSION, NEW_PORT] {
            request.extend(word.to_ne_bytes());
        }
        request.extend(address(client));
        request.extend(b"diorama-bench\0");
        stream.write_all(&request).map_err(Failure::io("cannot ask vde_switch for a port"))?;
        let mut answer = [0; ADDRESS_BYTES];
        stream.read_exact(&mut answer).map_err(Failure::io("vde_switch gives no port"))?;
        let path: Vec<u8> = answer[2..].iter().copied().take_while(|byte| *byte != 0).collect();
        let path = String::from_utf8_lossy(&path).into_owned();
        data.connect(&path).map_err(Failure::io(format!("cannot connect to vde_switch's port {path}")))?;
        data.set_nonblocking(true).map_err(Failure::io("cannot make a socket nonblocking"))?;
        Ok(Self { data, buffers: Box::new([[0; LARGEST_FRAME]; BATCH]), _control: stream })
    }

    fn send(&mut self, frames: &[u8], size: usize) -> io::Result<usize> {
        let mut slices: [MaybeUninit<libc::iovec>; BATCH] = [const { MaybeUninit::uninit() }; BATCH];
        let mut count = 0;
        for (slice, frame) in slices.iter_mut().zip(frames.chunks_exact(size)) {
            slice.write(libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: size });
            count += 1;
        }
        self.call(&mut slices, count, |fd, messages, count| {
            // SAFETY: `call` has set up as many headers, each with one slice of `frames`.
            unsafe { libc::sendmmsg(fd, messages, count, libc::MSG_DONTWAIT) }
        })
        .map(|sent| sent.len())
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        loop {
            let mut slices: [MaybeUninit<libc::iovec>; BATCH] = [const { MaybeUninit::uninit() }; BATCH];
            for (slice, buffer) in slices.iter_mut().zip(self.buffers.iter_mut()) {
                slice.write(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: LARGEST_FRAME });
            }
            let lengths = self.call(&mut slices, BATCH, |fd, messages, count| {
                // SAFETY: `call` has set up as many headers, each with one of our buffers, which nobody else uses.
                unsafe { libc::recvmmsg(fd, messages, count, libc::MSG_DONTWAIT, std::ptr::null_mut()) }
            })?;
            for (buffer, length) in self.buffers.iter().zip(&lengths) {
                each(&buffer[..*length]);
            }
            if lengths.len() < BATCH {
                return Ok(());
            }
        }
    }

    /// One `sendmmsg` or `recvmmsg`; the lengths of the messages that went.
    fn call(
        &self,
        slices: &mut [MaybeUninit<libc::iovec>; BATCH],
        count: usize,
        system_call: impl FnOnce(libc::c_int, *mut libc::mmsghdr, libc::c_uint) -> libc::c_int,
    ) -> io::Result<Vec<usize>> {
        // SAFETY: all zeroes is a header without a name, slices or control data.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { MaybeUninit::zeroed().assume_init() };
        for (message, slice) in messages.iter_mut().zip(slices.iter_mut()).take(count) {
            message.msg_hdr.msg_iov = slice.as_mut_ptr();
            message.msg_hdr.msg_iovlen = 1;
        }
        let done = system_call(self.data.as_raw_fd(), messages.as_mut_ptr(), count as libc::c_uint);
        match usize::try_from(done) {
            Ok(done) => Ok(messages[..done].iter().map(|message| message.msg_len as usize).collect()),
            Err(_) => match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    Ok(Vec::new())
                }
                error if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(Vec::new()),
                error => Err(error),
            },
        }
    }
}

/// The switch has no other sign of being ready than that it listens.
fn connect(path: &Path) -> Result<UnixStream, Failure> {
    let end = Instant::now() + READY;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < end => lab::sleep(Duration::from_millis(20))?,
            Err(error) => return Err(Failure::io("vde_switch (Debian's vde2) does not start")(error)),
        }
    }
}

fn address(path: &Path) -> [u8; ADDRESS_BYTES] {
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_ne_bytes());
    let path = path.as_os_str().as_encoded_bytes();
    // A temporary folder's name fits: `bind` has already taken it.
    bytes[2..2 + path.len()].copy_from_slice(path);
    bytes
}
