//! How a snapshot's work shares the processors with guests.
//!
//! A live capture takes a processor for as long as it is let: QEMU's capture thread some 4 µs a page, three system calls,
//! zero or not, and its reader, which [takes pages itself](diorama_qemu::userfault), half of that. On a computer whose processors guests need,
//! captures at full speed leave these standing for tenths of seconds: long enough for TCP to send again what is only late.
//! So the reader sets the [`Pace`]: it begins gently, goes faster while processors are idle, and slower while none is.
//!
//! What can wait, huge pages before the cut and storing after it, is done with [`Breaks`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::processors::{self, Processors};

/// More than can be done.
const MOST_RATE: u64 = 400_000;
/// Pages a second at the least and at the beginning, of each machine: one to three hundredths of a processor. With three times
/// as many, six machines took what guests left of two (docs/benchmarks.md, "No faster than need be").
const LEAST_RATE: u64 = 5_000;
/// How long taking all pages is to take at the most, and sending them; this counts for machines of more than 195 MiB. Those of
/// many GiB take as long as QEMU takes at full speed.
const LONGEST_SECONDS: u64 = 10;
/// How often the pace is changed. (The kernel counts idle time in hundredths of seconds.)
const CHANGE_INTERVAL: Duration = Duration::from_millis(100);
/// With more than this part of all processors idle, faster.
const MUCH_IDLE_PERCENT: u64 = 30;
/// What is to stay idle then.
const SPARED_PERCENT: u64 = 20;
/// With less than this, slower.
const LITTLE_IDLE_PERCENT: u64 = 10;
/// What part of the rest is taken at a time.
const TAKEN_PART: u64 = 8;
/// What part of a processor other work beside guests takes at the least.
const LEAST_SHARE_PERCENT: u64 = 10;
/// The shortest time between two looks: a reader that is woken for every page costs more than the page does.
const LOOK_INTERVAL: Duration = Duration::from_micros(50);
/// How far pages that were read early, since somebody waited for QEMU, may put off others.
const LONGEST_DEBT: Duration = Duration::from_millis(10);

/// How many live captures there are in this process: they share what is idle.
static CAPTURES: AtomicU64 = AtomicU64::new(0);

/// What is done with each page of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// The reader takes it out of QEMU's memory.
    Take,
    /// QEMU sends it, and the reader reads it.
    Send,
}

impl Work {
    /// What a page takes of a processor, about.
    fn page_cost(self) -> Duration {
        match self {
            Self::Take => Duration::from_micros(2),
            Self::Send => Duration::from_micros(6),
        }
    }
}

/// The pace of one capture.
#[derive(Debug)]
pub(crate) struct Pace {
    work: Work,
    /// In pages a second.
    rate: u64,
    least: u64,
    /// How many processors this computer has for us.
    processors: u64,
    /// The pages that had come at the last look, and when that was.
    pages: u64,
    looked: Instant,
    load: Load,
}

impl Pace {
    /// For a machine with so many pages, of which so many have come already.
    pub(crate) fn new(work: Work, memory_pages: u64, pages: u64) -> Self {
        let least = (memory_pages / LONGEST_SECONDS).clamp(LEAST_RATE, MOST_RATE);
        let now = Instant::now();
        let processors = processors::count() as u64;
        CAPTURES.fetch_add(1, Ordering::Relaxed);
        Self { work, rate: least, least, processors, pages, looked: now, load: Load::new(now) }
    }

    /// How long the reader waits when so many pages have come in all.
    pub(crate) fn next(&mut self, pages: u64) -> Duration {
        let now = Instant::now();
        if let Some(idle_percent) = self.load.idle_percent(now) {
            let captures = CAPTURES.load(Ordering::Relaxed);
            let headroom = headroom(idle_percent, self.processors, captures, self.work.page_cost());
            self.rate = change(self.rate, self.least, idle_percent, headroom);
        }
        let worth = span(pages - self.pages, self.rate).max(LOOK_INTERVAL);
        let due = self.looked + worth;
        self.pages = pages;
        // Late or not: what was missed is not made up for, or guests would get it all at once.
        self.looked = due.clamp(now, now + worth.max(LONGEST_DEBT));
        self.looked - now
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        CAPTURES.fetch_sub(1, Ordering::Relaxed);
    }
}

fn span(pages: u64, rate: u64) -> Duration {
    Duration::from_nanos(pages.saturating_mul(1_000_000_000) / rate)
}

/// How many pages a second more each capture could take of the idle processors.
fn headroom(idle_percent: u64, processors: u64, captures: u64, page_cost: Duration) -> u64 {
    let spare_micros = idle_percent.saturating_sub(SPARED_PERCENT) * 10_000 * processors;
    spare_micros / page_cost.as_micros() as u64 / captures.max(1)
}

/// The next rate. Faster by a small part of what is spare, since others may see the same processors idle, such as other agents on
/// this computer, and take their part of it; slower by half, since guests are late already. (So TCP shares a link that it knows nothing of: up
/// by little, and down by half.)
fn change(rate: u64, least: u64, idle_percent: u64, headroom: u64) -> u64 {
    let rate = match idle_percent {
        MUCH_IDLE_PERCENT.. => rate + rate.min(headroom / TAKEN_PART),
        LITTLE_IDLE_PERCENT.. => rate,
        _ => rate / 2,
    };
    rate.clamp(least, MOST_RATE)
}

/// How much of a processor each of the threads takes that work beside running guests, one for every two processors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// So many quarters of that part of it that is idle, of all processors: with one quarter, the threads take an eighth of what is
    /// idle, and with eight all of it, as others leave it.
    pub(crate) idle_quarters: u64,
    /// The longest rest after a piece of work.
    pub(crate) longest_rest: Duration,
}

impl Share {
    fn percent(self, idle_percent: u64) -> u32 {
        (idle_percent * self.idle_quarters / 4).clamp(LEAST_SHARE_PERCENT, 100) as u32
    }

    /// How long the thread rests after a piece that took so long.
    fn rest(self, took: Duration, idle_percent: u64) -> Duration {
        let percent = self.percent(idle_percent);
        (took * (100 - percent) / percent).min(self.longest_rest)
    }
}

/// Breaks in a thread's work beside running guests: it rests after each piece.
#[derive(Debug)]
pub(crate) struct Breaks {
    share: Share,
    /// When it went on after the last.
    since: Instant,
    idle_percent: u64,
    load: Load,
}

impl Breaks {
    /// The work begins; as if nothing were idle, until that is known.
    pub(crate) fn new(share: Share) -> Self {
        let now = Instant::now();
        Self { share, since: now, idle_percent: 0, load: Load::new(now) }
    }

    /// A short piece of it is done.
    pub(crate) fn take(&mut self) {
        let now = Instant::now();
        self.idle_percent = self.load.idle_percent(now).unwrap_or(self.idle_percent);
        std::thread::sleep(self.share.rest(now - self.since, self.idle_percent));
        self.since = Instant::now();
    }
}

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
        Some(self.processors.as_ref()?.idle_percent_since(&before?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_processors_make_it_faster() {
        let step = |rate, idle| change(rate, LEAST_RATE, idle, headroom(idle, 4, 2, Work::Send.page_cost()));
        let mut rate = LEAST_RATE;
        for _ in 0..20 {
            rate = step(rate, 100);
        }
        assert_eq!(rate, MOST_RATE);
        assert_eq!(step(rate, 20), rate);
        assert_eq!(step(rate, 0), rate / 2);
        for _ in 0..7 {
            rate = step(rate, 0);
        }
        assert_eq!(rate, LEAST_RATE);
    }

    #[test]
    fn what_is_idle_is_not_taken_twice() {
        // Half of two processors, three captures: an eighth of what three tenths of them can do.
        let headroom = |idle_percent, captures| headroom(idle_percent, 2, captures, Work::Send.page_cost());
        assert_eq!(headroom(50, 3), 33_333);
        assert_eq!(change(40_000, 10_000, 50, 33_333), 44_166);
        assert_eq!(headroom(15, 3), 0);
        assert_eq!(headroom(100, 0), headroom(100, 1));
    }

    #[test]
    fn large_machines_are_not_captured_for_ever() {
        let pages = (16 << 30) / 4096;
        for work in [Work::Take, Work::Send] {
            let mut pace = Pace::new(work, pages, 0);
            pace.rate = change(pace.rate, pace.least, 0, 0);
            assert!(span(pages, pace.rate) <= Duration::from_secs(LONGEST_SECONDS + 1), "{pace:?}");
        }
    }

    #[test]
    fn the_reader_waits_as_long_as_the_pages_are_worth() {
        let mut pace = Pace::new(Work::Send, 50_000, 0);
        let wait = pace.next(125);
        assert!(wait <= Duration::from_millis(25) && wait > Duration::from_millis(15), "{wait:?}");
        // Long past: only the look's own time counts.
        pace.looked -= Duration::from_secs(1);
        assert_eq!(pace.next(500), Duration::ZERO);
        let wait = pace.next(500);
        assert!(wait <= LOOK_INTERVAL, "{wait:?}");
    }

    #[test]
    fn pages_that_were_read_early_put_off_others_but_not_for_long() {
        let mut pace = Pace::new(Work::Send, 50_000, 0);
        // The reader did not wait, twice.
        pace.next(10);
        pace.next(20);
        let wait = pace.next(30);
        assert!(wait > Duration::from_millis(4) && wait <= Duration::from_millis(6), "{wait:?}");
        for pages in 4..200 {
            pace.next(20 * pages);
        }
        let wait = pace.next(4000);
        assert!(wait <= LONGEST_DEBT, "{wait:?}");
    }

    #[test]
    fn breaks_follow_the_work() {
        let ms = Duration::from_millis;
        let mut share = Share { idle_quarters: 1, longest_rest: ms(30) };
        for (idle_percent, rest) in [(0, 27), (40, 27), (60, 17), (80, 12), (100, 9)] {
            assert_eq!(share.rest(ms(3), idle_percent), ms(rest), "{idle_percent}");
        }
        // A piece that took long had to wait for something itself.
        assert_eq!(share.rest(ms(3_600_000), 100), ms(30));
        share.idle_quarters = 8;
        for (idle_percent, rest) in [(0, 27), (5, 27), (10, 12), (25, 3), (50, 0), (100, 0)] {
            assert_eq!(share.rest(ms(3), idle_percent), ms(rest), "{idle_percent}");
        }
        let mut breaks = Breaks::new(share);
        breaks.since -= ms(5);
        let began = Instant::now();
        breaks.take();
        assert!(began.elapsed() >= ms(30) && breaks.since >= began + ms(30));
    }
}
