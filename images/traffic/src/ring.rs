//! `token-ring`: datagrams that go round a ring of guests and are never sent again.
//!
//! A token carries its id and its hop count. Each guest passes it on with one hop more, so
//! a token that is lost never comes back, and a token that is doubled is seen with a hop
//! count that its guest has already passed: these are the two things that a snapshot must
//! not do.
//!
//! The guest that injects first sends a *probe* round the ring, again and again until it
//! comes back: then every member listens, every address is resolved, and a token that goes
//! missing afterwards was lost by the network.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::arguments::Arguments;
use crate::status::{Line, PERIOD, StatusFile};
use crate::udp::{bind, is_passing, listen};
use crate::{Failure, random_id};

const TOKEN: [u8; 8] = *b"DIOTOK01";
const PROBE: [u8; 8] = *b"DIOPRB01";
const LENGTH: usize = 24;

/// Tokens followed at once. More are neither followed nor passed on, but counted.
const MAX_TOKENS: usize = 4096;

/// A probe that has gone this far has missed its sender and would go round for ever.
const MAX_PROBE_HOPS: u64 = 1024;

/// How often the probe is sent until it comes back.
const PROBE_PERIOD: Duration = Duration::from_millis(100);

/// `traffic token-ring`.
pub fn pass(arguments: &mut Arguments) -> Result<(), Failure> {
    let port: u16 = arguments.required("listen")?;
    let next: SocketAddr = arguments.required("next")?;
    let inject: u64 = arguments.optional("inject")?.unwrap_or(0);
    let id: u16 = arguments.optional("id")?.unwrap_or(0);
    let mut status = StatusFile::required(arguments)?;
    arguments.finish()?;
    if inject > MAX_TOKENS as u64 {
        return Err(Failure::Check(format!("--inject {inject}: at most {MAX_TOKENS} tokens")));
    }

    let incoming = listen(port)?;
    let outgoing = bind(next, 0)?;
    let mut member = Member::new(id, random_id()?, inject);
    let mut probe_due = Instant::now();
    // One byte more than a token, so that a longer datagram is not taken for one.
    let mut buffer = [0; LENGTH + 1];
    loop {
        status.update(|| member.line())?;
        if member.to_inject > 0 && Instant::now() >= probe_due {
            send(&outgoing, next, &member.probe())?;
            probe_due = Instant::now() + PROBE_PERIOD;
        }
        let arrived = match incoming.recv(&mut buffer) {
            Ok(length) => &buffer[..length],
            Err(error) if is_passing(&error) => continue,
            Err(error) => return Err(Failure::Io("receive", error)),
        };
        match member.arrive(arrived) {
            Outcome::Pass(datagram) => send(&outgoing, next, &datagram)?,
            Outcome::Inject => {
                for datagram in member.inject() {
                    send(&outgoing, next, &datagram)?;
                }
            }
            Outcome::Drop => {}
        }
    }
}

/// Sends a datagram for certain: a token that the kernel refuses is still ours.
fn send(socket: &UdpSocket, next: SocketAddr, datagram: &[u8]) -> Result<(), Failure> {
    loop {
        match socket.send_to(datagram, next) {
            Ok(_) => return Ok(()),
            Err(error) if is_passing(&error) => std::thread::sleep(PERIOD / 50),
            Err(error) => return Err(Failure::Io("send", error)),
        }
    }
}

type Datagram = [u8; LENGTH];

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Send this on.
    Pass(Datagram),
    /// The ring is closed: put the tokens in.
    Inject,
    /// Nothing to send.
    Drop,
}

/// One guest's place in the ring.
#[derive(Debug)]
struct Member {
    id: u16,
    nonce: u64,
    to_inject: u64,
    injected: u64,
    last_hops: BTreeMap<u64, u64>,
    passed: u64,
    highest_hop: u64,
    duplicates: u64,
    strangers: u64,
}

impl Member {
    fn new(id: u16, nonce: u64, to_inject: u64) -> Self {
        Self {
            id,
            nonce,
            to_inject,
            injected: 0,
            last_hops: BTreeMap::new(),
            passed: 0,
            highest_hop: 0,
            duplicates: 0,
            strangers: 0,
        }
    }

    fn probe(&self) -> Datagram {
        datagram(PROBE, self.nonce, 1)
    }

    /// The tokens to send now; from then on there are none.
    fn inject(&mut self) -> Vec<Datagram> {
        let tokens = 0..std::mem::take(&mut self.to_inject);
        let tokens: Vec<_> = tokens.map(|n| datagram(TOKEN, u64::from(self.id) << 32 | n, 1)).collect();
        self.injected += tokens.len() as u64;
        tokens
    }

    fn arrive(&mut self, bytes: &[u8]) -> Outcome {
        match parse(bytes) {
            Some((TOKEN, token, hops)) => self.token(token, hops),
            Some((PROBE, nonce, _)) if nonce == self.nonce && self.to_inject > 0 => Outcome::Inject,
            Some((PROBE, nonce, hops)) if nonce != self.nonce && hops < MAX_PROBE_HOPS => {
                Outcome::Pass(datagram(PROBE, nonce, hops + 1))
            }
            // Our own probe again, or one that has missed its sender.
            Some((PROBE, ..)) => Outcome::Drop,
            _ => {
                self.strangers += 1;
                Outcome::Drop
            }
        }
    }

    fn token(&mut self, token: u64, hops: u64) -> Outcome {
        let Some(next) = hops.checked_add(1) else {
            self.strangers += 1;
            return Outcome::Drop;
        };
        let has_room = self.last_hops.len() < MAX_TOKENS;
        match self.last_hops.get_mut(&token) {
            Some(last) if hops <= *last => {
                // Not passed on: a doubled token shows once per doubling, not for ever.
                self.duplicates += 1;
                return Outcome::Drop;
            }
            Some(last) => *last = hops,
            None if has_room => {
                self.last_hops.insert(token, hops);
            }
            None => {
                self.strangers += 1;
                return Outcome::Drop;
            }
        }
        self.passed += 1;
        self.highest_hop = self.highest_hop.max(hops);
        Outcome::Pass(datagram(TOKEN, token, next))
    }

    fn line(&self) -> Line {
        Line::new("token-ring")
            .value("id", self.id)
            .value("injected", self.injected)
            .value("tokens", self.last_hops.len())
            .value("hops", self.passed)
            .value("highest_hop", self.highest_hop)
            .value("duplicates", self.duplicates)
            .value("strangers", self.strangers)
            .map("last_hops", self.last_hops.iter())
    }
}

fn datagram(kind: [u8; 8], id: u64, hops: u64) -> Datagram {
    let mut bytes = [0; LENGTH];
    bytes[..8].copy_from_slice(&kind);
    bytes[8..16].copy_from_slice(&id.to_be_bytes());
    bytes[16..].copy_from_slice(&hops.to_be_bytes());
    bytes
}

fn parse(bytes: &[u8]) -> Option<([u8; 8], u64, u64)> {
    let bytes: &Datagram = bytes.try_into().ok()?;
    let (kind, rest) = bytes.split_first_chunk::<8>()?;
    let (id, rest) = rest.split_first_chunk::<8>()?;
    let (hops, _) = rest.split_first_chunk::<8>()?;
    Some((*kind, u64::from_be_bytes(*id), u64::from_be_bytes(*hops)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring of members joined by queues.
    fn ring(size: u16, tokens: u64) -> Vec<Member> {
        (0..size).map(|id| Member::new(id, 100 + u64::from(id), if id == 0 { tokens } else { 0 })).collect()
    }

    /// Passes datagrams round for `steps`, starting with one for member 1.
    fn run(members: &mut [Member], mut wire: Vec<(usize, Datagram)>, steps: usize) -> Vec<(usize, Datagram)> {
        for _ in 0..steps {
            if wire.is_empty() {
                break;
            }
            let (at, bytes) = wire.remove(0);
            let next = (at + 1) % members.len();
            match members[at].arrive(&bytes) {
                Outcome::Pass(bytes) => wire.push((next, bytes)),
                Outcome::Inject => {
                    wire.extend(members[at].inject().into_iter().map(|bytes| (next, bytes)));
                }
                Outcome::Drop => {}
            }
        }
        wire
    }

    #[test]
    fn tokens_go_in_once_the_probe_has_come_back_and_stay() {
        let mut members = ring(4, 32);
        let probe = members[0].probe();
        // The probe was sent three times before it came back.
        let wire = run(&mut members, vec![(1, probe); 3], 10_000);
        assert_eq!(wire.len(), 32);
        assert_eq!(members.iter().map(|m| m.duplicates).sum::<u64>(), 0);
        assert!(members.iter().all(|m| m.last_hops.len() == 32));
    }

    #[test]
    fn a_doubled_token_is_seen_once_and_does_not_live_on() {
        let mut members = ring(3, 4);
        let probe = members[0].probe();
        let mut wire = run(&mut members, vec![(1, probe)], 500);
        let doubled = wire[0];
        wire.push(doubled);
        let wire = run(&mut members, wire, 500);
        assert_eq!(members.iter().map(|m| m.duplicates).sum::<u64>(), 1);
        assert_eq!(wire.len(), 4);
    }

    #[test]
    fn a_lost_token_stays_lost() {
        let mut members = ring(3, 4);
        let probe = members[0].probe();
        let mut wire = run(&mut members, vec![(1, probe)], 500);
        wire.pop();
        assert_eq!(run(&mut members, wire, 500).len(), 3);
    }

    #[test]
    fn strangers_do_not_grow_the_table() {
        let mut member = Member::new(0, 1, 0);
        for token in 0..2 * MAX_TOKENS as u64 {
            member.arrive(&datagram(TOKEN, token, 1));
        }
        assert_eq!(member.last_hops.len(), MAX_TOKENS);
        assert_eq!(member.arrive(&datagram(TOKEN, 0, u64::MAX)), Outcome::Drop);
        assert_eq!(member.arrive(&[0; LENGTH + 1]), Outcome::Drop);
        assert_eq!(member.arrive(&datagram(PROBE, 9, MAX_PROBE_HOPS)), Outcome::Drop);
        assert_eq!(member.strangers, MAX_TOKENS as u64 + 2);
    }
}
