//! The whole of an environment that spans hosts: started, stopped, looked at and restored by whichever agent is asked.
//!
//! Invariants:
//! - who changes which hosts an environment has holds its lock in the directory;
//! - the directory's record of an environment is written before any part of it is launched, and removed after the last is
//!   gone: what runs can be found;
//! - parts run all or none: none is told to go before all stand ready.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use diorama_api::{
    ApiError, DownReport, DownRequest, EnvironmentState, EnvironmentStatus, ErrorKind, ForkReport,
    ForkRequest, MachineState, MachineStatus, NicStatus, RestoreReport,
};
use diorama_api::{ClientError, Notice};
use diorama_cluster::HostId;
use diorama_cluster::directory::{EnvironmentRecord, InitiatorLock, Revised, Revision};
use diorama_cluster::placement::{self, Wanted};
use diorama_store::SnapshotId;
use diorama_topology::{Environment, EnvironmentName, MachineName};
use diorama_tunnel::{Ip, Protection, guest_mtu};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::parts::{GoRequest, PartDownRequest, PartReport, PartRequest, READY_STEP};
use crate::Agent;
use crate::cluster::{Cluster, MACHINE_OVERHEAD_BYTES, directory_error};
use crate::operation::Operation;
use crate::record::{SpanHost, SpanRecord};
use crate::restore::MAX_FORKS;
use crate::slot::environment_name;
use crate::user_files::UserFile;

/// How long parts may take to stand ready.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// How often a wait for parts looks up.
const READY_POLL: Duration = Duration::from_millis(20);
/// How often numbers on the wire are drawn anew when a host has one already.
const LAUNCH_ATTEMPTS: usize = 3;

type Placed = BTreeMap<MachineName, HostId>;

/// What machines begin with.
struct Origin {
    /// That of all ports, at least.
    epoch: u32,
    /// A snapshot; none to boot.
    from: Option<String>,
    /// What they boot from.
    files: Vec<UserFile>,
}

impl Agent {
    /// The directory's record of an environment.
    pub(crate) fn environment_record(&self, name: &str) -> Option<Revised<Arc<EnvironmentRecord>>> {
        let view = self.cluster()?.directory.view();
        view.environments.get(name).cloned()
    }

    /// Starts an environment on the cluster's hosts.
    pub(crate) fn up_in_cluster(
        &self,
        specification: Environment,
        operation: &Operation,
    ) -> Result<EnvironmentStatus, ApiError> {
        let cluster = self.cluster_or_error()?;
        let name = specification.name.clone();
        let known = self.environment_record(name.as_str());
        if let Some(known) = &known {
            let status = self.status_in_cluster(&known.value)?;
            let same = known.value.detail["as_written"] == serde_json::json!(specification);
            if same && status.state != EnvironmentState::Down {
                return Ok(status);
            }
            // One that is down starts from the disks that its hosts have kept.
            if status.state != EnvironmentState::Down {
                return Err(ApiError::new(
                    ErrorKind::NameInUse,
                    format!("the cluster has an environment `{name}` already, and its file said otherwise"),
                )
                .hint("stop it with `diorama down`, or start this one under another name with `--name`"));
            }
        }
        operation.step("placing machines");
        let lock = cluster.wait(cluster.directory.lock(&name, "up")).map_err(directory_error)?;
        let as_written = specification.clone();
        let before = known.as_ref().map(|known| known.value.placement.clone()).unwrap_or_default();
        let placed = place(&cluster, &specification, &before)?;
        let specification = fit(&cluster, specification, &placed, operation)?;
        let files = self.user_files.look_at_all(&specification, operation)?;
        if let Some(known) = &known {
            let before: Vec<UserFile> =
                serde_json::from_value(known.value.detail["files"].clone()).unwrap_or_default();
            crate::user_files::check_kept(&specification, &before, &files)?;
        }
        let record = EnvironmentRecord {
            specification: specification.clone(),
            placement: placed.clone(),
            owner: cluster.id,
            generation: known.as_ref().map_or(1, |known| known.value.generation + 1),
            detail: serde_json::json!({ "as_written": as_written, "files": &files }),
        };
        let based_on = known.as_ref().map(|known| known.revision);
        let revision = cluster
            .wait(cluster.directory.put_environment(&record, based_on, &lock))
            .map_err(directory_error)?;
        if let Err(error) = self.launch_parts(
            &specification,
            &placed,
            &Origin { epoch: 0, from: None, files },
            &lock,
            operation,
        ) {
            self.put_back(known.as_ref(), &name, revision, &lock);
            return Err(error);
        }
        release(&cluster, lock);
        self.status_in_cluster(&record)
    }

    /// Stops an environment wherever it is.
    pub(crate) fn down_in_cluster(
        &self,
        known: &Revised<Arc<EnvironmentRecord>>,
        request: DownRequest,
        operation: &Operation,
    ) -> Result<DownReport, ApiError> {
        let cluster = self.cluster_or_error()?;
        let name = known.value.name().clone();
        let lock = cluster.wait(cluster.directory.lock(&name, "down")).map_err(directory_error)?;
        operation.step("stopping machines");
        let mut report = DownReport {
            environment: name.clone(),
            machines_stopped: 0,
            disks_kept: Vec::new(),
            disks_removed: Vec::new(),
        };
        let hosts: Vec<HostId> = known.value.hosts().into_iter().collect();
        let mut failure = None;
        for (host, result) in self.down_parts(&hosts, &name, request, &lock) {
            match result {
                Ok(part) => {
                    report.machines_stopped += part.machines_stopped;
                    report.disks_kept.extend(part.disks_kept);
                    report.disks_removed.extend(part.disks_removed);
                }
                Err(error) if error.kind == ErrorKind::NotFound => {}
                Err(error) if cluster.directory.view().is_alive(host) => {
                    failure.get_or_insert(error);
                }
                // Its machines are gone with it, or stop when it comes back and finds no record.
                Err(error) => {
                    operation.warn(format!("a lost host was not asked to stop its machines: {error}"))
                }
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        if report.disks_kept.is_empty() {
            let removed = cluster.directory.remove_environment(&name, known.revision, &lock);
            cluster.wait(removed).map_err(directory_error)?;
        }
        release(&cluster, lock);
        Ok(report)
    }

    fn down_parts(
        &self,
        hosts: &[HostId],
        name: &EnvironmentName,
        request: DownRequest,
        lock: &InitiatorLock,
    ) -> Vec<(HostId, Result<DownReport, ApiError>)> {
        let Ok(cluster) = self.cluster_or_error() else { return Vec::new() };
        let request = PartDownRequest { down: request, token: lock.token() };
        let path = format!("/v1/peer/environments/{name}/down");
        ask_parts(&cluster, &path, hosts.iter().map(|host| (*host, request.clone())))
    }

    /// What every environment of the cluster does.
    pub(crate) fn statuses_in_cluster(&self) -> Result<Vec<EnvironmentStatus>, ApiError> {
        let view = self.cluster_or_error()?.directory.view();
        view.environments.values().map(|record| self.status_in_cluster(&record.value)).collect()
    }

    /// What an environment does, as its hosts say.
    pub(crate) fn status_in_cluster(
        &self,
        record: &EnvironmentRecord,
    ) -> Result<EnvironmentStatus, ApiError> {
        let cluster = self.cluster_or_error()?;
        let path = format!("/v1/peer/environments/{}", record.name());
        let parts: BTreeMap<HostId, Result<EnvironmentStatus, ClientError>> = cluster.wait(async {
            let mut asked = tokio::task::JoinSet::new();
            for host in record.hosts() {
                let (client, path) = (cluster.client(host), path.clone());
                asked.spawn(async move {
                    let answer = tokio::time::timeout(STATUS_LIMIT, client.get(&path)).await;
                    let answer = answer.unwrap_or_else(|_| {
                        Err(ClientError::Carrier(format!(
                            "host {host} did not answer within {STATUS_LIMIT:?}"
                        )))
                    });
                    (host, answer)
                });
            }
            asked.join_all().await.into_iter().collect()
        });
        Ok(merge(&cluster, record, &parts))
    }

    /// Takes an environment back to a snapshot, on the hosts that it has or on others.
    pub(crate) fn restore_in_cluster(
        &self,
        name: EnvironmentName,
        id: SnapshotId,
        elapsed_us: u64,
        operation: &Operation,
    ) -> Result<RestoreReport, ApiError> {
        let started = crate::restore::before(elapsed_us);
        let cluster = self.cluster_or_error()?;
        let stored = self.load_trusted(&id)?;
        let specification = stored.manifest.specification.renamed(name.clone());
        let lock = cluster.wait(cluster.directory.lock(&name, "restore")).map_err(directory_error)?;
        let known = self.environment_record(name.as_str());
        let before: Placed = known.as_ref().map(|known| known.value.placement.clone()).unwrap_or_default();
        operation.step("placing machines");
        let placed = place(&cluster, &specification, &before)?;
        let specification = fit(&cluster, specification, &placed, operation)?;
        // No host's ports may go back: the highest epoch that anybody knows is where all begin.
        let epoch = match &known {
            Some(known) => self.status_in_cluster(&known.value)?.epoch,
            None => 0,
        };
        let record = EnvironmentRecord {
            specification: specification.clone(),
            placement: placed.clone(),
            owner: cluster.id,
            generation: known.as_ref().map_or(1, |known| known.value.generation + 1),
            detail: known.as_ref().map_or_else(
                || serde_json::json!({ "as_written": stored.manifest.specification }),
                |known| known.value.detail.clone(),
            ),
        };
        // While both sets of parts may exist, the record names the hosts of both in turn: first what is to be.
        let based_on = known.as_ref().map(|known| known.revision);
        let revision = cluster
            .wait(cluster.directory.put_environment(&record, based_on, &lock))
            .map_err(directory_error)?;
        // Kernels and initrds are in the snapshot, and images in it by their hashes.
        let origin = Origin { epoch, from: Some(id.to_string()), files: Vec::new() };
        let launched = self.launch_parts(&specification, &placed, &origin, &lock, operation);
        let reports = match launched {
            Ok(reports) => reports,
            Err(error) => {
                self.put_back(known.as_ref(), &name, revision, &lock);
                return Err(error);
            }
        };
        // Hosts that have no part any more.
        let left: Vec<HostId> = known
            .iter()
            .flat_map(|known| known.value.hosts())
            .filter(|host| !record.hosts().contains(host) && cluster.directory.view().is_alive(*host))
            .collect();
        for (host, result) in self.down_parts(&left, &name, DownRequest { volumes: true }, &lock) {
            if let Err(error) = result
                && error.kind != ErrorKind::NotFound
            {
                let host = cluster.name_of(host);
                operation.warn(format!("host {host} did not stop its old part: {error}"));
            }
        }
        release(&cluster, lock);
        let elapsed = started.elapsed();
        Ok(RestoreReport {
            environment: name.to_string(),
            snapshot: id.to_string(),
            ready_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            in_flight_replayed: reports.iter().map(|report| report.in_flight_replayed).sum(),
            machines: reports.into_iter().flat_map(|report| report.machines).collect(),
            lazy: false,
        })
    }

    /// After parts did not start: the directory says again what it said before.
    fn put_back(
        &self,
        known: Option<&Revised<Arc<EnvironmentRecord>>>,
        name: &EnvironmentName,
        revision: Revision,
        lock: &InitiatorLock,
    ) {
        let Some(cluster) = self.cluster() else { return };
        let undone = match known {
            Some(known) => {
                cluster.wait(cluster.directory.put_environment(&known.value, Some(revision), lock))
            }
            None => cluster.wait(cluster.directory.remove_environment(name, revision, lock)),
        };
        if let Err(error) = undone {
            tracing::error!(%error, "the record of an environment was not put back");
        }
    }

    /// Makes new environments of a snapshot, one after another; all or none.
    pub(crate) fn fork_in_cluster(
        &self,
        id: SnapshotId,
        original: &EnvironmentName,
        request: &ForkRequest,
        operation: &Operation,
    ) -> Result<ForkReport, ApiError> {
        let names = self.fork_names(original, request)?;
        let mut environments: Vec<RestoreReport> = Vec::new();
        for name in names {
            match self.restore_in_cluster(name, id, request.elapsed_us, operation) {
                Ok(report) => environments.push(report),
                Err(error) => {
                    for made in environments {
                        let undone = self.down(&made.environment, DownRequest { volumes: true }, operation);
                        if let Err(error) = undone {
                            tracing::error!(environment = made.environment, %error, "a fork could not be undone");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(ForkReport { environments })
    }

    fn fork_names(
        &self,
        original: &EnvironmentName,
        request: &ForkRequest,
    ) -> Result<Vec<EnvironmentName>, ApiError> {
        let view = self.cluster_or_error()?.directory.view();
        let taken = |name: &str| view.environments.keys().any(|known| known.as_str() == name);
        let count = request.count.unwrap_or(1);
        if count == 0 || count > MAX_FORKS {
            return Err(ApiError::new(ErrorKind::Invalid, format!("cannot make {count} forks at once"))
                .hint(format!("between 1 and {MAX_FORKS}")));
        }
        let names: Vec<String> = match (&request.name, count) {
            (Some(name), 1) => vec![name.clone()],
            (Some(name), _) => (1..=count).map(|number| format!("{name}-{number}")).collect(),
            (None, _) => (1_u32..)
                .map(|number| format!("{original}-fork-{number}"))
                .filter(|name| !taken(name))
                .take(count as usize)
                .collect(),
        };
        names
            .into_iter()
            .map(|text| {
                if taken(&text) {
                    return Err(ApiError::new(
                        ErrorKind::NameInUse,
                        format!("there is an environment `{text}` already"),
                    )
                    .hint(
                        "choose another name with `--name`, or stop that one with `diorama down --volumes`",
                    ));
                }
                environment_name(&text).map_err(|error| error.hint("choose a short one with `--name`"))
            })
            .collect()
    }

    /// Launches all parts, and lets them run once all stand ready.
    fn launch_parts(
        &self,
        specification: &Environment,
        placed: &Placed,
        origin: &Origin,
        lock: &InitiatorLock,
        operation: &Operation,
    ) -> Result<Vec<PartReport>, ApiError> {
        let mut attempt = 1;
        loop {
            match self.try_launch_parts(specification, placed, origin, lock, operation) {
                Err(error) if error.kind == ErrorKind::Busy && attempt < LAUNCH_ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    fn try_launch_parts(
        &self,
        specification: &Environment,
        placed: &Placed,
        origin: &Origin,
        lock: &InitiatorLock,
        operation: &Operation,
    ) -> Result<Vec<PartReport>, ApiError> {
        let cluster = self.cluster_or_error()?;
        let (ids, hosts) = span_hosts(&cluster, specification, placed)?;
        let span = SpanRecord {
            id: u64::from_ne_bytes(crate::launch::random_bytes()),
            whole: specification.clone(),
            hosts,
            me: 0,
            vnis: specification
                .networks
                .iter()
                .map(|_| u32::from_ne_bytes(crate::launch::random_bytes()) & 0xff_ffff)
                .collect(),
            token: lock.token(),
        };
        operation.step("starting machines");
        let (sender, events) = channel();
        let mut tasks = Vec::new();
        for (number, id) in (0_u32..).zip(&ids) {
            let client = cluster.client(*id);
            let request = PartRequest {
                span: SpanRecord { me: number, ..span.clone() },
                epoch: origin.epoch,
                from: origin.from.clone(),
                files: origin.files.clone(),
                asked_by: cluster.name.to_string(),
            };
            let sender = sender.clone();
            tasks.push(cluster.start(async move {
                let ready = sender.clone();
                let result: Result<PartReport, ClientError> = client
                    .operate("/v1/peer/parts", &request, move |notice| {
                        let event = match notice {
                            Notice::Progress(progress) if progress.step == READY_STEP => Event::Ready,
                            Notice::Progress(_) => return,
                            Notice::Warning(message) => Event::Warning(message),
                        };
                        // Whoever launches may have given up.
                        let _ = ready.send(event);
                    })
                    .await;
                let _ = sender.send(Event::Ended(result.map_err(ApiError::from)));
            }));
        }
        // Dropping them closes their connections, and that undoes what they began.
        let _tasks = AbortOnDrop(tasks);
        let deadline = Instant::now() + READY_LIMIT;
        let mut ready = 0;
        let mut reports = Vec::new();
        while reports.len() < ids.len() {
            match events.recv_timeout(READY_POLL) {
                Ok(Event::Ready) => {
                    ready += 1;
                    if ready == ids.len() {
                        // Somebody else may be at it, if this host was cut off meanwhile.
                        lock.check().map_err(|lost| directory_error(lost.into()))?;
                        self.let_go(&cluster, &ids, &span)?;
                    }
                }
                Ok(Event::Warning(message)) => operation.warn(message),
                Ok(Event::Ended(result)) => reports.push(result?),
                Err(RecvTimeoutError::Timeout) => {
                    if ready < ids.len() {
                        operation.check()?;
                    }
                    if Instant::now() > deadline {
                        return Err(ApiError::new(ErrorKind::Agent, "not all hosts stand ready in time")
                            .hint("`diorama host list` shows the hosts; their agents' logs say what takes so long"));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Ok(reports)
    }

    fn let_go(&self, cluster: &Cluster, hosts: &[HostId], span: &SpanRecord) -> Result<(), ApiError> {
        let request = GoRequest { environment: span.whole.name.clone(), span: span.id, token: span.token };
        let body = serde_json::to_vec(&request).unwrap_or_default();
        let results: Vec<_> = cluster.wait(async {
            let mut asked = tokio::task::JoinSet::new();
            for host in hosts {
                let (peers, body, host) = (cluster.peers.clone(), body.clone(), *host);
                asked.spawn(async move { peers.call(host, "go", body, GO_LIMIT).await });
            }
            asked.join_all().await
        });
        results
            .into_iter()
            .try_for_each(|result| result.map(drop))
            .map_err(|error| super::parts::peer_error(&error))
    }
}

/// How long a host may take to say how its part is.
const STATUS_LIMIT: Duration = Duration::from_secs(3);
const GO_LIMIT: Duration = Duration::from_secs(5);

enum Event {
    Ready,
    Warning(String),
    Ended(Result<PartReport, ApiError>),
}

struct AbortOnDrop(Vec<tokio::task::JoinHandle<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

pub(super) fn release(cluster: &Cluster, lock: InitiatorLock) {
    if let Err(error) = cluster.wait(lock.release()) {
        tracing::warn!(%error, "a lock is given back later");
    }
}

/// Asks hosts for something of their parts, all at once, and returns what each said.
pub(super) fn ask_parts<Q, T>(
    cluster: &Cluster,
    path: &str,
    requests: impl IntoIterator<Item = (HostId, Q)>,
) -> Vec<(HostId, Result<T, ApiError>)>
where
    Q: Serialize + Send + Sync + 'static,
    T: DeserializeOwned + Send + 'static,
{
    cluster.wait(async {
        let mut asked = tokio::task::JoinSet::new();
        for (host, request) in requests {
            let (client, path) = (cluster.client(host), path.to_owned());
            asked.spawn(async move {
                let result = client.operate(&path, &request, |_| {}).await.map_err(ApiError::from);
                (host, result)
            });
        }
        asked.join_all().await
    })
}

/// Chooses hosts; machines that have one keep it where they can.
fn place(cluster: &Cluster, specification: &Environment, before: &Placed) -> Result<Placed, ApiError> {
    let view = cluster.directory.view();
    let mut taken: BTreeMap<HostId, u64> = BTreeMap::new();
    for machine in &specification.machines {
        if let Some(host) = before.get(&machine.name) {
            *taken.entry(*host).or_default() += machine.memory_bytes + MACHINE_OVERHEAD_BYTES;
        }
    }
    let wanted: Vec<Wanted> =
        specification.machines.iter().map(|machine| Wanted::of(machine, MACHINE_OVERHEAD_BYTES)).collect();
    placement::place(&wanted, &view.candidates(&taken), before).map_err(|error| {
        ApiError::new(ErrorKind::Unsupported, error.to_string())
            .hint("`diorama host list` shows the hosts, their labels and free memory")
    })
}

/// The hosts of an environment by their numbers.
fn span_hosts(
    cluster: &Cluster,
    specification: &Environment,
    placed: &Placed,
) -> Result<(Vec<HostId>, Vec<SpanHost>), ApiError> {
    let view = cluster.directory.view();
    let mut ids: Vec<HostId> = placed.values().copied().collect();
    ids.sort_unstable();
    ids.dedup();
    let hosts = ids
        .iter()
        .map(|id| {
            let member = view.members.get(*id).ok_or_else(|| {
                ApiError::new(ErrorKind::NotFound, format!("host {id} is not in the cluster any more"))
            })?;
            let tunnel = cluster.tunnel(*id).ok_or_else(|| {
                ApiError::new(
                    ErrorKind::Agent,
                    format!("host `{}` does not say where its tunnels end", member.name),
                )
                .hint("is its agent up? `diorama host list` shows it")
            })?;
            let machines = specification.machines.iter().map(|machine| &machine.name);
            Ok(SpanHost {
                name: member.name.to_string(),
                tunnel,
                machines: machines
                    .filter(|name| placed.get(*name) == Some(id))
                    .map(ToString::to_string)
                    .collect(),
            })
        })
        .collect::<Result<_, ApiError>>()?;
    Ok((ids, hosts))
}

/// Networks that span hosts get an MTU whose frames fit a packet between hosts.
fn fit(
    cluster: &Cluster,
    mut specification: Environment,
    placed: &Placed,
    operation: &Operation,
) -> Result<Environment, ApiError> {
    let (underlay, is_ipv6) = cluster.underlay();
    let ip = if is_ipv6 { Ip::V6 } else { Ip::V4 };
    let fits = guest_mtu(underlay, ip, Protection::Sealed).map_err(|error| {
        ApiError::new(ErrorKind::Unsupported, error.to_string())
            .hint("`diorama host list --json` shows each host's `underlay_mtu`")
    })?;
    for network in &mut specification.networks {
        let mut hosts: Vec<HostId> = specification
            .machines
            .iter()
            .filter(|machine| machine.nics.iter().any(|nic| nic.network == network.name))
            .filter_map(|machine| placed.get(&machine.name).copied())
            .collect();
        hosts.sort_unstable();
        hosts.dedup();
        if hosts.len() > 1 && network.mtu > fits {
            operation.warn(format!(
                "network {} spans hosts: its MTU is {fits} instead of {}, so that frames fit the packets between them",
                network.name, network.mtu
            ));
            network.mtu = fits;
        }
    }
    Ok(specification)
}

/// One status of all parts'.
fn merge(
    cluster: &Cluster,
    record: &EnvironmentRecord,
    parts: &BTreeMap<HostId, Result<EnvironmentStatus, ClientError>>,
) -> EnvironmentStatus {
    let host_name = |id: HostId| cluster.name_of(id);
    let answered: Vec<&EnvironmentStatus> = parts.values().filter_map(|part| part.as_ref().ok()).collect();
    let first = answered.first();
    let machines: Vec<MachineStatus> = record
        .specification
        .machines
        .iter()
        .map(|machine| {
            let host = record.placement.get(&machine.name).copied();
            let known = answered
                .iter()
                .flat_map(|part| &part.machines)
                .find(|known| known.name == machine.name.as_str());
            if let Some(known) = known {
                return MachineStatus { host: host.map(host_name).unwrap_or_default(), ..known.clone() };
            }
            let answer = host.and_then(|host| parts.get(&host));
            MachineStatus {
                name: machine.name.to_string(),
                host: host.map(host_name).unwrap_or_default(),
                pid: None,
                state: MachineState::Lost,
                reason: match answer {
                    Some(Err(error)) => Some(error.to_string()),
                    _ => Some("its host does not have it".to_owned()),
                },
                vcpus: machine.cpus,
                memory_bytes: machine.memory_bytes,
                accelerator: "none".to_owned(),
                nics: machine
                    .nics
                    .iter()
                    .map(|nic| NicStatus {
                        network: nic.network.to_string(),
                        mac: nic.mac.to_string(),
                        address: nic.address.map(|address| address.to_string()),
                        ..NicStatus::default()
                    })
                    .collect(),
                disks: Vec::new(),
                loading: None,
            }
        })
        .collect();
    let broken =
        machines.iter().any(|machine| matches!(machine.state, MachineState::Dead | MachineState::Lost));
    let down = !answered.is_empty() && answered.iter().all(|part| part.state == EnvironmentState::Down);
    let starting = answered.iter().any(|part| part.state == EnvironmentState::Starting);
    let mut networks = first.map(|part| part.networks.clone()).unwrap_or_default();
    for part in answered.iter().skip(1) {
        for (sum, more) in networks.iter_mut().zip(&part.networks) {
            sum.owed_frames += more.owed_frames;
            sum.delivered_frames += more.delivered_frames;
            sum.queued_frames += more.queued_frames;
            for (reason, count) in &more.dropped {
                *sum.dropped.entry(reason.clone()).or_default() += count;
            }
        }
    }
    EnvironmentStatus {
        name: record.name().clone(),
        state: match (starting, down, broken) {
            (true, _, _) => EnvironmentState::Starting,
            (_, true, _) => EnvironmentState::Down,
            (_, _, true) => EnvironmentState::Degraded,
            _ => EnvironmentState::Up,
        },
        epoch: answered.iter().map(|part| part.epoch).max().unwrap_or(0),
        snapshot: first.and_then(|part| part.snapshot.clone()),
        started: first.and_then(|part| part.started.clone()),
        operation: answered.iter().find_map(|part| part.operation.clone()),
        machines,
        networks,
        hosts: record.hosts().into_iter().map(host_name).collect(),
    }
}
