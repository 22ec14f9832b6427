//! A real etcd on loopback, with a data folder and ports of its own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use diorama_cluster::directory::EtcdConfig;

/// Ends with the test, also when that fails or is killed.
pub struct Etcd {
    folder: tempfile::TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

impl Etcd {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut etcd = Self { folder, client: free_address(), peer: free_address(), process: None };
        etcd.start_again();
        etcd
    }

    /// An etcd that is configured and does not run.
    pub fn absent() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            client: free_address(),
            peer: free_address(),
            process: None,
        }
    }

    pub fn start_again(&mut self) {
        assert!(self.process.is_none());
        let (client, peer) = (format!("http://{}", self.client), format!("http://{}", self.peer));
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        // setpriv: etcd ends when this test does, however that ends.
        let process = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "etcd",
                "--name",
                "test",
                "--logger",
                "zap",
                "--log-level",
                "error",
            ])
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("setpriv and etcd run (Debian: util-linux, etcd-server)");
        self.process = Some(process);
    }

    /// As when its computer loses power.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// It answers nobody until [`Etcd::resume`].
    pub fn freeze(&self) {
        self.signal("STOP");
        // The signal is sent; every thread has yet to take it.
        let tasks = format!("/proc/{}/task", self.process.as_ref().expect("it runs").id());
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
            stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            assert!(Instant::now() < deadline, "etcd does not stop");
            std::thread::yield_now();
        }
    }

    pub fn resume(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let id = self.process.as_ref().expect("it runs").id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap();
        assert!(sent.success());
    }

    pub fn config(&self) -> EtcdConfig {
        EtcdConfig::at([format!("http://{}", self.client)])
    }

    pub fn address(&self) -> SocketAddr {
        self.client
    }

    pub fn folder(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What another program would do: by etcd's JSON gateway.
    pub fn put(&self, key: &str, value: &[u8]) {
        let body =
            format!("{{\"key\":\"{}\",\"value\":\"{}\"}}", STANDARD.encode(key), STANDARD.encode(value));
        self.ask("put", &body);
    }

    pub fn delete(&self, key: &str) {
        self.ask("deleterange", &format!("{{\"key\":\"{}\"}}", STANDARD.encode(key)));
    }

    fn ask(&self, operation: &str, body: &str) {
        let mut stream = TcpStream::connect(self.client).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let length = body.len();
        write!(
            stream,
            "POST /v3/kv/{operation} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
