//! Requests about one machine, or about an environment that this host has no part of: passed on, as they are, to a host that
//! has it.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use diorama_api::{ApiError, ErrorKind};
use diorama_cluster::HostId;
use diorama_cluster::channel::Lane;

use super::parts::peer_error;
use crate::Agent;
use crate::cluster::Cluster;

impl Agent {
    /// The host that a request is for, when it is another. `path` is the request's.
    fn other_host(&self, method: &Method, path: &str) -> Result<Option<HostId>, ApiError> {
        let Some(cluster) = self.cluster() else { return Ok(None) };
        let Some(parts) = path.strip_prefix("/v1/environments/") else { return Ok(None) };
        let mut parts = parts.split('/');
        let (Some(environment), what, which) = (parts.next().and_then(unquote), parts.next(), parts.next())
        else {
            return Ok(None);
        };
        let Some(record) = self.environment_record(&environment) else {
            // A restore may make a new one.
            let known = self.slots.get(&environment).is_ok() || what == Some("restore");
            return if known { Ok(None) } else { Err(self.no_environment(&cluster, &environment)) };
        };
        let host = match (what, which) {
            (Some("machines"), Some(machine)) => {
                let placement = &record.value.placement;
                let machine = unquote(machine).unwrap_or_default();
                *placement.get(machine.as_str()).ok_or_else(|| {
                    let names: Vec<&str> = placement.keys().map(|name| name.as_str()).collect();
                    let message = format!("environment `{environment}` has no machine `{machine}`");
                    ApiError::new(ErrorKind::NotFound, message).hint(format!("it has: {}", names.join(", ")))
                })?
            }
            // The initiator's host must have a part.
            (Some("snapshots"), None) if *method == Method::POST => {
                let hosts = record.value.hosts();
                let view = cluster.directory.view();
                match hosts.iter().find(|host| view.is_alive(**host)) {
                    Some(host) if !hosts.contains(&cluster.id) => *host,
                    _ => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        Ok((host != cluster.id).then_some(host))
    }

    fn no_environment(&self, cluster: &Cluster, name: &str) -> ApiError {
        let view = cluster.directory.view();
        let mut names: Vec<String> = view.environments.keys().map(ToString::to_string).collect();
        names.extend(self.slots.all().iter().map(|slot| slot.name.to_string()));
        names.sort_unstable();
        names.dedup();
        ApiError::new(ErrorKind::NotFound, format!("there is no environment `{name}`")).hint(
            match names.is_empty() {
                true => "there is none; `diorama up` starts one from a file".to_owned(),
                false => format!("there are: {}", names.join(", ")),
            },
        )
    }
}

/// Passes a request on, or lets this agent answer it.
pub(crate) async fn forward(State(agent): State<Arc<Agent>>, mut request: Request, next: Next) -> Response {
    let host = match agent.other_host(request.method(), request.uri().path()) {
        Ok(host) => host,
        Err(error) => return crate::http::failure(&error),
    };
    let (Some(host), Some(cluster)) = (host, agent.cluster()) else { return next.run(request).await };
    let peers = cluster.peers.clone();
    if !request.headers().contains_key(header::UPGRADE) {
        return match peers.send(host, Lane::Bulk, request).await {
            Ok(response) => response.map(Body::new).into_response(),
            Err(error) => crate::http::failure(&peer_error(&error)),
        };
    }
    let mut passed = Request::builder().method(request.method()).uri(request.uri());
    for (name, value) in request.headers() {
        if *name != header::HOST {
            passed = passed.header(name, value);
        }
    }
    let passed = passed.body(Body::empty()).expect("parts of a request make a request");
    match peers.send_upgradable(host, passed).await {
        Ok((_, Some(mut theirs))) => {
            let ours = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                // Either side closing is how it ends.
                if let Ok(ours) = ours.await {
                    let mut ours = hyper_util::rt::TokioIo::new(ours);
                    let _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs).await;
                }
            });
            let mut response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
            for name in [header::CONNECTION, header::UPGRADE] {
                if let Some(value) = request.headers().get(&name) {
                    response = response.header(name, value);
                }
            }
            response.body(Body::empty()).expect("headers of a request make a response")
        }
        Ok((response, None)) => response.map(Body::new).into_response(),
        Err(error) => crate::http::failure(&peer_error(&error)),
    }
}

/// One part of a path, without percent-encoding. None when it is no text.
fn unquote(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}
