use diorama_cut::message::{
    Body, Epoch, MAX_DETAIL_BYTES, MAX_PARTICIPANTS, Message, PROTOCOL_VERSION, Prepare, Violation,
};
use diorama_cut::report::{Channel, ChannelCount, MachineCut, MachineReport, NetworkId, Report, Taken};
use diorama_cut::{AbortReason, CaptureMode, CutId, FailReason, InFlight, ParticipantId, SnapshotId};

const CUT: CutId = CutId { snapshot: SnapshotId([7; 16]), epoch: Epoch(3) };

fn count(peer: u32, network: u16) -> ChannelCount {
    ChannelCount { channel: Channel { peer: ParticipantId(peer), network: NetworkId(network) }, copies: 9 }
}

fn prepare(participants: Vec<u32>) -> Prepare {
    Prepare {
        capture: CaptureMode::Live,
        in_flight: InFlight::Record,
        participants: participants.into_iter().map(ParticipantId).collect(),
        deadline_ms: 1000,
        in_flight_deadline_ms: 10,
    }
}

#[test]
fn every_message_survives_serialisation() {
    let taken = Taken {
        machines: vec![MachineCut {
            machine: "server".into(),
            cut_at_us: u64::MAX,
            pause_us: 2,
            stall_us: 3,
        }],
        sent: vec![count(0, 1), count(1, 0)],
    };
    let report = Report {
        machines: vec![MachineReport { machine: "server".into(), captured: vec![0, 255] }],
        networks: Vec::new(),
    };
    let reason = FailReason::Capture { detail: "disk full".into() };
    let bodies = [
        Body::Prepare(prepare(vec![0, 1])),
        Body::Prepared { floor: Epoch(2) },
        Body::EpochBehind { floor: Epoch(u32::MAX) },
        Body::Take,
        Body::Taken(taken),
        Body::Expect { incoming: vec![count(0, 0)] },
        Body::Report(report),
        Body::Commit,
        Body::CommitDone,
        Body::Abort {
            reason: AbortReason::Participant { participant: ParticipantId(1), reason: reason.clone() },
        },
        Body::AbortDone,
        Body::Failed { reason },
        Body::Query,
    ];
    for body in bodies {
        let message = Message::new(CUT, body);
        message.check().unwrap();
        let text = serde_json::to_string(&message).unwrap();
        assert_eq!(serde_json::from_str::<Message>(&text).unwrap(), message, "{text}");
    }
}

#[test]
fn messages_out_of_bounds_are_told_apart() {
    let long = "x".repeat(MAX_DETAIL_BYTES + 1);
    let too_many = (0..=MAX_PARTICIPANTS as u32).collect();
    let mut late = prepare(vec![0]);
    late.in_flight_deadline_ms = u64::MAX;
    let cases = [
        (
            Body::Prepare(prepare(too_many)),
            Violation::TooMany { what: "participants", got: 1025, most: 1024 },
        ),
        (Body::Prepare(prepare(vec![1, 0])), Violation::NotSorted { what: "participants" }),
        (Body::Prepare(prepare(vec![1, 1])), Violation::NotSorted { what: "participants" }),
        (Body::Prepare(late), Violation::Deadline { got_ms: u64::MAX }),
        (
            Body::Failed { reason: FailReason::Cut { detail: long.clone() } },
            Violation::TooLong { what: "detail", got_bytes: 1025, most_bytes: 1024 },
        ),
        (
            Body::Abort { reason: AbortReason::Manifest { detail: long } },
            Violation::TooLong { what: "detail", got_bytes: 1025, most_bytes: 1024 },
        ),
        (
            Body::Expect { incoming: vec![count(1, 1), count(1, 1)] },
            Violation::NotSorted { what: "channels" },
        ),
    ];
    for (body, violation) in cases {
        assert_eq!(Message::new(CUT, body).check(), Err(violation));
    }
    let other = Message { version: PROTOCOL_VERSION + 1, ..Message::new(CUT, Body::Take) };
    assert_eq!(other.check(), Err(Violation::Version { got: PROTOCOL_VERSION + 1 }));
}
