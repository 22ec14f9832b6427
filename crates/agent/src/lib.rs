//! The agent: the one place where the switch, QEMU, the cut and the store meet.
//!
//! | module | owns |
//! | --- | --- |
//! | [`dataplane`] | the thread that moves frames and makes cuts |
//! | `slot` | each environment's lock, record and running machines |
//! | `launch` | QEMU processes from nothing to standing ready |
//! | `up`, `down`, `pause` | an environment's life |
//! | `snapshot` | preparing, cutting, capturing, storing, committing |
//! | `restore` | rolling back, and forks |
//! | `cluster` | membership of a cluster of hosts |
//! | `span` | environments that span hosts |
//! | `priority` | how its own threads are scheduled |
//! | `takeover` | machines that outlived the agent before |
//! | `keeper` | live captures whose agent has died |
//! | `pace`, `haste`, `processors` | how snapshots and guests share the processors |
//! | `memory`, `control_group` | what of the computer may be used |
//! | `ram_cache` | snapshots' memory, ready to be mapped |
//! | `transfer`, `extract`, `diff` | snapshots as files, in other stores, compared |
//! | `guest` | commands and consoles inside machines |
//! | `http` | the API |
//!
//! Invariants:
//! - machines outlive the agent: whatever it knows of them and cannot ask them is in `environment.json` first;
//! - one operation at a time on an environment; operations on different environments do not wait for each other;
//! - an operation that fails or is cancelled leaves the environment as it was, and nothing of its own behind.

mod capture;
mod cluster;
mod control_group;
mod dataplane;
mod diff;
mod disks;
mod doctor;
mod down;
mod extract;
mod failpoint;
mod file_cache;
mod guest;
mod hardware;
mod haste;
mod http;
mod images;
mod keeper;
mod launch;
mod lazy;
mod memory;
mod operation;
mod pace;
mod pause;
mod priority;
mod problem;
mod processors;
mod ram_cache;
mod record;
mod restore;
mod serve;
pub mod signatures;
mod slot;
mod snapshot;
mod snapshots;
mod span;
mod status;
pub mod store_keys;
mod takeover;
mod transfer;
mod up;
mod upkeep;
mod user_files;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use diorama_api::{AgentInfo, ApiError, Empty, ErrorKind, Folders, StopAgentRequest};
use diorama_cluster::directory::{Fence, FencingToken};
use diorama_qemu::process::Policy;
use diorama_store::{Location, OpenOptions, PublicKey, Store};
use diorama_topology::EnvironmentName;
use tokio::sync::Notify;

pub use dataplane::switch_streams;
pub use doctor::doctor;
pub use images::BUILT_IN_IMAGES;
pub use keeper::keep_captures;
pub use serve::{Options, run};

use cluster::Cluster;
use dataplane::DataPlane;
use file_cache::FileCache;
use hardware::Hardware;
use ram_cache::RamCache;
use slot::Slots;
use span::{Clocks, Sessions};
use user_files::UserFiles;

/// Everything that requests work on.
#[derive(Debug)]
pub(crate) struct Agent {
    folders: Folders,
    host: String,
    hardware: Hardware,
    store: Store,
    /// Whose signatures count; `None`: anybody's, and none.
    trusted: Option<Vec<PublicKey>>,
    cache: RamCache,
    files: FileCache,
    user_files: UserFiles,
    plane: DataPlane,
    slots: Slots,
    /// Told when the agent is to stop.
    stop: Notify,
    /// Other hosts, on a host that is in a cluster.
    cluster: RwLock<Option<Arc<Cluster>>>,
    /// Held while this host enters or leaves a cluster.
    changing_cluster: tokio::sync::Mutex<()>,
    /// The latest holders of environments' locks that have asked something of this host.
    fence: Mutex<Fence>,
    sessions: Sessions,
    clocks: Clocks,
    /// For threads that outlive a request.
    me: Weak<Agent>,
}

impl Agent {
    /// Opens the folders, and takes back what an agent before left running.
    fn open(folders: Folders, opening: &OpenOptions) -> Result<Arc<Self>, ApiError> {
        folders.create()?;
        let store = Store::open_later(&store_location(&folders)?, opening).map_err(problem::store_error)?;
        let trusted = signatures::trusted_from_process()?;
        let cache = RamCache::open(folders.runtime(), folders.home())?;
        let files = FileCache::open(folders.home())?;
        let plane = DataPlane::start()
            .map_err(|error| ApiError::new(ErrorKind::Io, format!("the data plane cannot start: {error}")))?;
        let agent = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            cluster: RwLock::default(),
            changing_cluster: tokio::sync::Mutex::default(),
            fence: Mutex::default(),
            sessions: Sessions::default(),
            clocks: Clocks::default(),
            host: host_name(),
            hardware: Hardware::default(),
            store,
            trusted,
            cache,
            files,
            user_files: UserFiles::default(),
            plane,
            slots: Slots::default(),
            stop: Notify::new(),
            folders,
        });
        if let Some(config) = cluster::Config::load(&agent.cluster_folder())? {
            agent.open_wire(config.address)?;
        }
        agent.take_over_all()?;
        Ok(agent)
    }

    /// Who this is.
    pub(crate) fn info(&self) -> AgentInfo {
        AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            host: self.host.clone(),
            environments: u32::try_from(self.slots.running().len()).unwrap_or(u32::MAX),
            note: match self.cluster() {
                Some(cluster) => cluster.note(),
                None => self.left_cluster().map(|left| format!("this host is in no cluster: {left}")),
            },
        }
    }

    /// This host's name: the cluster's for it, or the computer's.
    pub(crate) fn host_name(&self) -> String {
        self.cluster().map_or_else(|| self.host.clone(), |cluster| cluster.name.to_string())
    }

    pub(crate) fn fence(&self) -> MutexGuard<'_, Fence> {
        self.fence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the holder of an environment's lock act here, unless a later one has been seen.
    pub(crate) fn admit(&self, environment: &EnvironmentName, token: FencingToken) -> Result<(), ApiError> {
        self.fence().admit(environment, token).map_err(|superseded| {
            ApiError::new(ErrorKind::Busy, format!("environment `{environment}`: {superseded}"))
                .hint("another host has taken it over meanwhile: `diorama status` shows how it is now")
        })
    }

    /// Asks the agent to end.
    pub(crate) fn stop(&self, request: StopAgentRequest) -> Result<Empty, ApiError> {
        let running = self.slots.running();
        if !running.is_empty() && !request.force {
            return Err(ApiError::new(
                ErrorKind::WrongState,
                format!("environments run: {}", running.join(", ")),
            )
            .hint("stop them with `diorama down --all`, or stop only the agent with `diorama agent stop --force`"));
        }
        // A machine that still needs this agent would stand still for ever.
        let loading: Vec<String> = self
            .slots
            .all()
            .iter()
            .filter(|slot| slot.state().is_loading())
            .map(|slot| slot.name.to_string())
            .collect();
        if !loading.is_empty() {
            return Err(ApiError::new(
                ErrorKind::WrongState,
                format!("memory of running machines is still being loaded: {}", loading.join(", ")),
            )
            .hint("wait until `diorama status` shows no machine as loading, or `diorama down` these first"));
        }
        self.stop.notify_one();
        Ok(Empty {})
    }
}

/// Where the store is; a server's address and credentials are in this process's variables.
pub(crate) fn store_location(folders: &Folders) -> Result<Location, ApiError> {
    Location::parse(folders.store(), &|name| std::env::var(name).ok()).map_err(problem::store_error)
}

fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "localhost".to_owned())
}

/// Gives the calling thread the priority that threads have by default, whoever began it.
pub(crate) fn be_ordinary() {
    priority::schedule_this_thread(Policy::Normal { nice: 0 }, "answering requests");
}
