//! Each transition of a participant: a path of inputs, and what the last one must cause.

use std::{collections::BTreeMap, time::Duration};

use diorama_cut::message::{Body, Epoch, Message, Prepare, Violation};
use diorama_cut::participant::{DiscardReason, Input, Output, Participant};
use diorama_cut::report::{Channel, ChannelCount, NetworkId, Report, Taken};
use diorama_cut::{AbortReason, CaptureMode, CutId, FailReason, InFlight, ParticipantId, SnapshotId};

const ME: ParticipantId = ParticipantId(1);
const INITIATOR: ParticipantId = ParticipantId(0);
const OTHER: ParticipantId = ParticipantId(2);
const START: Epoch = Epoch(5);
const CUT: CutId = cut(1, 6);
const WIRE: Channel = Channel { peer: OTHER, network: NetworkId(3) };

const fn cut(snapshot: u8, epoch: u32) -> CutId {
    CutId { snapshot: SnapshotId([snapshot; 16]), epoch: Epoch(epoch) }
}

fn says(from: ParticipantId, cut: CutId, body: Body) -> Input {
    Input::Message { from, message: Message::new(cut, body) }
}

fn prepare(from: ParticipantId, cut: CutId) -> Input {
    let terms = Prepare {
        capture: CaptureMode::Live,
        in_flight: InFlight::Record,
        participants: vec![INITIATOR, ME, OTHER],
        deadline_ms: 1000,
        in_flight_deadline_ms: 100,
    };
    says(from, cut, Body::Prepare(terms))
}

fn expect(copies: u64) -> Input {
    says(INITIATOR, CUT, Body::Expect { incoming: vec![ChannelCount { channel: WIRE, copies }] })
}

fn received(received: u64, known_lost: u64) -> Input {
    Input::OldColourReceived { cut: CUT, channel: WIRE, received, known_lost }
}

fn abort(cut: CutId) -> Input {
    says(INITIATOR, cut, Body::Abort { reason: AbortReason::Cancelled })
}

fn to(to: ParticipantId, cut: CutId, body: Body) -> Output {
    Output::Send { to, message: Message::new(cut, body) }
}

fn failed(reason: FailReason) -> Output {
    to(INITIATOR, CUT, Body::Failed { reason })
}

fn gave_up(epoch: u32, reason: FailReason) -> Vec<Output> {
    let discard =
        Output::Discard { cut: CUT, epoch: Epoch(epoch), reason: DiscardReason::Failed(reason.clone()) };
    vec![failed(reason), discard]
}

fn aborted(epoch: u32) -> Vec<Output> {
    let reason = DiscardReason::Aborted(AbortReason::Cancelled);
    vec![Output::Discard { cut: CUT, epoch: Epoch(epoch), reason }]
}

fn commit() -> Input {
    says(INITIATOR, CUT, Body::Commit)
}

fn take() -> Input {
    says(INITIATOR, CUT, Body::Take)
}

fn path(state: &str) -> Vec<Input> {
    let all = [
        ("idle", vec![]),
        ("preparing", vec![prepare(INITIATOR, CUT)]),
        ("prepared", vec![Input::Prepared { snapshot: CUT.snapshot }]),
        ("cutting", vec![take()]),
        ("capturing", vec![Input::CutDone { cut: CUT, taken: Taken::default() }]),
        (
            "in doubt",
            vec![
                expect(0),
                Input::CaptureDone { cut: CUT, machines: Vec::new() },
                Input::RecordingStopped { cut: CUT, networks: Vec::new() },
            ],
        ),
        ("keeping", vec![commit()]),
        ("kept", vec![Input::Finished { cut: CUT }]),
    ];
    let mut inputs = Vec::new();
    for (name, more) in all {
        inputs.extend(more);
        if name == state {
            return inputs;
        }
    }
    panic!("no state {state}");
}

fn at(state: &str) -> Participant {
    let mut participant = Participant::new(ME, START);
    for input in path(state) {
        participant.handle(input, Duration::ZERO);
    }
    let name = if state == "kept" { "idle" } else { state };
    assert_eq!(participant.state_name(), name);
    participant
}

#[track_caller]
fn check(state: &str, inputs: Vec<Input>, after: &str, outputs: Vec<Output>) -> Participant {
    let mut participant = at(state);
    let mut last = Vec::new();
    for input in inputs {
        last = participant.handle(input, Duration::ZERO);
    }
    assert_eq!((participant.state_name(), &last), (after, &outputs), "from {state}");
    participant
}

#[test]
fn the_way_to_commit() {
    let start = Output::StartPrepare {
        snapshot: CUT.snapshot,
        capture: CaptureMode::Live,
        in_flight: InFlight::Record,
    };
    check("idle", vec![prepare(INITIATOR, CUT)], "preparing", vec![start]);
    let prepared = to(INITIATOR, CUT, Body::Prepared { floor: START });
    check("preparing", vec![Input::Prepared { snapshot: CUT.snapshot }], "prepared", vec![prepared.clone()]);
    check("prepared", vec![prepare(INITIATOR, CUT)], "prepared", vec![prepared]);
    check("prepared", vec![take()], "cutting", vec![Output::StartCut { cut: CUT }]);
    let colour = Input::NewerColourSeen { epoch: CUT.epoch };
    check("prepared", vec![colour], "cutting", vec![Output::StartCut { cut: CUT }]);
    let taken = to(INITIATOR, CUT, Body::Taken(Taken::default()));
    let done = Input::CutDone { cut: CUT, taken: Taken::default() };
    check("cutting", vec![done], "capturing", vec![taken.clone()]);
    check("capturing", vec![take()], "capturing", vec![taken]);
    let report = to(INITIATOR, CUT, Body::Report(Report::default()));
    check("in doubt", vec![expect(0)], "in doubt", vec![report]);
    check("in doubt", vec![commit()], "keeping", vec![Output::Keep { cut: CUT }]);
    let kept = to(INITIATOR, CUT, Body::CommitDone);
    check("keeping", vec![commit()], "keeping", vec![]);
    check("keeping", vec![Input::Finished { cut: CUT }], "idle", vec![kept.clone()]);
    check("kept", vec![commit()], "idle", vec![kept.clone()]);
    check("kept", vec![expect(0)], "idle", vec![kept]);
}

#[test]
fn recording_stops_when_all_have_come_or_the_time_is_over() {
    let stop = |missing: &[(Channel, u64)]| {
        vec![Output::StopRecording { cut: CUT, missing: missing.iter().copied().collect::<BTreeMap<_, _>>() }]
    };
    check("capturing", vec![expect(0)], "capturing", stop(&[]));
    check("capturing", vec![expect(3), received(2, 0)], "capturing", vec![]);
    check("capturing", vec![expect(3), received(2, 0), received(3, 0)], "capturing", stop(&[]));
    check("capturing", vec![received(3, 0), expect(3)], "capturing", stop(&[]));
    check("capturing", vec![received(3, 0), received(1, 0), expect(3)], "capturing", stop(&[]));
    // An old loss is not waited for again, and stays a loss.
    check("capturing", vec![expect(3), received(2, 1)], "capturing", stop(&[(WIRE, 1)]));

    let mut late = check("capturing", vec![expect(3), received(1, 0)], "capturing", vec![]);
    let timeout = late.poll_timeout().unwrap();
    assert_eq!(timeout, Duration::from_millis(100));
    assert_eq!(late.handle(Input::Tick, timeout - Duration::from_millis(1)), []);
    assert_eq!(late.handle(Input::Tick, timeout), stop(&[(WIRE, 2)]));
    assert_eq!(late.handle(expect(3), timeout), [], "a repetition");
    assert_eq!(late.handle(received(3, 0), timeout), [], "too late to be recorded");
}

#[test]
fn a_report_needs_both_the_machines_and_the_frames() {
    let machines = Input::CaptureDone { cut: CUT, machines: Vec::new() };
    let stopped = Input::RecordingStopped { cut: CUT, networks: Vec::new() };
    let report = vec![to(INITIATOR, CUT, Body::Report(Report::default()))];
    check("capturing", vec![machines.clone(), stopped.clone()], "capturing", vec![]);
    check("capturing", vec![expect(0), machines.clone()], "capturing", vec![]);
    check("capturing", vec![expect(0), machines.clone(), stopped.clone()], "in doubt", report.clone());
    check("capturing", vec![expect(0), stopped, machines], "in doubt", report);
}

#[test]
fn before_the_report_it_gives_up_and_after_it_not() {
    for (state, epoch) in [("preparing", 5), ("prepared", 5), ("cutting", 6), ("capturing", 6)] {
        let discarding = "discarding";
        check(state, vec![abort(CUT)], discarding, aborted(epoch));
        check(state, vec![Input::Cancel], discarding, gave_up(epoch, FailReason::Cancelled));
        let lost = vec![Input::PeerLost { peer: INITIATOR }];
        check(state, lost, discarding, gave_up(epoch, FailReason::InitiatorLost));
        check(state, vec![Input::PeerLost { peer: OTHER }], state, vec![]);
        let mut late = at(state);
        let deadline = late.poll_timeout().unwrap();
        let outputs = late.handle(Input::Tick, deadline);
        assert_eq!(outputs, gave_up(epoch, FailReason::DeadlinePassed { deadline_ms: 1000 }));
        let seen = Epoch(9);
        check(
            state,
            vec![Input::NewerColourSeen { epoch: seen }],
            discarding,
            gave_up(9, FailReason::Overtaken { seen }),
        );
    }
    for input in [Input::Cancel, Input::PeerLost { peer: INITIATOR }] {
        check("in doubt", vec![input], "in doubt", vec![]);
    }
    check("in doubt", vec![abort(CUT)], "discarding", aborted(6));
    let (cut, detail) = (CUT, String::from("no"));
    let cases = [
        (
            "preparing",
            Input::PrepareFailed { snapshot: CUT.snapshot, detail: detail.clone() },
            5,
            FailReason::Prepare { detail: detail.clone() },
        ),
        (
            "cutting",
            Input::CutFailed { cut, detail: detail.clone() },
            6,
            FailReason::Cut { detail: detail.clone() },
        ),
        (
            "cutting",
            Input::CaptureFailed { cut, detail: detail.clone() },
            6,
            FailReason::Capture { detail: detail.clone() },
        ),
        (
            "capturing",
            Input::CaptureFailed { cut, detail: detail.clone() },
            6,
            FailReason::Capture { detail },
        ),
    ];
    for (state, input, epoch, reason) in cases {
        let mut participant = check(state, vec![input], "discarding", gave_up(epoch, reason.clone()));
        assert_eq!(participant.handle(take(), Duration::ZERO), [], "the answer waits for the host");
        assert_eq!(participant.handle(Input::Finished { cut: CUT }, Duration::ZERO), []);
        assert_eq!(participant.handle(take(), Duration::ZERO), [failed(reason.clone())], "told again");
        assert_eq!(participant.handle(prepare(INITIATOR, CUT), Duration::ZERO), [failed(reason)]);
        assert_eq!(participant.handle(abort(CUT), Duration::ZERO), [to(INITIATOR, CUT, Body::AbortDone)]);
    }
}

#[test]
fn a_decision_is_not_taken_back() {
    let rejected = |got, state| {
        vec![Output::Rejected { from: INITIATOR, violation: Violation::Unexpected { got, state } }]
    };
    check("keeping", vec![abort(CUT)], "keeping", rejected("Abort", "keeping"));
    check("kept", vec![abort(CUT)], "idle", rejected("Abort", "idle"));
    for state in ["preparing", "prepared", "cutting", "capturing"] {
        check(state, vec![commit()], state, rejected("Commit", state));
    }
    check("in doubt", vec![abort(CUT), commit()], "discarding", rejected("Commit", "discarding"));
    let finished = Input::Finished { cut: CUT };
    check("in doubt", vec![abort(CUT), finished, commit()], "idle", rejected("Commit", "idle"));
}

#[test]
fn an_ended_cut_is_never_entered_again() {
    let done = to(INITIATOR, CUT, Body::AbortDone);
    let behind = to(INITIATOR, CUT, Body::EpochBehind { floor: CUT.epoch });
    let finished = Input::Finished { cut: CUT };
    check("prepared", vec![abort(CUT), finished.clone()], "idle", vec![done.clone()]);
    check("prepared", vec![abort(CUT), finished.clone(), take()], "idle", vec![done.clone()]);
    check("prepared", vec![abort(CUT), finished, prepare(INITIATOR, CUT)], "idle", vec![behind.clone()]);
    check("idle", vec![abort(CUT)], "idle", vec![done]);
    check("idle", vec![abort(CUT), prepare(INITIATOR, CUT)], "idle", vec![behind.clone()]);
    check("kept", vec![prepare(INITIATOR, CUT)], "idle", vec![behind]);
    check("idle", vec![take()], "idle", vec![failed(FailReason::NotPrepared)]);
    check("idle", vec![expect(0)], "idle", vec![failed(FailReason::NotPrepared)]);
}

#[test]
fn colours_from_outside_a_cut_are_adopted() {
    let raise = |epoch| vec![Output::RaiseEpoch { epoch: Epoch(epoch) }];
    let seen = |epoch| Input::NewerColourSeen { epoch: Epoch(epoch) };
    for state in ["idle", "in doubt", "keeping", "kept"] {
        let participant = check(state, vec![seen(8)], state.replace("kept", "idle").as_str(), raise(8));
        assert_eq!(participant.epoch(), Epoch(8));
    }
    check("idle", vec![seen(5)], "idle", vec![]);
    // Left by an aborted cut, below the one that is prepared.
    let mut ahead = at("idle");
    ahead.handle(prepare(INITIATOR, cut(1, 9)), Duration::ZERO);
    assert_eq!(ahead.handle(seen(7), Duration::ZERO), raise(7));
    ahead.handle(Input::Prepared { snapshot: CUT.snapshot }, Duration::ZERO);
    assert_eq!(ahead.handle(seen(8), Duration::ZERO), raise(8));
    assert_eq!(ahead.handle(seen(9), Duration::ZERO), [Output::StartCut { cut: cut(1, 9) }]);
    // Cut elsewhere while this host was not ready, as after a restart here: it cannot succeed.
    check("preparing", vec![seen(6)], "discarding", gave_up(6, FailReason::Overtaken { seen: Epoch(6) }));
}

#[test]
fn an_attempt_may_rise_to_a_higher_epoch() {
    let higher = cut(1, 8);
    let prepared = to(INITIATOR, higher, Body::Prepared { floor: START });
    check("prepared", vec![prepare(INITIATOR, higher)], "prepared", vec![prepared.clone()]);
    let ready = Input::Prepared { snapshot: CUT.snapshot };
    check("preparing", vec![prepare(INITIATOR, higher), ready], "prepared", vec![prepared]);
    check("prepared", vec![prepare(INITIATOR, higher), prepare(INITIATOR, CUT)], "prepared", vec![]);
    let participant = check("prepared", vec![prepare(INITIATOR, higher), abort(CUT)], "prepared", vec![]);
    assert_eq!(participant.active(), Some(higher));
    let participant = check(
        "prepared",
        vec![abort(higher)],
        "discarding",
        vec![Output::Discard {
            cut: higher,
            epoch: START,
            reason: DiscardReason::Aborted(AbortReason::Cancelled),
        }],
    );
    assert_eq!(participant.active(), Some(higher));
}

/// A frame had begun the cut, of a host that came back from a crash at the proposed epoch: the attempt rises above it.
#[test]
fn a_cut_that_its_own_attempt_has_left_behind_is_given_up() {
    let higher = cut(1, 8);
    let mut participant = check(
        "capturing",
        vec![prepare(INITIATOR, higher)],
        "discarding",
        gave_up(CUT.epoch.0, FailReason::Superseded { by: higher }),
    );
    // Repeated, it finds this host ready to take part again.
    participant.handle(Input::Finished { cut: CUT }, Duration::ZERO);
    let outputs = participant.handle(prepare(INITIATOR, higher), Duration::ZERO);
    assert!(matches!(outputs[..], [Output::StartPrepare { .. }]), "{outputs:?}");
    assert_eq!(participant.active(), Some(higher));
    // While the initiator has not heard that this host is prepared, it asks again, and must learn to rise.
    let behind = vec![to(INITIATOR, CUT, Body::EpochBehind { floor: CUT.epoch })];
    check("cutting", vec![prepare(INITIATOR, CUT)], "cutting", behind.clone());
    check("capturing", vec![prepare(INITIATOR, CUT)], "capturing", behind);
    check("capturing", vec![prepare(INITIATOR, cut(1, 5))], "capturing", vec![]);
}

#[test]
fn one_cut_at_a_time() {
    let next = cut(2, 7);
    let busy = to(OTHER, next, Body::Failed { reason: FailReason::Busy { with: CUT } });
    check("prepared", vec![prepare(OTHER, next)], "prepared", vec![busy]);
    check(
        "prepared",
        vec![prepare(INITIATOR, next)],
        "discarding",
        gave_up(5, FailReason::Superseded { by: next }),
    );
    let restarted = cut(2, 6);
    let behind = to(INITIATOR, restarted, Body::EpochBehind { floor: CUT.epoch });
    check("prepared", vec![prepare(INITIATOR, restarted)], "prepared", vec![behind]);
    check("in doubt", vec![prepare(INITIATOR, next)], "in doubt", vec![to(INITIATOR, CUT, Body::Query)]);
    check("keeping", vec![prepare(INITIATOR, next)], "keeping", vec![]);
    let stranger = vec![Output::Rejected { from: OTHER, violation: Violation::Stranger }];
    check("prepared", vec![says(OTHER, CUT, Body::Take)], "prepared", stranger.clone());
    check("in doubt", vec![says(OTHER, CUT, Body::Commit)], "in doubt", stranger);
}

#[test]
fn in_doubt_it_asks_until_it_is_told() {
    let mut participant = Participant::recover(ME, START, CUT, INITIATOR, Duration::from_secs(1));
    assert_eq!(participant.epoch(), CUT.epoch);
    let mut asked_at_ms = Vec::new();
    for _ in 0..6 {
        let now = participant.poll_timeout().unwrap();
        assert_eq!(participant.handle(Input::Tick, now), [to(INITIATOR, CUT, Body::Query)]);
        asked_at_ms.push(now.as_millis());
    }
    assert_eq!(asked_at_ms, [1000, 2000, 4000, 8000, 12000, 16000]);
    let now = Duration::from_secs(16);
    assert_eq!(participant.handle(expect(0), now), [failed(FailReason::ReportLost)]);
    let found = |committed| Input::OutcomeFound { cut: CUT, committed };
    assert_eq!(participant.clone().handle(found(true), now), [Output::Keep { cut: CUT }]);
    let outputs = participant.handle(found(false), now);
    let reason = DiscardReason::Aborted(AbortReason::NoManifest);
    assert_eq!(outputs, [Output::Discard { cut: CUT, epoch: CUT.epoch, reason }]);
}

#[test]
fn hostile_messages_change_nothing() {
    let strange = Channel { peer: ParticipantId(77), network: NetworkId(0) };
    let incoming = vec![ChannelCount { channel: strange, copies: 1 }];
    let violation = Violation::Channel { peer: strange.peer, network: 0 };
    let rejected = vec![Output::Rejected { from: INITIATOR, violation }];
    check("capturing", vec![says(INITIATOR, CUT, Body::Expect { incoming })], "capturing", rejected);
    let message = Message { version: 9, ..Message::new(CUT, Body::Take) };
    let reason = FailReason::UnsupportedVersion { got: 9, speaks: 1 };
    let outputs =
        vec![failed(reason), Output::Rejected { from: INITIATOR, violation: Violation::Version { got: 9 } }];
    check("prepared", vec![Input::Message { from: INITIATOR, message }], "prepared", outputs);
    let violation = Violation::Unexpected { got: "Query", state: "prepared" };
    let rejected = vec![Output::Rejected { from: INITIATOR, violation }];
    check("prepared", vec![says(INITIATOR, CUT, Body::Query)], "prepared", rejected);
    let mut unlisted = Participant::new(ParticipantId(9), START);
    let outputs = unlisted.handle(prepare(INITIATOR, CUT), Duration::ZERO);
    assert_eq!(outputs, [failed(FailReason::NotListed)]);
}
