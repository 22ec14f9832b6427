//! A QEMU process: its start, its identity and its end.
//!
//! Machines outlive the agent that started them, so a process is named by [`ProcessId`], which can be stored: the
//! number together with the start time, so that a recycled number is never signalled. States: running, ended but not
//! yet reaped (only while its parent lives), gone; the latter two count as not alive. The kernel's word for "ended" is
//! the pidfd: `/proc` calls a process a zombie as soon as its first thread has ended, while others still hold memory
//! and sockets.

use nix::errno::Errno;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How much of a log's end an error carries, in bytes.
const LOG_TAIL_BYTES: u64 = 4096;

/// One process for all time on this boot of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The process number.
    pub pid: u32,
    /// When it started, in clock ticks since boot, from `/proc/PID/stat`.
    pub start_time_ticks: u64,
}

/// A QEMU that this process has started.
#[derive(Debug)]
pub struct Spawned {
    id: ProcessId,
    child: Child,
    log: PathBuf,
}

/// Why a process could not be started or handled.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The log file cannot be opened.
    #[error("cannot open the log {}: {source}", log.display())]
    Log {
        /// The log.
        log: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The binary cannot be run.
    #[error("cannot start {}: {source}", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// QEMU ended by itself.
    #[error("QEMU ended with {status}: {log_tail}")]
    EarlyExit {
        /// Its exit status.
        status: ExitStatus,
        /// The last lines of its log.
        log_tail: String,
    },
    /// The process did not go away.
    #[error("process {pid} is still there after {after_ms} ms")]
    StillThere {
        /// The process number.
        pid: u32,
        /// How long it was waited for.
        after_ms: u64,
    },
    /// The kernel refused an operation on the process.
    #[error("cannot {operation} process {pid}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The process or thread number.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How the kernel schedules a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The usual policy with a nice value from -20 (first) to 19 (last). Negative values need privilege.
    Normal {
        /// The nice value.
        nice: i32,
    },
    /// Only when nothing else wants the processor.
    Idle,
    /// Before everything that is not of this policy (round robin, real-time). Needs privilege; for moments only.
    First,
    /// Before everything but [`Policy::First`]; likewise.
    Second,
    /// Before everything but these two; likewise, for threads that have little to do.
    Third,
}

/// Starts QEMU as leader of a session of its own, with standard input empty and its output appended to `log`.
///
/// `fds` stay open in the new process under the numbers they have here, for arguments that name them; this process's
/// copies are closed. All others are closed there. The machine lives on when this process ends.
pub fn spawn(
    binary: &Path,
    arguments: &[OsString],
    log: &Path,
    fds: Vec<OwnedFd>,
) -> Result<Spawned, ProcessError> {
    let log_error = |source| ProcessError::Log { log: log.to_owned(), source };
    let output = OpenOptions::new().create(true).append(true).open(log).map_err(log_error)?;
    let errors = output.try_clone().map_err(log_error)?;
    let mut command = Command::new(binary);
    command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(errors);
    let kept: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec the closure only makes system calls and reads `kept`, which was allocated before;
    // it neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            Errno::result(libc::setsid())?;
            // CLOEXEC rather than closing: the standard library reports a failed exec through one of them.
            let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            Errno::result(libc::close_range(3, libc::c_uint::MAX, flags))?;
            for &fd in &kept {
                Errno::result(libc::fcntl(fd, libc::F_SETFD, 0))?;
            }
            Ok(())
        });
    }
    let child =
        command.spawn().map_err(|source| ProcessError::Spawn { binary: binary.to_owned(), source })?;
    drop(fds);
    let pid = child.id();
    // The child cannot be recycled before it is reaped, which only `Spawned` does.
    let start_time_ticks = match read_start_time(pid) {
        Ok(Some(start_time_ticks)) => start_time_ticks,
        Ok(None) => return Err(system("read the start time of", pid, io::ErrorKind::NotFound.into())),
        Err(source) => return Err(system("read the start time of", pid, source)),
    };
    Ok(Spawned { id: ProcessId { pid, start_time_ticks }, child, log: log.to_owned() })
}

impl Spawned {
    /// The process's identity, to be stored.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Succeeds while QEMU runs; says why it ended when it has.
    pub fn check(&mut self) -> Result<(), ProcessError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(ProcessError::EarlyExit { status, log_tail: log_tail(&self.log) }),
            Err(source) => Err(system("wait for", self.id.pid, source)),
        }
    }

    /// The error to show after QEMU closed a connection that it should not have: waits until `deadline` for its end,
    /// which follows at once, and returns its status and last words.
    pub fn explain_end(&mut self, deadline: Instant) -> ProcessError {
        match self.id.wait_gone(deadline).and_then(|()| self.check()) {
            Err(error) => error,
            Ok(()) => system("wait for", self.id.pid, io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Kills QEMU and waits until it is gone and reaped.
    pub fn kill(&mut self, deadline: Instant) -> Result<(), ProcessError> {
        self.id.kill()?;
        self.id.wait_gone(deadline)?;
        self.child.wait().map(drop).map_err(|source| system("reap", self.id.pid, source))
    }

    /// Reaps the process if it has ended; returns whether it had. An agent calls this when it sees a machine end.
    pub fn reap(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }
}

impl ProcessId {
    /// The identity of the process that has number `pid` now, if there is one.
    pub fn of(pid: u32) -> io::Result<Option<ProcessId>> {
        Ok(read_start_time(pid)?.map(|start_time_ticks| ProcessId { pid, start_time_ticks }))
    }

    /// Whether this very process still runs.
    pub fn is_alive(self) -> io::Result<bool> {
        Ok(match self.open()? {
            Some(pidfd) => !poll_end(&pidfd, 0)?,
            None => false,
        })
    }

    /// Kills the process. One that is gone already is no error.
    pub fn kill(self) -> Result<(), ProcessError> {
        let Some(pidfd) = self.pidfd()? else { return Ok(()) };
        // SAFETY: pidfd_send_signal takes a descriptor that `pidfd` owns, a signal number, no siginfo and no flags.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(sent) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(system("kill", self.pid, error.into())),
        }
    }

    /// Waits until the process has ended.
    pub fn wait_gone(self, deadline: Instant) -> Result<(), ProcessError> {
        let started = Instant::now();
        let Some(pidfd) = self.pidfd()? else { return Ok(()) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: a wait of less than a millisecond must not become a busy loop.
            let milliseconds =
                i32::try_from((left + Duration::from_micros(999)).as_millis()).unwrap_or(i32::MAX);
            if poll_end(&pidfd, milliseconds).map_err(|source| system("wait for", self.pid, source))? {
                return Ok(());
            }
            if left.is_zero() {
                let after_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                return Err(ProcessError::StillThere { pid: self.pid, after_ms });
            }
        }
    }

    /// A descriptor that becomes readable when the process ends, for event loops; `None` if it is gone.
    pub fn pidfd(self) -> Result<Option<OwnedFd>, ProcessError> {
        self.open().map_err(|source| system("open", self.pid, source))
    }

    fn open(self) -> io::Result<Option<OwnedFd>> {
        let pid = libc::c_long::from(self.pid);
        // SAFETY: pidfd_open takes a process number and flags, and touches no memory.
        let opened = match Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }) {
            Ok(fd) => fd as RawFd,
            Err(Errno::ESRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(opened) };
        // The descriptor pins whichever process has the number. Only now can it be compared without a race.
        Ok((read_start_time(self.pid)? == Some(self.start_time_ticks)).then_some(pidfd))
    }
}

/// Whether the process ends within `milliseconds`, all its threads included. May return early, with false.
fn poll_end(pidfd: &OwnedFd, milliseconds: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one valid pollfd, and the count says so.
    match Errno::result(unsafe { libc::poll(&mut poll, 1, milliseconds) }) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The threads of a process that are none of `but`; none when it has ended.
pub fn threads_of(pid: u32, but: &[u32]) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|thread| !but.contains(thread))
        .collect()
}

impl ProcessId {
    /// Duplicates of its descriptors that `/proc/PID/fd` shows as `link`.
    ///
    /// # Errors
    /// What the kernel says: this process may not trace that one (pidfd_getfd(2), ptrace(2)), or the kernel is older than 5.6.
    pub fn duplicates(self, link: &Path) -> io::Result<Vec<OwnedFd>> {
        let pidfd = self.pidfd().map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
        let mut duplicates = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid))? {
            let path = entry?.path();
            // One that has been closed meanwhile is none.
            if !std::fs::read_link(&path).is_ok_and(|found| found == link) {
                continue;
            }
            let number: Option<RawFd> = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if let Some(number) = number {
                duplicates.push(duplicate(&pidfd, number)?);
            }
        }
        Ok(duplicates)
    }
}

fn duplicate(pidfd: &OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes numbers only.
    let copy = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as RawFd) })
}

/// The threads of a process that are called so; none when it has ended.
pub fn threads_named(pid: u32, name: &str) -> Vec<u32> {
    let is_it = |thread: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"))
            .is_ok_and(|found| found.trim_end() == name)
    };
    threads_of(pid, &[]).into_iter().filter(is_it).collect()
}

/// Whether a thread sleeps, so that something wakes it (`S` in proc_pid_stat(5)); `None` when it is not there.
pub fn thread_sleeps(pid: u32, thread: u32) -> Option<bool> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
    // Its name may hold anything.
    Some(stat.rsplit_once(')')?.1.trim_start().starts_with('S'))
}

/// Sets how the kernel schedules one thread, such as a virtual CPU's (its number is in QMP `query-cpus-fast`).
pub fn set_thread_policy(thread: u32, policy: Policy) -> Result<(), ProcessError> {
    let (scheduler, nice, sched_priority) = match policy {
        Policy::Normal { nice } => (libc::SCHED_OTHER, Some(nice), 0),
        Policy::Idle => (libc::SCHED_IDLE, None, 0),
        // Threads that it starts meanwhile are ordinary ones.
        Policy::First => (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, None, 3),
        Policy::Second => (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, None, 2),
        Policy::Third => (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, None, 1),
    };
    let parameters = libc::sched_param { sched_priority };
    let set = |scheduler| {
        // SAFETY: `parameters` is valid for the call, which only reads it.
        Errno::result(unsafe { libc::sched_setscheduler(thread.cast_signed(), scheduler, &parameters) })
    };
    set(scheduler)
        // Without privilege that flag cannot be taken back, and does no harm.
        .or_else(|error| match error {
            Errno::EPERM => set(scheduler | libc::SCHED_RESET_ON_FORK),
            error => Err(error),
        })
        .map_err(|error| system("schedule", thread, error.into()))?;
    if let Some(nice) = nice {
        // SAFETY: setpriority takes numbers only.
        Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, nice) })
            .map_err(|error| system("set the nice value of", thread, error.into()))?;
    }
    Ok(())
}

/// The last lines of a log, as far as they can be read; for error messages.
pub fn log_tail(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            if lines.is_empty() {
                return "it wrote nothing".to_owned();
            }
            lines[lines.len().saturating_sub(5)..].join("; ")
        }
        Err(error) => format!("its log {} cannot be read: {error}", log.display()),
    }
}

fn read_start_time(pid: u32) -> io::Result<Option<u64>> {
    let text = match fs::read(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // The process ended between open and read.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    parse_start_time(&text).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Field 22. The second is the program's name in parentheses and may hold anything.
fn parse_start_time(text: &[u8]) -> Option<u64> {
    let after_name = text.iter().rposition(|&byte| byte == b')')? + 1;
    let mut fields = std::str::from_utf8(text.get(after_name..)?).ok()?.split_ascii_whitespace();
    fields.nth(19)?.parse().ok()
}

fn system(operation: &'static str, pid: u32, source: io::Error) -> ProcessError {
    ProcessError::System { operation, pid, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn shell(script: &str, fds: Vec<OwnedFd>) -> (Spawned, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("folder");
        let arguments = ["-c".into(), script.into()];
        let spawned =
            spawn(Path::new("/bin/sh"), &arguments, &folder.path().join("log"), fds).expect("spawn");
        (spawned, folder)
    }

    #[test]
    fn identity_and_end() {
        let (mut process, _folder) = shell("read line < /dev/zero", Vec::new());
        let id = process.id();
        assert!(id.is_alive().expect("stat"));
        process.check().expect("runs");
        assert_eq!(ProcessId::of(id.pid).expect("stat"), Some(id));
        assert!(matches!(id.wait_gone(Instant::now()), Err(ProcessError::StillThere { .. })));

        let recycled = ProcessId { start_time_ticks: id.start_time_ticks + 1, ..id };
        assert!(!recycled.is_alive().expect("stat"));
        recycled.kill().expect("nothing to kill");
        assert!(id.is_alive().expect("stat"), "another process's identity must not kill this one");

        process.kill(soon()).expect("kill");
        assert!(!id.is_alive().expect("stat"));
        id.kill().expect("killing what is gone is no error");
    }

    #[test]
    fn an_ended_child_is_not_alive_even_before_it_is_reaped() {
        let (mut process, _folder) = shell("echo first >&2; echo last words >&2; exit 3", Vec::new());
        process.id().wait_gone(soon()).expect("ends");
        assert!(!process.id().is_alive().expect("stat"));
        let error = process.explain_end(soon());
        assert!(
            matches!(&error, ProcessError::EarlyExit { status, log_tail }
                if status.code() == Some(3) && log_tail == "first; last words"),
            "{error}"
        );
    }

    #[test]
    fn only_the_listed_descriptors_are_inherited() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let leak = File::open("/dev/null").expect("open");
        // SAFETY: fcntl on a descriptor that `leak` owns; clearing CLOEXEC has no other effect.
        unsafe { libc::fcntl(leak.as_raw_fd(), libc::F_SETFD, 0) };
        let number = theirs.as_raw_fd();
        let script =
            format!("test -e /proc/self/fd/{number} && ! test -e /proc/self/fd/{}", leak.as_raw_fd());
        let (mut process, _folder) = shell(&script, vec![theirs.into()]);
        let error = process.explain_end(soon());
        assert!(matches!(&error, ProcessError::EarlyExit { status, .. } if status.success()), "{error}");
        // Our copy is closed and so is the child's: the pair's other end sees the end.
        assert_eq!((&ours).read(&mut [0]).expect("read"), 0);
    }

    #[test]
    fn a_missing_binary_is_named() {
        let folder = tempfile::tempdir().expect("folder");
        let error = spawn(Path::new("/nonexistent/qemu"), &[], &folder.path().join("log"), Vec::new())
            .expect_err("no");
        assert!(error.to_string().contains("/nonexistent/qemu"), "{error}");
    }

    #[test]
    fn hostile_process_names_do_not_confuse() {
        let stat = b"7 (a) Z 1 (b) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9";
        assert_eq!(parse_start_time(stat), Some(4711));
        assert_eq!(parse_start_time(b"7 (x"), None);
    }

    #[test]
    fn threads_can_be_scheduled() {
        // SAFETY: gettid touches no memory.
        let thread = std::thread::spawn(|| unsafe {
            let thread = libc::gettid().cast_unsigned();
            set_thread_policy(thread, Policy::Normal { nice: 5 }).expect("nice");
            assert_eq!(libc::getpriority(libc::PRIO_PROCESS, thread), 5);
            set_thread_policy(thread, Policy::Idle).expect("idle");
            assert_eq!(libc::sched_getscheduler(thread.cast_signed()), libc::SCHED_IDLE);
        });
        thread.join().expect("thread");
    }
}
