//! A real S3 server (SeaweedFS) for tests. Included by path; it belongs to no crate.
//!
//! One serves all tests of a run, though each of them may be a process of its own: the first that needs it starts it.
//! A test that kills or starves its server has one of its own.
//!
//! A server never outlives its users, however they end. Each holds a lock on its folder's `users`, which the system
//! releases with the process. A shell beside the server waits until it can have that lock alone, kills the server and
//! removes the folder. (The one for all it leaves for some seconds more, while the tests' runner is there: another test
//! may be about to begin.) Under the lock on `starting` nobody else starts or ends the server.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::scratch;

/// Who may ask.
const ACCESS_KEY: &str = "diorama";
const SECRET_KEY: &str = "a secret of the tests";
/// The one bucket that there is.
pub const BUCKET: &str = "snapshots";

/// How long the server may take until it answers; it takes seconds where processors are few.
const START: Duration = Duration::from_secs(90);
/// S3, master, volume, filer; and what each of them offers to the others.
const PORTS: usize = 8;

/// The lock of whoever starts or ends a server, and the one of whoever uses it.
const STARTING: &str = "starting";
const USERS: &str = "users";
/// The ports of a server that can be used, one on each line.
const READY: &str = "ready";
/// How long a server waits for the next test, in tenths of a second.
const LINGER: u32 = 50;

const WATCH: &str = r#"
folder=$1; runner=$2; linger=$3; ports=$4; shift 4
exec 8>>"$folder/starting" 9>>"$folder/users"
"$@" >"$folder/log" 2>&1 </dev/null 8>&- 9>&- &
echo $! >"$folder/pid"
while :; do
    flock 9; flock -u 9
    for _ in $(seq "$linger"); do
        kill -0 "$runner" 2>/dev/null || break
        sleep 0.1
        flock -n 9 || continue 2
        flock -u 9
    done
    flock 8
    flock -n 9 && break
    flock -u 8
done
kill -9 $! 2>/dev/null
wait
[ "$folder/starting" -ef /proc/self/fd/8 ] && mv "$folder" "$folder-$$"
rm -rf "$folder-$$"
for port in $ports; do rm -f /tmp/seaweedfs-*-"$port".sock; done
"#;

/// See the module.
pub struct Server {
    folder: PathBuf,
    ports: [u16; PORTS],
    /// The lock on `users`.
    using: Option<Flock<File>>,
    /// The shells; each ends some time after the lock was given back.
    watches: Vec<Child>,
    is_own: bool,
}

impl Server {
    /// The one for all tests of this run, which is started if this is the first to need it.
    pub fn shared() -> Self {
        // All tests of a run are children of one process.
        let runner = nix::unistd::getppid();
        let folder = scratch::of_process(runner.as_raw().unsigned_abs(), "s3");
        loop {
            match std::fs::create_dir(&folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    panic!("{}: {error}", folder.display())
                }
                _ => {}
            }
            // The server before may be ending: then its folder goes, with the lock that was waited for.
            let Some(starting) = lock(&folder.join(STARTING), FlockArg::LockExclusive) else { continue };
            let here = std::fs::metadata(folder.join(STARTING)).map(|there| there.ino()).ok();
            if here != Some(starting.metadata().unwrap().ino()) {
                continue;
            }
            let mut server = Self::in_folder(folder.clone(), false);
            match std::fs::read_to_string(folder.join(READY)) {
                Ok(ports) => {
                    let ports: Vec<u16> = ports.lines().map(|port| port.parse().unwrap()).collect();
                    server.ports = ports.try_into().unwrap();
                }
                // Nobody has started it, or who did has died meanwhile.
                Err(_) => {
                    server.start_anew(LINGER);
                    let ports: Vec<String> = server.ports.iter().map(u16::to_string).collect();
                    std::fs::write(folder.join(READY), ports.join("\n")).unwrap();
                }
            }
            return server;
        }
    }

    /// One of one's own, with an empty bucket.
    pub fn start() -> Self {
        let mut server = Self::in_folder(scratch::folder().keep(), true);
        server.start_anew(0);
        server
    }

    fn in_folder(folder: PathBuf, is_own: bool) -> Self {
        let using = lock(&folder.join(USERS), FlockArg::LockShared);
        Self { folder, ports: [0; PORTS], using, watches: Vec::new(), is_own }
    }

    /// Somebody else may take a port before the server does.
    fn start_anew(&mut self, linger: u32) {
        let identities = format!(
            r#"{{"identities": [{{"name": "tests", "actions": ["Admin", "Read", "Write", "List"],
                "credentials": [{{"accessKey": "{ACCESS_KEY}", "secretKey": "{SECRET_KEY}"}}]}}]}}"#
        );
        std::fs::write(self.folder.join("s3.json"), identities).unwrap();
        for _ in 0..3 {
            self.ports = free_ports();
            if self.run(linger) {
                return self.make_bucket();
            }
        }
        panic!("the S3 server does not start:\n{}", self.log());
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
    #[allow(dead_code, reason = "not every program's tests need them")]
    pub fn variable(&self, name: &str) -> Option<String> {
        variable(&self.endpoint(), name)
    }

    /// Kills it, as a crash would.
    #[allow(dead_code, reason = "not every program's tests do")]
    pub fn kill(&self) {
        assert!(self.is_own, "others use it");
        let pid = std::fs::read_to_string(self.folder.join("pid")).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let gone = Instant::now() + START;
        while TcpStream::connect(self.address()).is_ok() {
            assert!(Instant::now() < gone, "the server is still there");
        }
    }

    /// Starts it again with what it had.
    #[allow(dead_code, reason = "not every program's tests do")]
    pub fn start_again(&mut self) {
        assert!(self.run(0), "the S3 server does not start again:\n{}", self.log());
        self.make_bucket();
    }

    /// Whether it came to answer.
    fn run(&mut self, linger: u32) -> bool {
        // Without it, nothing is begun.
        let program = program();
        let [s3, master, volume, filer, grpc @ ..] = self.ports;
        let folder = self.folder.display();
        let options = [
            format!("-dir={folder}"),
            "-ip=127.0.0.1".to_owned(),
            "-ip.bind=127.0.0.1".to_owned(),
            "-s3".to_owned(),
            format!("-s3.config={folder}/s3.json"),
            format!("-s3.localSocket={folder}/s3.sock"),
            "-s3.iam=false".to_owned(),
            "-s3.port.iceberg=0".to_owned(),
            "-s3.port.lance=0".to_owned(),
            "-s3.autoCreateBucket=false".to_owned(),
            format!("-s3.port={s3}"),
            format!("-s3.port.grpc={}", grpc[0]),
            format!("-master.port={master}"),
            format!("-master.port.grpc={}", grpc[1]),
            "-master.telemetry=false".to_owned(),
            "-master.volumeSizeLimitMB=64".to_owned(),
            "-master.electionTimeout=500ms".to_owned(),
            "-master.heartbeatInterval=100ms".to_owned(),
            format!("-volume.port={volume}"),
            format!("-volume.port.grpc={}", grpc[2]),
            "-volume.max=0".to_owned(),
            "-volume.preStopSeconds=0".to_owned(),
            format!("-filer.port={filer}"),
            format!("-filer.localSocket={folder}/filer.sock"),
            format!("-filer.port.grpc={}", grpc[3]),
        ];
        let runner = nix::unistd::getppid();
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        let watch = Command::new("sh")
            .args(["-c", WATCH, "watch"])
            .arg(&self.folder)
            .args([runner.to_string(), linger.to_string(), ports.join(" ")])
            .arg(program)
            .args(["-logtostderr=true", "server"])
            .args(options)
            .current_dir(&self.folder)
            // What ends the tests' group, such as Ctrl-C, must not end who cleans up after them.
            .process_group(0)
            .stdin(Stdio::null())
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
        drop(self.using.take());
        if self.is_own {
            for mut watch in self.watches.drain(..) {
                let _ = watch.wait();
            }
        }
    }
}

/// The variables that lead to a server.
pub fn variable(endpoint: &str, name: &str) -> Option<String> {
    match name {
        "AWS_ENDPOINT_URL" => Some(endpoint.to_owned()),
        "AWS_ACCESS_KEY_ID" => Some(ACCESS_KEY.to_owned()),
        "AWS_SECRET_ACCESS_KEY" => Some(SECRET_KEY.to_owned()),
        "AWS_REGION" => Some("us-east-1".to_owned()),
        _ => None,
    }
}

/// `None`: its folder is gone.
fn lock(path: &Path, how: FlockArg) -> Option<Flock<File>> {
    match File::options().create(true).append(true).open(path) {
        Ok(file) => Some(Flock::lock(file, how).unwrap()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => panic!("{}: {error}", path.display()),
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
