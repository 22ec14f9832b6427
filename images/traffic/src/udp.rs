//! `udp-send` and `udp-recv`: numbered datagrams, and the account of what came.
//!
//! A datagram is [`MAGIC`], the sender's random id, its number, and padding. Numbers start
//! at 0; a number is used once and in order, so every gap is a loss on the way.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::arguments::Arguments;
use crate::pace::Pace;
use crate::sequence::{Counts, Sequence};
use crate::status::{Line, PERIOD, StatusFile};
use crate::{Failure, random_id};

const MAGIC: [u8; 8] = *b"DIOUDP01";
const HEADER: usize = 24;

/// The largest UDP payload over IPv4.
const MAX_DATAGRAM: u64 = 65_507;

/// Senders followed at once. A stranger's datagrams beyond it are counted, not followed.
const MAX_SENDERS: usize = 64;

/// Datagrams sent in a row before the clock is read again.
const BURST: u64 = 64;

/// `traffic udp-send`.
pub fn send(arguments: &mut Arguments) -> Result<(), Failure> {
    let to: SocketAddr = arguments.required("to")?;
    let rate = arguments.rate()?;
    let size = arguments.bytes("size", Some(64), HEADER as u64..=MAX_DATAGRAM)?;
    let seconds: Option<u64> = arguments.optional("seconds")?;
    let mut status = StatusFile::optional(arguments)?;
    arguments.finish()?;

    let socket = bind(to, 0)?;
    let sender = random_id()?;
    let mut datagram = vec![0; size as usize];
    datagram[..8].copy_from_slice(&MAGIC);
    datagram[8..16].copy_from_slice(&sender.to_be_bytes());

    let start = Instant::now();
    let mut pace = Pace::new(rate, start);
    let mut sent = 0_u64;
    let mut refused = 0_u64;
    let line = |sent, refused, state| {
        Line::new("udp-send")
            .id("sender", sender)
            .word("state", state)
            .value("sent", sent)
            .value("refused", refused)
    };
    loop {
        let now = Instant::now();
        if seconds.is_some_and(|s| now.duration_since(start).as_secs() >= s) {
            break;
        }
        let allowed = pace.allowed(now, BURST);
        for _ in 0..allowed {
            datagram[16..24].copy_from_slice(&sent.to_be_bytes());
            match socket.send_to(&datagram, to) {
                Ok(_) => sent += 1,
                // The number was not used: the kernel took nothing. No route or no room
                // is what a restart looks like; go on.
                Err(error) if is_passing(&error) => {
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(Failure::Io("send", error)),
            }
        }
        pace.did(allowed);
        status.update(|| line(sent, refused, "open"))?;
        if allowed == 0 {
            std::thread::sleep(pace.wait(now, 1).min(PERIOD));
        }
    }
    status.write(line(sent, refused, "done"))
}

/// `traffic udp-recv`.
pub fn receive(arguments: &mut Arguments) -> Result<(), Failure> {
    let port: u16 = arguments.required("port")?;
    let mut status = StatusFile::required(arguments)?;
    arguments.finish()?;

    let socket = listen(port)?;
    let mut receiver = Receiver::default();
    let mut buffer = vec![0; 1 << 16];
    status.write(receiver.line())?;
    loop {
        match socket.recv(&mut buffer) {
            Ok(length) => receiver.arrive(&buffer[..length]),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(Failure::Io("receive", error)),
        }
        status.update(|| receiver.line())?;
    }
}

/// A socket to send from to `to`'s family, bound to `port` (0: any).
pub(crate) fn bind(to: SocketAddr, port: u16) -> Result<UdpSocket, Failure> {
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
    let any = any.parse::<std::net::IpAddr>().expect("a constant address");
    UdpSocket::bind((any, port)).map_err(|e| Failure::Io("bind", e))
}

/// A socket that receives on `port` over IPv4 and IPv6, waking up for the status file,
/// with room for bursts.
pub(crate) fn listen(port: u16) -> Result<UdpSocket, Failure> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| UdpSocket::bind(("0.0.0.0", port)))
        .map_err(|e| Failure::Io("bind", e))?;
    socket.set_read_timeout(Some(PERIOD)).map_err(|e| Failure::Io("set a timeout", e))?;
    grow_receive_buffer(&socket);
    Ok(socket)
}

/// Whether an error of a UDP socket passes by itself.
pub(crate) fn is_passing(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock
            | ErrorKind::TimedOut
            | ErrorKind::Interrupted
            | ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
    ) || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Room for a burst of datagrams, as far as the kernel allows: without it the guest's own
/// socket would drop what the network delivered, and that would look like a loss.
fn grow_receive_buffer(socket: &UdpSocket) {
    let bytes: libc::c_int = 4 << 20;
    for option in [libc::SO_RCVBUF, libc::SO_RCVBUFFORCE] {
        // SAFETY: the descriptor is open for the call, and the value is a c_int whose
        // size is given.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const bytes).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            );
        }
        // Without the privilege, the second call fails and the first one's size stays.
    }
}

/// The accounts of all senders.
#[derive(Debug, Default)]
struct Receiver {
    senders: BTreeMap<u64, Sequence>,
    current: Option<u64>,
    strangers: u64,
}

impl Receiver {
    fn arrive(&mut self, datagram: &[u8]) {
        let Some((sender, number)) = parse(datagram) else {
            self.strangers += 1;
            return;
        };
        if let Some(sequence) = self.senders.get_mut(&sender) {
            sequence.arrive(number);
        } else if self.senders.len() < MAX_SENDERS {
            self.senders.insert(sender, Sequence::new(number));
        } else {
            self.strangers += 1;
            return;
        }
        self.current = Some(sender);
    }

    fn line(&self) -> Line {
        let mut total = Counts::default();
        for sequence in self.senders.values() {
            let counts = sequence.counts();
            total.received += counts.received;
            total.lost = total.lost.saturating_add(counts.lost);
            total.duplicated += counts.duplicated;
            total.reordered += counts.reordered;
            total.too_old += counts.too_old;
        }
        let highest = self.current.map(|sender| self.senders[&sender].highest());
        let line = Line::new("udp-recv").value("senders", self.senders.len());
        match self.current {
            Some(sender) => line.id("sender", sender),
            None => line.value("sender", "null"),
        }
        .optional("highest", highest)
        .value("received", total.received)
        .value("lost", total.lost)
        .value("duplicated", total.duplicated)
        .value("reordered", total.reordered)
        .value("too_old", total.too_old)
        .value("strangers", self.strangers)
    }
}

/// The sender and number of one of our datagrams.
fn parse(datagram: &[u8]) -> Option<(u64, u64)> {
    let rest = datagram.strip_prefix(&MAGIC)?;
    let (sender, rest) = rest.split_first_chunk::<8>()?;
    let (number, _) = rest.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*sender), u64::from_be_bytes(*number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(sender: u64, number: u64) -> Vec<u8> {
        [MAGIC, sender.to_be_bytes(), number.to_be_bytes()].concat()
    }

    #[test]
    fn each_sender_has_its_own_account() {
        let mut receiver = Receiver::default();
        for (sender, number) in [(1, 0), (2, 0), (1, 1), (2, 5), (2, 5)] {
            receiver.arrive(&datagram(sender, number));
        }
        let line = receiver.line().finish();
        assert!(line.contains(r#""highest":5,"received":4,"lost":4,"duplicated":1,"reordered":0"#), "{line}");
    }

    #[test]
    fn strangers_are_counted_and_bounded() {
        let mut receiver = Receiver::default();
        receiver.arrive(b"");
        receiver.arrive(b"DIOUDP01 short");
        receiver.arrive(&[0xff; 1500]);
        for sender in 0..1000 {
            receiver.arrive(&datagram(sender, 0));
        }
        assert_eq!(receiver.senders.len(), MAX_SENDERS);
        assert_eq!(receiver.strangers, 3 + 1000 - MAX_SENDERS as u64);
    }
}
