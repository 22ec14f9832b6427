//! A real etcd, on this computer or in a network namespace. It ends with the test's process, however that ends.

use std::path::Path;
use std::process::{Child, Stdio};

use crate::lab::{program, until};

/// Where an etcd listens.
pub struct Listens<'a> {
    /// For clients: a URL.
    pub client: &'a str,
    /// For other members: a URL; there are none.
    pub peer: &'a str,
}

/// Starts one with what the folder holds, and waits until it listens.
#[track_caller]
pub fn start(namespace: Option<&str>, data: &Path, listens: &Listens<'_>, more: &[&str]) -> Child {
    let Listens { client, peer } = listens;
    let process = program(namespace, "setpriv")
        .args(["--pdeathsig", "KILL", "etcd", "--name", "test", "--logger", "zap", "--log-level", "error"])
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", client, "--advertise-client-urls", client])
        .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("setpriv and etcd run (Debian: util-linux, etcd-server)");
    let (_, address) = client.rsplit_once('/').expect("a URL");
    let connect = format!(": </dev/tcp/{}", address.replace(':', "/"));
    until("etcd to listen", || {
        let connected =
            program(namespace, "bash").args(["-c", &connect]).stderr(Stdio::null()).status().unwrap();
        connected.success().then_some(())
    });
    process
}
