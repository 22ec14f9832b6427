//! The protocol under a model checker: the shipped [`diorama_cut::Initiator`] and [`diorama_cut::Participant`] over a
//! network that loses, repeats and reorders, with machines that talk while they are cut, timers that fire at any moment,
//! and processes that crash. See `world` for what may happen, `properties` for what is judged.
//!
//! Hosts differ only by their number, which nothing but the order of lists depends on. So where frames go around the hosts in
//! a ring, or one host is as good as another, one choice of the pairs stands for all.
//!
//! `cargo test -p diorama-cut --test model -- --nocapture` prints how many states were explored; with `--ignored`, the
//! large ones (minutes, gigabytes).

mod host;
mod network;
mod properties;
mod world;

use std::time::Instant;

use stateright::{Checker, Model, UniformChooser};

use world::{Bounds, Faults};

/// Explores all of it, breadth first, prints the figures, and requires every property.
fn explore(name: &str, bounds: Bounds) {
    let begun = Instant::now();
    let checker = bounds.clone().checker().spawn_bfs().join();
    print("complete", name, &bounds, &checker, begun);
    checker.assert_properties();
}

enum How {
    Depth(usize),
    /// Runs from the beginning to the end, each action drawn.
    Random {
        seed: u64,
        states: usize,
    },
}

/// Explores a part, in which not everything that is to happen has to happen: requires that nothing is broken.
fn explore_in_part(name: &str, bounds: Bounds, how: How) {
    let begun = Instant::now();
    let found: Vec<_> = match how {
        How::Depth(depth) => {
            let checker = bounds.clone().checker().target_max_depth(depth).spawn_bfs().join();
            print("bounded", name, &bounds, &checker, begun);
            checker.discoveries().into_keys().collect()
        }
        How::Random { seed, states } => {
            let checker = bounds.clone().checker().target_state_count(states);
            let checker = checker.spawn_simulation(seed, UniformChooser).join();
            print(&format!("seed {seed}"), name, &bounds, &checker, begun);
            checker.discoveries().into_keys().collect()
        }
    };
    for property in bounds.properties() {
        let broken = property.expectation.discovery_is_failure() && found.contains(&property.name);
        assert!(!broken, "{}", property.name);
    }
}

fn print(how: &str, name: &str, bounds: &Bounds, checker: &impl Checker<Bounds>, begun: Instant) {
    let Bounds { hosts, machines, frames, attempts, forever, faults, .. } = bounds;
    println!(
        "{name}: {} states ({} visits, depth {}, {how}) in {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64(),
    );
    let network = if *forever { "messages remain for ever" } else { "messages are delivered once" };
    println!(
        "  {hosts} hosts of {machines} machines, {} frames, {attempts} attempts, {network}",
        frames.len()
    );
    println!("  {faults:?}");
}

/// From one host to the next, around: machine 0 to the next host's last machine.
fn ring(hosts: usize, machines: usize, frames: usize) -> Vec<((usize, usize), (usize, usize))> {
    (0..frames).map(|n| ((n % hosts, 0), ((n + 1) % hosts, machines - 1))).collect()
}

fn bounds(hosts: usize, machines: usize, frames: usize, faults: Faults) -> Bounds {
    Bounds {
        hosts,
        machines,
        frames: ring(hosts, machines, frames),
        attempts: 1,
        forever: false,
        colourless: false,
        faults,
    }
}

const NONE: Faults =
    Faults { lose: 0, repeat: 0, lose_frame: 0, crash_host: 0, crash_initiator: 0, fail: 0, hurries: 0 };

#[test]
fn three_hosts_of_four_machines_with_frames_all_around() {
    explore("in order and out of it", bounds(3, 4, 3, NONE));
}

#[test]
fn three_hosts_of_four_machines_when_something_is_lost() {
    explore("a frame lost", bounds(3, 4, 2, Faults { lose_frame: 1, ..NONE }));
    explore("a message lost", bounds(3, 4, 1, Faults { lose: 1, ..NONE }));
}

#[test]
fn three_hosts_of_four_machines_when_a_host_crashes() {
    explore("a host crashes", bounds(3, 4, 1, Faults { crash_host: 1, ..NONE }));
}

#[test]
fn three_hosts_of_four_machines_whatever_fails() {
    let faults = |n| Faults {
        lose: n,
        repeat: n,
        lose_frame: n,
        crash_host: n,
        crash_initiator: n,
        fail: n,
        hurries: n,
    };
    explore_in_part("everything, at the beginning", bounds(3, 4, 2, faults(1)), How::Depth(8));
    let bounds = Bounds { attempts: 3, ..bounds(3, 4, 6, faults(2)) };
    explore_in_part("everything, at random", bounds, How::Random { seed: 20, states: 400_000 });
}

/// What the properties say of ports that do not know colours: they are no test of anything otherwise.
#[test]
fn without_colours_a_frame_crosses_backwards_and_it_is_seen() {
    let bounds = Bounds { colourless: true, ..bounds(2, 2, 2, NONE) };
    let checker = bounds.checker().spawn_bfs().join();
    assert!(checker.discovery("no frame is received before a cut that was sent after it").is_some());
    assert!(checker.discovery("no rule is broken on the way").is_some(), "the account is wrong, too");
}

#[test]
fn every_loss_and_repetition_of_messages() {
    explore("for ever", Bounds { forever: true, ..bounds(3, 2, 1, NONE) });
    let hurries = Faults { hurries: 2, ..NONE };
    explore("for ever, and timers at any moment", Bounds { forever: true, ..bounds(2, 1, 1, hurries) });
    let crash = Faults { crash_host: 1, fail: 1, ..NONE };
    explore("for ever, with a crash and a failure", Bounds { forever: true, ..bounds(2, 1, 1, crash) });
}

#[test]
fn losses_repetitions_and_a_crash_on_either_side() {
    let faults = Faults { lose: 1, repeat: 1, lose_frame: 1, ..NONE };
    explore("losses and a repetition", bounds(2, 2, 2, faults));
    let faults = Faults { lose: 1, crash_host: 1, crash_initiator: 1, ..NONE };
    explore("a loss and both sides crash", bounds(2, 1, 1, faults));
}

#[test]
fn a_second_cut_follows_a_first_that_was_given_up() {
    for faults in [
        Faults { crash_initiator: 1, ..NONE },
        Faults { crash_host: 1, ..NONE },
        Faults { hurries: 1, ..NONE },
    ] {
        explore("two cuts", Bounds { attempts: 2, ..bounds(2, 1, 1, faults) });
    }
}

#[test]
#[ignore = "some minutes each, and some gigabytes"]
fn large() {
    let all = [
        ("frames all around, losses", bounds(3, 4, 3, Faults { lose: 1, lose_frame: 1, ..NONE })),
        ("a failure", bounds(3, 4, 1, Faults { fail: 1, ..NONE })),
        ("a timer at any moment", bounds(3, 4, 1, Faults { hurries: 1, ..NONE })),
        ("a crash and a loss", bounds(3, 4, 1, Faults { crash_host: 1, lose: 1, ..NONE })),
        (
            "the initiator crashes, two cuts",
            Bounds { attempts: 2, ..bounds(3, 1, 1, Faults { crash_initiator: 1, ..NONE }) },
        ),
        (
            "a failure and a loss, two cuts",
            Bounds { attempts: 2, ..bounds(2, 1, 1, Faults { fail: 1, lose: 1, ..NONE }) },
        ),
        (
            "for ever, the initiator crashes, two cuts",
            Bounds { attempts: 2, forever: true, ..bounds(2, 1, 1, Faults { crash_initiator: 1, ..NONE }) },
        ),
        (
            "for ever, with a crash and a failure",
            Bounds { forever: true, ..bounds(2, 2, 1, Faults { crash_host: 1, fail: 1, ..NONE }) },
        ),
        (
            "for ever, a host crashes",
            Bounds { forever: true, ..bounds(3, 1, 1, Faults { crash_host: 1, ..NONE }) },
        ),
    ];
    for (name, bounds) in all {
        explore(name, bounds);
    }
}
