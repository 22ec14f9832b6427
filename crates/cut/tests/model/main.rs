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

use stateright::{Checker, Model};

use world::{Bounds, Faults};

/// Explores breadth first, all of it or up to a depth, and prints the figures.
fn explore(name: &str, bounds: Bounds, most_depth: Option<usize>) {
    let begun = Instant::now();
    let mut checker = bounds.clone().checker();
    if let Some(depth) = most_depth {
        checker = checker.target_max_depth(depth);
    }
    let checker = checker.spawn_bfs().join();
    let Bounds { hosts, machines, frames, attempts, forever, faults } = bounds;
    println!(
        "{name}: {} states ({} visits, depth {}, {}) in {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        if most_depth.is_none() { "complete" } else { "bounded" },
        begun.elapsed().as_secs_f64(),
    );
    println!("  {hosts} hosts, {machines} machines each, {attempts} attempts, frames {frames:?}");
    println!("  {}", if forever { "messages for ever" } else { "messages once" });
    println!("  {faults:?}");
    checker.assert_properties();
}

#[test]
fn probe() {
    let hosts: usize = std::env::var("HOSTS").unwrap().parse().unwrap();
    let machines: usize = std::env::var("MACHINES").unwrap().parse().unwrap();
    let f = |k: &str| -> u8 { std::env::var(k).map_or(0, |v| v.parse().unwrap()) };
    let all = [((0, 0), (1, machines - 1)), ((1, 0), (0, machines - 1)), ((hosts - 1, 0), (0, 0))];
    let faults = Faults {
        lose: f("LOSE"),
        repeat: f("REPEAT"),
        lose_frame: f("LOSEF"),
        crash_host: f("CH"),
        crash_initiator: f("CI"),
        fail: f("FAIL"),
        hurries: f("HURRY"),
    };
    let b = Bounds {
        hosts,
        machines,
        frames: all[..f("FRAMES") as usize].to_vec(),
        attempts: f("ATT").max(1),
        forever: f("FOREVER") > 0,
        faults,
    };
    explore("probe", b, std::env::var("DEPTH").ok().map(|d| d.parse().unwrap()));
}
