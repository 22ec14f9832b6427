//! Tunnels' sessions: which hosts hand each other which keys, and when.
//!
//! For each pair of hosts of an environment, the one with the lower number opens the session: it makes a key, hands it over,
//! and gets the other's key in the answer. Both then begin their counts of one another anew. A host that has lost its
//! session, as by its agent's death, asks the other for a new one. Keys are renewed within a session before they are used
//! up, and every hour.
//!
//! Keys travel between agents over mutual TLS, and nowhere else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use diorama_api::{ApiError, Empty, ErrorKind};
use diorama_cut::participant::Input;
use diorama_cut::{ParticipantId, SnapshotId};
use diorama_switch::PeerId;
use diorama_switch::geneve::KeyId;
use diorama_topology::EnvironmentName;
use diorama_tunnel::{Cipher, Protection, ReceivingKey, SendingKey, Tunnel};
use serde::{Deserialize, Serialize};

use super::parts::{UnderwayReply, UnderwayRequest};
use crate::Agent;
use crate::dataplane::{PeerStatus, SegmentId};
use crate::operation::Operation;
use crate::snapshot::PartWorker;

/// How often sessions are looked after.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How long a key is used at most.
const KEY_LIFE: Duration = Duration::from_secs(3600);

/// How long a part waits in an attempt before it asks whether its initiator is still at it, and how often it asks.
const UNDERWAY_INTERVAL: Duration = Duration::from_secs(1);

/// How long a part looks up from waiting, to see whether anybody still wants it.
const GO_WAIT: Duration = Duration::from_millis(20);

/// All environments of this host that span hosts, by the number that [`crate::record::SpanRecord`] gives them.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    spans: Mutex<BTreeMap<u64, Spanned>>,
    /// Told when a part may run.
    told: Condvar,
    /// Whether a thread looks after them.
    kept: AtomicBool,
}

/// One such environment.
#[derive(Debug, Clone)]
pub(crate) struct Spanned {
    pub(crate) environment: EnvironmentName,
    pub(crate) segment: SegmentId,
    pub(crate) me: ParticipantId,
    pub(crate) peers: Vec<SpannedPeer>,
    /// Told of hosts that are lost.
    pub(crate) part: PartWorker,
    /// It may run: all hosts stand ready.
    pub(crate) goes: bool,
}

/// Another host of it.
#[derive(Debug, Clone)]
pub(crate) struct SpannedPeer {
    pub(crate) number: ParticipantId,
    pub(crate) host: String,
    pub(crate) peer: PeerId,
    /// Of the key that this host seals with.
    key: u16,
    key_since: Instant,
}

impl SpannedPeer {
    pub(crate) fn new(number: ParticipantId, host: String, peer: PeerId) -> Self {
        Self { number, host, peer, key: 0, key_since: Instant::now() }
    }
}

/// A key for the receiver; with it, a session begins.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SessionRequest {
    pub(crate) span: u64,
    pub(crate) from: u32,
    /// Whether the sender's processor has AES instructions.
    fast_aes: bool,
    key: Vec<u8>,
}

/// The key for the other direction.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SessionReply {
    key: Vec<u8>,
}

/// Another key within a session.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeyRequest {
    pub(crate) span: u64,
    pub(crate) from: u32,
    key: Vec<u8>,
}

/// The sender has lost its session, and wants a new one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SessionWanted {
    pub(crate) span: u64,
    pub(crate) from: u32,
}

impl Sessions {
    pub(crate) fn add(&self, span: u64, spanned: Spanned) {
        self.lock().insert(span, spanned);
    }

    /// Lets a part run that waits for the others.
    pub(crate) fn go(&self, span: u64) {
        if let Some(spanned) = self.lock().get_mut(&span) {
            spanned.goes = true;
        }
        self.told.notify_all();
    }

    /// Waits until [`Sessions::go`].
    pub(crate) fn wait_for_go(&self, span: u64, operation: &Operation) -> Result<(), ApiError> {
        loop {
            operation.check()?;
            let waits =
                |spans: &mut BTreeMap<u64, Spanned>| spans.get(&span).is_some_and(|spanned| !spanned.goes);
            let (spans, timeout) = self
                .told
                .wait_timeout_while(self.lock(), GO_WAIT, waits)
                .unwrap_or_else(PoisonError::into_inner);
            if !timeout.timed_out() && spans.contains_key(&span) {
                return Ok(());
            }
        }
    }

    pub(crate) fn remove(&self, segment: SegmentId) {
        self.lock().retain(|_, spanned| spanned.segment != segment);
    }

    fn find(&self, span: u64, from: u32, host: &str) -> Result<(SegmentId, SpannedPeer), ApiError> {
        let spans = self.lock();
        let spanned = spans.get(&span);
        let peer = spanned
            .and_then(|spanned| spanned.peers.iter().find(|peer| peer.number.0 == from && peer.host == host));
        match (spanned, peer) {
            (Some(spanned), Some(peer)) => Ok((spanned.segment, peer.clone())),
            _ => Err(ApiError::new(
                ErrorKind::NotFound,
                format!("this host shares no environment of that number with {host}"),
            )),
        }
    }

    fn note_key(&self, span: u64, peer: PeerId, key: u16) {
        if let Some(spanned) = self.lock().get_mut(&span)
            && let Some(known) = spanned.peers.iter_mut().find(|known| known.peer == peer)
        {
            known.key = key;
            known.key_since = Instant::now();
        }
    }

    fn all(&self) -> Vec<(u64, Spanned)> {
        self.lock().iter().map(|(span, spanned)| (*span, spanned.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Spanned>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Looks after all sessions from now on, for as long as the agent lives.
    pub(crate) fn keep_sessions(self: &Arc<Self>) -> std::io::Result<()> {
        if self.sessions.kept.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let agent = Arc::downgrade(self);
        std::thread::Builder::new().name("sessions".into()).spawn(move || {
            while let Some(agent) = agent.upgrade() {
                agent.look_after_sessions();
                drop(agent);
                std::thread::sleep(LOOK_INTERVAL);
            }
        })?;
        Ok(())
    }

    /// Whether an environment has a session with each of its other hosts.
    pub(crate) fn has_all_sessions(&self, segment: SegmentId) -> bool {
        self.peer_status(segment).iter().all(|status| status.connected)
    }

    fn peer_status(&self, segment: SegmentId) -> Vec<PeerStatus> {
        self.plane
            .call(move |plane| plane.segment(segment).map(|segment| segment.peer_status()))
            .unwrap_or_default()
    }

    fn look_after_sessions(&self) {
        for (span, spanned) in self.sessions.all() {
            let lost = |host: &str| self.cluster().is_some_and(|cluster| cluster.is_lost(host));
            for peer in spanned.peers.iter().filter(|peer| lost(&peer.host)) {
                // Of interest within a cut alone.
                spanned.part.feed(Input::PeerLost { peer: peer.number });
            }
            let status = self.peer_status(spanned.segment);
            std::thread::scope(|scope| {
                if let Some((attempt, initiator)) = spanned.part.attempt_to_ask_about(UNDERWAY_INTERVAL) {
                    let spanned = &spanned;
                    scope.spawn(move || self.ask_whether_underway(spanned, attempt, initiator));
                }
                for peer in &spanned.peers {
                    let Some(status) = status.iter().find(|status| status.peer == peer.peer) else {
                        continue;
                    };
                    let opens = spanned.me < peer.number;
                    let worn = status.rekey_due || peer.key_since.elapsed() > KEY_LIFE;
                    let (me, segment) = (spanned.me, spanned.segment);
                    if status.connected && !worn {
                        continue;
                    }
                    scope.spawn(move || {
                        let result = match (status.connected, opens) {
                            (false, true) => self.open_session(span, segment, me, peer),
                            (false, false) => self.want_session(span, me, peer),
                            (true, _) => self.renew_key(span, segment, me, peer),
                        };
                        if let Err(error) = result {
                            tracing::debug!(host = peer.host, %error, "no session yet");
                        }
                    });
                }
            });
        }
    }

    /// An initiator whose agent has died, or that gave up while this host could not be reached, tells nobody any more: what
    /// its host says counts. A cut that is reported already is asked about by the protocol itself.
    fn ask_whether_underway(&self, spanned: &Spanned, attempt: SnapshotId, initiator: ParticipantId) {
        let request = UnderwayRequest { environment: spanned.environment.clone(), attempt };
        let peer = spanned.peers.iter().find(|peer| peer.number == initiator);
        let reply: Result<UnderwayReply, ApiError> = match peer {
            Some(peer) => self.ask_host(&peer.host, "cut-underway", &request),
            None => Ok(self.underway(&request)),
        };
        match reply {
            Ok(UnderwayReply { underway: true }) => {}
            Ok(UnderwayReply { underway: false }) => {
                spanned.part.feed(Input::PeerLost { peer: initiator });
            }
            // Whether it is lost for good, its lease tells.
            Err(error) => tracing::debug!(%initiator, %error, "an initiator's host does not answer"),
        }
    }

    fn open_session(
        &self,
        span: u64,
        segment: SegmentId,
        me: ParticipantId,
        peer: &SpannedPeer,
    ) -> Result<(), ApiError> {
        let fast_aes = Cipher::has_fast_aes();
        // A key names its cipher. What the other host is fast with is known only to it yet.
        let sending = new_key(1, Cipher::for_hosts(fast_aes, fast_aes))?;
        let request = SessionRequest { span, from: me.0, fast_aes, key: sending.to_bytes().to_vec() };
        let reply: SessionReply = self.ask_host(&peer.host, "session", &request)?;
        let receiving = ReceivingKey::from_bytes(&reply.key).map_err(bad_key)?;
        self.begin_session(segment, peer.peer, sending, receiving)?;
        self.sessions.note_key(span, peer.peer, 1);
        tracing::info!(host = peer.host, "a session with another host begins");
        Ok(())
    }

    /// Answers [`Agent::open_session`] of another host.
    pub(crate) fn accept_session(
        &self,
        host: &str,
        request: &SessionRequest,
    ) -> Result<SessionReply, ApiError> {
        let (segment, peer) = self.sessions.find(request.span, request.from, host)?;
        let receiving = ReceivingKey::from_bytes(&request.key).map_err(bad_key)?;
        let sending = new_key(1, Cipher::for_hosts(Cipher::has_fast_aes(), request.fast_aes))?;
        let reply = SessionReply { key: sending.to_bytes().to_vec() };
        self.begin_session(segment, peer.peer, sending, receiving)?;
        self.sessions.note_key(request.span, peer.peer, 1);
        tracing::info!(host, "a session with another host begins");
        Ok(reply)
    }

    fn begin_session(
        &self,
        segment: SegmentId,
        peer: PeerId,
        sending: SendingKey,
        receiving: ReceivingKey,
    ) -> Result<(), ApiError> {
        let mut tunnel = Tunnel::new(Protection::Sealed);
        tunnel.install_receiving(receiving);
        tunnel.install_sending(sending);
        let begun = self.plane.call(move |plane| {
            plane.segment(segment).is_some_and(|segment| segment.set_session(peer, Some(tunnel)))
        });
        if begun {
            return Ok(());
        }
        Err(ApiError::new(ErrorKind::Busy, "frames of a cut are being recorded: no session begins now"))
    }

    fn want_session(&self, span: u64, me: ParticipantId, peer: &SpannedPeer) -> Result<(), ApiError> {
        let request = SessionWanted { span, from: me.0 };
        let _: Empty = self.ask_host(&peer.host, "session-wanted", &request)?;
        Ok(())
    }

    /// Answers [`Agent::want_session`] of another host: what there was is no more, and the next look begins anew.
    pub(crate) fn drop_session(&self, host: &str, request: &SessionWanted) -> Result<Empty, ApiError> {
        let (segment, peer) = self.sessions.find(request.span, request.from, host)?;
        let dropped = self.plane.call(move |plane| {
            plane.segment(segment).is_some_and(|segment| segment.set_session(peer.peer, None))
        });
        if dropped {
            return Ok(Empty {});
        }
        Err(ApiError::new(ErrorKind::Busy, "frames of a cut are being recorded: the session cannot end now"))
    }

    fn renew_key(
        &self,
        span: u64,
        segment: SegmentId,
        me: ParticipantId,
        peer: &SpannedPeer,
    ) -> Result<(), ApiError> {
        let id = peer.key.wrapping_add(1);
        let sending = new_key(id, Cipher::for_hosts(Cipher::has_fast_aes(), Cipher::has_fast_aes()))?;
        let request = KeyRequest { span, from: me.0, key: sending.to_bytes().to_vec() };
        let _: Empty = self.ask_host(&peer.host, "session-key", &request)?;
        let peer_id = peer.peer;
        self.plane.call(move |plane| {
            plane.segment(segment).is_some_and(|segment| segment.install_sending(peer_id, sending))
        });
        self.sessions.note_key(span, peer.peer, id);
        Ok(())
    }

    /// Answers [`Agent::renew_key`] of another host.
    pub(crate) fn accept_key(&self, host: &str, request: &KeyRequest) -> Result<Empty, ApiError> {
        let (segment, peer) = self.sessions.find(request.span, request.from, host)?;
        let key = ReceivingKey::from_bytes(&request.key).map_err(bad_key)?;
        let installed = self.plane.call(move |plane| {
            plane.segment(segment).is_some_and(|segment| segment.install_receiving(peer.peer, key))
        });
        if installed {
            return Ok(Empty {});
        }
        Err(ApiError::new(ErrorKind::WrongState, "there is no session to renew the key of"))
    }
}

fn new_key(id: u16, cipher: Cipher) -> Result<SendingKey, ApiError> {
    SendingKey::generate(KeyId(id), cipher)
        .map_err(|error| ApiError::new(ErrorKind::Internal, format!("no key for a tunnel: {error}")))
}

fn bad_key(error: diorama_tunnel::KeyError) -> ApiError {
    ApiError::new(ErrorKind::Invalid, format!("another host's key: {error}"))
}
