//! How other hosts' clocks stand to this one's. Nothing that must be right depends on clocks: only the skew that is
//! reported does.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What answers to messages have shown.
#[derive(Debug, Default)]
pub(crate) struct Clocks(Mutex<BTreeMap<String, Sample>>);

/// One look at another host's clock.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Theirs less ours, in microseconds.
    ahead_us: i64,
    /// By how much that may be wrong: half of the time that the message and its answer took.
    error_us: u64,
    /// By our clock.
    seen_us: u64,
}

/// How long the best look counts: clocks drift and are set.
const GOOD_FOR_US: u64 = 60_000_000;

impl Clocks {
    /// A host's clock said `theirs_us` when it answered a message that was sent at `sent_us` by ours; the answer came after
    /// `took_us`.
    pub(crate) fn note(&self, host: &str, sent_us: u64, took_us: u64, theirs_us: u64) {
        let between = sent_us.saturating_add(took_us / 2);
        let sample = Sample {
            ahead_us: theirs_us.cast_signed().wrapping_sub(between.cast_signed()),
            error_us: took_us.div_ceil(2),
            seen_us: between,
        };
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = samples.entry(host.to_owned()).or_insert(sample);
        let agrees =
            known.ahead_us.abs_diff(sample.ahead_us) <= known.error_us.saturating_add(sample.error_us);
        let old = sample.seen_us.abs_diff(known.seen_us) > GOOD_FOR_US;
        if sample.error_us <= known.error_us || old || !agrees {
            *known = sample;
        }
    }

    /// An instant of a host's clock, by ours. Clocks that may well agree are taken to.
    pub(crate) fn ours(&self, host: &str, theirs_us: u64) -> u64 {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match samples.get(host) {
            Some(sample) if sample.ahead_us.unsigned_abs() > sample.error_us => {
                theirs_us.saturating_add_signed(sample.ahead_us.saturating_neg())
            }
            _ => theirs_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_US: u64 = 3_600_000_000;

    #[test]
    fn a_clock_that_is_wrong_is_corrected_and_one_that_may_be_right_is_left() {
        let clocks = Clocks::default();
        assert_eq!(clocks.ours("h2", 7), 7, "nothing is known");
        // Sent at 1000, answered 400 later: theirs was read at 1000 to 1400 of ours.
        clocks.note("h2", 1000, 400, 1390);
        assert_eq!(clocks.ours("h2", 5000), 5000, "190 ahead, or behind by 10, or right");
        clocks.note("h3", 1000, 400, 1200 + HOUR_US);
        assert_eq!(clocks.ours("h3", 5000 + HOUR_US), 5000);
        clocks.note("h4", HOUR_US + 1000, 400, 1200);
        assert_eq!(clocks.ours("h4", 5000), 5000 + HOUR_US);
    }

    #[test]
    fn the_quickest_answer_counts_until_a_clock_is_set() {
        let clocks = Clocks::default();
        clocks.note("h2", 1000, 100, 1050 + 10_000);
        clocks.note("h2", 2000, 900, 2450 + 10_200);
        assert_eq!(clocks.ours("h2", 20_000), 10_000, "the slower answer tells less");
        clocks.note("h2", 3000, 900, 3450);
        assert_eq!(clocks.ours("h2", 20_000), 20_000, "it was set right");
    }
}
