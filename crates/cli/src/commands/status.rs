//! `diorama status`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use clap::Args;
use comfy_table::{Cell, Color};
use diorama_api::{EnvironmentState, EnvironmentStatus, MachineState, MachineStatus};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Colour, Output, lines, printable};
use crate::quantity::{bytes, count, short_id, timestamp};
use crate::session::Session;

/// Show machines, networks, hosts, traffic and drops
///
/// Of every environment, or of the one that `--environment` names.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama status
  diorama status -e pair
  diorama status --json | jq -r '.environments[].machines[] | select(.state != \"running\") | .name'

SENT is what the switch had from the machine, RECEIVED what it gave to it. In a network, OWED counts a
frame once for each machine that should receive it: what is owed has been delivered, waits in a
queue, or was dropped.")]
pub struct Arguments {}

#[derive(Serialize)]
struct Document {
    environments: Vec<EnvironmentStatus>,
}

/// Asks and shows.
///
/// # Errors
/// When the named environment does not exist.
pub async fn run(_arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let environments = match session.named() {
        Some(name) => vec![session.client().environment(name.as_ref()).await?],
        None => session.client().environments().await?,
    };
    if let Some(note) = session.client().agent().await?.note {
        session.output().warn(&note);
    }
    let document = Document { environments };
    session.output().result(&document, || {
        if document.environments.is_empty() {
            return "no environments; start one with `diorama up FILE`\n".to_owned();
        }
        let texts: Vec<String> =
            document.environments.iter().map(|environment| describe(environment, session.output())).collect();
        texts.join("\n")
    })?;
    Ok(0)
}

/// One environment, for people.
pub fn describe(environment: &EnvironmentStatus, output: &Output) -> String {
    let colour = output.colour();
    let mut text = headline(environment, colour);
    if !environment.machines.is_empty() {
        text.push_str(&machines(environment, output));
    }
    for machine in &environment.machines {
        if let Some(reason) = &machine.reason {
            let _ = writeln!(text, "  {}: {}", colour.bad(&machine.name), printable(reason));
        }
    }
    if !environment.networks.is_empty() {
        text.push_str(&networks(environment, output));
    }
    text
}

fn headline(environment: &EnvironmentStatus, colour: Colour) -> String {
    let state = match environment.state {
        EnvironmentState::Starting => colour.warning("starting"),
        EnvironmentState::Up => colour.good("up"),
        EnvironmentState::Degraded => colour.bad("degraded"),
        EnvironmentState::Down => colour.dim("down"),
    };
    let mut text = format!("{}  {state}", colour.strong(environment.name.as_ref()));
    if let Some(started) = &environment.started {
        let _ = write!(text, "  since {}", printable(&timestamp(started)));
    }
    if let Some(snapshot) = &environment.snapshot {
        let _ = write!(text, "  at snapshot {}", printable(short_id(snapshot)));
    }
    if environment.hosts.len() > 1 {
        let _ = write!(text, "  on {}", count(environment.hosts.len() as u64, "host"));
    }
    if let Some(operation) = &environment.operation {
        let _ = write!(text, "  {}", colour.warning(&format!("({})", printable(operation))));
    }
    text.push('\n');
    text
}

fn machines(environment: &EnvironmentStatus, output: &Output) -> String {
    let several_hosts = environment.hosts.len() > 1;
    let mut table = output.table();
    let mut header =
        vec!["MACHINE", "STATE", "CPUS", "MEMORY", "NETWORK", "ADDRESS", "SENT", "RECEIVED", "DROPPED"];
    if several_hosts {
        header.insert(1, "HOST");
    }
    table.set_header(header);
    for machine in &environment.machines {
        let mut first = vec![Cell::new(printable(&machine.name))];
        if several_hosts {
            first.push(Cell::new(printable(&machine.host)));
        }
        first.push(state(machine));
        first.push(Cell::new(machine.vcpus));
        first.push(Cell::new(bytes(machine.memory_bytes)));
        if machine.nics.is_empty() {
            table.add_row(first);
            continue;
        }
        for (index, nic) in machine.nics.iter().enumerate() {
            // What is the machine's stands in its first row only.
            let mut row =
                if index == 0 { first.clone() } else { first.iter().map(|_| Cell::new("")).collect() };
            let network = if nic.connected {
                Cell::new(printable(&nic.network))
            } else {
                Cell::new(format!("{} (unplugged)", printable(&nic.network))).fg(Color::Yellow)
            };
            row.push(network);
            row.push(Cell::new(printable(nic.address.as_deref().unwrap_or(&nic.mac))));
            row.push(Cell::new(traffic(nic.sent_frames, nic.sent_bytes)));
            row.push(Cell::new(traffic(nic.received_frames, nic.received_bytes)));
            row.push(drops(&nic.dropped));
            table.add_row(row);
        }
    }
    lines(&table, "  ")
}

fn networks(environment: &EnvironmentStatus, output: &Output) -> String {
    let mut table = output.table();
    table.set_header(["NETWORK", "MTU", "OWED", "DELIVERED", "QUEUED", "DROPPED"]);
    for network in &environment.networks {
        table.add_row([
            Cell::new(printable(&network.name)),
            Cell::new(network.mtu),
            Cell::new(network.owed_frames),
            Cell::new(network.delivered_frames),
            Cell::new(network.queued_frames),
            drops(&network.dropped),
        ]);
    }
    lines(&table, "  ")
}

fn state(machine: &MachineStatus) -> Cell {
    let (text, colour) = match machine.state {
        MachineState::Starting => ("starting", Color::Yellow),
        MachineState::Running => ("running", Color::Green),
        MachineState::Paused => ("paused", Color::Yellow),
        MachineState::Shutdown => ("shut down", Color::Yellow),
        MachineState::Crashed => ("crashed", Color::Red),
        MachineState::Dead => ("dead", Color::Red),
        MachineState::Lost => ("lost", Color::Red),
    };
    match &machine.loading {
        // Rounded down: 100% is when it is done.
        Some(loading) if colour == Color::Green => {
            let percent = loading.loaded_bytes * 100 / loading.total_bytes.max(1);
            Cell::new(format!("{text}, loading {}%", percent.min(99))).fg(Color::Yellow)
        }
        _ => Cell::new(text).fg(colour),
    }
}

fn traffic(frames: u64, size: u64) -> String {
    if frames == 0 { "-".to_owned() } else { format!("{frames} ({})", bytes(size)) }
}

fn drops(dropped: &BTreeMap<String, u64>) -> Cell {
    let reasons: Vec<String> = dropped
        .iter()
        .filter(|(_, number)| **number > 0)
        .map(|(reason, number)| format!("{number} {}", printable(&reason.replace(['_', '-'], " "))))
        .collect();
    if reasons.is_empty() { Cell::new("-") } else { Cell::new(reasons.join(", ")).fg(Color::Yellow) }
}
