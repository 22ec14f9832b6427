//! When an unanswered request is sent again: waits double up to [`MAX_WAITS`] times the first wait.

use std::time::Duration;

/// The longest wait, in first waits. Eight keeps a lost message cheap and a dead peer quiet.
const MAX_WAITS: u32 = 8;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Retry {
    pub due: Duration,
    wait: Duration,
    longest: Duration,
}

impl Retry {
    pub fn new(now: Duration, first_wait: Duration) -> Self {
        // A wait of zero would make a timer that is always due.
        let wait = first_wait.max(Duration::from_millis(1));
        Self { due: now.saturating_add(wait), wait, longest: wait.saturating_mul(MAX_WAITS) }
    }

    /// The first sending is still to be made.
    pub fn due_at(now: Duration, first_wait: Duration) -> Self {
        Self { due: now, ..Self::new(now, first_wait) }
    }

    /// Whether to send now; if so, the next wait begins.
    pub fn fire(&mut self, now: Duration) -> bool {
        if now < self.due {
            return false;
        }
        self.wait = self.wait.saturating_mul(2).min(self.longest);
        self.due = now.saturating_add(self.wait);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut retry = Retry::new(Duration::ZERO, Duration::from_millis(10));
        let mut waits_ms = Vec::new();
        let mut now = Duration::ZERO;
        for _ in 0..6 {
            let due = retry.due;
            assert!(!retry.fire(due - Duration::from_nanos(1)));
            assert!(retry.fire(due));
            waits_ms.push((due - now).as_millis());
            now = due;
        }
        assert_eq!(waits_ms, [10, 20, 40, 80, 80, 80]);
    }
}
