//! `diorama console`.
//!
//! Owns the user's terminal while it is attached. Invariant: whichever way this ends (the detach key, the machine's end,
//! an error, a signal, a panic), the terminal is what it was before, because a guard restores it when dropped.

use std::io::{self, IsTerminal, Read};

use clap::Args;
use diorama_api::{ConsoleStream, ErrorKind};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::completion;
use crate::environment_choice::choose;
use crate::failure::Failure;
use crate::output::Output;
use crate::session::Session;

/// Ctrl-]
const DETACH: u8 = 0x1d;

/// Chunks of typed bytes that wait for the agent: more only when a file is fed to the console, and then reading waits.
const TYPED_CHUNKS: usize = 16;

/// Connect the terminal to a machine's serial console
///
/// Every key goes to the machine, Ctrl-C too. Ctrl-] detaches; the machine runs on. Several may be connected at once:
/// all see what the machine prints.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama console server
  echo reboot | diorama console server    type a line; the end of piped input detaches

What was printed before is shown by `diorama logs`.")]
pub struct Arguments {
    /// The machine
    #[arg(value_parser = crate::arguments::not_empty, add = completion::machines())]
    machine: String,
}

/// Refuses what cannot be done.
///
/// # Errors
/// With `--json`.
pub fn check(output: &Output) -> Result<(), Failure> {
    if output.json() {
        return Err(Failure::new(
            ErrorKind::Invalid,
            "a console is not a JSON document",
            "leave out --json; `diorama logs --json` has what the machine printed",
        ));
    }
    Ok(())
}

/// Connects, until the user detaches or the console ends.
///
/// # Errors
/// When there is no such machine, or the connection breaks.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let name = choose(session).await?;
    let output = session.output();
    let console = session.client().console(name.as_ref(), &arguments.machine).await?;
    let terminal = RawTerminal::enter()?;
    if terminal.is_some() {
        output.errors(&format!("connected to {}; Ctrl-] detaches\r\n", arguments.machine));
    }
    let end = connect(console, terminal.is_some(), output).await;
    let had_terminal = terminal.is_some();
    drop(terminal);
    let said = match end? {
        End::Detached => "detached",
        End::Closed => "the console has ended",
    };
    if had_terminal {
        output.errors(&format!("\n{said}\n"));
    }
    Ok(0)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The user left.
    Detached,
    /// The machine or the agent did.
    Closed,
}

async fn connect(console: ConsoleStream, has_keys: bool, output: &Output) -> Result<End, Failure> {
    let (mut from_machine, mut to_machine) = tokio::io::split(console);
    let mut typed = Some(read_input());
    let mut printed = vec![0; 16 << 10];
    loop {
        tokio::select! {
            read = from_machine.read(&mut printed) => match read.map_err(|error| broke(&error))? {
                0 => return Ok(End::Closed),
                length => output.raw(&printed[..length])?,
            },
            chunk = next(&mut typed) => {
                let (keys, detach) = match &chunk {
                    Some(chunk) if has_keys => until_detach(chunk),
                    Some(chunk) => (chunk.as_slice(), false),
                    None => (&[][..], has_keys),
                };
                to_machine.write_all(keys).await.map_err(|error| broke(&error))?;
                to_machine.flush().await.map_err(|error| broke(&error))?;
                if detach {
                    return Ok(End::Detached);
                }
                if chunk.is_none() {
                    // The end of a file or pipe: the agent learns that nothing more will be typed, and closes.
                    typed = None;
                    to_machine.shutdown().await.map_err(|error| broke(&error))?;
                }
            },
        }
    }
}

/// What is before the detach key, and whether it was there.
fn until_detach(typed: &[u8]) -> (&[u8], bool) {
    match typed.iter().position(|byte| *byte == DETACH) {
        Some(position) => (&typed[..position], true),
        None => (typed, false),
    }
}

/// The next typed bytes, or `None` at the input's end; never, once that has been told.
async fn next(typed: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads standard input on a thread of its own: making a terminal non-blocking would do so for every program that shares
/// it. The thread ends with the input, or with the process.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(TYPED_CHUNKS);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // An error ends the input, like its end.
        while let Ok(length @ 1..) = io::stdin().lock().read(&mut buffer) {
            if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

fn broke(error: &io::Error) -> Failure {
    Failure::new(
        ErrorKind::Agent,
        format!("the console's connection broke: {error}"),
        "`diorama status` shows whether the machine still runs",
    )
}

/// The terminal in raw mode; as it was when dropped.
#[derive(Debug)]
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Nothing, when standard input is no terminal.
    fn enter() -> Result<Option<Self>, Failure> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let failed = |error| Failure::io(format!("cannot set up the terminal: {error}"));
        let before = tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        let guard = Self { before };
        tcsetattr(&stdin, SetArg::TCSADRAIN, &raw).map_err(failed)?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before) {
            // Not `eprintln`, which panics when standard error is gone, as it is when the terminal was closed.
            let _ = io::Write::write_fmt(
                &mut io::stderr(),
                format_args!("cannot restore the terminal: {error}; try `stty sane`\r\n"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_before_the_detach_key_are_still_typed() {
        assert_eq!(until_detach(b"ls\r"), (&b"ls\r"[..], false));
        assert_eq!(until_detach(b"ls\x1dmore"), (&b"ls"[..], true));
        assert_eq!(until_detach(b"\x1d"), (&b""[..], true));
    }
}
