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

/// How much is sent in a second.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// By TCP, as `traffic` has it.
    pub bytes: &'static str,
    /// By UDP.
    pub datagrams: u32,
}

/// What two machines of one host have no trouble with.
const RATE: Rate = Rate { bytes: "400KiB", datagrams: 200 };

/// Starts the traffic, and returns once both kinds have arrived.
#[track_caller]
pub fn start(lab: &Lab, environment: &str) -> Arrived {
    begin(lab, environment, RATE);
    until("traffic", || look(lab, environment).filter(Arrived::has_both))
}

/// Starts the traffic.
#[track_caller]
pub fn begin(lab: &Lab, environment: &str, Rate { bytes, datagrams }: Rate) {
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
        &format!(
            "ping -c 1 -W 10 10.0.0.1 >/dev/null; \
             traffic tcp-send --to 10.0.0.1:7000 --rate {bytes} </dev/null >/dev/null 2>&1 & \
             traffic udp-send --to 10.0.0.1:7001 --rate {datagrams} </dev/null >/dev/null 2>&1 &"
        ),
    );
}

impl Arrived {
    pub fn has_both(&self) -> bool {
        self.bytes > 0 && self.received > 0
    }

    /// Whether more of both has arrived than then.
    pub fn is_beyond(&self, before: &Self) -> bool {
        self.bytes > before.bytes && self.received > before.received
    }
}

/// What has arrived by now. It must all be right, but for what is lost.
#[track_caller]
pub fn look(lab: &Lab, environment: &str) -> Option<Arrived> {
    let ran = lab.try_shell(environment, "server", STATUS);
    assert_eq!(ran.status, Some(0), "{ran:?}\n{}", lab.agent_log());
    let (arrived, udp) = read(&ran.stdout)?;
    for wrong in ["reordered", "too_old"] {
        assert_eq!(udp[wrong], 0, "{wrong} in {udp}");
    }
    Some(arrived)
}

/// Prints on the server what has arrived.
pub const STATUS: &str = "cat /tmp/tcp /tmp/udp 2>/dev/null; true";

/// What [`STATUS`] has printed, and the datagrams' account: whatever the network does, nothing arrives twice or damaged.
#[track_caller]
pub fn read(printed: &str) -> Option<(Arrived, Value)> {
    let mut lines = printed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let (tcp, udp) = (lines.next()?, lines.next()?);
    if tcp["state"] == "waiting" || udp["received"].is_null() {
        return None;
    }
    assert_eq!(tcp["state"], "open", "{tcp}");
    assert_eq!((&tcp["bad_bytes"], &tcp["connections"]), (&0.into(), &1.into()), "{tcp}");
    assert_eq!((&udp["duplicated"], &udp["strangers"]), (&0.into(), &0.into()), "{udp}");
    let arrived = Arrived {
        connection: tcp["connection"].clone(),
        bytes: tcp["bytes"].as_u64().unwrap(),
        received: udp["received"].as_u64().unwrap(),
        lost: udp["lost"].as_u64().unwrap(),
    };
    Some((arrived, udp))
}

/// Waits until more of the same has arrived than `before`, and returns it.
#[track_caller]
pub fn goes_on(lab: &Lab, environment: &str, before: &Arrived) -> Arrived {
    let now = until("more traffic", || look(lab, environment).filter(|now| now.is_beyond(before)));
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
