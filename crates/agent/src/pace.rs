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

use crate::processors::{Idle, Processors};

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
        CAPTURES.fetch_add(1, Ordering::Relaxed);
        Self { work, rate: least, least, pages, looked: now, load: Load::new(now) }
    }

    /// How long the reader waits when so many pages have come in all.
    pub(crate) fn next(&mut self, pages: u64) -> Duration {
        let now = Instant::now();
        if let Some(idle) = self.load.idle(now) {
            let headroom = headroom(idle, CAPTURES.load(Ordering::Relaxed), self.work.page_cost());
            self.rate = change(self.rate, self.least, idle.percent(), headroom);
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
fn headroom(idle: Idle, captures: u64, page_cost: Duration) -> u64 {
    let spare_micros = idle.hundredths.saturating_sub(idle.of * SPARED_PERCENT / 100) * 10_000;
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

/// How much of the processors threads take together that work beside running guests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// So many eighths of what is idle, their own work left out: with all eight they settle at half of what guests leave.
    pub(crate) idle_eighths: u64,
    /// What part of one processor each of them takes at the most.
    pub(crate) most_percent: u64,
    /// The longest rest after a piece of work.
    pub(crate) longest_rest: Duration,
}

impl Share {
    /// What part of one processor each of so many threads takes.
    fn percent(self, idle_hundredths: u64, threads: u64) -> u32 {
        let percent = idle_hundredths.saturating_mul(self.idle_eighths) / 8 / threads.max(1);
        percent.clamp(LEAST_SHARE_PERCENT, self.most_percent) as u32
    }

    /// How long a thread rests after a piece that took so long.
    fn rest(self, took: Duration, idle_hundredths: u64, threads: u64) -> Duration {
        let percent = self.percent(idle_hundredths, threads);
        (took * (100 - percent) / percent).min(self.longest_rest)
    }
}

/// Breaks in a thread's work beside running guests: it rests after each piece.
#[derive(Debug)]
pub(crate) struct Breaks {
    share: Share,
    threads: u64,
    /// When it went on after the last.
    since: Instant,
    idle_hundredths: u64,
    load: Load,
}

impl Breaks {
    /// The work begins, of at most so many threads at a time; as if nothing were idle, until that is known.
    pub(crate) fn new(share: Share, threads: usize) -> Self {
        let now = Instant::now();
        Self { share, threads: threads as u64, since: now, idle_hundredths: 0, load: Load::new(now) }
    }

    /// A short piece of it is done.
    pub(crate) fn take(&mut self) {
        let now = Instant::now();
        if let Some(idle) = self.load.idle(now) {
            self.idle_hundredths = smooth(self.idle_hundredths, idle.hundredths);
        }
        std::thread::sleep(self.share.rest(now - self.since, self.idle_hundredths, self.threads));
        self.since = Instant::now();
    }
}

/// What is idle, as threads go by that take of it: the last look counts a quarter, or they would take all of it and then nothing, in
/// turns, as soon as they are two or belong to several agents.
fn smooth(before: u64, now: u64) -> u64 {
    (3 * before + now) / 4
}

/// How much of the processors is idle, looked at now and then.
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
    fn idle(&mut self, now: Instant) -> Option<Idle> {
        if now - self.looked < CHANGE_INTERVAL {
            return None;
        }
        self.looked = now;
        let before = std::mem::replace(&mut self.processors, Processors::now());
        Some(self.processors.as_ref()?.idle_since(&before?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_processors_make_it_faster() {
        let step = |rate, percent: u64| {
            let idle = Idle { hundredths: percent * 4, of: 400 };
            change(rate, LEAST_RATE, idle.percent(), headroom(idle, 2, Work::Send.page_cost()))
        };
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
        let headroom = |percent: u64, captures| {
            headroom(Idle { hundredths: percent * 2, of: 200 }, captures, Work::Send.page_cost())
        };
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
        let gentle = Share { idle_eighths: 1, most_percent: 50, longest_rest: ms(30) };
        for (idle, threads, rest) in [(0, 1, 27), (80, 1, 27), (120, 1, 17), (120, 2, 27), (1600, 2, 3)] {
            assert_eq!(gentle.rest(ms(3), idle, threads), ms(rest), "{idle}");
        }
        // A piece that took long had to wait for something itself.
        assert_eq!(gentle.rest(ms(3_600_000), 1600, 1), ms(30));
        let share = Share { idle_eighths: 8, most_percent: 100, ..gentle };
        for (idle, threads, rest) in [(0, 1, 27), (10, 1, 27), (50, 1, 3), (50, 2, 9), (400, 4, 0)] {
            assert_eq!(share.rest(ms(3), idle, threads), ms(rest), "{idle}");
        }
        let mut breaks = Breaks::new(share, 1);
        breaks.load.looked += Duration::from_secs(3600);
        breaks.since -= ms(5);
        let began = Instant::now();
        breaks.take();
        assert!(began.elapsed() >= ms(30) && breaks.since >= began + ms(30));
    }

    #[test]
    fn threads_of_several_agents_settle() {
        let share = Share { idle_eighths: 8, most_percent: 100, longest_rest: Duration::ZERO };
        // Guests leave 1.2 of two processors; each agent has one thread.
        for (agents, settled) in [(1, 60), (3, 30)] {
            let mut seen = 0;
            let idle = (0..40)
                .map(|_| {
                    let idle = 120_u64.saturating_sub(agents * u64::from(share.percent(seen, 1)));
                    seen = smooth(seen, idle);
                    idle
                })
                .last();
            assert!(idle.is_some_and(|idle| idle.abs_diff(settled) <= 10), "{agents}: {idle:?}");
        }
    }
}
