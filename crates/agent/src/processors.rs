//! The computer's processors, as far as this process and its machines may use them: how many there are, and what part of them is idle.
//!
//! A control group may have a quota of processor time, as containers often do. Whoever has used it up stands still until its
//! period ends, for tenths of seconds, although processors are idle: so its rest counts as what is idle, where that is less.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::control_group::ControlGroups;

/// How many this process may use: no more than its quota is worth.
pub(crate) fn count() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The least that a control group lets this process have of the processors, in hundredths of one; `None` without a quota.
pub(crate) fn quota_percent() -> Option<u64> {
    Quota::all(&ControlGroups::of_this_process()).into_iter().map(|quota| quota.percent).min()
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

    pub(crate) fn idle_percent_since(&self, before: &Self) -> u64 {
        let length = self.at.saturating_duration_since(before.at);
        let left = self.quotas.iter().filter_map(|quota| {
            let before = before.quotas.iter().find(|before| before.folder == quota.folder)?;
            quota.left_percent_since(before, length)
        });
        left.fold(self.ticks.idle_percent_since(before.ticks), u64::min)
    }
}

/// What the processors have done since the computer started, in the kernel's ticks: those that this process may run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    idle: u64,
    all: u64,
}

impl Ticks {
    fn now() -> Option<Self> {
        let own = sched_getaffinity(Pid::this()).ok();
        // Without an answer, more than the set can hold: all of them.
        let is_own = |number| own.as_ref().is_none_or(|own: &CpuSet| own.is_set(number).unwrap_or(false));
        Self::parse(&std::fs::read_to_string("/proc/stat").ok()?, is_own)
    }

    /// See proc_stat(5).
    fn parse(text: &str, is_own: impl Fn(usize) -> bool) -> Option<Self> {
        let lines = text.lines().filter_map(|line| {
            let (number, ticks) = line.strip_prefix("cpu")?.split_once(' ')?;
            is_own(number.parse().ok()?).then(|| Self::parse_line(ticks))
        });
        lines.reduce(|sum, ticks| {
            let (sum, ticks) = (sum?, ticks?);
            Some(Self { idle: sum.idle.saturating_add(ticks.idle), all: sum.all.saturating_add(ticks.all) })
        })?
    }

    fn parse_line(line: &str) -> Option<Self> {
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

/// The processor time that a control group lets its processes have, and what they have used.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Quota {
    folder: PathBuf,
    /// In hundredths of a processor.
    percent: u64,
    used: Duration,
}

impl Quota {
    /// Those of all groups that have one.
    fn all(groups: &ControlGroups) -> Vec<Self> {
        let unified = groups.unified().into_iter().filter_map(Self::unified);
        // Two controllers, mounted together or apart.
        let version_1 = groups.with_controller("cpu").into_iter().zip(groups.with_controller("cpuacct"));
        unified.chain(version_1.filter_map(|(cpu, account)| Self::of_version_1(cpu, &account))).collect()
    }

    /// See the kernel's documentation, "Control Group v2", "CPU Interface Files".
    fn unified(folder: PathBuf) -> Option<Self> {
        let (max, stat) = (read(&folder, "cpu.max")?, read(&folder, "cpu.stat")?);
        let (quota, period) = max.trim().split_once(' ')?;
        let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
        Self::new(folder, quota, period, Duration::from_micros(used.trim().parse().ok()?))
    }

    /// See the same, "CFS Bandwidth Control" and "CPU Accounting Controller".
    fn of_version_1(folder: PathBuf, account: &Path) -> Option<Self> {
        let (quota, period) = (read(&folder, "cpu.cfs_quota_us")?, read(&folder, "cpu.cfs_period_us")?);
        let used = read(account, "cpuacct.usage")?;
        Self::new(folder, &quota, &period, Duration::from_nanos(used.trim().parse().ok()?))
    }

    /// `None` for "max", and for -1, which is the same.
    fn new(folder: PathBuf, quota: &str, period: &str, used: Duration) -> Option<Self> {
        let (quota, period): (u64, u64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
        let percent = quota.checked_mul(100)?.checked_div(period)?;
        Some(Self { folder, percent, used })
    }

    /// What part of it was left in this time; `None` when that was no time, or nothing is allowed.
    fn left_percent_since(&self, before: &Self, length: Duration) -> Option<u64> {
        let used = self.used.saturating_sub(before.used).as_micros();
        let allowed = length.as_micros() * u128::from(self.percent) / 100;
        let used_percent = (used * 100).checked_div(allowed)?;
        Some(100_u64.saturating_sub(u64::try_from(used_percent).unwrap_or(u64::MAX)))
    }
}

fn read(folder: &Path, file: &str) -> Option<String> {
    std::fs::read_to_string(folder.join(file)).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Child, Command};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn processors(idle: u64, all: u64, quotas: &[(&str, u64, Duration)], at: Instant) -> Processors {
        let quotas = quotas.iter().map(|(folder, percent, used)| Quota {
            folder: folder.into(),
            percent: *percent,
            used: *used,
        });
        Processors { ticks: Ticks { idle, all }, quotas: quotas.collect(), at }
    }

    #[test]
    fn the_kernel_counts_idle_time() {
        let text = "cpu  1 1 1 1\ncpu0 60 0 30 400 10 0 0 0 30 0\ncpu1 40 0 20 400 40 0 0 0 0 0\ncpu12 9 0 0 1 0 0 0 0\n";
        let parse = |first: usize| Ticks::parse(text, |number| number >= first && number < 12);
        assert_eq!(parse(0), Some(Ticks { idle: 850, all: 1000 }));
        assert_eq!(parse(1), Some(Ticks { idle: 440, all: 500 }));
        assert_eq!(parse(2), None);
        assert_eq!(Ticks::parse("cpu0 1 2 3\n", |_| true), None);
        assert_eq!(Ticks::parse("", |_| true), None);
        let before = Ticks { idle: 850, all: 1000 };
        assert_eq!(Ticks { idle: 900, all: 1100 }.idle_percent_since(before), 50);
        assert_eq!(before.idle_percent_since(before), 0);
        let now = Processors::now().expect("Linux says it");
        assert!(now.ticks.all >= now.ticks.idle && now.ticks.all > 0, "{now:?}");
    }

    #[test]
    fn what_is_left_of_a_quota_counts_where_it_is_less_than_what_is_idle() {
        let start = Instant::now();
        let before = processors(0, 0, &[("/a", 200, 50 * MS), ("/a/b", 50, 10 * MS)], start);
        let after = |idle, a: u32, b: u32| {
            let quotas = [("/a", 200, (50 + a) * MS), ("/a/b", 50, (10 + b) * MS)];
            processors(idle, 100, &quotas, start + 100 * MS).idle_percent_since(&before)
        };
        assert_eq!(after(90, 20, 5), 90);
        assert_eq!(after(90, 80, 5), 60);
        assert_eq!(after(90, 80, 40), 20);
        assert_eq!(after(10, 80, 40), 10);
        // More than allowed, as happens at the end of a period.
        assert_eq!(after(90, 80, 60), 0);
        // A quota that is new has no past.
        let without = processors(0, 0, &[], start);
        let new = processors(90, 100, &[("/a", 1, MS)], start + MS);
        assert_eq!(new.idle_percent_since(&without), 90);
    }

    #[test]
    fn groups_say_what_they_allow() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path();
        let write = |name: &str, text: &str| fs::write(path.join(name), text).expect("write");
        assert_eq!(Quota::unified(path.to_owned()), None);
        write("cpu.stat", "usage_usec 1500\nuser_usec 1000\n");
        write("cpu.max", "max 100000\n");
        assert_eq!(Quota::unified(path.to_owned()), None);
        write("cpu.max", "150000 100000\n");
        let found = |percent, used| Some(Quota { folder: path.to_owned(), percent, used });
        assert_eq!(Quota::unified(path.to_owned()), found(150, Duration::from_micros(1500)));
        write("cpu.cfs_period_us", "50000\n");
        write("cpuacct.usage", "7000\n");
        write("cpu.cfs_quota_us", "-1\n");
        assert_eq!(Quota::of_version_1(path.to_owned(), path), None);
        write("cpu.cfs_quota_us", "10000\n");
        assert_eq!(Quota::of_version_1(path.to_owned(), path), found(20, Duration::from_nanos(7000)));
        for (quota, period) in [("1", "0"), ("", "1"), ("18446744073709551615", "1")] {
            assert_eq!(Quota::new(path.to_owned(), quota, period, MS), None);
        }
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
            let one = [groups.join("cpu").join(&name), groups.join("cpuacct").join(&name)];
            let unified = [groups.join(&name)];
            let folders: &[PathBuf] = if groups.join("cpu").is_dir() { &one } else { &unified };
            let process = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("sh");
            let mut group = Self { folders: Vec::new(), process };
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
                fs::write(folder.join("cgroup.procs"), group.process.id().to_string()).ok()?;
            }
            Some(group)
        }

        fn stop(&mut self) {
            self.process.kill().expect("kill");
            self.process.wait().expect("wait");
        }
    }

    impl Drop for Throttled {
        fn drop(&mut self) {
            self.stop();
            for folder in &self.folders {
                fs::remove_dir(folder).expect("a group without processes");
            }
        }
    }

    #[test]
    fn a_group_that_is_held_back_has_nothing_left() {
        let Some(mut group) = Throttled::start() else {
            eprintln!("not tried: only root may make control groups, and only where their controllers are");
            return;
        };
        let groups = ControlGroups::read(&format!("/proc/{}/cgroup", group.process.id()));
        let quota = || Quota::all(&groups).pop().expect("a quota");
        let left = || {
            let (before, at) = (quota(), Instant::now());
            std::thread::sleep(500 * MS);
            quota().left_percent_since(&before, at.elapsed())
        };
        assert_eq!(quota().percent, 10);
        let used = left().expect("time has passed");
        assert!(used <= 30, "{used}");
        group.stop();
        assert_eq!(left(), Some(100));
    }
}
