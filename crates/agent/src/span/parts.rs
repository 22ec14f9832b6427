//! This host's part of an environment: launched together with the others', and reached by the messages of its cuts.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use diorama_api::{
    ApiError, DownReport, DownRequest, Empty, EnvironmentStatus, ErrorKind, MachineReady, MachinesRequest,
};
use diorama_cluster::channel::{MessageHandler, Peer, PeerError, Refusal};
use diorama_cluster::directory::FencingToken;
use diorama_cut::message::Body;
use diorama_cut::participant::Input;
use diorama_cut::{CutId, Epoch, Message, ParticipantId, SnapshotId, initiator};
use diorama_qemu::process::Policy;
use diorama_store::SnapshotId as StoredId;
use diorama_switch::geneve::Vni;
use diorama_switch::{NetworkId, PeerId};
use diorama_topology::EnvironmentName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::sessions::{KeyRequest, SessionRequest, SessionWanted, Spanned, SpannedPeer};
use crate::Agent;
use crate::dataplane::{SegmentId, Span};
use crate::operation::Operation;
use crate::priority::schedule_this_thread;
use crate::record::{Doubt, Phase, SpanRecord};
use crate::restore::Memory;
use crate::slot::{Slot, environment_name};
use crate::snapshot::{PartWorker, Post, wall_clock_us};
use crate::user_files::UserFile;

/// What may wait for the tunnel to one host, in bytes.
const PEER_QUEUE_BYTES: usize = 4 << 20;
/// How long hosts may take to have sessions with one another when an environment starts.
const SESSIONS_LIMIT: Duration = Duration::from_secs(20);
const SESSIONS_POLL: Duration = Duration::from_millis(2);
/// How long another host's agent may take to answer a message.
const ASK_LIMIT: Duration = Duration::from_secs(3);
/// How long a message of a cut may take; it is sent again by the protocol.
const CUT_MESSAGE_LIMIT: Duration = Duration::from_secs(2);
/// The niceness of threads that handle messages of cuts.
pub(crate) const CUT_NICE: i32 = -10;
/// What a part says when it stands ready.
pub(super) const READY_STEP: &str = "ready";

/// Launch a part, and let it run when told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartRequest {
    pub(crate) span: SpanRecord,
    /// What the ports begin with at least.
    pub(crate) epoch: u32,
    /// The snapshot to restore; none to boot.
    pub(crate) from: Option<String>,
    /// The files of the user's that machines are to be booted from, as the asking host has them.
    pub(crate) files: Vec<UserFile>,
    /// That host.
    pub(crate) asked_by: String,
}

/// A part that runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartReport {
    /// Times are from this host's receipt of the request.
    pub(crate) machines: Vec<MachineReady>,
    pub(crate) in_flight_replayed: u64,
}

/// Let the parts of this number run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct GoRequest {
    pub(super) environment: EnvironmentName,
    pub(super) span: u64,
    /// Of the lock under which this is asked; so in all requests about parts.
    pub(super) token: FencingToken,
}

/// Stop a part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartDownRequest {
    pub(crate) down: DownRequest,
    pub(crate) token: FencingToken,
}

/// Pause or resume machines of a part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PartRestRequest {
    pub(crate) machines: MachinesRequest,
    pub(crate) paused: bool,
    pub(crate) token: FencingToken,
}

/// A message of the snapshot protocol.
#[derive(Debug, Serialize, Deserialize)]
struct CutEnvelope {
    environment: EnvironmentName,
    span: u64,
    from: u32,
    message: Message,
    /// Of the initiator's lock; with what begins a cut.
    token: Option<FencingToken>,
}

/// Answers a message of the snapshot protocol.
#[derive(Debug, Serialize, Deserialize)]
struct CutAnswer {
    /// The receiver's clock, in microseconds since 1970, UTC.
    now_us: u64,
}

/// Whether the receiver still works on a snapshot as its initiator.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct UnderwayRequest {
    pub(super) environment: EnvironmentName,
    pub(super) attempt: SnapshotId,
}

/// Answers [`UnderwayRequest`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct UnderwayReply {
    pub(super) underway: bool,
}

/// What a launch needs to know of the other hosts.
#[derive(Clone, Copy)]
pub(crate) struct Joining<'a> {
    pub(crate) slot: &'a Arc<Slot>,
    pub(crate) span: &'a SpanRecord,
    /// The cut that was in doubt when the last agent died.
    pub(crate) doubt: Option<Doubt>,
}

impl Agent {
    /// Launches this host's part, says when it stands ready, and lets it run when it is told.
    pub(crate) fn launch_part(
        &self,
        request: &PartRequest,
        operation: &Operation,
    ) -> Result<PartReport, ApiError> {
        let started = Instant::now();
        let name = &request.span.whole.name;
        self.admit(name, request.span.token)?;
        let Some(id) = &request.from else {
            let (slot, _guard) = self.slots.enter_or_insert(name, "starting", operation)?;
            let kept = slot.state().record.clone();
            if kept.as_ref().is_some_and(|kept| kept.phase == Phase::Up) {
                return Err(ApiError::new(
                    ErrorKind::NameInUse,
                    format!("an environment `{name}` runs already"),
                )
                .hint("stop it with `diorama down`, or start this one under another name with `--name`"));
            }
            let cluster = self.cluster_or_error()?;
            let checked = self.user_files.check(
                &request.span.part().machines,
                &request.files,
                (cluster.name.as_str(), &request.asked_by),
                operation,
            );
            if let Err(error) = checked {
                self.forget_generation(&slot, kept.as_ref());
                return Err(error);
            }
            let result = self.start(&slot, request.span.part(), Some(request), kept.as_ref(), operation);
            if let Err(error) = result {
                self.forget_generation(&slot, kept.as_ref());
                return Err(error);
            }
            let machines = request.span.part().machines;
            let ready_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            let machines =
                machines.iter().map(|machine| MachineReady { name: machine.name.to_string(), ready_ms });
            return Ok(PartReport { machines: machines.collect(), in_flight_replayed: 0 });
        };
        let id: StoredId = id
            .parse()
            .map_err(|_| ApiError::new(ErrorKind::Invalid, format!("`{id}` is no snapshot's id")))?;
        let stored = self.load_trusted(&id)?;
        let (slot, guard) = self.slots.enter_or_insert(name, "restoring", operation)?;
        let part = request.span.part();
        let wanted = |machine: &str| part.machine(machine).is_some();
        let result = self.load_memory(&stored, wanted, operation).and_then(|loaded| {
            let memory = Memory::Mapped(loaded);
            self.revive(&slot, &stored, &memory, Some(request), started, operation)
        });
        let report = self.clean_up(&slot, result, guard)?;
        Ok(PartReport { machines: report.machines, in_flight_replayed: report.in_flight_replayed })
    }

    /// Stops this host's part, for the holder of the environment's lock.
    pub(crate) fn stop_part(
        &self,
        name: &str,
        request: &PartDownRequest,
        operation: &Operation,
    ) -> Result<DownReport, ApiError> {
        self.admit(&environment_name(name)?, request.token)?;
        self.down_here(name, request.down, operation)
    }

    /// Pauses or resumes machines of this host's part, for the holder of the environment's lock.
    pub(crate) fn rest_part(
        &self,
        name: &str,
        request: &PartRestRequest,
        operation: &Operation,
    ) -> Result<EnvironmentStatus, ApiError> {
        self.admit(&environment_name(name)?, request.token)?;
        self.rest_here(name, &request.machines, request.paused, operation)
    }

    /// Waits until every host stands ready and this one is told to go on.
    pub(crate) fn wait_for_others(
        &self,
        segment: SegmentId,
        span: u64,
        operation: &Operation,
    ) -> Result<(), ApiError> {
        let deadline = Instant::now() + SESSIONS_LIMIT;
        while !self.has_all_sessions(segment) {
            operation.check()?;
            if Instant::now() > deadline {
                return Err(ApiError::new(
                    ErrorKind::Agent,
                    "the tunnels to the other hosts of the environment do not come about",
                )
                .hint(
                    "`diorama host list` shows the hosts and their addresses: UDP and TCP must reach them",
                ));
            }
            std::thread::sleep(SESSIONS_POLL);
        }
        operation.step(READY_STEP);
        self.sessions.wait_for_go(span, operation)
    }

    /// Joins a launched segment to the other hosts: peers at its switch, and the thread for its cuts.
    pub(crate) fn join_hosts(
        &self,
        segment: SegmentId,
        networks: &[NetworkId],
        joining: Joining<'_>,
    ) -> Result<(Vec<(ParticipantId, PeerId)>, PartWorker), ApiError> {
        let Joining { slot, span, doubt } = joining;
        let me = ParticipantId(span.me);
        let agent = self.me.upgrade().ok_or_else(|| ApiError::new(ErrorKind::Cancelled, "the agent ends"))?;
        let doubt = doubt.map(|doubt| {
            let cut = CutId { snapshot: SnapshotId(doubt.attempt), epoch: Epoch(doubt.epoch) };
            (cut, ParticipantId(doubt.initiator))
        });
        let post = self.post_for(&slot.name, span, None);
        let worker = PartWorker::start(&agent, slot, me, doubt, post)
            .map_err(|error| ApiError::new(ErrorKind::Io, format!("a thread cannot be started: {error}")))?;
        let colours = worker.clone();
        let newer_colour = Box::new(move |epoch: diorama_switch::Epoch| {
            colours.feed(Input::NewerColourSeen { epoch: Epoch(epoch.0) })
        });
        let vnis = span.vnis.iter().filter_map(|vni| Vni::new(*vni)).collect();
        let spans = self.plane.call(move |plane| plane.span(segment, Span { vnis, newer_colour }));
        if !spans {
            return Err(ApiError::new(
                ErrorKind::Busy,
                "a network's number on the wire is in use on this host",
            )
            .hint("try again: numbers are drawn anew each time"));
        }
        let mut peers = Vec::new();
        let mut spanned = Vec::new();
        for (number, host) in (0..).zip(&span.hosts) {
            if number == span.me {
                continue;
            }
            let theirs = span.whole.part(|machine| host.machines.iter().any(|known| known == machine));
            let attached: Vec<NetworkId> = span
                .whole
                .networks
                .iter()
                .zip(networks)
                .filter(|(network, _)| {
                    theirs
                        .machines
                        .iter()
                        .flat_map(|machine| &machine.nics)
                        .any(|nic| nic.network == network.name)
                })
                .map(|(_, id)| *id)
                .collect();
            let tunnel = host.tunnel;
            let peer = self.plane.call(move |plane| {
                plane
                    .segment(segment)
                    .and_then(|segment| segment.add_peer(tunnel, &attached, PEER_QUEUE_BYTES))
            });
            let peer = peer.ok_or_else(|| {
                ApiError::new(ErrorKind::Internal, "the segment went while it was launched")
            })?;
            peers.push((ParticipantId(number), peer));
            spanned.push(SpannedPeer::new(ParticipantId(number), host.name.clone(), peer));
        }
        self.sessions.add(
            span.id,
            Spanned {
                environment: slot.name.clone(),
                segment,
                me,
                peers: spanned,
                part: worker.clone(),
                goes: false,
            },
        );
        Ok((peers, worker))
    }

    /// Sends messages of an environment's cuts to its hosts; an initiator's with the token of its lock.
    pub(super) fn post_for(
        &self,
        environment: &EnvironmentName,
        span: &SpanRecord,
        token: Option<FencingToken>,
    ) -> Post {
        let agent = self.me.clone();
        let environment = environment.clone();
        let hosts: Vec<String> = span.hosts.iter().map(|host| host.name.clone()).collect();
        let (me, span) = (span.me, span.id);
        Arc::new(move |to: ParticipantId, message: Message| {
            let Some(agent) = agent.upgrade() else { return };
            if to.0 == me {
                agent.deliver(CutEnvelope {
                    environment: environment.clone(),
                    span,
                    from: me,
                    message,
                    token,
                });
                return;
            }
            let (Some(cluster), Some(host)) = (agent.cluster(), hosts.get(to.0 as usize)) else {
                return;
            };
            let Ok(id) = cluster.host_id(host) else { return };
            let envelope = CutEnvelope { environment: environment.clone(), span, from: me, message, token };
            let Ok(body) = serde_json::to_vec(&envelope) else { return };
            cluster.spawn({
                let (peers, host) = (cluster.peers.clone(), host.clone());
                async move {
                    let (sent_us, sent) = (wall_clock_us(), Instant::now());
                    match peers.call(id, "cut", body, CUT_MESSAGE_LIMIT).await {
                        Ok(answer) => {
                            let took_us = u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX);
                            if let Ok(answer) = serde_json::from_slice::<CutAnswer>(&answer) {
                                agent.clocks.note(&host, sent_us, took_us, answer.now_us);
                            }
                        }
                        // The protocol sends it again.
                        Err(error) => tracing::debug!(host, %error, "a message of a cut did not arrive"),
                    }
                }
            });
        })
    }

    /// Hands a message to whom it is for: the participant, or the initiator.
    fn deliver(&self, envelope: CutEnvelope) {
        let CutEnvelope { environment, span, from, message, token } = envelope;
        // What follows upon it is told apart by its cut, and the outcome is the manifest's alone: it may come late.
        if matches!(message.body, Body::Prepare(_)) {
            let admitted = token.map(|token| self.admit(&environment, token));
            if !matches!(admitted, Some(Ok(()))) {
                tracing::warn!(%environment, from, "a cut is not begun: its initiator does not hold the lock any more");
                return;
            }
        }
        let Ok(slot) = self.slots.get(environment.as_str()) else { return };
        let state = slot.state();
        let Some(worker) = state.running.as_ref().and_then(|running| running.part.clone()) else { return };
        let record = state.record.as_ref().and_then(|record| record.span.clone());
        drop(state);
        if record.is_none_or(|record| record.id != span) {
            return;
        }
        let from = ParticipantId(from);
        match message.body {
            Body::Prepare(_) | Body::Take | Body::Expect { .. } | Body::Commit | Body::Abort { .. } => {
                worker.deliver(from, message);
            }
            _ => {
                if let Some(message) = worker.initiator_takes(initiator::Input::Message { from, message }) {
                    self.answer_late(&slot, message);
                }
            }
        }
    }

    /// Asks another host's agent something short.
    pub(super) fn ask_host<T: DeserializeOwned>(
        &self,
        host: &str,
        kind: &str,
        request: &impl Serialize,
    ) -> Result<T, ApiError> {
        let cluster = self.cluster_or_error()?;
        let id = cluster.host_id(host)?;
        let body = serde_json::to_vec(request).map_err(not_understood)?;
        let answer = cluster
            .wait(cluster.peers.call(id, kind, body, ASK_LIMIT))
            .map_err(|error| peer_error(&error))?;
        serde_json::from_slice(&answer).map_err(not_understood)
    }

    fn answer(&self, peer: &Peer, kind: &str, body: &[u8]) -> Result<Vec<u8>, ApiError> {
        let name = peer.name.as_str();
        match kind {
            "cut" => {
                let envelope: CutEnvelope = parse(body)?;
                self.check_sender(&envelope, name)?;
                self.deliver(envelope);
                encode(&CutAnswer { now_us: wall_clock_us() })
            }
            "go" => {
                let request: GoRequest = parse(body)?;
                self.admit(&request.environment, request.token)?;
                self.sessions.go(request.span);
                encode(&Empty {})
            }
            "cut-underway" => encode(&self.underway(&parse(body)?)),
            "session" => encode(&self.accept_session(name, &parse::<SessionRequest>(body)?)?),
            "session-wanted" => encode(&self.drop_session(name, &parse::<SessionWanted>(body)?)?),
            "session-key" => encode(&self.accept_key(name, &parse::<KeyRequest>(body)?)?),
            other => {
                Err(ApiError::new(ErrorKind::Invalid, format!("this version knows no message `{other}`")))
            }
        }
    }

    pub(super) fn underway(&self, request: &UnderwayRequest) -> UnderwayReply {
        let slot = self.slots.get(request.environment.as_str());
        let part = slot.ok().and_then(|slot| slot.state().running.as_ref()?.part.clone());
        UnderwayReply { underway: part.is_some_and(|part| part.initiates(request.attempt)) }
    }

    /// Only a host of the environment speaks of its cuts, and only for itself.
    fn check_sender(&self, envelope: &CutEnvelope, name: &str) -> Result<(), ApiError> {
        let slot = self.slots.get(envelope.environment.as_str())?;
        let state = slot.state();
        let span = state.record.as_ref().and_then(|record| record.span.as_ref());
        let host = span.and_then(|span| span.hosts.get(envelope.from as usize));
        if host.is_some_and(|host| host.name == name) {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorKind::Invalid,
            format!("host {name} is not number {} of the environment", envelope.from),
        ))
    }
}

/// Takes messages of other hosts.
pub(crate) struct Messages(pub(crate) Arc<Agent>);

impl MessageHandler for Messages {
    fn handle<'a>(
        &'a self,
        peer: &'a Peer,
        kind: &'a str,
        body: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Refusal>> + Send + 'a>> {
        let (agent, peer, kind) = (Arc::clone(&self.0), peer.clone(), kind.to_owned());
        Box::pin(async move {
            if kind == "cut" || kind == "go" {
                // Short, and never to wait for a thread: what one host is told late is skew.
                prefer_this_thread();
                return answered(Ok(agent.answer(&peer, &kind, &body)));
            }
            let result = tokio::task::spawn_blocking(move || agent.answer(&peer, &kind, &body)).await;
            answered(result)
        })
    }
}

fn answered(result: Result<Result<Vec<u8>, ApiError>, tokio::task::JoinError>) -> Result<Bytes, Refusal> {
    match result {
        Ok(Ok(answer)) => Ok(answer.into()),
        Ok(Err(error)) => Err(Refusal { kind: word(error.kind), message: error.message }),
        Err(_) => {
            Err(Refusal { kind: "internal".to_owned(), message: "the agent ran into a defect".to_owned() })
        }
    }
}

/// Puts the calling thread before guests, once. Only root may.
pub(crate) fn prefer_this_thread() {
    thread_local! {
        static DONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if !DONE.replace(true) {
        schedule_this_thread(Policy::Normal { nice: CUT_NICE }, "messages of cuts");
    }
}

/// An error's class, in the word that documents have for it.
fn word(kind: ErrorKind) -> String {
    serde_json::to_value(kind).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(not_understood)
}

fn encode(answer: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(answer).map_err(not_understood)
}

fn not_understood(error: serde_json::Error) -> ApiError {
    ApiError::new(ErrorKind::Invalid, format!("a message between hosts is not understood: {error}"))
        .hint("all hosts must run the same version of Diorama: `diorama host list` shows theirs")
}

pub(super) fn peer_error(error: &PeerError) -> ApiError {
    ApiError::new(ErrorKind::Agent, error.to_string())
        .hint("is that host up, and does its agent run? `diorama host list` shows who is there")
}
