//! Pausing and resuming an environment's machines on all of its hosts.
//!
//! Each host pauses its own machines together; the hosts do so one after another's clock, not at one instant. What one host
//! cannot do does not undo what others have done: doing it again is safe.

use std::collections::BTreeMap;

use diorama_api::{ApiError, EnvironmentStatus, ErrorKind, MachinesRequest};
use diorama_cluster::HostId;
use diorama_cluster::directory::EnvironmentRecord;

use super::coordinate::{ask_parts, release};
use super::parts::PartRestRequest;
use crate::Agent;
use crate::cluster::directory_error;
use crate::operation::Operation;

impl Agent {
    /// Pauses machines of an environment wherever they are, or lets them run.
    pub(crate) fn rest_in_cluster(
        &self,
        record: &EnvironmentRecord,
        request: &MachinesRequest,
        paused: bool,
        operation: &Operation,
    ) -> Result<EnvironmentStatus, ApiError> {
        let cluster = self.cluster_or_error()?;
        let name = record.name();
        let chosen = by_host(record, &request.machines)?;
        let (purpose, done) = if paused { ("pause", "paused") } else { ("resume", "resumed") };
        let lock = cluster.wait(cluster.directory.lock(name, purpose)).map_err(directory_error)?;
        operation.step(if paused { "pausing machines" } else { "resuming machines" });
        let requests = chosen.into_iter().map(|(host, machines)| {
            let machines = MachinesRequest { machines };
            (host, PartRestRequest { machines, paused, token: lock.token() })
        });
        let path = format!("/v1/peer/environments/{name}/rest");
        let results: Vec<(HostId, Result<EnvironmentStatus, ApiError>)> =
            ask_parts(&cluster, &path, requests);
        release(&cluster, lock);
        let results = results.into_iter().map(|(host, result)| (cluster.name_of(host), result.map(drop)));
        failures(results.collect(), done)?;
        self.status_in_cluster(record)
    }
}

/// The machines that each host is asked for; none of its own means all that it has.
fn by_host(
    record: &EnvironmentRecord,
    machines: &[String],
) -> Result<BTreeMap<HostId, Vec<String>>, ApiError> {
    if machines.is_empty() {
        return Ok(record.hosts().into_iter().map(|host| (host, Vec::new())).collect());
    }
    let mut chosen: BTreeMap<HostId, Vec<String>> = BTreeMap::new();
    for machine in machines {
        let Some(host) = record.placement.get(machine.as_str()) else {
            let names: Vec<&str> = record.placement.keys().map(|name| name.as_str()).collect();
            return Err(ApiError::new(ErrorKind::NotFound, format!("there is no machine `{machine}`"))
                .hint(format!("there are: {}", names.join(", "))));
        };
        chosen.entry(*host).or_default().push(machine.clone());
    }
    Ok(chosen)
}

/// One error of all hosts' that says where it was done and where not.
fn failures(results: Vec<(String, Result<(), ApiError>)>, done: &str) -> Result<(), ApiError> {
    let (good, bad): (Vec<_>, Vec<_>) = results.into_iter().partition(|(_, result)| result.is_ok());
    let mut good: Vec<String> = good.into_iter().map(|(host, _)| host).collect();
    let mut bad: Vec<(String, ApiError)> =
        bad.into_iter().filter_map(|(host, result)| Some((host, result.err()?))).collect();
    good.sort();
    bad.sort_by(|(one, _), (other, _)| one.cmp(other));
    let Some((_, first)) = bad.first() else { return Ok(()) };
    let texts: Vec<String> =
        bad.iter().map(|(host, error)| format!("host {host}: {}", error.message)).collect();
    let mut message = texts.join("; ");
    if !good.is_empty() {
        message = format!("{message} (the machines on {} are {done})", good.join(", "));
    }
    let error = ApiError::new(first.kind, message);
    Err(match &first.hint {
        Some(hint) => error.hint(hint.clone()),
        None => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_failure_names_each_host() {
        let bad = |text: &str| Err(ApiError::new(ErrorKind::WrongState, text).hint("look"));
        let named = |host: &str, result| (host.to_owned(), result);
        assert!(failures(vec![named("h1", Ok(())), named("h2", Ok(()))], "paused").is_ok());
        let some = vec![named("h3", bad("dead")), named("h1", Ok(())), named("h2", bad("busy"))];
        let error = failures(some, "paused").unwrap_err();
        assert_eq!(error.message, "host h2: busy; host h3: dead (the machines on h1 are paused)");
        assert_eq!(error.hint.as_deref(), Some("look"));
        let error = failures(vec![named("h2", bad("busy"))], "resumed").unwrap_err();
        assert_eq!(error.message, "host h2: busy");
    }
}
