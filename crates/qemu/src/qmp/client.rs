//! A blocking QMP connection.
//!
//! States: connected and negotiated from the start ([`Client::connect`] does both), until QEMU or the caller closes
//! it. Commands are answered in order; events that arrive meanwhile wait in a bounded queue, oldest dropped first
//! and counted. A timeout leaves the connection usable: a late answer is recognised by its id and discarded.

use super::codec::{DecodeError, Decoder, Event, Message, encode};
use crate::socket_path::{self, SocketPathTooLong};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How many events wait unread before the oldest is dropped. A busy block job emits a few a second.
pub const MAX_QUEUED_EVENTS: usize = 1024;

/// Why a QMP exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket's path cannot be connected to.
    #[error(transparent)]
    SocketPath(#[from] SocketPathTooLong),
    /// Nobody listens on the socket, or it does not exist.
    #[error("cannot connect to the QMP socket {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// QEMU closed the connection; usually it has died.
    #[error("QEMU closed the QMP connection during {during}")]
    Disconnected {
        /// The command or phase that was under way.
        during: String,
    },
    /// No answer in time. QEMU may still carry the command out.
    #[error("QEMU did not answer {during} within {after_ms} ms")]
    Timeout {
        /// The command or phase that was under way.
        during: String,
        /// How long it was waited for.
        after_ms: u64,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Command {
        /// The refused command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's description.
        desc: String,
    },
    /// QEMU, or something in its place, sent what is no QMP.
    #[error("not QMP: {0}")]
    Decode(#[from] DecodeError),
    /// The first message was not a greeting.
    #[error("the first QMP message is no greeting")]
    NoGreeting,
    /// Any other failure of the socket.
    #[error("the QMP socket failed during {during}: {source}")]
    Socket {
        /// The command or phase that was under way.
        during: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A negotiated connection to one QEMU monitor.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    decoder: Decoder,
    events: VecDeque<Event>,
    dropped_events: u64,
    next_id: u64,
    version: (u64, u64, u64),
}

/// What an event loop needs to go on where a [`Client`] left off.
#[derive(Debug)]
pub struct Parts {
    /// The socket, set to non-blocking.
    pub stream: UnixStream,
    /// The decoder, which may hold part of a message.
    pub decoder: Decoder,
    /// Events that arrived and were not taken.
    pub events: Vec<Event>,
    /// The first command id that was not used.
    pub next_id: u64,
}

impl Client {
    /// Connects, reads the greeting and leaves negotiation mode, all before `deadline`.
    ///
    /// The socket must exist and listen. A caller that has just spawned QEMU reaches that without polling by binding
    /// the listener itself and handing it over (`command_line::Listener::Fd`): then the connection waits in the
    /// listener's backlog, and a QEMU that dies early shows as [`QmpError::Disconnected`].
    pub fn connect(path: &Path, deadline: Instant) -> Result<Client, QmpError> {
        socket_path::check(path)?;
        let stream = UnixStream::connect(path)
            .map_err(|source| QmpError::Connect { path: path.display().to_string(), source })?;
        Client::negotiate(stream, deadline)
    }

    /// Negotiates on a connected socket.
    pub fn negotiate(stream: UnixStream, deadline: Instant) -> Result<Client, QmpError> {
        let mut client = Client {
            stream,
            decoder: Decoder::new(),
            events: VecDeque::new(),
            dropped_events: 0,
            next_id: 1,
            version: (0, 0, 0),
        };
        let started = Instant::now();
        match client.read_message("greeting", started, deadline)? {
            Message::Greeting { version } => client.version = version,
            _ => return Err(QmpError::NoGreeting),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        client.execute("qmp_capabilities", Value::Null, left)?;
        Ok(client)
    }

    /// The version that QEMU greeted with: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.version
    }

    /// Runs one command and returns its value. Pass `Value::Null` for no arguments.
    pub fn execute(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value, QmpError> {
        self.execute_with_fd(command, arguments, None, timeout)
    }

    /// Hands `fd` to QEMU under `name`, for `fd:name` URIs **on this connection only**: QEMU keeps such descriptors
    /// per monitor.
    pub fn send_fd(&mut self, fd: BorrowedFd<'_>, name: &str, timeout: Duration) -> Result<(), QmpError> {
        self.execute_with_fd("getfd", json!({"fdname": name}), Some(fd), timeout)?;
        Ok(())
    }

    /// All events that have arrived and were not taken, oldest first. Does not read the socket.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// How many events were dropped because nobody took them.
    pub fn dropped_events(&self) -> u64 {
        self.dropped_events
    }

    /// Waits for the first event with one of `names` and takes it; earlier events of other names stay queued.
    pub fn wait_event(&mut self, names: &[&str], deadline: Instant) -> Result<Event, QmpError> {
        let started = Instant::now();
        let during = || format!("the wait for {}", names.join(" or "));
        loop {
            if let Some(at) = self.events.iter().position(|event| names.contains(&event.name.as_str()))
                && let Some(event) = self.events.remove(at)
            {
                return Ok(event);
            }
            let message = self.read_message(&during(), started, deadline)?;
            self.queue_event(message);
        }
    }

    /// Takes the client apart for an event loop.
    pub fn into_parts(self) -> io::Result<Parts> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;
        self.stream.set_nonblocking(true)?;
        Ok(Parts {
            stream: self.stream,
            decoder: self.decoder,
            events: self.events.into(),
            next_id: self.next_id,
        })
    }

    fn execute_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let started = Instant::now();
        let deadline = started + timeout;
        let id = self.next_id;
        self.next_id += 1;
        let bytes = encode(id, command, arguments);
        self.send(&bytes, fd, timeout).map_err(|source| socket_error(command, started, source))?;
        loop {
            match self.read_message(command, started, deadline)? {
                Message::Return { id: Some(answered), value } if answered == id => return Ok(value),
                Message::Error { id: Some(answered), class, desc } if answered == id => {
                    return Err(QmpError::Command { command: command.to_owned(), class, desc });
                }
                other => self.queue_event(other),
            }
        }
    }

    fn send(&mut self, bytes: &[u8], fd: Option<BorrowedFd<'_>>, timeout: Duration) -> io::Result<()> {
        self.stream.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            sent = sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(bytes)],
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
        }
        self.stream.write_all(&bytes[sent..])
    }

    fn read_message(
        &mut self,
        during: &str,
        started: Instant,
        deadline: Instant,
    ) -> Result<Message, QmpError> {
        let mut chunk = [0u8; 16 << 10];
        loop {
            if let Some(message) = self.decoder.next_message() {
                return Ok(message?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out(during, started));
            }
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut chunk));
            match read {
                Ok(0) => return Err(QmpError::Disconnected { during: during.to_owned() }),
                Ok(length) => self.decoder.feed(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(socket_error(during, started, source)),
            }
        }
    }

    /// Keeps events; answers to commands that timed out are of no use to anybody.
    fn queue_event(&mut self, message: Message) {
        if let Message::Event(event) = message {
            if self.events.len() == MAX_QUEUED_EVENTS {
                self.events.pop_front();
                self.dropped_events += 1;
            }
            self.events.push_back(event);
        }
    }
}

fn timed_out(during: &str, started: Instant) -> QmpError {
    let after_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    QmpError::Timeout { during: during.to_owned(), after_ms }
}

fn socket_error(during: &str, started: Instant, source: io::Error) -> QmpError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => timed_out(during, started),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            QmpError::Disconnected { during: during.to_owned() }
        }
        _ => QmpError::Socket { during: during.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead;

    const GREETING: &[u8] =
        b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 22}}}}\r\n";

    /// The peer's side of a socket pair: greets, then answers each command by what `answer` gives for its id.
    fn peer(answer: impl Fn(u64) -> Vec<u8> + Send + 'static) -> (UnixStream, std::thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let thread = std::thread::spawn(move || {
            let mut writer = theirs.try_clone().expect("clone");
            writer.write_all(GREETING).expect("greet");
            for line in io::BufReader::new(theirs).lines() {
                let command: Value = serde_json::from_str(&line.expect("line")).expect("json");
                let reply = answer(command["id"].as_u64().expect("id"));
                if reply.is_empty() {
                    return;
                }
                writer.write_all(&reply).expect("reply");
            }
        });
        (ours, thread)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn events_between_command_and_answer_are_kept() {
        let (stream, thread) = peer(|id| {
            format!("{{\"event\": \"E{id}\", \"timestamp\": {{\"seconds\": 1, \"microseconds\": 2}}}}\n{{\"return\": {id}, \"id\": {id}}}\n")
                .into_bytes()
        });
        let mut client = Client::negotiate(stream, soon()).expect("negotiate");
        assert_eq!(client.version(), (7, 2, 22));
        assert_eq!(client.execute("x", Value::Null, Duration::from_secs(10)).expect("answer"), json!(2));
        assert_eq!(client.wait_event(&["E2"], soon()).expect("event").name, "E2");
        assert_eq!(client.take_events().iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["E1"]);
        drop(client);
        thread.join().expect("peer");
    }

    #[test]
    fn a_peer_that_goes_away_is_a_disconnection() {
        let (stream, thread) =
            peer(|id| if id == 1 { b"{\"return\": {}, \"id\": 1}\n".to_vec() } else { Vec::new() });
        let mut client = Client::negotiate(stream, soon()).expect("negotiate");
        let error = client.execute("stop", Value::Null, Duration::from_secs(10)).expect_err("gone");
        assert!(matches!(error, QmpError::Disconnected { ref during } if during == "stop"), "{error}");
        thread.join().expect("peer");
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next() {
        let (stream, thread) = peer(|id| match id {
            2 => b"\n".to_vec(),
            3 => b"{\"return\": \"late\", \"id\": 2}\n{\"return\": \"mine\", \"id\": 3}\n".to_vec(),
            _ => format!("{{\"return\": {{}}, \"id\": {id}}}\n").into_bytes(),
        });
        let mut client = Client::negotiate(stream, soon()).expect("negotiate");
        let error = client.execute("slow", Value::Null, Duration::from_millis(20)).expect_err("no answer");
        assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
        assert_eq!(
            client.execute("next", Value::Null, Duration::from_secs(10)).expect("answer"),
            json!("mine")
        );
        drop(client);
        thread.join().expect("peer");
    }

    #[test]
    fn unread_events_are_bounded() {
        let (stream, thread) = peer(|id| {
            let mut reply = Vec::new();
            if id == 2 {
                for _ in 0..MAX_QUEUED_EVENTS + 5 {
                    reply.extend_from_slice(b"{\"event\": \"X\"}\n");
                }
            }
            reply.extend_from_slice(format!("{{\"return\": {{}}, \"id\": {id}}}\n").as_bytes());
            reply
        });
        let mut client = Client::negotiate(stream, soon()).expect("negotiate");
        client.execute("x", Value::Null, Duration::from_secs(10)).expect("answer");
        assert_eq!(client.dropped_events(), 5);
        assert_eq!(client.take_events().len(), MAX_QUEUED_EVENTS);
        drop(client);
        thread.join().expect("peer");
    }
}
