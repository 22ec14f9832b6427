//! `traffic`: checkable traffic for use inside guests.
//!
//! Demo, tests and benchmarks run it in machines of an environment and ask it, across
//! snapshots, restores and forks, what was lost, doubled, reordered or damaged. Each
//! subcommand keeps one small state and shows it as one line of JSON, replaced atomically
//! ([`status`]), so that whoever reads it sees one instant and never a torn line.
//!
//! What each subcommand can prove:
//!
//! | subcommand | claim |
//! | --- | --- |
//! | `udp-send`, `udp-recv` | which datagrams were lost, doubled, reordered ([`sequence`]) |
//! | `tcp-send`, `tcp-serve` | the same session goes on, every byte of it right ([`tcp`]) |
//! | `token-ring` | no token lost or doubled: a lost one never comes back ([`ring`]) |
//! | `disk`, `disk-check` | what was synced is there, nothing is torn ([`disk`]) |
//! | `memory` | none: it dirties pages at a rate ([`memory`]) |
//! | `beat` | none: it shows outside that programs run ([`beat`]) |
//!
//! Peers are hostile: any bytes may arrive, every table is bounded.

mod arguments;
mod beat;
mod disk;
mod memory;
mod pace;
mod ring;
mod sequence;
mod status;
mod tcp;
mod udp;

use std::process::ExitCode;

use arguments::{ArgumentError, Arguments};

const USAGE: &str = "\
Checkable traffic for use inside guests.

Usage:
  traffic udp-send --to IP:PORT --rate N [--size BYTES] [--seconds N] [--status FILE]
  traffic udp-recv --port P --status FILE
  traffic tcp-serve --port P --status FILE
  traffic tcp-send --to IP:PORT [--rate BYTES] [--seconds N] [--status FILE]
  traffic token-ring --listen P --next IP:PORT [--inject N] [--id K] --status FILE
  traffic memory --bytes N --rate PAGES [--status FILE]
  traffic beat --file F --rate N [--bytes N]
  traffic disk --file F --rate BYTES [--size BYTES] [--seconds N] [--status FILE]
  traffic disk-check --file F
  traffic status FILE

Rates are per second. Sizes take KiB, MiB and GiB. A status FILE holds one line of
JSON, replaced atomically every 50 ms, or as often as `--status-every MS` says;
`traffic status FILE` prints it.

Exit status: 0 done, 1 failed (a broken connection, a damaged disk), 2 wrong usage.";

/// Why the program ends without success.
#[derive(Debug)]
enum Failure {
    /// The command line is wrong.
    Usage(ArgumentError),
    /// The operating system said no.
    Io(&'static str, std::io::Error),
    /// The check that was asked for did not hold.
    Check(String),
}

impl From<ArgumentError> for Failure {
    fn from(error: ArgumentError) -> Self {
        Failure::Usage(error)
    }
}

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => {
            eprintln!("traffic: {error}\n\n{USAGE}");
            ExitCode::from(2)
        }
        Err(Failure::Io(doing, error)) => {
            eprintln!("traffic: {doing}: {error}");
            ExitCode::FAILURE
        }
        Err(Failure::Check(what)) => {
            eprintln!("traffic: {what}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut words: Vec<String>) -> Result<(), Failure> {
    if words.is_empty() {
        return Err(ArgumentError::NoCommand.into());
    }
    let command = words.remove(0);
    if matches!(command.as_str(), "help" | "--help" | "-h") {
        println!("{USAGE}");
        return Ok(());
    }
    if command == "status" {
        let [file] = words.as_slice() else {
            return Err(ArgumentError::Missing { name: "FILE" }.into());
        };
        let line = std::fs::read_to_string(file).map_err(|e| Failure::Io("read status", e))?;
        print!("{line}");
        return Ok(());
    }
    let run: fn(&mut Arguments) -> Result<(), Failure> = match command.as_str() {
        "udp-send" => udp::send,
        "udp-recv" => udp::receive,
        "tcp-serve" => tcp::serve,
        "tcp-send" => tcp::send,
        "token-ring" => ring::pass,
        "memory" => memory::dirty,
        "beat" => beat::beat,
        "disk" => disk::write,
        "disk-check" => disk::check,
        _ => return Err(ArgumentError::UnknownCommand { command }.into()),
    };
    let mut arguments = Arguments::parse(words)?;
    run(&mut arguments)
}

/// An identifier that no other run has: from the kernel's random numbers.
fn random_id() -> Result<u64, Failure> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|e| Failure::Io("read /dev/urandom", e))?;
    Ok(u64::from_be_bytes(bytes))
}
