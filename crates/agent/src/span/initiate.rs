//! Snapshots of an environment that spans hosts: the initiator's host.
//!
//! The initiator runs on the thread of the request, on a host that has a part. It decides by the manifest alone: with it in
//! the store, the snapshot exists.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use diorama_api::{ApiError, CreateSnapshotRequest, ErrorKind, SnapshotReport};
use diorama_cut::initiator::{Input, Output};
use diorama_cut::message::Body;
use diorama_cut::{Config, Epoch, Initiator, Outcome, ParticipantId, Snapshot, SnapshotId, participant};
use diorama_qemu::process::Policy;

use super::Urgent;
use crate::Agent;
use crate::cluster::directory_error;
use crate::operation::Operation;
use crate::record::{Record, SpanRecord};
use crate::slot::Slot;
use crate::snapshot::{CapturedMachine, HostPart};

/// How often the initiator looks whether anybody still waits for the snapshot, and whether hosts are lost.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

impl Agent {
    /// Takes a snapshot of all parts at one cut.
    pub(crate) fn create_snapshot_in_cluster(
        &self,
        environment: &str,
        request: CreateSnapshotRequest,
        operation: &Operation,
    ) -> Result<SnapshotReport, ApiError> {
        let started = Instant::now();
        let cluster = self.cluster_or_error()?;
        let slot = self.slots.get(environment)?;
        let record = slot.record_if_up()?;
        let span = record.span.clone().ok_or_else(|| no_part(environment))?;
        let running = slot.state().running.as_ref().map(|running| (running.segment, running.part.clone()));
        let (segment, part) = running.ok_or_else(|| no_part(environment))?;
        let part = part.ok_or_else(|| no_part(environment))?;
        let name = self.choose_name(environment, request.name.clone())?;
        let (capture, _) = self.choose_capture(request.capture, operation)?;
        let lock = cluster.wait(cluster.directory.lock(&slot.name, "snapshot")).map_err(directory_error)?;
        let config = Config {
            capture: crate::snapshot::protocol_capture(capture),
            in_flight: crate::snapshot::protocol_in_flight(request.in_flight),
            ..Config::default()
        };
        let (inbox, inputs) = channel();
        let attempt = SnapshotId(crate::launch::random_bytes());
        let _receiving = part.receive_as_initiator(attempt, inbox);
        let post = self.post_for(&slot.name, &span, Some(lock.token()));
        let participants: Vec<ParticipantId> = (0..).map(ParticipantId).take(span.hosts.len()).collect();
        let mut initiator = Initiator::new(Epoch(record.epoch));
        let mut outputs = initiator
            .start(attempt, participants, config, started.elapsed())
            .map_err(|error| ApiError::new(ErrorKind::Internal, error.to_string()))?;
        let mut cancelled = false;
        let mut committed = None;
        let mut failure = None;
        let mut step = "";
        // Between the first host that is told to cut and the last there must not be a guest's time slice.
        let mut urgent = Some(Urgent::begin(Policy::Normal { nice: 0 }));
        let mut reached = "";
        let outcome = loop {
            let mut ended = None;
            let mut next = Vec::new();
            if initiator.state_name() != reached {
                reached = initiator.state_name();
                crate::failpoint::reach(format_args!("initiator {reached}"));
                if !matches!(reached, "preparing" | "taking") {
                    urgent = None;
                }
            }
            if let Some(epoch) = asks_to_take(&outputs) {
                self.plane.tell(move |plane| plane.call_for_cut(segment, epoch));
                // The part of this host hears of it as those of others do. The message comes past a lock that an ordinary thread may
                // hold, which waits for a processor.
                part.feed(participant::Input::NewerColourSeen { epoch: Epoch(epoch.0) });
                crate::failpoint::reach(format_args!("initiator called"));
            }
            for output in outputs {
                match output {
                    Output::Send { to, message } => post(to, message),
                    Output::WriteManifest { snapshot } => {
                        let cut = snapshot.cut;
                        // A lock that was lost: somebody else may be changing the environment's hosts.
                        let written = lock
                            .check()
                            .map_err(|lost| ApiError::new(ErrorKind::CutFailed, lost.to_string()))
                            .and_then(|_| self.commit_parts(&record, &span, (&name, &request), &snapshot));
                        let input = match written {
                            Ok(id) => {
                                committed = Some(id);
                                Input::ManifestWritten { cut }
                            }
                            Err(error) => {
                                let detail = error.message.clone();
                                failure.get_or_insert(error);
                                Input::ManifestFailed { cut, detail }
                            }
                        };
                        next.extend(initiator.handle(input, started.elapsed()));
                    }
                    Output::LookUpOutcome { from, cut } => {
                        if let Ok(found) = self.store.find_attempt(&cut.snapshot.to_string()) {
                            let input = Input::OutcomeLookedUp { to: from, cut, committed: found.is_some() };
                            next.extend(initiator.handle(input, started.elapsed()));
                        }
                    }
                    Output::Rejected { from, violation } => {
                        tracing::warn!(%from, ?violation, "a message broke the snapshot protocol");
                    }
                    Output::Done { outcome, .. } => ended = Some(outcome),
                }
            }
            if let Some(outcome) = ended {
                break outcome;
            }
            if !next.is_empty() {
                outputs = next;
                continue;
            }
            if initiator.state_name() != step {
                step = initiator.state_name();
                operation.step(step);
            }
            let due = initiator.poll_timeout().map(|due| due.saturating_sub(started.elapsed()));
            let wait = due.map_or(LOOK_INTERVAL, |due| due.min(LOOK_INTERVAL));
            outputs = match inputs.recv_timeout(wait) {
                Ok(mut input) => {
                    self.in_our_time(&mut input, &span);
                    initiator.handle(input, started.elapsed())
                }
                Err(RecvTimeoutError::Timeout) => {
                    let mut outputs = Vec::new();
                    for (number, host) in (0..).map(ParticipantId).zip(&span.hosts) {
                        if cluster.is_lost(&host.name) {
                            outputs.extend(
                                initiator.handle(Input::PeerLost { peer: number }, started.elapsed()),
                            );
                        }
                    }
                    // Another host may act on the environment from now on, and this one could write no manifest.
                    let lost = lock.check().err();
                    if (operation.is_cancelled() || lost.is_some()) && !cancelled {
                        cancelled = true;
                        if let Some(lost) = lost {
                            failure.get_or_insert(ApiError::new(ErrorKind::CutFailed, lost.to_string()));
                        }
                        outputs.extend(initiator.handle(Input::Cancel, started.elapsed()));
                    }
                    outputs.extend(initiator.handle(Input::Tick, started.elapsed()));
                    outputs
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ApiError::new(ErrorKind::CutFailed, "the environment was stopped meanwhile"));
                }
            };
        };
        drop(urgent);
        if let Err(error) = cluster.wait(lock.release()) {
            tracing::warn!(%error, "a lock is given back later");
        }
        match (outcome, committed, failure) {
            (Outcome::Committed, Some(id), _) => {
                let create_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.note_created(&id, create_ms);
                self.report_snapshot(&id)
            }
            (_, _, Some(error)) => Err(error),
            (Outcome::Aborted(reason), _, None) => {
                operation.check()?;
                Err(ApiError::new(
                    ErrorKind::CutFailed,
                    format!("the snapshot failed: {}", named(&reason.to_string(), &span)),
                )
                .hint("the machines run on; nothing of it remains"))
            }
            _ => Err(ApiError::new(ErrorKind::Internal, "the snapshot protocol ended without an outcome")),
        }
    }

    /// Puts the instants of other hosts' cuts on this host's clock.
    fn in_our_time(&self, input: &mut Input, span: &SpanRecord) {
        let Input::Message { from, message } = input else { return };
        let (Body::Taken(taken), Some(host)) = (&mut message.body, span.hosts.get(from.0 as usize)) else {
            return;
        };
        if from.0 != span.me {
            for machine in &mut taken.machines {
                machine.cut_at_us = self.clocks.ours(&host.name, machine.cut_at_us);
            }
        }
    }

    /// The point of no return: one manifest of all hosts' parts.
    fn commit_parts(
        &self,
        record: &Record,
        span: &SpanRecord,
        (name, request): (&str, &CreateSnapshotRequest),
        snapshot: &Snapshot,
    ) -> Result<diorama_store::SnapshotId, ApiError> {
        let mut machines = BTreeMap::new();
        let mut parts: Vec<HostPart> = Vec::new();
        for report in snapshot.parts.values().flat_map(|part| &part.report.machines) {
            let captured: CapturedMachine = serde_json::from_slice(&report.captured).map_err(|error| {
                ApiError::new(
                    ErrorKind::CutFailed,
                    format!("the report of machine {}: {error}", report.machine),
                )
            })?;
            parts.extend(captured.host);
            machines.insert(report.machine.clone(), captured.machine);
        }
        self.commit_snapshot_of_parts(record, span, (name, request), snapshot, (machines, parts))
    }

    /// A participant asks about a cut after its initiator has ended.
    pub(super) fn answer_late(&self, slot: &Slot, input: Input) {
        let state = slot.state();
        let Some(record) = &state.record else { return };
        let Some(span) = record.span.clone() else { return };
        let mut initiator = Initiator::new(Epoch(record.epoch));
        drop(state);
        let post = self.post_for(&slot.name, &span, None);
        let mut outputs = initiator.handle(input, Duration::ZERO);
        while let Some(output) = outputs.pop() {
            match output {
                Output::Send { to, message } => post(to, message),
                // What nobody can tell now is asked again.
                Output::LookUpOutcome { from, cut } => {
                    if let Ok(found) = self.store.find_attempt(&cut.snapshot.to_string()) {
                        let input = Input::OutcomeLookedUp { to: from, cut, committed: found.is_some() };
                        outputs.extend(initiator.handle(input, Duration::ZERO));
                    }
                }
                _ => {}
            }
        }
    }
}

/// The epoch that hosts are asked to cut at, if they are.
fn asks_to_take(outputs: &[Output]) -> Option<diorama_switch::Epoch> {
    outputs.iter().find_map(|output| match output {
        Output::Send { message, .. } if matches!(message.body, Body::Take) => {
            Some(diorama_switch::Epoch(message.cut.epoch.0))
        }
        _ => None,
    })
}

fn no_part(environment: &str) -> ApiError {
    ApiError::new(ErrorKind::WrongState, format!("this host has no part of environment `{environment}`"))
        .hint("`diorama status` shows where its machines are")
}

/// Names hosts in a text that speaks of participants by number.
fn named(text: &str, span: &SpanRecord) -> String {
    let mut text = text.to_owned();
    for (number, host) in span.hosts.iter().enumerate() {
        text = text.replace(&format!("participant {number}"), &format!("host {}", host.name));
    }
    text
}
