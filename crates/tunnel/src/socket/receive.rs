//! Packets that came: each buffer of the kernel's holds one, or a train of equal ones with a shorter end.

use std::{io, mem::zeroed, net::SocketAddr, os::fd::RawFd, ptr};

use super::{CONTROL_BYTES, Control, address::RawAddress};

/// Buffers in one system call.
const MESSAGES: usize = 32;

/// What one buffer holds: the longest that UDP gives, train or not.
const BUFFER_BYTES: usize = 1 << 16;

/// Room for packets that come: 2 MiB, touched only as far as it is used.
pub struct ReceiveBatch {
    buffers: Box<[u8]>,
    filled: [Filled; MESSAGES],
    count: usize,
}

#[derive(Clone, Copy, Default)]
struct Filled {
    from: Option<SocketAddr>,
    len: usize,
    /// The length of each packet but the last; at least 1.
    segment: usize,
}

/// What a receive gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Packets, which are in the batch now.
    pub packets: usize,
    /// Whether the batch was filled: there may be more. (Empty packets fill it too, and are none; so receive until this
    /// is false, not until there are no packets.)
    pub more: bool,
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        Self {
            buffers: vec![0; MESSAGES * BUFFER_BYTES].into_boxed_slice(),
            filled: [Filled::default(); MESSAGES],
            count: 0,
        }
    }
}

impl ReceiveBatch {
    /// Room for packets.
    pub fn new() -> Self {
        Self::default()
    }

    /// The packets that came, in order, with who sent them; to be opened in place.
    pub fn packets(&mut self) -> impl Iterator<Item = (SocketAddr, &mut [u8])> + '_ {
        let buffers = self.buffers.chunks_exact_mut(BUFFER_BYTES);
        buffers.zip(&self.filled[..self.count]).flat_map(|(buffer, filled)| {
            let packets = buffer[..filled.len].chunks_mut(filled.segment);
            packets.filter_map(|packet| Some((filled.from?, packet)))
        })
    }

    pub(super) fn receive(&mut self, socket: RawFd) -> io::Result<Received> {
        self.count = 0;
        // SAFETY: for these types of integers and pointers zero (null) is valid.
        let mut messages: [libc::mmsghdr; MESSAGES] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut pieces: [libc::iovec; MESSAGES] = unsafe { zeroed() };
        let mut addresses = [RawAddress::empty(); MESSAGES];
        let mut controls = [Control::EMPTY; MESSAGES];
        for (n, buffer) in self.buffers.chunks_exact_mut(BUFFER_BYTES).enumerate() {
            pieces[n] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let header = &mut messages[n].msg_hdr;
            header.msg_name = (&raw mut addresses[n]).cast();
            header.msg_namelen = RawAddress::BYTES;
            header.msg_iov = &raw mut pieces[n];
            header.msg_iovlen = 1;
            header.msg_control = controls[n].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL_BYTES as _;
        }
        let count = loop {
            // SAFETY: `messages` has MESSAGES entries, whose pointers are to arrays of this function and to `self.buffers`,
            // all of which live until it returns, with their lengths beside them.
            let count = unsafe {
                libc::recvmmsg(
                    socket,
                    messages.as_mut_ptr(),
                    MESSAGES as libc::c_uint,
                    libc::MSG_DONTWAIT,
                    ptr::null_mut(),
                )
            };
            match usize::try_from(count) {
                Ok(count) => break count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::EINTR) => (),
                    // An answer to a packet sent earlier: somebody does not listen. Nothing of ours.
                    error if error.raw_os_error() == Some(libc::ECONNREFUSED) => (),
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::default()),
                    error => return Err(error),
                },
            }
        };
        let mut packets = 0;
        for n in 0..count {
            let len = (messages[n].msg_len as usize).min(BUFFER_BYTES);
            let segment = joined_segment(&messages[n].msg_hdr).unwrap_or(len).max(1);
            self.filled[n] = Filled { from: addresses[n].get(), len, segment };
            packets += len.div_ceil(segment);
        }
        self.count = count;
        Ok(Received { packets, more: count == MESSAGES })
    }
}

/// The length of the packets that the kernel has joined, if it has.
fn joined_segment(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel has filled msg_control, of msg_controllen bytes, with whole messages; CMSG_NXTHDR stays inside.
    // UDP_GRO's data is an int.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = control.as_ref() {
            if message.cmsg_level == libc::SOL_UDP && message.cmsg_type == libc::UDP_GRO {
                let segment: libc::c_int = ptr::read_unaligned(libc::CMSG_DATA(control).cast());
                return usize::try_from(segment).ok();
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    None
}
