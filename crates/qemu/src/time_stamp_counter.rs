//! The frequency of the processor's time stamp counter (TSC), which emulated guests count with, too.
//!
//! QEMU's TCG hands guests the host's counter (`cpu_get_host_ticks` in include/qemu/timer.h). Linux measures its frequency while it
//! boots, against timers that QEMU emulates, and when QEMU has to wait for a processor just then, the result is wrong: in 4 of 64 boots,
//! eight at a time on two processors that six other machines used as well (QEMU 7.2, Linux 6.1), it was a sixth to an eleventh of what it is. The
//! guest's clock then goes that many times too fast, for good where Linux is told to trust the counter. `tsc_early_khz` on its command line
//! (Documentation/admin-guide/kernel-parameters.txt, Linux 5.13) tells it the frequency; it measures again later, and corrects that by one percent
//! at the most (`tsc_refine_calibration_work` in arch/x86/kernel/tsc.c). Right in 64 of 64.

use std::sync::OnceLock;
use std::time::Duration;
#[cfg(target_arch = "x86_64")]
use std::time::Instant;

/// For how long it is counted, which the first machine waits for: errors of 0.1 µs in both readings are 40 parts in a million.
const MEASURED: Duration = Duration::from_millis(5);
/// How often the counter and the clock are read at each end: the two readings that are closest to each other count.
const READINGS: usize = 16;
/// The word that tells Linux never to compare the counter with other clocks.
const TRUST: &str = "tsc=reliable";
const FREQUENCY: &str = "tsc_early_khz=";
/// What x86 Linux takes of a command line, in bytes (`COMMAND_LINE_SIZE`, less the end).
const LONGEST: usize = 2047;

/// The command line of an emulated Linux guest: one that is told to trust the counter is told its frequency right after that, unless it
/// says it already, the frequency is not known here, or there is no room.
pub fn with_frequency(command_line: &str) -> String {
    told(command_line, frequency_khz())
}

fn told(command_line: &str, frequency_khz: Option<u64>) -> String {
    let mut words: Vec<&str> = command_line.split(' ').collect();
    let trust = words.iter().position(|word| *word == TRUST);
    let knows = words.iter().any(|word| word.starts_with(FREQUENCY));
    let frequency = frequency_khz.map(|khz| format!("{FREQUENCY}{khz}"));
    if let (Some(trust), Some(frequency), false) = (trust, &frequency, knows)
        && command_line.len() + " ".len() + frequency.len() <= LONGEST
    {
        words.insert(trust + 1, frequency);
    }
    words.join(" ")
}

/// In kHz; `None` on other processors than x86-64, and where the kernel says that it is not constant. The first call takes 5 ms.
fn frequency_khz() -> Option<u64> {
    static FREQUENCY_KHZ: OnceLock<Option<u64>> = OnceLock::new();
    *FREQUENCY_KHZ.get_or_init(|| {
        let processors = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        is_constant(&processors).then(measure).flatten()
    })
}

fn is_constant(processors: &str) -> bool {
    let mut flags = processors.lines().filter_map(|line| line.strip_prefix("flags")).peekable();
    let has = |line: &str, flag| line.split_ascii_whitespace().any(|word| word == flag);
    flags.peek().is_some() && flags.all(|line| has(line, "constant_tsc") && has(line, "nonstop_tsc"))
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u64> {
    let (first_at, first) = read()?;
    std::thread::sleep(MEASURED);
    let (last_at, last) = read()?;
    let ns = (last_at - first_at).as_nanos();
    u64::try_from(u128::from(last.checked_sub(first)?) * 1_000_000 / ns).ok().filter(|khz| *khz > 0)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u64> {
    None
}

/// The counter, and when it was read.
#[cfg(target_arch = "x86_64")]
fn read() -> Option<(Instant, u64)> {
    let reading = |_| {
        let before = Instant::now();
        // SAFETY: every x86-64 processor has the instruction, which only reads a counter.
        let counter = unsafe { std::arch::x86_64::_rdtsc() };
        let took = before.elapsed();
        (took, before + took / 2, counter)
    };
    (0..READINGS).map(reading).min_by_key(|(took, _, _)| *took).map(|(_, at, counter)| (at, counter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_trusts_it_is_told_and_only_once() {
        let as_now = |line: &str| told(line, Some(2_596_117));
        let line = as_now("quiet tsc=reliable panic=1 -- tsc=reliable");
        assert_eq!(line, "quiet tsc=reliable tsc_early_khz=2596117 panic=1 -- tsc=reliable");
        for as_it_was in ["", "quiet  x", "notsc=reliable", "tsc=reliable tsc_early_khz=1000000", &line] {
            assert_eq!(as_now(as_it_was), as_it_was);
        }
        assert_eq!(told("tsc=reliable", None), "tsc=reliable");
    }

    #[test]
    fn nothing_is_pushed_out_of_a_line_that_is_full() {
        let line = |spare: usize| {
            format!("tsc=reliable x={}", "y".repeat(LONGEST - "tsc=reliable x=".len() - spare))
        };
        let word = " tsc_early_khz=2596117".len();
        assert_eq!(told(&line(word), Some(2_596_117)).len(), LONGEST);
        assert_eq!(told(&line(word - 1), Some(2_596_117)), line(word - 1));
    }

    #[test]
    fn a_counter_that_may_stop_is_not_trusted() {
        let both = "flags\t\t: fpu tsc constant_tsc nonstop_tsc\n";
        assert!(is_constant(&format!("processor : 0\n{both}\nprocessor : 1\n{both}")));
        assert!(!is_constant(&format!("{both}flags\t\t: fpu tsc constant_tsc\n")));
        assert!(!is_constant("Features : fp asimd\n"));
        assert!(!is_constant(""));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn it_is_what_the_kernel_counts_with() {
        // Twice, some time apart: whatever interrupts a reading, the closest of many counts.
        let (first, second) = (measure().expect("it grows"), measure().expect("it grows"));
        assert!(first.abs_diff(second) * 100 < first, "{first} and {second} kHz");
        assert!((100_000..10_000_000).contains(&first), "{first} kHz");
    }
}
