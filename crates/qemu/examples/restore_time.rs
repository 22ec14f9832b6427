//! Prints how long one machine of 256 MiB takes from spawn to RESUME, with QEMU's sandbox and without, and
//! how much processor time of it QEMU took.
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

    for (name, sandbox) in [("sandbox", true), ("no sandbox", false)] {
        let mut times_ms = Vec::new();
        let mut processor_ms = Vec::new();
        for _ in 0..runs {
            let started = Instant::now();
            let mut machine = Machine::restore(&scratch, "restored", &capture, |config| {
                resize(config);
                config.sandbox = sandbox;
            });
            times_ms.push(started.elapsed().as_secs_f64() * 1000.0);
            processor_ms.push(main_thread_ms(machine.process.id().pid));
            machine.process.kill(soon()).expect("kill");
        }
        times_ms.sort_by(f64::total_cmp);
        processor_ms.sort_by(f64::total_cmp);
        println!(
            "{name}: median {:.1} ms, {:.1} to {:.1} over {runs} runs; QEMU's main thread used {:.1} ms",
            times_ms[runs / 2],
            times_ms[0],
            times_ms[runs - 1],
            processor_ms[runs / 2]
        );
    }
}

/// Processor time that the first thread of a process has used.
fn main_thread_ms(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("schedstat");
    let nanoseconds: f64 =
        text.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number");
    nanoseconds / 1e6
}
