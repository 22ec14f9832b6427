//! The run: simulated time, the events in it, and what each does. Everything follows from the scenario and its seed.
//!
//! Phases: traffic for a while, so that addresses are learned; snapshots, under faults if there are any; calm, in which
//! the faults end, everything must come to rest, and one more snapshot must succeed; the end, when no machine sends any
//! more and what is on its way arrives. The judge decides on each snapshot when it comes to exist, and on the recordings
//! at the end.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    rc::Rc,
    time::Duration,
};

use diorama_cut::message::{Body, Message};
use diorama_cut::report::NetworkFrames;
use diorama_cut::{CutId, ParticipantId, SnapshotId, initiator, participant};
use diorama_switch::Time;

use crate::{
    figures::{AttemptFigures, Figures},
    host::{Host, Layout},
    judge::{FrameId, Judge, Machine, Verdict},
    random::Random,
    scenario::{Faults, MS, Scenario},
    tunnel::{Packet, Tunnels},
    underlay::Underlay,
};

mod protocol;

/// Traffic alone, before the first snapshot.
const WARM_UP_NS: u64 = 60 * MS;
/// How long everything may take to come to rest once faults have ended. Far above any deadline of the protocol.
const REST_NS: u64 = 60_000 * MS;
/// Frames of machines: addresses, an experimental type, the frame's number, and some more.
const FRAME_BYTES: usize = 80;

/// A run that did not go as it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A cut or a recording is wrong.
    #[error(transparent)]
    Judged(#[from] Verdict),
    /// Copies of a network are missing from a snapshot's accounts, or too many.
    #[error("attempt {attempt}: {unaccounted} copies of network {network} are unaccounted for")]
    Unaccounted {
        /// The attempt.
        attempt: u32,
        /// The network.
        network: u16,
        /// How many; below 0, too many.
        unaccounted: i128,
    },
    /// A host kept what does not exist, or discarded what does.
    #[error("attempt {attempt}: host {host} {did} it, and it {is}")]
    NotAllOrNothing {
        /// The attempt.
        attempt: u32,
        /// The host.
        host: usize,
        /// What it did.
        did: &'static str,
        /// What is the case.
        is: &'static str,
    },
    /// Faults are over, and something goes on or is stuck.
    #[error("no rest {waited_ns} ns after the last fault: host {host} is {state}")]
    NoRest {
        /// For how long.
        waited_ns: u64,
        /// A host.
        host: usize,
        /// Its state.
        state: &'static str,
    },
    /// Without any fault, a snapshot did not come to exist.
    #[error("attempt {attempt} failed, and nothing stood against it")]
    CalmAttemptFailed {
        /// The attempt.
        attempt: u32,
    },
    /// Something is left of a cut that is over.
    #[error("at rest, host {host} {what}")]
    Trace {
        /// The host.
        host: usize,
        /// What is left.
        what: &'static str,
    },
}

#[derive(Debug)]
enum Event {
    /// A machine sends a frame of its own, or answers one.
    Send {
        machine: Machine,
        answers: Option<Machine>,
    },
    Packet(Packet),
    Message {
        from: usize,
        to: usize,
        to_initiator: bool,
        message: Rc<Message>,
    },
    Wake {
        host: usize,
        life: u32,
        initiator: bool,
    },
    Work {
        host: usize,
        life: u32,
        work: Done,
    },
    Join {
        a: usize,
        b: usize,
    },
    User,
    Crash,
    ComeBack {
        host: usize,
    },
    Part,
    Heal,
}

/// A piece of a host's work that is done.
#[derive(Clone, Debug)]
enum Done {
    Prepared(SnapshotId),
    Stopped(CutId),
    CutMachine(CutId, usize),
    Released(CutId),
    Captured(CutId),
    Recorded(CutId, Vec<NetworkFrames>),
    Finished(CutId),
    Manifest(CutId),
}

#[derive(Debug)]
struct Scheduled {
    at_ns: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at_ns, self.order) == (other.at_ns, other.order)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ns, self.order).cmp(&(other.at_ns, other.order))
    }
}

/// Where a machine is.
#[derive(Clone, Copy, Debug)]
struct Place {
    host: usize,
    port: u32,
    network: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Snapshots,
    Calm { since_ns: u64 },
    Ending,
}

/// One run.
pub struct Simulation {
    scenario: Scenario,
    random: Random,
    now_ns: u64,
    events: BinaryHeap<Reverse<Scheduled>>,
    order: u64,
    digest: u64,
    hosts: Vec<Host>,
    machines: Vec<Place>,
    /// By network: its machines.
    networks: Vec<Vec<Machine>>,
    underlay: Underlay,
    tunnels: Tunnels,
    judge: Judge,
    /// The store: attempts whose manifest is durable.
    manifests: BTreeSet<u32>,
    kept: BTreeSet<(usize, u32)>,
    /// When each host's timers will be looked at next: participant's, initiator's.
    wakes: Vec<[Option<u64>; 2]>,
    phase: Phase,
    attempts: Vec<AttemptFigures>,
    /// The attempt after everything was calm.
    calm_attempt: Option<u32>,
    failure: Option<Failure>,
    events_done: u64,
    crashes: u64,
    partitions: u64,
    /// How many cuts were begun by a frame of the new colour.
    begun_by_frame: u64,
    states_at_crash: BTreeMap<&'static str, u64>,
    /// Hosts whose switches may have something to give.
    to_pump: BTreeSet<usize>,
}

impl Simulation {
    /// Lays out the environment.
    pub fn new(scenario: Scenario) -> Self {
        let mut random = Random::new(scenario.seed);
        let (layouts, machines, networks) = lay_out(&scenario, &mut random);
        let hosts: Vec<_> = layouts
            .into_iter()
            .enumerate()
            .map(|(id, layout)| Host::new(id, layout, id == 0, random.below(1 << 40)))
            .collect();
        let underlay = Underlay::new(scenario.link.clone(), scenario.hosts, &mut random);
        let judge = Judge::new(machines.len(), scenario.vector_clocks);
        let mut simulation = Self {
            random,
            now_ns: 0,
            events: BinaryHeap::new(),
            order: 0,
            digest: 0xcbf2_9ce4_8422_2325,
            wakes: vec![[None; 2]; hosts.len()],
            hosts,
            machines,
            networks,
            underlay,
            tunnels: Tunnels::default(),
            judge,
            manifests: BTreeSet::new(),
            kept: BTreeSet::new(),
            phase: Phase::Snapshots,
            attempts: Vec::new(),
            calm_attempt: None,
            failure: None,
            events_done: 0,
            crashes: 0,
            partitions: 0,
            begun_by_frame: 0,
            states_at_crash: BTreeMap::new(),
            to_pump: BTreeSet::new(),
            scenario,
        };
        simulation.begin();
        simulation
    }

    /// Runs to the end.
    pub fn run(mut self) -> Result<Figures, Failure> {
        while let Some(Reverse(Scheduled { at_ns, event, .. })) = self.events.pop() {
            self.now_ns = at_ns;
            self.events_done += 1;
            self.perform(event);
            while let Some(host) = self.to_pump.pop_first() {
                self.pump(host);
            }
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
        }
        self.check_end()?;
        Ok(self.figures())
    }

    fn begin(&mut self) {
        for a in 0..self.hosts.len() {
            let others: Vec<_> = self.hosts[a].peers.keys().copied().filter(|&b| b > a).collect();
            others.into_iter().for_each(|b| self.join(a, b));
        }
        for machine in 0..self.machines.len() as Machine {
            let first = self.random.below(self.scenario.send_every_ns.1 + 1);
            self.after(first, Event::Send { machine, answers: None });
        }
        self.after(WARM_UP_NS, Event::User);
        let Faults { crash_every_ns, partition_every_ns, .. } = self.scenario.faults;
        if crash_every_ns > 0 {
            self.after(WARM_UP_NS + crash_every_ns, Event::Crash);
        }
        if partition_every_ns > 0 {
            self.after(WARM_UP_NS + partition_every_ns, Event::Part);
        }
    }

    fn after(&mut self, delay_ns: u64, event: Event) {
        self.order += 1;
        self.events.push(Reverse(Scheduled { at_ns: self.now_ns + delay_ns, order: self.order, event }));
    }

    /// Everything that happens, and when, goes into the digest that two runs are compared by.
    fn note(&mut self, values: &[u64]) {
        for value in [self.now_ns].iter().chain(values) {
            self.digest = (self.digest ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17);
        }
    }

    fn perform(&mut self, event: Event) {
        match event {
            Event::Send { machine, answers } => self.machine_sends(machine, answers),
            Event::Packet(packet) => self.packet_arrives(&packet),
            Event::Message { from, to, to_initiator, message } => {
                self.note(&[2, from as u64, to as u64, u64::from(to_initiator)]);
                if !self.hosts[to].up {
                    return;
                }
                let (from, message) = (ParticipantId(from as u32), Message::clone(&message));
                if to_initiator {
                    self.feed_initiator(to, initiator::Input::Message { from, message });
                } else {
                    self.feed_participant(to, participant::Input::Message { from, message });
                }
            }
            Event::Wake { host, life, initiator } => {
                if self.hosts[host].life == life && self.hosts[host].up {
                    self.wakes[host][usize::from(initiator)] = None;
                    self.note(&[3, host as u64]);
                    if initiator {
                        self.feed_initiator(host, initiator::Input::Tick);
                    } else {
                        self.feed_participant(host, participant::Input::Tick);
                    }
                }
            }
            Event::Work { host, life, work } => {
                if self.hosts[host].life == life && self.hosts[host].up {
                    self.note(&[4, host as u64]);
                    self.work_done(host, work);
                }
            }
            Event::Join { a, b } => self.join(a, b),
            Event::User => self.user(),
            Event::Crash => self.crash(),
            Event::ComeBack { host } => self.come_back(host),
            Event::Part => {
                if self.faults_go_on() {
                    self.partitions += 1;
                    self.underlay.part(&mut self.random);
                    let heal = self.random.within(self.scenario.faults.partition_ns);
                    self.after(heal, Event::Heal);
                }
            }
            Event::Heal => {
                self.underlay.heal();
                if self.faults_go_on() {
                    self.after(self.scenario.faults.partition_every_ns, Event::Part);
                }
            }
        }
    }

    fn faults_go_on(&self) -> bool {
        self.phase == Phase::Snapshots && self.now_ns < self.scenario.faults.until_ns
    }

    fn machine_sends(&mut self, machine: Machine, answers: Option<Machine>) {
        if self.phase == Phase::Ending {
            return;
        }
        if answers.is_none() {
            let next = self.random.within(self.scenario.send_every_ns);
            self.after(next, Event::Send { machine, answers: None });
        }
        if self.hosts[self.machines[machine as usize].host].machines_run() {
            self.send_now(machine, answers);
        }
    }

    fn send_now(&mut self, machine: Machine, answers: Option<Machine>) {
        let Place { host, port, network } = self.machines[machine as usize];
        let to = match answers {
            Some(other) => Some(other),
            None if self.random.chance_ppm(self.scenario.broadcast_ppm) => None,
            None => {
                let others = &self.networks[usize::from(network)];
                let other = others[self.random.below(others.len() as u64) as usize];
                // To itself nobody sends: to everybody, then.
                (other != machine).then_some(other)
            }
        };
        let id = self.judge.send(machine);
        self.note(&[1, u64::from(machine), id]);
        let frame = frame_bytes(machine, to, id);
        self.hosts[host].switch.ingress(diorama_switch::PortId(port), &frame, Time(self.now_ns));
        self.pump(host);
    }

    fn packet_arrives(&mut self, packet: &Packet) {
        let host = &mut self.hosts[packet.to];
        if !host.up {
            return;
        }
        let now = Time(self.now_ns);
        let let_in = self.tunnels.arrive(host, packet, self.scenario.sabotage, now);
        self.note(&[5, packet.from as u64, packet.to as u64, u64::from(let_in)]);
        if let_in {
            self.pump(packet.to);
            self.tell_received(packet.to, Some(packet.from));
        }
    }

    /// Lets everything go that a host's switch has to give: to machines, to tunnels, to the participant.
    fn pump(&mut self, id: usize) {
        loop {
            let mut answers = Vec::new();
            let Self { hosts, judge, random, scenario, digest, .. } = self;
            hosts[id].deliver(self.now_ns, |machine, frame| {
                let (to, number) = read_frame(frame);
                let sender = judge.receive(machine, number);
                *digest = digest.rotate_left(9) ^ u64::from(machine) ^ (number << 20);
                if to == Some(machine) && random.chance_ppm(scenario.answer_ppm) {
                    answers.push((machine, sender));
                }
            });
            for (machine, sender) in answers {
                let soon = self.random.within((10_000, 500_000));
                self.after(soon, Event::Send { machine, answers: Some(sender) });
            }
            for packet in self.tunnels.drain(&mut self.hosts[id], Time(self.now_ns)) {
                let arrivals = self.underlay.packet(packet.from, packet.to, &mut self.random);
                for delay in arrivals.into_iter().flatten() {
                    self.after(delay, Event::Packet(packet.clone()));
                }
            }
            let Some(wanted) = self.hosts[id].switch.pop_cut_wanted() else { return };
            let was_prepared = self.hosts[id].participant.state_name() == "prepared";
            let epoch = diorama_cut::Epoch(wanted.epoch.0);
            self.feed_participant(id, participant::Input::NewerColourSeen { epoch });
            if was_prepared && self.hosts[id].participant.state_name() == "cutting" {
                self.begun_by_frame += 1;
            }
        }
    }

    /// Two agents agree on a new session, once both are up, reach one another, and record nothing.
    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (a.min(b), a.max(b));
        let (left, right) = self.hosts.split_at_mut(b);
        let (one, other) = (&mut left[a], &mut right[0]);
        if !one.up || !other.up {
            return; // Who comes back joins anew.
        }
        let free = |host: &Host| host.recording.is_none();
        let reached = self.underlay.packet(a, b, &mut self.random)[0].is_some();
        if !free(one) || !free(other) || !reached {
            return self.after(5 * MS, Event::Join { a, b });
        }
        self.tunnels.join(one, other);
    }

    fn crash(&mut self) {
        if !self.faults_go_on() {
            return;
        }
        let every = self.scenario.faults.crash_every_ns;
        let next = self.random.within((every / 2, every * 3 / 2));
        self.after(next, Event::Crash);
        // Now and then the host that snapshots are begun on.
        let id = match self.random.below(4) {
            0 => 0,
            _ => self.random.below(self.hosts.len() as u64) as usize,
        };
        if !self.hosts[id].up {
            return;
        }
        self.crashes += 1;
        *self.states_at_crash.entry(self.hosts[id].participant.state_name()).or_default() += 1;
        self.note(&[6, id as u64]);
        if let Some(writing) = self.hosts[id].initiator.as_ref().filter(|i| i.state_name() == "writing") {
            let cut = writing.active().expect("writing");
            // The write had reached the store, or it never will.
            if self.random.below(2) == 0 {
                self.manifest_exists(cut);
            }
        }
        self.hosts[id].die();
        let away = self.random.within(self.scenario.faults.away_ns);
        self.after(away, Event::ComeBack { host: id });
    }

    fn come_back(&mut self, id: usize) {
        self.note(&[7, id as u64]);
        self.hosts[id].come_back(self.now_ns);
        self.wakes[id] = [None; 2];
        self.schedule_wakes(id);
        let peers: Vec<_> = self.hosts[id].peers.keys().copied().collect();
        for b in peers {
            let delay = 2 * self.underlay.delay_ns(id, b);
            self.after(delay, Event::Join { a: id, b });
        }
    }

    /// The user looks, and begins a snapshot if none is under way.
    fn user(&mut self) {
        let busy = !self.hosts[0].up
            || self.hosts[0].initiator.as_ref().is_none_or(|initiator| initiator.active().is_some());
        match self.phase {
            Phase::Ending => {}
            Phase::Snapshots => {
                let faults_over = self.now_ns >= self.scenario.faults.until_ns;
                let enough = self.attempts.len() as u32 >= self.scenario.snapshots;
                let next = if busy { 5 * MS } else { self.scenario.between_snapshots_ns };
                if enough && !busy && self.scenario.faults.until_ns == 0 {
                    self.phase = Phase::Ending;
                } else if self.scenario.faults.until_ns > 0 && faults_over {
                    self.underlay.calm();
                    self.scenario.faults.work_fails_ppm = 0;
                    self.phase = Phase::Calm { since_ns: self.now_ns };
                    self.after(5 * MS, Event::User);
                } else {
                    if !busy && !enough {
                        self.start();
                    }
                    self.after(next, Event::User);
                }
            }
            Phase::Calm { since_ns } => {
                let at_rest = self.at_rest();
                if at_rest.is_ok() && self.calm_attempt.is_some() {
                    self.phase = Phase::Ending;
                    return;
                }
                match at_rest {
                    Ok(()) => {
                        self.calm_attempt = Some(self.attempts.len() as u32);
                        self.start();
                    }
                    Err(failure) if self.now_ns > since_ns + REST_NS => self.failure = Some(failure),
                    Err(_) => {}
                }
                self.after(5 * MS, Event::User);
            }
        }
    }

    fn at_rest(&self) -> Result<(), Failure> {
        for (host, state) in self.hosts.iter().enumerate() {
            let name = match &state.initiator {
                _ if !state.up => Some("away"),
                Some(initiator) if initiator.active().is_some() => Some(initiator.state_name()),
                _ => state.participant.active().map(|_| state.participant.state_name()),
            };
            if let Some(state) = name {
                return Err(Failure::NoRest { waited_ns: REST_NS, host, state });
            }
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), Failure> {
        self.at_rest()?;
        self.judge.judge_recordings()?;
        for (id, host) in self.hosts.iter().enumerate() {
            host.switch.assert_consistent();
            let epoch = diorama_switch::Epoch(host.participant.epoch().0);
            let trace = if host.ports().any(|port| host.switch.is_held(port)) {
                Some("holds a port")
            } else if host.ports().any(|port| host.switch.epoch(port) != epoch) {
                Some("has ports at another epoch")
            } else if host.ports().any(|port| host.switch.counters(port).queued_frames > 0) {
                Some("has frames that wait")
            } else if host.recording.is_some() || host.cutting.is_some() || host.durable.in_doubt.is_some() {
                Some("is in a cut")
            } else {
                None
            };
            if let Some(what) = trace {
                return Err(Failure::Trace { host: id, what });
            }
            for &attempt in &self.manifests {
                if !self.kept.contains(&(id, attempt)) {
                    let (did, is) = ("does not keep", "exists");
                    return Err(Failure::NotAllOrNothing { attempt, host: id, did, is });
                }
            }
        }
        let calm = match self.calm_attempt {
            Some(attempt) => attempt..attempt + 1,
            None if self.scenario.faults.until_ns == 0 => 0..self.attempts.len() as u32,
            None => 0..0,
        };
        match calm.into_iter().find(|attempt| !self.manifests.contains(attempt)) {
            Some(attempt) => Err(Failure::CalmAttemptFailed { attempt }),
            None => Ok(()),
        }
    }

    fn figures(self) -> Figures {
        Figures {
            seed: self.scenario.seed,
            hosts: self.hosts.len(),
            machines: self.machines.len(),
            networks: self.networks.len(),
            frames: self.judge.receipts,
            packets: self.tunnels.sent,
            snapshots: self.manifests.len() as u32,
            crashes: self.crashes,
            partitions: self.partitions,
            begun_by_frame: self.begun_by_frame,
            states_at_crash: self.states_at_crash,
            round_trip_ns: self.underlay.longest_round_trip_ns(0),
            simulated_ns: self.now_ns,
            events: self.events_done,
            digest: self.digest,
            attempts: self.attempts,
        }
    }
}

fn frame_bytes(from: Machine, to: Option<Machine>, id: FrameId) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&to.map_or([0xff; 6], address));
    frame[6..12].copy_from_slice(&address(from));
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..22].copy_from_slice(&id.to_be_bytes());
    frame
}

/// To whom a frame is, if to one machine, and its number.
fn read_frame(frame: &[u8]) -> (Option<Machine>, FrameId) {
    let to = (frame[0] == 2).then(|| u32::from_be_bytes(frame[2..6].try_into().expect("four bytes")));
    (to, FrameId::from_be_bytes(frame[14..22].try_into().expect("eight bytes")))
}

fn address(machine: Machine) -> [u8; 6] {
    let [a, b, c, d] = machine.to_be_bytes();
    [2, 0, a, b, c, d]
}

/// Deals machines to hosts and networks: every host has the same number, and a network has a few on each of some random
/// hosts.
fn lay_out(scenario: &Scenario, random: &mut Random) -> (Vec<Layout>, Vec<Place>, Vec<Vec<Machine>>) {
    let together = scenario.machines_together.max(1);
    let mut groups = Vec::new();
    for host in 0..scenario.hosts {
        let mut left = scenario.machines_per_host;
        while left > 0 {
            let group = left.min(together);
            groups.push((host, group));
            left -= group;
        }
    }
    random.shuffle(&mut groups);
    let mut layouts = vec![Layout::default(); scenario.hosts];
    let (mut places, mut networks): (Vec<Place>, Vec<Vec<Machine>>) = (Vec::new(), vec![Vec::new()]);
    for (host, group) in groups {
        if networks[networks.len() - 1].len() + group > scenario.machines_per_network.max(group) {
            networks.push(Vec::new());
        }
        let network = (networks.len() - 1) as u16;
        for _ in 0..group {
            let machine = places.len() as Machine;
            places.push(Place { host, port: layouts[host].machines.len() as u32, network });
            layouts[host].machines.push((machine, network));
            networks[usize::from(network)].push(machine);
        }
    }
    for (network, machines) in networks.iter().enumerate() {
        let hosts: BTreeSet<_> = machines.iter().map(|&machine| places[machine as usize].host).collect();
        for &host in &hosts {
            let others = hosts.iter().copied().filter(|&other| other != host).collect();
            layouts[host].shared.insert(network as u16, others);
        }
    }
    (layouts, places, networks)
}

/// The attempt that a snapshot's name was made of.
fn attempt_of(cut: CutId) -> u32 {
    let [a, b, c, d, ..] = cut.snapshot.0;
    u32::from_be_bytes([a, b, c, d])
}

fn to_ns(time: Duration) -> u64 {
    time.as_nanos() as u64
}
