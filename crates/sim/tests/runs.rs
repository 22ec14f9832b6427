//! Whole runs. Each prints its seed on failure; the same seed fails again in the same way.

use diorama_sim::{Failure, Figures, Scenario, Simulation, Verdict, scenario::MS, scenario::Sabotage};

#[track_caller]
fn run(scenario: Scenario) -> Figures {
    let (seed, hosts) = (scenario.seed, scenario.hosts);
    Simulation::new(scenario).run().unwrap_or_else(|failure| panic!("seed {seed}, {hosts} hosts: {failure}"))
}

fn stormy(seed: u64) -> Scenario {
    Scenario { vector_clocks: true, ..Scenario::stormy(seed, 3 + seed as usize % 6, 4, 2_000 * MS) }
}

#[test]
fn a_seed_replays_bit_for_bit_and_another_does_not() {
    let [first, again, other] = [7, 7, 8].map(|seed| run(stormy(seed)));
    assert_eq!(first.digest, again.digest);
    assert_eq!(serde_json::to_string(&first).unwrap(), serde_json::to_string(&again).unwrap());
    assert_ne!(first.digest, other.digest);
}

#[test]
fn whatever_the_network_and_the_hosts_do_each_snapshot_that_exists_is_consistent() {
    let (mut snapshots, mut attempts, mut lost, mut recorded, mut by_frame, mut crashed_in) =
        (0, 0, 0, 0, 0, std::collections::BTreeSet::new());
    for seed in 0..60 {
        let figures = run(stormy(seed));
        snapshots += figures.snapshots as usize;
        attempts += figures.attempts.len();
        lost += figures.attempts.iter().map(|attempt| attempt.wire_loss).sum::<u64>();
        recorded += figures.attempts.iter().map(|attempt| attempt.in_flight).sum::<u64>();
        by_frame += figures.begun_by_frame;
        crashed_in.extend(figures.states_at_crash.into_keys());
    }
    println!(
        "{snapshots} snapshots of {attempts} attempts, {recorded} frames recorded, {lost} lost, {by_frame} cuts begun by frames"
    );
    println!("agents died when {crashed_in:?}");
    assert!(snapshots > 60 && attempts > snapshots, "success and failure are both to be seen");
    assert!(lost > 0 && recorded > 0 && by_frame > 0);
    assert!(crashed_in.len() >= 6, "deaths at few states only: {crashed_in:?}");
}

#[test]
fn the_judge_sees_a_cut_without_colours_and_a_recording_with_a_hole() {
    let mut scenario = Scenario::quiet(3, 4, 8);
    scenario.vector_clocks = true;
    // Some machines run again, and send, before the message that others are to be cut has come.
    scenario.send_every_ns = (MS / 4, 2 * MS);
    scenario.link.jitter_ns = 10 * MS;
    run(scenario.clone());
    scenario.sabotage = Some(Sabotage::ForgetColour);
    let failure = Simulation::new(scenario.clone()).run().unwrap_err();
    assert!(matches!(failure, Failure::Judged(Verdict::CrossedBackwards { .. })), "{failure}");
    scenario.sabotage = Some(Sabotage::LoseARecordedFrame);
    let failure = Simulation::new(scenario).run().unwrap_err();
    assert!(matches!(failure, Failure::Judged(Verdict::NotRecorded { .. })), "{failure}");
}

#[test]
fn messages_are_linear_in_hosts_and_the_cut_stays_below_two_round_trips_and_the_slowest_local_cut() {
    let per_host = [10, 100, 300].map(|hosts| {
        let figures = run(Scenario::quiet(5, hosts, 10));
        let attempt = &figures.attempts[0];
        let bound_ns = 2 * figures.round_trip_ns + attempt.slowest_local_cut_ns;
        let closing_ns = attempt.closing_time_ns().expect("it was closed");
        assert!(closing_ns <= bound_ns, "{hosts} hosts: {closing_ns} ns, at most {bound_ns}");
        assert!(attempt.in_flight > 0);
        attempt.messages as f64 / hosts as f64
    });
    // Prepare, Take, Expect, Commit and their answers; now and then one is repeated because its answer took its time.
    assert!(per_host.iter().all(|&messages| (8.0..9.0).contains(&messages)), "{per_host:?}");
}

#[test]
fn a_thousand_hosts_and_ten_thousand_machines() {
    let mut scenario = Scenario::quiet(11, 1000, 10);
    scenario.send_every_ns = (20 * MS, 200 * MS);
    let figures = run(scenario);
    assert_eq!((figures.machines, figures.snapshots), (10_000, 1));
    assert!(figures.attempts[0].in_flight > 0);
}
