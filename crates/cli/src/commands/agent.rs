//! `diorama agent`.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use diorama_api::{ApiError, ClientError, ErrorKind, Folders, StopAgentRequest};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;
use crate::output::Output;
use crate::session::{self, Session};

/// How long an agent that has promised to end may take.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// More than any passphrase has.
const PASSPHRASE_BYTES_MAX: usize = 4096;

/// Run the agent: the daemon that holds the switch, the machines and the API
///
/// Commands start it by themselves; run it by hand to see its log, or under a supervisor. It runs in the foreground, and
/// logs to standard error. When it ends, machines run on without a network, and the next agent takes them back.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_long_help = "\
Examples:
  diorama agent                       in the foreground; Ctrl-C ends it
  DIORAMA_LOG=debug diorama agent     with more in its log (error, warn, info, debug, trace)
  diorama agent stop                  end the one that runs"
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// Write to, and close, this file descriptor when the agent listens
    #[arg(long, value_name = "N", hide = true, value_parser = clap::value_parser!(RawFd).range(3..))]
    ready_fd: Option<RawFd>,

    /// Read the store's passphrase from standard input
    #[arg(long, hide = true)]
    passphrase_stdin: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// End the agent
    ///
    /// Refused while environments run, unless `--force` is given.
    #[command(after_long_help = "\
Examples:
  diorama down --all && diorama agent stop
  diorama agent stop --force     machines run on, without a network until the next command")]
    Stop {
        /// Also while environments run: their machines run on, without a network until the next command
        #[arg(long)]
        force: bool,
    },
    /// Read live captures to their end when the agent dies; started by the agent
    #[command(hide = true)]
    KeepCaptures,
}

#[derive(Serialize)]
struct Stopped {
    /// Whether an agent ran.
    stopped: bool,
    pid: Option<u32>,
}

/// Runs or stops the agent.
///
/// # Errors
/// When it cannot listen, or will not stop.
pub fn run(arguments: Arguments, output: &Output, started: Instant) -> Result<u8, Failure> {
    match arguments.command {
        Some(Command::Stop { force }) => {
            session::run_if_started(output, started, async |session| stop(force, session).await)
        }
        Some(Command::KeepCaptures) => {
            diorama_agent::keep_captures().map_err(|error| {
                Failure::new(
                    ErrorKind::Invalid,
                    format!("standard input is not an agent's socket: {error}"),
                    "the agent runs this by itself; there is nothing to do by hand",
                )
            })?;
            Ok(0)
        }
        None => serve(arguments.ready_fd, arguments.passphrase_stdin, output),
    }
}

fn serve(ready_fd: Option<RawFd>, passphrase_stdin: bool, output: &Output) -> Result<u8, Failure> {
    let ready = ready_fd.map(adopt).transpose()?;
    if ready.is_some() {
        // A command started this: it must not end with that command's terminal.
        nix::unistd::setsid()
            .map_err(|error| Failure::io(format!("cannot leave the terminal's session: {error}")))?;
    }
    let folders = Folders::from_process()?;
    let level = match output.verbosity() {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::builder()
        .with_env_var("DIORAMA_LOG")
        .try_from_env()
        .unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && output.stderr_colour().is_on())
        .init();
    // An agent that was started by itself also ends by itself.
    let exit_when_idle = ready.is_some();
    let secret = if passphrase_stdin {
        let mut typed = Vec::with_capacity(PASSPHRASE_BYTES_MAX);
        let read = std::io::stdin().take(PASSPHRASE_BYTES_MAX as u64).read_to_end(&mut typed);
        read.map_err(|error| Failure::io(format!("cannot read the passphrase: {error}")))?;
        Some(diorama_agent::store_keys::passphrase(typed)?)
    } else {
        None
    };
    let ended = diorama_agent::run(diorama_agent::Options { folders, ready, secret, exit_when_idle });
    if let (Err(error), Some(ready)) = (&ended, ready)
        && error.kind == ErrorKind::Locked
    {
        tell(ready, error);
    }
    ended?;
    if output.json() {
        output.result(&Stopped { stopped: true, pid: Some(std::process::id()) }, String::new)?;
    }
    Ok(0)
}

/// Tells the starting command why there is no agent: it may know what opens the store.
fn tell(ready: RawFd, error: &ApiError) {
    // SAFETY: the agent has not come so far as to listen, and so has neither used nor closed it.
    let mut ready = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(ready) });
    if let Ok(document) = serde_json::to_vec(error) {
        // A starter that has gone does not matter.
        let _ = ready.write_all(&document);
    }
}

/// Keeps the descriptor that the starting command passed from QEMU. The agent takes it over.
fn adopt(number: RawFd) -> Result<RawFd, Failure> {
    // SAFETY: borrowed for the next statement only, in which nothing closes it; `fcntl` finds out if it is not open.
    let ready = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(ready, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|error| {
        Failure::new(
            ErrorKind::Invalid,
            format!("--ready-fd {number} is not open: {error}"),
            "leave it out; it is for the command that starts the agent",
        )
    })?;
    Ok(number)
}

async fn stop(force: bool, session: &Session<'_>) -> Result<u8, Failure> {
    let agent = match session.client().agent().await {
        Ok(agent) => agent,
        Err(ClientError::NotRunning { .. }) => {
            let document = Stopped { stopped: false, pid: None };
            session.output().result(&document, || "no agent runs\n".to_owned())?;
            return Ok(0);
        }
        Err(error) => return Err(error.into()),
    };
    session.client().stop_agent(&StopAgentRequest { force }).await?;
    // The agent holds this lock for as long as it lives.
    let lock = session.folders().agent_lock();
    let gone = tokio::task::spawn_blocking(move || match std::fs::File::open(lock) {
        Ok(file) => file.lock(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    });
    match tokio::time::timeout(STOP_DEADLINE, gone).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => {
            return Err(Failure::io(format!("cannot tell whether the agent ended: {error}")));
        }
        Ok(Err(_)) | Err(_) => {
            return Err(Failure::new(
                ErrorKind::Agent,
                format!(
                    "the agent (process {}) has not ended after {} s",
                    agent.pid,
                    STOP_DEADLINE.as_secs()
                ),
                "see agent.log in Diorama's home for what it waits for",
            ));
        }
    }
    let document = Stopped { stopped: true, pid: Some(agent.pid) };
    session.output().result(&document, || format!("the agent (process {}) has ended\n", agent.pid))?;
    Ok(0)
}
