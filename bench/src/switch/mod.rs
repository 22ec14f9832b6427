//! Frames a second through two ports of a switch: ours, `vde_switch` and a Linux bridge with two taps.
//!
//! One generator for all: a single thread on one core that sends numbered frames into one port and takes them out of
//! the other. The switch has the other core to itself. The generator hands over several frames in one system call
//! where the transport can (streams, `sendmmsg`), and one where it cannot (taps).
//!
//! Two figures for each:
//! - *lossless*: a closed loop. At most W frames are under way; the best rate of all W without any loss, measured
//!   again three times at that W;
//! - *flat out*: as many as the transport takes, with what was lost.
//!
//! | module | owns |
//! | --- | --- |
//! | [`generator`] | the loop, and counting |
//! | [`ours`], [`vde`], [`bridge`] | a switch under test, and its transport |

mod bridge;
mod generator;
mod ours;
mod vde;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, table, times};
use crate::lab::{need_root, say};
use generator::{Generator, Transport, Trial};

pub(crate) use ours::run_data_plane;

/// The core that the switch under test has.
const SWITCH_CORE: usize = 0;
/// The core that the generator has.
const GENERATOR_CORE: usize = 1;
/// Frame sizes in bytes, Ethernet header included and checksum not (as taps and virtio carry them).
const SIZES: [usize; 2] = [64, 1500];
/// Frames under way in the closed loop.
const WINDOWS: [u64; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Measurements of each rate, of which the median counts
    #[arg(long, default_value_t = 5)]
    count: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { seconds: 2.0, count: 5 }
    }
}

#[derive(Debug, Serialize)]
struct Row {
    switch: &'static str,
    frame_bytes: usize,
    lossless_frames_per_second: f64,
    lossless_window: u64,
    /// Lost in the measurements at that window.
    lossless_lost: u64,
    flat_out_frames_per_second: f64,
    flat_out_lost_share: f64,
    /// Processor time of the switch for each frame, flat out; unknown inside the kernel.
    switch_ns_per_frame: Option<f64>,
}

/// Runs the hidden child process or the benchmark.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    need_root("a Linux bridge with taps")?;
    let (seconds, count) = if common.quick { (0.3, 1) } else { (arguments.seconds, arguments.count) };
    let plan = Plan { duration: Duration::from_secs_f64(seconds), count };
    // The pinning and the namespaces below are those of this thread alone.
    let rows =
        std::thread::scope(|scope| scope.spawn(move || all(plan)).join().expect("measuring does not panic"))?;
    let json = serde_json::json!({ "rows": rows });
    Ok(Outcome { name: "switch", json, text: text(&rows, plan), violations: Vec::new() })
}

#[derive(Debug, Clone, Copy)]
struct Plan {
    duration: Duration,
    count: u32,
}

fn all(plan: Plan) -> Result<Vec<Row>, Failure> {
    pin(GENERATOR_CORE)?;
    let mut rows = Vec::new();
    for size in SIZES {
        say(format!("switch: diorama, {size} bytes"));
        let (child, transport) = ours::start()?;
        rows.push(measure("diorama", transport, size, Some(child.pid()), plan)?);
        drop(child);
        say(format!("switch: vde_switch, {size} bytes"));
        let (child, transport) = vde::start()?;
        rows.push(measure("vde_switch", transport, size, Some(child.pid()), plan)?);
    }
    // Last: this thread does not come back from its namespaces.
    bridge::enter_namespaces()?;
    for size in SIZES {
        say(format!("switch: Linux bridge, {size} bytes"));
        rows.push(measure("Linux bridge", bridge::start()?, size, None, plan)?);
    }
    rows.sort_by_key(|row| row.frame_bytes);
    Ok(rows)
}

fn measure(
    switch: &'static str,
    transport: impl Transport,
    size: usize,
    pid: Option<u32>,
    plan: Plan,
) -> Result<Row, Failure> {
    let mut generator = Generator::new(transport, size)?;
    let mut best = (WINDOWS[0], 0.0);
    for window in WINDOWS {
        let trial = generator.run(Some(window), plan.duration / 4, pid)?;
        if trial.lost == 0 && trial.rate() > best.1 {
            best = (window, trial.rate());
        }
    }
    let repeat = |generator: &mut Generator<_>, window| {
        (0..plan.count).map(|_| generator.run(window, plan.duration, pid)).collect::<Result<Vec<Trial>, _>>()
    };
    let lossless = repeat(&mut generator, Some(best.0))?;
    let flat_out = repeat(&mut generator, None)?;
    let rate = |trials: &[Trial]| trials.iter().map(Trial::rate).collect::<Sample>().median();
    let (sent, lost) =
        flat_out.iter().fold((0, 0), |(sent, lost), trial| (sent + trial.sent, lost + trial.lost));
    Ok(Row {
        switch,
        frame_bytes: size,
        lossless_frames_per_second: rate(&lossless),
        lossless_window: best.0,
        lossless_lost: lossless.iter().map(|trial| trial.lost).sum(),
        flat_out_frames_per_second: rate(&flat_out),
        flat_out_lost_share: lost as f64 / sent.max(1) as f64,
        switch_ns_per_frame: pid
            .map(|_| flat_out.iter().map(Trial::switch_ns_per_frame).collect::<Sample>().median()),
    })
}

/// Keeps the calling thread, and what it starts, on one core.
pub(crate) fn pin(core: usize) -> Result<(), Failure> {
    let mut set = nix::sched::CpuSet::new();
    set.set(core)
        .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set))
        .map_err(Failure::io(format!("cannot use core {core} (two are needed)")))
}

/// A path of this program for a child process.
fn this_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(Failure::io("cannot find this program"))
}

fn text(rows: &[Row], plan: Plan) -> String {
    let header = [
        "switch",
        "frame bytes",
        "lossless frames/s",
        "Gbit/s",
        "window",
        "lost",
        "of vde_switch",
        "flat out frames/s",
        "Gbit/s",
        "lost",
        "switch ns/frame",
    ];
    let gbit = |rate: f64, bytes: usize| format!("{:.2}", rate * bytes as f64 * 8e-9);
    let lines: Vec<_> = rows
        .iter()
        .map(|row| {
            let vde = rows
                .iter()
                .find(|other| (other.switch, other.frame_bytes) == ("vde_switch", row.frame_bytes));
            vec![
                row.switch.to_owned(),
                row.frame_bytes.to_string(),
                format!("{:.0}", row.lossless_frames_per_second),
                gbit(row.lossless_frames_per_second, row.frame_bytes),
                row.lossless_window.to_string(),
                row.lossless_lost.to_string(),
                times(row.lossless_frames_per_second, vde.map_or(0.0, |vde| vde.lossless_frames_per_second)),
                format!("{:.0}", row.flat_out_frames_per_second),
                gbit(row.flat_out_frames_per_second, row.frame_bytes),
                format!("{:.2} %", row.flat_out_lost_share * 100.0),
                row.switch_ns_per_frame.map_or_else(|| "-".to_owned(), |ns| format!("{ns:.0}")),
            ]
        })
        .collect();
    format!(
        "Two ports of a switch on one core, the generator on the other; medians of {} measurements of {} s.\n\n{}\n",
        plan.count,
        plan.duration.as_secs_f64(),
        table(&header, &lines)
    )
}
