//! Each transition of the initiator.

use std::{collections::BTreeSet, time::Duration};

use diorama_cut::initiator::{Config, Initiator, Input, Outcome, Output, StartError};
use diorama_cut::message::{Body, Epoch, Message, Phase, Violation};
use diorama_cut::report::{Channel, ChannelCount, NetworkId, Report, Taken};
use diorama_cut::{AbortReason, CutId, FailReason, ParticipantId, SnapshotId};

const A: ParticipantId = ParticipantId(1);
const B: ParticipantId = ParticipantId(2);
const STRANGER: ParticipantId = ParticipantId(9);
const CUT: CutId = CutId { snapshot: SnapshotId([1; 16]), epoch: Epoch(6) };

fn config() -> Config {
    Config { deadline: Duration::from_secs(5), settle_deadline: Duration::from_secs(3), ..Config::default() }
}

fn says(from: ParticipantId, body: Body) -> Input {
    Input::Message { from, message: Message::new(CUT, body) }
}

fn taken(to: ParticipantId, copies: u64) -> Body {
    let channel = Channel { peer: to, network: NetworkId(4) };
    Body::Taken(Taken { machines: Vec::new(), sent: vec![ChannelCount { channel, copies }] })
}

fn path(state: &str) -> Vec<Input> {
    let prepared = || Body::Prepared { floor: Epoch(5) };
    let report = || Body::Report(Report::default());
    let all = [
        ("preparing", vec![]),
        ("taking", vec![says(A, prepared()), says(B, prepared())]),
        ("collecting", vec![says(B, taken(A, 7)), says(A, taken(B, 0))]),
        ("writing", vec![says(A, report()), says(B, report())]),
        ("committing", vec![Input::ManifestWritten { cut: CUT }]),
        ("idle", vec![says(A, Body::CommitDone), says(B, Body::CommitDone)]),
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

fn at(state: &str) -> Initiator {
    let mut initiator = Initiator::new(Epoch(5));
    initiator.start(CUT.snapshot, [B, A], config(), Duration::ZERO).unwrap();
    for input in path(state) {
        initiator.handle(input, Duration::ZERO);
    }
    assert_eq!(initiator.state_name(), state);
    initiator
}

/// Whom it sent what, and the names of everything else.
fn brief(outputs: &[Output]) -> Vec<(u32, &'static str)> {
    outputs
        .iter()
        .map(|output| match output {
            Output::Send { to, message } => (to.0, message.body.name()),
            Output::WriteManifest { .. } => (0, "write"),
            Output::LookUpOutcome { from, .. } => (from.0, "look up"),
            Output::Done { outcome: Outcome::Committed, .. } => (0, "committed"),
            Output::Done { outcome: Outcome::Aborted(_), .. } => (0, "aborted"),
            Output::Rejected { from, .. } => (from.0, "rejected"),
        })
        .collect()
}

#[track_caller]
fn check(state: &str, inputs: Vec<Input>, after: &str, outputs: &[(u32, &'static str)]) -> Initiator {
    let mut initiator = at(state);
    let mut last = Vec::new();
    for input in inputs {
        last = initiator.handle(input, Duration::ZERO);
    }
    assert_eq!((initiator.state_name(), brief(&last).as_slice()), (after, outputs), "from {state}");
    initiator
}

#[test]
fn the_way_to_commit() {
    let mut initiator = Initiator::new(Epoch(5));
    let outputs = initiator.start(CUT.snapshot, [B, A], config(), Duration::ZERO).unwrap();
    assert_eq!(brief(&outputs), [(1, "Prepare"), (2, "Prepare")]);
    let prepared = || Body::Prepared { floor: Epoch(5) };
    check("preparing", vec![says(A, prepared()), says(A, prepared())], "preparing", &[]);
    check("preparing", vec![says(A, prepared()), says(B, prepared())], "taking", &[(1, "Take"), (2, "Take")]);
    check(
        "taking",
        vec![says(A, taken(B, 1)), says(B, taken(A, 2))],
        "collecting",
        &[(1, "Expect"), (2, "Expect")],
    );
    let report = || Body::Report(Report::default());
    check("collecting", vec![says(A, report()), says(A, report())], "collecting", &[]);
    check("collecting", vec![says(A, report()), says(B, report())], "writing", &[(0, "write")]);
    check(
        "writing",
        vec![Input::ManifestWritten { cut: CUT }],
        "committing",
        &[(1, "Commit"), (2, "Commit")],
    );
    check("committing", vec![says(A, Body::CommitDone)], "committing", &[]);
    check(
        "committing",
        vec![says(A, Body::CommitDone), says(B, Body::CommitDone)],
        "idle",
        &[(0, "committed")],
    );
}

#[test]
fn each_receiver_is_told_what_was_sent_to_it() {
    let mut initiator = at("taking");
    initiator.handle(says(A, taken(B, 11)), Duration::ZERO);
    let outputs = initiator.handle(says(B, taken(A, 22)), Duration::ZERO);
    for (to, from, copies) in [(A, B, 22), (B, A, 11)] {
        let channel = Channel { peer: from, network: NetworkId(4) };
        let body = Body::Expect { incoming: vec![ChannelCount { channel, copies }] };
        assert!(outputs.contains(&Output::Send { to, message: Message::new(CUT, body) }), "{outputs:?}");
    }
}

#[test]
fn nothing_but_the_manifest_decides_once_it_is_being_written() {
    let lost = Input::PeerLost { peer: A };
    let failed = says(A, Body::Failed { reason: FailReason::Cancelled });
    let aborts = [(1, "Abort"), (2, "Abort")];
    for state in ["preparing", "taking", "collecting"] {
        for input in [Input::Cancel, lost.clone(), failed.clone()] {
            check(state, vec![input], "aborting", &aborts);
        }
        check(state, vec![Input::ManifestWritten { cut: CUT }], state, &[]);
    }
    let manifest_failed = Input::ManifestFailed { cut: CUT, detail: "full".into() };
    for input in [Input::Cancel, lost.clone(), failed.clone()] {
        check("writing", vec![input.clone()], "writing", &[]);
        check("committing", vec![input], "committing", &[]);
    }
    check("writing", vec![manifest_failed.clone()], "aborting", &aborts);
    check("committing", vec![manifest_failed.clone()], "committing", &[]);
    check("writing", vec![manifest_failed, Input::ManifestWritten { cut: CUT }], "aborting", &[]);
    assert_eq!(at("writing").poll_timeout(), None, "no deadline of ours may decide");
    // A part that is reported is safe.
    let report = says(A, Body::Report(Report::default()));
    check("collecting", vec![report.clone(), lost], "collecting", &[]);
    check("collecting", vec![report, failed], "collecting", &[]);
}

#[test]
fn who_has_answered_a_step_is_needed_until_it_has_reported() {
    let lost = |peer| Input::PeerLost { peer };
    let aborts = [(1, "Abort"), (2, "Abort")];
    let prepared = says(A, Body::Prepared { floor: Epoch(5) });
    check("preparing", vec![prepared, lost(A)], "aborting", &aborts);
    check("taking", vec![says(A, taken(B, 1)), lost(A)], "aborting", &aborts);
    for state in ["preparing", "taking", "collecting"] {
        check(state, vec![lost(STRANGER)], state, &[]);
    }
}

/// Nobody waits for the answer of a host that is gone, whenever it went; it asks when it comes back.
#[test]
fn who_is_lost_is_not_waited_for_once_it_is_decided() {
    let lost = |peer| Input::PeerLost { peer };
    let done = |body| says(B, body);
    // It was needed: its loss ends the attempt, and the other's answer alone is waited for.
    for state in ["preparing", "taking", "collecting"] {
        check(state, vec![lost(A), done(Body::AbortDone)], "idle", &[(0, "aborted")]);
    }
    // It had reported, or was lost while the manifest was written, or since.
    let report = || Body::Report(Report::default());
    let written = Input::ManifestWritten { cut: CUT };
    let reported = vec![says(A, report()), lost(A), says(B, report()), written.clone()];
    check("collecting", [reported, vec![done(Body::CommitDone)]].concat(), "idle", &[(0, "committed")]);
    check("writing", vec![lost(A), written.clone(), done(Body::CommitDone)], "idle", &[(0, "committed")]);
    check("committing", vec![done(Body::CommitDone), lost(A)], "idle", &[(0, "committed")]);
    check("committing", vec![done(Body::CommitDone), lost(STRANGER)], "committing", &[]);
    // All others are.
    check("committing", vec![lost(A)], "committing", &[]);
    check(
        "writing",
        vec![lost(A), lost(B), written.clone()],
        "idle",
        &[(1, "Commit"), (2, "Commit"), (0, "committed")],
    );
    // Who speaks is not lost.
    check("writing", vec![lost(A), says(A, report()), written, done(Body::CommitDone)], "committing", &[]);
    let mut initiator = at("committing");
    initiator.handle(done(Body::CommitDone), Duration::ZERO);
    let outputs = initiator.handle(lost(A), Duration::ZERO);
    let done = Output::Done { cut: CUT, outcome: Outcome::Committed, unsettled: BTreeSet::from([A]) };
    assert_eq!(outputs, [done]);
    assert_eq!(brief(&initiator.handle(says(A, Body::Query), Duration::ZERO)), [(1, "Commit")]);
}

#[test]
fn another_version_ends_only_the_cut_that_it_is_about() {
    let speaks_2 =
        |cut| Input::Message { from: A, message: Message { version: 2, ..Message::new(cut, Body::Query) } };
    let other = CutId { snapshot: SnapshotId([9; 16]), epoch: Epoch(2) };
    check("taking", vec![speaks_2(other)], "taking", &[(1, "rejected")]);
    check("taking", vec![speaks_2(CUT)], "aborting", &[(1, "rejected"), (1, "Abort"), (2, "Abort")]);
    check(
        "taking",
        vec![says(A, taken(B, 1)), speaks_2(CUT)],
        "aborting",
        &[(1, "rejected"), (1, "Abort"), (2, "Abort")],
    );
    let report = says(A, Body::Report(Report::default()));
    check("collecting", vec![report, speaks_2(CUT)], "collecting", &[(1, "rejected")]);
}

#[test]
fn what_is_told_to_each_receiver_is_in_the_order_that_a_message_must_have() {
    const C: ParticipantId = ParticipantId(3);
    let mut initiator = Initiator::new(Epoch(5));
    initiator.start(CUT.snapshot, [A, B, C], config(), Duration::ZERO).unwrap();
    let mut outputs = Vec::new();
    for from in [A, B, C] {
        initiator.handle(says(from, Body::Prepared { floor: Epoch(5) }), Duration::ZERO);
    }
    for from in [C, B, A] {
        let peers = [A, B, C].into_iter().filter(|&peer| peer != from);
        let sent = peers.flat_map(|peer| [2, 7].map(|n| Channel { peer, network: NetworkId(n) }));
        let sent = sent.map(|channel| ChannelCount { channel, copies: 1 }).collect();
        let message = Body::Taken(Taken { machines: Vec::new(), sent });
        outputs = initiator.handle(says(from, message), Duration::ZERO);
    }
    assert_eq!(brief(&outputs), [(1, "Expect"), (2, "Expect"), (3, "Expect")]);
    for output in outputs {
        let Output::Send { message, .. } = output else { panic!("{output:?}") };
        assert_eq!(message.check(), Ok(()));
        assert!(matches!(message.body, Body::Expect { incoming } if incoming.len() == 4));
    }
}

#[test]
fn deadlines_and_repetitions() {
    for (state, phase, request) in [
        ("preparing", Phase::Preparing, "Prepare"),
        ("taking", Phase::Taking, "Take"),
        ("collecting", Phase::Collecting, "Expect"),
    ] {
        let mut initiator = at(state);
        let mut repeated = 0;
        let outputs = loop {
            let now = initiator.poll_timeout().unwrap();
            let outputs = initiator.handle(Input::Tick, now);
            if initiator.state_name() == "aborting" {
                assert_eq!(now, Duration::from_secs(5));
                break outputs;
            }
            assert_eq!(brief(&outputs), [(1, request), (2, request)]);
            repeated += 1;
        };
        assert_eq!(repeated, 4, "after 250, 750, 1750, 3750 ms");
        let reason = AbortReason::DeadlinePassed { phase, deadline_ms: 5000, missing: 2, first_missing: A };
        let message = Message::new(CUT, Body::Abort { reason });
        assert_eq!(outputs[0], Output::Send { to: A, message });
    }
    // Who does not answer the decision is left to ask later.
    let mut initiator = at("committing");
    initiator.handle(says(B, Body::CommitDone), Duration::ZERO);
    let outputs = initiator.handle(Input::Tick, Duration::from_secs(3));
    let done = Output::Done { cut: CUT, outcome: Outcome::Committed, unsettled: BTreeSet::from([A]) };
    assert_eq!(outputs, [done]);
    let outputs = initiator.handle(says(A, Body::Query), Duration::from_secs(9));
    assert_eq!(brief(&outputs), [(1, "Commit")]);
}

#[test]
fn the_epoch_rises_above_every_participants() {
    let behind = |floor| says(A, Body::EpochBehind { floor: Epoch(floor) });
    let initiator = check("preparing", vec![behind(8)], "preparing", &[(1, "Prepare"), (2, "Prepare")]);
    assert_eq!(initiator.active().unwrap().epoch, Epoch(9));
    check("preparing", vec![behind(8), behind(8)], "preparing", &[]);
    check("preparing", vec![behind(u32::MAX)], "aborting", &[(1, "Abort"), (2, "Abort")]);
    check("taking", vec![behind(8)], "taking", &[]);
    // The next attempt is above an aborted one, whoever has seen that.
    let mut initiator = check("preparing", vec![Input::Cancel], "aborting", &[(1, "Abort"), (2, "Abort")]);
    for from in [A, B] {
        initiator.handle(says(from, Body::AbortDone), Duration::ZERO);
    }
    initiator.start(SnapshotId([2; 16]), [A], config(), Duration::ZERO).unwrap();
    assert_eq!(initiator.active().unwrap().epoch, Epoch(7));
}

#[test]
fn questions_are_answered_by_what_is_known() {
    let query = || says(A, Body::Query);
    check("preparing", vec![query()], "preparing", &[]);
    check("collecting", vec![query()], "collecting", &[(1, "Expect")]);
    check("writing", vec![query()], "writing", &[]);
    check("committing", vec![query()], "committing", &[(1, "Commit")]);
    check("idle", vec![query()], "idle", &[(1, "Commit")]);
    check("idle", vec![says(A, Body::Report(Report::default()))], "idle", &[(1, "Commit")]);
    check("preparing", vec![Input::Cancel, query()], "aborting", &[(1, "Abort")]);
    let other = CutId { snapshot: SnapshotId([9; 16]), epoch: Epoch(2) };
    let ask = Input::Message { from: A, message: Message::new(other, Body::Query) };
    let looked_up = |cut, committed| Input::OutcomeLookedUp { to: A, cut, committed };
    check("idle", vec![ask.clone()], "idle", &[(1, "look up")]);
    check("preparing", vec![ask], "preparing", &[(1, "look up")]);
    check("preparing", vec![looked_up(other, true)], "preparing", &[(1, "Commit")]);
    check("preparing", vec![looked_up(other, false)], "preparing", &[(1, "Abort")]);
    check("writing", vec![looked_up(CUT, false)], "writing", &[]);
}

#[test]
fn hostile_messages_change_nothing() {
    check(
        "preparing",
        vec![says(STRANGER, Body::Prepared { floor: Epoch(0) })],
        "preparing",
        &[(9, "rejected")],
    );
    check("taking", vec![says(A, taken(STRANGER, 1))], "taking", &[(1, "rejected")]);
    check("taking", vec![says(A, taken(A, 1))], "taking", &[(1, "rejected")]);
    check("taking", vec![says(A, Body::Commit)], "taking", &[(1, "rejected")]);
    let mut initiator = at("taking");
    let message = Message { version: 2, ..Message::new(CUT, Body::Query) };
    let outputs = initiator.handle(Input::Message { from: A, message }, Duration::ZERO);
    assert_eq!(outputs[0], Output::Rejected { from: A, violation: Violation::Version { got: 2 } });
    assert_eq!(initiator.state_name(), "aborting");
}

#[test]
fn a_start_that_cannot_be_is_refused() {
    let mut initiator = at("writing");
    let mut start = |ids: Vec<u32>, config| {
        initiator.start(SnapshotId([2; 16]), ids.into_iter().map(ParticipantId), config, Duration::ZERO)
    };
    assert_eq!(start(vec![1], config()), Err(StartError::Busy { with: CUT }));
    initiator = Initiator::new(Epoch(u32::MAX));
    let mut start = |ids: Vec<u32>, config| {
        initiator.start(SnapshotId([2; 16]), ids.into_iter().map(ParticipantId), config, Duration::ZERO)
    };
    assert_eq!(start(vec![], config()), Err(StartError::NoParticipants));
    assert_eq!(start((0..1025).collect(), config()), Err(StartError::TooManyParticipants { got: 1025 }));
    let endless = [
        Config { deadline: Duration::MAX, ..config() },
        Config { in_flight_deadline: Duration::MAX, ..config() },
    ];
    for endless in endless {
        assert!(matches!(start(vec![1], endless), Err(StartError::Deadline { .. })));
    }
    assert_eq!(start(vec![1], config()), Err(StartError::NoEpoch));
}
