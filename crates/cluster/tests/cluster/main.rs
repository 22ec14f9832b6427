//! The cluster with a real etcd: the directory, locks, joining.

mod directory;
mod etcd;
mod joining;
mod locks;
mod wire;

use std::time::Duration;

use diorama_cluster::directory::{Directory, EnvironmentRecord, HostStatus, Options, View};
use diorama_cluster::identity::PublicKey;
use diorama_cluster::{Fingerprint, HostId, Member};
use diorama_topology::EnvironmentName;

/// What is waited for comes long before this, or the test has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// The shortest lease that etcd gives.
const LEASE: Duration = Duration::from_secs(2);
const CLUSTER: Fingerprint = Fingerprint([0xaa; 32]);
/// Where the cluster's keys are in etcd.
const PREFIX: &str = "/diorama/v1/aaaaaaaaaaaaaaaa/";

fn host(number: u8) -> HostId {
    PublicKey([number; 32]).host_id()
}

fn member(number: u8) -> Member {
    Member {
        id: host(number),
        name: format!("h{number}").parse().unwrap(),
        addresses: vec![format!("127.0.0.1:{}", 1000 + u16::from(number)).parse().unwrap()],
        issuer: false,
        draining: false,
        joined: "2026-01-01T00:00:00Z".parse().unwrap(),
    }
}

fn options() -> Options {
    Options { lease: LEASE, remembered: None }
}

fn status(free_memory_bytes: u64) -> HostStatus {
    HostStatus { free_memory_bytes, version: "test".into(), ..HostStatus::default() }
}

fn name(text: &str) -> EnvironmentName {
    text.parse().unwrap()
}

fn environment(text: &str, owner: u8) -> EnvironmentRecord {
    struct Nothing;
    impl diorama_topology::Files for Nothing {
        fn is_file(&self, _: &std::path::Path) -> bool {
            false
        }
    }
    let source = diorama_topology::SourceFile {
        name: "test",
        text: &format!("name: {text}\nmachines: {{one: {{image: micro}}}}\n"),
        folder: std::path::Path::new("/"),
    };
    EnvironmentRecord {
        specification: diorama_topology::parse(&source, &Nothing, &["micro"]).unwrap(),
        placement: [("one".parse().unwrap(), host(owner))].into(),
        owner: host(owner),
        generation: 1,
        detail: serde_json::Value::Null,
    }
}

/// Waits until the directory shows it.
async fn shows(directory: &Directory, what: &str, condition: impl FnMut(&std::sync::Arc<View>) -> bool) {
    let mut view = directory.watch();
    let waited = tokio::time::timeout(LIMIT, view.wait_for(condition)).await;
    if !matches!(waited, Ok(Ok(_))) {
        drop(waited);
        panic!("{what}: {:?}", directory.view());
    }
}
