//! The client: speaks the agent's HTTP API over its unix socket.
//!
//! Owns nothing but the socket's path. Every request has a connection of its own, which lives exactly as long
//! as the future or stream that asked: **dropping it closes the connection, and that cancels the operation**
//! in the agent. There is no other way to cancel, and nothing to clean up.
//!
//! The agent is trusted but may be of another version or die half-way, so every answer is bounded
//! ([`ANSWER_BYTES_MAX`], and the same for one line of an event stream), and a stream that ends without its
//! last event is an error of its own, never a success.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::{
    AgentInfo, ApiError, ArrivalReport, CreateSnapshotRequest, DiffReport, DownReport, DownRequest,
    DrainHostRequest, Empty, EnvironmentStatus, ErrorBody, ErrorKind, Event, ExecReport, ExecRequest,
    ExportReport, ExportRequest, ExtractReport, ExtractRequest, Folders, ForkReport, ForkRequest, HostInfo,
    ImportRequest, InitHostRequest, JoinHostRequest, LeaveHostReport, LeaveHostRequest, MachinesRequest,
    Progress, PruneReport, PruneRequest, RemoveHostRequest, RemoveReport, RestoreReport, RestoreRequest,
    SnapshotList, SnapshotReport, StopAgentRequest, StoreCheckReport, StoreCheckRequest, StoreGcReport,
    StoreGcRequest, StoreStats, TokenReply, TokenRequest, TransferReport, TransferRequest, UpRequest,
    VerifyReport, VerifyRequest,
};

/// The largest answer, and the longest line of an event stream, that the client takes: an `exec` report may
/// hold 16 MiB each of standard output and standard error, in base64.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

/// What the `Upgrade` header of a console says.
pub const CONSOLE_PROTOCOL: &str = "diorama-console";

/// An answer being waited for; the error says, for people, why there is none.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response<Incoming>, String>> + Send>>;

/// Sends a request to the agent of another host.
pub type Carrier = Arc<dyn Fn(Request<Full<Bytes>>) -> Answering + Send + Sync>;

/// Speaks to one agent.
#[derive(Clone)]
pub struct Client {
    via: Via,
}

#[derive(Clone)]
enum Via {
    /// This host's.
    Socket(PathBuf),
    /// Another host's.
    Carrier(Carrier),
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.via {
            Via::Socket(socket) => f.debug_tuple("Client").field(socket).finish(),
            Via::Carrier(_) => f.debug_tuple("Client").finish_non_exhaustive(),
        }
    }
}

/// A console: raw bytes both ways.
pub type ConsoleStream = TokioIo<hyper::upgrade::Upgraded>;

/// What an operation says on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Something moved on.
    Progress(Progress),
    /// Something that the user should know.
    Warning(String),
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the socket.
    #[error("no agent listens on {}", socket.display())]
    NotRunning {
        /// The agent's socket.
        socket: PathBuf,
    },
    /// The socket is there, but cannot be connected to.
    #[error("cannot connect to the agent at {}: {source}", socket.display())]
    Connect {
        /// The agent's socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another host's agent cannot be reached, or the connection to it broke.
    #[error("{0}")]
    Carrier(String),
    /// The connection broke.
    #[error("the connection to the agent broke during {request}: {source}")]
    Connection {
        /// Method and path.
        request: String,
        /// What broke.
        source: hyper::Error,
    },
    /// The event stream ended without saying how the operation went.
    #[error("the agent ended the connection during {request}, before it was done")]
    Unfinished {
        /// Method and path.
        request: String,
    },
    /// The answer is longer than any answer should be.
    #[error("the agent's answer to {request} is longer than {limit_bytes} bytes")]
    TooLong {
        /// Method and path.
        request: String,
        /// The most that the client takes.
        limit_bytes: usize,
    },
    /// The answer is not what this version of Diorama expects.
    #[error("the agent's answer to {request} (status {status}) cannot be understood: {problem}")]
    NotUnderstood {
        /// Method and path.
        request: String,
        /// The HTTP status.
        status: u16,
        /// What is wrong with it.
        problem: String,
    },
    /// The agent answered with an error.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        let hint = match error {
            ClientError::Refused(error) => return error,
            ClientError::NotRunning { .. } => "start it with `diorama agent`",
            ClientError::Connect { .. } => {
                "is the socket yours? DIORAMA_HOME and DIORAMA_RUNTIME_DIR say where it is"
            }
            ClientError::Carrier(_) => {
                "is that host up, and does its agent run? `diorama host list` shows who is there"
            }
            ClientError::Connection { .. } | ClientError::Unfinished { .. } => {
                "the agent may have died: see agent.log in Diorama's home; the next command starts it again, \
                 and it takes its machines back"
            }
            ClientError::TooLong { .. } | ClientError::NotUnderstood { .. } => {
                "is the agent of another version? `diorama agent stop` lets the next command start this one"
            }
        };
        Self::new(ErrorKind::Agent, message).hint(hint)
    }
}

/// Takes what an operation says on its way.
pub trait Observer: FnMut(Notice) {}
impl<F: FnMut(Notice)> Observer for F {}

impl Client {
    /// A client of the agent of these folders. Does not connect.
    pub fn new(folders: &Folders) -> Self {
        Self { via: Via::Socket(folders.socket()) }
    }

    /// A client of another host's agent.
    pub fn of_host(carrier: Carrier) -> Self {
        Self { via: Via::Carrier(carrier) }
    }

    /// Sends a request between agents, which know its path and form.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(Method::POST, path, Some(encode(request))).await?.document().await
    }

    /// The same for a document that is only looked at.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::GET, path).await
    }

    /// Who answers.
    ///
    /// # Errors
    /// See [`ClientError`]; so for all requests below.
    pub async fn agent(&self) -> Result<AgentInfo, ClientError> {
        self.ask(Method::GET, "/v1/agent").await
    }

    /// Stops the agent. It has promised to end when this returns, and may still be about to.
    ///
    /// # Errors
    /// When environments run and `force` is not set, among others.
    pub async fn stop_agent(&self, request: &StopAgentRequest) -> Result<Empty, ClientError> {
        self.send(Method::POST, "/v1/agent/stop", Some(encode(request))).await?.document().await
    }

    /// All environments.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn environments(&self) -> Result<Vec<EnvironmentStatus>, ClientError> {
        self.ask(Method::GET, "/v1/environments").await
    }

    /// One environment.
    ///
    /// # Errors
    /// When there is none of this name, among others.
    pub async fn environment(&self, name: &str) -> Result<EnvironmentStatus, ClientError> {
        self.ask(Method::GET, &environment_path(name, "")).await
    }

    /// Starts an environment.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn up(
        &self,
        request: &UpRequest,
        observer: impl Observer,
    ) -> Result<EnvironmentStatus, ClientError> {
        self.operate("/v1/environments", request, observer).await
    }

    /// Stops an environment.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn down(
        &self,
        name: &str,
        request: &DownRequest,
        observer: impl Observer,
    ) -> Result<DownReport, ClientError> {
        self.operate(&environment_path(name, "/down"), request, observer).await
    }

    /// Pauses machines.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn pause(
        &self,
        name: &str,
        request: &MachinesRequest,
        observer: impl Observer,
    ) -> Result<EnvironmentStatus, ClientError> {
        self.operate(&environment_path(name, "/pause"), request, observer).await
    }

    /// Resumes machines.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn resume(
        &self,
        name: &str,
        request: &MachinesRequest,
        observer: impl Observer,
    ) -> Result<EnvironmentStatus, ClientError> {
        self.operate(&environment_path(name, "/resume"), request, observer).await
    }

    /// Takes a snapshot.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn create_snapshot(
        &self,
        name: &str,
        request: &CreateSnapshotRequest,
        observer: impl Observer,
    ) -> Result<SnapshotReport, ClientError> {
        self.operate(&environment_path(name, "/snapshots"), request, observer).await
    }

    /// Takes an environment back to a snapshot; without a name, the environment that the snapshot is of.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn restore(
        &self,
        name: Option<&str>,
        request: &RestoreRequest,
        observer: impl Observer,
    ) -> Result<RestoreReport, ClientError> {
        let path = name.map_or_else(|| "/v1/restore".to_owned(), |name| environment_path(name, "/restore"));
        self.operate(&path, request, observer).await
    }

    /// Makes new environments of a snapshot.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn fork(
        &self,
        request: &ForkRequest,
        observer: impl Observer,
    ) -> Result<ForkReport, ClientError> {
        self.operate("/v1/forks", request, observer).await
    }

    /// Runs a command in a guest.
    ///
    /// # Errors
    /// See [`ClientError`]. A command that fails is not an error: see the report.
    pub async fn exec(
        &self,
        name: &str,
        machine: &str,
        request: &ExecRequest,
        observer: impl Observer,
    ) -> Result<ExecReport, ClientError> {
        self.operate(&machine_path(name, machine, "/exec"), request, observer).await
    }

    /// Connects to a machine's serial console.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn console(&self, name: &str, machine: &str) -> Result<ConsoleStream, ClientError> {
        let path = machine_path(name, machine, "/console");
        let upgrade = [(header::CONNECTION, "upgrade"), (header::UPGRADE, CONSOLE_PROTOCOL)];
        let mut answer = self.send_with(Method::GET, &path, None, &upgrade).await?;
        if answer.response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(answer.into_error().await);
        }
        let request = answer.request.clone();
        let upgraded = hyper::upgrade::on(&mut answer.response)
            .await
            .map_err(|source| ClientError::Connection { request, source })?;
        Ok(TokioIo::new(upgraded))
    }

    /// What a machine's serial console has printed: all of it or the last `lines`, and with `follow` what it
    /// prints from now on.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn log(
        &self,
        name: &str,
        machine: &str,
        follow: bool,
        lines: Option<u64>,
    ) -> Result<LogStream, ClientError> {
        let mut path = machine_path(name, machine, "/log");
        let _ = write!(path, "?follow={follow}");
        if let Some(lines) = lines {
            let _ = write!(path, "&lines={lines}");
        }
        let answer = self.send(Method::GET, &path, None).await?;
        if answer.response.status().is_success() {
            Ok(LogStream { answer })
        } else {
            Err(answer.into_error().await)
        }
    }

    /// The cluster's hosts.
    ///
    /// # Errors
    /// When this host is in no cluster, among others.
    pub async fn hosts(&self) -> Result<Vec<HostInfo>, ClientError> {
        self.ask(Method::GET, "/v1/hosts").await
    }

    /// Makes a cluster.
    ///
    /// # Errors
    /// When this host is in one, among others.
    pub async fn init_host(&self, request: &InitHostRequest) -> Result<HostInfo, ClientError> {
        self.post("/v1/hosts/init", request).await
    }

    /// Enters a cluster.
    ///
    /// # Errors
    /// When this host is in one, among others.
    pub async fn join_host(&self, request: &JoinHostRequest) -> Result<HostInfo, ClientError> {
        self.post("/v1/hosts/join", request).await
    }

    /// Makes a token for hosts that are to join.
    ///
    /// # Errors
    /// When this host cannot let others in, among others.
    pub async fn host_token(&self, request: &TokenRequest) -> Result<TokenReply, ClientError> {
        self.post("/v1/hosts/token", request).await
    }

    /// Lets a host get no new machines, or get them again.
    ///
    /// # Errors
    /// When there is no such host, among others.
    pub async fn drain_host(&self, request: &DrainHostRequest) -> Result<HostInfo, ClientError> {
        self.post("/v1/hosts/drain", request).await
    }

    /// Takes a host out of the cluster.
    ///
    /// # Errors
    /// When it has machines and `force` is not set, among others.
    pub async fn remove_host(&self, request: &RemoveHostRequest) -> Result<Empty, ClientError> {
        self.post("/v1/hosts/remove", request).await
    }

    /// Takes this host out of its cluster.
    ///
    /// # Errors
    /// When it has machines and `force` is not set, among others.
    pub async fn leave_host(&self, request: &LeaveHostRequest) -> Result<LeaveHostReport, ClientError> {
        self.post("/v1/hosts/leave", request).await
    }

    /// All snapshots.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn snapshots(&self) -> Result<SnapshotList, ClientError> {
        self.ask(Method::GET, "/v1/snapshots").await
    }

    /// Everything known of one snapshot. Where a name could mean snapshots of several environments,
    /// `environment` decides.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
    ) -> Result<SnapshotReport, ClientError> {
        self.ask(Method::GET, &snapshot_path(query, "", environment)).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn remove_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
    ) -> Result<RemoveReport, ClientError> {
        self.ask(Method::DELETE, &snapshot_path(query, "", environment)).await
    }

    /// Proves a snapshot: reads and checks everything in it.
    ///
    /// # Errors
    /// See [`ClientError`]. Damage found is not an error: see the report.
    pub async fn verify_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
        request: &VerifyRequest,
        observer: impl Observer,
    ) -> Result<VerifyReport, ClientError> {
        self.operate(&snapshot_path(query, "/verify", environment), request, observer).await
    }

    /// Writes what a snapshot holds as ordinary files.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn extract_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
        request: &ExtractRequest,
        observer: impl Observer,
    ) -> Result<ExtractReport, ClientError> {
        self.operate(&snapshot_path(query, "/extract", environment), request, observer).await
    }

    /// Writes a snapshot into one file.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn export_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
        request: &ExportRequest,
        observer: impl Observer,
    ) -> Result<ExportReport, ClientError> {
        self.operate(&snapshot_path(query, "/export", environment), request, observer).await
    }

    /// Takes in a snapshot from a file.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn import_snapshot(
        &self,
        request: &ImportRequest,
        observer: impl Observer,
    ) -> Result<ArrivalReport, ClientError> {
        self.operate("/v1/store/import", request, observer).await
    }

    /// Copies snapshots to another store.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn push_snapshots(
        &self,
        request: &TransferRequest,
        observer: impl Observer,
    ) -> Result<TransferReport, ClientError> {
        self.operate("/v1/store/push", request, observer).await
    }

    /// Copies snapshots from another store.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn pull_snapshots(
        &self,
        request: &TransferRequest,
        observer: impl Observer,
    ) -> Result<TransferReport, ClientError> {
        self.operate("/v1/store/pull", request, observer).await
    }

    /// What the store holds.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn store_stats(&self) -> Result<StoreStats, ClientError> {
        self.ask(Method::GET, "/v1/store").await
    }

    /// Looks whether the store is whole.
    ///
    /// # Errors
    /// See [`ClientError`]. Damage found is not an error: see the report.
    pub async fn check_store(
        &self,
        request: &StoreCheckRequest,
        observer: impl Observer,
    ) -> Result<StoreCheckReport, ClientError> {
        self.operate("/v1/store/check", request, observer).await
    }

    /// Gives back the space of what no snapshot needs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn collect_store(
        &self,
        request: &StoreGcRequest,
        observer: impl Observer,
    ) -> Result<StoreGcReport, ClientError> {
        self.operate("/v1/store/gc", request, observer).await
    }

    /// Removes the snapshots that no rule keeps.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn prune_snapshots(
        &self,
        request: &PruneRequest,
        observer: impl Observer,
    ) -> Result<PruneReport, ClientError> {
        self.operate("/v1/store/prune", request, observer).await
    }

    /// Compares two snapshots.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn diff_snapshots(
        &self,
        from: &str,
        to: &str,
        environment: Option<&str>,
    ) -> Result<DiffReport, ClientError> {
        self.ask(Method::GET, &snapshot_path(from, &format!("/diff/{}", segment(to)), environment)).await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        self.send(method, path, None).await?.document().await
    }

    /// The same for an operation, which reports on its way.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn operate<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
        mut observer: impl Observer,
    ) -> Result<T, ClientError> {
        let mut answer = self.send(Method::POST, path, Some(encode(request))).await?;
        if !answer.response.status().is_success() {
            return Err(answer.into_error().await);
        }
        let mut lines = Lines::default();
        loop {
            let chunk = answer.chunk().await?;
            let ended = chunk.is_none();
            match chunk {
                Some(chunk) => lines.push(&chunk),
                None => lines.push(b"\n"),
            }
            while let Some(line) = lines.next() {
                match serde_json::from_slice(line) {
                    Ok(Event::Progress(progress)) => observer(Notice::Progress(progress)),
                    Ok(Event::Warning { message }) => observer(Notice::Warning(message)),
                    Ok(Event::Done { result }) => return Ok(result),
                    Ok(Event::Failed { error }) => return Err(ClientError::Refused(error)),
                    // A line that the end of the stream cut off is not misunderstood, only unfinished.
                    Err(_) if ended => break,
                    Err(error) => return Err(answer.not_understood(error.to_string())),
                }
            }
            if ended {
                return Err(ClientError::Unfinished { request: answer.request.clone() });
            }
            if lines.waiting_bytes() > ANSWER_BYTES_MAX {
                return Err(answer.too_long());
            }
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Answer, ClientError> {
        self.send_with(method, path, body, &[]).await
    }

    async fn send_with(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        headers: &[(header::HeaderName, &'static str)],
    ) -> Result<Answer, ClientError> {
        let name = format!("{method} {path}");
        let broke = |source| ClientError::Connection { request: name.clone(), source };
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "diorama");
        for (header, value) in headers {
            request = request.header(header, *value);
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body.unwrap_or_default())).map_err(|error| {
            // Only a path that is no URI can do this, and every part of it was encoded.
            ClientError::NotUnderstood { request: name.clone(), status: 0, problem: error.to_string() }
        })?;
        let socket = match &self.via {
            Via::Socket(socket) => socket,
            Via::Carrier(carrier) => {
                let response = carrier(request).await.map_err(ClientError::Carrier)?;
                return Ok(Answer { request: name, response, connection: None });
            }
        };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(connect(socket).await?)).await.map_err(broke)?;
        // What ends the connection is also seen by whoever waits for the answer, with more to say about it.
        let connection = Connection(tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        }));
        let response = sender.send_request(request).await.map_err(broke)?;
        Ok(Answer { request: name, response, connection: Some(connection) })
    }
}

async fn connect(socket: &Path) -> Result<UnixStream, ClientError> {
    UnixStream::connect(socket).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ClientError::NotRunning { socket: socket.to_owned() }
        }
        _ => ClientError::Connect { socket: socket.to_owned(), source },
    })
}

/// A machine's log as it comes.
#[derive(Debug)]
pub struct LogStream {
    answer: Answer,
}

impl LogStream {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.answer.chunk().await
    }
}

/// The task that drives a connection; dropping it closes the connection.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer whose body is still to come.
#[derive(Debug)]
struct Answer {
    request: String,
    response: Response<Incoming>,
    #[expect(dead_code, reason = "held so that the connection lives as long as the answer")]
    connection: Option<Connection>,
}

impl Answer {
    async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.response.body_mut().frame().await {
            let frame =
                frame.map_err(|source| ClientError::Connection { request: self.request.clone(), source })?;
            // Trailers are not expected and mean nothing.
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    async fn whole(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            body.extend_from_slice(&chunk);
            if body.len() > ANSWER_BYTES_MAX {
                return Err(self.too_long());
            }
        }
        Ok(body)
    }

    async fn document<T: DeserializeOwned>(mut self) -> Result<T, ClientError> {
        if !self.response.status().is_success() {
            return Err(self.into_error().await);
        }
        let body = self.whole().await?;
        serde_json::from_slice(&body).map_err(|error| self.not_understood(error.to_string()))
    }

    async fn into_error(mut self) -> ClientError {
        let body = match self.whole().await {
            Ok(body) => body,
            Err(error) => return error,
        };
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => ClientError::Refused(body.error),
            Err(error) => self.not_understood(error.to_string()),
        }
    }

    fn not_understood(&self, problem: String) -> ClientError {
        let status = self.response.status().as_u16();
        ClientError::NotUnderstood { request: self.request.clone(), status, problem }
    }

    fn too_long(&self) -> ClientError {
        ClientError::TooLong { request: self.request.clone(), limit_bytes: ANSWER_BYTES_MAX }
    }
}

/// Cuts a stream into lines. Looks at every byte once, however the stream was cut into chunks.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to where no line feed is left to find.
    searched: usize,
}

impl Lines {
    fn push(&mut self, chunk: &[u8]) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(chunk);
    }

    /// The next complete line that is not empty, without its line feed.
    fn next(&mut self) -> Option<&[u8]> {
        loop {
            let Some(length) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.bytes.len();
                return None;
            };
            let line = self.start..self.searched + length;
            self.start = line.end + 1;
            self.searched = self.start;
            if !line.is_empty() {
                return Some(&self.bytes[line]);
            }
        }
    }

    fn waiting_bytes(&self) -> usize {
        self.bytes.len() - self.start
    }
}

fn encode(request: &impl Serialize) -> Bytes {
    // Requests are plain structures with string keys: they always have a JSON form.
    Bytes::from(serde_json::to_vec(request).unwrap_or_default())
}

fn environment_path(name: &str, rest: &str) -> String {
    format!("/v1/environments/{}{rest}", segment(name))
}

fn machine_path(name: &str, machine: &str, rest: &str) -> String {
    environment_path(name, &format!("/machines/{}{rest}", segment(machine)))
}

fn snapshot_path(query: &str, rest: &str, environment: Option<&str>) -> String {
    let mut path = format!("/v1/snapshots/{}{rest}", segment(query));
    if let Some(environment) = environment {
        let _ = write!(path, "?environment={}", segment(environment));
    }
    path
}

/// One part of a path or query, percent-encoded: whatever a user types stays one part.
fn segment(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        // `.` is encoded too, so that `..` is a name like any other.
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests;
