//! Packets on their way out: made in one buffer, sent from there in trains.
//!
//! A train is a run of packets to one address, all of the first one's length but the last, which may be shorter: what
//! UDP_SEGMENT takes as one message. One `sendmmsg` takes many trains.
//!
//! Invariants: packets lie in the buffer one behind the other, in the order of `packets`, from `start` on; `start` and
//! `packets` are 0 and empty together with nothing pending.

use std::{collections::VecDeque, io, mem::zeroed, net::SocketAddr, os::fd::RawFd, ptr};

use super::{CONTROL_BYTES, Control, address::RawAddress};

/// Trains in one system call.
const MESSAGES: usize = 32;

/// Packets in one train: what every kernel with UDP_SEGMENT takes.
const TRAIN_PACKETS: usize = 64;

/// Bytes in one train: what fits an IP packet's length field with both headers, and a bit less.
const TRAIN_BYTES: usize = 65_000;

#[derive(Clone, Copy, Debug)]
struct Packet {
    to: SocketAddr,
    len: usize,
}

/// Packets to be sent.
#[derive(Debug)]
pub struct SendBatch {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    packets: VecDeque<Packet>,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Packets that the socket took.
    pub packets: usize,
    /// Packets that it refused for good: too long for the path, no way there, nobody listens there. They are lost.
    pub refused: usize,
    /// System calls that it took.
    pub calls: usize,
    /// Whether the rest waits until the socket is writable.
    pub would_block: bool,
}

impl SendBatch {
    /// A batch that holds so many bytes of packets.
    pub fn new(bytes: usize) -> Self {
        Self { buffer: vec![0; bytes].into_boxed_slice(), start: 0, end: 0, packets: VecDeque::new() }
    }

    /// Whether a packet of so many bytes has room.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.buffer.len() - self.end >= bytes
    }

    /// Adds a packet that `make` writes into the room that is left, and of which it says the length (at most that of the
    /// room). On an error, nothing is added.
    #[inline]
    pub fn push<E>(
        &mut self,
        to: SocketAddr,
        make: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let room = &mut self.buffer[self.end..];
        let most = room.len();
        let len = make(room)?.min(most);
        self.end += len;
        self.packets.push_back(Packet { to, len });
        Ok(())
    }

    /// How many packets wait.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    pub(super) fn send(&mut self, socket: RawFd, v6_socket: bool, segments: &mut bool) -> io::Result<Sent> {
        let mut sent = Sent::default();
        while !self.packets.is_empty() {
            let mut trains = [Train::default(); MESSAGES];
            let count = self.trains(&mut trains, *segments);
            sent.calls += 1;
            match self.send_trains(socket, v6_socket, &trains[..count]) {
                Ok(taken) => {
                    for train in &trains[..taken] {
                        sent.packets += train.packets;
                        self.forget(train.packets);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => (),
                    // The same number as EWOULDBLOCK on Linux.
                    Some(libc::EAGAIN) => {
                        sent.would_block = true;
                        break;
                    }
                    // The device cannot do checksums of trains: do without from now on.
                    Some(libc::EIO) if trains[0].packets > 1 => *segments = false,
                    // What concerns the first packet, or tells of an earlier one's fate, not the socket.
                    Some(
                        libc::EMSGSIZE
                        | libc::EINVAL
                        | libc::EPERM
                        | libc::EACCES
                        | libc::ENOBUFS
                        | libc::ECONNREFUSED
                        | libc::EHOSTUNREACH
                        | libc::ENETUNREACH
                        | libc::ENETDOWN
                        | libc::EADDRNOTAVAIL
                        | libc::EAFNOSUPPORT
                        | libc::EHOSTDOWN,
                    ) => {
                        sent.refused += trains[0].packets;
                        self.forget(trains[0].packets);
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(sent)
    }

    /// Divides what waits, from its beginning, into trains; returns how many.
    fn trains(&self, trains: &mut [Train; MESSAGES], segments: bool) -> usize {
        let mut count = 0;
        let mut packets = self.packets.iter().copied().peekable();
        let mut from = self.start;
        while let Some(first) = packets.next() {
            let Some(train) = trains.get_mut(count) else { break };
            *train = Train { to: Some(first.to), from, bytes: first.len, packets: 1, segment: first.len };
            let mut last = first.len;
            while let Some(next) = packets.next_if(|next| {
                segments
                    && next.to == first.to
                    && next.len <= first.len
                    && last == first.len
                    && train.packets < TRAIN_PACKETS
                    && train.bytes + next.len <= TRAIN_BYTES
            }) {
                last = next.len;
                train.packets += 1;
                train.bytes += next.len;
            }
            from += train.bytes;
            count += 1;
        }
        count
    }

    /// One `sendmmsg`; returns how many trains were taken, at least one.
    fn send_trains(&self, socket: RawFd, v6_socket: bool, trains: &[Train]) -> io::Result<usize> {
        // SAFETY: for these types of integers and pointers zero (null) is valid.
        let mut messages: [libc::mmsghdr; MESSAGES] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut pieces: [libc::iovec; MESSAGES] = unsafe { zeroed() };
        let mut addresses = [RawAddress::empty(); MESSAGES];
        let mut controls = [Control::EMPTY; MESSAGES];
        for (n, train) in trains.iter().enumerate() {
            let Some(to) = train.to else { break };
            let bytes = &self.buffer[train.from..train.from + train.bytes];
            // sendmsg only reads what iov_base points to.
            pieces[n] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let (address, address_len) = RawAddress::new(to, v6_socket);
            addresses[n] = address;
            let header = &mut messages[n].msg_hdr;
            header.msg_name = (&raw mut addresses[n]).cast();
            header.msg_namelen = address_len;
            header.msg_iov = &raw mut pieces[n];
            header.msg_iovlen = 1;
            if train.packets > 1 {
                header.msg_control = controls[n].0.as_mut_ptr().cast();
                // SAFETY: CMSG_SPACE computes a length.
                header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<u16>() as u32) } as _;
                debug_assert!(header.msg_controllen as usize <= CONTROL_BYTES);
                // SAFETY: msg_control points to CONTROL_BYTES bytes, aligned for a header, which is more than msg_controllen;
                // so the first header and its data, an u16, are inside.
                unsafe {
                    let control = libc::CMSG_FIRSTHDR(header);
                    (*control).cmsg_level = libc::SOL_UDP;
                    (*control).cmsg_type = libc::UDP_SEGMENT;
                    (*control).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
                    ptr::write_unaligned(libc::CMSG_DATA(control).cast(), train.segment as u16);
                }
            }
        }
        // SAFETY: `messages` has `trains.len() <= MESSAGES` filled entries, whose pointers are to arrays of this function and
        // to `self.buffer`, all of which live until it returns.
        let taken = unsafe {
            libc::sendmmsg(socket, messages.as_mut_ptr(), trains.len() as libc::c_uint, libc::MSG_DONTWAIT)
        };
        usize::try_from(taken).map_err(|_| io::Error::last_os_error())
    }

    fn forget(&mut self, packets: usize) {
        self.start += self.packets.drain(..packets).map(|packet| packet.len).sum::<usize>();
        if self.packets.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Train {
    to: Option<SocketAddr>,
    from: usize,
    bytes: usize,
    packets: usize,
    segment: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trains_are_runs_of_equal_packets_to_one_address_with_a_shorter_end() {
        let addresses: [SocketAddr; 2] = ["127.0.0.1:1", "127.0.0.1:2"].map(|a| a.parse().unwrap());
        let mut batch = SendBatch::new(1 << 20);
        for (to, len) in [(0, 90), (0, 90), (0, 40), (0, 40), (0, 50), (1, 50), (1, 50), (0, 50)] {
            batch.push(addresses[to], |_| Ok::<_, ()>(len)).unwrap();
        }
        let lens = |batch: &SendBatch, segments| {
            let mut trains = [Train::default(); MESSAGES];
            let count = batch.trains(&mut trains, segments);
            let mut from = batch.start;
            trains[..count]
                .iter()
                .map(|train| {
                    assert_eq!(train.from, from);
                    from += train.bytes;
                    (train.packets, train.segment, train.bytes)
                })
                .collect::<Vec<_>>()
        };
        let expected = [(3, 90, 220), (1, 40, 40), (1, 50, 50), (2, 50, 100), (1, 50, 50)];
        assert_eq!(lens(&batch, true), expected);
        assert_eq!(lens(&batch, false).len(), 8);
        batch.forget(3);
        assert_eq!(lens(&batch, true), expected[1..]);
        batch.forget(5);
        assert!(batch.is_empty() && batch.has_room(1 << 20));

        for _ in 0..200 {
            batch.push(addresses[0], |_| Ok::<_, ()>(1400)).unwrap();
        }
        assert_eq!(lens(&batch, true).iter().map(|train| train.0).collect::<Vec<_>>(), [46, 46, 46, 46, 16]);
        assert!(!batch.has_room((1 << 20) - 200 * 1400 + 1));
        assert_eq!(batch.push(addresses[0], |_| Err("nothing")), Err("nothing"));
        assert_eq!(batch.len(), 200);
    }
}
