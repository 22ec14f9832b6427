//! `diorama exec`.

use std::io::{self, Read};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::Args;
use diorama_api::{ErrorKind, ExecReport, ExecRequest};
use serde::Serialize;

use crate::completion;
use crate::environment_choice::choose;
use crate::failure::Failure;
use crate::session::Session;

/// The most standard input that is sent: the guest's agent takes it in one message.
const INPUT_BYTES_MAX: u64 = 16 << 20;

/// Run a command in a machine
///
/// Through the QEMU guest agent, which must run in the guest (it does in built-in images). The command's output and exit
/// status pass through when it has ended; 128 plus the signal's number when a signal ended it. There is no shell in
/// between: use `sh -c` for one.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama exec server -- ip addr
  diorama exec server -- sh -c 'ping -c 3 10.0.0.2 | tail -1'
  diorama exec -i server -- sh -c 'cat > /etc/motd' < motd
  diorama exec server --json -- uname -r | jq -r .stdout")]
pub struct Arguments {
    /// The machine
    #[arg(value_parser = crate::arguments::not_empty, add = completion::machines())]
    machine: String,

    /// Send standard input to the command (all of it, at most 16 MiB, before the command starts)
    #[arg(short, long)]
    interactive: bool,

    /// How long to wait for the guest's agent to answer at all, in seconds (60 when left out); a machine may still be
    /// starting
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u32>,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Serialize)]
struct Document<'a> {
    exit_code: Option<i32>,
    signal: Option<i32>,
    /// As text; what is no UTF-8 is replaced. The exact bytes are below.
    stdout: String,
    stderr: String,
    stdout_base64: &'a str,
    stderr_base64: &'a str,
    truncated: bool,
}

/// The request, with standard input where it is wanted.
///
/// # Errors
/// When standard input cannot be read or is too long.
pub fn request(arguments: &Arguments) -> Result<ExecRequest, Failure> {
    let mut stdin_base64 = None;
    if arguments.interactive {
        let mut input = Vec::new();
        io::stdin()
            .lock()
            .take(INPUT_BYTES_MAX + 1)
            .read_to_end(&mut input)
            .map_err(|error| Failure::io(format!("cannot read standard input: {error}")))?;
        if input.len() as u64 > INPUT_BYTES_MAX {
            return Err(Failure::new(
                ErrorKind::Invalid,
                format!("standard input is longer than {INPUT_BYTES_MAX} bytes"),
                "send less, or give the machine a disk with the data",
            ));
        }
        stdin_base64 = Some(BASE64_STANDARD.encode(input));
    }
    Ok(ExecRequest {
        command: arguments.command.clone(),
        stdin_base64,
        agent_timeout_ms: arguments.wait.map(|seconds| u64::from(seconds) * 1_000),
    })
}

/// Runs it; the exit status is the command's.
///
/// # Errors
/// When the guest does not run it.
pub async fn run(arguments: Arguments, request: ExecRequest, session: &Session<'_>) -> Result<u8, Failure> {
    let name = choose(session).await?;
    let mut progress = session.operation();
    let report = session
        .client()
        .exec(name.as_ref(), &arguments.machine, &request, |notice| progress.show(notice))
        .await?;
    drop(progress);
    let output = session.output();
    let stdout = decoded(&report.stdout_base64)?;
    let stderr = decoded(&report.stderr_base64)?;
    if output.json() {
        let document = Document {
            exit_code: report.exit_code,
            signal: report.signal,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            stdout_base64: &report.stdout_base64,
            stderr_base64: &report.stderr_base64,
            truncated: report.truncated,
        };
        output.result(&document, String::new)?;
    } else {
        output.raw(&stdout)?;
        output.raw_errors(&stderr);
    }
    if report.truncated {
        output.warn("the guest's agent cut the output short (it keeps 16 MiB)");
    }
    exit_status(&report)
}

fn decoded(text: &str) -> Result<Vec<u8>, Failure> {
    BASE64_STANDARD.decode(text).map_err(|error| {
        Failure::new(
            ErrorKind::Agent,
            format!("the agent's report of the command's output is not base64: {error}"),
            "is the agent of another version? `diorama agent stop` lets the next command start this one",
        )
    })
}

fn exit_status(report: &ExecReport) -> Result<u8, Failure> {
    match (report.exit_code, report.signal) {
        // As the kernel does: only the low eight bits are an exit status.
        (Some(code), _) => Ok(code.to_le_bytes()[0]),
        (None, Some(signal)) => Ok(u8::try_from(signal).unwrap_or(u8::MAX).saturating_add(128)),
        (None, None) => Err(Failure::new(
            ErrorKind::Guest,
            "the guest's agent does not say how the command ended",
            "see what it did with `diorama logs`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_pass_through() {
        let status = |exit_code, signal| {
            let report = ExecReport {
                exit_code,
                signal,
                stdout_base64: String::new(),
                stderr_base64: String::new(),
                truncated: false,
            };
            exit_status(&report).ok()
        };
        assert_eq!(status(Some(0), None), Some(0));
        assert_eq!(status(Some(7), None), Some(7));
        assert_eq!(status(Some(-1), None), Some(255));
        assert_eq!(status(None, Some(9)), Some(137));
        assert_eq!(status(None, Some(1000)), Some(255));
        assert_eq!(status(None, None), None);
    }
}
