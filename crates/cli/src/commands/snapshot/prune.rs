//! `diorama snapshot prune`.

use clap::Args;
use diorama_api::{ApiError, ErrorKind, PruneReport, PruneRequest};

use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::{bytes, count, short_id, timestamp};
use crate::session::Session;

/// Delete the snapshots that no rule keeps
///
/// Of each environment by itself, or of one with `-e` or in its folder. `--keep-last 3` keeps the latest three,
/// `--keep-daily 7` the latest of each of the last seven days that have one, and so on; what several rules keep is kept
/// once. Days and hours are UTC's. The rules are those of restic and borg.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot prune --keep-last 10 --dry-run
  diorama snapshot prune --keep-hourly 24 --keep-daily 7 --keep-weekly 4
  diorama snapshot prune -e lab --keep-within 36h

Start with --dry-run: a deleted snapshot cannot be brought back.")]
pub struct Arguments {
    /// Keep the latest N
    #[arg(long, short = 'l', value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_last: u32,

    /// Keep the latest of each of N hours
    #[arg(long, short = 'H', value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_hourly: u32,

    /// Keep the latest of each of N days
    #[arg(long, short = 'd', value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_daily: u32,

    /// Keep the latest of each of N weeks (ISO 8601)
    #[arg(long, short = 'w', value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_weekly: u32,

    /// Keep the latest of each of N months
    #[arg(long, short = 'm', value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_monthly: u32,

    /// Keep the latest of each of N years
    #[arg(long, short = 'y', value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_yearly: u32,

    /// Keep all that are at most so much older than the latest: `36h`, `30d`, `2w`, `1d12h`
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    keep_within: Option<u64>,

    /// Only say what would be deleted
    #[arg(long, short = 'n')]
    dry_run: bool,
}

/// Prunes.
///
/// # Errors
/// When no rule is given, or a snapshot cannot be deleted.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let request = PruneRequest {
        environment: scope(session).map(|name| name.to_string()),
        dry_run: arguments.dry_run,
        keep_last: arguments.keep_last,
        keep_hourly: arguments.keep_hourly,
        keep_daily: arguments.keep_daily,
        keep_weekly: arguments.keep_weekly,
        keep_monthly: arguments.keep_monthly,
        keep_yearly: arguments.keep_yearly,
        keep_within_s: arguments.keep_within.unwrap_or(0),
    };
    let mut progress = session.operation();
    let report = session.client().prune_snapshots(&request, |notice| progress.show(notice)).await?;
    drop(progress);
    session.output().result(&report, || text(&report, session.output()))?;
    Ok(0)
}

fn text(report: &PruneReport, output: &Output) -> String {
    let mut text = String::new();
    if !report.kept.is_empty() || !report.removed.is_empty() {
        let mut table = output.table();
        table.set_header(["SNAPSHOT", "ID", "CREATED", "KEPT BY"]);
        for snapshot in report.kept.iter().chain(&report.removed) {
            let kept = match &snapshot.kept_by[..] {
                [] if report.dry_run => "none: would be deleted".to_owned(),
                [] => "none: deleted".to_owned(),
                rules => rules.join(", "),
            };
            table.add_row([
                printable(&format!("{}/{}", snapshot.environment, snapshot.name)).into_owned(),
                printable(short_id(&snapshot.id)).into_owned(),
                timestamp(&snapshot.created),
                kept,
            ]);
        }
        text.push_str(&lines(&table, ""));
    }
    let removed = count(report.removed.len() as u64, "snapshot");
    text.push_str(&if report.dry_run {
        format!("{removed} would be deleted, {} kept\n", report.kept.len())
    } else {
        format!("{removed} deleted, {} kept, {} freed\n", report.kept.len(), bytes(report.freed_bytes))
    });
    text
}

/// `1d12h` and the like.
fn seconds(text: &str) -> Result<u64, String> {
    let wrong = || "a time is numbers and units: `36h`, `30d`, `2w`, `1d12h`".to_owned();
    let (mut total, mut number) = (0_u64, String::new());
    for c in text.chars() {
        let unit = match c {
            '0'..='9' => {
                number.push(c);
                continue;
            }
            'h' => 3600,
            'd' => 86_400,
            'w' => 7 * 86_400,
            _ => return Err(wrong()),
        };
        let count: u64 = number.parse().map_err(|_| wrong())?;
        number.clear();
        total = count.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
    }
    if total == 0 || !number.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// Refused before anything is asked: a policy without rules would keep nothing.
///
/// # Errors
/// When no rule is given.
pub fn check(arguments: &Arguments) -> Result<(), Failure> {
    let counts = [
        arguments.keep_last,
        arguments.keep_hourly,
        arguments.keep_daily,
        arguments.keep_weekly,
        arguments.keep_monthly,
        arguments.keep_yearly,
    ];
    if counts.iter().any(|count| *count > 0) || arguments.keep_within.is_some() {
        return Ok(());
    }
    Err(ApiError::new(ErrorKind::Invalid, "no rule says which snapshots to keep")
        .hint("such as `--keep-last 10 --keep-daily 7`; `diorama snapshot rm` deletes single ones")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, expected) in [("36h", 129_600), ("30d", 2_592_000), ("2w", 1_209_600), ("1d12h", 129_600)]
        {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "0d", "12", "d", "1d2", "1y", "-1d", "99999999999999999999d", "1e3d"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
