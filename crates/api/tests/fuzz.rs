//! Requests as a client might send them, mangled: refused, or one that is written again as it was understood.

#[path = "../../../testing/mangle.rs"]
mod mangle;

use diorama_api::*;
use mangle::{config, mangled, mangles};
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn check<T: DeserializeOwned + Serialize>(text: &str) {
    serde_json::from_str::<T>(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    proptest!(config(200), |(how in mangles())| {
        if let Ok(request) = serde_json::from_slice::<T>(&mangled(text.as_bytes(), &how)) {
            let written = serde_json::to_string(&request).unwrap();
            let again = serde_json::from_str::<T>(&written).unwrap();
            prop_assert_eq!(serde_json::to_string(&again).unwrap(), written);
        }
    });
}

#[test]
fn mangled_requests_of_environments() {
    check::<UpRequest>(
        r#"{"specification": {"name": "pair", "machines": [{"name": "one", "boot": {"kind": "built-in", "image": "micro"},
            "cpus": 1, "memory_bytes": 1048576, "cpu_model": null, "accelerator": "auto", "disks": [],
            "nics": [{"network": "lan", "mac": "52:54:00:00:00:01", "address": "10.0.0.1/24"}],
            "host": null, "labels": {"rack": "a"}}],
            "networks": [{"name": "lan", "mtu": 1500, "queue_bytes": 1048576}]}}"#,
    );
    check::<DownRequest>(r#"{"volumes": true}"#);
    check::<MachinesRequest>(r#"{"machines": ["a", "b"]}"#);
    check::<ExecRequest>(
        r#"{"command": ["sh", "-c", "ls"], "stdin_base64": "aGk=", "agent_timeout_ms": 90000}"#,
    );
    check::<CreateSnapshotRequest>(
        r#"{"name": "x", "message": null, "capture": "live", "in_flight": "record"}"#,
    );
    check::<RestoreRequest>(r#"{"snapshot": "x", "elapsed_us": 7}"#);
    check::<ForkRequest>(
        r#"{"snapshot": "x", "environment": null, "count": 4, "name": "f", "elapsed_us": 0}"#,
    );
}

#[test]
fn mangled_requests_of_snapshots() {
    check::<VerifyRequest>(r#"{"signed_by": ["-----BEGIN PUBLIC KEY-----"]}"#);
    check::<ExtractRequest>(
        r#"{"to": "/a", "machines": ["b"], "what": ["memory", "disks"], "memory": "raw", "disks": "qcow2",
            "flatten": true, "force": false}"#,
    );
    check::<ExportRequest>(r#"{"to": {"file": "/a/b"}, "force": true}"#);
    check::<ImportRequest>(r#"{"from": {"socket": "/a/b"}, "name": "x"}"#);
    check::<TransferRequest>(
        r#"{"snapshots": ["a", "b"], "environment": "lab", "location": "s3://lab/x", "secret": {"key": "/k"}}"#,
    );
    check::<StoreCheckRequest>(r#"{"read_data": true, "repair": false}"#);
    check::<StoreGcRequest>(r#"{"dry_run": true, "max_unused_percent": 30}"#);
    check::<PruneRequest>(
        r#"{"environment": "lab", "keep_last": 3, "keep_within_s": 7200, "dry_run": true}"#,
    );
}

#[test]
fn mangled_requests_of_hosts() {
    check::<InitHostRequest>(
        r#"{"name": "one", "address": "10.0.0.1:7447", "etcd": ["http://10.0.0.9:2379"],
            "etcd_user": ["a", "b"], "labels": {"rack": "a"}, "underlay_mtu": 1500}"#,
    );
    check::<JoinHostRequest>(r#"{"token": "abc", "name": "two", "address": "[::1]:7447", "labels": {}}"#);
}
