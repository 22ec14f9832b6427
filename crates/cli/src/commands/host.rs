//! `diorama host`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::{Cell, Color};
use diorama_api::{
    DrainHostRequest, ErrorKind, HostInfo, HostState, InitHostRequest, JoinHostRequest, LeaveHostRequest,
    RemoveHostRequest, TokenRequest,
};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::{bytes, count};
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
  diorama host remove node2     from any other; it stops what it has, and leaves
  diorama host leave            on the host itself

Between hosts, the address's port must be open: TCP for agents, UDP for tunnels.")]
pub enum Command {
    Init(InitArguments),
    Token(TokenArguments),
    Join(JoinArguments),
    List(ListArguments),
    Drain(DrainArguments),
    Remove(RemoveArguments),
    Leave(LeaveArguments),
}

/// Make a cluster, of which this host is the first
///
/// How etcd is reached is handed on to the hosts that join, certificate, key and password included.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama host init --address 10.0.0.1:7447 --etcd http://10.0.0.9:2379
  diorama host init --address 10.0.0.1:7447 --etcd https://etcd1:2379 --etcd https://etcd2:2379 \\
      --etcd-ca ca.pem --etcd-cert client.pem --etcd-key client.key \\
      --etcd-user diorama --etcd-password-file password

In etcd, the user needs to read and write keys that begin with /diorama/v1/.")]
pub struct InitArguments {
    #[command(flatten)]
    host: HostArguments,

    /// Where etcd is; may be given several times
    #[arg(long, value_name = "URL", required = true)]
    etcd: Vec<String>,

    /// The certificate of the authority that etcd's own certificate is by (PEM); for https
    #[arg(long, value_name = "FILE")]
    etcd_ca: Option<PathBuf>,

    /// The certificate to show to etcd (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_key", requires = "etcd_ca")]
    etcd_cert: Option<PathBuf>,

    /// The certificate's key (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,

    /// The user to name to etcd; its password is in DIORAMA_ETCD_PASSWORD, or in a file
    #[arg(long, value_name = "NAME")]
    etcd_user: Option<String>,

    /// The file with the user's password
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,
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

    /// The longest packet that the network between hosts carries, in bytes [default: the MTU of the address's interface]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(670..))]
    underlay_mtu: Option<u16>,
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

    /// Although it has machines, or nobody else can admit hosts
    #[arg(long)]
    force: bool,
}

/// Take this host out of its cluster
///
/// It stops what it has of the cluster's environments, and forgets its key and certificate. `diorama host join` with a new
/// token lets it in again.
#[derive(Debug, Args)]
pub struct LeaveArguments {
    /// Although it has machines (they are stopped, their disks removed), nobody else can admit hosts, or etcd cannot be reached
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
        Command::Init(arguments) => {
            let request = arguments.request()?;
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
            let request = JoinHostRequest {
                token,
                name,
                address: host.address,
                labels: host.labels(),
                underlay_mtu: host.underlay_mtu,
            };
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
        Command::Leave(LeaveArguments { force }) => {
            let report = client.leave_host(&LeaveHostRequest { force }).await?;
            if !report.told {
                output.warn(&format!(
                    "the cluster does not know of it: `diorama host remove {}` on another host tells it",
                    report.name
                ));
            }
            output.result(&report, || {
                let machines = match report.machines_stopped {
                    0 => String::new(),
                    number => format!("; {} stopped", count(u64::from(number), "machine")),
                };
                format!("{} has left its cluster{machines}\n", printable(&report.name))
            })?;
        }
    }
    Ok(0)
}

impl InitArguments {
    fn request(self) -> Result<InitHostRequest, Failure> {
        let pem = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|error| {
                let message = format!("{}: {error}", path.display());
                usage(message, "`--etcd-ca`, `--etcd-cert` and `--etcd-key` name PEM files")
            })
        };
        let is_https = |url: &String| url.starts_with("https://");
        if self.etcd.iter().any(is_https) && self.etcd_ca.is_none() {
            return Err(usage(
                "etcd is at https, and nothing says whose certificate it shows".to_owned(),
                "give the authority's certificate with `--etcd-ca FILE`",
            ));
        }
        if self.etcd_ca.is_some() && !self.etcd.iter().all(is_https) {
            return Err(usage(
                "there are certificates for etcd, and an address without TLS".to_owned(),
                "write all of etcd's addresses as https://...",
            ));
        }
        let etcd_user = match self.etcd_user {
            Some(user) => Some((user, password(self.etcd_password_file.as_deref())?)),
            None => None,
        };
        let etcd_identity_pem = match (&self.etcd_cert, &self.etcd_key) {
            (Some(certificate), Some(key)) => Some((pem(certificate)?, pem(key)?)),
            _ => None,
        };
        Ok(InitHostRequest {
            name: self.host.name()?,
            address: self.host.address,
            etcd_authority_pem: self.etcd_ca.as_ref().map(pem).transpose()?,
            etcd: self.etcd,
            etcd_user,
            etcd_identity_pem,
            labels: self.host.labels(),
            underlay_mtu: self.host.underlay_mtu,
        })
    }
}

/// A password from a file, or the environment: what is on a command line, others can see.
fn password(file: Option<&Path>) -> Result<String, Failure> {
    let text = match file {
        Some(file) => std::fs::read_to_string(file)
            .map_err(|error| usage(format!("{}: {error}", file.display()), PASSWORD_HINT))?,
        None => std::env::var(PASSWORD_VARIABLE)
            .map_err(|_| usage("there is no password for etcd's user".to_owned(), PASSWORD_HINT))?,
    };
    let password = text.strip_suffix('\n').unwrap_or(&text);
    if password.is_empty() {
        return Err(usage("the password for etcd's user is empty".to_owned(), PASSWORD_HINT));
    }
    Ok(password.to_owned())
}

/// A command line that is wrong.
fn usage(message: String, hint: &str) -> Failure {
    Failure::new(ErrorKind::Invalid, message, hint)
}

const PASSWORD_VARIABLE: &str = "DIORAMA_ETCD_PASSWORD";
const PASSWORD_HINT: &str = "put it into DIORAMA_ETCD_PASSWORD, or name a file with `--etcd-password-file`";

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
