//! What the hosts do for the protocol: the eight steps, the captures, the manifest, and the messages.

use super::*;
use crate::scenario::Sabotage;
use diorama_cut::report::{MachineCut, MachineReport, Snapshot, Taken};

impl Simulation {
    pub(super) fn start(&mut self) {
        let number = self.judge.attempt();
        let mut name = [0; 16];
        name[..4].copy_from_slice(&number.to_be_bytes());
        name[4..12].copy_from_slice(&self.scenario.seed.to_be_bytes());
        self.attempts.push(AttemptFigures { number, started_ns: self.now_ns, ..AttemptFigures::default() });
        let everybody: Vec<_> = (0..self.hosts.len() as u32).map(ParticipantId).collect();
        let config = self.scenario.config.clone();
        let now = self.hosts[0].clock(self.now_ns);
        let Some(initiator) = &mut self.hosts[0].initiator else { return };
        let outputs = initiator.start(SnapshotId(name), everybody, config, now).expect("it is idle");
        self.initiator_outputs(0, outputs);
        self.schedule_wakes(0);
    }

    pub(super) fn feed_initiator(&mut self, id: usize, input: initiator::Input) {
        let now = self.hosts[id].clock(self.now_ns);
        let Some(initiator) = &mut self.hosts[id].initiator else { return };
        let outputs = initiator.handle(input, now);
        self.initiator_outputs(id, outputs);
        self.schedule_wakes(id);
    }

    pub(super) fn feed_participant(&mut self, id: usize, input: participant::Input) {
        let host = &mut self.hosts[id];
        let now = host.clock(self.now_ns);
        let outputs = host.participant.handle(input, now);
        if let Some(doubt) = host.participant.in_doubt() {
            host.durable.in_doubt = Some(doubt);
        }
        for output in outputs {
            self.participant_output(id, output);
        }
        self.schedule_wakes(id);
    }

    /// Sets timers for what the state machines wait for. One that comes too early does no harm.
    pub(super) fn schedule_wakes(&mut self, id: usize) {
        let host = &self.hosts[id];
        let (life, ahead) = (host.life, host.clock_ahead_ns);
        let initiator = host.initiator.as_ref().and_then(|initiator| initiator.poll_timeout());
        let due = [host.participant.poll_timeout(), initiator];
        for (which, due) in due.into_iter().enumerate() {
            let Some(due) = due else { continue };
            let due_ns = to_ns(due).saturating_sub(ahead).max(self.now_ns);
            if self.wakes[id][which].is_none_or(|set| due_ns < set || set < self.now_ns) {
                self.wakes[id][which] = Some(due_ns);
                self.after(due_ns - self.now_ns, Event::Wake { host: id, life, initiator: which == 1 });
            }
        }
    }

    pub(super) fn work_done(&mut self, id: usize, work: Done) {
        let under_way = |host: &Host, cut| host.cutting.is_some_and(|cutting| cutting.cut == cut);
        let fails = self.random.chance_ppm(self.scenario.faults.work_fails_ppm);
        let detail = || String::from("injected");
        match work {
            Done::Prepared(snapshot) if fails => {
                self.feed_participant(id, participant::Input::PrepareFailed { snapshot, detail: detail() });
            }
            Done::Prepared(_) if !self.hosts[id].has_joined_all() => self.work(id, (5 * MS, 5 * MS), work),
            Done::Prepared(snapshot) => {
                self.hosts[id].reserve_epoch(snapshot);
                self.feed_participant(id, participant::Input::Prepared { snapshot });
            }
            Done::Stopped(cut) if under_way(&self.hosts[id], cut) => {
                if fails {
                    return self
                        .feed_participant(id, participant::Input::CutFailed { cut, detail: detail() });
                }
                // What a machine had sent when it was stopped is read now, and is of the old colour.
                let machines: Vec<_> =
                    self.hosts[id].layout.machines.iter().map(|&(machine, _)| machine).collect();
                for machine in machines {
                    if self.random.below(4) == 0 {
                        self.send_now(machine, None);
                    }
                }
                // A frame that was let in meanwhile can have ended this cut.
                if let Some(cutting) = self.hosts[id].cutting.as_mut().filter(|cutting| cutting.cut == cut) {
                    cutting.stopped = true;
                    self.cut_next(id, cut, 0);
                }
            }
            Done::CutMachine(cut, at) if under_way(&self.hosts[id], cut) => {
                self.hosts[id].cut_machine(at, cut, self.now_ns);
                let attempt = attempt_of(cut);
                self.judge.cut(self.hosts[id].layout.machines[at].0, attempt);
                let figures = &mut self.attempts[attempt as usize];
                figures.first_cut_ns.get_or_insert(self.now_ns);
                figures.last_cut_ns = Some(self.now_ns);
                self.cut_next(id, cut, at + 1);
            }
            Done::Released(cut) if under_way(&self.hosts[id], cut) => self.released(id, cut),
            Done::Captured(cut) if self.hosts[id].participant.active() == Some(cut) => {
                let input = if fails {
                    participant::Input::CaptureFailed { cut, detail: detail() }
                } else {
                    participant::Input::CaptureDone { cut, machines: self.machine_reports(id) }
                };
                self.feed_participant(id, input);
            }
            Done::Recorded(cut, networks) => {
                self.feed_participant(id, participant::Input::RecordingStopped { cut, networks });
            }
            Done::Finished(cut) => {
                self.hosts[id].durable.in_doubt = None;
                self.feed_participant(id, participant::Input::Finished { cut });
            }
            Done::Manifest(cut) if fails => {
                self.feed_initiator(id, initiator::Input::ManifestFailed { cut, detail: detail() });
            }
            Done::Manifest(cut) => {
                self.manifest_exists(cut);
                self.feed_initiator(id, initiator::Input::ManifestWritten { cut });
            }
            // Of a cut that was given up.
            Done::Stopped(_) | Done::CutMachine(..) | Done::Released(_) | Done::Captured(_) => {}
        }
        self.pump(id);
    }

    pub(super) fn manifest_exists(&mut self, cut: CutId) {
        let attempt = attempt_of(cut);
        self.manifests.insert(attempt);
        if let Err(verdict) = self.judge.judge_cut(attempt) {
            self.failure.get_or_insert(verdict.into());
        }
    }

    /// Tells the participant how many frames of older colours have come: from one host or all.
    pub(super) fn tell_received(&mut self, id: usize, from: Option<usize>) {
        let host = &self.hosts[id];
        let Some(cut) = host.recording.filter(|_| host.cutting.is_none()) else { return };
        let counts = match from {
            Some(peer) => host.received_from(peer, cut),
            None => host.received_before(cut),
        };
        for (channel, received, known_lost) in counts {
            let input = participant::Input::OldColourReceived { cut, channel, received, known_lost };
            self.feed_participant(id, input);
        }
    }

    fn cut_next(&mut self, id: usize, cut: CutId, at: usize) {
        let work = &self.scenario.work;
        if at < self.hosts[id].layout.machines.len() {
            self.work(id, work.cut_each_ns, Done::CutMachine(cut, at));
        } else {
            self.work(id, work.save_ns, Done::Released(cut));
        }
    }

    fn released(&mut self, id: usize, cut: CutId) {
        let stall_ns = self.hosts[id].release(self.now_ns);
        let figures = &mut self.attempts[attempt_of(cut) as usize];
        figures.slowest_local_cut_ns = figures.slowest_local_cut_ns.max(stall_ns);
        let stall_us = stall_ns / 1000;
        let machines = self.hosts[id].layout.machines.iter().map(|(machine, _)| MachineCut {
            machine: format!("m{machine}"),
            cut_at_us: self.now_ns / 1000,
            pause_us: stall_us / 2,
            stall_us,
        });
        let taken = Taken { machines: machines.collect(), sent: self.hosts[id].sent_before(cut) };
        self.work(id, self.scenario.work.capture_ns, Done::Captured(cut));
        self.feed_participant(id, participant::Input::CutDone { cut, taken });
        self.tell_received(id, None);
    }

    fn machine_reports(&self, id: usize) -> Vec<MachineReport> {
        let machines = self.hosts[id].layout.machines.iter();
        // What stands in a manifest of a machine is some hundreds of bytes; they are not counted here.
        machines
            .map(|(machine, _)| MachineReport { machine: format!("m{machine}"), captured: vec![] })
            .collect()
    }

    fn work(&mut self, host: usize, takes_ns: (u64, u64), work: Done) {
        let takes = self.random.within(takes_ns);
        let life = self.hosts[host].life;
        self.after(takes, Event::Work { host, life, work });
    }

    fn participant_output(&mut self, id: usize, output: participant::Output) {
        let work = self.scenario.work.clone();
        match output {
            participant::Output::Send { to, message } => self.post(id, to.0 as usize, true, message),
            participant::Output::StartPrepare { snapshot, .. } => {
                let cut = self.hosts[id].participant.active().expect("a cut");
                for &(machine, _) in &self.hosts[id].layout.machines {
                    self.judge.takes_part(machine, attempt_of(cut));
                }
                self.work(id, work.prepare_ns, Done::Prepared(snapshot));
            }
            participant::Output::StartCut { cut } => {
                self.hosts[id].begin_cut(cut, self.now_ns);
                self.work(id, work.drain_ns, Done::Stopped(cut));
            }
            participant::Output::StopRecording { cut, missing } => {
                self.hosts[id].close_channels(cut, &missing);
                let (recording, accounts) = self.hosts[id].end_recording(cut);
                let attempt = attempt_of(cut);
                let figures = &mut self.attempts[attempt as usize];
                figures.closed_ns = Some(self.now_ns);
                figures.in_flight += recording.frames.len() as u64;
                let skip = usize::from(self.scenario.sabotage == Some(Sabotage::LoseARecordedFrame));
                for frame in recording.frames.iter().skip(skip) {
                    let (machine, _) = self.hosts[id].layout.machines[frame.to.0 as usize];
                    self.judge.recorded(attempt, read_frame(&frame.bytes).1, machine);
                }
                self.work(id, (MS / 2, 2 * MS), Done::Recorded(cut, accounts));
            }
            participant::Output::Keep { cut } => {
                let attempt = attempt_of(cut);
                self.kept.insert((id, attempt));
                if !self.manifests.contains(&attempt) {
                    let (did, is) = ("kept", "does not exist");
                    self.failure = Some(Failure::NotAllOrNothing { attempt, host: id, did, is });
                }
                self.work(id, work.finish_ns, Done::Finished(cut));
            }
            participant::Output::Discard { cut, epoch, .. } => {
                let attempt = attempt_of(cut);
                if self.manifests.contains(&attempt) {
                    let (did, is) = ("discarded", "exists");
                    self.failure = Some(Failure::NotAllOrNothing { attempt, host: id, did, is });
                }
                self.hosts[id].abandon(epoch, self.now_ns);
                self.work(id, work.finish_ns, Done::Finished(cut));
            }
            participant::Output::RaiseEpoch { epoch } => {
                self.hosts[id].raise(epoch, self.now_ns);
            }
            participant::Output::Rejected { from, violation } => {
                panic!("host {id} rejects a message of {from}: {violation}")
            }
        }
        // What was released goes, when this event is done with.
        self.to_pump.insert(id);
    }

    fn initiator_outputs(&mut self, id: usize, outputs: Vec<initiator::Output>) {
        for output in outputs {
            match output {
                initiator::Output::Send { to, message } => self.post(id, to.0 as usize, false, message),
                initiator::Output::WriteManifest { snapshot } => self.write_manifest(id, snapshot),
                initiator::Output::LookUpOutcome { from, cut } => {
                    let committed = self.manifests.contains(&attempt_of(cut));
                    self.feed_initiator(id, initiator::Input::OutcomeLookedUp { to: from, cut, committed });
                }
                initiator::Output::Done { cut, outcome, unsettled } => {
                    let attempt = attempt_of(cut);
                    let committed = outcome == diorama_cut::Outcome::Committed;
                    let figures = &mut self.attempts[attempt as usize];
                    figures.done_ns = Some(self.now_ns);
                    figures.unsettled = unsettled.len();
                    if committed != self.manifests.contains(&attempt) {
                        let (did, is) = ("was told otherwise of", "is so");
                        self.failure = Some(Failure::NotAllOrNothing { attempt, host: id, did, is });
                    }
                }
                initiator::Output::Rejected { from, violation } => {
                    panic!("the initiator rejects a message of {from}: {violation}")
                }
            }
        }
    }

    fn write_manifest(&mut self, id: usize, snapshot: Snapshot) {
        let attempt = attempt_of(snapshot.cut);
        let figures = &mut self.attempts[attempt as usize];
        figures.reported_ns = Some(self.now_ns);
        for (network, frames) in snapshot.networks() {
            figures.sent_before += frames.sent_before;
            figures.wire_loss += frames.dropped.wire_loss;
            let unaccounted = frames.unaccounted();
            // What is broken on purpose is left to the judge.
            if unaccounted != 0 && self.scenario.sabotage.is_none() {
                self.failure = Some(Failure::Unaccounted { attempt, network: network.0, unaccounted });
            }
        }
        self.work(id, self.scenario.work.manifest_ns, Done::Manifest(snapshot.cut));
    }

    fn post(&mut self, from: usize, to: usize, to_initiator: bool, message: Message) {
        let bytes = serde_json::to_vec(&message).expect("messages can be written").len() as u64;
        let attempt = attempt_of(message.cut) as usize;
        let figures = &mut self.attempts[attempt];
        figures.messages += 1;
        figures.bytes += bytes;
        match &message.body {
            Body::Take => {
                figures.take_ns.get_or_insert(self.now_ns);
            }
            Body::Expect { .. } => {
                figures.all_taken_ns.get_or_insert(self.now_ns);
            }
            _ => {}
        }
        self.note(&[8, from as u64, to as u64, bytes]);
        let message = Rc::new(message);
        for delay in self.underlay.message(from, to, &mut self.random).into_iter().flatten() {
            let message = Rc::clone(&message);
            self.after(delay, Event::Message { from, to, to_initiator, message });
        }
    }
}
