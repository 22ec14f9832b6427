//! A cluster whose hosts are network namespaces, each with an agent, folders and an address of its own, and etcd in another.
//!
//! Invariant: whatever ends the test (its end, a panic, a signal, SIGKILL), everything that runs in the namespaces is
//! killed, and they and the folders are removed: by a shell that waits for the end of a pipe which this process holds.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use tempfile::TempDir;

use crate::etcd;
use crate::hosts::form;
use crate::lab::{LIMIT, Lab, kill_and_wait, until, wait_for_end};
use crate::underlay::{self, Underlay};

const PORT: u16 = 7447;
const ETCD: &str = "http://10.99.0.9:2379";
/// What the shell does: it is told of namespaces and folders, and removes them when the pipe ends. (By the pipe and not by its
/// arguments: a process that has a lab's folder among those is taken for one of the lab's.)
const CLEAN_UP: &str = r#"
faketime() { ls -d /dev/shm/faketime_shm_* /dev/shm/sem.faketime_sem_* 2>/dev/null; }
while read -r kind name; do
    case $kind in
        namespace) namespaces="$namespaces $name" ;;
        folder) folders="$folders $name" ;;
        faketime) fakes=yes; before=$(faketime) ;;
    esac
done
for namespace in $namespaces; do
    tries=0
    while pids=$(ip netns pids "$namespace" 2>/dev/null) && [ -n "$pids" ] && [ "$tries" -lt 100 ]; do
        kill -KILL $pids 2>/dev/null
        tries=$((tries + 1)); sleep 0.05
    done
    ip netns del "$namespace" 2>/dev/null
done
rm -rf -- $folders
[ -z "$fakes" ] || for file in $(faketime); do
    printf '%s\n' "$before" | grep -qxF "$file" || rm -f -- "$file"
done
"#;

/// See the module.
pub struct Cluster {
    pub labs: Vec<Lab>,
    pub underlay: Underlay,
    etcd: Option<Child>,
    etcd_namespace: String,
    folder: PathBuf,
    /// Agents that are to kill themselves, by their hosts' places.
    doomed: BTreeMap<usize, Pid>,
    // The last to go.
    clean_up: CleanUp,
}

struct CleanUp {
    shell: Child,
    pipe: Option<ChildStdin>,
    _folder: TempDir,
}

impl Drop for CleanUp {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.shell.wait();
    }
}

impl Cluster {
    /// So many hosts, `h1` and on. Needs root.
    pub fn new(count: usize) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "hosts as network namespaces need root: run this test as root"
        );
        let name = |what: &str| format!("diot{}{what}", std::process::id());
        let hosts: Vec<String> = (1..=count).map(|number| name(&format!("h{number}"))).collect();
        let etcd_namespace = name("etcd");
        let namespaces: Vec<String> = hosts.iter().chain([&etcd_namespace]).cloned().collect();
        let mut labs: Vec<Lab> = hosts.iter().map(|name| Lab::in_namespace(name)).collect();
        let folder = TempDir::with_prefix("diorama-cluster-").unwrap();
        let path = folder.path().to_owned();

        let mut shell = Command::new("sh")
            // A group of its own from the first: signals to the test are not for it.
            .process_group(0)
            .args(["-c", CLEAN_UP])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut pipe = shell.stdin.take().unwrap();
        for namespace in &namespaces {
            writeln!(pipe, "namespace {namespace}").unwrap();
        }
        for folder in labs.iter().flat_map(Lab::folders).chain([folder.path()]) {
            writeln!(pipe, "folder {}", folder.display()).unwrap();
        }
        let clean_up = CleanUp { shell, pipe: Some(pipe), _folder: folder };

        for namespace in &namespaces {
            ip(&["netns", "add", namespace]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        let underlay = Underlay::new(&namespaces);
        for (place, namespace) in namespaces.iter().enumerate() {
            let number = if *namespace == etcd_namespace { 9 } else { place + 1 };
            ip(&["-n", namespace, "link", "set", "eth0", "address", &underlay::mac(place)]);
            ip(&["-n", namespace, "addr", "add", &format!("10.99.0.{number}/24"), "dev", "eth0"]);
            ip(&["-n", namespace, "link", "set", "eth0", "up"]);
        }

        let store = path.join("store");
        for lab in &mut labs {
            lab.set("DIORAMA_STORE", store.to_str().unwrap());
            let failpoint = lab.folder().join("failpoint");
            lab.set("DIORAMA_FAILPOINT", failpoint.to_str().unwrap());
        }
        let mut cluster = Self {
            labs,
            underlay,
            etcd: None,
            etcd_namespace,
            folder: path,
            doomed: BTreeMap::new(),
            clean_up,
        };
        cluster.start_etcd();
        let addresses: Vec<String> = (1..=count).map(|number| format!("10.99.0.{number}:{PORT}")).collect();
        form(&cluster.labs, &addresses, ETCD);
        cluster
    }

    /// Starts etcd, with the data that it had.
    pub fn start_etcd(&mut self) {
        assert!(self.etcd.is_none());
        let listens = etcd::Listens { client: ETCD, peer: "http://127.0.0.1:2380" };
        let data = self.folder.join("etcd");
        self.etcd = Some(etcd::start(Some(&self.etcd_namespace), &data, &listens, &[]));
    }

    /// What libfaketime leaves in shared memory for each process that is killed from now on is removed at the end.
    pub fn clean_up_after_faketime(&mut self) {
        writeln!(self.clean_up.pipe.as_mut().unwrap(), "faketime all").unwrap();
    }

    /// Kills etcd. Its data stay.
    pub fn stop_etcd(&mut self) {
        let mut etcd = self.etcd.take().unwrap();
        let _ = etcd.kill();
        let _ = etcd.wait();
    }

    /// The agent of a host is to do something (`kill` or `wait`) when it next reaches a step of a snapshot.
    pub fn arm(&mut self, place: usize, what: &str, step: &str) {
        if what == "kill" {
            self.doomed.insert(place, self.labs[place].agent_pid());
        }
        let folder = self.labs[place].folder();
        let _ = std::fs::remove_file(folder.join("failpoint.reached"));
        // Whole or not at all: the agent looks at any time.
        let new = folder.join("failpoint.new");
        std::fs::write(&new, format!("{what} {step}")).unwrap();
        std::fs::rename(new, folder.join("failpoint")).unwrap();
    }

    /// Waits until the agent has reached the step.
    #[track_caller]
    pub fn until_reached(&self, place: usize) {
        let reached = self.labs[place].folder().join("failpoint.reached");
        until("an agent to reach a step", || reached.exists().then_some(()));
    }

    /// Lets an agent go on that waits at a step.
    pub fn go_on(&self, place: usize) {
        std::fs::remove_file(self.labs[place].folder().join("failpoint.reached")).unwrap();
    }

    /// Kills a host's agent, or waits for the end of one that kills itself, and starts another.
    pub fn restart_agent(&mut self, place: usize) {
        match self.doomed.remove(&place) {
            Some(pid) => wait_for_end(pid),
            None => kill_and_wait(self.labs[place].agent_pid()),
        }
        self.labs[place].ok(&["status"]);
    }

    /// Stops everything as a user would, and proves that nothing is left.
    pub fn finish(mut self) {
        for lab in std::mem::take(&mut self.labs) {
            lab.finish();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // What a failed test waits for must not hold up the end.
        for lab in &self.labs {
            let _ = std::fs::remove_file(lab.folder().join("failpoint"));
            let _ = std::fs::remove_file(lab.folder().join("failpoint.reached"));
        }
        self.underlay.cut_off(None);
        if self.etcd.is_none() && std::thread::panicking() {
            self.start_etcd();
        }
        self.labs.clear();
        if self.etcd.is_some() {
            self.stop_etcd();
        }
    }
}

/// Waits until something is so, for longer than anything else: a lease must end first, or a connection.
#[track_caller]
pub fn eventually(what: &str, mut look: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let Err(why) = look() else { return };
        assert!(Instant::now() < deadline, "still waiting for {what} after {LIMIT:?}: {why}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("ip runs (Debian: iproute2)");
    assert!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}
