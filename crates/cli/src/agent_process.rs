//! Starting the agent when none answers.
//!
//! The agent is this same program, in a session of its own, with its output in the log. It is ready when it says so
//! through a pipe (`--ready-fd`): it writes a byte, or closes its end, once it listens. When it dies first, the pipe
//! closes too, and nothing listens: that is how the two are told apart. There is one deadline and no polling.
//!
//! An agent that finds its store encrypted, and nothing named that opens it, says that through the same pipe. Then a
//! person is asked for the passphrase, and the next agent reads it from a pipe: it never stands in an argument, a
//! variable or the log.
//!
//! Invariant: a lock is held from before the second look at the socket until the agent is ready, so that two commands
//! do not start two agents.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use diorama_agent::signatures;
use diorama_agent::store_keys::SecretSource;
use diorama_api::{ApiError, ErrorKind, Folders};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::failure::Failure;
use crate::output::Output;
use crate::secret::Terminal;

/// How long an agent may take until it listens. It takes its machines back first, which is milliseconds for each, but
/// for captures that an agent before it left under way: those are read to their ends.
const READY_DEADLINE: Duration = Duration::from_secs(180);

/// How long an agent that failed may take until its process is gone.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// How often a passphrase is asked for.
const ATTEMPTS: usize = 3;

/// How much of the log an error shows.
const LOG_LINES: usize = 10;
const LOG_BYTES: u64 = 8 << 10;

/// Returns when an agent listens, after starting it if there is none.
///
/// # Errors
/// When it cannot be started; with what it said last.
pub fn ensure(folders: &Folders, output: &Output) -> Result<(), Failure> {
    if listens(folders)? {
        return Ok(());
    }
    folders.create()?;
    let lock = folders.agent_start_lock();
    let _lock = open_private(&lock, true)
        .and_then(|file| file.lock().map(|()| file))
        .map_err(|error| Failure::io(format!("cannot lock {}: {error}", lock.display())))?;
    // Another command may have started it while this one waited for the lock.
    if listens(folders)? {
        return Ok(());
    }
    output.detail(|| format!("starting the agent; its log is {}", folders.agent_log().display()));
    match start(folders, None) {
        Err(Start::Locked(error)) => unlock(folders, error),
        started => started.map_err(Start::into_failure),
    }
}

/// The store is encrypted, and nothing that opens it was named: asks for the passphrase.
fn unlock(folders: &Folders, mut error: ApiError) -> Result<(), Failure> {
    // What was named and is wrong stays wrong.
    let named = SecretSource::from_process()?.is_some();
    let Some(mut terminal) = Terminal::open()?.filter(|_| !named) else { return Err(error.into()) };
    for _ in 0..ATTEMPTS {
        let typed = terminal.ask(&format!("Passphrase of the store {}: ", folders.store().display()))?;
        match start(folders, Some(&typed)) {
            Err(Start::Locked(wrong)) => error = wrong,
            started => return started.map_err(Start::into_failure),
        }
    }
    Err(error.into())
}

fn listens(folders: &Folders) -> Result<bool, Failure> {
    let socket = folders.socket();
    match UnixStream::connect(&socket) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(false)
        }
        Err(error) => Err(Failure::new(
            ErrorKind::Agent,
            format!("cannot connect to the agent at {}: {error}", socket.display()),
            "is the socket yours? DIORAMA_HOME and DIORAMA_RUNTIME_DIR say where it is",
        )),
    }
}

/// Why no agent was started.
enum Start {
    /// Nothing opens the store, or not what was given.
    Locked(ApiError),
    Failed(Failure),
}

impl Start {
    fn into_failure(self) -> Failure {
        match self {
            Self::Locked(error) => error.into(),
            Self::Failed(failure) => failure,
        }
    }
}

impl From<Failure> for Start {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Starts an agent; it gets the store's passphrase, where there is one, through a pipe.
fn start(folders: &Folders, passphrase: Option<&[u8]>) -> Result<(), Start> {
    let failed = |error: io::Error| Failure::io(format!("cannot start the agent: {error}"));
    let log_path = folders.agent_log();
    let log = open_private(&log_path, false)
        .map_err(|error| Failure::io(format!("cannot write {}: {error}", log_path.display())))?;
    let log_start = log.metadata().map_err(failed)?.len();
    let (ready, tell_ready) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|error| failed(error.into()))?;
    // Only this end goes to the agent; this program has no other thread that could start a process now.
    fcntl(&tell_ready, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|error| failed(error.into()))?;

    let mut agent = Command::new(std::env::current_exe().map_err(failed)?);
    agent
        .args(["agent", "--ready-fd", &tell_ready.as_raw_fd().to_string()])
        // The folders as this process sees them: the agent's current folder is another.
        .env("DIORAMA_HOME", folders.home())
        .env("DIORAMA_RUNTIME_DIR", folders.runtime())
        .env("DIORAMA_STORE", folders.store())
        .env_remove("DIORAMA_ENVIRONMENT")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    if let Some(source) = SecretSource::from_process().map_err(Failure::from)? {
        let (name, path) = source.variable().map_err(Failure::from)?;
        agent.env(name, path);
    }
    for (name, path) in signatures::variables().map_err(Failure::from)? {
        agent.env(name, path);
    }
    if passphrase.is_some() {
        agent.arg("--passphrase-stdin").stdin(Stdio::piped());
    }
    let mut agent = agent.spawn().map_err(failed)?;
    drop(tell_ready);
    if let (Some(passphrase), Some(mut stdin)) = (passphrase, agent.stdin.take()) {
        // An agent that has died already says so below.
        let _ = stdin.write_all(passphrase);
    }

    let in_time = wait_readable(&ready).map_err(failed)?;
    if in_time && listens(folders)? {
        return Ok(());
    }
    // What it had to say of itself, if anything; whoever holds the other end has ended, or is about to be.
    let mut said = Vec::new();
    if in_time {
        let _ = File::from(ready).take(LOG_BYTES).read_to_end(&mut said);
    }
    let how = end(agent, in_time);
    if let Ok(error) = serde_json::from_slice::<ApiError>(&said)
        && error.kind == ErrorKind::Locked
    {
        return Err(Start::Locked(error));
    }
    let said = log_tail(&log_path, log_start);
    let message = if said.is_empty() {
        format!("the agent could not be started: {how}")
    } else {
        format!("the agent could not be started: {how}. Its last words:\n{said}")
    };
    Err(Start::Failed(Failure::new(
        ErrorKind::Agent,
        message,
        format!("its log is {}; `diorama doctor` says what this computer lacks", log_path.display()),
    )))
}

/// Waits until the agent has written to the pipe or closed it. Whether that was before the deadline.
fn wait_readable(ready: &OwnedFd) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(READY_DEADLINE).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut [PollFd::new(ready.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(events) => return Ok(events > 0),
            // A stray signal: the deadline starts anew, which only makes a hopeless wait longer.
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes sure that a process which is no use does not stay, and says what became of it.
fn end(mut agent: Child, in_time: bool) -> String {
    let process = Pid::from_raw(i32::try_from(agent.id()).unwrap_or(i32::MAX));
    let (tell, told) = mpsc::channel();
    // The process is not reaped before this thread's wait, so its id cannot be another's until `told` has it.
    std::thread::spawn(move || tell.send(agent.wait()));
    if in_time {
        // The pipe is closed and nothing listens: it is about to end by itself, after it has said why.
        if let Ok(Ok(status)) = told.recv_timeout(END_DEADLINE) {
            return format!("it ended ({status})");
        }
    }
    match kill(process, Signal::SIGKILL).map(|()| told.recv_timeout(END_DEADLINE)) {
        Ok(Ok(Ok(_))) => format!("it did not listen within {} s, and was ended", READY_DEADLINE.as_secs()),
        _ => format!("it did not listen in time, and process {process} could not be ended"),
    }
}

fn log_tail(path: &Path, from: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(length.saturating_sub(LOG_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(LOG_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    // The log only explains; without it the error still says what happened.
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

fn open_private(path: &Path, read: bool) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).read(read).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tail_is_bounded_and_only_of_this_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.log");
        assert_eq!(log_tail(&path, 0), "");
        std::fs::write(&path, "an earlier run\nthis run\n").unwrap();
        assert_eq!(log_tail(&path, "an earlier run\n".len() as u64), "this run");
        let many: String = (0..5000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&path, many).unwrap();
        let tail = log_tail(&path, 0);
        assert_eq!(tail.lines().count(), LOG_LINES);
        assert!(tail.ends_with("line 4999"));
    }
}
