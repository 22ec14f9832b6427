//! `diorama store signer`.

use std::path::PathBuf;

use clap::Args;
use diorama_agent::signatures::new_signer;

use crate::failure::Failure;
use crate::output::{Output, printable};

/// Make a pair of keys to sign snapshots with
///
/// The private key goes to FILE, for you alone; the public key to FILE.pub, for everybody who is to check what you sign.
/// An agent that is started with DIORAMA_SIGNING_KEY=FILE signs every snapshot that it takes. One that is started with
/// DIORAMA_TRUSTED_KEYS=PUBFILE restores and forks only what one of the keys in there has signed.
///
/// Keys that `openssl genpkey -algorithm ed25519` makes are as good.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama store signer ~/signing.pem
  diorama agent stop; export DIORAMA_SIGNING_KEY=~/signing.pem
  diorama snapshot create before
  diorama snapshot verify before --signed-by ~/signing.pem.pub")]
pub struct Arguments {
    /// Where the private key goes; it must not be there
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Makes them.
///
/// # Errors
/// When they are there, or cannot be written.
pub fn run(arguments: &Arguments, output: &Output) -> Result<u8, Failure> {
    let report = new_signer(&arguments.file)?;
    output.result(&report, || {
        format!(
            "key {}\n  private: {}\n  public:  {}\n",
            report.key,
            printable(&report.file),
            printable(&report.public_file)
        )
    })?;
    Ok(0)
}
