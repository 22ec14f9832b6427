//! A home and a runtime folder of a test's own, and the program run with them.
//!
//! Invariant: when a lab goes, by [`Lab::finish`] or by a panic, every process that was started with its folders is
//! gone, and so are the folders. Only `finish` also proves that Diorama did that itself.

use std::fmt::Debug;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::scratch;

/// How long anything may take that is waited for; machines boot slowly where processors are few.
pub const LIMIT: Duration = Duration::from_secs(90);
/// How often a state is looked at that nobody announces.
const LOOK: Duration = Duration::from_millis(50);
/// What `exec` waits for a guest's agent, in seconds.
const WAIT: &str = "90";

/// See the module.
pub struct Lab {
    folder: TempDir,
    runtime: TempDir,
    variables: Vec<(String, String)>,
    mounts: Vec<PathBuf>,
    /// The network namespace that everything runs in; the test's own when there is none.
    namespace: Option<String>,
    finished: bool,
}

/// What a command left.
#[derive(Debug)]
pub struct Ran {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A failure as `--json` says it.
#[derive(Debug)]
pub struct Refusal {
    pub kind: String,
    pub message: String,
    pub hint: String,
}

impl Lab {
    /// Two empty folders; the second on tmpfs and short, as sockets want it.
    pub fn new() -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(end_dead_labs);
        Self {
            folder: scratch::folder_on_disk(),
            runtime: scratch::folder(),
            variables: Vec::new(),
            mounts: Vec::new(),
            namespace: None,
            finished: false,
        }
    }

    /// The same, in a network namespace.
    pub fn in_namespace(name: &str) -> Self {
        let mut lab = Self::new();
        lab.namespace = Some(name.to_owned());
        lab
    }

    /// The folders that go with the lab.
    pub fn folders(&self) -> [&Path; 2] {
        [self.folder.path(), self.runtime.path()]
    }

    /// A variable of every command from now on, and of the agent that they start.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// No such variable any more.
    pub fn unset(&mut self, name: &str) {
        self.variables.retain(|(known, _)| known != name);
    }

    /// A folder for the test's own files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    pub fn runtime(&self) -> PathBuf {
        self.runtime.path().join("r")
    }

    /// Makes `folder` a file system in memory of so many MiB. Needs root.
    pub fn mount(&mut self, folder: &Path, mebibytes: u32) {
        std::fs::create_dir_all(folder).unwrap();
        let options = format!("size={mebibytes}m,mode=700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "lab"]).arg(folder).status();
        assert!(mounted.unwrap().success(), "a small file system can only be mounted by root");
        self.mounts.push(folder.to_owned());
    }

    /// The program with this lab's folders.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(self.namespace.as_deref(), env!("CARGO_BIN_EXE_diorama"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("DIORAMA_HOME", self.home())
            .env("DIORAMA_RUNTIME_DIR", self.runtime())
            .env_remove("DIORAMA_ENVIRONMENT")
            .env_remove("DIORAMA_QEMU")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command as a user would.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        ran(self.command(arguments).output().unwrap())
    }

    /// Runs a command with standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Ran {
        let mut child = self.spawn(self.command(arguments).stdin(Stdio::piped()));
        child.stdin.take().unwrap().write_all(input).unwrap();
        ran(child.wait_with_output().unwrap())
    }

    /// Runs a command that must succeed, and returns its document.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> Value {
        let ran = self.run(&[arguments, &["--json"]].concat());
        assert_eq!(ran.status, Some(0), "{arguments:?}: {ran:?}\n{}", self.agent_log());
        document(&ran)
    }

    /// Runs a command that must fail, and returns why it says it did.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> Refusal {
        let ran = self.run(&[arguments, &["--json"]].concat());
        assert_eq!(ran.status, Some(1), "{arguments:?}: {ran:?}");
        refusal(&ran)
    }

    /// Starts a command and does not wait for it.
    pub fn begin(&self, arguments: &[&str]) -> Child {
        self.spawn(&mut self.command(&[arguments, &["--json"]].concat()))
    }

    /// The same for a command whose standard output is no document.
    pub fn begin_without_json(&self, arguments: &[&str]) -> Child {
        self.spawn(&mut self.command(arguments))
    }

    fn spawn(&self, command: &mut Command) -> Child {
        // A process group of its own: what the terminal sends to the test is not sent to it as well.
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Brings up an environment from a file.
    #[track_caller]
    pub fn up(&self, file: &str) -> Value {
        self.ok(&["up", self.write("diorama.yaml", file).to_str().unwrap()])
    }

    /// Writes a file of the test's own.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs a line of shell in a machine of an environment. It must succeed.
    #[track_caller]
    pub fn shell(&self, environment: &str, machine: &str, line: &str) -> String {
        let ran = self.try_shell(environment, machine, line);
        assert_eq!(
            ran.status,
            Some(0),
            "{environment}/{machine}: {line}: {ran:?}\n{}\n{}",
            self.agent_log(),
            self.console(environment, machine)
        );
        ran.stdout
    }

    /// The end of what a machine has printed.
    fn console(&self, environment: &str, machine: &str) -> String {
        let printed = self.run(&["-e", environment, "logs", machine]).stdout;
        let lines: Vec<&str> = printed.lines().collect();
        format!("--- console of {machine}\n{}", lines[lines.len().saturating_sub(25)..].join("\n"))
    }

    /// Runs a line of shell in a machine.
    pub fn try_shell(&self, environment: &str, machine: &str, line: &str) -> Ran {
        self.run(&["-e", environment, "exec", "--wait", WAIT, machine, "--", "sh", "-c", line])
    }

    /// The status of one environment.
    #[track_caller]
    pub fn status(&self, environment: &str) -> Value {
        let all = self.ok(&["-e", environment, "status"]);
        all["environments"]
            .as_array()
            .and_then(|all| all.iter().find(|one| one["name"] == environment))
            .unwrap_or_else(|| panic!("no environment {environment} in {all}"))
            .clone()
    }

    /// The states of an environment's machines, in the file's order.
    #[track_caller]
    pub fn states(&self, environment: &str) -> Vec<String> {
        let status = self.status(environment);
        let machines = status["machines"].as_array().unwrap();
        machines.iter().map(|machine| machine["state"].as_str().unwrap().to_owned()).collect()
    }

    /// The process of a machine.
    #[track_caller]
    pub fn pid(&self, environment: &str, machine: &str) -> i32 {
        let status = self.status(environment);
        let machines = status["machines"].as_array().unwrap();
        let machine = machines.iter().find(|one| one["name"] == machine).unwrap();
        i32::try_from(machine["pid"].as_i64().unwrap()).unwrap()
    }

    /// Waits until no thread of a machine but its virtual CPUs has another priority than threads usually have: in a cut and
    /// while memory is captured live some go before all others.
    pub fn wait_ordinary(&self, environment: &str, machine: &str) {
        let folder = format!("/proc/{}/task", self.pid(environment, machine));
        until("usual priorities", || {
            let ordinary = std::fs::read_dir(&folder).unwrap().flatten().all(|thread| {
                // A thread may have ended since.
                let Ok(stat) = std::fs::read_to_string(thread.path().join("stat")) else { return true };
                let (name, fields) = stat.rsplit_once(") ").unwrap();
                let fields: Vec<&str> = fields.split(' ').collect();
                // Its nice value and its policy, which is 0 for ordinary ones: proc_pid_stat(5), the state being field 3.
                let (nice, policy) = (fields[19 - 3], fields[41 - 3]);
                policy == "0" && (nice == "0" || name.contains("(CPU "))
            });
            ordinary.then_some(())
        });
    }

    /// Takes a snapshot that must be sound; returns its document.
    #[track_caller]
    pub fn snapshot(&self, environment: &str, arguments: &[&str]) -> Value {
        let report = self.ok(&[&["-e", environment, "snapshot", "create"], arguments].concat());
        assert_eq!(report["state"], "complete");
        assert_eq!(report["frames"]["unaccounted"], 0, "{report}");
        report
    }

    /// Proves a snapshot.
    #[track_caller]
    pub fn verify(&self, snapshot: &str) {
        let report = self.ok(&["snapshot", "verify", snapshot]);
        assert_eq!((&report["ok"], &report["frames"]["unaccounted"]), (&true.into(), &0.into()), "{report}");
    }

    /// The names of all snapshots; none is damaged.
    #[track_caller]
    pub fn snapshots(&self) -> Vec<String> {
        let list = self.ok(&["snapshot", "list"]);
        assert_eq!(list["damaged"].as_array().map(Vec::len), Some(0), "{list}");
        let snapshots = list["snapshots"].as_array().unwrap();
        snapshots.iter().map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until no operation holds an environment.
    #[track_caller]
    pub fn wait_idle(&self, environment: &str) {
        until("an idle environment", || self.status(environment)["operation"].is_null().then_some(()));
    }

    /// Nothing of an unfinished snapshot is anywhere.
    #[track_caller]
    pub fn assert_nothing_partial(&self) {
        // Where that is a bucket, there is no such folder.
        let store = self.variables.iter().find(|(name, _)| name == "DIORAMA_STORE");
        let store = store.map_or_else(|| self.home().join("store"), |(_, folder)| folder.into());
        assert_eq!(entries(&store.join("incoming")), [""; 0], "{}", self.agent_log());
        let new: Vec<String> = entries(&self.runtime().join("ram"))
            .into_iter()
            .filter(|name| name.starts_with("new-"))
            .collect();
        assert_eq!(new, [""; 0], "{}", self.agent_log());
        assert_eq!(entries(&self.home().join("spill")), [""; 0]);
    }

    /// The agent's process.
    #[track_caller]
    pub fn agent_pid(&self) -> Pid {
        let is_agent = |pid: &Pid| {
            let arguments = arguments(*pid);
            // Not the process that keeps its captures.
            arguments.get(1).is_some_and(|one| one == "agent")
                && arguments.get(2).is_none_or(|one| one != "keep-captures")
        };
        let agents: Vec<Pid> = self.processes().into_iter().filter(is_agent).collect();
        assert_eq!(agents.len(), 1, "{agents:?}");
        agents[0]
    }

    /// Kills the agent, and waits until it is gone.
    #[track_caller]
    pub fn kill_agent(&self) {
        kill_and_wait(self.agent_pid());
    }

    /// Kills the agent and all machines, as when the computer loses power.
    pub fn kill_everything(&self) {
        for pid in self.processes() {
            kill_and_wait(pid);
        }
    }

    /// How many QEMU processes run with this lab's folders.
    pub fn machine_processes(&self) -> usize {
        let is_qemu =
            |pid: &Pid| arguments(*pid).first().is_some_and(|program| program.contains("qemu-system"));
        self.processes().iter().filter(|pid| is_qemu(pid)).count()
    }

    /// Every process that was started with this lab's folders.
    fn processes(&self) -> Vec<Pid> {
        processes_with(self.runtime.path())
    }

    /// The end of what the agent has logged.
    pub fn agent_log(&self) -> String {
        let text = std::fs::read_to_string(self.home().join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("--- agent.log\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }

    /// Stops everything as a user would, and proves that nothing is left.
    #[track_caller]
    pub fn finish(mut self) {
        self.ok(&["down", "--all", "--volumes"]);
        self.assert_nothing_partial();
        for snapshot in self.ok(&["snapshot", "list"])["snapshots"].as_array().unwrap() {
            self.ok(&["snapshot", "rm", snapshot["id"].as_str().unwrap()]);
        }
        let list = self.ok(&["snapshot", "list"]);
        for damaged in list["damaged"].as_array().unwrap() {
            self.ok(&["snapshot", "rm", damaged["id"].as_str().unwrap()]);
        }
        for folder in ["environments", "store/snapshots", "store/packs", "store/doomed", "store/incoming"] {
            assert_eq!(entries(&self.home().join(folder)), [""; 0], "{folder}: {}", self.agent_log());
        }
        self.ok(&["agent", "stop"]);
        until("no process", || self.processes().is_empty().then_some(()));
        if self.mounts.is_empty() {
            assert!(!self.runtime().exists(), "left: {:?}", entries(&self.runtime()));
        }
        self.finished = true;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.finished {
            if std::thread::panicking() {
                eprintln!("{}", self.agent_log());
            }
            // Its machines first come back from the agent, then by force, whatever the agent says.
            let _ = self.command(&["down", "--all", "--volumes"]).output();
            let _ = self.command(&["agent", "stop", "--force"]).output();
        }
        for pid in self.processes() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        for folder in &self.mounts {
            let _ = Command::new("umount").arg("--lazy").arg(folder).status();
        }
    }
}

/// Ends what tests have left that were killed themselves: their machines and agents.
fn end_dead_labs() {
    for runtime in scratch::dead() {
        for pid in processes_with(&runtime) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Every process that was started with a folder.
fn processes_with(folder: &Path) -> Vec<Pid> {
    let folder = folder.to_str().unwrap().as_bytes();
    let mentions = |file: PathBuf| {
        let bytes = std::fs::read(file).unwrap_or_default();
        bytes.windows(folder.len()).any(|window| window == folder)
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw))
        .filter(|pid| *pid != Pid::this())
        .filter(|pid| {
            ["environ", "cmdline"].iter().any(|file| mentions(format!("/proc/{pid}/{file}").into()))
        })
        .collect()
}

/// Waits until something is so.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "still waiting for {what} after {LIMIT:?}");
        std::thread::sleep(LOOK);
    }
}

/// A program in a network namespace, or in the test's own.
pub fn program(namespace: Option<&str>, name: &str) -> Command {
    let Some(namespace) = namespace else { return Command::new(name) };
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg(name);
    command
}

/// Whether the test can be run; who is not root is told that it is left out.
pub fn is_root(to: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root can {to}");
    }
    root
}

/// What Ctrl-C does to a command.
pub fn interrupt(child: &Child) {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
}

/// Kills a process, and waits until it is gone.
#[track_caller]
pub fn kill_and_wait(pid: Pid) {
    kill(pid, Signal::SIGKILL).unwrap();
    wait_for_end(pid);
}

/// Waits until a process that was killed, or kills itself, is gone.
#[track_caller]
pub fn wait_for_end(pid: Pid) {
    until("the end of a killed process", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
        // It is called a zombie as soon as its first thread has ended.
        let threads = entries(Path::new(&format!("/proc/{pid}/task"))).len();
        (matches!(state, None | Some(Some('Z'))) && threads <= 1).then_some(())
    });
}

/// What a finished child left.
pub fn ran(output: Output) -> Ran {
    use std::os::unix::process::ExitStatusExt;
    Ran {
        // As a shell says it.
        status: output.status.code().or(output.status.signal().map(|signal| 128 + signal)),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The one document that `--json` prints.
#[track_caller]
pub fn document(ran: &Ran) -> Value {
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

/// The failure that `--json` prints.
#[track_caller]
pub fn refusal(ran: &Ran) -> Refusal {
    let error = &document(ran)["error"];
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    let refusal = Refusal { kind: text("kind"), message: text("message"), hint: text("hint") };
    assert!(!refusal.kind.is_empty() && !refusal.message.is_empty(), "{ran:?}");
    assert_ne!(refusal.kind, "internal", "{refusal:?}");
    refusal
}

/// The names in a folder; one that is not there has none.
pub fn entries(folder: &Path) -> Vec<String> {
    let Ok(read) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        read.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Where `make images` puts the built-in image.
pub fn micro() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_diorama")).parent().and_then(Path::parent).unwrap();
    folder.join("share/diorama/images/micro")
}

fn arguments(pid: Pid) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}
