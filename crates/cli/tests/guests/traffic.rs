//! Traffic between the two machines of a pair, and what it proves: one TCP session and one numbered UDP stream from
//! `client` to `server`, both checked byte by byte where they arrive.

use serde_json::Value;

use crate::lab::{Lab, until};

/// Two machines on one network.
pub const PAIR: &str = "\
name: pair
machines:
  server: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.1/24}]}
  client: {image: micro, memory: 96MiB, nics: [{network: lan, address: 10.0.0.2/24}]}
networks:
  lan: {}
";

/// What has arrived.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// Drawn at random by the sender: the same number is the same session.
    pub connection: Value,
    pub bytes: u64,
    pub received: u64,
    pub lost: u64,
}

/// Starts the traffic, and returns once both kinds have arrived.
#[track_caller]
pub fn start(lab: &Lab, environment: &str) -> Arrived {
    lab.shell(
        environment,
        "server",
        "traffic tcp-serve --port 7000 --status /tmp/tcp </dev/null >/dev/null 2>&1 & \
         traffic udp-recv --port 7001 --status /tmp/udp </dev/null >/dev/null 2>&1 & \
         until grep -q waiting /tmp/tcp 2>/dev/null; do sleep 0.1; done",
    );
    lab.shell(
        environment,
        "client",
        // Frames that wait for an answer to ARP may leave in another order.
        "ping -c 1 -W 10 10.0.0.1 >/dev/null; \
         traffic tcp-send --to 10.0.0.1:7000 --rate 400KiB </dev/null >/dev/null 2>&1 & \
         traffic udp-send --to 10.0.0.1:7001 --rate 200 </dev/null >/dev/null 2>&1 &",
    );
    until("traffic", || look(lab, environment).filter(|arrived| arrived.bytes > 0 && arrived.received > 0))
}

/// What has arrived by now. It must all be right, but for what is lost.
#[track_caller]
pub fn look(lab: &Lab, environment: &str) -> Option<Arrived> {
    let text = lab.shell(environment, "server", "cat /tmp/tcp /tmp/udp 2>/dev/null; true");
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let (tcp, udp) = (lines.next()?, lines.next()?);
    if tcp["state"] == "waiting" || udp["received"].is_null() {
        return None;
    }
    assert_eq!(tcp["state"], "open", "{tcp}");
    assert_eq!((&tcp["bad_bytes"], &tcp["connections"]), (&0.into(), &1.into()), "{tcp}");
    for wrong in ["duplicated", "reordered", "strangers", "too_old"] {
        assert_eq!(udp[wrong], 0, "{wrong} in {udp}");
    }
    Some(Arrived {
        connection: tcp["connection"].clone(),
        bytes: tcp["bytes"].as_u64().unwrap(),
        received: udp["received"].as_u64().unwrap(),
        lost: udp["lost"].as_u64().unwrap(),
    })
}

/// Waits until more of the same has arrived than `before`, and returns it.
#[track_caller]
pub fn goes_on(lab: &Lab, environment: &str, before: &Arrived) -> Arrived {
    let now = until("more traffic", || {
        look(lab, environment).filter(|now| now.bytes > before.bytes && now.received > before.received)
    });
    assert_eq!(now.connection, before.connection, "another session");
    now
}

/// As [`goes_on`], and nothing more was lost.
#[track_caller]
pub fn goes_on_whole(lab: &Lab, environment: &str, before: &Arrived) -> Arrived {
    let now = goes_on(lab, environment, before);
    assert_eq!(now.lost, before.lost, "{before:?} {now:?}");
    now
}

/// Waits until the traffic goes on after a return in time: whatever has arrived now, more does.
#[track_caller]
pub fn goes_on_from_here(lab: &Lab, environment: &str, like: &Arrived) -> Arrived {
    let now = until("traffic", || look(lab, environment));
    assert_eq!(now.connection, like.connection, "another session");
    assert_eq!(now.lost, like.lost, "{like:?} {now:?}");
    goes_on_whole(lab, environment, &now)
}
