//! `tcp-send` and `tcp-serve`: one TCP session that carries a checkable stream.
//!
//! The sender opens with [`MAGIC`] and a random session id; then the byte at position `p`
//! is a function of the id and `p` ([`fill`]). The server checks every byte. At the end of
//! the stream the server answers with the bytes it checked and the bad ones among them.
//!
//! The id shows that the session after a restore is the session from before it; TCP_INFO's
//! total of retransmissions on both sides shows what the network cost it.

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::arguments::Arguments;
use crate::pace::Pace;
use crate::status::{Line, PERIOD, StatusFile};
use crate::{Failure, random_id};

const MAGIC: [u8; 8] = *b"DIOTCP01";

/// How much is made, sent or checked at a time, in bytes. A multiple of 8.
const CHUNK: usize = 32 << 10;
/// A line is to stay short.
const MOST_TIMES: usize = 64;

/// `traffic tcp-send`. Fails when the connection breaks.
pub fn send(arguments: &mut Arguments) -> Result<(), Failure> {
    let to: SocketAddr = arguments.required("to")?;
    let rate = arguments.rate()?;
    let seconds: Option<u64> = arguments.optional("seconds")?;
    let mut status = StatusFile::optional(arguments)?;
    arguments.finish()?;

    let mut stream = TcpStream::connect(to).map_err(|e| Failure::Io("connect", e))?;
    // A write that waits for the peer must still let the status be written.
    stream.set_write_timeout(Some(PERIOD)).map_err(|e| Failure::Io("set a timeout", e))?;
    let mut session = Session { id: random_id()?, clock: Some(Clock::start()?), ..Session::default() };
    let mut opening = [0; 16];
    opening[..8].copy_from_slice(&MAGIC);
    opening[8..].copy_from_slice(&session.id.to_be_bytes());
    // The send buffer of a new connection has room for 16 bytes.
    stream.write_all(&opening).map_err(|e| Failure::Io("send", e))?;

    let start = Instant::now();
    let mut pace = Pace::new(rate, start);
    // Every 10 ms: finer steps would be a system call for a few bytes each.
    let step = rate.map_or(1, |r| (r / 100).clamp(1, CHUNK as u64));
    let mut chunk = vec![0; CHUNK];
    let outcome = loop {
        let now = Instant::now();
        if seconds.is_some_and(|s| now.duration_since(start).as_secs() >= s) {
            break Ok(());
        }
        let allowed = pace.allowed(now, CHUNK as u64) as usize;
        if (allowed as u64) < step {
            std::thread::sleep(pace.wait(now, step).min(PERIOD));
        } else {
            let part = &mut chunk[..allowed];
            fill(session.id, session.bytes, part);
            match stream.write(part) {
                Ok(0) => break Err(std::io::Error::from(ErrorKind::WriteZero)),
                Ok(written) => {
                    session.bytes += written as u64;
                    pace.did(written as u64);
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => break Err(error),
            }
        }
        session.look(&stream);
        status.update(|| session.line("tcp-send", "open", &stream))?;
    };
    if let Err(error) = outcome {
        status.write(session.line("tcp-send", "broken", &stream))?;
        return Err(Failure::Io("send", error));
    }

    let broken = |status: &mut StatusFile, error| {
        status.write(session.line("tcp-send", "broken", &stream))?;
        Err(Failure::Io("end the session", error))
    };
    if let Err(error) = stream.shutdown(std::net::Shutdown::Write) {
        return broken(&mut status, error);
    }
    let mut answer = [0; 16];
    if let Err(error) = (&stream).read_exact(&mut answer) {
        return broken(&mut status, error);
    }
    status.write(session.line("tcp-send", "done", &stream))?;
    let checked = u64::from_be_bytes(answer[..8].try_into().expect("8 bytes"));
    let bad = u64::from_be_bytes(answer[8..].try_into().expect("8 bytes"));
    if checked != session.bytes || bad != 0 {
        return Err(Failure::Check(format!(
            "sent {} bytes, the server checked {checked} of which {bad} were bad",
            session.bytes
        )));
    }
    Ok(())
}

/// `traffic tcp-serve`: one session after another, for ever.
pub fn serve(arguments: &mut Arguments) -> Result<(), Failure> {
    let port: u16 = arguments.required("port")?;
    let mut status = StatusFile::required(arguments)?;
    arguments.finish()?;

    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .map_err(|e| Failure::Io("listen", e))?;
    status.write(Line::new("tcp-serve").word("state", "waiting").value("connections", 0))?;
    let mut connections = 0;
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if is_passing(&error) || error.kind() == ErrorKind::ConnectionAborted => {
                continue;
            }
            Err(error) => return Err(Failure::Io("accept", error)),
        };
        connections += 1;
        serve_one(stream, connections, &mut status)?;
    }
}

/// Checks one session to its end. A peer's failing is in the status and not ours.
fn serve_one(mut stream: TcpStream, connections: u64, status: &mut StatusFile) -> Result<(), Failure> {
    stream.set_read_timeout(Some(PERIOD)).map_err(|e| Failure::Io("set a timeout", e))?;
    let mut session = Session { connections, ..Session::default() };
    let mut opening = Vec::with_capacity(16);
    let mut buffer = vec![0; CHUNK];
    let mut scratch = vec![0; CHUNK];
    status.write(session.line("tcp-serve", "open", &stream))?;
    let state = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "closed",
            Ok(length) => {
                let mut rest = &buffer[..length];
                if opening.len() < 16 {
                    let taken = rest.len().min(16 - opening.len());
                    opening.extend_from_slice(&rest[..taken]);
                    rest = &rest[taken..];
                    if opening.len() == 16 {
                        if opening[..8] != MAGIC {
                            break "stranger";
                        }
                        session.id = u64::from_be_bytes(opening[8..].try_into().expect("8 bytes"));
                    }
                }
                session.check(rest, &mut scratch);
            }
            Err(error) if is_passing(&error) => {}
            Err(_) => break "broken",
        }
        status.update(|| session.line("tcp-serve", "open", &stream))?;
    };
    if state == "closed" {
        let mut answer = [0; 16];
        answer[..8].copy_from_slice(&session.bytes.to_be_bytes());
        answer[8..].copy_from_slice(&session.bad.to_be_bytes());
        // The sender tells if the answer does not come; there is nobody to tell here.
        let _ = stream.write_all(&answer);
    }
    status.write(session.line("tcp-serve", state, &stream))
}

fn is_passing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
        && error.raw_os_error() != Some(libc::ETIMEDOUT)
}

/// One session, as either side sees it.
#[derive(Debug, Default)]
struct Session {
    id: u64,
    connections: u64,
    bytes: u64,
    bad: u64,
    first_bad: Option<u64>,
    /// The sender's.
    clock: Option<Clock>,
    retransmits: u32,
    /// When that was seen to have grown, in milliseconds since the machine was started; the first [`MOST_TIMES`] of them.
    retransmitted_ms: Vec<u64>,
}

/// The time since the machine was started, as /proc/uptime has it.
#[derive(Debug)]
struct Clock {
    base: Duration,
    started: Instant,
}

impl Clock {
    fn start() -> Result<Self, Failure> {
        let text =
            std::fs::read_to_string("/proc/uptime").map_err(|e| Failure::Io("read /proc/uptime", e))?;
        let seconds = text.split(' ').next().and_then(|seconds| seconds.parse().ok());
        let base = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let base = base.ok_or_else(|| Failure::Check(format!("/proc/uptime: {text}")))?;
        Ok(Self { base, started: Instant::now() })
    }

    fn now_ms(&self) -> u64 {
        (self.base + self.started.elapsed()).as_millis() as u64
    }
}

impl Session {
    /// Checks the bytes that follow those checked so far. `scratch` holds as many.
    fn check(&mut self, bytes: &[u8], scratch: &mut [u8]) {
        let expected = &mut scratch[..bytes.len()];
        fill(self.id, self.bytes, expected);
        if bytes != expected {
            for (index, (got, wanted)) in bytes.iter().zip(expected.iter()).enumerate() {
                if got != wanted {
                    self.bad += 1;
                    self.first_bad.get_or_insert(self.bytes + index as u64);
                }
            }
        }
        self.bytes += bytes.len() as u64;
    }

    /// Notes when something was sent again. To be called often.
    fn look(&mut self, stream: &TcpStream) {
        let (Some(clock), Some(retransmits)) = (&self.clock, total_retransmits(stream)) else { return };
        if retransmits > self.retransmits {
            self.retransmits = retransmits;
            if self.retransmitted_ms.len() < MOST_TIMES {
                self.retransmitted_ms.push(clock.now_ms());
            }
        }
    }

    fn line(&self, kind: &str, state: &'static str, stream: &TcpStream) -> Line {
        let retransmits = total_retransmits(stream);
        let line = Line::new(kind)
            .word("state", state)
            .id("connection", self.id)
            .value("bytes", self.bytes)
            .optional("retransmits", retransmits);
        if kind == "tcp-send" {
            return line.value("retransmitted_ms", format_args!("{:?}", self.retransmitted_ms));
        }
        line.value("bad_bytes", self.bad)
            .optional("first_bad", self.first_bad)
            .value("connections", self.connections)
    }
}

/// The stream of session `id` from position `at` on: splitmix64 of the 8-byte word's
/// index, so that any position can be checked without those before it.
fn fill(id: u64, at: u64, bytes: &mut [u8]) {
    let mut position = at;
    let mut rest = bytes;
    while !rest.is_empty() {
        let word = word(id, position / 8).to_le_bytes();
        let offset = (position % 8) as usize;
        let length = rest.len().min(8 - offset);
        let (now, later) = rest.split_at_mut(length);
        now.copy_from_slice(&word[offset..offset + length]);
        position += length as u64;
        rest = later;
    }
}

fn word(id: u64, index: u64) -> u64 {
    let mut z = id.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Segments that this side has retransmitted in the connection's life.
fn total_retransmits(stream: &TcpStream) -> Option<u32> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the call; the kernel writes at most `length`
    // bytes, which is the size of the buffer.
    let answer = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if answer != 0 {
        return None;
    }
    // SAFETY: all fields are integers, and what the kernel did not write is zero.
    Some(unsafe { info.assume_init() }.tcpi_total_retrans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_does_not_depend_on_how_it_is_cut() {
        let mut whole = vec![0; 1000];
        fill(7, 3, &mut whole);
        for cut in [1, 2, 7, 8, 9, 500, 999] {
            let mut parts = vec![0; 1000];
            for (index, part) in parts.chunks_mut(cut).enumerate() {
                fill(7, 3 + (index * cut) as u64, part);
            }
            assert_eq!(parts, whole, "cut into {cut}");
        }
        let mut other = vec![0; 1000];
        fill(8, 3, &mut other);
        assert_ne!(other, whole);
    }

    #[test]
    fn every_bad_byte_is_counted_and_the_first_is_named() {
        let mut scratch = vec![0; CHUNK];
        let mut bytes = vec![0; 100];
        fill(5, 0, &mut bytes);
        bytes[40] ^= 1;
        bytes[99] ^= 0x80;
        let mut session = Session { id: 5, ..Session::default() };
        for part in bytes.chunks(33) {
            session.check(part, &mut scratch);
        }
        assert_eq!((session.bytes, session.bad, session.first_bad), (100, 2, Some(40)));
    }

    #[test]
    fn a_byte_lost_from_the_stream_does_not_pass() {
        let mut scratch = vec![0; CHUNK];
        let mut bytes = vec![0; 4096];
        fill(5, 0, &mut bytes);
        bytes.remove(1000);
        let mut session = Session { id: 5, ..Session::default() };
        session.check(&bytes, &mut scratch);
        assert!(session.bad > 2900, "{} bad", session.bad);
        assert_eq!(session.first_bad, Some(1000));
    }

    #[test]
    fn a_real_connection_tells_its_retransmissions() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(total_retransmits(&stream), Some(0));
    }
}
