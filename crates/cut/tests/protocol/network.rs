//! Several hosts on a faulty network: messages are delayed (and so reordered), lost and repeated, hosts
//! crash and come back, host work fails. Then the faults end, everything must come to rest, and another
//! snapshot must succeed. Everything follows from one seed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use diorama_cut::initiator::{self, Config, Initiator, Outcome};
use diorama_cut::message::{Epoch, Message};
use diorama_cut::participant::{self, Participant};
use diorama_cut::report::{Channel, ChannelCount, Drops, Frames, NetworkFrames, NetworkId, Taken};
use diorama_cut::{CutId, ParticipantId, SnapshotId};
use proptest::prelude::*;

const NETWORK: NetworkId = NetworkId(0);
/// Far above what any run needs: reaching it means that something never ends.
const MAX_EVENTS: usize = 60_000;

/// xorshift64*: small, seeded, good enough to choose faults.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// Chances in percent.
#[derive(Debug, Clone, Copy)]
struct Faults {
    lose: u64,
    repeat: u64,
    crash: u64,
    fail: u64,
}

const NONE: Faults = Faults { lose: 0, repeat: 0, crash: 0, fail: 0 };

#[derive(Debug, Clone)]
enum Event {
    ToInitiator {
        from: u32,
        message: Message,
    },
    ToParticipant {
        to: u32,
        message: Message,
    },
    /// An initiator's worker has ended; only if that initiator has not crashed since.
    InitiatorWork {
        life: u32,
        input: initiator::Input,
    },
    ParticipantWork {
        host: u32,
        life: u32,
        input: participant::Input,
    },
    Frame {
        from: u32,
        to: u32,
        colour: Epoch,
    },
    SendFrames,
    Fault,
    Start,
}

/// One host: the participant, what survives its crash, and its frames.
struct Host {
    participant: Participant,
    life: u32,
    in_doubt: Option<(CutId, ParticipantId)>,
    /// Written down before it is used, already when a cut is prepared: where the ports are put after a crash.
    reserved: Epoch,
    /// The ports' epoch, and the frames that wait for a newer one.
    epoch: Epoch,
    held: Vec<(u32, Epoch)>,
    /// Per peer and colour: frames sent, and received.
    sent: BTreeMap<(u32, Epoch), u64>,
    received: BTreeMap<(u32, Epoch), u64>,
    delivered: u64,
    /// The cut being recorded, delivered frames before it, and recorded frames.
    recording: Option<(CutId, u64, u64)>,
    sent_before: u64,
    wire_loss: u64,
    kept: BTreeSet<SnapshotId>,
    discarded_after_report: BTreeSet<SnapshotId>,
}

struct World {
    random: Random,
    now: Duration,
    order: u64,
    events: BTreeMap<(Duration, u64), Event>,
    faults: Faults,
    initiator: Initiator,
    initiator_life: u32,
    hosts: Vec<Host>,
    /// Snapshots whose manifest is durable: the store.
    manifests: BTreeSet<SnapshotId>,
    outcomes: BTreeMap<SnapshotId, bool>,
    cut_epochs: BTreeMap<SnapshotId, Epoch>,
    attempts: u8,
    reported: BTreeSet<SnapshotId>,
    /// The colours of the frames that the network lost.
    lost: Vec<Epoch>,
}

impl World {
    fn new(seed: u64, hosts: u32, faults: Faults) -> Self {
        let mut random = Random(seed | 1);
        for _ in 0..8 {
            random.below(2);
        }
        let hosts = (0..hosts)
            .map(|id| {
                // Hosts do not agree on the epoch at first.
                let epoch = Epoch(random.below(4) as u32);
                Host {
                    participant: Participant::new(ParticipantId(id), epoch),
                    life: 0,
                    in_doubt: None,
                    reserved: epoch,
                    epoch,
                    held: Vec::new(),
                    sent: BTreeMap::new(),
                    received: BTreeMap::new(),
                    delivered: 0,
                    recording: None,
                    sent_before: 0,
                    wire_loss: 0,
                    kept: BTreeSet::new(),
                    discarded_after_report: BTreeSet::new(),
                }
            })
            .collect::<Vec<_>>();
        let initiator = Initiator::new(hosts[0].epoch);
        Self {
            random,
            now: Duration::ZERO,
            order: 0,
            events: BTreeMap::new(),
            faults,
            initiator,
            initiator_life: 0,
            hosts,
            manifests: BTreeSet::new(),
            outcomes: BTreeMap::new(),
            cut_epochs: BTreeMap::new(),
            attempts: 0,
            reported: BTreeSet::new(),
            lost: Vec::new(),
        }
    }

    fn after(&mut self, most_ms: u64, event: Event) {
        self.order += 1;
        let delay = Duration::from_micros(self.random.below(most_ms * 1000) + 1);
        self.events.insert((self.now + delay, self.order), event);
    }

    fn post(&mut self, event: Event) {
        if self.random.percent(self.faults.repeat) {
            self.after(400, event.clone());
        }
        if !self.random.percent(self.faults.lose) {
            self.after(30, event);
        }
    }

    fn start(&mut self) {
        if self.initiator.active().is_some() {
            return;
        }
        self.attempts += 1;
        let snapshot = SnapshotId([self.attempts; 16]);
        let everybody: Vec<_> = (0..self.hosts.len() as u32).map(ParticipantId).collect();
        let config = Config {
            deadline: Duration::from_secs(3),
            // Above the longest delay of a frame, so that only lost ones are missing.
            in_flight_deadline: Duration::from_millis(70),
            retry: Duration::from_millis(40),
            settle_deadline: Duration::from_millis(600),
            ..Config::default()
        };
        let outputs = self.initiator.start(snapshot, everybody, config, self.now).unwrap();
        self.initiator_outputs(outputs);
    }

    fn step(&mut self) -> bool {
        let event_at = self.events.keys().next().copied();
        let timers = [self.initiator.poll_timeout()].into_iter();
        let timer =
            timers.chain(self.hosts.iter().map(|host| host.participant.poll_timeout())).flatten().min();
        match (event_at, timer) {
            (None, None) => return false,
            (Some(key), timer) if timer.is_none_or(|timer| key.0 <= timer) => {
                self.now = self.now.max(key.0);
                let event = self.events.remove(&key).unwrap();
                self.perform(event);
            }
            (_, Some(timer)) => {
                self.now = self.now.max(timer);
                self.feed_initiator(initiator::Input::Tick);
                for host in 0..self.hosts.len() as u32 {
                    self.feed_participant(host, participant::Input::Tick);
                }
            }
            (Some(_), None) => unreachable!(),
        }
        true
    }

    fn perform(&mut self, event: Event) {
        match event {
            Event::ToInitiator { from, message } => {
                self.feed_initiator(initiator::Input::Message { from: ParticipantId(from), message });
            }
            Event::ToParticipant { to, message } => {
                self.feed_participant(to, participant::Input::Message { from: ParticipantId(0), message });
            }
            Event::InitiatorWork { life, input } => {
                if life == self.initiator_life {
                    if let initiator::Input::ManifestWritten { cut } = &input {
                        self.manifests.insert(cut.snapshot);
                        if self.random.percent(self.faults.crash) {
                            return self.crash_initiator();
                        }
                    }
                    self.feed_initiator(input);
                }
            }
            Event::ParticipantWork { host, life, input } => {
                if life == self.hosts[host as usize].life {
                    self.work_done(host, input);
                }
            }
            Event::Frame { from, to, colour } => {
                let host = &mut self.hosts[to as usize];
                *host.received.entry((from, colour)).or_default() += 1;
                self.deliver(to, from, colour);
            }
            Event::SendFrames => self.send_frames(),
            Event::Fault => self.fault(),
            Event::Start => self.start(),
        }
    }

    fn send_frames(&mut self) {
        for from in 0..self.hosts.len() as u32 {
            for to in (0..self.hosts.len() as u32).filter(|&to| to != from) {
                let host = &mut self.hosts[from as usize];
                let colour = host.epoch;
                *host.sent.entry((to, colour)).or_default() += 1;
                // Frames may be lost, but UDP's repetitions are the tunnel's to remove.
                if self.random.percent(self.faults.lose) {
                    self.lost.push(colour);
                } else {
                    self.after(60, Event::Frame { from, to, colour });
                }
            }
        }
    }

    /// The rule at delivery.
    fn deliver(&mut self, to: u32, from: u32, colour: Epoch) {
        let host = &mut self.hosts[to as usize];
        if colour > host.epoch {
            host.held.push((from, colour));
            self.feed_participant(to, participant::Input::NewerColourSeen { epoch: colour });
            return;
        }
        host.delivered += 1;
        if let Some((cut, _, recorded)) = &mut host.recording
            && colour < cut.epoch
        {
            *recorded += 1;
            let cut = *cut;
            self.tell_received(to, from, cut);
        }
    }

    fn tell_received(&mut self, host: u32, from: u32, cut: CutId) {
        let received = count(&self.hosts[host as usize].received, from, cut.epoch);
        let channel = Channel { peer: ParticipantId(from), network: NETWORK };
        let input = participant::Input::OldColourReceived { cut, channel, received, known_lost: 0 };
        self.feed_participant(host, input);
    }

    fn raise(&mut self, host: u32, epoch: Epoch) {
        let host_state = &mut self.hosts[host as usize];
        assert!(host_state.epoch <= epoch, "an epoch went back");
        host_state.epoch = epoch;
        host_state.reserved = host_state.reserved.max(epoch);
        for (from, colour) in std::mem::take(&mut host_state.held) {
            self.deliver(host, from, colour);
        }
    }

    fn fault(&mut self) {
        if self.random.percent(self.faults.crash) {
            let victim = self.random.below(self.hosts.len() as u64 + 1) as u32;
            if victim as usize == self.hosts.len() {
                self.crash_initiator();
            } else {
                self.crash_participant(victim);
            }
        }
        if self.random.percent(self.faults.fail / 4) {
            self.feed_initiator(initiator::Input::Cancel);
        }
        if self.random.percent(self.faults.fail / 4) {
            let host = self.random.below(self.hosts.len() as u64) as u32;
            self.feed_participant(host, participant::Input::Cancel);
        }
    }

    fn crash_initiator(&mut self) {
        self.initiator_life += 1;
        // A new process knows its own host's ports only, and no write of the old one is still under way.
        self.initiator = Initiator::new(self.hosts[0].epoch);
    }

    fn crash_participant(&mut self, id: u32) {
        let now = self.now;
        let host = &mut self.hosts[id as usize];
        host.life += 1;
        host.recording = None;
        let me = ParticipantId(id);
        let epoch = host.reserved;
        host.participant = match host.in_doubt {
            Some((cut, initiator)) => Participant::recover(me, epoch, cut, initiator, now),
            None => Participant::new(me, epoch),
        };
        // Held frames still wait in the switch, and are seen again.
        self.raise(id, epoch);
    }

    fn feed_initiator(&mut self, input: initiator::Input) {
        let outputs = self.initiator.handle(input, self.now);
        self.initiator_outputs(outputs);
    }

    fn initiator_outputs(&mut self, outputs: Vec<initiator::Output>) {
        for output in outputs {
            match output {
                initiator::Output::Send { to, message } => {
                    self.post(Event::ToParticipant { to: to.0, message })
                }
                initiator::Output::WriteManifest { snapshot } => {
                    let sum = snapshot.networks()[&NETWORK];
                    assert_eq!(sum.unaccounted(), 0, "{sum:?}");
                    assert_eq!(sum.dropped.wire_loss, self.frames_lost_before(snapshot.cut.epoch));
                    let cut = snapshot.cut;
                    let before = self.cut_epochs.insert(cut.snapshot, cut.epoch);
                    assert_eq!(before, None, "a manifest is written once");
                    let input = if self.random.percent(self.faults.fail) {
                        initiator::Input::ManifestFailed { cut, detail: "full".into() }
                    } else {
                        initiator::Input::ManifestWritten { cut }
                    };
                    let life = self.initiator_life;
                    self.after(50, Event::InitiatorWork { life, input });
                }
                initiator::Output::LookUpOutcome { from, cut } => {
                    let committed = self.manifests.contains(&cut.snapshot);
                    self.feed_initiator(initiator::Input::OutcomeLookedUp { to: from, cut, committed });
                }
                initiator::Output::Done { cut, outcome, .. } => {
                    let committed = outcome == Outcome::Committed;
                    assert_eq!(committed, self.manifests.contains(&cut.snapshot));
                    self.outcomes.insert(cut.snapshot, committed);
                }
                initiator::Output::Rejected { from, violation } => panic!("{from}: {violation}"),
            }
        }
    }

    fn feed_participant(&mut self, host: u32, input: participant::Input) {
        let outputs = self.hosts[host as usize].participant.handle(input, self.now);
        let in_doubt = self.hosts[host as usize].participant.in_doubt();
        if in_doubt.is_some() {
            // CaptureDone and RecordingStopped promised it.
            self.hosts[host as usize].in_doubt = in_doubt;
            self.reported.extend(in_doubt.map(|(cut, _)| cut.snapshot));
        }
        for output in outputs {
            self.participant_output(host, output);
        }
    }

    fn participant_output(&mut self, host: u32, output: participant::Output) {
        let fails = self.random.percent(self.faults.fail);
        let detail = || String::from("injected");
        match output {
            participant::Output::Send { to, message } => {
                assert_eq!(to, ParticipantId(0));
                self.post(Event::ToInitiator { from: host, message });
            }
            participant::Output::StartPrepare { snapshot, .. } => {
                let input = if fails {
                    participant::Input::PrepareFailed { snapshot, detail: detail() }
                } else {
                    participant::Input::Prepared { snapshot }
                };
                self.work(host, 80, input);
            }
            participant::Output::StartCut { cut } => {
                let state = &mut self.hosts[host as usize];
                state.sent_before =
                    state.sent.iter().filter(|(key, _)| key.1 < cut.epoch).map(|(_, n)| n).sum();
                state.recording = Some((cut, state.delivered, 0));
                self.raise(host, cut.epoch);
                let input = if fails {
                    participant::Input::CutFailed { cut, detail: detail() }
                } else {
                    participant::Input::CutDone { cut, taken: self.taken(host, cut) }
                };
                self.work(host, 20, input);
            }
            participant::Output::StopRecording { cut, missing } => {
                let wire_loss: u64 = missing.values().sum();
                let state = &mut self.hosts[host as usize];
                let (recorded_cut, delivered_before, in_flight) = state.recording.take().unwrap();
                assert_eq!(recorded_cut, cut);
                state.wire_loss = wire_loss;
                let dropped = Drops { wire_loss, ..Drops::default() };
                // A frame held for a colour above this cut was not sent before it.
                let frames = Frames { sent_before: state.sent_before, delivered_before, in_flight, dropped };
                let networks = vec![NetworkFrames { network: NETWORK, frames }];
                self.work(host, 10, participant::Input::RecordingStopped { cut, networks });
            }
            participant::Output::Keep { cut } => {
                let state = &mut self.hosts[host as usize];
                assert!(self.manifests.contains(&cut.snapshot), "kept without a manifest");
                assert!(!state.discarded_after_report.contains(&cut.snapshot), "discarded, then kept");
                state.kept.insert(cut.snapshot);
                self.work(host, 20, participant::Input::Finished { cut });
            }
            participant::Output::Discard { cut, epoch, .. } => {
                assert!(!self.manifests.contains(&cut.snapshot), "discarded with a manifest");
                let state = &mut self.hosts[host as usize];
                assert!(!state.kept.contains(&cut.snapshot), "kept, then discarded");
                if state.in_doubt.is_some_and(|(doubtful, _)| doubtful.snapshot == cut.snapshot) {
                    state.discarded_after_report.insert(cut.snapshot);
                }
                state.recording = None;
                self.raise(host, epoch);
                self.work(host, 40, participant::Input::Finished { cut });
            }
            participant::Output::RaiseEpoch { epoch } => self.raise(host, epoch),
            participant::Output::Rejected { from, violation } => panic!("{from}: {violation}"),
        }
    }

    /// Final: the host's ports have passed the cut.
    fn taken(&self, host: u32, cut: CutId) -> Taken {
        let peers = (0..self.hosts.len() as u32).filter(|&peer| peer != host);
        let sent = peers.map(|peer| ChannelCount {
            channel: Channel { peer: ParticipantId(peer), network: NETWORK },
            copies: count(&self.hosts[host as usize].sent, peer, cut.epoch),
        });
        Taken { machines: Vec::new(), sent: sent.collect() }
    }

    fn work(&mut self, host: u32, most_ms: u64, input: participant::Input) {
        let life = self.hosts[host as usize].life;
        self.after(most_ms, Event::ParticipantWork { host, life, input });
    }

    fn work_done(&mut self, host: u32, input: participant::Input) {
        let follow = match &input {
            participant::Input::CutDone { cut, .. } => Some(*cut),
            _ => None,
        };
        let state = &mut self.hosts[host as usize];
        match (&input, state.participant.active()) {
            (participant::Input::Finished { .. }, _) => state.in_doubt = None,
            (participant::Input::Prepared { snapshot }, Some(cut)) if cut.snapshot == *snapshot => {
                state.reserved = state.reserved.max(cut.epoch);
            }
            _ => {}
        }
        self.feed_participant(host, input);
        if let Some(cut) = follow {
            for peer in 0..self.hosts.len() as u32 {
                if peer != host {
                    self.tell_received(host, peer, cut);
                }
            }
            let input = if self.random.percent(self.faults.fail) {
                participant::Input::CaptureFailed { cut, detail: "injected".into() }
            } else {
                participant::Input::CaptureDone { cut, machines: Vec::new() }
            };
            self.work(host, 200, input);
        }
    }

    fn frames_lost_before(&self, cut: Epoch) -> u64 {
        self.lost.iter().filter(|&&colour| colour < cut).count() as u64
    }

    fn at_rest(&self) -> bool {
        self.initiator.active().is_none() && self.hosts.iter().all(|host| host.participant.active().is_none())
    }

    fn run_to_rest(&mut self) {
        for _ in 0..MAX_EVENTS {
            if self.events.is_empty() && self.at_rest() {
                return;
            }
            if !self.step() {
                return;
            }
        }
        panic!(
            "no rest: initiator {}, {:?}",
            self.initiator.state_name(),
            self.hosts.iter().map(|host| host.participant.state_name()).collect::<Vec<_>>()
        );
    }

    fn traffic(&mut self, for_ms: u64) {
        for _ in 0..for_ms / 10 {
            self.after(for_ms, Event::SendFrames);
        }
    }

    /// Every host keeps every snapshot that exists, except where it had forgotten having a part in it.
    fn check_all_or_nothing(&self) {
        for host in &self.hosts {
            for snapshot in &host.kept {
                assert!(self.manifests.contains(snapshot));
            }
            for snapshot in &self.manifests {
                assert!(host.kept.contains(snapshot), "a host does not keep {snapshot}");
            }
            assert!(host.held.is_empty(), "frames are held for ever");
            assert_eq!(host.epoch, host.participant.epoch());
        }
        for (snapshot, committed) in &self.outcomes {
            assert_eq!(*committed, self.manifests.contains(snapshot));
        }
        let epochs: Vec<_> = self.manifests.iter().map(|snapshot| self.cut_epochs[snapshot]).collect();
        assert!(epochs.is_sorted_by(|a, b| a < b), "epochs of later snapshots are higher: {epochs:?}");
    }
}

fn count(counts: &BTreeMap<(u32, Epoch), u64>, peer: u32, below: Epoch) -> u64 {
    counts.iter().filter(|(key, _)| key.0 == peer && key.1 < below).map(|(_, n)| n).sum()
}

/// Some attempts under faults, then one without. Returns how many of the former succeeded.
fn run(seed: u64, hosts: u32, faults: Faults) -> usize {
    println!("seed {seed}, {hosts} hosts, {faults:?}");
    let mut world = World::new(seed, hosts, faults);
    for _ in 0..4 {
        world.after(3000, Event::Start);
    }
    for _ in 0..20 {
        world.after(3000, Event::Fault);
    }
    world.traffic(3000);
    while world.now < Duration::from_secs(4) && world.step() {}
    let under_faults = world.manifests.len();
    world.faults = NONE;
    world.run_to_rest();
    world.check_all_or_nothing();

    world.start();
    world.traffic(300);
    let last = SnapshotId([world.attempts; 16]);
    world.run_to_rest();
    world.check_all_or_nothing();
    assert!(world.manifests.contains(&last), "without faults it succeeds: {:?}", world.outcomes);
    under_faults
}

#[test]
fn without_faults_every_snapshot_succeeds() {
    for seed in 0..40 {
        for hosts in 1..=4 {
            assert!(run(seed, hosts, NONE) >= 1);
        }
    }
}

#[test]
fn under_faults_some_succeed_and_some_do_not() {
    let faults = Faults { lose: 10, repeat: 10, crash: 5, fail: 4 };
    let outcomes: BTreeSet<_> = (0..60).map(|seed| run(seed, 3, faults)).collect();
    assert!(outcomes.len() > 1, "the faults are too strong or too weak to show anything: {outcomes:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn all_or_nothing_whatever_happens(
        seed in any::<u64>(),
        hosts in 1u32..=4,
        lose in 0u64..40,
        repeat in 0u64..40,
        crash in 0u64..40,
        fail in 0u64..20,
    ) {
        run(seed, hosts, Faults { lose, repeat, crash, fail });
    }
}
