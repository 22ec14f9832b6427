//! Passphrases, typed or in files: what opens an encrypted store.
//!
//! Invariant: a typed passphrase is shown nowhere, and the terminal is what it was before, also when Ctrl-C ends it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;

use clap::Args;
use diorama_agent::store_keys::{self, Secret, SecretSource};
use diorama_api::ErrorKind;
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};

use crate::failure::Failure;

/// More than anybody types.
const TYPED_BYTES_MAX: usize = 1024;

const CTRL_C: u8 = 3;
const CTRL_D: u8 = 4;
const CTRL_U: u8 = 21;

/// Where a new passphrase or key is.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct NewSecret {
    /// A file of 32 random bytes or more (`diorama store key new` makes one)
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    /// A file whose first line is the passphrase; without either, it is asked for
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

impl NewSecret {
    /// What the arguments name.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn given(&self) -> Result<Option<Secret>, Failure> {
        let source = match (&self.key_file, &self.passphrase_file) {
            (Some(path), _) => SecretSource::KeyFile(path.clone()),
            (None, Some(path)) => SecretSource::PassphraseFile(path.clone()),
            (None, None) => return Ok(None),
        };
        Ok(Some(source.read()?))
    }
}

/// What opens the store that is there: what the variables name, else what is typed.
///
/// # Errors
/// When there is neither, or it cannot be read.
pub fn present() -> Result<Secret, Failure> {
    if let Some(source) = SecretSource::from_process()? {
        return Ok(source.read()?);
    }
    match Terminal::open()? {
        Some(mut terminal) => Ok(store_keys::passphrase(terminal.ask("Passphrase of the store: ")?)?),
        None => Err(nobody_to_ask()),
    }
}

/// A new passphrase, typed twice.
///
/// # Errors
/// When there is nobody to type it, or the two differ.
pub fn typed_twice() -> Result<Secret, Failure> {
    let mut terminal = Terminal::open()?.ok_or_else(nobody_to_ask)?;
    let first = terminal.ask("New passphrase: ")?;
    if terminal.ask("The same again: ")? != first {
        let hint = "nothing was changed; try again";
        return Err(Failure::new(ErrorKind::Invalid, "the two passphrases differ", hint));
    }
    Ok(store_keys::passphrase(first)?)
}

fn nobody_to_ask() -> Failure {
    Failure::new(
        ErrorKind::Locked,
        "a passphrase is needed, and there is no terminal to ask for it",
        format!(
            "set {} to a file that holds it, or {} to a key file",
            store_keys::PASSPHRASE_FILE,
            store_keys::KEY_FILE
        ),
    )
}

/// The terminal that the process belongs to, whatever standard input is.
#[derive(Debug)]
pub struct Terminal {
    file: File,
}

impl Terminal {
    /// `None`: there is none.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open() -> Result<Option<Self>, Failure> {
        match OpenOptions::new().read(true).write(true).open("/dev/tty") {
            Ok(file) => Ok(Some(Self { file })),
            Err(_) => Ok(None),
        }
    }

    /// Asks for a line that is not shown.
    ///
    /// # Errors
    /// When it is interrupted, or the terminal goes away.
    pub fn ask(&mut self, question: &str) -> Result<Vec<u8>, Failure> {
        let failed = |error: io::Error| Failure::io(format!("cannot read from the terminal: {error}"));
        let _silent = Silent::enter(&self.file)?;
        self.file.write_all(question.as_bytes()).map_err(failed)?;
        let typed = read_line(&mut self.file).map_err(failed)?;
        self.file.write_all(b"\n").map_err(failed)?;
        typed.ok_or(Failure::Interrupted { signal: 2, undone: false })
    }
}

/// Up to the line's end; `None` when it was interrupted.
fn read_line(input: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::with_capacity(TYPED_BYTES_MAX);
    let mut byte = [0];
    while input.read(&mut byte)? == 1 {
        match byte[0] {
            b'\r' | b'\n' => break,
            CTRL_C => return Ok(None),
            CTRL_D if line.is_empty() => return Ok(None),
            CTRL_U => line.clear(),
            0x7f | 0x08 => {
                // A whole character, however many bytes it has.
                while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
            }
            other if line.len() < TYPED_BYTES_MAX => line.push(other),
            _ => {}
        }
    }
    Ok(Some(line))
}

/// The terminal without echo, lines and signals; as it was when dropped.
struct Silent {
    terminal: File,
    before: Termios,
}

impl Silent {
    fn enter(terminal: &File) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::io(format!("cannot set up the terminal: {error}"));
        let terminal = terminal.try_clone().map_err(failed)?;
        let before = tcgetattr(&terminal).map_err(|error| failed(error.into()))?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG);
        tcsetattr(&terminal, SetArg::TCSAFLUSH, &silent).map_err(|error| failed(error.into()))?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(&self.terminal, SetArg::TCSAFLUSH, &self.before) {
            let _ = write!(io::stderr(), "cannot restore the terminal: {error}; try `stty sane`\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_edited_and_ended() {
        for (typed, line) in [
            (&b"correct\n"[..], Some(&b"correct"[..])),
            (b"correx\x7fct\r", Some(b"correct")),
            (b"wrong\x15correct\n", Some(b"correct")),
            ("\u{fc}\u{fc}\u{8}x\n".as_bytes(), Some("\u{fc}x".as_bytes())),
            (b"\x7f\x7fx\n", Some(b"x")),
            (b"cor\x03rect\n", None),
            (b"\x04", None),
            (b"no end", Some(b"no end")),
        ] {
            assert_eq!(read_line(&mut &*typed).unwrap().as_deref(), line, "{typed:?}");
        }
    }
}
