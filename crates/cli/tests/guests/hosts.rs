//! Environments that span hosts: three agents on loopback addresses of their own, and a real etcd.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant, SystemTime};

use diorama_cluster::identity::{Authority, CERTIFICATE_LIFETIME, Credentials};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use serde_json::Value;

use crate::etcd;
use crate::lab::{LIMIT, Lab, Refusal, entries, refusal, until};

const ENVIRONMENT: &str = "\
name: wide
machines:
  a: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.1/24}], host: h1}
  b: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.2/24}], host: h2}
  c: {image: micro, memory: 96MiB, cpus: 2, nics: [{network: lan, address: 10.0.0.3/24}]}
networks:
  lan: {}
";

/// Ends with the test.
struct Etcd {
    process: Child,
    address: SocketAddr,
    folder: Option<tempfile::TempDir>,
}

impl Etcd {
    fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), "http", &[])
    }

    /// One that wants TLS, a certificate of the client's, and the user `diorama` with this password. Its authority, and a
    /// certificate and key for clients, are in the folder.
    fn start_guarded(password: &str) -> (Self, tempfile::TempDir) {
        let files = tempfile::tempdir().unwrap();
        make_certificates(files.path());
        let open = Self::start();
        for (what, body) in [
            ("user/add", format!(r#"{{"name":"root","password":"{password}"}}"#)),
            ("user/add", format!(r#"{{"name":"diorama","password":"{password}"}}"#)),
            ("role/add", r#"{"name":"root"}"#.to_owned()),
            ("role/add", r#"{"name":"diorama"}"#.to_owned()),
            // `/diorama/v1/` to `/diorama/v10`, in base64: all that begin with the first.
            (
                "role/grant",
                r#"{"name":"diorama","perm":{"permType":"READWRITE","key":"L2Rpb3JhbWEvdjEv","range_end":"L2Rpb3JhbWEvdjEw"}}"#.to_owned(),
            ),
            ("user/grant", r#"{"user":"root","role":"root"}"#.to_owned()),
            ("user/grant", r#"{"user":"diorama","role":"diorama"}"#.to_owned()),
            ("enable", "{}".to_owned()),
        ] {
            open.ask(&format!("/v3/auth/{what}"), &body);
        }
        let folder = open.stop();
        let path = |name: &str| files.path().join(name).to_str().unwrap().to_owned();
        let (ca, certificate, key) = (path("ca.pem"), path("server.pem"), path("server.key"));
        let guards =
            ["--client-cert-auth", "--trusted-ca-file", &ca, "--cert-file", &certificate, "--key-file", &key];
        (Self::start_with(folder, "https", &guards), files)
    }

    fn start_with(folder: tempfile::TempDir, scheme: &str, guards: &[&str]) -> Self {
        let (address, peer) = (free_address(), free_address());
        let (client, peer) = (format!("{scheme}://{address}"), format!("http://{peer}"));
        let listens = etcd::Listens { client: &client, peer: &peer };
        let process = etcd::start(None, &folder.path().join("data"), &listens, guards);
        Self { process, address, folder: Some(folder) }
    }

    /// Ends it, and gives its folder back.
    fn stop(mut self) -> tempfile::TempDir {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.folder.take().unwrap()
    }

    /// By its JSON gateway.
    fn ask(&self, path: &str, body: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut stream = TcpStream::connect(self.address).unwrap();
            let length = body.len();
            write!(
                stream,
                "POST {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            if answer.starts_with("HTTP/1.1 200") {
                return;
            }
            // It listens before it has a leader.
            assert!(answer.starts_with("HTTP/1.1 503") && Instant::now() < deadline, "{path}: {answer}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// An authority, and certificates by it for etcd on this computer and for its clients.
fn make_certificates(folder: &Path) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    std::fs::write(folder.join("ca.pem"), ca.pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        // etcd takes a name for a user's.
        params.distinguished_name = DistinguishedName::new();
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A cluster of labs that share a store; the first has made it.
pub struct Hosts {
    pub labs: Vec<Lab>,
    _etcd: Etcd,
    /// Unless it is elsewhere.
    _store: Option<tempfile::TempDir>,
}

impl Hosts {
    /// The store is a folder.
    fn new(count: usize) -> Self {
        let store = tempfile::TempDir::with_prefix("diorama-store-").unwrap();
        let labs = || {
            let mut lab = Lab::new();
            lab.set("DIORAMA_STORE", store.path().to_str().unwrap());
            lab
        };
        let labs = std::iter::repeat_with(labs).take(count).collect();
        Self { _store: Some(store), ..Self::of(labs) }
    }

    /// Of labs that know where their store is.
    pub fn of(labs: Vec<Lab>) -> Self {
        let etcd = Etcd::start();
        let addresses: Vec<String> = labs.iter().map(|_| free_address().to_string()).collect();
        form(&labs, &addresses, &format!("http://{}", etcd.address));
        Self { labs, _etcd: etcd, _store: None }
    }

    pub fn finish(self) {
        for lab in self.labs {
            // A host that was away finds out by itself that its part is wanted no more.
            lab.ok(&["status"]);
            until("no part of an environment", || {
                entries(&lab.home().join("environments")).is_empty().then_some(())
            });
            lab.finish();
        }
    }
}

/// Each machine's host and state.
pub fn machine_states(lab: &Lab) -> Vec<(String, String)> {
    let status = lab.ok(&["status", "-e", "wide"]);
    let machines = status["environments"][0]["machines"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    machines.iter().map(|machine| (text(&machine["host"]), text(&machine["state"]))).collect()
}

/// The other machine may not have booted yet.
#[track_caller]
fn pings(lab: &Lab, machine: &str, address: &str) {
    let tries = format!("for i in $(seq 40); do ping -c 1 -W 1 {address} && exit; sleep 0.5; done; exit 1");
    lab.shell("wide", machine, &tries);
}

/// A command that is wrong in itself.
#[track_caller]
fn wrong(lab: &Lab, arguments: &[&str]) -> Refusal {
    let ran = lab.run(&[arguments, &["--json"]].concat());
    assert_eq!(ran.status, Some(2), "{arguments:?}: {ran:?}");
    refusal(&ran)
}

#[test]
fn an_environment_spans_hosts_and_outlives_one() {
    let hosts = Hosts::new(3);
    let [one, two, three] = &hosts.labs[..] else { unreachable!() };
    let file = one.folder().join("wide.yaml");
    std::fs::write(&file, ENVIRONMENT).unwrap();
    let file = file.to_str().unwrap();

    one.ok(&["up", file]);
    assert_eq!(machine_states(three).len(), 3);
    assert!(machine_states(three).iter().all(|(_, state)| state == "running"));
    // Each machine from a host that it is not on; what goes between them goes by the tunnels.
    pings(three, "a", "10.0.0.2");
    pings(one, "b", "10.0.0.3");
    pings(two, "c", "10.0.0.1");
    let flow = "ping -i 0.02 10.0.0.2 > /tmp/flow 2>&1 & echo begun";
    two.shell("wide", "a", flow);

    // Paused and resumed wherever they are, all or some.
    two.ok(&["pause", "-e", "wide"]);
    assert!(machine_states(one).iter().all(|(_, state)| state == "paused"));
    three.ok(&["resume", "-e", "wide", "a", "b"]);
    assert_eq!(machine_states(two).iter().filter(|(_, state)| state == "running").count(), 2);
    one.ok(&["resume", "-e", "wide"]);
    assert!(machine_states(three).iter().all(|(_, state)| state == "running"));
    let refused = one.refused(&["pause", "-e", "wide", "z"]);
    assert!(refused.hint.contains("a, b, c"), "{refused:?}");

    // From each host, at one cut of all.
    for (lab, name) in [(one, "from-one"), (two, "from-two"), (three, "from-three")] {
        let snapshot = lab.ok(&["snapshot", "create", "-e", "wide", name]);
        assert_eq!(snapshot["cut"]["hosts"].as_u64(), Some(hosts_of(&machine_states(lab))), "{snapshot}");
        assert_eq!(snapshot["machines"].as_array().unwrap().len(), 3);
        assert_eq!(snapshot["frames"]["unaccounted"], 0, "{snapshot}");
        assert!(snapshot["frames"]["sent_before"].as_u64().unwrap() > 0);
    }
    three.verify("from-two");

    // An agent that dies takes its part back, with its tunnels.
    two.kill_agent();
    two.ok(&["status"]);
    pings(one, "b", "10.0.0.1");
    one.ok(&["snapshot", "create", "-e", "wide", "after-takeover"]);

    one.ok(&["restore", "-e", "wide", "from-three"]);
    pings(three, "a", "10.0.0.2");

    // A second environment of the same snapshot beside the first.
    let forked = two.ok(&["fork", "-e", "wide", "from-two", "--name", "copy"]);
    assert_eq!(forked["environments"][0]["machines"].as_array().unwrap().len(), 3, "{forked}");
    three.shell("copy", "a", "ping -c 3 -W 5 10.0.0.2");
    one.ok(&["down", "-e", "copy", "--volumes"]);

    // A machine that names a host goes nowhere else, so the whole environment cannot be on the rest.
    two.kill_everything();
    until_lost(one, "h2");
    assert!(machine_states(one).iter().any(|(_, state)| state == "lost"));
    let refused = three.refused(&["snapshot", "create", "-e", "wide", "without-one"]);
    assert_eq!(refused.kind, "cut-failed", "{refused:?}");
    let names = one.snapshots();
    assert!(!names.contains(&"without-one".to_owned()), "{names:?}");
    let refused = one.refused(&["restore", "-e", "wide", "from-two"]);
    assert!(refused.message.contains("no host can have the machine `b`"), "{refused:?}");

    one.ok(&["down", "-e", "wide", "--volumes"]);
    assert_eq!(three.ok(&["status"])["environments"].as_array().unwrap().len(), 0);
    hosts.finish();
}

#[test]
fn an_environment_moves_to_the_hosts_that_are_left() {
    let hosts = Hosts::new(2);
    let [one, two] = &hosts.labs[..] else { unreachable!() };
    let file = one.folder().join("wide.yaml");
    let text = ENVIRONMENT.replace(", host: h1", "").replace(", host: h2", "");
    let text = text.replace("10.0.0.3/24}]}", "10.0.0.3/24}], disks: [{name: data, size: 16MiB}]}");
    std::fs::write(&file, text).unwrap();
    two.ok(&["up", file.to_str().unwrap()]);
    assert_eq!(hosts_of(&machine_states(one)), 2);
    pings(one, "a", "10.0.0.2");
    // Down and up again, with the disk that its host has kept.
    one.shell("wide", "c", "echo kept | dd of=/dev/vda conv=fsync 2>&1");
    let down = two.ok(&["down", "-e", "wide"]);
    assert_eq!(down["environments"][0]["disks_kept"], serde_json::json!(["c/data"]), "{down}");
    assert_eq!(one.ok(&["status", "-e", "wide"])["environments"][0]["state"], "down");
    one.ok(&["up", file.to_str().unwrap()]);
    assert_eq!(two.shell("wide", "c", "head -c 4 /dev/vda"), "kept");
    pings(one, "a", "10.0.0.2");
    one.ok(&["snapshot", "create", "-e", "wide", "whole"]);

    two.kill_everything();
    until_lost(one, "h2");
    one.ok(&["restore", "-e", "wide", "whole"]);
    assert_eq!(machine_states(one), vec![("h1".to_owned(), "running".to_owned()); 3]);
    for (machine, address) in [("a", "10.0.0.2"), ("b", "10.0.0.3"), ("c", "10.0.0.1")] {
        pings(one, machine, address);
    }
    // The host comes back, and has nothing of it.
    two.ok(&["host", "list"]);
    assert_eq!(hosts_of(&machine_states(two)), 1);
    one.ok(&["down", "-e", "wide", "--volumes"]);
    hosts.finish();
}

#[test]
fn a_host_is_renewed_removed_and_joins_again() {
    let hosts = Hosts::new(2);
    let [one, two] = &hosts.labs[..] else { unreachable!() };
    let file = one.folder().join("wide.yaml");
    let text = "name: wide\nmachines:\n\
                \x20 a: {image: micro, memory: 96MiB, cpus: 2, nics: [lan], host: h1}\n\
                \x20 b: {image: micro, memory: 96MiB, cpus: 2, nics: [lan], host: h2}\n\
                networks: {lan: {}}\n";
    std::fs::write(&file, text).unwrap();
    one.ok(&["up", file.to_str().unwrap()]);
    two.shell("wide", "a", "true");

    // A certificate that ends in a moment, as the authority gave it some three months ago.
    let ends = SystemTime::now() + Duration::from_secs(20);
    two.kill_agent();
    age_certificate(one, two, ends);
    let good_for_long = |lab: &Lab| {
        let list = lab.ok(&["host", "list"]);
        let hosts = list["hosts"].as_array().unwrap();
        let until = hosts.iter().find(|host| host["name"] == "h2")?["certificate_until"].as_str()?.to_owned();
        (until.parse::<jiff::Timestamp>().unwrap()
            > jiff::Timestamp::now() + Duration::from_secs(80 * 24 * 60 * 60))
        .then_some(())
    };
    until("a renewed certificate", || good_for_long(two));
    until("others to see it", || good_for_long(one));
    while let Ok(left) = ends.duration_since(SystemTime::now()) {
        std::thread::sleep(left);
    }
    // Connections that are made now show the new one.
    one.kill_agent();
    one.ok(&["status"]);
    until("the way between the hosts", || {
        let there = machine_states(two)
            == [("h1".to_owned(), "running".to_owned()), ("h2".to_owned(), "running".to_owned())];
        there.then_some(())
    });
    two.shell("wide", "a", "true");
    one.shell("wide", "b", "true");

    // Neither leaves with machines, nor does the only one that admits others.
    let refused = two.refused(&["host", "leave"]);
    assert!(refused.message.contains("`wide` has machines"), "{refused:?}");
    let refused = one.refused(&["host", "leave"]);
    assert!(refused.message.contains("only host that admits"), "{refused:?}");
    let refused = one.refused(&["host", "remove", "h2"]);
    assert!(refused.message.contains("`wide` has machines"), "{refused:?}");

    // One that is removed stops what it has, and forgets.
    assert_eq!(two.machine_processes(), 1);
    one.ok(&["host", "remove", "h2", "--force"]);
    let refused = until("the removed host to leave", || {
        let ran = two.run(&["host", "list", "--json"]);
        (ran.status == Some(1))
            .then(|| refusal(&ran))
            .filter(|refusal| refusal.message.contains("in no cluster"))
    });
    assert!(refused.message.contains("was removed from the one that it was in as `h2`"), "{refused:?}");
    assert_eq!(two.machine_processes(), 0);
    assert_eq!(entries(&two.home().join("cluster")), ["left.json"]);
    let status = two.run(&["status"]);
    assert!(status.stderr.contains("was removed"), "{status:?}");
    assert_eq!(machine_states(one)[1].1, "lost");
    one.ok(&["down", "-e", "wide", "--volumes"]);

    // The same name again, and willingly out.
    let token = one.ok(&["host", "token"])["token"].as_str().unwrap().to_owned();
    let address = free_address().to_string();
    two.ok(&["host", "join", &token, "--name", "h2", "--address", &address]);
    two.ok(&["up", file.to_str().unwrap()]);
    one.shell("wide", "b", "true");
    two.ok(&["down", "-e", "wide", "--volumes"]);
    let left = two.ok(&["host", "leave"]);
    assert_eq!((&left["name"], &left["told"]), (&"h2".into(), &true.into()), "{left}");
    assert_eq!(one.ok(&["host", "list"])["hosts"].as_array().unwrap().len(), 1);
    let refused = two.refused(&["host", "leave"]);
    assert!(refused.message.contains("in no cluster: it left"), "{refused:?}");
    hosts.finish();
}

/// Gives a host whose agent is not there another certificate, that ends when it says.
fn age_certificate(issuer: &Lab, host: &Lab, ends: SystemTime) {
    let folder = host.home().join("cluster");
    let authority = Authority::open(&issuer.home().join("cluster")).unwrap();
    let credentials = Credentials::open(&folder).unwrap().unwrap();
    let name = credentials.name().clone();
    let given = ends - CERTIFICATE_LIFETIME;
    let certificate = authority.issue(&name, credentials.key().public(), false, given).unwrap();
    Credentials::store(&folder, name, authority.fingerprint(), certificate).unwrap();
}

#[test]
fn etcd_may_ask_for_certificates_and_a_password() {
    let (etcd, files) = Etcd::start_guarded("secret");
    let url = format!("https://localhost:{}", etcd.address.port());
    let path = |name: &str| files.path().join(name).to_str().unwrap().to_owned();
    let (ca, certificate, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let (mut one, two) = (Lab::new(), Lab::new());
    let addresses = [free_address().to_string(), free_address().to_string()];
    let init = ["host", "init", "--name", "h1", "--address", &addresses[0], "--etcd", &url];
    let tls = ["--etcd-ca", &ca, "--etcd-cert", &certificate, "--etcd-key", &key];
    let user = ["--etcd-user", "diorama"];
    let refused = wrong(&one, &init);
    assert!(refused.hint.contains("--etcd-ca"), "{refused:?}");
    let refused = wrong(&one, &[&init[..], &tls, &user].concat());
    assert!(refused.hint.contains("DIORAMA_ETCD_PASSWORD"), "{refused:?}");
    let refused = one.refused(&[&init[..], &tls[..2]].concat());
    assert!(refused.message.contains(&url), "without a certificate: {refused:?}");
    let refused = one.refused(&[&init[..], &tls].concat());
    assert!(refused.message.contains("permission denied"), "without a user: {refused:?}");
    assert!(refused.hint.contains("--etcd-user"), "{refused:?}");
    one.set("DIORAMA_ETCD_PASSWORD", "wrong");
    let refused = one.refused(&[&init[..], &tls, &user].concat());
    assert!(refused.message.contains("authentication failed"), "{refused:?}");
    one.unset("DIORAMA_ETCD_PASSWORD");
    std::fs::write(path("password"), "secret\n").unwrap();
    one.ok(&[&init[..], &tls, &user, &["--etcd-password-file", &path("password")]].concat());
    // Who joins is handed all of it, and keeps it for its next agent.
    let token = one.ok(&["host", "token"])["token"].as_str().unwrap().to_owned();
    two.ok(&["host", "join", &token, "--name", "h2", "--address", &addresses[1]]);
    two.kill_agent();
    until("both hosts to be there", || {
        let hosts = two.ok(&["host", "list"]);
        let ready = hosts["hosts"].as_array().unwrap().iter().filter(|host| host["state"] == "ready");
        (ready.count() == 2).then_some(())
    });
    let config = two.home().join("cluster/config.json");
    assert_eq!(std::fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o600);
    one.finish();
    two.finish();
}

#[test]
fn who_may_not_join_is_told_why() {
    let hosts = Hosts::new(1);
    let [one] = &hosts.labs[..] else { unreachable!() };
    let stranger = Lab::new();
    let address = free_address().to_string();
    let host = ["--name", "stranger", "--address", address.as_str()];
    let refused = wrong(&stranger, &[&["host", "join", "no-token"], &host[..]].concat());
    assert!(refused.hint.contains("diorama host token"), "{refused:?}");
    let refused = stranger.refused(&["host", "list"]);
    assert!(refused.message.contains("in no cluster"), "{refused:?}");
    let token = one.ok(&["host", "token"])["token"].as_str().unwrap().to_owned();
    let taken = ["--name", "h1", "--address", address.as_str()];
    let refused = wrong(&stranger, &[&["host", "join", &token], &taken[..]].concat());
    assert!(refused.message.contains("another host `h1`"), "{refused:?}");
    stranger.ok(&[&["host", "join", &token], &host[..]].concat());
    let refused = stranger.refused(&[&["host", "join", &token], &host[..]].concat());
    assert!(refused.message.contains("already"), "{refused:?}");
    one.ok(&["host", "drain", "stranger"]);
    one.ok(&["host", "remove", "stranger"]);
    assert_eq!(one.ok(&["host", "list"])["hosts"].as_array().unwrap().len(), 1);
    stranger.finish();
    hosts.finish();
}

/// On how many hosts they are.
pub fn hosts_of(states: &[(String, String)]) -> u64 {
    let mut hosts: Vec<&str> = states.iter().map(|(host, _)| host.as_str()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts.len() as u64
}

/// Makes a cluster of hosts, `h1` and on, and waits until all of them see all.
#[track_caller]
pub fn form(labs: &[Lab], addresses: &[String], etcd: &str) {
    let mut token = String::new();
    for (number, (lab, address)) in (1..).zip(labs.iter().zip(addresses)) {
        let name = format!("h{number}");
        let host = ["--name", name.as_str(), "--address", address.as_str()];
        if number == 1 {
            lab.ok(&[&["host", "init", "--etcd", etcd], &host[..]].concat());
            let uses = labs.len().to_string();
            token = lab.ok(&["host", "token", "--uses", &uses])["token"].as_str().unwrap().to_owned();
        } else {
            lab.ok(&[&["host", "join", &token], &host[..]].concat());
        }
    }
    until_ready(labs);
}

/// Every host shows every host as ready.
#[track_caller]
pub fn until_ready(labs: &[Lab]) {
    for lab in labs {
        until("every host to be there", || {
            let hosts = lab.ok(&["host", "list"]);
            let ready = hosts["hosts"].as_array().unwrap().iter().filter(|host| host["state"] == "ready");
            (ready.count() == labs.len()).then_some(())
        });
    }
}

/// A host shows another as lost.
#[track_caller]
pub fn until_lost(lab: &Lab, name: &str) {
    until("the host to be lost", || {
        let list = lab.ok(&["host", "list"]);
        let hosts = list["hosts"].as_array().unwrap();
        hosts.iter().any(|host| host["name"] == name && host["state"] == "lost").then_some(())
    });
}
