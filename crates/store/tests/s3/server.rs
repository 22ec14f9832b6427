//! A real S3 server (SeaweedFS) for tests: a process of its own, that never outlives the test's.
//!
//! A shell watches over it: when the pipe from the test's process closes, however that process ended, the shell kills
//! the server and removes all that it left.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Who may ask.
pub const ACCESS_KEY: &str = "diorama";
pub const SECRET_KEY: &str = "a secret of the tests";
/// The one bucket that there is.
pub const BUCKET: &str = "snapshots";

/// How long the server may take until it answers; it takes seconds where processors are few.
const START: Duration = Duration::from_secs(90);
/// S3, master, volume, filer; and what each of them offers to the others.
const PORTS: usize = 8;

const WATCH: &str = r#"
exec 3<&0
folder=$1; ports=$2; shift 2
"$@" >"$folder/log" 2>&1 </dev/null &
echo $! >"$folder/pid"
read -r _ <&3
kill -9 $! 2>/dev/null
wait
rm -rf "$folder"
for port in $ports; do rm -f /tmp/seaweedfs-*-"$port".sock; done
"#;

/// See the module.
pub struct Server {
    program: PathBuf,
    folder: PathBuf,
    ports: [u16; PORTS],
    /// Ends when its standard input does.
    watches: Vec<Child>,
}

impl Server {
    /// Starts one with an empty bucket.
    pub fn start() -> Self {
        // Without it, nothing is begun that somebody would have to remove.
        let program = program();
        let folder = tempfile::TempDir::with_prefix_in("s3-", "/dev/shm").unwrap().keep();
        let identities = format!(
            r#"{{"identities": [{{"name": "tests", "actions": ["Admin", "Read", "Write", "List"],
                "credentials": [{{"accessKey": "{ACCESS_KEY}", "secretKey": "{SECRET_KEY}"}}]}}]}}"#
        );
        std::fs::write(folder.join("s3.json"), identities).unwrap();
        // Somebody else may take a port before the server does.
        let mut server = Self { program, folder, ports: free_ports(), watches: Vec::new() };
        for _ in 0..3 {
            if server.run() {
                server.make_bucket();
                return server;
            }
            server.ports = free_ports();
        }
        panic!("the S3 server does not start:\n{}", server.log());
    }

    /// Where it is.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    /// The same for who connects by themselves.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.ports[0]).into()
    }

    /// The variables that lead to it.
    pub fn variable(&self, name: &str) -> Option<String> {
        match name {
            "AWS_ENDPOINT_URL" => Some(self.endpoint()),
            "AWS_ACCESS_KEY_ID" => Some(ACCESS_KEY.to_owned()),
            "AWS_SECRET_ACCESS_KEY" => Some(SECRET_KEY.to_owned()),
            "AWS_REGION" => Some("us-east-1".to_owned()),
            _ => None,
        }
    }

    /// Kills it, as a crash would.
    pub fn kill(&self) {
        let pid = std::fs::read_to_string(self.folder.join("pid")).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let gone = Instant::now() + START;
        while TcpStream::connect(self.address()).is_ok() {
            assert!(Instant::now() < gone, "the server is still there");
        }
    }

    /// Starts it again with what it had.
    pub fn start_again(&mut self) {
        assert!(self.run(), "the S3 server does not start again:\n{}", self.log());
        self.make_bucket();
    }

    /// Whether it came to answer.
    fn run(&mut self) -> bool {
        let [s3, master, volume, filer, grpc @ ..] = self.ports;
        let options = [
            format!("-dir={}", self.folder.display()),
            "-ip=127.0.0.1".to_owned(),
            "-ip.bind=127.0.0.1".to_owned(),
            "-s3".to_owned(),
            format!("-s3.config={}/s3.json", self.folder.display()),
            "-s3.iam=false".to_owned(),
            "-s3.port.iceberg=0".to_owned(),
            "-s3.port.lance=0".to_owned(),
            "-s3.autoCreateBucket=false".to_owned(),
            format!("-s3.port={s3}"),
            format!("-s3.port.grpc={}", grpc[0]),
            format!("-master.port={master}"),
            format!("-master.port.grpc={}", grpc[1]),
            "-master.volumeSizeLimitMB=64".to_owned(),
            "-master.electionTimeout=500ms".to_owned(),
            "-master.heartbeatInterval=100ms".to_owned(),
            format!("-volume.port={volume}"),
            format!("-volume.port.grpc={}", grpc[2]),
            "-volume.max=0".to_owned(),
            "-volume.preStopSeconds=0".to_owned(),
            format!("-filer.port={filer}"),
            format!("-filer.port.grpc={}", grpc[3]),
        ];
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        let watch = Command::new("sh")
            .args(["-c", WATCH, "watch"])
            .arg(&self.folder)
            .arg(ports.join(" "))
            .arg(&self.program)
            .args(["-logtostderr=true", "server"])
            .args(options)
            .current_dir(&self.folder)
            // What ends the tests' group, such as Ctrl-C, must not end who cleans up after them.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.watches.push(watch);
        let deadline = Instant::now() + START;
        while Instant::now() < deadline {
            if self.log().contains("bind: address already in use") {
                return false;
            }
            if let Some(answer) = ask(self.address(), "GET", "/", "")
                && answer.starts_with("HTTP/1.1 403")
            {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Makes the bucket, where it is not there: a folder of the filer's. It answers before it can store anything, so that
    /// something is stored.
    fn make_bucket(&self) {
        let filer = ([127, 0, 0, 1], self.ports[3]).into();
        let bucket = format!("/buckets/{BUCKET}/");
        let first = format!("{bucket}first");
        let deadline = Instant::now() + START;
        for (method, path, body) in
            [("POST", &bucket, ""), ("PUT", &first, "first"), ("GET", &first, ""), ("DELETE", &first, "")]
        {
            loop {
                let answer = ask(filer, method, path, body).unwrap_or_default();
                if answer.starts_with("HTTP/1.1 20") || answer.contains("already exists") {
                    break;
                }
                assert!(Instant::now() < deadline, "{method} {path}: {answer}\n{}", self.log());
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for mut watch in self.watches.drain(..) {
            drop(watch.stdin.take());
            let _ = watch.wait();
        }
    }
}

/// What `make setup` has installed beside what cargo builds.
fn program() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let found = own.ancestors().map(|folder| folder.join("s3/bin/weed")).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        let target = own.ancestors().nth(3).unwrap_or(Path::new("target"));
        panic!("no S3 server for tests at {}/s3/bin/weed: run `make setup`", target.display())
    })
}

fn free_ports() -> [u16; PORTS] {
    let listeners = [(); PORTS].map(|()| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}
