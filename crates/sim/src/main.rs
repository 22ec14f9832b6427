//! `diorama-sim`: prints how the protocol's messages, bytes and times grow with hosts, or replays one seed under faults.

use std::{process::ExitCode, str::FromStr};

use diorama_sim::{Figures, Scenario, Simulation, figures, plot, scenario::MS};

const USAGE: &str = "\
diorama-sim [options]              how messages, bytes and times grow with hosts, without faults
diorama-sim --storm MS [options]   one run under faults for MS simulated milliseconds

  --hosts N,N,...     hosts of each row (default 1,3,10,30,100,300,1000; with --storm 20)
  --machines N        machines on each host (default 10)
  --runs N            runs of each row, of which medians are shown (default 3)
  --seed N            the first run's seed (default 1); each further run has the next
  --json              print JSON
  --svg FILE          write a plot
";

struct Arguments {
    hosts: Vec<usize>,
    machines: usize,
    runs: u64,
    seed: u64,
    storm_ms: Option<u64>,
    json: bool,
    svg: Option<String>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprint!("{problem}{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match arguments.storm_ms {
        Some(until_ms) => storm(&arguments, until_ms),
        None => growth(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("diorama-sim: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn growth(arguments: &Arguments) -> Result<(), String> {
    let mut rows = Vec::new();
    for &hosts in &arguments.hosts {
        let mut runs = Vec::new();
        for seed in arguments.seed..arguments.seed + arguments.runs {
            runs.push(run(Scenario::quiet(seed, hosts, arguments.machines))?);
        }
        rows.extend(figures::Row::of(&runs));
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?);
    } else {
        println!("seeds {} to {}", arguments.seed, arguments.seed + arguments.runs - 1);
        print!("{}", figures::table(&rows));
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, plot::svg(&rows)).map_err(|e| format!("{path}: {e}"))?;
    }
    Ok(())
}

fn storm(arguments: &Arguments, until_ms: u64) -> Result<(), String> {
    for &hosts in &arguments.hosts {
        for seed in arguments.seed..arguments.seed + arguments.runs {
            let mut scenario = Scenario::stormy(seed, hosts, arguments.machines, until_ms * MS);
            scenario.vector_clocks = hosts * arguments.machines <= 300;
            let figures = run(scenario)?;
            if arguments.json {
                println!("{}", serde_json::to_string(&figures).map_err(|e| e.to_string())?);
            } else {
                println!(
                    "seed {seed}: {} attempts, {} snapshots, {} crashes {:?}, {} partitions, {} cuts begun by a frame, \
                     {} frames, {} recorded, {} lost; {} events, digest {:016x}",
                    figures.attempts.len(),
                    figures.snapshots,
                    figures.crashes,
                    figures.states_at_crash,
                    figures.partitions,
                    figures.begun_by_frame,
                    figures.frames,
                    figures.attempts.iter().map(|attempt| attempt.in_flight).sum::<u64>(),
                    figures.attempts.iter().map(|attempt| attempt.wire_loss).max().unwrap_or(0),
                    figures.events,
                    figures.digest,
                );
            }
        }
    }
    Ok(())
}

fn run(scenario: Scenario) -> Result<Figures, String> {
    let (seed, hosts) = (scenario.seed, scenario.hosts);
    Simulation::new(scenario).run().map_err(|failure| format!("seed {seed}, {hosts} hosts: {failure}"))
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut hosts = None;
        let mut parsed = Self {
            hosts: Vec::new(),
            machines: 10,
            runs: 3,
            seed: 1,
            storm_ms: None,
            json: false,
            svg: None,
        };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value\n"));
            match word.as_str() {
                "--hosts" => hosts = Some(value()?.split(',').map(number).collect::<Result<Vec<_>, _>>()?),
                "--machines" => parsed.machines = number(&value()?)?,
                "--runs" => parsed.runs = number(&value()?)?,
                "--seed" => parsed.seed = number(&value()?)?,
                "--storm" => parsed.storm_ms = Some(number(&value()?)?),
                "--json" => parsed.json = true,
                "--svg" => parsed.svg = Some(value()?),
                "--help" | "-h" => return Err(String::new()),
                _ => return Err(format!("unknown: {word}\n")),
            }
        }
        let usual: &[usize] = if parsed.storm_ms.is_some() { &[20] } else { &[1, 3, 10, 30, 100, 300, 1000] };
        parsed.hosts = hosts.unwrap_or_else(|| usual.to_vec());
        if parsed.runs == 0 || parsed.hosts.contains(&0) || parsed.machines == 0 {
            return Err(String::from("at least 1\n"));
        }
        Ok(parsed)
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("not a number: {text}\n"))
}
