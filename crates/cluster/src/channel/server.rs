//! Taking connections from other hosts.
//!
//! ```text
//! accepted -> hello read --(asks to join)--> TLS without a certificate -> one request to join -> closed
//!                  '-----(anything else)--> TLS with a member's certificate -> HTTP/2, or HTTP/1.1 for one request
//! ```

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::{Service, service_fn};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::socket::{Guarded, bind_to_membership, prepare};
use super::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, HANDSHAKE_LIMIT, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_LIMIT, Peer,
    STREAM_WINDOW_BYTES,
};
use crate::admission::{Admission, JOIN_LIMIT, JOIN_PATH, JOIN_REQUEST_BYTES_MAX, JoinRefusal, JoinRequest};
use crate::identity::tls::{self, Tls};

/// Handshakes under way: a bound on what strangers can cost. A handshake is a few KiB and at most some seconds.
const HANDSHAKES_MAX: usize = 256;
/// Hosts that join at a time.
const JOINS_MAX: usize = 16;
/// Connections of members: two for each pair of hosts, and one for each console.
const CONNECTIONS_MAX: usize = 8192;
/// Requests of one connection that are answered at a time.
const STREAMS_MAX: u32 = 512;
/// Headers of one request, in bytes.
const HEADERS_BYTES_MAX: u32 = 32 << 10;
/// After an accept that failed (no descriptors left): others may end meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long requests under way may go on when the server ends.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Takes connections. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Server {
    tls: Tls,
    admission: Option<Arc<Admission>>,
    router: Router,
    handshakes: Arc<Semaphore>,
    joins: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    /// Members' requests go to the router, with their [`Peer`] as an extension. With an `admission`, hosts may join here.
    pub fn new(tls: Tls, admission: Option<Arc<Admission>>, router: Router) -> Self {
        Self {
            tls,
            admission,
            router,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            joins: Arc::new(Semaphore::new(JOINS_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// Takes connections until `end`; then lets requests that are under way come to their end, for a moment.
    pub async fn serve(self, listener: TcpListener, end: impl Future<Output = ()>) {
        let mut tasks = tokio::task::JoinSet::new();
        let (ending, ended) = tokio::sync::watch::channel(false);
        tokio::pin!(end);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = tasks.join_next() => continue,
                () = &mut end => break,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection from another host cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&self.handshakes).try_acquire_owned() else {
                tracing::warn!(%address, "too many handshakes are under way: a connection is refused");
                continue;
            };
            let (server, ended) = (self.clone(), ended.clone());
            tasks.spawn(async move {
                if let Err(error) = server.take(stream, permit, ended).await {
                    tracing::debug!(%address, %error, "a connection from another host failed");
                }
            });
        }
        drop(listener);
        ending.send_replace(true);
        let all = async { while tasks.join_next().await.is_some() {} };
        // What is left is dropped with the set, and its connections with it.
        let _ = tokio::time::timeout(END_LIMIT, all).await;
    }

    async fn take(
        self,
        stream: TcpStream,
        permit: OwnedSemaphorePermit,
        ended: tokio::sync::watch::Receiver<bool>,
    ) -> io::Result<()> {
        prepare(&stream)?;
        let handshake = async {
            let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
            let joins =
                hello.client_hello().alpn().is_some_and(|mut all| all.any(|name| name == tls::ALPN_JOIN));
            let config = if joins { self.tls.join_server() } else { self.tls.server() };
            Ok::<_, io::Error>((joins, hello.into_stream(config).await?))
        };
        let (joins, stream) = tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await??;
        drop(permit);
        if joins {
            let Ok(_permit) = self.joins.try_acquire() else { return Ok(()) };
            return tokio::time::timeout(JOIN_LIMIT, self.serve_join(stream)).await?;
        }
        let Ok(_permit) = Arc::clone(&self.connections).try_acquire_owned() else { return Ok(()) };
        self.serve_member(stream, ended).await
    }

    async fn serve_member(
        &self,
        stream: TlsStream<TcpStream>,
        mut ended: tokio::sync::watch::Receiver<bool>,
    ) -> io::Result<()> {
        let (socket, session) = stream.get_ref();
        let key = session.peer_certificates().and_then(|chain| chain.first()).and_then(tls::public_key);
        let key = key.ok_or_else(|| io::Error::other("the peer has no certificate"))?;
        let host = key.host_id();
        let http1 = session.alpn_protocol() == Some(tls::ALPN_HTTP1);
        let members = self.tls.members().clone();
        let bound = bind_to_membership(socket, host, members.clone())?;
        let router = self.router.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let member = members.borrow().get(host).cloned();
            let router = TowerToHyperService::new(router.clone());
            async move {
                let Some(member) = member else {
                    return Ok::<_, Infallible>(answer(StatusCode::FORBIDDEN, Bytes::new()).map(Body::new));
                };
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(Peer { host, name: member.name, key });
                router.call(request).await
            }
        });
        let stream = TokioIo::new(Guarded::new(stream, bound));
        if http1 {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HANDSHAKE_LIMIT)
                .keep_alive(false)
                .serve_connection(stream, service)
                .with_upgrades();
            return connection.await.map_err(io::Error::other);
        }
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_LIMIT)
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(HEADERS_BYTES_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .serve_connection(stream, service);
        tokio::pin!(connection);
        tokio::select! {
            served = connection.as_mut() => return served.map_err(io::Error::other),
            _ = ended.wait_for(|ended| *ended) => {}
        }
        connection.as_mut().graceful_shutdown();
        connection.await.map_err(io::Error::other)
    }

    async fn serve_join(&self, stream: TlsStream<TcpStream>) -> io::Result<()> {
        let admission = self.admission.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let admission = admission.clone();
            async move { Ok::<_, Infallible>(join(admission, request).await) }
        });
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HANDSHAKE_LIMIT)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .await
            .map_err(io::Error::other)
    }
}

async fn join(admission: Option<Arc<Admission>>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let refused = |refusal: JoinRefusal| {
        tracing::info!(%refusal, "a host was not admitted");
        let body = serde_json::to_vec(&refusal).expect("a refusal serialises");
        answer(StatusCode::FORBIDDEN, Bytes::from(body))
    };
    let invalid = |what: &str| refused(JoinRefusal::Invalid(what.to_owned()));
    let Some(admission) = admission else {
        return refused(JoinRefusal::NotNow("this host does not hold the authority's key".to_owned()));
    };
    if request.method() != Method::POST || request.uri().path() != JOIN_PATH {
        return invalid("it is none");
    }
    let Ok(body) = Limited::new(request.into_body(), JOIN_REQUEST_BYTES_MAX).collect().await else {
        return invalid("it is too long");
    };
    let Ok(request) = serde_json::from_slice::<JoinRequest>(&body.to_bytes()) else {
        return invalid("it cannot be read");
    };
    match admission.admit(&request).await {
        Ok(reply) => match serde_json::to_vec(&reply) {
            Ok(body) => answer(StatusCode::OK, Bytes::from(body)),
            Err(error) => refused(JoinRefusal::NotNow(error.to_string())),
        },
        Err(refusal) => refused(refusal),
    }
}

fn answer(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
}
