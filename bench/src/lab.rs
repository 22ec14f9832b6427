//! A private place to measure in: folders of its own, the real `diorama` binary, and nothing left behind.
//!
//! Invariant: dropping a [`Lab`] ends its environments and its agent and removes its folders, also after a failure,
//! a panic, SIGINT or SIGTERM.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::failure::Failure;

/// How long cleaning up may take to get an environment's lock.
const CLEAN_UP: Duration = Duration::from_secs(60);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_signal(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on, SIGINT and SIGTERM let the next step fail with [`Failure::Interrupted`] instead of ending the process.
pub(crate) fn end_on_signals() {
    let action = SigAction::new(SigHandler::Handler(note_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic.
        if let Err(error) = unsafe { sigaction(signal, &action) } {
            eprintln!("bench: {signal} will not clean up: {error}");
        }
    }
}

/// Fails after a signal.
pub(crate) fn check_interrupted() -> Result<(), Failure> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(Failure::Interrupted) } else { Ok(()) }
}

/// Sleeps, but not past a signal.
pub(crate) fn sleep(duration: Duration) -> Result<(), Failure> {
    let end = Instant::now() + duration;
    loop {
        check_interrupted()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// Says what is being done.
pub(crate) fn say(what: impl AsRef<str>) {
    eprintln!("bench: {}", what.as_ref());
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Lab {
    binary: PathBuf,
    home: TempDir,
    runtime: TempDir,
    /// The network namespace that it is in, and the store that it shares with other hosts.
    host: Option<(String, PathBuf)>,
    /// Of every command, and of the agent.
    variables: Vec<(String, String)>,
}

impl Lab {
    /// New folders; the agent starts with the first command.
    pub(crate) fn new() -> Result<Self, Failure> {
        Ok(Self {
            binary: binary()?,
            home: folder(&std::env::temp_dir())?,
            // On tmpfs, as the default is: or restored machines cannot be snapshotted live.
            runtime: folder(Path::new("/dev/shm"))?,
            host: None,
            variables: Vec::new(),
        })
    }

    /// The same with variables of its own.
    pub(crate) fn with(variables: Vec<(String, String)>) -> Result<Self, Failure> {
        let mut lab = Self::new()?;
        lab.variables = variables;
        Ok(lab)
    }

    /// The same as a host of several: in a network namespace, with a store that all share.
    pub(crate) fn on_host(namespace: &str, store: &Path) -> Result<Self, Failure> {
        let mut lab = Self::new()?;
        lab.host = Some((namespace.to_owned(), store.to_owned()));
        Ok(lab)
    }

    /// The folder with all durable state.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// The runtime folder.
    pub(crate) fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// The path of a new file in the lab, with that content.
    pub(crate) fn write(&self, name: &str, content: &str) -> Result<PathBuf, Failure> {
        let path = self.home.path().join(name);
        std::fs::write(&path, content).map_err(Failure::io(format!("cannot write {}", path.display())))?;
        Ok(path)
    }

    /// Runs `diorama ARGUMENTS --json` and reads its report.
    pub(crate) fn run<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T, Failure> {
        check_interrupted()?;
        let command = || format!("diorama {}", arguments.join(" "));
        let output = self.spawn(arguments, true)?;
        if !output.status.success() {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
            let reason = format!("{}: {} {}", output.status, text(&output.stderr), text(&output.stdout));
            check_interrupted()?;
            return Err(Failure::Command { command: command(), reason });
        }
        serde_json::from_slice(&output.stdout)
            .map_err(|error| Failure::Output { command: command(), reason: error.to_string() })
    }

    /// Runs a shell command in a guest and returns its standard output.
    pub(crate) fn guest(&self, environment: &str, machine: &str, script: &str) -> Result<String, Failure> {
        #[derive(serde::Deserialize)]
        struct Report {
            stdout: String,
            stderr: String,
            exit_code: Option<i32>,
        }
        let arguments = ["-e", environment, "exec", machine, "--wait", "60", "--", "sh", "-c", script];
        let report: Report = self.run(&arguments)?;
        if report.exit_code == Some(0) {
            Ok(report.stdout)
        } else {
            let problem = format!("`{script}` ended with {:?}: {}", report.exit_code, report.stderr.trim());
            Err(Failure::Guest { machine: machine.to_owned(), problem })
        }
    }

    fn spawn(&self, arguments: &[&str], json: bool) -> Result<Output, Failure> {
        let mut command = match &self.host {
            None => Command::new(&self.binary),
            Some((namespace, store)) => {
                let mut command = Command::new("nsenter");
                command
                    .arg(format!("--net=/run/netns/{namespace}"))
                    .arg(&self.binary)
                    .env("DIORAMA_STORE", store);
                command
            }
        };
        if json {
            command.arg("--json");
        }
        command
            .args(arguments)
            .env("DIORAMA_HOME", self.home.path())
            .env("DIORAMA_RUNTIME_DIR", self.runtime.path())
            .env_remove("DIORAMA_ENVIRONMENT")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(self.home.path())
            .output()
            .map_err(Failure::io(format!("cannot run {}", self.binary.display())))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for arguments in [&["down", "--all", "--volumes"][..], &["agent", "stop", "--force"][..]] {
            let end = Instant::now() + CLEAN_UP;
            loop {
                let problem = match self.spawn(arguments, false) {
                    Ok(output) if output.status.success() => break,
                    Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                    Err(failure) => failure.to_string(),
                };
                // An operation that was interrupted is undone first; until then its environment is busy.
                if Instant::now() > end {
                    say(format!("cleaning up: `diorama {}`: {problem}", arguments.join(" ")));
                    break;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

fn binary() -> Result<PathBuf, Failure> {
    let path = match std::env::var_os("DIORAMA") {
        Some(path) => PathBuf::from(path),
        // Beside this program: target/release.
        None => std::env::current_exe()
            .map_err(Failure::io("cannot find this program"))?
            .with_file_name("diorama"),
    };
    let path = std::path::absolute(&path).map_err(Failure::io("cannot find the binary"))?;
    if path.is_file() { Ok(path) } else { Err(Failure::NoBinary(path)) }
}

/// Runs `ip`, of iproute2.
pub(crate) fn ip(arguments: &[&str]) -> Result<(), Failure> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(Failure::io("cannot run ip (Debian's iproute2)"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::Command {
        command: format!("ip {}", arguments.join(" ")),
        reason: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Fails unless this is root; `what` needs it.
pub(crate) fn need_root(what: &'static str) -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(Failure::NeedsRoot(what)) }
}

/// A new folder below `parent`, gone with the value.
pub(crate) fn folder(parent: &Path) -> Result<TempDir, Failure> {
    tempfile::Builder::new()
        .prefix("dio-bench-")
        .tempdir_in(parent)
        .map_err(Failure::io(format!("cannot make a folder in {}", parent.display())))
}

/// What a process has used of the processors since it began.
pub(crate) fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows it is fields 3 and on. User time is 14, system 15.
    let (_, fields) = stat.rsplit_once(") ")?;
    let ticks: u64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    Some(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}
