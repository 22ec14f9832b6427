//! Pacing: how much may be done by now at a rate.
//!
//! A machine can be stopped for long and go on (a pause, a restore): what was due then is
//! given up rather than made good in one burst that nobody asked for.

use std::time::{Duration, Instant};

/// The most that is ever made good: beyond it, the schedule starts again from now.
const FORGIVE: Duration = Duration::from_millis(100);

/// A rate, and what has been done of it.
#[derive(Debug)]
pub struct Pace {
    per_second: Option<u64>,
    start: Instant,
    done: u64,
}

impl Pace {
    /// `None` means without limit.
    pub fn new(per_second: Option<u64>, now: Instant) -> Self {
        Self { per_second, start: now, done: 0 }
    }

    /// How many units may be done now, at most `most`.
    pub fn allowed(&mut self, now: Instant, most: u64) -> u64 {
        let Some(rate) = self.per_second else { return most };
        let due = self.due(now, rate);
        // At least one unit, or a slow rate would be forgiven for ever.
        let forgive = (u128::from(rate) * FORGIVE.as_micros() / 1_000_000).max(1) as u64;
        if due.saturating_sub(self.done) > forgive {
            self.start = now;
            self.done = 0;
            return forgive.min(most).min(1);
        }
        due.saturating_sub(self.done).min(most)
    }

    /// Counts units as done.
    pub fn did(&mut self, units: u64) {
        self.done += units;
    }

    /// How long to wait until `units` more are due.
    pub fn wait(&self, now: Instant, units: u64) -> Duration {
        let Some(rate) = self.per_second else { return Duration::ZERO };
        let at = u128::from(self.done + units) * 1_000_000_000 / u128::from(rate);
        let at = Duration::from_nanos(u64::try_from(at).unwrap_or(u64::MAX));
        at.saturating_sub(now.saturating_duration_since(self.start))
    }

    fn due(&self, now: Instant, rate: u64) -> u64 {
        let elapsed = now.saturating_duration_since(self.start).as_nanos();
        u64::try_from(elapsed * u128::from(rate) / 1_000_000_000).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate_is_met_exactly() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1000), start);
        let mut total = 0;
        for ms in 1..=5000 {
            let allowed = pace.allowed(start + Duration::from_millis(ms), u64::MAX);
            pace.did(allowed);
            total += allowed;
        }
        assert_eq!(total, 5000);
    }

    #[test]
    fn a_long_stop_is_not_made_good() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1000), start);
        let later = start + Duration::from_secs(60);
        let allowed = pace.allowed(later, u64::MAX);
        assert!(allowed <= 100, "{allowed} at once after a minute's stop");
        pace.did(allowed);
        assert!(pace.wait(later, 1) <= Duration::from_millis(2));
    }

    #[test]
    fn a_slow_rate_gets_there() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1), start);
        let mut total = 0;
        for ms in 1..=10_000 {
            let allowed = pace.allowed(start + Duration::from_millis(ms), u64::MAX);
            pace.did(allowed);
            total += allowed;
        }
        assert_eq!(total, 10);
    }
}
