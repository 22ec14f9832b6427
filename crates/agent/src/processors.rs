//! The computer's processors: how many there are, and what part of them is idle.

/// How many this process may use.
pub(crate) fn count() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// What all processors together have done since the computer started, in the kernel's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Processors {
    idle: u64,
    all: u64,
}

impl Processors {
    pub(crate) fn now() -> Option<Self> {
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

    pub(crate) fn idle_percent_since(self, before: Self) -> u64 {
        let all = self.all.saturating_sub(before.all);
        // Nothing counted yet: as if nothing were idle.
        (self.idle.saturating_sub(before.idle) * 100).checked_div(all).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
