//! `diorama host`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::{Cell, Color};
use diorama_api::{
    DrainHostRequest, HostInfo, HostState, InitHostRequest, JoinHostRequest, RemoveHostRequest, TokenRequest,
};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::bytes;
use crate::session::Session;

/// Join hosts to a cluster, whose environments span them
///
/// Each host runs an agent of its own; what they agree on is kept in etcd, and snapshots in one store that all of them
/// reach (DIORAMA_STORE names it: a folder, or s3://BUCKET/PREFIX). Any of them answers for all environments.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  diorama host init --address 10.0.0.1:7447 --etcd http://10.0.0.9:2379
  diorama host token                                on that host; prints TOKEN
  diorama host join TOKEN --address 10.0.0.2:7447   on another
  diorama host list
  diorama host drain node2      no new machines; `diorama restore` moves those it has
  diorama host remove node2

Between hosts, the address's port must be open: TCP for agents, UDP for tunnels.")]
pub enum Command {
    Init(InitArguments),
    Token(TokenArguments),
    Join(JoinArguments),
    List(ListArguments),
    Drain(DrainArguments),
    Remove(RemoveArguments),
}

/// Make a cluster, of which this host is the first
#[derive(Debug, Args)]
pub struct InitArguments {
    #[command(flatten)]
    host: HostArguments,

    /// Where etcd is; may be given several times
    #[arg(long, value_name = "URL", required = true)]
    etcd: Vec<String>,
}

/// Enter the cluster of a token
#[derive(Debug, Args)]
pub struct JoinArguments {
    /// What `diorama host token` printed
    #[arg(value_name = "TOKEN", value_parser = crate::arguments::not_empty)]
    token: String,

    #[command(flatten)]
    host: HostArguments,
}

#[derive(Debug, Args)]
struct HostArguments {
    /// Where other hosts reach this one
    #[arg(long, value_name = "ADDRESS:PORT")]
    address: SocketAddr,

    /// The host's name in the cluster [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// A label that machines can ask for; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
}

/// Print a token with which hosts join
#[derive(Debug, Args)]
pub struct TokenArguments {
    /// For how many hosts
    #[arg(long, value_name = "N", default_value_t = 1)]
    uses: u32,

    /// How long it is good, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    minutes: u64,
}

/// Show the cluster's hosts
#[derive(Debug, Args)]
pub struct ListArguments {}

/// Give a host no new machines
#[derive(Debug, Args)]
pub struct DrainArguments {
    /// Which
    #[arg(value_name = "HOST", value_parser = crate::arguments::not_empty)]
    name: String,

    /// Give it machines again
    #[arg(long)]
    undo: bool,
}

/// Take a host out of the cluster
#[derive(Debug, Args)]
pub struct RemoveArguments {
    /// Which
    #[arg(value_name = "HOST", value_parser = crate::arguments::not_empty)]
    name: String,

    /// Although it has machines
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct Document {
    hosts: Vec<HostInfo>,
}

/// Does it.
///
/// # Errors
/// When this host is in no cluster (or, for `init` and `join`, in one), or etcd or the other hosts cannot be reached.
pub async fn run(command: Command, session: &Session<'_>) -> Result<u8, Failure> {
    let client = session.client();
    let output = session.output();
    match command {
        Command::Init(InitArguments { host, etcd }) => {
            let name = host.name()?;
            let request = InitHostRequest { name, address: host.address, etcd, labels: host.labels() };
            let info = client.init_host(&request).await?;
            output.result(&info, || {
                format!(
                    "{} is the first host of a new cluster\n`diorama host token` lets others in\n",
                    printable(&info.name)
                )
            })?;
        }
        Command::Join(JoinArguments { token, host }) => {
            let name = host.name()?;
            let request = JoinHostRequest { token, name, address: host.address, labels: host.labels() };
            let info = client.join_host(&request).await?;
            output.result(&info, || format!("{} is in the cluster\n", printable(&info.name)))?;
        }
        Command::Token(TokenArguments { uses, minutes }) => {
            let valid_s = Duration::from_secs(60).as_secs().saturating_mul(minutes);
            let reply = client.host_token(&TokenRequest { valid_s, uses }).await?;
            output.result(&reply, || format!("{}\n", reply.token))?;
        }
        Command::List(_) => {
            let document = Document { hosts: client.hosts().await? };
            output.result(&document, || table(&document.hosts, output))?;
        }
        Command::Drain(DrainArguments { name, undo }) => {
            let info = client.drain_host(&DrainHostRequest { name, drain: !undo }).await?;
            let what = if undo { "gets machines again" } else { "gets no new machines" };
            output.result(&info, || format!("{} {what}\n", printable(&info.name)))?;
        }
        Command::Remove(RemoveArguments { name, force }) => {
            let request = RemoveHostRequest { name, force };
            let done = client.remove_host(&request).await?;
            output
                .result(&done, || format!("{} is not in the cluster any more\n", printable(&request.name)))?;
        }
    }
    Ok(0)
}

impl HostArguments {
    fn name(&self) -> Result<String, Failure> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => nix::unistd::gethostname()
                .ok()
                .and_then(|name| name.into_string().ok())
                .ok_or_else(|| Failure::io("this computer has no name; give one with `--name`".to_owned())),
        }
    }

    fn labels(&self) -> BTreeMap<String, String> {
        self.label.iter().cloned().collect()
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("a label is written NAME=VALUE".to_owned()),
    }
}

fn table(hosts: &[HostInfo], output: &Output) -> String {
    let mut table = output.table();
    table.set_header(["HOST", "STATE", "ADDRESS", "MACHINES", "FREE MEMORY", "LABELS", "VERSION"]);
    for host in hosts {
        let (state, colour) = match host.state {
            HostState::Ready => ("ready", Color::Green),
            HostState::Draining => ("draining", Color::Yellow),
            HostState::Lost => ("lost", Color::Red),
        };
        let name = if host.this { format!("{} (this)", host.name) } else { host.name.clone() };
        let labels: Vec<String> = host.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        table.add_row(vec![
            Cell::new(printable(&name)),
            Cell::new(state).fg(colour),
            Cell::new(host.addresses.join(" ")),
            Cell::new(host.machines),
            Cell::new(bytes(host.free_memory_bytes)),
            Cell::new(labels.join(" ")),
            Cell::new(printable(&host.version)),
        ]);
    }
    lines(&table, "")
}
