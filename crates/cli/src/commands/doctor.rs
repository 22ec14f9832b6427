//! `diorama doctor`.

use std::fmt::Write as _;

use clap::Args;
use diorama_api::{ApiError, CheckStatus, DoctorReport, ErrorKind};

use crate::failure::Failure;
use crate::output::{Output, printable};

/// Show what this computer can do, and how to mend what is missing
///
/// Looks at QEMU, KVM, userfaultfd, memory file systems and more. Starts nothing and changes nothing.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama doctor
  diorama doctor --json | jq '.checks[] | select(.status != \"ok\")'

Exit status: 0 environments can run here; 1 they cannot.")]
pub struct Arguments {}

/// Looks and shows.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(_arguments: &Arguments, output: &Output) -> Result<u8, Failure> {
    let report = diorama_agent::doctor();
    let failed: Vec<&str> = report
        .checks
        .iter()
        .filter(|check| check.status == CheckStatus::Failed)
        .map(|check| check.name.as_str())
        .collect();
    let wrong = (!report.ok).then(|| {
        ApiError::new(
            ErrorKind::Unsupported,
            format!("environments cannot run on this computer: {}", failed.join(", ")),
        )
        .hint("mend what is marked as failed, and run `diorama doctor` again")
    });
    output.verdict(&report, wrong, || text(&report, output))
}

fn text(report: &DoctorReport, output: &Output) -> String {
    let colour = output.colour();
    let width = report.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let status = match check.status {
            CheckStatus::Ok => colour.good("ok     "),
            CheckStatus::Warning => colour.warning("warning"),
            CheckStatus::Failed => colour.bad("failed "),
        };
        let _ = writeln!(text, "{status}  {:width$}  {}", printable(&check.name), printable(&check.found));
        if let Some(hint) = &check.hint {
            for line in printable(hint).lines() {
                let _ = writeln!(text, "         {:width$}  {}", "", colour.dim(line));
            }
        }
    }
    text
}
