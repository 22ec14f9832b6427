//! The guest agent: commands run inside the guest, over a serial channel.
//!
//! States: every request is preceded by a synchronisation (`guest-sync-delimited` with a fresh id), because the
//! channel keeps bytes of earlier, abandoned conversations in both directions; only what follows the agent's 0xFF
//! mark and the fresh id counts. One client at a time: QEMU accepts one connection on the channel.
//!
//! The guest is hostile: replies are bounded, and one that is no answer is an error, not a panic.

use crate::qmp::{DecodeError, Decoder};
use crate::socket_path::{self, SocketPathTooLong};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The largest reply. The agent cuts standard output and standard error at 16 MiB each; both in base64 make 43 MiB.
pub const MAX_REPLY_BYTES: usize = 48 << 20;

/// The most values in a reply: no answer that is asked for has more than ten, and a guest may send anything.
const MAX_REPLY_VALUES: usize = 1 << 10;

/// The least that an answer comes at, once it has begun: a serial port without KVM on a busy host.
const ANSWER_BYTES_PER_SECOND: u64 = 64 << 10;

/// The mark before the answer to a synchronisation; it cannot stand in JSON text.
const SENTINEL: u8 = 0xff;

/// A command that was started in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exec {
    /// The process number in the guest.
    pub pid: i64,
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Whether the agent cut either of them.
    pub truncated: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Why the guest agent could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestAgentError {
    /// The socket's path cannot be connected to.
    #[error(transparent)]
    SocketPath(#[from] SocketPathTooLong),
    /// Nobody listens on the socket.
    #[error("cannot connect to the guest agent's channel {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// No answer in time: the agent is not installed, not started yet, or busy.
    #[error("the guest agent did not answer within {} ms", after.as_millis())]
    NotResponding {
        /// How long it was waited for.
        after: Duration,
    },
    /// QEMU closed the channel; usually it has died, or another client is connected.
    #[error("the guest agent's channel was closed")]
    Disconnected,
    /// The agent refused the command.
    #[error("the guest agent refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: &'static str,
        /// The agent's error class.
        class: String,
        /// The agent's description.
        desc: String,
    },
    /// The agent's answer has another form than documented.
    #[error("the guest agent's answer to {command} lacks a valid {field:?}")]
    BadAnswer {
        /// The command.
        command: &'static str,
        /// The field.
        field: &'static str,
    },
    /// The agent's answer is no JSON, or too long.
    #[error("the guest agent's answer cannot be read: {0}")]
    Decode(#[from] DecodeError),
    /// Any other failure of the channel.
    #[error("the guest agent's channel failed: {0}")]
    Socket(#[from] io::Error),
}

/// A connection to one guest's agent.
#[derive(Debug)]
pub struct GuestAgent {
    stream: UnixStream,
    decoder: Decoder,
    timeout: Duration,
}

impl GuestAgent {
    /// Connects, without a word to the guest yet: [`GuestAgent::resynchronise`] comes before the first request. A channel
    /// that is kept may be tried again and again; each new connection to a guest that does not listen would wait in
    /// QEMU's short queue behind the ones before it. Requests may each take 10 s; see [`GuestAgent::set_timeout`].
    pub fn connect(path: &Path) -> Result<GuestAgent, GuestAgentError> {
        socket_path::check(path)?;
        let stream = UnixStream::connect(path)
            .map_err(|source| GuestAgentError::Connect { path: path.display().to_string(), source })?;
        Ok(GuestAgent::attach(stream))
    }

    /// Synchronises on a connected channel.
    pub fn over(stream: UnixStream, deadline: Instant) -> Result<GuestAgent, GuestAgentError> {
        let mut agent = GuestAgent::attach(stream);
        agent.resynchronise(deadline)?;
        Ok(agent)
    }

    fn attach(stream: UnixStream) -> GuestAgent {
        let decoder = decoder();
        GuestAgent { stream, decoder, timeout: Duration::from_secs(10) }
    }

    /// Comes into step with the agent before `deadline`, whatever was left half said before.
    pub fn resynchronise(&mut self, deadline: Instant) -> Result<(), GuestAgentError> {
        self.synchronise(Instant::now(), deadline)
    }

    /// Sets how long each request may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Asks whether the agent is there.
    pub fn ping(&mut self) -> Result<(), GuestAgentError> {
        self.request("guest-ping", Value::Null).map(drop)
    }

    /// Starts a program in the guest, with `environment` as `NAME=value` and `input` as its standard input.
    pub fn exec(
        &mut self,
        path: &str,
        arguments: &[String],
        environment: &[String],
        input: &[u8],
    ) -> Result<Exec, GuestAgentError> {
        let mut request = json!({"path": path, "arg": arguments, "capture-output": true});
        if !environment.is_empty() {
            request["env"] = json!(environment);
        }
        if !input.is_empty() {
            request["input-data"] = STANDARD.encode(input).into();
        }
        let answer = self.request("guest-exec", request)?;
        let pid = answer["pid"]
            .as_i64()
            .ok_or(GuestAgentError::BadAnswer { command: "guest-exec", field: "pid" })?;
        Ok(Exec { pid })
    }

    /// Asks whether a program has ended, and how; `None` while it runs. The agent forgets it once it has told its end.
    pub fn exec_status(&mut self, exec: Exec) -> Result<Option<Status>, GuestAgentError> {
        parse_status(&self.request("guest-exec-status", json!({"pid": exec.pid}))?)
    }

    /// Asks the guest to shut down. The agent does not answer this, so only a refusal that arrives at once is noticed.
    pub fn shutdown(&mut self) -> Result<(), GuestAgentError> {
        let (started, deadline) = (Instant::now(), Instant::now() + self.timeout);
        self.synchronise(started, deadline)?;
        self.send(b"", "guest-shutdown", json!({"mode": "powerdown"}), started)
    }

    fn request(&mut self, command: &'static str, arguments: Value) -> Result<Value, GuestAgentError> {
        let (started, deadline) = (Instant::now(), Instant::now() + self.timeout);
        self.synchronise(started, deadline)?;
        self.send(b"", command, arguments, started)?;
        answer(command, self.read_value(started, deadline)?)
    }

    fn synchronise(&mut self, started: Instant, deadline: Instant) -> Result<(), GuestAgentError> {
        // Within 53 bits: the agent's parser may go through floating point.
        let id = RandomState::new().hash_one(started) >> 11;
        // The mark makes the agent drop half a request that an earlier client left behind.
        self.send(&[SENTINEL], "guest-sync-delimited", json!({"id": id}), started)?;
        // Answers to earlier requests come first. Each mark may be the one; the id decides.
        loop {
            self.skip_to_sentinel(started, deadline)?;
            // A line that is cut by the next mark, or another id, belongs to an earlier conversation.
            match self.read_value(started, deadline) {
                Ok(value) if value["return"].as_u64() == Some(id) => return Ok(()),
                Ok(_)
                | Err(GuestAgentError::Decode(DecodeError::NotJson { .. } | DecodeError::TooMany { .. })) => {
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Drops everything up to and including the next mark. What was decoded before it is stale.
    fn skip_to_sentinel(&mut self, started: Instant, deadline: Instant) -> Result<(), GuestAgentError> {
        let mut buffered = std::mem::replace(&mut self.decoder, decoder()).into_bytes();
        loop {
            if let Some(at) = buffered.iter().position(|&byte| byte == SENTINEL) {
                self.decoder.feed(&buffered[at + 1..]);
                return Ok(());
            }
            buffered = self.read_some(started, deadline)?;
        }
    }

    fn read_value(&mut self, started: Instant, deadline: Instant) -> Result<Value, GuestAgentError> {
        let mut received_bytes = 0;
        loop {
            if let Some(value) = self.decoder.next_value() {
                return Ok(value?);
            }
            // A long answer may take longer, as long as it comes.
            let extension = Duration::from_secs(received_bytes / ANSWER_BYTES_PER_SECOND);
            let bytes = self.read_some(started, deadline + extension)?;
            received_bytes += bytes.len() as u64;
            self.decoder.feed(&bytes);
        }
    }

    fn read_some(&mut self, started: Instant, deadline: Instant) -> Result<Vec<u8>, GuestAgentError> {
        let mut chunk = vec![0; 16 << 10];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GuestAgentError::NotResponding { after: started.elapsed() });
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(GuestAgentError::Disconnected),
                Ok(length) => {
                    chunk.truncate(length);
                    return Ok(chunk);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(channel_error(error, started)),
            }
        }
    }

    fn send(
        &mut self,
        prefix: &[u8],
        command: &str,
        arguments: Value,
        started: Instant,
    ) -> Result<(), GuestAgentError> {
        let mut message = json!({"execute": command});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut bytes = prefix.to_vec();
        bytes.extend_from_slice(message.to_string().as_bytes());
        bytes.push(b'\n');
        // A guest that does not read fills the channel.
        self.stream.set_write_timeout(Some(self.timeout.max(Duration::from_millis(1))))?;
        self.stream.write_all(&bytes).map_err(|error| channel_error(error, started))
    }
}

pub(crate) fn decoder() -> Decoder {
    Decoder::with_limits(MAX_REPLY_BYTES, MAX_REPLY_VALUES)
}

fn channel_error(error: io::Error, started: Instant) -> GuestAgentError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            GuestAgentError::NotResponding { after: started.elapsed() }
        }
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => GuestAgentError::Disconnected,
        _ => GuestAgentError::Socket(error),
    }
}

pub(crate) fn answer(command: &'static str, mut value: Value) -> Result<Value, GuestAgentError> {
    if let Some(error) = value.get("error") {
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        return Err(GuestAgentError::Refused { command, class: text("class"), desc: text("desc") });
    }
    value.get_mut("return").map(Value::take).ok_or(GuestAgentError::BadAnswer { command, field: "return" })
}

pub(crate) fn parse_status(answer: &Value) -> Result<Option<Status>, GuestAgentError> {
    let bad = |field| GuestAgentError::BadAnswer { command: "guest-exec-status", field };
    if !answer["exited"].as_bool().ok_or_else(|| bad("exited"))? {
        return Ok(None);
    }
    let number = |field: &'static str| match answer.get(field) {
        None => Ok(None),
        Some(value) => {
            value.as_i64().and_then(|number| i32::try_from(number).ok()).map(Some).ok_or_else(|| bad(field))
        }
    };
    let exit = match (number("exitcode")?, number("signal")?) {
        (_, Some(signal)) => Exit::Signal(signal),
        (Some(code), None) => Exit::Code(code),
        (None, None) => return Err(bad("exitcode")),
    };
    let data = |field: &'static str| match answer.get(field) {
        None => Ok(Vec::new()),
        Some(value) => value.as_str().and_then(|text| STANDARD.decode(text).ok()).ok_or_else(|| bad(field)),
    };
    let truncated = |field: &str| answer[field].as_bool().unwrap_or(false);
    Ok(Some(Status {
        exit,
        stdout: data("out-data")?,
        stderr: data("err-data")?,
        truncated: truncated("out-truncated") || truncated("err-truncated"),
    }))
}

#[cfg(test)]
#[path = "guest_agent_tests.rs"]
mod tests;
