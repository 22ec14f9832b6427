//! How a host gets out of its cluster: because it wants to, or because it finds that it was removed.
//!
//! Removed is only what the directory says so of, by name ([`View::removed`]). A host that is merely not among the members
//! does nothing: a directory that has lost its data looks like that.
//!
//! In this order, so that each step can be done again after a crash: machines stop; the configuration goes, and with it this
//! host is in no cluster; then the rest.
//!
//! [`View::removed`]: diorama_cluster::directory::View::removed

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use diorama_api::{ApiError, DownRequest, ErrorKind, LeaveHostReport};
use diorama_cluster::directory::DirectoryError;
use diorama_cluster::identity::Credentials;
use diorama_cluster::private_file;
use diorama_topology::HostName;
use serde::{Deserialize, Serialize};

use super::{CONFIG_FILE, Cluster, directory_error, internal, is_only_issuer, only_issuer};
use crate::Agent;
use crate::operation::Operation;
use crate::problem::io_error;

const LEFT_FILE: &str = "left.json";
const AUTHORITY_FILE: &str = "authority.json";
/// How long the directory may take for what can be left undone.
const FAREWELL_LIMIT: Duration = Duration::from_secs(3);

/// Which cluster this host was in last, for people.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Left {
    name: HostName,
    at: jiff::Timestamp,
    /// Another host took it out.
    removed: bool,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.at.strftime("%Y-%m-%d %H:%M:%SZ");
        match self.removed {
            true => {
                write!(f, "it was removed from the one that it was in as `{}`, and left at {at}", self.name)
            }
            false => write!(f, "it left the one that it was in as `{}` at {at}", self.name),
        }
    }
}

impl Agent {
    /// The cluster that this host is in no more.
    pub(crate) fn left_cluster(&self) -> Option<Left> {
        let text = std::fs::read(self.cluster_folder().join(LEFT_FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Takes this host out of its cluster.
    pub(crate) async fn leave_host(self: &Arc<Self>, force: bool) -> Result<LeaveHostReport, ApiError> {
        let _changing = self.changing_cluster.lock().await;
        let Some(cluster) = self.cluster() else {
            // One that died while it joined, or left.
            let folder = self.cluster_folder();
            return match Credentials::open(&folder).map_err(internal)? {
                Some(credentials) => {
                    let name = credentials.name().to_string();
                    forget_credentials(&folder, false)?;
                    Ok(LeaveHostReport { name, machines_stopped: 0, told: false })
                }
                None => Err(self.cluster_or_error().err().unwrap_or_else(|| internal("it is in one"))),
            };
        };
        let name = cluster.name.to_string();
        let view = cluster.directory.view();
        if !force {
            if is_only_issuer(&view, cluster.id) {
                return Err(only_issuer(&name));
            }
            let used = view.environments.values().find(|record| record.value.hosts().contains(&cluster.id));
            if let Some(record) = used {
                return Err(ApiError::new(
                    ErrorKind::WrongState,
                    format!("environment `{}` has machines or disks on this host", record.value.name()),
                )
                .hint("stop it with `diorama down --volumes`, or restore it elsewhere (`diorama host drain`, then `diorama restore`); `--force` leaves all the same, and stops them"));
            }
        }
        // First, so that nobody places machines here meanwhile.
        let told = match cluster.directory.remove_member(cluster.id).await {
            Ok(()) | Err(DirectoryError::Missing { .. }) => true,
            Err(error) if force => {
                tracing::warn!(%error, "the cluster is not told that this host leaves");
                false
            }
            Err(error @ DirectoryError::Unavailable { .. }) => {
                return Err(directory_error(error).hint(
                    "is etcd up, and can this host reach it? `--force` leaves without a word, and then another host removes this one",
                ));
            }
            Err(error) => return Err(directory_error(error)),
        };
        let machines_stopped = self.leave(&cluster, false).await?;
        Ok(LeaveHostReport { name, machines_stopped, told })
    }

    /// Leaves when another host has taken this one out. True when it has left.
    pub(super) async fn leave_if_removed(self: &Arc<Self>, cluster: &Arc<Cluster>) -> bool {
        let is_removed = || {
            let view = cluster.directory.view();
            view.is_fresh()
                && view.members.get(cluster.id).is_none()
                && view.removed.contains_key(&cluster.id)
        };
        if !is_removed() {
            return false;
        }
        let _changing = self.changing_cluster.lock().await;
        let is_current = self.cluster().is_some_and(|current| Arc::ptr_eq(&current, cluster));
        if !is_current || !is_removed() {
            return !is_current;
        }
        tracing::warn!("this host was removed from the cluster: its parts of environments are stopped");
        match self.leave(cluster, true).await {
            Ok(machines) => {
                tracing::warn!(machines, "this host has left the cluster");
                true
            }
            Err(error) => {
                let error = error.message;
                tracing::error!(error, "this host cannot leave the cluster yet");
                false
            }
        }
    }

    /// See the module. Returns how many machines were stopped.
    async fn leave(self: &Arc<Self>, cluster: &Arc<Cluster>, removed: bool) -> Result<u32, ApiError> {
        let agent = Arc::clone(self);
        let ended = tokio::task::spawn_blocking(move || agent.end_all_parts());
        let machines = ended.await.map_err(internal)??;
        let keeps_authority = cluster.admission.is_some() && {
            let view = cluster.directory.view();
            let mut others = view.members.iter().filter(|member| member.id != cluster.id).peekable();
            others.peek().is_some() && !others.any(|member| member.issuer)
        };

        let folder = self.cluster_folder();
        let left = Left { name: cluster.name.clone(), at: jiff::Timestamp::now(), removed };
        let file = folder.join(LEFT_FILE);
        let text = serde_json::to_vec_pretty(&left).map_err(internal)?;
        private_file::write(&file, &text).map_err(|error| io_error(&error.path, &error.source))?;
        remove_file(&folder.join(CONFIG_FILE))?;

        let farewell = async {
            cluster.directory.forget_removed(cluster.id).await?;
            cluster.directory.leave().await
        };
        match tokio::time::timeout(FAREWELL_LIMIT, farewell).await {
            Ok(Ok(())) => {}
            // The lease ends by itself.
            Ok(Err(error)) => tracing::warn!(%error, "the cluster's directory was not told"),
            Err(_) => tracing::warn!("the cluster's directory does not answer"),
        }
        // Whatever became of that: its view is not written down once more, behind what is removed below.
        cluster.directory.end().await;
        let tasks = std::mem::take(&mut *cluster.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            task.abort();
            // Its sockets are closed when it has ended, and the address may be wanted again at once.
            let _ = task.await;
        }
        self.plane.call(|plane| plane.close_wire());
        // Whoever hears that this host is in no cluster finds nothing of it, either.
        let forgotten = forget_credentials(&folder, keeps_authority);
        *self.cluster.write().unwrap_or_else(PoisonError::into_inner) = None;
        forgotten.map(|()| machines)
    }

    /// Stops what this host has of the cluster's environments. What it has of its own stays.
    fn end_all_parts(&self) -> Result<u32, ApiError> {
        let operation = Operation::unattended();
        let mut machines = 0;
        for slot in self.slots.all() {
            if slot.state().record.as_ref().is_none_or(|record| record.span.is_none()) {
                continue;
            }
            match self.down_here(slot.name.as_str(), DownRequest { volumes: true }, &operation) {
                Ok(report) => machines += report.machines_stopped,
                Err(error) if error.kind == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(machines)
    }

    /// Before another cluster is entered: what leaving did not get to.
    pub(super) fn forget_left_cluster(&self) -> Result<(), ApiError> {
        let folder = self.cluster_folder();
        let left = folder.join(LEFT_FILE);
        if left.exists() {
            forget_credentials(&folder, false)?;
            remove_file(&left)?;
        }
        Ok(())
    }
}

/// An authority without which nobody could be let in any more is put aside and not deleted.
fn forget_credentials(folder: &Path, keeps_authority: bool) -> Result<(), ApiError> {
    let authority = folder.join(AUTHORITY_FILE);
    if keeps_authority {
        let aside = folder.join(format!("left-{AUTHORITY_FILE}"));
        std::fs::rename(&authority, &aside).map_err(|error| io_error(&aside, &error))?;
        tracing::warn!(file = %aside.display(), "the cluster has no other host with its authority: it is kept here");
    } else {
        remove_file(&authority)?;
    }
    Credentials::forget(folder).map_err(internal)?;
    remove_file(&folder.join("view.json"))
}

fn remove_file(file: &Path) -> Result<(), ApiError> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error(file, &error)),
        _ => Ok(()),
    }
}
