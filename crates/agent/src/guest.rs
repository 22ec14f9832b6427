//! Working inside machines: commands through the guest agent, consoles, console logs.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use diorama_api::{ApiError, ErrorKind, ExecReport, ExecRequest};
use diorama_qemu::guest_agent::{Exit, GuestAgent, GuestAgentError};
use diorama_qemu::process::ProcessId;

use crate::Agent;
use crate::launch::{SocketPaths, console_log};
use crate::operation::Operation;
use crate::problem::io_error;
use crate::record::{Phase, Rest};
use crate::slot::Slot;

/// How long a guest's agent may take to answer at all: a slow guest boots that long.
const AGENT_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest's agent may take to answer a request, apart from reading its input.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The least that a guest's agent reads of its input in a second, in bytes: a serial port without KVM on a busy host.
const INPUT_BYTES_PER_SECOND: u64 = 64 << 10;
/// How long one try takes; between two, the client may have gone.
const TRY_LIMIT: Duration = Duration::from_secs(1);
/// How often a running command is asked after: often at first.
const POLL_FIRST: Duration = Duration::from_millis(2);
const POLL_MOST: Duration = Duration::from_millis(50);

impl Agent {
    /// Runs a command in a guest and waits for its end.
    pub(crate) fn exec(
        &self,
        environment: &str,
        machine: &str,
        request: &ExecRequest,
        operation: &Operation,
    ) -> Result<ExecReport, ApiError> {
        let Some((program, arguments)) = request.command.split_first() else {
            return Err(ApiError::new(ErrorKind::Invalid, "no command given")
                .hint("for example: `diorama exec MACHINE -- ip address`"));
        };
        let input = match &request.stdin_base64 {
            None => Vec::new(),
            Some(text) => BASE64.decode(text).map_err(|error| {
                ApiError::new(ErrorKind::Invalid, format!("standard input is not base64: {error}"))
            })?,
        };
        let (slot, paths) = self.machine_paths(environment, machine)?;
        refuse_at_rest(&slot, machine)?;
        let channel =
            slot.state().machine(machine).map(|machine| Arc::clone(&machine.guest)).ok_or_else(|| {
                ApiError::new(ErrorKind::WrongState, format!("machine {machine} is not there any more"))
            })?;
        let limit = request.agent_timeout_ms.map_or(AGENT_LIMIT, Duration::from_millis);
        channel.reach(&paths.guest_agent, machine, limit, operation)?;
        let input_limit = ANSWER_LIMIT + Duration::from_secs(input.len() as u64 / INPUT_BYTES_PER_SECOND);
        let running =
            channel.request(machine, input_limit, |agent| agent.exec(program, arguments, &[], &input))?;
        let mut poll = POLL_FIRST;
        let status = loop {
            if let Some(status) =
                channel.request(machine, ANSWER_LIMIT, |agent| agent.exec_status(running))?
            {
                break status;
            }
            operation.check()?;
            // The guest agent has no event for this.
            std::thread::sleep(poll);
            poll = (poll * 2).min(POLL_MOST);
        };
        let (exit_code, signal) = match status.exit {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal(signal) => (None, Some(signal)),
        };
        Ok(ExecReport {
            exit_code,
            signal,
            stdout_base64: BASE64.encode(&status.stdout),
            stderr_base64: BASE64.encode(&status.stderr),
            truncated: status.truncated,
        })
    }

    /// Connects to a machine's serial console.
    pub(crate) fn open_console(&self, environment: &str, machine: &str) -> Result<UnixStream, ApiError> {
        let (_, paths) = self.machine_paths(environment, machine)?;
        let stream = UnixStream::connect(&paths.console).map_err(|error| {
            ApiError::new(
                ErrorKind::WrongState,
                format!("the console of {machine} cannot be opened: {error}"),
            )
            .hint("`diorama status` shows whether the machine runs")
        })?;
        stream.set_nonblocking(true).map_err(|error| io_error(&paths.console, &error))?;
        Ok(stream)
    }

    /// The file with what a machine's console has printed, and where its last `lines` lines begin.
    pub(crate) fn console_log(
        &self,
        environment: &str,
        machine: &str,
        lines: Option<usize>,
    ) -> Result<(PathBuf, u64), ApiError> {
        let (slot, _) = self.machine_paths(environment, machine)?;
        let path = console_log(&slot.folder(&self.folders).join("console"), machine);
        let offset = match lines {
            None => 0,
            Some(lines) => last_lines(&path, lines).map_err(|error| io_error(&path, &error))?,
        };
        Ok((path, offset))
    }

    fn machine_paths(&self, environment: &str, machine: &str) -> Result<(Arc<Slot>, SocketPaths), ApiError> {
        let slot = self.slots.get(environment)?;
        let record = slot.record_if_up()?;
        debug_assert_eq!(record.phase, Phase::Up);
        let machines = &record.specification.machines;
        let Some(index) = machines.iter().position(|known| known.name.as_str() == machine) else {
            let names: Vec<&str> = machines.iter().map(|machine| machine.name.as_str()).collect();
            return Err(ApiError::new(
                ErrorKind::NotFound,
                format!("environment `{environment}` has no machine `{machine}`"),
            )
            .hint(format!("it has: {}", names.join(", "))));
        };
        let folder = crate::up::socket_folder(&slot, &self.folders, record.generation);
        Ok((slot, SocketPaths::new(&folder, index)))
    }
}

/// A machine that stands still answers nothing: that is said at once, and not when the time for an answer is over.
fn refuse_at_rest(slot: &Slot, machine: &str) -> Result<(), ApiError> {
    let record = slot.record_if_up()?;
    let machines = record.specification.machines.iter().zip(&record.machines);
    let Some((_, known)) = machines.into_iter().find(|(spec, _)| spec.name.as_str() == machine) else {
        return Ok(());
    };
    let (state, hint) = match known.rest {
        Some(Rest::Paused) => ("is paused", format!("`diorama resume {machine}` lets it run")),
        Some(Rest::Shutdown) => {
            ("has been shut down", "`diorama restore SNAPSHOT` brings it back as it was then".to_owned())
        }
        None if !ProcessId::from(known.process).is_alive().unwrap_or(true) => {
            ("has died", "`diorama status` says why; `diorama restore SNAPSHOT` brings it back".to_owned())
        }
        None => return Ok(()),
    };
    Err(ApiError::new(ErrorKind::WrongState, format!("machine {machine} {state}")).hint(hint))
}

/// The one connection to a machine's guest agent. QEMU serves one at a time, so that commands share it, a request each
/// in turn; and it is kept, because QEMU notices a closed one only when the guest reads.
#[derive(Debug, Default)]
pub(crate) struct GuestChannel(Mutex<Option<GuestAgent>>);

impl GuestChannel {
    /// Comes into step with the guest's agent, within `limit`.
    fn reach(
        &self,
        path: &Path,
        machine: &str,
        limit: Duration,
        operation: &Operation,
    ) -> Result<(), ApiError> {
        let deadline = Instant::now() + limit;
        loop {
            let next = deadline.min(Instant::now() + TRY_LIMIT);
            match self.try_reach(path, next) {
                Ok(()) => return Ok(()),
                Err(GuestAgentError::NotResponding { .. }) if next < deadline => operation.check()?,
                Err(GuestAgentError::NotResponding { .. }) => {
                    return Err(ApiError::new(
                        ErrorKind::Guest,
                        format!("machine {machine}: its guest agent did not answer within {} s", limit.as_secs()),
                    )
                    .hint(
                        "the guest may still be booting, be paused, or lack qemu-guest-agent; `diorama logs` and \
                         `diorama console` show what it does",
                    ));
                }
                Err(error) => return Err(guest_error(machine, &error)),
            }
        }
    }

    fn try_reach(&self, path: &Path, deadline: Instant) -> Result<(), GuestAgentError> {
        let mut connection = self.lock();
        let agent = match &mut *connection {
            Some(agent) => agent,
            none => none.insert(GuestAgent::connect(path)?),
        };
        let result = agent.resynchronise(deadline);
        if !matches!(result, Ok(()) | Err(GuestAgentError::NotResponding { .. })) {
            *connection = None;
        }
        result
    }

    /// Makes one request; whoever comes next finds the channel in step, or brings it there.
    fn request<T>(
        &self,
        machine: &str,
        limit: Duration,
        ask: impl FnOnce(&mut GuestAgent) -> Result<T, GuestAgentError>,
    ) -> Result<T, ApiError> {
        let mut connection = self.lock();
        let agent =
            connection.as_mut().ok_or_else(|| guest_error(machine, &GuestAgentError::Disconnected))?;
        agent.set_timeout(limit);
        let result = ask(agent);
        if matches!(result, Err(GuestAgentError::Disconnected)) {
            *connection = None;
        }
        result.map_err(|error| guest_error(machine, &error))
    }

    fn lock(&self) -> MutexGuard<'_, Option<GuestAgent>> {
        // A request that panicked leaves a channel out of step; the next one brings it back.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn guest_error(machine: &str, error: &GuestAgentError) -> ApiError {
    ApiError::new(ErrorKind::Guest, format!("machine {machine}: {error}"))
        .hint("`diorama status` shows whether the machine runs; the command may not exist in the guest")
}

fn last_lines(path: &Path, lines: usize) -> std::io::Result<u64> {
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let mut wanted = lines + 1;
    let mut end = length;
    let mut chunk = [0; 16 * 1024];
    while end > 0 {
        let begin = end.saturating_sub(chunk.len() as u64);
        let part = &mut chunk[..usize::try_from(end - begin).expect("at most the chunk")];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(part)?;
        for (index, byte) in part.iter().enumerate().rev() {
            // A line end at the very end closes the last line and begins none.
            if *byte == b'\n' && begin + index as u64 + 1 < length {
                wanted -= 1;
                if wanted == 1 || lines == 0 {
                    return Ok(begin + index as u64 + 1);
                }
            }
        }
        end = begin;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let check = |text: &str, lines: usize, expected: &str| {
            std::fs::write(&path, text).expect("written");
            let offset = usize::try_from(last_lines(&path, lines).expect("read")).expect("small");
            assert_eq!(&text[offset..], expected, "{lines} lines of {text:?}");
        };
        check("one\ntwo\nthree\n", 1, "three\n");
        check("one\ntwo\nthree\n", 2, "two\nthree\n");
        check("one\ntwo\nthree", 1, "three");
        check("one\ntwo\nthree\n", 9, "one\ntwo\nthree\n");
        check("", 3, "");
        check(&"line\n".repeat(10_000), 3, "line\nline\nline\n");
    }
}
