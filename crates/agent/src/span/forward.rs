//! Requests about one machine, or about an environment that this host has no part of: passed on, as they are, to a host that
//! has it.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use diorama_cluster::HostId;
use diorama_cluster::channel::Lane;

use super::parts::peer_error;
use crate::Agent;

impl Agent {
    /// The host that a request is for, when it is another. `path` is the request's.
    fn other_host(&self, method: &Method, path: &str) -> Option<HostId> {
        let cluster = self.cluster()?;
        let mut parts = path.strip_prefix("/v1/environments/")?.split('/');
        let environment = unquote(parts.next()?)?;
        let record = self.environment_record(&environment)?;
        let host = match (parts.next()?, parts.next()) {
            ("machines", Some(machine)) => *record.value.placement.get(unquote(machine)?.as_str())?,
            // The initiator's host must have a part.
            ("snapshots", None) if *method == Method::POST => {
                let hosts = record.value.hosts();
                if hosts.contains(&cluster.id) {
                    return None;
                }
                let view = cluster.directory.view();
                hosts.into_iter().find(|host| view.is_alive(*host))?
            }
            _ => return None,
        };
        (host != cluster.id).then_some(host)
    }
}

/// Passes a request on, or lets this agent answer it.
pub(crate) async fn forward(State(agent): State<Arc<Agent>>, mut request: Request, next: Next) -> Response {
    let host = agent.other_host(request.method(), request.uri().path());
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
