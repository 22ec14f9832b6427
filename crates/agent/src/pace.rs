//! How fast a live capture goes.
//!
//! QEMU's capture thread takes a processor for as long as its reader lets it: some 4 µs a page, three system calls, zero or not.
//! On a computer whose processors guests need, captures at full speed leave these standing for tenths of seconds: long enough
//! for TCP to send again what is only late. So the reader sets the pace: it begins gently, goes faster while
//! processors are idle, and slower while none is.

use std::time::{Duration, Instant};

/// Pages a second at the least and at the beginning, of each machine: about a twentieth of a processor.
const LEAST_RATE: u64 = 10_000;
/// More than QEMU can do.
const MOST_RATE: u64 = 400_000;
/// How long a whole capture is to take at the most. Machines of many GiB take as long as QEMU takes at full speed.
const LONGEST_SECONDS: u64 = 10;
/// How often the pace is changed. (The kernel counts idle time in hundredths of seconds.)
const CHANGE_INTERVAL: Duration = Duration::from_millis(50);
/// With more than this part of all processors idle, faster.
const MUCH_IDLE_PERCENT: u64 = 20;
/// With less than this, slower.
const LITTLE_IDLE_PERCENT: u64 = 5;
/// The shortest time between two looks: a reader that is woken for every page costs more than the page does.
const LOOK_INTERVAL: Duration = Duration::from_micros(50);

/// The pace of one capture.
#[derive(Debug)]
pub(crate) struct Pace {
    /// In pages a second.
    rate: u64,
    least: u64,
    /// The pages that had come at the last look, and when that was.
    pages: u64,
    looked: Instant,
    changed: Instant,
    processors: Option<Processors>,
}

impl Pace {
    /// For a machine with so many pages.
    pub(crate) fn new(memory_pages: u64) -> Self {
        let least = (memory_pages / LONGEST_SECONDS).clamp(LEAST_RATE, MOST_RATE);
        let now = Instant::now();
        Self { rate: least, least, pages: 0, looked: now, changed: now, processors: Processors::now() }
    }

    /// How long the reader waits when so many pages have come in all.
    pub(crate) fn next(&mut self, pages: u64) -> Duration {
        let now = Instant::now();
        if now - self.changed >= CHANGE_INTERVAL {
            self.changed = now;
            let processors = Processors::now();
            if let (Some(before), Some(after)) = (self.processors, processors) {
                self.rate = change(self.rate, self.least, after.idle_percent_since(before));
            }
            self.processors = processors;
        }
        let due = self.looked + span(pages - self.pages, self.rate).max(LOOK_INTERVAL);
        self.pages = pages;
        // Late or not: what was missed is not made up for, or guests would get it all at once.
        self.looked = due.max(now);
        due.saturating_duration_since(now)
    }
}

fn span(pages: u64, rate: u64) -> Duration {
    Duration::from_nanos(pages.saturating_mul(1_000_000_000) / rate)
}

fn change(rate: u64, least: u64, idle_percent: u64) -> u64 {
    let rate = match idle_percent {
        MUCH_IDLE_PERCENT.. => rate * 2,
        LITTLE_IDLE_PERCENT.. => rate,
        _ => rate * 3 / 4,
    };
    rate.clamp(least, MOST_RATE)
}

/// What all processors together have done since the computer started, in the kernel's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Processors {
    idle: u64,
    all: u64,
}

impl Processors {
    fn now() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/stat").ok()?)
    }

    /// See proc_stat(5).
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // User, nice, system, idle, waiting for a device, interrupts, soft interrupts, stolen. (Guests' time is in user's.)
        let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|ticks| ticks.parse().ok()).collect();
        let [_, _, _, idle, waiting, ..] = ticks[..] else { return None };
        Some(Self {
            idle: idle.saturating_add(waiting),
            all: ticks.iter().fold(0, |sum, ticks| sum.saturating_add(*ticks)),
        })
    }

    fn idle_percent_since(self, before: Self) -> u64 {
        let all = self.all.saturating_sub(before.all);
        // Nothing counted yet: as if nothing were idle.
        (self.idle.saturating_sub(before.idle) * 100).checked_div(all).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_processors_make_it_faster() {
        let mut rate = LEAST_RATE;
        for _ in 0..10 {
            rate = change(rate, LEAST_RATE, 50);
        }
        assert_eq!(rate, MOST_RATE);
        assert_eq!(change(rate, LEAST_RATE, 10), rate);
        for _ in 0..20 {
            rate = change(rate, LEAST_RATE, 0);
        }
        assert_eq!(rate, LEAST_RATE);
    }

    #[test]
    fn large_machines_are_not_captured_for_ever() {
        let pages = (16 << 30) / 4096;
        let mut pace = Pace::new(pages);
        pace.rate = change(pace.rate, pace.least, 0);
        assert!(span(pages, pace.rate) <= Duration::from_secs(LONGEST_SECONDS + 1), "{pace:?}");
    }

    #[test]
    fn the_reader_waits_as_long_as_the_pages_are_worth() {
        let mut pace = Pace::new(65_536);
        let wait = pace.next(250);
        assert!(wait <= Duration::from_millis(25) && wait > Duration::from_millis(15), "{wait:?}");
        // Long past: only the look's own time counts.
        pace.looked -= Duration::from_secs(1);
        assert_eq!(pace.next(500), Duration::ZERO);
        let wait = pace.next(500);
        assert!(wait <= LOOK_INTERVAL, "{wait:?}");
    }

    #[test]
    fn the_kernel_counts_idle_time() {
        let before = Processors::parse("cpu  100 0 50 800 50 0 0 0 30 0\ncpu0 1 1 1 1\n").expect("a line");
        assert_eq!(before, Processors { idle: 850, all: 1000 });
        let after = Processors { idle: 900, all: 1100 };
        assert_eq!(after.idle_percent_since(before), 50);
        assert_eq!(before.idle_percent_since(before), 0);
        assert_eq!(Processors::parse("cpu  1 2 3\n"), None);
        assert_eq!(Processors::parse(""), None);
        assert!(Processors::now().is_some_and(|now| now.all >= now.idle && now.all > 0));
    }
}
