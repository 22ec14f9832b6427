//! The commands: one file each, which holds its arguments, its help, its requests and the text it prints.
//!
//! Architecture invariant: commands know nothing of HTTP, of starting agents, or of exit statuses other than their
//! own; and they print only through [`Output`].

mod agent;
mod completion;
mod console;
mod doctor;
mod down;
mod exec;
mod export;
mod fork;
mod host;
mod import;
mod logs;
mod pause;
mod restore;
mod resume;
mod schema;
mod snapshot;
mod status;
mod store;
mod up;
mod validate;

use std::time::Instant;

use clap::Subcommand;
use diorama_topology::EnvironmentName;

use crate::failure::Failure;
use crate::output::Output;
use crate::session;

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Up(up::Arguments),
    Down(down::Arguments),
    Status(status::Arguments),
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    Restore(restore::Arguments),
    Fork(fork::Arguments),
    Exec(exec::Arguments),
    Console(console::Arguments),
    Logs(logs::Arguments),
    Pause(pause::Arguments),
    Resume(resume::Arguments),
    #[command(subcommand)]
    Store(store::Command),
    Export(export::Arguments),
    Import(import::Arguments),
    Validate(validate::Arguments),
    Schema(schema::Arguments),
    Doctor(doctor::Arguments),
    #[command(subcommand)]
    Host(host::Command),
    Agent(agent::Arguments),
    Completion(completion::Arguments),
}

/// Runs a command; gives its exit status.
///
/// # Errors
/// When it did not do what it was asked.
pub fn run(
    command: Command,
    named: Option<EnvironmentName>,
    output: &Output,
    started: Instant,
) -> Result<u8, Failure> {
    match command {
        Command::Up(arguments) => {
            // A wrong file is said before anything is started.
            let environment = up::read(&arguments, named.as_ref())?;
            session::run(named, output, started, async |session| up::run(environment, session).await)
        }
        Command::Down(arguments) => {
            session::run(named, output, started, async |session| down::run(arguments, session).await)
        }
        Command::Status(arguments) => {
            session::run(named, output, started, async |session| status::run(arguments, session).await)
        }
        Command::Snapshot(command) => {
            snapshot::check(&command)?;
            session::run(named, output, started, async |session| snapshot::run(command, session).await)
        }
        Command::Store(command) => {
            if let Some(done) = store::run_alone(&command, output) {
                return done;
            }
            session::run(named, output, started, async |session| store::run(command, session).await)
        }
        Command::Export(arguments) => {
            export::check(&arguments, output)?;
            session::run(named, output, started, async |session| export::run(arguments, session).await)
        }
        Command::Import(arguments) => {
            session::run(named, output, started, async |session| import::run(arguments, session).await)
        }
        Command::Restore(arguments) => {
            session::run(named, output, started, async |session| restore::run(arguments, session).await)
        }
        Command::Fork(arguments) => {
            session::run(named, output, started, async |session| fork::run(arguments, session).await)
        }
        Command::Exec(arguments) => {
            let request = exec::request(&arguments)?;
            session::run(named, output, started, async |session| exec::run(arguments, request, session).await)
        }
        Command::Console(arguments) => {
            console::check(output)?;
            session::run(named, output, started, async |session| console::run(arguments, session).await)
        }
        Command::Logs(arguments) => {
            logs::check(&arguments, output)?;
            session::run(named, output, started, async |session| logs::run(arguments, session).await)
        }
        Command::Pause(arguments) => {
            session::run(named, output, started, async |session| pause::run(arguments, session).await)
        }
        Command::Resume(arguments) => {
            session::run(named, output, started, async |session| resume::run(arguments, session).await)
        }
        Command::Validate(arguments) => validate::run(&arguments, output),
        Command::Schema(arguments) => schema::run(&arguments, output),
        Command::Doctor(arguments) => doctor::run(&arguments, output),
        Command::Host(command) => {
            session::run(named, output, started, async |session| host::run(command, session).await)
        }
        Command::Agent(arguments) => agent::run(arguments, output, started),
        Command::Completion(arguments) => completion::run(&arguments, output),
    }
}
