//! `diorama`: the command line, and (as `diorama agent`) the agent.
//!
//! A command goes through four stages: the **arguments** are parsed ([`arguments`]); commands that need no agent
//! run at once; the others get a [`session::Session`], which finds the agent, starting it if need be; each
//! **command** ([`commands`]) turns its arguments into requests and the reports into text or JSON ([`output`]).
//! Whatever goes wrong on the way is a [`failure::Failure`], which alone knows how to say it and which exit
//! status it has.
//!
//! Invariants: standard output carries nothing but the command's result; with `--json` that is exactly one
//! JSON document, also when the command fails. Only this crate prints.

mod agent_process;
mod arguments;
mod commands;
mod completion;
mod environment_choice;
mod environment_file;
mod failure;
mod output;
mod pipe;
mod progress;
mod quantity;
mod secret;
mod session;

use std::process::ExitCode;
use std::time::Instant;

use clap::CommandFactory;

use crate::arguments::Arguments;
use crate::output::Output;

fn main() -> ExitCode {
    let started = Instant::now();
    // A shell that asks for completions sets this variable; then nothing else happens.
    clap_complete::CompleteEnv::with_factory(Arguments::command).var(completion::VARIABLE).complete();
    let arguments = match Arguments::from_process() {
        Ok(arguments) => arguments,
        Err(refusal) => return refusal.exit(),
    };
    let output = Output::new(arguments.json, arguments.verbose);
    let status = commands::run(arguments.command, arguments.environment, &output, started)
        .unwrap_or_else(|failure| failure.report(&output));
    ExitCode::from(status)
}
