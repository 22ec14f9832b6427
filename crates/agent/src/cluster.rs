//! The cluster, as this host's agent has it: its membership, the directory, and the way to other hosts' agents.
//!
//! Kept in the folder `cluster` of Diorama's home: this host's key and certificate, and [`Config`]. A host without
//! configuration is alone, and nothing here runs. `leave` is how a host gets out; `underlay` what carries its tunnels.

mod leave;
mod underlay;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::body::Body;
use diorama_api::{Answering, Client};
use diorama_api::{
    ApiError, ErrorKind, HostInfo, HostState, InitHostRequest, JoinHostRequest, TokenReply, TokenRequest,
};
use diorama_cluster::admission::{self, Admission, AdmissionError};
use diorama_cluster::channel::{Lane, Peers};
use diorama_cluster::directory::{DirectoryError, EtcdConfig, Freshness, HostStatus, Options, View};
use diorama_cluster::identity::tls::Tls;
use diorama_cluster::identity::{Authority, AuthorityError, Credentials, JoinToken};
use diorama_cluster::renewal::{self, Renewal};
use diorama_cluster::{Directory, HostId, private_file};
use diorama_topology::{EnvironmentName, HostName, LabelName, LabelValue};
use http_body_util::BodyExt;
use serde::{Deserialize, Serialize};

use crate::Agent;
use crate::problem::io_error;

pub(crate) use underlay::{UNDERLAY_MTU, underlay_mtu};

/// How long the directory may take to be there when something cannot go on without it.
const DIRECTORY_LIMIT: Duration = Duration::from_secs(10);
/// What a QEMU process takes beside its machine's memory, as placement counts it.
pub(crate) const MACHINE_OVERHEAD_BYTES: u64 = 64 << 20;
/// How often a host says what it has.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(2);
/// How often in a row a part must be found disowned before it is stopped.
const DISOWNED_LOOKS: u32 = 3;
const CONFIG_FILE: &str = "config.json";

/// What this host told of itself when it joined.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    /// Where other hosts reach its agent (TCP), and its tunnels (UDP, the same port).
    pub(crate) address: SocketAddr,
    pub(crate) labels: BTreeMap<LabelName, LabelValue>,
    pub(crate) etcd: EtcdConfig,
    /// What the network between hosts carries, where the operator knows better than the interface, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) underlay_mtu: Option<u16>,
}

/// A cluster that this host is in.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) directory: Directory,
    pub(crate) peers: Peers,
    pub(crate) id: HostId,
    pub(crate) name: HostName,
    pub(crate) config: Config,
    pub(crate) tls: Tls,
    pub(crate) admission: Option<Arc<Admission>>,
    runtime: tokio::runtime::Handle,
    /// What runs for as long as this host is in the cluster.
    tasks: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

/// What a host's announcement says beside what the cluster itself knows of.
#[derive(Debug, Serialize, Deserialize)]
struct Announced {
    tunnel: SocketAddr,
    machines: usize,
    /// What the network at its tunnels' end carries, in bytes.
    #[serde(default)]
    underlay_mtu: Option<u16>,
    /// Until when its certificate is good.
    #[serde(default)]
    certificate_until: Option<jiff::Timestamp>,
}

impl Config {
    fn file(folder: &Path) -> PathBuf {
        folder.join(CONFIG_FILE)
    }

    /// Of a host that is in a cluster.
    pub(crate) fn load(folder: &Path) -> Result<Option<Self>, ApiError> {
        let file = Self::file(folder);
        match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
                ApiError::new(ErrorKind::Corrupt, format!("{}: {error}", file.display()))
                    .hint("`diorama host join` with a new token writes it anew")
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error(&file, &error)),
        }
    }

    fn save(&self, folder: &Path) -> Result<(), ApiError> {
        let file = Self::file(folder);
        let text = serde_json::to_vec_pretty(self).expect("a configuration has string keys");
        private_file::write(&file, &text).map_err(|error| io_error(&error.path, &error.source))
    }
}

impl Cluster {
    /// Opens what is in the folder. Does not wait for the directory. Must be called within a tokio runtime.
    pub(crate) fn open(folder: &Path, config: Config) -> Result<Arc<Self>, ApiError> {
        let credentials = Credentials::open(folder).map_err(internal)?.ok_or_else(|| {
            ApiError::new(
                ErrorKind::Corrupt,
                format!("{}: this host's key or certificate is missing", folder.display()),
            )
            .hint("`diorama host join` with a new token makes this host a member again")
        })?;
        let options = Options { remembered: Some(folder.join("view.json")), ..Options::default() };
        let directory = Directory::etcd(&config.etcd, credentials.cluster(), credentials.host_id(), options)
            .map_err(internal)?;
        let tls = Tls::new(&credentials, directory.members()).map_err(internal)?;
        let admission = match Authority::open(folder) {
            Ok(authority) if authority.fingerprint() != credentials.cluster() => {
                tracing::error!("the authority's file is another cluster's: it is not used");
                None
            }
            Ok(authority) => {
                Some(Arc::new(Admission::new(authority, directory.clone(), config.etcd.clone())))
            }
            // Hosts that joined have none.
            Err(AuthorityError::Missing { .. }) => None,
            Err(error) => {
                tracing::error!(%error, "this host admits nobody");
                None
            }
        };
        Ok(Arc::new(Self {
            peers: Peers::new(tls.clone()),
            id: credentials.host_id(),
            name: credentials.name().clone(),
            directory,
            tls,
            admission,
            config,
            runtime: tokio::runtime::Handle::current(),
            tasks: Mutex::default(),
        }))
    }

    /// Waits for something of the cluster's, on a thread that may block.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Does something of the cluster's in the background.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(future);
    }

    /// The same, to be waited for or given up.
    pub(crate) fn start(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> tokio::task::JoinHandle<()> {
        self.runtime.spawn(future)
    }

    /// Does something for as long as this host is in the cluster.
    fn keep(&self, task: tokio::task::JoinHandle<()>) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// A host's name by its id; when it is no member, the beginning of that.
    pub(crate) fn name_of(&self, id: HostId) -> String {
        let view = self.directory.view();
        match view.members.get(id) {
            Some(member) => member.name.to_string(),
            None => format!("{:.8} (removed)", id.to_string()),
        }
    }

    /// A host's id by its name.
    pub(crate) fn host_id(&self, name: &str) -> Result<HostId, ApiError> {
        self.directory.view().members.named(name).map(|member| member.id).ok_or_else(|| {
            ApiError::new(ErrorKind::NotFound, format!("the cluster has no host `{name}`"))
                .hint("`diorama host list` shows them")
        })
    }

    /// A client of another host's agent.
    pub(crate) fn client(&self, host: HostId) -> Client {
        let peers = self.peers.clone();
        Client::of_host(Arc::new(move |request| {
            let peers = peers.clone();
            let answering: Answering = Box::pin(async move {
                let request = request.map(|body| Body::new(body.map_err(|never| match never {})));
                peers.send(host, Lane::Bulk, request).await.map_err(|error| error.to_string())
            });
            answering
        }))
    }

    /// A host that was given the authority's file is an issuer from then on.
    async fn say_issuer(&self) {
        let view = self.directory.view();
        let says = view.members.get(self.id).is_none_or(|member| member.issuer);
        if says || self.admission.is_none() || !view.is_fresh() {
            return;
        }
        match self.directory.change_member(self.id, |member| member.issuer = true).await {
            Ok(()) => tracing::info!("this host admits others and renews certificates from now on"),
            Err(error) => tracing::warn!(%error, "the cluster is not told yet that this host admits others"),
        }
    }

    fn announced(&self, host: HostId) -> Option<Announced> {
        let view = self.directory.view();
        serde_json::from_value(view.hosts.get(&host)?.value.detail.clone()).ok()
    }

    /// Where a host's tunnels end, as it says.
    pub(crate) fn tunnel(&self, host: HostId) -> Option<SocketAddr> {
        Some(self.announced(host)?.tunnel)
    }

    /// What tunnels must fit between any two of the hosts that are there, also those that an environment may move to: the
    /// least MTU, in bytes, and whether addresses are of IPv6.
    pub(crate) fn underlay(&self) -> (u16, bool) {
        let hosts: Vec<Announced> =
            self.directory.view().hosts.keys().filter_map(|host| self.announced(*host)).collect();
        let mtu = hosts.iter().map(|host| host.underlay_mtu.unwrap_or(UNDERLAY_MTU)).min();
        (mtu.unwrap_or(UNDERLAY_MTU), hosts.iter().any(|host| host.tunnel.is_ipv6()))
    }

    /// What somebody who looks at environments should know first.
    pub(crate) fn note(&self) -> Option<String> {
        let view = self.directory.view();
        if let Freshness::Stale { since, reason } = &view.freshness {
            return Some(format!(
                "the cluster's directory cannot be reached since {since}, and what it holds is shown as it was then: {reason}"
            ));
        }
        view.members.get(self.id).is_none().then(|| no_member(self).message)
    }

    /// Whether a host is known to be gone: it is no member any more, or its lease has ended.
    pub(crate) fn is_lost(&self, name: &str) -> bool {
        let view = self.directory.view();
        view.is_fresh() && view.members.named(name).is_none_or(|member| !view.is_alive(member.id))
    }
}

impl Agent {
    pub(crate) fn cluster_folder(&self) -> PathBuf {
        self.folders.home().join("cluster")
    }

    /// The cluster, on a host that is in one.
    pub(crate) fn cluster(&self) -> Option<Arc<Cluster>> {
        self.cluster.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cluster, or an error that says how to get into one.
    pub(crate) fn cluster_or_error(&self) -> Result<Arc<Cluster>, ApiError> {
        self.cluster().ok_or_else(|| {
            let why = self.left_cluster().map_or_else(String::new, |left| format!(": {left}"));
            ApiError::new(ErrorKind::WrongState, format!("this host is in no cluster{why}"))
                .hint("`diorama host init` makes one, `diorama host join TOKEN` enters one")
        })
    }

    /// Makes a cluster of this host.
    pub(crate) async fn init_host(self: &Arc<Self>, request: InitHostRequest) -> Result<HostInfo, ApiError> {
        let folder = self.cluster_folder();
        let _changing = self.changing_cluster.lock().await;
        self.refuse_second_cluster()?;
        make_private(&folder)?;
        self.forget_left_cluster()?;
        let name = host_name(&request.name)?;
        let config = Config {
            address: request.address,
            labels: labels(&request.labels)?,
            etcd: EtcdConfig {
                endpoints: request.etcd,
                user: request.etcd_user,
                authority_pem: request.etcd_authority_pem,
                identity_pem: request.etcd_identity_pem,
            },
            underlay_mtu: request.underlay_mtu,
        };
        self.check_wire(config.address)?;
        let options = Options { remembered: Some(folder.join("view.json")), ..Options::default() };
        admission::found(&folder, name, vec![config.address], &config.etcd, options)
            .await
            .map_err(admission_error)?;
        self.enter_cluster(config).await
    }

    /// Enters the cluster of a token.
    pub(crate) async fn join_host(self: &Arc<Self>, request: JoinHostRequest) -> Result<HostInfo, ApiError> {
        let folder = self.cluster_folder();
        let _changing = self.changing_cluster.lock().await;
        self.refuse_second_cluster()?;
        make_private(&folder)?;
        self.forget_left_cluster()?;
        let name = host_name(&request.name)?;
        let token: JoinToken =
            request.token.parse().map_err(|error: diorama_cluster::identity::TokenError| {
                ApiError::new(ErrorKind::Invalid, error.to_string())
                    .hint("a member makes one: `diorama host token`; copy it whole")
            })?;
        self.check_wire(request.address)?;
        let (_, etcd) =
            admission::join(&folder, &token, name, vec![request.address]).await.map_err(admission_error)?;
        self.enter_cluster(Config {
            address: request.address,
            labels: labels(&request.labels)?,
            etcd,
            underlay_mtu: request.underlay_mtu,
        })
        .await
    }

    fn refuse_second_cluster(&self) -> Result<(), ApiError> {
        let Some(cluster) = self.cluster() else { return Ok(()) };
        Err(ApiError::new(
            ErrorKind::WrongState,
            format!("this host is in a cluster already, as `{}`", cluster.name),
        )
        .hint("`diorama host leave` takes it out"))
    }

    /// Whether tunnels could end here, before anything is written.
    fn check_wire(&self, address: SocketAddr) -> Result<(), ApiError> {
        std::net::UdpSocket::bind(address)
            .and_then(|_| std::net::TcpListener::bind(address))
            .map(drop)
            .map_err(|error| {
                ApiError::new(
                    ErrorKind::Invalid,
                    format!("other hosts cannot be listened to at {address}: {error}"),
                )
                .hint("the address must be one of this host's, and its port free for UDP and TCP")
            })
    }

    async fn enter_cluster(self: &Arc<Self>, config: Config) -> Result<HostInfo, ApiError> {
        config.save(&self.cluster_folder())?;
        self.start_cluster(config).await?;
        let cluster = self.cluster_or_error()?;
        cluster.directory.fresh(DIRECTORY_LIMIT).await.map_err(directory_error)?;
        self.announce();
        let name = cluster.name.to_string();
        let hosts = self.hosts()?;
        hosts.into_iter().find(|host| host.name == name).ok_or_else(|| {
            ApiError::new(ErrorKind::Agent, "the cluster does not show this host yet")
                .hint("look again in a moment")
        })
    }

    /// Begins to be a member: the listener for other hosts, sessions, announcements.
    pub(crate) async fn start_cluster(self: &Arc<Self>, config: Config) -> Result<(), ApiError> {
        let address = config.address;
        let cluster = Cluster::open(&self.cluster_folder(), config)?;
        let listener = tokio::net::TcpListener::bind(address).await.map_err(|error| {
            ApiError::new(ErrorKind::Io, format!("cannot listen for other hosts at {address}: {error}"))
        })?;
        self.open_wire(address)?;
        let mut router = crate::http::peer_router(Arc::clone(self));
        if let Some(admission) = &cluster.admission {
            router = router.merge(renewal::routes(Arc::clone(admission)));
        }
        let server =
            diorama_cluster::channel::Server::new(cluster.tls.clone(), cluster.admission.clone(), router);
        // The agent's end ends it: machines run on, and the lease with them for a moment.
        cluster.keep(tokio::spawn(server.serve(listener, std::future::pending())));
        cluster.keep(tokio::spawn(keep_certificate(self.cluster_folder(), Arc::downgrade(&cluster))));
        *self.cluster.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&cluster));
        self.keep_sessions()
            .map_err(|error| ApiError::new(ErrorKind::Io, format!("a thread cannot be started: {error}")))?;
        tokio::spawn(look_after(Arc::downgrade(self), Arc::downgrade(&cluster)));
        Ok(())
    }

    /// Opens the tunnels' socket, once.
    pub(crate) fn open_wire(&self, address: SocketAddr) -> Result<(), ApiError> {
        let opened = self.plane.call(move |plane| match plane.wire_counters() {
            Some(_) => Ok(()),
            None => plane.open_wire(address).map(drop),
        });
        opened.map_err(|error| {
            ApiError::new(ErrorKind::Io, format!("tunnels cannot end at {address}: {error}"))
        })
    }

    /// Says what this host has.
    fn announce(&self) {
        let Some(cluster) = self.cluster() else { return };
        let free = crate::memory::HostMemory::now().map_or(0, |memory| memory.available);
        let config = &cluster.config;
        let announced = Announced {
            tunnel: config.address,
            machines: self.slots.running().len(),
            underlay_mtu: config.underlay_mtu.or_else(|| underlay_mtu(config.address.ip())),
            certificate_until: Some(cluster.tls.certificate_until()),
        };
        cluster.directory.announce(HostStatus {
            labels: cluster.config.labels.clone(),
            // Not each page that comes and goes.
            free_memory_bytes: free >> 26 << 26,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            detail: serde_json::to_value(announced).unwrap_or_default(),
        });
    }

    /// Stops parts of environments that the cluster has elsewhere by now, or nowhere: this host was away when that was
    /// decided. `seen` counts how often each was found so; what is being started is not in the directory for a moment.
    fn end_disowned(&self, seen: &mut BTreeMap<EnvironmentName, u32>) {
        let Some(cluster) = self.cluster() else { return };
        let view = cluster.directory.view();
        // A directory that has lost its data has no members: what it does not know is no reason to stop anything.
        if !view.is_fresh() || view.members.get(cluster.id).is_none() {
            seen.clear();
            return;
        }
        let mut fence = self.fence();
        fence.retain(|name| view.environments.contains_key(name) || self.slots.contains(name));
        fence.forget_beyond(view.revision);
        drop(fence);
        let mut now = BTreeMap::new();
        for slot in self.slots.all() {
            // What was launched after all that the directory knows is not unknown to it on purpose: it was restored from
            // a backup.
            let spans = slot
                .state()
                .record
                .as_ref()
                .and_then(|record| record.span.as_ref())
                .is_some_and(|span| span.token.0 <= view.revision);
            let owned = view
                .environments
                .get(&slot.name)
                .is_some_and(|record| record.value.hosts().contains(&cluster.id));
            if !spans || owned || slot.operation_label().is_some() {
                continue;
            }
            let times = seen.get(&slot.name).copied().unwrap_or(0) + 1;
            now.insert(slot.name.clone(), times);
            if times > DISOWNED_LOOKS {
                tracing::warn!(environment = %slot.name, "the cluster has it elsewhere, or no more: its part here is stopped");
                let request = diorama_api::DownRequest { volumes: true };
                let operation = crate::operation::Operation::unattended();
                if let Err(error) = self.down_here(slot.name.as_str(), request, &operation) {
                    tracing::error!(environment = %slot.name, %error, "it cannot be stopped");
                }
            }
        }
        *seen = now;
        self.forget_removed_snapshots();
    }

    /// All hosts of the cluster.
    pub(crate) fn hosts(&self) -> Result<Vec<HostInfo>, ApiError> {
        let cluster = self.cluster_or_error()?;
        let view = cluster.directory.view();
        if view.is_fresh() && view.members.get(cluster.id).is_none() {
            return Err(no_member(&cluster));
        }
        let mut hosts: Vec<HostInfo> = view
            .members
            .iter()
            .map(|member| {
                let status = view.hosts.get(&member.id).map(|status| &status.value);
                let machines = view.environments.values().flat_map(|record| record.value.placement.values());
                let announced = cluster.announced(member.id);
                HostInfo {
                    name: member.name.to_string(),
                    id: member.id.to_string(),
                    state: match (status.is_some(), member.draining) {
                        (false, _) => HostState::Lost,
                        (true, true) => HostState::Draining,
                        (true, false) => HostState::Ready,
                    },
                    this: member.id == cluster.id,
                    addresses: member.addresses.iter().map(ToString::to_string).collect(),
                    labels: status
                        .map(|status| {
                            let labels = status.labels.iter();
                            labels.map(|(name, value)| (name.to_string(), value.to_string())).collect()
                        })
                        .unwrap_or_default(),
                    free_memory_bytes: status.map_or(0, |status| status.free_memory_bytes),
                    machines: u32::try_from(machines.filter(|host| **host == member.id).count())
                        .unwrap_or(u32::MAX),
                    version: status.map(|status| status.version.clone()).unwrap_or_default(),
                    issuer: member.issuer,
                    certificate_until: announced
                        .as_ref()
                        .and_then(|announced| announced.certificate_until)
                        .map(|until| until.to_string()),
                    underlay_mtu: announced.and_then(|announced| announced.underlay_mtu),
                }
            })
            .collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(hosts)
    }

    /// A token for hosts that are to join.
    pub(crate) async fn make_token(&self, request: TokenRequest) -> Result<TokenReply, ApiError> {
        let cluster = self.cluster_or_error()?;
        let Some(admission) = &cluster.admission else {
            return Err(ApiError::new(ErrorKind::WrongState, "this host cannot admit others")
                .hint("ask the host that made the cluster: `diorama host token` there"));
        };
        let valid_for = Duration::from_secs(request.valid_s);
        let token = admission
            .create_token(valid_for, request.uses, vec![cluster.config.address])
            .await
            .map_err(admission_error)?;
        Ok(TokenReply { token: token.to_string() })
    }

    /// Lets a host get no new machines, or get them again.
    pub(crate) async fn drain_host(&self, name: &str, drain: bool) -> Result<HostInfo, ApiError> {
        let cluster = self.cluster_or_error()?;
        let id = cluster.host_id(name)?;
        cluster
            .directory
            .change_member(id, |member| member.draining = drain)
            .await
            .map_err(directory_error)?;
        let hosts = self.hosts()?;
        hosts
            .into_iter()
            .find(|host| host.name == name)
            .ok_or_else(|| ApiError::new(ErrorKind::NotFound, format!("host `{name}` was removed meanwhile")))
    }

    /// Takes a host out of the cluster.
    pub(crate) async fn remove_host(&self, name: &str, force: bool) -> Result<(), ApiError> {
        let cluster = self.cluster_or_error()?;
        let id = cluster.host_id(name)?;
        if id == cluster.id {
            return Err(ApiError::new(ErrorKind::WrongState, format!("`{name}` is this host itself"))
                .hint("`diorama host leave` takes it out"));
        }
        let view = cluster.directory.view();
        if !force && is_only_issuer(&view, id) {
            return Err(only_issuer(name));
        }
        let used = view.environments.values().find(|record| record.value.hosts().contains(&id));
        if let (Some(record), false) = (used, force) {
            return Err(ApiError::new(
                ErrorKind::WrongState,
                format!("environment `{}` has machines on host `{name}`", record.value.name()),
            )
            .hint("stop it, or restore it elsewhere (`diorama host drain`, then `diorama restore`); `--force` removes the host all the same"));
        }
        cluster.directory.remove_member(id).await.map_err(directory_error)
    }
}

/// Looks every two seconds whether this host is still a member, says what it has, and stops what it is not to have.
async fn look_after(agent: Weak<Agent>, cluster: Weak<Cluster>) {
    let mut disowned = BTreeMap::new();
    while let (Some(agent), Some(cluster)) = (agent.upgrade(), cluster.upgrade()) {
        if !agent.cluster().is_some_and(|current| Arc::ptr_eq(&current, &cluster)) {
            return;
        }
        if agent.leave_if_removed(&cluster).await {
            return;
        }
        cluster.say_issuer().await;
        agent.announce();
        drop(cluster);
        let looked = tokio::task::spawn_blocking(move || {
            agent.end_disowned(&mut disowned);
            disowned
        });
        disowned = looked.await.unwrap_or_default();
        tokio::time::sleep(ANNOUNCE_INTERVAL).await;
    }
}

/// Renews this host's certificate whenever it is due.
async fn keep_certificate(folder: PathBuf, cluster: Weak<Cluster>) {
    let Some(cluster) = cluster.upgrade() else { return };
    let credentials = match Credentials::open(&folder) {
        Ok(Some(credentials)) => credentials,
        Ok(None) => return,
        Err(error) => return tracing::error!(%error, "this host's certificate will not be renewed"),
    };
    let renewal = Renewal {
        folder,
        tls: cluster.tls.clone(),
        peers: cluster.peers.clone(),
        admission: cluster.admission.clone(),
    };
    drop(cluster);
    renewal.run(credentials).await;
}

/// Whether nobody could be let in, and no certificate renewed, without that host.
fn is_only_issuer(view: &View, id: HostId) -> bool {
    let mut issuers = view.members.iter().filter(|member| member.issuer);
    let others = view.members.iter().any(|member| member.id != id);
    others && issuers.next().is_some_and(|first| first.id == id) && issuers.next().is_none()
}

fn only_issuer(name: &str) -> ApiError {
    ApiError::new(
        ErrorKind::WrongState,
        format!("`{name}` is the only host that admits others and renews certificates"),
    )
    .hint("copy `cluster/authority.json` in its DIORAMA_HOME to another host, and start that one's agent again; `--force` does without")
}

/// The directory can be read, and this host is not in it.
fn no_member(cluster: &Cluster) -> ApiError {
    let message = match cluster.directory.view().removed.get(&cluster.id) {
        Some(removed) => {
            format!("this host was removed from its cluster at {}; it is leaving", removed.value.since)
        }
        None => "this host's cluster does not know it, and nobody has removed it".to_owned(),
    };
    ApiError::new(ErrorKind::WrongState, message).hint(
        "has etcd lost its data, or was an old backup restored? Then restore a newer one. `diorama host leave --force` leaves",
    )
}

fn make_private(folder: &Path) -> Result<(), ApiError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| io_error(folder, &error))
}

fn host_name(text: &str) -> Result<HostName, ApiError> {
    text.parse().map_err(|error| {
        ApiError::new(ErrorKind::Invalid, format!("`{text}` cannot be a host's name: {error}"))
            .hint("choose one with `--name`")
    })
}

fn labels(texts: &BTreeMap<String, String>) -> Result<BTreeMap<LabelName, LabelValue>, ApiError> {
    let invalid = |text: &str, error: String| {
        ApiError::new(ErrorKind::Invalid, format!("`{text}` cannot be part of a label: {error}"))
    };
    texts
        .iter()
        .map(|(name, value)| {
            let key = name
                .parse()
                .map_err(|error: diorama_topology::NameError| invalid(name, error.to_string()))?;
            let value = value
                .parse()
                .map_err(|error: diorama_topology::LabelValueError| invalid(value, error.to_string()))?;
            Ok((key, value))
        })
        .collect()
}

fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorKind::Internal, error.to_string())
}

pub(crate) fn directory_error(error: DirectoryError) -> ApiError {
    let kind = match &error {
        DirectoryError::Held { .. } => ErrorKind::Busy,
        DirectoryError::Missing { .. } => ErrorKind::NotFound,
        DirectoryError::Exists { .. } => ErrorKind::NameInUse,
        _ => ErrorKind::Agent,
    };
    let hint = match &error {
        DirectoryError::Unavailable { .. } => Some(
            "environments run on; what changes the cluster waits for etcd. Is it up, and can this host reach it?",
        ),
        DirectoryError::Conflict { .. } => Some("somebody else changed it at the same time: try again"),
        _ => None,
    };
    let error = ApiError::new(kind, error.to_string());
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn admission_error(error: AdmissionError) -> ApiError {
    let kind = match &error {
        AdmissionError::MemberAlready { .. } => ErrorKind::WrongState,
        AdmissionError::Invalid(_) | AdmissionError::Refused(_) => ErrorKind::Invalid,
        _ => ErrorKind::Agent,
    };
    let hint = match &error {
        AdmissionError::MemberAlready { .. } => "`diorama host list` shows the cluster",
        AdmissionError::Invalid(_) => "`diorama host --help` shows examples",
        AdmissionError::Refused(_) => {
            "a member makes new tokens: `diorama host token`; `--name` gives this host another name than its own"
        }
        AdmissionError::Unreachable { .. } => {
            "is the host of the token up, and its address reachable from here?"
        }
        _ => {
            "is etcd up, can this host reach it, and does it take what `--etcd-user`, `--etcd-ca` and `--etcd-cert` say?"
        }
    };
    ApiError::new(kind, error.to_string()).hint(hint)
}
