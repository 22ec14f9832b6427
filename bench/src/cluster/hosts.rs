//! Three hosts on this computer: network namespaces with veth pairs on a bridge, an agent in each, etcd in another.
//!
//! Invariant: dropping [`Hosts`] ends everything in the namespaces and removes them.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tempfile::TempDir;

use crate::failure::Failure;
use crate::lab::{self, Lab, ip, need_root, say};

/// How many.
pub(super) const HOSTS: usize = 3;
const ETCD: &str = "http://10.98.0.9:2379";
/// How long etcd and the hosts may take to be there.
const READY: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub(super) struct Hosts {
    labs: Vec<Lab>,
    etcd: Option<Child>,
    namespaces: Vec<String>,
    folder: TempDir,
}

#[derive(Debug, Deserialize)]
struct Token {
    token: String,
}

#[derive(Debug, Deserialize)]
struct List {
    hosts: Vec<Member>,
}

#[derive(Debug, Deserialize)]
struct Member {
    state: String,
}

impl Hosts {
    /// Makes the namespaces, and a cluster of the agents in them.
    pub(super) fn new() -> Result<Self, Failure> {
        need_root("a cluster of network namespaces")?;
        let folder = lab::folder(&std::env::temp_dir())?;
        let mut hosts = Self { labs: Vec::new(), etcd: None, namespaces: Vec::new(), folder };
        hosts.build()?;
        Ok(hosts)
    }

    /// The host of that place.
    pub(super) fn lab(&self, place: usize) -> &Lab {
        &self.labs[place]
    }

    fn build(&mut self) -> Result<(), Failure> {
        let net = self.namespace("net")?;
        ip(&["-n", &net, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &net, "addr", "add", "10.98.0.9/24", "dev", "br0"])?;
        ip(&["-n", &net, "link", "set", "br0", "up"])?;
        for number in 1..=HOSTS {
            let host = self.namespace(&format!("h{number}"))?;
            let inside = format!("h{number}");
            ip(&[
                "link", "add", "eth0", "netns", &host, "type", "veth", "peer", "name", &inside, "netns", &net,
            ])?;
            ip(&["-n", &host, "addr", "add", &format!("10.98.0.{number}/24"), "dev", "eth0"])?;
            ip(&["-n", &host, "link", "set", "eth0", "up"])?;
            ip(&["-n", &net, "link", "set", &inside, "master", "br0", "up"])?;
            self.labs.push(Lab::on_host(&host, &self.folder.path().join("store"))?);
        }
        self.start_etcd(&net)?;
        let mut token = String::new();
        for (number, lab) in (1..).zip(&self.labs) {
            let (name, address) = (format!("h{number}"), format!("10.98.0.{number}:7447"));
            let host = ["--name", name.as_str(), "--address", address.as_str()];
            if number == 1 {
                let _: serde_json::Value =
                    lab.run(&[&["host", "init", "--etcd", ETCD], &host[..]].concat())?;
                token = lab.run::<Token>(&["host", "token", "--uses", "9"])?.token;
            } else {
                let _: serde_json::Value = lab.run(&[&["host", "join", &token], &host[..]].concat())?;
            }
        }
        let end = Instant::now() + READY;
        while self.labs[0]
            .run::<List>(&["host", "list"])?
            .hosts
            .iter()
            .filter(|host| host.state == "ready")
            .count()
            < HOSTS
        {
            if Instant::now() > end {
                return Err(Failure::TooLate("a cluster of all hosts".to_owned(), READY.as_secs()));
            }
            lab::sleep(Duration::from_millis(100))?;
        }
        Ok(())
    }

    fn namespace(&mut self, what: &str) -> Result<String, Failure> {
        let name = format!("diob{}{what}", std::process::id());
        ip(&["netns", "add", &name])?;
        self.namespaces.push(name.clone());
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        Ok(name)
    }

    fn start_etcd(&mut self, namespace: &str) -> Result<(), Failure> {
        let inside = |program: &str| {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{namespace}")).arg(program);
            command
        };
        let etcd = inside("setpriv")
            .args(["--pdeathsig", "KILL", "etcd", "--logger", "zap", "--log-level", "error", "--data-dir"])
            .arg(self.folder.path().join("etcd"))
            .args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C is for the benchmark, which takes everything down in order, and needs etcd for that.
            .process_group(0)
            .spawn()
            .map_err(Failure::io(
                "cannot run nsenter, setpriv and etcd (Debian's util-linux, etcd-server)",
            ))?;
        self.etcd = Some(etcd);
        let end = Instant::now() + READY;
        loop {
            let listens =
                inside("bash").args(["-c", ": </dev/tcp/10.98.0.9/2379"]).stderr(Stdio::null()).status();
            if listens.is_ok_and(|status| status.success()) {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(Failure::TooLate("etcd".to_owned(), READY.as_secs()));
            }
            lab::sleep(Duration::from_millis(100))?;
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.labs.clear();
        if let Some(mut etcd) = self.etcd.take() {
            let _ = etcd.kill();
            let _ = etcd.wait();
        }
        for namespace in &self.namespaces {
            end_all_in(namespace);
            if let Err(failure) = ip(&["netns", "del", namespace]) {
                say(format!("cleaning up: {failure}"));
            }
        }
    }
}

/// Kills what is left in a namespace: nothing, unless something has failed.
fn end_all_in(namespace: &str) {
    let Ok(output) = Command::new("ip").args(["netns", "pids", namespace]).output() else { return };
    for pid in String::from_utf8_lossy(&output.stdout).lines().filter_map(|pid| pid.trim().parse().ok()) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}
