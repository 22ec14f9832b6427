//! The agent's process: its lock, its socket, its end.

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use diorama_api::{ApiError, ErrorKind, Folders};
use diorama_store::OpenOptions;
use nix::fcntl::{Flock, FlockArg};

use crate::Agent;
use crate::problem::io_error;
use crate::store_keys::{Secret, SecretSource};

/// How long an agent that was started by a command stays without environments and requests.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// How often idleness is looked at.
const IDLE_CHECK: Duration = Duration::from_secs(5);
/// How often it is looked whether others need the memory that snapshots' is cached in.
const MEMORY_CHECK: Duration = Duration::from_secs(2);

/// How long the first command waits for the cluster's directory.
const DIRECTORY_WAIT: Duration = Duration::from_secs(3);

/// How long the lock of an agent that was killed may take to go.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// How an agent is to run.
#[derive(Debug)]
pub struct Options {
    /// Where it keeps things.
    pub folders: Folders,
    /// A descriptor that is written to and closed as soon as the agent answers.
    pub ready: Option<RawFd>,
    /// What opens the store, where it is encrypted; without one, the process's variables name it.
    pub secret: Option<Secret>,
    /// Whether it ends by itself when there is nothing to do.
    pub exit_when_idle: bool,
}

/// Runs the agent until it is stopped (by request, SIGTERM or SIGINT, or idle). Machines run on.
///
/// # Errors
/// When another agent runs with the same folders, or the folders or the socket cannot be used.
pub fn run(options: Options) -> Result<(), ApiError> {
    // Guests' memory and disks are nobody else's, also where the home was there before with another mode.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    options.folders.create()?;
    let _lock = lock(&options.folders)?;
    let secret = match &options.secret {
        Some(secret) => Some(secret.clone()),
        None => SecretSource::from_process()?.map(|source| source.read()).transpose()?,
    };
    let agent = Agent::open(
        options.folders.clone(),
        &OpenOptions { secret, signer: crate::signatures::signer_from_process()? },
    )?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Threads for long work are begun by others that may go before guests.
        .on_thread_start(crate::be_ordinary)
        .enable_all()
        .build()
        .map_err(|error| {
            ApiError::new(ErrorKind::Io, format!("the agent's runtime cannot start: {error}"))
        })?;
    let served = runtime.block_on(serve(Arc::clone(&agent), &options));
    // Operations that still run are told to undo what they began.
    agent.slots.withdraw_operations();
    runtime.shutdown_timeout(Duration::from_secs(10));
    let _ = std::fs::remove_file(options.folders.socket());
    agent.forget_removed_snapshots();
    if agent.slots.running().is_empty() {
        agent.remove_empty_folders();
    }
    served
}

async fn serve(agent: Arc<Agent>, options: &Options) -> Result<(), ApiError> {
    let socket = options.folders.socket();
    // A socket file without an agent behind it: we hold the lock, so nobody listens on it.
    let _ = std::fs::remove_file(&socket);
    let listener = tokio::net::UnixListener::bind(&socket).map_err(|error| io_error(&socket, &error))?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| io_error(&socket, &error))?;
    if let Some(config) = crate::cluster::Config::load(&agent.cluster_folder())? {
        agent.start_cluster(config).await?;
        if let Some(cluster) = agent.cluster()
            && let Err(error) = cluster.directory.fresh(DIRECTORY_WAIT).await
        {
            tracing::warn!(%error, "the cluster's directory does not answer yet: what is known is from before");
        }
    }
    if let Some(ready) = options.ready {
        // SAFETY: the starter passed the descriptor to this process for this purpose alone.
        let mut ready = File::from(unsafe { OwnedFd::from_raw_fd(ready) });
        // A starter that has gone does not matter.
        let _ = ready.write_all(b"ready\n");
    }
    tracing::info!(socket = %socket.display(), "the agent is ready");

    tokio::spawn(yield_memory(Arc::downgrade(&agent)));

    let activity = Arc::new(Activity::default());
    let counted = Arc::clone(&activity);
    let router = crate::http::router(Arc::clone(&agent)).layer(axum::middleware::from_fn(
        move |request, next: axum::middleware::Next| {
            let counted = Arc::clone(&counted);
            async move {
                counted.requests.fetch_add(1, Ordering::Relaxed);
                next.run(request).await
            }
        },
    ));
    let shutdown = {
        let agent = Arc::clone(&agent);
        let exit_when_idle = options.exit_when_idle;
        async move { until_the_end(agent, activity, exit_when_idle).await }
    };
    tokio::select! {
        result = async { axum::serve(listener, router).await } => {
            result.map_err(|error| io_error(&socket, &error))
        }
        () = shutdown => Ok(()),
    }
}

/// Gives cached memory back when others need it.
async fn yield_memory(agent: Weak<Agent>) {
    loop {
        tokio::time::sleep(MEMORY_CHECK).await;
        let Some(agent) = agent.upgrade() else { return };
        // Reads and removes files.
        let looking = tokio::task::spawn_blocking(move || {
            agent.cache.yield_memory(0, || agent.slots.snapshots_in_use());
        });
        if looking.await.is_err() {
            return;
        }
    }
}

#[derive(Debug, Default)]
struct Activity {
    requests: AtomicU64,
}

async fn until_the_end(agent: Arc<Agent>, activity: Arc<Activity>, exit_when_idle: bool) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signals cannot be caught");
        return;
    };
    let mut idle_for = Duration::ZERO;
    let mut seen = 0;
    loop {
        tokio::select! {
            () = agent.stop.notified() => {
                // The request that asked for this gets its answer first.
                tokio::time::sleep(Duration::from_millis(50)).await;
                return;
            }
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            () = tokio::time::sleep(IDLE_CHECK), if exit_when_idle => {
                let requests = activity.requests.load(Ordering::Relaxed);
                if requests == seen && agent.slots.is_idle() && agent.cluster().is_none() {
                    idle_for += IDLE_CHECK;
                } else {
                    idle_for = Duration::ZERO;
                }
                seen = requests;
                if idle_for >= IDLE_LIMIT {
                    tracing::info!("nothing to do: the agent ends");
                    return;
                }
            }
        }
    }
}

fn lock(folders: &Folders) -> Result<Flock<File>, ApiError> {
    let path = folders.agent_lock();
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| io_error(&path, &error))?;
    // A process that an agent was just starting when it was killed holds the lock until it runs its own program.
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, _)) if Instant::now() < deadline => file = back,
            Err((_, error)) => {
                return Err(ApiError::new(
                    ErrorKind::Agent,
                    format!("another agent runs with {} ({error})", folders.home().display()),
                )
                .hint("`diorama agent stop` ends it"));
            }
        }
        std::thread::sleep(LOCK_POLL);
    }
}

impl Agent {
    /// With no environment left, the runtime folder holds nothing but the cache of memory; when there are no
    /// snapshots either, it goes.
    fn remove_empty_folders(&self) {
        let runtime = self.folders.runtime();
        for folder in [runtime.join("ram"), runtime.join(crate::slot::RUNTIME_FOLDER), runtime.to_path_buf()]
        {
            // Not empty, or not there: both are fine.
            let _ = std::fs::remove_dir(folder);
        }
    }
}
