//! Connections to other hosts: made when they are needed, kept, and made again when they broke.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::messages::{MESSAGE_BYTES_MAX, PATH, Refusal};
use super::socket::{Guarded, bind_to_membership, prepare};
use super::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, HANDSHAKE_LIMIT, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_LIMIT,
    STREAM_WINDOW_BYTES,
};
use crate::identity::HostId;
use crate::identity::tls::{Tls, host_dns_name};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// After a connection that failed, the next is tried after so long; doubled from the first to the last. Requests between
/// fail at once with the same reason.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Which connection to a host a request goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// What is short and must not wait.
    Control,
    /// What is long.
    Bulk,
}

/// Why another host did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It is not in the cluster.
    #[error("host {host} is not a member of the cluster")]
    NotMember {
        /// Which.
        host: HostId,
    },
    /// No connection could be made. The request was not sent.
    #[error("host `{name}` cannot be reached: {problem}")]
    Unreachable {
        /// Its name.
        name: String,
        /// What happened at which address.
        problem: String,
    },
    /// The connection broke. The request may have been carried out.
    #[error("the connection to host `{name}` broke: {problem}")]
    Lost {
        /// Its name.
        name: String,
        /// What happened.
        problem: String,
    },
    /// There was no answer in time. The request may have been carried out.
    #[error("host `{name}` did not answer within {limit:?}")]
    TimedOut {
        /// Its name.
        name: String,
        /// The caller's limit.
        limit: Duration,
    },
    /// It answered that it does not.
    #[error("host `{name}` refuses: {refusal}")]
    Refused {
        /// Its name.
        name: String,
        /// Why.
        refusal: Refusal,
    },
    /// Its answer is none to a message.
    #[error("the answer of host `{name}` (status {status}) is not understood")]
    NotUnderstood {
        /// Its name.
        name: String,
        /// The HTTP status.
        status: u16,
    },
    /// The message is too long.
    #[error("a message of {bytes} bytes; at most {MESSAGE_BYTES_MAX} are sent")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
}

/// The other hosts. Cheap to clone; all clones share the connections.
#[derive(Debug, Clone)]
pub struct Peers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tls: Tls,
    links: Mutex<HashMap<(HostId, Lane), Arc<Link>>>,
}

#[derive(Debug, Default)]
struct Link(tokio::sync::Mutex<LinkState>);

#[derive(Debug, Default)]
struct LinkState {
    sender: Option<http2::SendRequest<Body>>,
    failure: Option<Failure>,
}

#[derive(Debug, Clone)]
struct Failure {
    error: PeerError,
    again_at: Instant,
    pause: Duration,
}

/// A connection that was taken over by its request: raw bytes both ways.
pub type UpgradedPeer = TokioIo<hyper::upgrade::Upgraded>;

impl Peers {
    /// Among the members that TLS knows.
    pub fn new(tls: Tls) -> Self {
        Self(Arc::new(Inner { tls, links: Mutex::default() }))
    }

    /// Sends a message and waits for its answer, for no longer than the limit.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub async fn call(
        &self,
        host: HostId,
        kind: &str,
        body: impl Into<Bytes>,
        limit: Duration,
    ) -> Result<Bytes, PeerError> {
        let body = body.into();
        if body.len() > MESSAGE_BYTES_MAX {
            return Err(PeerError::TooLong { bytes: body.len() });
        }
        debug_assert!(kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{kind}");
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{PATH}{kind}"))
            .body(Body::from(body))
            .expect("a message's kind makes a path");
        let name = self.name(host);
        let called = async {
            let response = self.send(host, Lane::Control, request).await?;
            let status = response.status();
            let answer = Limited::new(response.into_body(), MESSAGE_BYTES_MAX).collect().await;
            let answer = answer
                .map_err(|error| PeerError::Lost { name: name.clone(), problem: with_causes(&*error) })?
                .to_bytes();
            match status {
                StatusCode::OK => Ok(answer),
                StatusCode::UNPROCESSABLE_ENTITY => Err(match serde_json::from_slice(&answer) {
                    Ok(refusal) => PeerError::Refused { name: name.clone(), refusal },
                    Err(_) => PeerError::NotUnderstood { name: name.clone(), status: status.as_u16() },
                }),
                _ => Err(PeerError::NotUnderstood { name: name.clone(), status: status.as_u16() }),
            }
        };
        match tokio::time::timeout(limit, called).await {
            Ok(result) => result,
            Err(_) => Err(PeerError::TimedOut { name, limit }),
        }
    }

    /// Sends any request; its URI needs a path and a query only. The answer is there when its head is; the bodies go on for
    /// as long as they like, each as fast as its reader reads. Dropping the future, or the answer, cancels the request.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub async fn send(
        &self,
        host: HostId,
        lane: Lane,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, PeerError> {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let uri: Result<Uri, _> = format!("https://{}{path}", host_dns_name(host)).parse();
        *request.uri_mut() = uri.expect("a path of a URI is one of another");
        let link = {
            let mut links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(links.entry((host, lane)).or_default())
        };
        let mut attempt = 0;
        loop {
            let mut sender = self.sender(&link, host).await?;
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(mut error) => match error.take_message() {
                    // Nothing of it went out: the connection had ended before.
                    Some(unsent) if attempt == 0 => {
                        attempt += 1;
                        request = unsent;
                    }
                    _ => {
                        let problem = with_causes(&error.into_error());
                        return Err(PeerError::Lost { name: self.name(host), problem });
                    }
                },
            }
        }
    }

    /// Sends a request that wants to take the connection over, by a connection of its own. `None` for the stream when the
    /// host does not switch protocols.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub async fn send_upgradable(
        &self,
        host: HostId,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Option<UpgradedPeer>), PeerError> {
        let lost =
            |error: hyper::Error| PeerError::Lost { name: self.name(host), problem: with_causes(&error) };
        request.headers_mut().entry(hyper::header::HOST).or_insert_with(|| {
            host_dns_name(host).parse().expect("digits and constants make a header's value")
        });
        let stream = self.connect(host, self.0.tls.client_http1()).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to another host ended");
            }
        });
        let mut response = sender.send_request(request).await.map_err(lost)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Ok((response, None));
        }
        let upgraded = hyper::upgrade::on(&mut response).await.map_err(lost)?;
        Ok((response, Some(TokioIo::new(upgraded))))
    }

    /// Connects to a host ahead of need, so that the first request does not wait for it.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub async fn warm(&self, host: HostId, lane: Lane) -> Result<(), PeerError> {
        let link = {
            let mut links = self.0.links.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(links.entry((host, lane)).or_default())
        };
        self.sender(&link, host).await.map(drop)
    }

    fn name(&self, host: HostId) -> String {
        let members = self.0.tls.members().borrow();
        members.get(host).map_or_else(|| host.to_string(), |member| member.name.to_string())
    }

    /// A sender on a connection that is open as far as is known.
    async fn sender(&self, link: &Link, host: HostId) -> Result<http2::SendRequest<Body>, PeerError> {
        let mut state = link.0.lock().await;
        if let Some(sender) = state.sender.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        state.sender = None;
        if let Some(failure) = state.failure.as_ref().filter(|failure| Instant::now() < failure.again_at) {
            return Err(failure.error.clone());
        }
        match self.connect_http2(host).await {
            Ok(sender) => {
                state.failure = None;
                state.sender = Some(sender.clone());
                Ok(sender)
            }
            Err(error) => {
                let pause =
                    state.failure.as_ref().map_or(FIRST_PAUSE, |last| (last.pause * 2).min(LAST_PAUSE));
                let again_at = Instant::now() + pause;
                state.failure = Some(Failure { error: error.clone(), again_at, pause });
                Err(error)
            }
        }
    }

    async fn connect_http2(&self, host: HostId) -> Result<http2::SendRequest<Body>, PeerError> {
        let stream = self.connect(host, self.0.tls.client()).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_LIMIT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| PeerError::Lost { name: self.name(host), problem: with_causes(&error) })?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to another host ended");
            }
        });
        Ok(sender)
    }

    async fn connect(
        &self,
        host: HostId,
        config: Arc<rustls::ClientConfig>,
    ) -> Result<Guarded<TlsStream<TcpStream>>, PeerError> {
        let member = self.0.tls.members().borrow().get(host).cloned();
        let member = member.ok_or(PeerError::NotMember { host })?;
        let mut problems = Vec::new();
        for address in &member.addresses {
            match self.connect_to(*address, host, Arc::clone(&config)).await {
                Ok(stream) => return Ok(stream),
                Err(error) => problems.push(format!("{address}: {error}")),
            }
        }
        Err(PeerError::Unreachable { name: member.name.to_string(), problem: problems.join("; ") })
    }

    async fn connect_to(
        &self,
        address: SocketAddr,
        host: HostId,
        config: Arc<rustls::ClientConfig>,
    ) -> std::io::Result<Guarded<TlsStream<TcpStream>>> {
        let stream = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(address)).await??;
        prepare(&stream)?;
        let bound = bind_to_membership(&stream, host, self.0.tls.members().clone())?;
        let tls = TlsConnector::from(config).connect(Tls::server_name(host), stream);
        Ok(Guarded::new(tokio::time::timeout(HANDSHAKE_LIMIT, tls).await??, bound))
    }
}

/// An error with what caused it: hyper's own texts say little.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
