//! Prints how long one machine of 256 MiB takes from spawn to RESUME, for each way of handing over the stream.
//!
//! `cargo run --release -p diorama-qemu --example restore_time [RUNS]`

#[allow(dead_code)]
#[path = "../tests/machine/mod.rs"]
mod machine;

use machine::{Machine, Scratch, soon};
use std::time::Instant;

fn main() {
    let runs: usize = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(10);
    let scratch = Scratch::new();
    let resize = |config: &mut diorama_qemu::command_line::MachineConfig| config.memory_bytes = 256 << 20;
    let mut original = Machine::start(&scratch, "original", resize);
    original.wait_for_firmware();
    let capture = original.capture(&scratch.path("ram"));
    original.process.kill(soon()).expect("kill");
    println!("residual stream: {} bytes", capture.summary.residual_bytes);

    for (name, deferred, sandbox) in [
        ("defer + getfd", true, true),
        ("fd:N", false, true),
        ("defer + getfd, no sandbox", true, false),
        ("fd:N, no sandbox", false, false),
    ] {
        let mut times_ms: Vec<f64> = (0..runs)
            .map(|_| {
                let started = Instant::now();
                let mut machine = Machine::restore(&scratch, "restored", &capture, deferred, |config| {
                    resize(config);
                    config.sandbox = sandbox;
                });
                let elapsed = started.elapsed();
                machine.process.kill(soon()).expect("kill");
                elapsed.as_secs_f64() * 1000.0
            })
            .collect();
        times_ms.sort_by(f64::total_cmp);
        println!(
            "{name}: median {:.1} ms, {:.1} to {:.1} over {runs} runs",
            times_ms[runs / 2],
            times_ms[0],
            times_ms[runs - 1]
        );
    }
}
