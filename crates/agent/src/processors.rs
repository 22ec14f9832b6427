//! The computer's processors, as far as this process and its machines may use them: how many there are, and how much of them is idle.
//!
//! A control group may have a quota of processor time, as containers often do. Whoever has used it up stands still until its
//! period ends, a tenth of a second usually, although processors are idle: so what is left of it counts as what is idle, where that is
//! less. (Of quotas of groups around a container it sees nothing.)

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::control_group::ControlGroups;

/// How many this process may use: no more than its quota is worth.
pub(crate) fn count() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// How many there are that this process may run on, whatever its quota.
pub(crate) fn allowed() -> usize {
    own().map_or_else(count, |own| own.len())
}

/// The smallest quota that a control group gives this process, if it is less than the processors that it may run on.
pub(crate) fn quota() -> Option<Quota> {
    let quotas = Quota::all(&ControlGroups::of_this_process()).into_iter();
    quotas.min_by_key(|quota| quota.hundredths).filter(|quota| quota.hundredths < allowed() as u64 * 100)
}

/// What may be used and is not, in hundredths of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Idle {
    pub(crate) hundredths: u64,
    /// Of how many.
    pub(crate) of: u64,
}

impl Idle {
    pub(crate) fn percent(self) -> u64 {
        (self.hundredths * 100).checked_div(self.of).unwrap_or(0)
    }
}

/// What they have done, all together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Processors {
    ticks: Ticks,
    quotas: Vec<Quota>,
    at: Instant,
}

impl Processors {
    pub(crate) fn now() -> Option<Self> {
        Some(Self {
            ticks: Ticks::now()?,
            quotas: Quota::all(&ControlGroups::of_this_process()),
            at: Instant::now(),
        })
    }

    pub(crate) fn idle_since(&self, before: &Self) -> Idle {
        let length = self.at.saturating_duration_since(before.at);
        let left = self.quotas.iter().filter_map(|quota| {
            let before = before.quotas.iter().find(|before| before.folder == quota.folder)?;
            quota.left_since(before, length)
        });
        let least = |one: Idle, other: Idle| if other.hundredths < one.hundredths { other } else { one };
        left.fold(self.ticks.idle_since(before.ticks), least)
    }
}

/// The numbers of those that this process may run on; `None` where the kernel has more than a set can hold.
fn own() -> Option<Vec<usize>> {
    let own = sched_getaffinity(Pid::this()).ok()?;
    Some((0..CpuSet::count()).filter(|number| own.is_set(*number) == Ok(true)).collect())
}

/// What the processors have done since the computer started, in the kernel's ticks: those that this process may run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    processors: u64,
    idle: u64,
    all: u64,
}

impl Ticks {
    fn now() -> Option<Self> {
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        let all = || Self::parse(&text, |_| true);
        let Some(own) = own() else { return all() };
        // Where a container sees its own processors alone, under other numbers (lxcfs), these are all that there are.
        Self::parse(&text, |number| own.binary_search(&number).is_ok())
            .filter(|found| found.processors == own.len() as u64)
            .or_else(all)
    }

    /// See proc_stat(5).
    fn parse(text: &str, is_own: impl Fn(usize) -> bool) -> Option<Self> {
        let lines = text.lines().filter_map(|line| {
            let (number, ticks) = line.strip_prefix("cpu")?.split_once(' ')?;
            is_own(number.parse().ok()?).then(|| Self::parse_line(ticks))
        });
        lines.reduce(|sum, ticks| {
            let (sum, ticks) = (sum?, ticks?);
            Some(Self {
                processors: sum.processors + ticks.processors,
                idle: sum.idle.saturating_add(ticks.idle),
                all: sum.all.saturating_add(ticks.all),
            })
        })?
    }

    /// One processor's.
    fn parse_line(line: &str) -> Option<Self> {
        // User, nice, system, idle, waiting for a device, interrupts, soft interrupts, stolen. (Guests' time is in user's.)
        let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|ticks| ticks.parse().ok()).collect();
        let [_, _, _, idle, waiting, ..] = ticks[..] else { return None };
        Some(Self {
            processors: 1,
            idle: idle.saturating_add(waiting),
            all: ticks.iter().fold(0, |sum, ticks| sum.saturating_add(*ticks)),
        })
    }

    fn idle_since(self, before: Self) -> Idle {
        let of = self.processors * 100;
        let (idle, all) = (self.idle.saturating_sub(before.idle), self.all.saturating_sub(before.all));
        // Nothing counted yet: as if nothing were idle.
        let hundredths = (u128::from(idle) * u128::from(of)).checked_div(u128::from(all)).unwrap_or(0);
        Idle { hundredths: u64::try_from(hundredths).unwrap_or(0).min(of), of }
    }
}

/// The processor time that a control group lets its processes have, and what they have used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Quota {
    folder: PathBuf,
    /// In hundredths of a processor.
    pub(crate) hundredths: u64,
    /// How long whoever has used it up stands still at the most.
    pub(crate) period: Duration,
    /// `None` where that is not counted, or for another group.
    used: Option<Duration>,
}

impl Quota {
    /// Those of all groups that have one.
    fn all(groups: &ControlGroups) -> Vec<Self> {
        let unified = groups.unified().into_iter().filter_map(Self::unified);
        // Two controllers, mounted together or apart.
        let is_counted = groups.is_the_same_with("cpu", "cpuacct");
        let mut accounts =
            if is_counted { groups.with_controller("cpuacct") } else { Vec::new() }.into_iter();
        let version_1 = groups.with_controller("cpu").into_iter().filter_map(|folder| {
            let account = accounts.next();
            Self::of_version_1(folder, account.as_deref())
        });
        unified.chain(version_1).collect()
    }

    /// See the kernel's documentation, "Control Group v2", "CPU Interface Files".
    fn unified(folder: PathBuf) -> Option<Self> {
        let max = read(&folder, "cpu.max")?;
        let (quota, period) = max.trim().split_once(' ')?;
        let quota = Self::new(folder, quota, period)?;
        let used = read(&quota.folder, "cpu.stat").and_then(|stat| {
            let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
            used.trim().parse().ok().map(Duration::from_micros)
        });
        Some(Self { used, ..quota })
    }

    /// See the same, "CFS Bandwidth Control" and "CPU Accounting Controller".
    fn of_version_1(folder: PathBuf, account: Option<&Path>) -> Option<Self> {
        let (quota, period) = (read(&folder, "cpu.cfs_quota_us")?, read(&folder, "cpu.cfs_period_us")?);
        let quota = Self::new(folder, &quota, &period)?;
        let used = account.and_then(|account| read(account, "cpuacct.usage")?.trim().parse().ok());
        Some(Self { used: used.map(Duration::from_nanos), ..quota })
    }

    /// Both are in microseconds. `None` for "max", and for -1, which is the same.
    fn new(folder: PathBuf, quota: &str, period: &str) -> Option<Self> {
        let (quota, period): (u64, u64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
        // The least that the kernel knows is a thousandth.
        let hundredths = quota.checked_mul(100)?.checked_div(period)?.max(1);
        Some(Self { folder, hundredths, period: Duration::from_micros(period), used: None })
    }

    /// What was left of it in this time; `None` when that was no time, or is not known.
    fn left_since(&self, before: &Self, length: Duration) -> Option<Idle> {
        let used = self.used?.saturating_sub(before.used?);
        let used_hundredths = (used.as_micros() * 100).checked_div(length.as_micros())?;
        let used_hundredths = u64::try_from(used_hundredths).unwrap_or(u64::MAX);
        Some(Idle { hundredths: self.hundredths.saturating_sub(used_hundredths), of: self.hundredths })
    }
}

fn read(folder: &Path, file: &str) -> Option<String> {
    std::fs::read_to_string(folder.join(file)).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Child, Command};

    use nix::sys::signal::{Signal, kill};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn quota(folder: &Path, hundredths: u64, used: Option<Duration>) -> Quota {
        Quota { folder: folder.to_owned(), hundredths, period: 100 * MS, used }
    }

    /// Of two processors.
    fn processors(idle: u64, all: u64, quotas: &[(&str, u64, Duration)], at: Instant) -> Processors {
        let quotas = quotas.iter().map(|(folder, of, used)| quota(Path::new(folder), *of, Some(*used)));
        Processors { ticks: Ticks { processors: 2, idle, all }, quotas: quotas.collect(), at }
    }

    #[test]
    fn the_kernel_counts_idle_time() {
        let text = "cpu  1 1 1 1\ncpu0 60 0 30 400 10 0 0 0 30 0\ncpu1 40 0 20 400 40 0 0 0 0 0\ncpu12 9 0 0 1 0 0 0 0\n";
        let parse = |first: usize| Ticks::parse(text, |number| number >= first && number < 12);
        let before = Ticks { processors: 2, idle: 850, all: 1000 };
        assert_eq!(parse(0), Some(before));
        assert_eq!(parse(1), Some(Ticks { processors: 1, idle: 440, all: 500 }));
        assert_eq!(parse(2), None);
        assert_eq!(Ticks::parse("cpu0 1 2 3\n", |_| true), None);
        assert_eq!(Ticks::parse("", |_| true), None);
        let half = Ticks { idle: 900, all: 1100, ..before }.idle_since(before);
        assert_eq!((half, half.percent()), (Idle { hundredths: 100, of: 200 }, 50));
        assert_eq!(before.idle_since(before), Idle { hundredths: 0, of: 200 });
        let now = Processors::now().expect("Linux says it");
        assert!(now.ticks.all >= now.ticks.idle && now.ticks.all > 0, "{now:?}");
        assert_eq!(now.ticks.processors, allowed() as u64);
    }

    #[test]
    fn what_is_left_of_a_quota_counts_where_it_is_less_than_what_is_idle() {
        let start = Instant::now();
        let before = processors(0, 0, &[("/a", 150, 50 * MS), ("/a/b", 50, 10 * MS)], start);
        let after = |idle, a: u32, b: u32| {
            let quotas = [("/a", 150, (50 + a) * MS), ("/a/b", 50, (10 + b) * MS)];
            let idle = processors(idle, 100, &quotas, start + 100 * MS).idle_since(&before);
            (idle.hundredths, idle.of)
        };
        assert_eq!(after(90, 20, 5), (45, 50));
        assert_eq!(after(90, 130, 5), (20, 150));
        assert_eq!(after(90, 80, 40), (10, 50));
        assert_eq!(after(3, 80, 40), (6, 200));
        // More than allowed, as happens at the end of a period.
        assert_eq!(after(90, 80, 60), (0, 50));
        // A quota that is new has no past.
        let without = processors(0, 0, &[], start);
        let new = processors(90, 100, &[("/a", 1, MS)], start + MS);
        assert_eq!(new.idle_since(&without), Idle { hundredths: 180, of: 200 });
    }

    #[test]
    fn groups_say_what_they_allow() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path();
        let write = |name: &str, text: &str| fs::write(path.join(name), text).expect("write");
        assert_eq!(Quota::unified(path.to_owned()), None);
        write("cpu.max", "max 100000\n");
        assert_eq!(Quota::unified(path.to_owned()), None);
        write("cpu.max", "150000 100000\n");
        assert_eq!(Quota::unified(path.to_owned()), Some(quota(path, 150, None)));
        write("cpu.stat", "usage_usec 1500\nuser_usec 1000\n");
        assert_eq!(
            Quota::unified(path.to_owned()),
            Some(quota(path, 150, Some(Duration::from_micros(1500))))
        );
        write("cpu.cfs_period_us", "100000\n");
        write("cpuacct.usage", "7000\n");
        write("cpu.cfs_quota_us", "-1\n");
        assert_eq!(Quota::of_version_1(path.to_owned(), Some(path)), None);
        write("cpu.cfs_quota_us", "20000\n");
        let used = Some(Duration::from_nanos(7000));
        assert_eq!(Quota::of_version_1(path.to_owned(), Some(path)), Some(quota(path, 20, used)));
        assert_eq!(Quota::of_version_1(path.to_owned(), None), Some(quota(path, 20, None)));
        for (quota, period) in [("1", "0"), ("", "1"), ("18446744073709551615", "1")] {
            assert_eq!(Quota::new(path.to_owned(), quota, period), None);
        }
        assert_eq!(Quota::new(path.to_owned(), "1000", "1000000").map(|quota| quota.hundredths), Some(1));
    }

    /// A group that has a tenth of a processor, and a process in it that would have a whole one.
    struct Throttled {
        folders: Vec<PathBuf>,
        process: Child,
    }

    impl Throttled {
        /// `None` where this process may not make groups.
        fn start() -> Option<Self> {
            let name = format!("diorama-test-{}", std::process::id());
            let groups = Path::new("/sys/fs/cgroup");
            let version_1 = [groups.join("cpu").join(&name), groups.join("cpuacct").join(&name)];
            let unified = [groups.join(&name)];
            let folders: &[PathBuf] = if groups.join("cpu").is_dir() { &version_1 } else { &unified };
            // It ends by itself, whatever becomes of this test.
            let process = Command::new("timeout").args(["30", "sh", "-c", "while :; do :; done"]).spawn();
            let mut group = Self { folders: Vec::new(), process: process.expect("coreutils") };
            for folder in folders {
                // Where two controllers are mounted together it is there already.
                if !folder.is_dir() {
                    fs::create_dir(folder).ok()?;
                    group.folders.push(folder.clone());
                }
            }
            fs::write(folders[0].join("cpu.max"), "10000 100000")
                .or_else(|_| fs::write(folders[0].join("cpu.cfs_quota_us"), "10000"))
                .ok()?;
            for folder in folders {
                for process in group.processes() {
                    fs::write(folder.join("cgroup.procs"), process.to_string()).ok()?;
                }
            }
            Some(group)
        }

        /// timeout(1) and, once it is there, what it runs.
        fn processes(&self) -> Vec<u32> {
            let parent = self.process.id();
            let children = format!("/proc/{parent}/task/{parent}/children");
            let end = Instant::now() + 10_000 * MS;
            loop {
                let found = fs::read_to_string(&children).unwrap_or_default();
                let found: Vec<u32> = found.split_whitespace().filter_map(|id| id.parse().ok()).collect();
                if !found.is_empty() || Instant::now() > end {
                    return found.into_iter().chain([parent]).collect();
                }
                std::thread::sleep(MS);
            }
        }

        fn stop(&mut self) {
            for process in self.processes() {
                let process = Pid::from_raw(i32::try_from(process).expect("a process"));
                // It may have ended.
                let _: Result<(), _> = kill(process, Signal::SIGKILL);
            }
            self.process.wait().expect("wait");
        }
    }

    impl Drop for Throttled {
        fn drop(&mut self) {
            if matches!(self.process.try_wait(), Ok(None)) {
                self.stop();
            }
            let end = Instant::now() + 10_000 * MS;
            for folder in &self.folders {
                // Its processes may still be on their way out.
                while fs::remove_dir(folder).is_err() && Instant::now() < end {
                    std::thread::sleep(MS);
                }
            }
        }
    }

    #[test]
    fn a_group_that_is_held_back_has_little_left() {
        let Some(mut group) = Throttled::start() else {
            eprintln!("not tried: only root may make control groups, and only where their controllers are");
            return;
        };
        let groups = ControlGroups::read(&format!("/proc/{}/cgroup", group.process.id()));
        let quota = || Quota::all(&groups).pop().expect("a quota");
        assert_eq!((quota().hundredths, quota().period), (10, 100 * MS));
        let left = || {
            let (before, at) = (quota(), Instant::now());
            std::thread::sleep(200 * MS);
            quota().left_since(&before, at.elapsed()).expect("time has passed").hundredths
        };
        // It may have to wait for a processor.
        let end = Instant::now() + 20_000 * MS;
        while left() > 2 {
            assert!(Instant::now() < end, "a busy loop used less than it may");
        }
        group.stop();
        assert_eq!(left(), 10);
    }
}
