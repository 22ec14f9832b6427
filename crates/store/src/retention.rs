//! Which snapshots a retention policy keeps. Pure: the words and their meaning are restic's and borg's.
//!
//! Snapshots of one environment are gone through from the latest. `last` keeps that many; `hourly` keeps the latest of
//! each of that many hours that have one, and so on. `within` keeps all that are no older than that before the latest.
//! What several rules keep is kept once; what none keeps goes. Hours and days are those of UTC; weeks are ISO 8601's.

use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;

use crate::catalog::Entry;
use crate::id::SnapshotId;

/// How many to keep, by each rule. A policy that keeps nothing is none: see [`Policy::is_empty`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// The latest.
    pub last: u32,
    /// Hours.
    pub hourly: u32,
    /// Days.
    pub daily: u32,
    /// Weeks.
    pub weekly: u32,
    /// Months.
    pub monthly: u32,
    /// Years.
    pub yearly: u32,
    /// Everything that is at most so much older than the latest, in seconds.
    pub within_s: u64,
}

/// What becomes of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The snapshot.
    pub id: SnapshotId,
    /// The rules that keep it; none, and it goes.
    pub kept_by: Vec<&'static str>,
}

impl Policy {
    /// Whether it has no rule, so that it would remove everything.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What becomes of these snapshots, which are of one environment; in the order given. One whose time cannot be
    /// read is kept.
    pub fn apply(&self, snapshots: &[&Entry]) -> Vec<Verdict> {
        let mut verdicts: Vec<Verdict> =
            snapshots.iter().map(|entry| Verdict { id: entry.id, kept_by: Vec::new() }).collect();
        let mut times: Vec<(Timestamp, usize)> = Vec::new();
        for (index, entry) in snapshots.iter().enumerate() {
            match entry.created.parse::<Timestamp>() {
                Ok(time) => times.push((time, index)),
                Err(_) => verdicts[index].kept_by.push("unknown time"),
            }
        }
        // The latest first; of two at one time, the one that was given later.
        times.sort_by(|a, b| b.cmp(a));
        let Some((latest, _)) = times.first().copied() else { return verdicts };
        for (_, index) in times.iter().take(self.last as usize) {
            verdicts[*index].kept_by.push("last");
        }
        let rules: [Rule; 5] = [
            ("hourly", self.hourly, |t| (t.year(), t.date().day_of_year(), t.hour().into())),
            ("daily", self.daily, |t| (t.year(), t.date().day_of_year(), 0)),
            ("weekly", self.weekly, |t| week(t.date())),
            ("monthly", self.monthly, |t| (t.year(), t.month().into(), 0)),
            ("yearly", self.yearly, |t| (t.year(), 0, 0)),
        ];
        for (rule, count, period) in rules {
            let mut before = None;
            let mut left = count;
            for (time, index) in &times {
                let period = period(TimeZone::UTC.to_datetime(*time));
                if left > 0 && before != Some(period) {
                    verdicts[*index].kept_by.push(rule);
                    before = Some(period);
                    left -= 1;
                }
            }
        }
        if self.within_s > 0 {
            for (time, index) in &times {
                if latest.as_second().saturating_sub(time.as_second()).unsigned_abs() <= self.within_s {
                    verdicts[*index].kept_by.push("within");
                }
            }
        }
        verdicts
    }
}

/// A rule: its name, how many periods it keeps, and what tells two periods apart.
type Rule = (&'static str, u32, fn(DateTime) -> (i16, i16, i16));

fn week(date: Date) -> (i16, i16, i16) {
    let week = date.iso_week_date();
    (week.year(), week.week().into(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Bytes;

    fn entry(created: &str) -> Entry {
        Entry {
            id: SnapshotId::of_manifest(created.as_bytes()),
            name: "s".into(),
            environment: "e".into(),
            parent: None,
            created: created.into(),
            message: String::new(),
            bytes: Bytes::default(),
            machines: 1,
        }
    }

    fn kept(policy: Policy, times: &[&str]) -> Vec<usize> {
        let entries: Vec<Entry> = times.iter().map(|time| entry(time)).collect();
        let verdicts = policy.apply(&entries.iter().collect::<Vec<_>>());
        assert_eq!(verdicts.len(), times.len());
        (0..times.len()).filter(|index| !verdicts[*index].kept_by.is_empty()).collect()
    }

    const TIMES: [&str; 9] = [
        "2025-12-30T12:00:00Z",
        "2025-12-31T23:59:59Z",
        "2026-01-01T00:10:00Z",
        "2026-01-01T00:50:00.5Z",
        "2026-01-01T05:00:00Z",
        "2026-01-04T00:00:00Z",
        "2026-01-05T00:00:00Z",
        "2026-02-01T00:00:00Z",
        "2026-02-01T00:00:00Z",
    ];

    #[test]
    fn each_rule() {
        let none = Policy::default();
        assert!(none.is_empty());
        for (policy, expected) in [
            (none, &[][..]),
            (Policy { last: 2, ..none }, &[7, 8]),
            (Policy { last: 99, ..none }, &[0, 1, 2, 3, 4, 5, 6, 7, 8]),
            (Policy { hourly: 5, ..none }, &[3, 4, 5, 6, 8]),
            (Policy { daily: 4, ..none }, &[4, 5, 6, 8]),
            // 30 December to 4 January are one week.
            (Policy { weekly: 3, ..none }, &[5, 6, 8]),
            (Policy { monthly: 3, ..none }, &[1, 6, 8]),
            (Policy { yearly: 9, ..none }, &[1, 8]),
            (Policy { within_s: 27 * 86400, ..none }, &[6, 7, 8]),
            (Policy { last: 1, yearly: 2, ..none }, &[1, 8]),
        ] {
            assert_eq!(kept(policy, &TIMES), expected, "{policy:?}");
        }
    }

    #[test]
    fn the_order_does_not_matter_and_what_has_no_time_is_kept() {
        let mut times = TIMES;
        times.reverse();
        assert_eq!(kept(Policy { monthly: 3, ..Policy::default() }, &times), [1, 2, 7]);
        assert_eq!(kept(Policy { last: 1, ..Policy::default() }, &["soon", TIMES[0]]), [0, 1]);
    }
}
