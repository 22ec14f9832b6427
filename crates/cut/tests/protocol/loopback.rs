//! One computer: the agent's view.

use std::time::Duration;

use diorama_cut::loopback::{Action, Event};
use diorama_cut::message::{Epoch, MAX_NAME_BYTES};
use diorama_cut::participant::DiscardReason;
use diorama_cut::report::{Frames, MachineCut, NetworkFrames, NetworkId, Taken};
use diorama_cut::{
    AbortReason, Config, FailReason, Loopback, MachineReport, Outcome, ParticipantId, SnapshotId, StartError,
};

const FIRST: SnapshotId = SnapshotId([1; 16]);
const SECOND: SnapshotId = SnapshotId([2; 16]);

fn machine(name: &str, cut_at_us: u64) -> MachineCut {
    MachineCut { machine: name.into(), cut_at_us, pause_us: 2, stall_us: 3 }
}

fn start(loopback: &mut Loopback, snapshot: SnapshotId) {
    let actions = loopback.start(snapshot, Config::default(), Duration::ZERO).unwrap();
    assert!(matches!(actions.as_slice(), [Action::Prepare { .. }]), "{actions:?}");
}

fn feed(loopback: &mut Loopback, event: Event) -> Vec<Action> {
    loopback.handle(event, Duration::from_millis(1))
}

fn events() -> Vec<Event> {
    let taken = Taken { machines: vec![machine("server", 1000), machine("client", 1310)], sent: Vec::new() };
    let frames = Frames { sent_before: 10, delivered_before: 8, in_flight: 2, ..Frames::default() };
    vec![
        Event::Prepared,
        Event::CutDone(taken),
        Event::CaptureDone(vec![MachineReport { machine: "server".into(), captured: vec![1] }]),
        Event::RecordingStopped(vec![NetworkFrames { network: NetworkId(0), frames }]),
        Event::ManifestWritten,
        Event::Finished,
    ]
}

fn run_to_commit(loopback: &mut Loopback, snapshot: SnapshotId) -> Epoch {
    start(loopback, snapshot);
    let actions: Vec<_> = events().into_iter().map(|event| feed(loopback, event)).collect();
    let cut = match actions.last().map(Vec::as_slice) {
        Some([Action::Done { cut, outcome: Outcome::Committed }]) => *cut,
        other => panic!("{other:?}"),
    };
    assert_eq!(actions[0], [Action::Cut { epoch: cut.epoch }]);
    assert_eq!(actions[1], [Action::StopRecording]);
    assert_eq!(actions[2], []);
    let [Action::WriteManifest { snapshot: written }] = actions[3].as_slice() else { panic!("{actions:?}") };
    assert_eq!(written.cut, cut);
    assert_eq!(written.skew_us(), 310);
    assert_eq!(written.parts[&ParticipantId(0)].report.machines[0].captured, [1]);
    assert_eq!(written.networks()[&NetworkId(0)].unaccounted(), 0);
    assert_eq!(actions[4], [Action::Keep]);
    assert_eq!((loopback.active(), loopback.poll_timeout(), loopback.epoch()), (None, None, cut.epoch));
    cut.epoch
}

#[test]
fn a_snapshot_and_another() {
    let mut loopback = Loopback::new(Epoch(4));
    assert_eq!(run_to_commit(&mut loopback, FIRST), Epoch(5));
    assert_eq!(run_to_commit(&mut loopback, SECOND), Epoch(6));
}

#[test]
fn cancelled_after_any_step_and_then_another() {
    for steps in 0..=4 {
        let mut loopback = Loopback::new(Epoch(4));
        start(&mut loopback, FIRST);
        for event in events().into_iter().take(steps) {
            feed(&mut loopback, event);
        }
        let busy = loopback.start(SECOND, Config::default(), Duration::ZERO);
        assert!(matches!(busy, Err(StartError::Busy { .. })));
        let actions = feed(&mut loopback, Event::Cancel);
        if steps == 4 {
            assert_eq!(actions, [], "the manifest is being written");
            assert_eq!(feed(&mut loopback, Event::ManifestWritten), [Action::Keep]);
        } else {
            let epoch = Epoch(if steps == 0 { 4 } else { 5 });
            let reason = DiscardReason::Aborted(AbortReason::Cancelled);
            assert_eq!(actions, [Action::Discard { epoch, reason }]);
        }
        // What the agent's workers still answer is ignored.
        for event in [Event::Prepared, Event::CaptureDone(Vec::new()), Event::CaptureFailed("late".into())] {
            assert_eq!(feed(&mut loopback, event), []);
        }
        let actions = feed(&mut loopback, Event::Finished);
        assert!(matches!(actions.as_slice(), [Action::Done { .. }]), "{actions:?}");
        assert_eq!(run_to_commit(&mut loopback, SECOND), Epoch(6));
    }
}

#[test]
fn every_failure_discards_and_the_next_succeeds() {
    let long = MachineCut { machine: "x".repeat(MAX_NAME_BYTES + 1), ..machine("", 0) };
    let failures = [
        (0, Event::PrepareFailed("a".into())),
        (1, Event::CutFailed("b".into())),
        (1, Event::CutDone(Taken { machines: vec![long], sent: Vec::new() })),
        (2, Event::CaptureFailed("c".into())),
        (4, Event::ManifestFailed("d".into())),
    ];
    for (steps, failure) in failures {
        let mut loopback = Loopback::new(Epoch(4));
        start(&mut loopback, FIRST);
        for event in events().into_iter().take(steps) {
            feed(&mut loopback, event);
        }
        let actions = feed(&mut loopback, failure.clone());
        assert!(matches!(actions.as_slice(), [Action::Discard { .. }]), "{failure:?}: {actions:?}");
        let actions = feed(&mut loopback, Event::Finished);
        let done = matches!(actions.as_slice(), [Action::Done { outcome: Outcome::Aborted(_), .. }]);
        assert!(done, "{failure:?}: {actions:?}");
        run_to_commit(&mut loopback, SECOND);
    }
}

#[test]
fn a_step_that_never_ends_is_given_up_at_the_deadline_and_done_waits_for_the_discard() {
    let mut loopback = Loopback::new(Epoch(4));
    start(&mut loopback, FIRST);
    let mut actions = Vec::new();
    let mut ticks = 0;
    let mut now = Duration::ZERO;
    while actions.is_empty() {
        now = loopback.poll_timeout().unwrap();
        actions = loopback.handle(Event::Tick, now);
        ticks += 1;
        assert!(ticks < 1000);
    }
    assert_eq!(now, Config::default().deadline);
    let reason = DiscardReason::Failed(FailReason::DeadlinePassed { deadline_ms: 600_000 });
    assert_eq!(actions, [Action::Discard { epoch: Epoch(4), reason }]);
    for _ in 0..100 {
        let now = loopback.poll_timeout().unwrap();
        assert_eq!(loopback.handle(Event::Tick, now), []);
    }
    let actions = feed(&mut loopback, Event::Finished);
    assert!(matches!(actions.as_slice(), [Action::Done { outcome: Outcome::Aborted(_), .. }]), "{actions:?}");
}
