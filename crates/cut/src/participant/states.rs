//! The participant's transitions.

use std::{collections::BTreeMap, mem, time::Duration};

use super::*;
use crate::message::{MAX_CHANNELS, PROTOCOL_VERSION, Prepare, bounded_detail};
use crate::report::ChannelCount;

impl Participant {
    pub(super) fn apply(&mut self, input: Input, now: Duration, out: &mut Vec<Output>) {
        match input {
            Input::Message { from, message } => self.message(from, message, now, out),
            Input::Prepared { snapshot } => {
                if let State::Preparing(terms) = &self.state
                    && terms.cut.snapshot == snapshot
                {
                    let terms = terms.clone();
                    self.send_prepared(&terms, out);
                    self.state = State::Prepared(terms);
                }
            }
            Input::PrepareFailed { snapshot, detail } => {
                if let State::Preparing(terms) = &self.state
                    && terms.cut.snapshot == snapshot
                {
                    self.fail(FailReason::Prepare { detail: bounded_detail(detail) }, out);
                }
            }
            Input::CutDone { cut, taken } => self.cut_done(cut, taken, out),
            Input::CutFailed { cut, detail } => {
                if matches!(&self.state, State::Cutting { terms, .. } if terms.cut == cut) {
                    self.fail(FailReason::Cut { detail: bounded_detail(detail) }, out);
                }
            }
            Input::CaptureDone { cut, machines } => {
                if let State::Capturing { terms, capture } = &mut self.state
                    && terms.cut == cut
                {
                    capture.machines = Some(machines);
                    self.report_if_complete(now, out);
                }
            }
            Input::CaptureFailed { cut, detail } => {
                let undecided = match &self.state {
                    State::Cutting { terms, .. } | State::Capturing { terms, .. } => terms.cut == cut,
                    _ => false,
                };
                if undecided {
                    self.fail(FailReason::Capture { detail: bounded_detail(detail) }, out);
                }
            }
            Input::OldColourReceived { cut, channel, received, known_lost } => {
                self.old_colour_received(cut, channel, (received, known_lost), now, out);
            }
            Input::RecordingStopped { cut, networks } => {
                if let State::Capturing { terms, capture } = &mut self.state
                    && terms.cut == cut
                    && capture.recording == Recording::Stopping
                {
                    capture.recording = Recording::Stopped(networks);
                    self.report_if_complete(now, out);
                }
            }
            Input::Finished { cut } => self.finished(cut, out),
            Input::NewerColourSeen { epoch } => self.newer_colour(epoch, out),
            Input::OutcomeFound { cut, committed } => {
                if self.in_doubt().is_some_and(|(doubtful, _)| doubtful == cut) {
                    if committed { self.keep(out) } else { self.abort(AbortReason::NoManifest, out) }
                }
            }
            Input::Cancel => {
                if self.terms().is_some() {
                    self.fail(FailReason::Cancelled, out);
                }
            }
            Input::PeerLost { peer } => {
                // Another participant's loss is the initiator's to judge.
                if self.terms().is_some_and(|terms| terms.initiator == peer) {
                    self.fail(FailReason::InitiatorLost, out);
                }
            }
            Input::Tick => {}
        }
    }

    pub(super) fn fire_timers(&mut self, now: Duration, out: &mut Vec<Output>) {
        if let Some(terms) = self.terms()
            && now >= terms.deadline
        {
            let deadline_ms = terms.deadline_ms;
            self.fail(FailReason::DeadlinePassed { deadline_ms }, out);
        }
        self.stop_recording_if_complete(now, out);
        if let State::InDoubt { cut, initiator, query, .. } = &mut self.state
            && query.fire(now)
        {
            out.push(Output::Send { to: *initiator, message: Message::new(*cut, Body::Query) });
        }
    }

    fn message(&mut self, from: ParticipantId, message: Message, now: Duration, out: &mut Vec<Output>) {
        let cut = message.cut;
        if let Err(violation) = message.check() {
            if let Violation::Version { got } = violation {
                let reason = FailReason::UnsupportedVersion { got, speaks: PROTOCOL_VERSION };
                send(from, cut, Body::Failed { reason }, out);
            }
            out.push(Output::Rejected { from, violation });
            return;
        }
        if self.active().is_some_and(|active| active.snapshot == cut.snapshot)
            && self.initiator() != Some(from)
        {
            out.push(Output::Rejected { from, violation: Violation::Stranger });
            return;
        }
        match message.body {
            Body::Prepare(prepare) => self.prepare(from, cut, prepare, now, out),
            Body::Take => match &self.state {
                State::Prepared(terms) if terms.cut == cut => self.start_cut(out),
                State::Capturing { terms, capture } if terms.cut == cut => {
                    send(from, cut, Body::Taken(capture.taken.clone()), out);
                }
                _ => self.answer_ended(from, cut, out),
            },
            Body::Expect { incoming } => self.expect(from, cut, incoming, now, out),
            Body::Commit => match &self.state {
                State::InDoubt { cut: doubtful, .. } if *doubtful == cut => self.keep(out),
                State::Keeping { cut: kept, .. } if *kept == cut => {}
                _ if self.active() == Some(cut) || self.gave_up(cut) => {
                    self.reject(from, "Commit", out);
                }
                _ => send(from, cut, Body::CommitDone, out),
            },
            Body::Abort { reason } => self.aborted(from, cut, reason, out),
            Body::Prepared { .. }
            | Body::EpochBehind { .. }
            | Body::Taken(_)
            | Body::Report(_)
            | Body::CommitDone
            | Body::AbortDone
            | Body::Failed { .. }
            | Body::Query => self.reject(from, message.body.name(), out),
        }
    }

    fn prepare(
        &mut self,
        from: ParticipantId,
        cut: CutId,
        prepare: Prepare,
        now: Duration,
        out: &mut Vec<Output>,
    ) {
        if self.active().is_some_and(|active| active.snapshot == cut.snapshot) {
            return self.prepare_again(cut, out);
        }
        match &self.state {
            State::Idle => self.begin(from, cut, prepare, now, out),
            State::InDoubt { cut: doubtful, initiator, .. } => {
                // Whoever begins anew has decided, or restarted. Learn the outcome now; this Prepare comes again.
                out.push(Output::Send { to: *initiator, message: Message::new(*doubtful, Body::Query) });
            }
            State::Keeping { .. } | State::Discarding { .. } => {
                // Soon Idle; this Prepare comes again.
            }
            State::Preparing(terms) | State::Prepared(terms) => {
                self.prepare_another(from, cut, terms.clone(), out)
            }
            State::Cutting { terms, .. } | State::Capturing { terms, .. } => {
                self.prepare_another(from, cut, terms.clone(), out);
            }
        }
    }

    /// A repetition, or the same attempt at a higher epoch; what the host did for it still holds, unless it has cut already.
    fn prepare_again(&mut self, cut: CutId, out: &mut Vec<Output>) {
        let ready = matches!(self.state, State::Prepared(_));
        match &mut self.state {
            State::Preparing(terms) | State::Prepared(terms) if cut.epoch >= terms.cut.epoch => {
                terms.cut = cut;
                if ready {
                    let terms = terms.clone();
                    self.send_prepared(&terms, out);
                }
            }
            // A frame had begun the cut, of a host that came back from a crash at the epoch that was proposed. The attempt
            // goes on above it: leave, and take part again when this Prepare is repeated.
            State::Cutting { terms, .. } | State::Capturing { terms, .. } if cut.epoch > terms.cut.epoch => {
                self.fail(FailReason::Superseded { by: cut }, out);
            }
            // The same, before the initiator has heard that this host is prepared. If it takes already, this is late.
            State::Cutting { terms, .. } | State::Capturing { terms, .. } if cut == terms.cut => {
                send(terms.initiator, cut, Body::EpochBehind { floor: cut.epoch }, out);
            }
            _ => {}
        }
    }

    /// A Prepare while an undecided cut is active.
    fn prepare_another(&mut self, from: ParticipantId, cut: CutId, active: Terms, out: &mut Vec<Output>) {
        if from != active.initiator {
            send(from, cut, Body::Failed { reason: FailReason::Busy { with: active.cut } }, out);
        } else if cut.epoch > active.cut.epoch {
            // An initiator runs one cut at a time: it has given up the active one, which has no report of ours.
            self.fail(FailReason::Superseded { by: cut }, out);
        } else {
            // Late, or its initiator restarted and does not know the epoch in use: let it come back above.
            send(from, cut, Body::EpochBehind { floor: active.cut.epoch }, out);
        }
    }

    fn begin(
        &mut self,
        from: ParticipantId,
        cut: CutId,
        prepare: Prepare,
        now: Duration,
        out: &mut Vec<Output>,
    ) {
        if prepare.participants.binary_search(&self.me).is_err() {
            send(from, cut, Body::Failed { reason: FailReason::NotListed }, out);
        } else if let Some((ended, End::Failed(reason))) = &self.last
            && *ended == cut
        {
            send(from, cut, Body::Failed { reason: reason.clone() }, out);
        } else if cut.epoch <= self.floor {
            send(from, cut, Body::EpochBehind { floor: self.floor }, out);
        } else {
            out.push(Output::StartPrepare {
                snapshot: cut.snapshot,
                capture: prepare.capture,
                in_flight: prepare.in_flight,
            });
            self.state = State::Preparing(Terms {
                cut,
                initiator: from,
                participants: prepare.participants,
                deadline: now.saturating_add(Duration::from_millis(prepare.deadline_ms)),
                deadline_ms: prepare.deadline_ms,
                in_flight_deadline: Duration::from_millis(prepare.in_flight_deadline_ms),
            });
        }
    }

    fn start_cut(&mut self, out: &mut Vec<Output>) {
        let State::Prepared(terms) = &self.state else { return };
        let terms = terms.clone();
        // From here on some machine may be past the cut, whatever else happens.
        self.epoch = terms.cut.epoch;
        self.floor = self.floor.max(self.epoch);
        out.push(Output::StartCut { cut: terms.cut });
        self.state = State::Cutting { terms, received: Received::new() };
    }

    fn newer_colour(&mut self, seen: Epoch, out: &mut Vec<Output>) {
        if seen <= self.epoch {
            return;
        }
        match &self.state {
            State::Prepared(terms) if terms.cut.epoch == seen => return self.start_cut(out),
            State::Preparing(terms) | State::Prepared(terms) if terms.cut.epoch > seen => {}
            // Others are past a cut that this host is not ready for: the cut cannot succeed any more.
            State::Preparing(_) | State::Prepared(_) | State::Cutting { .. } | State::Capturing { .. } => {
                self.epoch = seen;
                self.floor = self.floor.max(seen);
                return self.fail(FailReason::Overtaken { seen }, out);
            }
            State::Idle | State::InDoubt { .. } | State::Keeping { .. } | State::Discarding { .. } => {}
        }
        self.epoch = seen;
        self.floor = self.floor.max(seen);
        out.push(Output::RaiseEpoch { epoch: seen });
    }

    fn cut_done(&mut self, cut: CutId, mut taken: Taken, out: &mut Vec<Output>) {
        let State::Cutting { terms, received } = &mut self.state else { return };
        if terms.cut != cut {
            return;
        }
        taken.sent.sort_by_key(|count| count.channel);
        let message = Message::new(cut, Body::Taken(taken.clone()));
        if let Err(violation) = message.check() {
            return self.fail(FailReason::Cut { detail: violation.to_string() }, out);
        }
        out.push(Output::Send { to: terms.initiator, message });
        let capture =
            Capture { taken, received: mem::take(received), machines: None, recording: Recording::Open };
        self.state = State::Capturing { terms: terms.clone(), capture };
    }

    fn old_colour_received(
        &mut self,
        cut: CutId,
        channel: Channel,
        count: (u64, u64),
        now: Duration,
        out: &mut Vec<Output>,
    ) {
        let (terms, received) = match &mut self.state {
            State::Cutting { terms, received } => (terms, received),
            State::Capturing { terms, capture } => (terms, &mut capture.received),
            _ => return,
        };
        if terms.cut != cut || terms.participants.binary_search(&channel.peer).is_err() {
            return;
        }
        if received.len() >= MAX_CHANNELS && !received.contains_key(&channel) {
            return;
        }
        let known = received.entry(channel).or_default();
        if count.0 >= known.0 {
            *known = count;
        }
        self.stop_recording_if_complete(now, out);
    }

    fn expect(
        &mut self,
        from: ParticipantId,
        cut: CutId,
        incoming: Vec<ChannelCount>,
        now: Duration,
        out: &mut Vec<Output>,
    ) {
        match &mut self.state {
            State::Capturing { terms, capture } if terms.cut == cut => {
                if capture.recording != Recording::Open {
                    return;
                }
                let stranger = incoming.iter().map(|count| count.channel).find(|channel| {
                    channel.peer == self.me || terms.participants.binary_search(&channel.peer).is_err()
                });
                if let Some(Channel { peer, network }) = stranger {
                    out.push(Output::Rejected {
                        from,
                        violation: Violation::Channel { peer, network: network.0 },
                    });
                    return;
                }
                capture.recording = Recording::Expecting {
                    copies: incoming.into_iter().map(|count| (count.channel, count.copies)).collect(),
                    deadline: now.saturating_add(terms.in_flight_deadline),
                };
                self.stop_recording_if_complete(now, out);
            }
            State::InDoubt { cut: doubtful, report, .. } if *doubtful == cut => {
                let body = match report {
                    Some(report) => Body::Report(report.clone()),
                    // If the initiator has it after all, it ignores this.
                    None => Body::Failed { reason: FailReason::ReportLost },
                };
                send(from, cut, body, out);
            }
            _ => self.answer_ended(from, cut, out),
        }
    }

    fn stop_recording_if_complete(&mut self, now: Duration, out: &mut Vec<Output>) {
        let State::Capturing { terms, capture } = &mut self.state else { return };
        let Recording::Expecting { copies, deadline } = &capture.recording else { return };
        let seen = |channel: &Channel| capture.received.get(channel).copied().unwrap_or_default();
        let complete = copies.iter().all(|(channel, &sent)| {
            let (received, known_lost) = seen(channel);
            received.saturating_add(known_lost) >= sent
        });
        if !complete && now < *deadline {
            return;
        }
        let missing: BTreeMap<Channel, u64> = copies
            .iter()
            .map(|(&channel, &sent)| (channel, sent.saturating_sub(seen(&channel).0)))
            .filter(|&(_, missing)| missing > 0)
            .collect();
        capture.recording = Recording::Stopping;
        out.push(Output::StopRecording { cut: terms.cut, missing });
    }

    fn report_if_complete(&mut self, now: Duration, out: &mut Vec<Output>) {
        let State::Capturing { terms, capture } = &mut self.state else { return };
        let Recording::Stopped(networks) = &mut capture.recording else { return };
        let Some(machines) = &mut capture.machines else { return };
        let report = Report { machines: mem::take(machines), networks: mem::take(networks) };
        let (cut, initiator) = (terms.cut, terms.initiator);
        let message = Message::new(cut, Body::Report(report.clone()));
        if let Err(violation) = message.check() {
            return self.fail(FailReason::Capture { detail: violation.to_string() }, out);
        }
        out.push(Output::Send { to: initiator, message });
        self.state =
            State::InDoubt { cut, initiator, report: Some(report), query: Retry::new(now, QUERY_WAIT) };
    }

    fn aborted(&mut self, from: ParticipantId, cut: CutId, reason: AbortReason, out: &mut Vec<Output>) {
        let Some(active) = self.active().filter(|active| active.snapshot == cut.snapshot) else {
            if self.last == Some((cut, End::Committed)) {
                return self.reject(from, "Abort", out);
            }
            // It may have overtaken its Prepare: never begin this cut.
            if self.active().is_none() {
                self.floor = self.floor.max(cut.epoch);
            }
            return send(from, cut, Body::AbortDone, out);
        };
        match &mut self.state {
            // Of a lower epoch of this attempt; the attempt went on.
            _ if cut.epoch < active.epoch => {}
            State::Keeping { .. } => self.reject(from, "Abort", out),
            State::Discarding { cut: discarded, end, .. } => {
                *discarded = cut;
                *end = End::Aborted;
                self.floor = self.floor.max(cut.epoch);
            }
            State::InDoubt { .. } if cut != active => self.reject(from, "Abort", out),
            _ => {
                if let State::Preparing(terms) | State::Prepared(terms) = &mut self.state {
                    terms.cut = cut;
                }
                self.abort(reason, out);
            }
        }
    }

    fn finished(&mut self, cut: CutId, out: &mut Vec<Output>) {
        let (to, ended, end, answer) = match &self.state {
            State::Keeping { cut, initiator } => (*initiator, *cut, End::Committed, Some(Body::CommitDone)),
            State::Discarding { cut, initiator, end } => {
                // A cut given up by ourselves was announced by Failed; the Abort is answered when it comes.
                let answer = (*end == End::Aborted).then_some(Body::AbortDone);
                (*initiator, *cut, end.clone(), answer)
            }
            _ => return,
        };
        // An Abort may have raised the attempt's epoch after the host was told to discard.
        if ended.snapshot != cut.snapshot {
            return;
        }
        if let Some(body) = answer {
            send(to, ended, body, out);
        }
        self.last = Some((ended, end));
        self.state = State::Idle;
    }

    fn keep(&mut self, out: &mut Vec<Output>) {
        let Some((cut, initiator)) = self.in_doubt() else { return };
        out.push(Output::Keep { cut });
        self.state = State::Keeping { cut, initiator };
    }

    fn abort(&mut self, reason: AbortReason, out: &mut Vec<Output>) {
        self.discard(DiscardReason::Aborted(reason), End::Aborted, out);
    }

    /// Gives up by itself; only for a cut that is not reported.
    fn fail(&mut self, reason: FailReason, out: &mut Vec<Output>) {
        let Some(terms) = self.terms() else { return };
        send(terms.initiator, terms.cut, Body::Failed { reason: reason.clone() }, out);
        self.discard(DiscardReason::Failed(reason.clone()), End::Failed(reason), out);
    }

    fn discard(&mut self, reason: DiscardReason, end: End, out: &mut Vec<Output>) {
        let (Some(cut), Some(initiator)) = (self.active(), self.initiator()) else { return };
        // Used up, though perhaps no port ever had it.
        self.floor = self.floor.max(cut.epoch);
        out.push(Output::Discard { cut, epoch: self.epoch, reason });
        self.state = State::Discarding { cut, initiator, end };
    }

    /// Answers a request for a cut that this participant is not, or no longer, waiting in.
    fn answer_ended(&self, from: ParticipantId, cut: CutId, out: &mut Vec<Output>) {
        if self.active() == Some(cut) {
            return; // Under way, or late; the answer comes by itself.
        }
        let body = match &self.last {
            Some((ended, End::Committed)) if *ended == cut => Body::CommitDone,
            Some((ended, End::Aborted)) if *ended == cut => Body::AbortDone,
            Some((ended, End::Failed(reason))) if *ended == cut => Body::Failed { reason: reason.clone() },
            _ => Body::Failed { reason: FailReason::NotPrepared },
        };
        send(from, cut, body, out);
    }

    fn gave_up(&self, cut: CutId) -> bool {
        matches!(&self.last, Some((ended, End::Aborted | End::Failed(_))) if *ended == cut)
    }

    fn send_prepared(&self, terms: &Terms, out: &mut Vec<Output>) {
        send(terms.initiator, terms.cut, Body::Prepared { floor: self.floor }, out);
    }

    fn reject(&self, from: ParticipantId, got: &'static str, out: &mut Vec<Output>) {
        let violation = Violation::Unexpected { got, state: self.state_name() };
        out.push(Output::Rejected { from, violation });
    }

    /// The terms of a cut that this participant may still leave by itself.
    fn terms(&self) -> Option<&Terms> {
        match &self.state {
            State::Preparing(terms) | State::Prepared(terms) => Some(terms),
            State::Cutting { terms, .. } | State::Capturing { terms, .. } => Some(terms),
            State::Idle | State::InDoubt { .. } | State::Keeping { .. } | State::Discarding { .. } => None,
        }
    }

    fn initiator(&self) -> Option<ParticipantId> {
        match &self.state {
            State::Idle => None,
            State::InDoubt { initiator, .. }
            | State::Keeping { initiator, .. }
            | State::Discarding { initiator, .. } => Some(*initiator),
            _ => self.terms().map(|terms| terms.initiator),
        }
    }
}

fn send(to: ParticipantId, cut: CutId, body: Body, out: &mut Vec<Output>) {
    out.push(Output::Send { to, message: Message::new(cut, body) });
}
