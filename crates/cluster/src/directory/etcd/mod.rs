//! The directory in etcd: its gRPC API, one connection at a time.
//!
//! Owns the connection and nothing else. When a request fails for want of an answer, [`Etcd::disconnect`] drops it, and the
//! next request connects to the next endpoint. Every request has a deadline. Keys are given without the cluster's prefix.

mod messages;

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hyper::http::uri::PathAndQuery;
use messages::{
    AuthenticateRequest, AuthenticateResponse, Compare, CompareWith, DeleteRangeRequest, KeyValue,
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseRequest, LeaseRevokeResponse,
    PutRequest, RangeRequest, RangeResponse, Request as Operation, RequestOp, TxnRequest, TxnResponse,
    WatchCreateRequest, WatchRequest, WatchResponse,
};
use serde::{Deserialize, Serialize};
use tokio_stream::{Stream, StreamExt};
use tonic::client::Grpc;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::backend::{BackendError, Change, Committed, Entry, Guard, Revision, Seen};

/// How long a request may take. Shorter than a lease, so that a request for a lease is over before it.
const REQUEST_LIMIT: Duration = Duration::from_secs(3);
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// etcd closes connections that ask more often than every five seconds.
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_LIMIT: Duration = Duration::from_secs(3);
/// The largest answer that is taken, in bytes: a page of the largest records.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How many entries are asked for at a time.
const PAGE_ENTRIES: i64 = 200;
/// The most entries that are read in all: a bound on what another program may have put there.
const ENTRIES_MAX: usize = 200_000;

/// Where etcd is, and how to be let in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtcdConfig {
    /// Addresses such as `http://10.0.0.1:2379` or `https://etcd.example:2379`; at least one.
    pub endpoints: Vec<String>,
    /// User and password, where etcd asks for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<(String, String)>,
    /// The certificate of the authority that etcd's own is by, PEM. For `https`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority_pem: Option<String>,
    /// Certificate and key to show to etcd, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_pem: Option<(String, String)>,
}

impl EtcdConfig {
    /// etcd without TLS or users at these addresses.
    pub fn at<I: IntoIterator<Item = T>, T: Into<String>>(endpoints: I) -> Self {
        let endpoints = endpoints.into_iter().map(Into::into).collect();
        Self { endpoints, user: None, authority_pem: None, identity_pem: None }
    }
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdConfig").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

pub(crate) struct Etcd {
    endpoints: Vec<Endpoint>,
    user: Option<(String, String)>,
    prefix: String,
    connection: Mutex<State>,
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    current: Option<Connection>,
    next_endpoint: usize,
}

#[derive(Clone)]
struct Connection {
    channel: Channel,
    token: Option<AsciiMetadataValue>,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Etcd {
    /// Does not connect. `prefix` stands before every key, and ends with `/`.
    pub fn new(config: &EtcdConfig, prefix: String) -> Result<Self, String> {
        debug_assert!(prefix.ends_with('/'));
        if config.endpoints.is_empty() {
            return Err("no address of etcd is given".to_owned());
        }
        let endpoints = config.endpoints.iter().map(|address| {
            let wrong =
                |error: tonic::transport::Error| format!("`{address}` is no address of etcd: {error}");
            let endpoint = Endpoint::from_shared(address.clone()).map_err(wrong)?;
            let endpoint = endpoint
                .connect_timeout(CONNECT_LIMIT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_LIMIT)
                .keep_alive_while_idle(true);
            if endpoint.uri().scheme_str() != Some("https") {
                return Ok(endpoint);
            }
            let mut tls = ClientTlsConfig::new();
            if let Some(pem) = &config.authority_pem {
                tls = tls.ca_certificate(Certificate::from_pem(pem));
            }
            if let Some((certificate, key)) = &config.identity_pem {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            endpoint.tls_config(tls).map_err(wrong)
        });
        Ok(Self {
            endpoints: endpoints.collect::<Result<_, _>>()?,
            user: config.user.clone(),
            prefix,
            connection: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
        })
    }

    pub fn disconnect(&self) {
        let mut state = self.state();
        if state.current.take().is_some() {
            state.next_endpoint = (state.next_endpoint + 1) % self.endpoints.len();
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self) -> Result<Connection, BackendError> {
        let _one = self.connecting.lock().await;
        if let Some(connection) = self.state().current.clone() {
            return Ok(connection);
        }
        let mut problem = String::new();
        for _ in 0..self.endpoints.len() {
            let index = self.state().next_endpoint;
            match self.connect(&self.endpoints[index]).await {
                Ok(connection) => {
                    self.state().current = Some(connection.clone());
                    return Ok(connection);
                }
                Err(error) => {
                    problem = format!("etcd at {}: {error}", self.endpoints[index].uri());
                    self.state().next_endpoint = (index + 1) % self.endpoints.len();
                }
            }
        }
        Err(BackendError::Unavailable { problem, perhaps_done: false })
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Connection, String> {
        let connected = async {
            let channel = endpoint.connect().await.map_err(|error| with_causes(&error))?;
            let mut connection = Connection { channel, token: None };
            if let Some((name, password)) = self.user.clone() {
                let request = AuthenticateRequest { name, password };
                let path = PathAndQuery::from_static("/etcdserverpb.Auth/Authenticate");
                let answer: AuthenticateResponse =
                    connection.unary(request, path).await.map_err(|status| status.message().to_owned())?;
                connection.token =
                    Some(answer.token.parse().map_err(|_| "etcd gave a token that is none".to_owned())?);
            }
            Ok(connection)
        };
        let limit = CONNECT_LIMIT + REQUEST_LIMIT;
        tokio::time::timeout(limit, connected)
            .await
            .unwrap_or_else(|_| Err(format!("no answer in {limit:?}")))
    }

    async fn ask<Q, A>(&self, path: &'static str, question: Q) -> Result<A, BackendError>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + Default + 'static,
    {
        let connection = self.connection().await?;
        let path = PathAndQuery::from_static(path);
        match tokio::time::timeout(REQUEST_LIMIT, connection.unary(question, path)).await {
            Ok(answer) => answer.map_err(|status| self.failed(&status)),
            Err(_) => Err(self.silent()),
        }
    }

    fn silent(&self) -> BackendError {
        let problem = format!("etcd at {} did not answer within {REQUEST_LIMIT:?}", self.address());
        self.disconnect();
        BackendError::Unavailable { problem, perhaps_done: true }
    }

    fn failed(&self, status: &Status) -> BackendError {
        let message = status.message();
        // Such as that the connection broke, because etcd wants a certificate.
        let causes = std::error::Error::source(status).map(|cause| format!(": {}", with_causes(cause)));
        let problem = format!("etcd at {}: {message}{}", self.address(), causes.unwrap_or_default());
        match status.code() {
            // A token ends with time, and when etcd starts again: with a new connection comes a new one.
            Code::Unauthenticated => {
                self.disconnect();
                BackendError::Unavailable { problem, perhaps_done: false }
            }
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::ResourceExhausted
            | Code::Unimplemented => BackendError::Refused(format!("etcd refuses: {message}")),
            _ => {
                self.disconnect();
                BackendError::Unavailable { problem, perhaps_done: true }
            }
        }
    }

    /// Of the present connection.
    fn address(&self) -> String {
        self.endpoints[self.state().next_endpoint].uri().to_string()
    }

    fn key(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.prefix).into_bytes()
    }

    /// The first key after all of the prefix: its last byte, `/`, one higher.
    fn range_end(&self) -> Vec<u8> {
        let mut end = self.prefix.clone().into_bytes();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        end
    }

    /// `None` for what is not text: nothing of ours.
    fn entry(&self, kv: KeyValue) -> Option<Entry> {
        Some(Entry {
            key: std::str::from_utf8(&kv.key).ok()?.strip_prefix(&self.prefix)?.to_owned(),
            value: String::from_utf8(kv.value).ok()?,
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            lease: kv.lease,
        })
    }

    pub async fn read_all(&self) -> Result<(Revision, Vec<Entry>), BackendError> {
        let mut entries = Vec::new();
        let mut key = self.prefix.clone().into_bytes();
        let mut revision = 0;
        loop {
            let question = RangeRequest { key, range_end: self.range_end(), limit: PAGE_ENTRIES, revision };
            let page: RangeResponse = self.ask("/etcdserverpb.KV/Range", question).await?;
            if revision == 0 {
                revision = page.header.map_or(0, |header| header.revision);
            }
            // The next page begins after the last key of this one.
            let last = page.kvs.last().map(|kv| [&kv.key[..], &[0]].concat());
            entries.extend(page.kvs.into_iter().filter_map(|kv| self.entry(kv)));
            match last {
                Some(next) if page.more && entries.len() < ENTRIES_MAX => key = next,
                _ if page.more => {
                    return Err(BackendError::Refused(format!(
                        "the directory has more than {ENTRIES_MAX} entries"
                    )));
                }
                _ => return Ok((revision, entries)),
            }
        }
    }

    pub async fn commit(&self, guards: &[Guard], changes: &[Change]) -> Result<Committed, BackendError> {
        let compare = guards.iter().map(|guard| {
            let (target, with) = match guard {
                Guard::Absent(_) => (1, CompareWith::CreateRevision(0)),
                Guard::CreatedAt(_, revision) => (1, CompareWith::CreateRevision(*revision)),
                Guard::Unchanged(_, revision) => (2, CompareWith::ModRevision(*revision)),
                Guard::Value(_, value) => (3, CompareWith::Value(value.clone().into_bytes())),
            };
            Compare { result: 0, target, key: self.key(guard.key()), with: Some(with) }
        });
        let success = changes.iter().map(|change| {
            let request = match change {
                Change::Put { key, value, lease } => Operation::Put(PutRequest {
                    key: self.key(key),
                    value: value.clone().into_bytes(),
                    lease: *lease,
                }),
                Change::Delete { key } => Operation::Delete(DeleteRangeRequest { key: self.key(key) }),
            };
            RequestOp { request: Some(request) }
        });
        let question = TxnRequest { compare: compare.collect(), success: success.collect() };
        let answer: TxnResponse = self.ask("/etcdserverpb.KV/Txn", question).await?;
        let revision = answer.header.map_or(0, |header| header.revision);
        Ok(Committed { revision, succeeded: answer.succeeded })
    }

    pub async fn grant(&self, ttl_seconds: i64) -> Result<(i64, i64), BackendError> {
        let question = LeaseGrantRequest { ttl: ttl_seconds };
        let answer: LeaseGrantResponse = self.ask("/etcdserverpb.Lease/LeaseGrant", question).await?;
        if !answer.error.is_empty() || answer.id == 0 || answer.ttl <= 0 {
            return Err(BackendError::Refused(format!("etcd gives no lease: {}", answer.error)));
        }
        Ok((answer.id, answer.ttl))
    }

    pub async fn keep_alive(&self, lease: i64) -> Result<Option<i64>, BackendError> {
        let connection = self.connection().await?;
        let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
        let asked = async {
            let question = tokio_stream::once(LeaseRequest { id: lease });
            let mut answers = connection.stream::<_, _, LeaseKeepAliveResponse>(question, path).await?;
            answers.message().await
        };
        match tokio::time::timeout(REQUEST_LIMIT, asked).await {
            Ok(Ok(Some(answer))) => Ok((answer.ttl > 0).then_some(answer.ttl)),
            Ok(Ok(None)) => Err(self.failed(&Status::unavailable("no answer about a lease"))),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_) => Err(self.silent()),
        }
    }

    pub async fn revoke(&self, lease: i64) -> Result<(), BackendError> {
        let question = LeaseRequest { id: lease };
        let _: LeaseRevokeResponse = self.ask("/etcdserverpb.Lease/LeaseRevoke", question).await?;
        Ok(())
    }

    pub async fn watch(&self, from: Revision) -> Result<EtcdWatch, BackendError> {
        let connection = self.connection().await?;
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let create = WatchCreateRequest {
            key: self.prefix.clone().into_bytes(),
            range_end: self.range_end(),
            start_revision: from,
        };
        // The watch lasts as long as the stream of questions does.
        let questions =
            tokio_stream::once(WatchRequest { create: Some(create) }).chain(tokio_stream::pending());
        match tokio::time::timeout(REQUEST_LIMIT, connection.stream(questions, path)).await {
            Ok(Ok(answers)) => Ok(EtcdWatch { prefix: self.prefix.clone(), answers }),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_) => Err(self.silent()),
        }
    }
}

impl Connection {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }

    async fn client(&self) -> Result<Grpc<Channel>, Status> {
        let mut client = Grpc::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        client.ready().await.map_err(|error| Status::unavailable(with_causes(&error)))?;
        Ok(client)
    }

    async fn unary<Q, A>(&self, question: Q, path: PathAndQuery) -> Result<A, Status>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + Default + 'static,
    {
        let request = self.request(question);
        let answer = self.client().await?.unary(request, path, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }

    async fn stream<S, Q, A>(&self, questions: S, path: PathAndQuery) -> Result<Streaming<A>, Status>
    where
        S: Stream<Item = Q> + Send + 'static,
        Q: prost::Message + Default + 'static,
        A: prost::Message + Default + 'static,
    {
        let request = self.request(questions);
        let answers = self.client().await?.streaming(request, path, ProstCodec::<Q, A>::default()).await?;
        Ok(answers.into_inner())
    }
}

pub(crate) struct EtcdWatch {
    prefix: String,
    answers: Streaming<WatchResponse>,
}

impl EtcdWatch {
    pub async fn next(&mut self) -> Result<Seen, BackendError> {
        let answer = match self.answers.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(BackendError::WatchEnded("etcd ended the watch".to_owned())),
            Err(status) => {
                let problem = format!("the watch of etcd broke: {}", status.message());
                return Err(BackendError::Unavailable { problem, perhaps_done: false });
            }
        };
        if answer.canceled || answer.compact_revision != 0 {
            let reason = answer.cancel_reason;
            return Err(BackendError::WatchEnded(format!("etcd ended the watch: {reason}")));
        }
        // The header's is what etcd has reached: later than these changes when it has yet to send others, as when a watch
        // begins in the past.
        let changed = answer.events.iter().filter_map(|event| Some(event.kv.as_ref()?.mod_revision));
        let revision = changed.max().unwrap_or(0);
        let changes = answer.events.into_iter().filter_map(|event| {
            let kv = event.kv?;
            let key = std::str::from_utf8(&kv.key).ok()?.strip_prefix(&self.prefix)?.to_owned();
            if event.kind != 0 {
                return Some((key, None));
            }
            let value = String::from_utf8(kv.value).ok()?;
            let (create_revision, mod_revision) = (kv.create_revision, kv.mod_revision);
            let entry = Entry { key: key.clone(), value, create_revision, mod_revision, lease: kv.lease };
            Some((key, Some(entry)))
        });
        Ok(Seen { revision, changes: changes.collect() })
    }
}

/// An error with what caused it: tonic's own texts say no more than "transport error".
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
