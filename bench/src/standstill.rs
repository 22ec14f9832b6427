//! When programs in guests are seen at work, from outside: by the host's clock, which goes on when a machine is stopped.
//!
//! In each machine a program writes a byte to the serial console and a page of memory 100 times a second (`traffic beat`).
//! The console's file is looked at every millisecond.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::lab::{self, Lab};
use crate::load::MACHINES;

const LOOK: Duration = Duration::from_millis(1);
/// What comes after a command is still put down to it.
const AFTER: Duration = Duration::from_millis(300);
/// How long the first bytes may take.
const READY: Duration = Duration::from_secs(30);

/// The programs, and where they are seen.
#[derive(Debug)]
pub(crate) struct Beats {
    consoles: Vec<PathBuf>,
}

impl Beats {
    /// Starts one in each machine.
    pub(crate) fn start(lab: &Lab, environment: &str) -> Result<Self, Failure> {
        let folder = lab.home().join("environments").join(environment).join("console");
        let beats = Self { consoles: MACHINES.map(|machine| folder.join(format!("{machine}.log"))).into() };
        let before = beats.lengths();
        for machine in MACHINES {
            let script = "setsid traffic beat --file /dev/console --rate 100 </dev/null >/dev/null 2>&1 &";
            lab.guest(environment, machine, script)?;
        }
        let end = Instant::now() + READY;
        while beats.lengths().iter().zip(&before).any(|(now, before)| now <= before) {
            if Instant::now() > end {
                return Err(Failure::TooLate("a beat of each machine".to_owned(), READY.as_secs()));
            }
            lab::sleep(Duration::from_millis(100))?;
        }
        Ok(beats)
    }

    /// Does something, and returns what came of it and the longest time, in milliseconds, in which a program was not seen.
    pub(crate) fn longest_gap<T>(
        &self,
        task: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<(T, f64), Failure> {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watching = scope.spawn(|| self.watch(&done));
            let result = task();
            std::thread::sleep(AFTER);
            done.store(true, Ordering::Relaxed);
            let longest = watching.join().expect("watching does not panic");
            Ok((result?, longest.as_secs_f64() * 1e3))
        })
    }

    fn watch(&self, done: &AtomicBool) -> Duration {
        let mut seen = self.lengths();
        let mut since = vec![Instant::now(); seen.len()];
        let mut longest = Duration::ZERO;
        while !done.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
            let now = Instant::now();
            for ((length, seen), since) in self.lengths().into_iter().zip(&mut seen).zip(&mut since) {
                longest = longest.max(now - *since);
                if length != *seen {
                    (*seen, *since) = (length, now);
                }
            }
        }
        longest
    }

    /// A file that is not there has none.
    fn lengths(&self) -> Vec<u64> {
        let length = |path: &PathBuf| std::fs::metadata(path).map_or(0, |found| found.len());
        self.consoles.iter().map(length).collect()
    }
}
