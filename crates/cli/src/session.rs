//! A command's dealings with the agent: finds it, starts it if need be, and ends the command when a signal says so.
//!
//! Invariant: when a signal arrives, the command's future is dropped before anything else happens. That closes its
//! connection, by which the agent learns that the operation is to be undone, and restores the terminal.

use std::cell::Cell;
use std::time::Instant;

use diorama_api::{Client, Folders};
use diorama_topology::EnvironmentName;
use nix::libc;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent_process;
use crate::failure::Failure;
use crate::output::Output;
use crate::progress::Reporter;

/// What a command that needs the agent works with.
#[derive(Debug)]
pub struct Session<'a> {
    output: &'a Output,
    client: Client,
    folders: Folders,
    named: Option<EnvironmentName>,
    started: Instant,
    /// Whether something has been asked for that an interruption undoes.
    operating: Cell<bool>,
}

/// Runs a command with an agent.
///
/// # Errors
/// When the agent cannot be reached or started, when the command fails, and when a signal ends it.
pub fn run(
    named: Option<EnvironmentName>,
    output: &Output,
    started: Instant,
    command: impl AsyncFnOnce(&Session<'_>) -> Result<u8, Failure>,
) -> Result<u8, Failure> {
    let folders = Folders::from_process()?;
    agent_process::ensure(&folders, output)?;
    run_with(folders, named, output, started, command)
}

/// Runs a command with the agent, if there is one: none is started.
///
/// # Errors
/// When the command fails, and when a signal ends it.
pub fn run_if_started(
    output: &Output,
    started: Instant,
    command: impl AsyncFnOnce(&Session<'_>) -> Result<u8, Failure>,
) -> Result<u8, Failure> {
    run_with(Folders::from_process()?, None, output, started, command)
}

fn run_with(
    folders: Folders,
    named: Option<EnvironmentName>,
    output: &Output,
    started: Instant,
    command: impl AsyncFnOnce(&Session<'_>) -> Result<u8, Failure>,
) -> Result<u8, Failure> {
    let client = Client::new(&folders);
    let session = Session { output, client, folders, named, started, operating: Cell::new(false) };
    let failed = |error| Failure::io(format!("cannot start the event loop: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let result = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        let signal = tokio::select! {
            result = command(&session) => return result,
            _ = interrupt.recv() => libc::SIGINT,
            _ = terminate.recv() => libc::SIGTERM,
            _ = hangup.recv() => libc::SIGHUP,
        };
        let signal = u8::try_from(signal).unwrap_or(u8::MAX);
        Err(Failure::Interrupted { signal, undone: session.operating.get() })
    });
    // A thread that reads a terminal cannot be asked to stop; the process's end stops it.
    runtime.shutdown_background();
    result
}

impl<'a> Session<'a> {
    /// Speaks to the agent.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Where Diorama keeps things.
    pub fn folders(&self) -> &Folders {
        &self.folders
    }

    /// Where results go.
    pub fn output(&self) -> &'a Output {
        self.output
    }

    /// The environment that the command line or DIORAMA_ENVIRONMENT names.
    pub fn named(&self) -> Option<&EnvironmentName> {
        self.named.as_ref()
    }

    /// How long the command has run, in microseconds.
    pub fn elapsed_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Shows the progress of an operation that is about to be asked for.
    pub fn operation(&self) -> Reporter<'a> {
        self.operating.set(true);
        Reporter::new(self.output)
    }
}
