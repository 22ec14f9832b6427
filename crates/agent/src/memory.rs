//! The computer's memory: how much there is, and how much can still be had.

use std::path::Path;

use crate::control_group::ControlGroups;

/// In bytes, as the kernel estimates it, within the limits of the control groups that this process is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostMemory {
    pub(crate) total: u64,
    /// Without swapping: what is free, and what holds nothing but cached files. (Files on tmpfs count as used.)
    pub(crate) available: u64,
}

impl HostMemory {
    /// How it is now; `None` where the kernel does not say.
    pub(crate) fn now() -> Option<Self> {
        let whole = parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
        let groups = ControlGroups::of_this_process();
        let unified = groups
            .unified()
            .into_iter()
            .filter_map(|folder| Self::of_group(&folder, ["memory.max", "memory.current"], "inactive_file "));
        let version_1 = groups.with_controller("memory").into_iter().filter_map(|folder| {
            let files = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
            Self::of_group(&folder, files, "total_inactive_file ")
        });
        Some(unified.chain(version_1).fold(whole, Self::within))
    }

    fn of_group(folder: &Path, [max, current]: [&str; 2], cached: &str) -> Option<Self> {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        parse_group(&read(max)?, &read(current)?, &read("memory.stat")?, cached)
    }

    fn within(self, limit: Self) -> Self {
        Self { total: self.total.min(limit.total), available: self.available.min(limit.available) }
    }
}

/// See proc_meminfo(5).
fn parse_meminfo(text: &str) -> Option<HostMemory> {
    let field = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(HostMemory { total: field("MemTotal")?, available: field("MemAvailable")? })
}

/// A group's files, as the kernel's documentation of control groups describes them; `None`: without a limit. (In version 1 that is more
/// than any computer has.)
fn parse_group(max: &str, current: &str, stat: &str, cached: &str) -> Option<HostMemory> {
    let total: u64 = max.trim().parse().ok()?;
    let used: u64 = current.trim().parse().ok()?;
    let cached = stat.lines().find_map(|line| line.strip_prefix(cached))?.trim().parse().ok()?;
    Some(HostMemory { total, available: total.saturating_sub(used.saturating_sub(cached)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_much_there_is() {
        let memory = HostMemory::now().expect("Linux says it");
        assert!(memory.available <= memory.total && memory.total > 0, "{memory:?}");
        let text = "MemTotal:       24683520 kB\nMemFree:        21500 kB\nMemAvailable:   21854208 kB\n";
        assert_eq!(
            parse_meminfo(text),
            Some(HostMemory { total: 24_683_520 << 10, available: 21_854_208 << 10 })
        );
        assert_eq!(parse_meminfo("MemTotal: 5 kB\n"), None);
        assert_eq!(parse_meminfo("MemTotal: 5 kB\nMemAvailable: 99999999999999999999 kB"), None);
    }

    #[test]
    fn a_group_limits_it() {
        let limited = parse_group("1000\n", "700\n", "anon 400\ninactive_file 200\n", "inactive_file ")
            .expect("a limit");
        assert_eq!(limited, HostMemory { total: 1000, available: 500 });
        assert_eq!(parse_group("max\n", "700\n", "inactive_file 200\n", "inactive_file "), None);
        let computer = HostMemory { total: 5000, available: 300 };
        assert_eq!(computer.within(limited), HostMemory { total: 1000, available: 300 });
    }
}
