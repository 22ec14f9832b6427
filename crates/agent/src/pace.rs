//! How a snapshot's work shares the processors with guests.
//!
//! QEMU's capture thread takes a processor for as long as its reader lets it: some 4 µs a page, three system calls, zero or not.
//! On a computer whose processors guests need, captures at full speed leave these standing for tenths of seconds: long enough
//! for TCP to send again what is only late. So the reader sets the [`Pace`]: it begins gently, goes faster while
//! processors are idle, and slower while none is.
//!
//! A guest that writes to a page which is not saved yet waits until it is. After the cut that happens to every page that its
//! kernel and its programs write to: some two hundred fifty, all within a tenth of a second if nothing else holds them up. QEMU
//! sends such a page before others, but not before those that it is already writing to a full socket; so for the
//! *opening* of a capture the socket takes two pages, and whenever one came out of turn, the reader looks again at once.
//! (Socket for ten pages, one look for all of them: guests took 130 ms over it, and TCP sent again.)
//!
//! What can wait, huge pages before the cut and storing after it, is done with [`Breaks`].

use std::time::{Duration, Instant};

use crate::processors::Processors;

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
/// The opening ends when for so long no page has come out of turn,
const OPENING_CALM: Duration = Duration::from_millis(20);
/// but not before this
const OPENING_LEAST: Duration = Duration::from_millis(100);
/// nor after this.
const OPENING_MOST: Duration = Duration::from_millis(400);
/// Within the opening, the time between two looks. (Of 500 µs, guests took twice as long over their first writes.)
const OPENING_INTERVAL: Duration = Duration::from_micros(150);
/// Within the opening, so many looks follow at once on a page that came out of turn: the guest, which goes on, will soon need
/// another.
const OPENING_URGENT_LOOKS: u32 = 4;

/// The pace of one capture.
#[derive(Debug)]
pub(crate) struct Pace {
    /// In pages a second.
    rate: u64,
    least: u64,
    began: Instant,
    opening: bool,
    /// The pages that had come at the last look, and when that was.
    pages: u64,
    looked: Instant,
    /// How often pages had come out of turn at the last look; when that was last seen to have grown, and how many looks ago.
    jumps: u64,
    jumped: Instant,
    calm_looks: u32,
    load: Load,
}

impl Pace {
    /// For a machine with so many pages, from the first of them on.
    pub(crate) fn new(memory_pages: u64) -> Self {
        let least = (memory_pages / LONGEST_SECONDS).clamp(LEAST_RATE, MOST_RATE);
        let now = Instant::now();
        Self {
            rate: least,
            least,
            began: now,
            opening: true,
            pages: 0,
            looked: now,
            jumps: 0,
            jumped: now,
            calm_looks: 0,
            load: Load::new(now),
        }
    }

    /// Whether the guest writes again to what it always writes to.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening
    }

    /// How long the reader waits when so many pages have come in all, and so many times out of turn.
    pub(crate) fn next(&mut self, pages: u64, jumps: u64) -> Duration {
        let now = Instant::now();
        if let Some(idle_percent) = self.load.idle_percent(now) {
            self.rate = change(self.rate, self.least, idle_percent);
        }
        self.calm_looks = self.calm_looks.saturating_add(1);
        if jumps != self.jumps {
            self.jumps = jumps;
            self.jumped = now;
            self.calm_looks = 0;
        }
        let worth = match self.calm_looks {
            0 => LOOK_INTERVAL,
            ..OPENING_URGENT_LOOKS if self.opening => LOOK_INTERVAL,
            _ if self.opening => OPENING_INTERVAL,
            _ => span(pages - self.pages, self.rate).max(LOOK_INTERVAL),
        };
        let (since, calm) = (now - self.began, now - self.jumped);
        self.opening &= since < OPENING_LEAST || (calm < OPENING_CALM && since < OPENING_MOST);
        let due = self.looked + worth;
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

/// Breaks in a thread's work beside running guests: unless processors are idle, it rests for as long as it has worked.
#[derive(Debug)]
pub(crate) struct Breaks {
    /// When it went on after the last.
    since: Instant,
    idle_percent: u64,
    load: Load,
}

impl Breaks {
    /// The work begins.
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self { since: now, idle_percent: 0, load: Load::new(now) }
    }

    /// A short piece of it is done.
    pub(crate) fn take(&mut self) {
        let now = Instant::now();
        self.idle_percent = self.load.idle_percent(now).unwrap_or(self.idle_percent);
        if self.idle_percent < MUCH_IDLE_PERCENT {
            // A piece that took long had to wait for something itself.
            std::thread::sleep((now - self.since).min(LONGEST_BREAK));
        }
        self.since = Instant::now();
    }
}

/// The longest of the [`Breaks`].
const LONGEST_BREAK: Duration = Duration::from_millis(20);

/// What part of the processors is idle, looked at now and then.
#[derive(Debug)]
struct Load {
    looked: Instant,
    processors: Option<Processors>,
}

impl Load {
    fn new(now: Instant) -> Self {
        Self { looked: now, processors: Processors::now() }
    }

    /// What it was since the last look; `None` when that was just now.
    fn idle_percent(&mut self, now: Instant) -> Option<u64> {
        if now - self.looked < CHANGE_INTERVAL {
            return None;
        }
        self.looked = now;
        let before = std::mem::replace(&mut self.processors, Processors::now());
        Some(self.processors?.idle_percent_since(before?))
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
        pace.opening = false;
        let wait = pace.next(250, 0);
        assert!(wait <= Duration::from_millis(25) && wait > Duration::from_millis(15), "{wait:?}");
        let wait = pace.next(500, 1);
        assert!(
            wait <= Duration::from_millis(25) + LOOK_INTERVAL,
            "a page out of turn is followed at once: {wait:?}"
        );
        // Long past: only the look's own time counts.
        pace.looked -= Duration::from_secs(1);
        assert_eq!(pace.next(750, 1), Duration::ZERO);
        let wait = pace.next(750, 1);
        assert!(wait <= LOOK_INTERVAL, "{wait:?}");
    }

    #[test]
    fn in_the_opening_pages_are_taken_when_a_guest_waits() {
        let mut pace = Pace::new(1 << 24);
        let mut urgent = |jumps| {
            pace.looked = Instant::now();
            pace.next(1, jumps) <= LOOK_INTERVAL
        };
        for _ in 0..OPENING_URGENT_LOOKS {
            urgent(0);
        }
        assert!(!urgent(0), "also a large machine");
        let looks: Vec<_> = (0..6).map(|_| urgent(1)).collect();
        assert_eq!(looks, [true, true, true, true, false, false]);
    }

    #[test]
    fn the_opening_ends_when_it_is_calm() {
        let mut pace = Pace::new(65_536);
        let later = |pace: &mut Pace, millis: u64| {
            pace.began -= Duration::from_millis(millis);
            pace.jumped -= Duration::from_millis(millis);
        };
        pace.next(1, 0);
        later(&mut pace, 90);
        pace.next(2, 0);
        assert!(pace.is_opening());
        later(&mut pace, 20);
        pace.next(3, 1);
        assert!(pace.is_opening(), "a page came out of turn just now");
        later(&mut pace, 20);
        pace.next(4, 1);
        assert!(!pace.is_opening());
        pace.next(5, 2);
        assert!(!pace.is_opening(), "once ended, always ended");
        let mut pace = Pace::new(65_536);
        later(&mut pace, 400);
        pace.next(1, 1);
        assert!(!pace.is_opening(), "it does not last for ever");
    }

    #[test]
    fn breaks_are_as_long_as_the_work() {
        let mut breaks = Breaks::new();
        breaks.load.looked += Duration::from_secs(3600);
        breaks.since -= Duration::from_millis(10);
        let began = Instant::now();
        breaks.take();
        assert!(began.elapsed() >= Duration::from_millis(10));
        assert!(breaks.since >= began + Duration::from_millis(10));
        breaks.idle_percent = 50;
        breaks.since -= Duration::from_secs(3600);
        breaks.take();
        assert!(breaks.since >= began, "no break: some processors are idle");
    }
}
