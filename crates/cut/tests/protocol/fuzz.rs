//! What hosts say to one another, mangled: what is still a message is taken by participants and initiators in every
//! state, within the bounds that are promised.

use std::collections::BTreeSet;
use std::time::Duration;

use diorama_cut::initiator::{self, Config, Initiator};
use diorama_cut::message::{Body, Epoch, Message, Prepare};
use diorama_cut::participant::{self, Participant};
use diorama_cut::report::{Channel, ChannelCount, MachineCut, MachineReport, NetworkId, Report, Taken};
use diorama_cut::{AbortReason, CaptureMode, CutId, FailReason, InFlight, ParticipantId, SnapshotId};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::mangle::{Mangle, config, mangled, mangles};

const CUT: CutId = CutId { snapshot: SnapshotId([1; 16]), epoch: Epoch(6) };
const ME: ParticipantId = ParticipantId(1);
const OTHER: ParticipantId = ParticipantId(2);

/// One of each kind.
fn messages() -> Vec<Vec<u8>> {
    let channel = Channel { peer: OTHER, network: NetworkId(3) };
    let count = ChannelCount { channel, copies: 9 };
    let reason = FailReason::Capture { detail: "disk full".into() };
    let prepare = Prepare {
        capture: CaptureMode::Live,
        in_flight: InFlight::Record,
        participants: vec![ParticipantId(0), ME, OTHER],
        deadline_ms: 1000,
        in_flight_deadline_ms: 100,
    };
    let machines = vec![MachineCut { machine: "server".into(), cut_at_us: 7, pause_us: 2, stall_us: 3 }];
    let captured = vec![MachineReport { machine: "server".into(), captured: vec![0, 255] }];
    let bodies = [
        Body::Prepare(prepare),
        Body::Prepared { floor: Epoch(5) },
        Body::EpochBehind { floor: Epoch(9) },
        Body::Take,
        Body::Taken(Taken { machines, sent: vec![count] }),
        Body::Expect { incoming: vec![count] },
        Body::Report(Report { machines: captured, networks: Vec::new() }),
        Body::Commit,
        Body::CommitDone,
        Body::Abort { reason: AbortReason::Participant { participant: ME, reason: reason.clone() } },
        Body::AbortDone,
        Body::Failed { reason },
        Body::Query,
    ];
    bodies.map(|body| serde_json::to_vec(&Message::new(CUT, body)).unwrap()).into()
}

/// What a host does with bytes: some are messages, and some of these it does not even look at.
fn understood(bytes: &[u8]) -> Option<Message> {
    let message = serde_json::from_slice::<Message>(bytes).ok()?;
    let again = serde_json::to_string(&message).unwrap();
    assert_eq!(serde_json::from_str::<Message>(&again).unwrap(), message);
    Some(message)
}

type Said = Vec<(Index, Option<Vec<Mangle>>, u32, u64)>;

/// Some messages, each perhaps mangled, from somebody, after some time.
fn said() -> impl Strategy<Value = Said> {
    let one = (any::<Index>(), prop::option::of(mangles()), 0..4_u32, 0..3000_u64);
    prop::collection::vec(one, 1..20)
}

fn each(said: &Said, mut hear: impl FnMut(ParticipantId, Message, Duration) -> usize) {
    let all = messages();
    let mut now = Duration::ZERO;
    for (which, how, from, after_ms) in said {
        now += Duration::from_millis(*after_ms);
        let whole = &all[which.index(all.len())];
        let bytes = how.as_ref().map_or_else(|| whole.clone(), |how| mangled(whole, how));
        if let Some(message) = understood(&bytes) {
            assert!(hear(ParticipantId(*from), message, now) <= 64);
        }
    }
}

#[test]
fn mangled_messages_to_a_participant() {
    proptest!(config(400), |(said in said())| {
        let mut participant = Participant::new(ME, Epoch(5));
        let mut epoch = participant.epoch();
        each(&said, |from, message, now| {
            let outputs = participant.handle(participant::Input::Message { from, message }, now);
            assert!(participant.epoch() >= epoch, "epochs never go back");
            epoch = participant.epoch();
            outputs.len()
        });
    });
}

#[test]
fn mangled_messages_to_an_initiator() {
    proptest!(config(400), |(said in said())| {
        let mut initiator = Initiator::new(Epoch(5));
        let all = BTreeSet::from([ME, OTHER]);
        initiator.start(CUT.snapshot, all, Config::default(), Duration::ZERO).unwrap();
        each(&said, |from, message, now| {
            initiator.handle(initiator::Input::Message { from, message }, now).len()
        });
    });
}
