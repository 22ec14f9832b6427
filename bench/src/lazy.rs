//! Restores that load memory first, and restores that load it while machines run: from a folder, and from a bucket behind
//! a link of limited speed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use diorama_api::{RestoreReport, SnapshotReport};
use serde::Serialize;

use crate::Common;
use crate::failure::Failure;
use crate::figures::{Outcome, Sample, Summary, table, times};
use crate::lab::{self, Lab, say};
use crate::load::{self, Load, MACHINES};
use crate::s3_server::{BUCKET, Server};

const ENVIRONMENT: &str = "bench";
/// How often a load is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What the link takes at once of one direction of a connection.
const CHUNK_BYTES: usize = 16 << 10;
/// How many of these are on their way in one direction of a connection.
const CHUNKS: usize = 64;

/// Its arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Restores of each kind
    #[arg(long, default_value_t = 5)]
    count: u32,
    /// What the link to the bucket carries in each direction, in Mbit/s
    #[arg(long, default_value_t = 100)]
    mbit: u32,
    /// How long the link takes in each direction, in ms
    #[arg(long, default_value_t = 10)]
    delay: u64,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { count: 5, mbit: 100, delay: 10 }
    }
}

#[derive(Debug, Serialize)]
struct Row {
    from: String,
    lazy: bool,
    /// From the command's start until every machine ran.
    ready_ms: Summary,
    /// Until every guest has run a command.
    answered_ms: Summary,
    /// Until all memory was there.
    loaded_ms: Summary,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments, common: &Common) -> Result<Outcome, Failure> {
    let count = if common.quick { 1 } else { arguments.count };
    say("lazy: four machines, and a store in a folder");
    let lab = Lab::new()?;
    let base = snapshot(&lab, common)?;
    let mut rows = restores(&lab, "a folder", &base, count)?;
    drop(lab);

    say("lazy: the same with a store in a bucket");
    let server = Server::start();
    let one = Lab::with(variables(&server, server.address()))?;
    let base = snapshot(&one, common)?;
    drop(one);
    let link = Link {
        bytes_per_second: f64::from(arguments.mbit) * 1e6 / 8.0,
        delay: Duration::from_millis(arguments.delay),
        busy: Mutex::default(),
    };
    let address = link.start(server.address())?;
    let two = Lab::with(variables(&server, address))?;
    let from = format!("a bucket, {} Mbit/s and {} ms away", arguments.mbit, arguments.delay);
    rows.extend(restores(&two, &from, &base, count)?);
    drop(two);
    let json = serde_json::json!({"memory_mib": common.memory, "restores": rows});
    Ok(Outcome { name: "lazy", json, text: text(common.memory, &rows), violations: Vec::new() })
}

fn variables(server: &Server, address: SocketAddr) -> Vec<(String, String)> {
    let mut variables = vec![
        ("DIORAMA_STORE".to_owned(), format!("s3://{BUCKET}/bench")),
        ("AWS_ENDPOINT_URL".to_owned(), format!("http://{address}")),
    ];
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"] {
        variables.extend(server.variable(name).map(|value| (name.to_owned(), value)));
    }
    variables
}

fn snapshot(lab: &Lab, common: &Common) -> Result<String, Failure> {
    load::start(lab, ENVIRONMENT, common.memory, Load::Light)?;
    let report: SnapshotReport = lab.run(&["-e", ENVIRONMENT, "snapshot", "create", "base"])?;
    load::stop(lab, ENVIRONMENT)?;
    Ok(report.id)
}

fn restores(lab: &Lab, from: &str, snapshot: &str, count: u32) -> Result<Vec<Row>, Failure> {
    // Kernel and initrd are files on this computer from now on.
    let _: RestoreReport = lab.run(&["restore", snapshot])?;
    load::stop(lab, ENVIRONMENT)?;
    let mut samples = [(); 2].map(|()| [(); 3].map(|()| Sample::default()));
    for n in 0..count {
        for lazy in [false, true] {
            say(format!("lazy: from {from}: {} of {count}, {}", n + 1, name(lazy)));
            crate::restore::empty_ram_cache(lab)?;
            let started = Instant::now();
            let option = if lazy { "--lazy" } else { "--eager" };
            let report: RestoreReport = lab.run(&["restore", snapshot, option])?;
            let answers = thread::scope(|scope| {
                let asked = MACHINES.map(|machine| scope.spawn(|| lab.guest(ENVIRONMENT, machine, "true")));
                asked
                    .into_iter()
                    .try_for_each(|answer| answer.join().expect("asking does not panic").map(|_| ()))
            });
            answers?;
            let answered = started.elapsed();
            while is_loading(lab)? {
                lab::sleep(LOOK)?;
            }
            let [ready_ms, answered_ms, loaded_ms] = &mut samples[usize::from(lazy)];
            ready_ms.push(report.ready_ms as f64);
            answered_ms.push(answered.as_secs_f64() * 1e3);
            loaded_ms.push(if lazy { started.elapsed().as_secs_f64() * 1e3 } else { report.ready_ms as f64 });
            load::stop(lab, ENVIRONMENT)?;
        }
    }
    let row = |(lazy, [ready, answered, loaded]): (usize, &[Sample; 3])| Row {
        from: from.to_owned(),
        lazy: lazy == 1,
        ready_ms: ready.summary(),
        answered_ms: answered.summary(),
        loaded_ms: loaded.summary(),
    };
    Ok(samples.iter().enumerate().map(row).collect())
}

fn is_loading(lab: &Lab) -> Result<bool, Failure> {
    Ok(load::machines(lab, ENVIRONMENT)?.iter().any(|machine| machine.loading.is_some()))
}

fn name(lazy: bool) -> &'static str {
    if lazy { "lazy" } else { "eager" }
}

fn text(memory_mib: u64, rows: &[Row]) -> String {
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let eager = rows.iter().find(|other| other.from == row.from && !other.lazy).unwrap_or(row);
            let mut line = vec![row.from.clone(), name(row.lazy).to_owned()];
            for (figure, base) in [
                (&row.ready_ms, &eager.ready_ms),
                (&row.answered_ms, &eager.answered_ms),
                (&row.loaded_ms, &eager.loaded_ms),
            ] {
                line.push(format!("{:.0} ({:.0})", figure.median, figure.max));
                line.push(times(figure.median, base.median));
            }
            line
        })
        .collect();
    let header =
        ["from", "", "all run", "/ eager", "all have answered", "/ eager", "all memory is there", "/ eager"];
    format!(
        "Restore after `down` of four machines of {memory_mib} MiB that were under light load, memory not in the cache:\n\
         milliseconds from the command's start, median (maximum) of {}.\n\n{}\n",
        rows.first().map_or(0, |row| row.ready_ms.count),
        table(&header, &lines)
    )
}

/// A link that all connections share: so many bytes a second in each direction, each of them so much later.
struct Link {
    bytes_per_second: f64,
    delay: Duration,
    /// Until when it is taken, from the client and to it.
    busy: Mutex<[Option<Instant>; 2]>,
}

impl Link {
    /// Listens, and passes on what comes to `server`, until this program ends.
    fn start(self, server: SocketAddr) -> Result<SocketAddr, Failure> {
        let failed = || Failure::io("cannot listen for the link to the bucket");
        let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(failed())?;
        let address = listener.local_addr().map_err(failed())?;
        let link = Arc::new(self);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(server) else { continue };
                for stream in [&client, &server] {
                    // Delay is the link's business alone.
                    let _ = stream.set_nodelay(true);
                }
                let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else {
                    continue;
                };
                link.pass(0, client, server);
                link.pass(1, server_too, client_too);
            }
        });
        Ok(address)
    }

    fn pass(self: &Arc<Self>, direction: usize, mut from: TcpStream, to: TcpStream) {
        let (sender, receiver) = sync_channel(CHUNKS);
        let link = Arc::clone(self);
        thread::spawn(move || link.deliver(direction, &receiver, to));
        thread::spawn(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            // A connection that fails ends, as it would without the link.
            while let Ok(length @ 1..) = from.read(&mut chunk) {
                if sender.send((Instant::now(), chunk[..length].to_vec())).is_err() {
                    break;
                }
            }
        });
    }

    fn deliver(&self, direction: usize, chunks: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream) {
        for (came, chunk) in chunks {
            let takes = Duration::from_secs_f64(chunk.len() as f64 / self.bytes_per_second);
            let through = {
                let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
                let begins = busy[direction].map_or(came, |busy| busy.max(came));
                *busy[direction].insert(begins + takes)
            };
            thread::sleep((through + self.delay).saturating_duration_since(Instant::now()));
            if to.write_all(&chunk).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }
}
