//! The agent's HTTP API: from requests to the agent's methods, and from their results to documents and events.
//!
//! Operations run on threads of their own (they block on QEMU and on files); what they report goes into the
//! response's body line by line. When the client closes the connection, the body is dropped, and the operation
//! finds itself cancelled.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use diorama_api::{
    ApiError, CreateSnapshotRequest, DownRequest, DrainHostRequest, Empty, ErrorBody, ErrorKind, Event,
    ExecRequest, ExportRequest, ExtractRequest, ForkRequest, ImportRequest, InitHostRequest, JoinHostRequest,
    LeaveHostRequest, MachinesRequest, PruneRequest, RemoveHostRequest, RestoreRequest, StopAgentRequest,
    StoreCheckRequest, StoreGcRequest, TokenRequest, TransferRequest, UpRequest, VerifyRequest,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc::unbounded_channel;
use tokio_stream::wrappers::ReceiverStream;

use crate::Agent;
use crate::operation::{Notice, Operation};
use crate::span::{PartDownRequest, PartRequest, PartRestRequest};

type Shared = State<Arc<Agent>>;

/// The longest request, in bytes: 16 MiB of a command's standard input, as base64 in JSON.
const REQUEST_BYTES_MAX: usize = 24 << 20;

/// All routes.
pub(crate) fn router(agent: Arc<Agent>) -> Router {
    let machine = "/v1/environments/{name}/machines/{machine}";
    Router::new()
        .route("/v1/agent", get(agent_info))
        .route("/v1/agent/stop", post(stop_agent))
        .route("/v1/environments", get(list).post(up))
        .route("/v1/environments/{name}", get(status))
        .route("/v1/environments/{name}/down", post(down))
        .route("/v1/environments/{name}/pause", post(pause))
        .route("/v1/environments/{name}/resume", post(resume))
        .route("/v1/environments/{name}/snapshots", post(create_snapshot))
        .route("/v1/environments/{name}/restore", post(restore))
        .route("/v1/restore", post(restore_anywhere))
        .route("/v1/forks", post(fork))
        .route(&format!("{machine}/exec"), post(exec))
        .route(&format!("{machine}/console"), get(console))
        .route(&format!("{machine}/log"), get(log))
        .route("/v1/snapshots", get(list_snapshots))
        .route("/v1/snapshots/{query}", get(show_snapshot).delete(remove_snapshot))
        .route("/v1/snapshots/{query}/verify", post(verify_snapshot))
        .route("/v1/snapshots/{query}/diff/{other}", get(diff_snapshots))
        .route("/v1/snapshots/{query}/extract", post(extract_snapshot))
        .route("/v1/snapshots/{query}/export", post(export_snapshot))
        .route("/v1/store", get(store_stats))
        .route("/v1/store/check", post(check_store))
        .route("/v1/store/gc", post(collect_store))
        .route("/v1/store/prune", post(prune_snapshots))
        .route("/v1/store/import", post(import_snapshot))
        .route("/v1/store/push", post(push_snapshots))
        .route("/v1/store/pull", post(pull_snapshots))
        .route("/v1/hosts", get(hosts))
        .route("/v1/hosts/init", post(init_host))
        .route("/v1/hosts/join", post(join_host))
        .route("/v1/hosts/token", post(host_token))
        .route("/v1/hosts/drain", post(drain_host))
        .route("/v1/hosts/remove", post(remove_host))
        .route("/v1/hosts/leave", post(leave_host))
        .fallback(|| async {
            failure(&ApiError::new(ErrorKind::Invalid, "the agent does not know this request").hint(
                "the client and the agent may be of different versions: `diorama agent stop`, and try again",
            ))
        })
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&agent), crate::span::forward))
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(agent)
}

/// What other hosts of the cluster ask: about what this host has.
pub(crate) fn peer_router(agent: Arc<Agent>) -> Router {
    let messages = diorama_cluster::channel::messages(Arc::new(crate::span::Messages(Arc::clone(&agent))));
    let machine = "/v1/environments/{name}/machines/{machine}";
    Router::new()
        .route("/v1/agent", get(agent_info))
        .route("/v1/peer/parts", post(launch_part))
        .route("/v1/peer/environments/{name}", get(part_status))
        .route("/v1/peer/environments/{name}/down", post(part_down))
        .route("/v1/peer/environments/{name}/rest", post(part_rest))
        .route("/v1/environments/{name}/snapshots", post(create_snapshot))
        .route(&format!("{machine}/exec"), post(exec))
        .route(&format!("{machine}/console"), get(console))
        .route(&format!("{machine}/log"), get(log))
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(agent)
        .merge(messages)
}

async fn launch_part(State(agent): Shared, Json(request): Json<PartRequest>) -> Response {
    events(move |operation| agent.launch_part(&request, operation))
}

async fn part_status(State(agent): Shared, Path(name): Path<String>) -> Response {
    document(blocking(move || agent.status_here(&name)).await)
}

async fn part_down(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<PartDownRequest>,
) -> Response {
    events(move |operation| agent.stop_part(&name, &request, operation))
}

async fn part_rest(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<PartRestRequest>,
) -> Response {
    events(move |operation| agent.rest_part(&name, &request, operation))
}

async fn hosts(State(agent): Shared) -> Response {
    document(agent.hosts())
}

async fn init_host(State(agent): Shared, Json(request): Json<InitHostRequest>) -> Response {
    document(agent.init_host(request).await)
}

async fn join_host(State(agent): Shared, Json(request): Json<JoinHostRequest>) -> Response {
    document(agent.join_host(request).await)
}

async fn host_token(State(agent): Shared, Json(request): Json<TokenRequest>) -> Response {
    document(agent.make_token(request).await)
}

async fn drain_host(State(agent): Shared, Json(request): Json<DrainHostRequest>) -> Response {
    document(agent.drain_host(&request.name, request.drain).await)
}

async fn remove_host(State(agent): Shared, Json(request): Json<RemoveHostRequest>) -> Response {
    document(agent.remove_host(&request.name, request.force).await.map(|()| Empty {}))
}

async fn leave_host(State(agent): Shared, Json(request): Json<LeaveHostRequest>) -> Response {
    // To its end, also when nobody waits for it any more.
    let left = tokio::spawn(async move { agent.leave_host(request.force).await });
    document(left.await.unwrap_or_else(|_| Err(defect())))
}

async fn agent_info(State(agent): Shared) -> Response {
    document(blocking(move || Ok(agent.info())).await)
}

async fn stop_agent(State(agent): Shared, Json(request): Json<StopAgentRequest>) -> Response {
    document(blocking(move || agent.stop(request)).await)
}

async fn list(State(agent): Shared) -> Response {
    document(blocking(move || agent.statuses()).await)
}

async fn status(State(agent): Shared, Path(name): Path<String>) -> Response {
    document(blocking(move || agent.status(&name)).await)
}

async fn up(State(agent): Shared, Json(request): Json<UpRequest>) -> Response {
    events(move |operation| agent.up(request, operation))
}

async fn down(State(agent): Shared, Path(name): Path<String>, Json(request): Json<DownRequest>) -> Response {
    events(move |operation| agent.down(&name, request, operation))
}

async fn pause(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<MachinesRequest>,
) -> Response {
    events(move |operation| agent.rest(&name, &request, true, operation))
}

async fn resume(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<MachinesRequest>,
) -> Response {
    events(move |operation| agent.rest(&name, &request, false, operation))
}

async fn create_snapshot(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<CreateSnapshotRequest>,
) -> Response {
    events(move |operation| agent.create_snapshot(&name, request, operation))
}

async fn restore(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<RestoreRequest>,
) -> Response {
    events(move |operation| agent.restore(Some(&name), &request, operation))
}

async fn restore_anywhere(State(agent): Shared, Json(request): Json<RestoreRequest>) -> Response {
    events(move |operation| agent.restore(None, &request, operation))
}

async fn fork(State(agent): Shared, Json(request): Json<ForkRequest>) -> Response {
    events(move |operation| agent.fork(&request, operation))
}

async fn exec(
    State(agent): Shared,
    Path((name, machine)): Path<(String, String)>,
    Json(request): Json<ExecRequest>,
) -> Response {
    events(move |operation| agent.exec(&name, &machine, &request, operation))
}

#[derive(Debug, Default, Deserialize)]
struct OfEnvironment {
    environment: Option<String>,
}

async fn list_snapshots(State(agent): Shared) -> Response {
    document(blocking(move || agent.list_snapshots()).await)
}

async fn show_snapshot(
    State(agent): Shared,
    Path(query): Path<String>,
    Query(of): Query<OfEnvironment>,
) -> Response {
    document(blocking(move || agent.show_snapshot(&query, of.environment.as_deref())).await)
}

async fn remove_snapshot(
    State(agent): Shared,
    Path(query): Path<String>,
    Query(of): Query<OfEnvironment>,
) -> Response {
    document(blocking(move || agent.remove_snapshot(&query, of.environment.as_deref())).await)
}

async fn verify_snapshot(
    State(agent): Shared,
    Path(query): Path<String>,
    Query(of): Query<OfEnvironment>,
    Json(request): Json<VerifyRequest>,
) -> Response {
    events(move |operation| agent.verify_snapshot(&query, of.environment.as_deref(), &request, operation))
}

async fn diff_snapshots(
    State(agent): Shared,
    Path((from, to)): Path<(String, String)>,
    Query(of): Query<OfEnvironment>,
) -> Response {
    document(blocking(move || agent.diff_snapshots(&from, &to, of.environment.as_deref())).await)
}

async fn extract_snapshot(
    State(agent): Shared,
    Path(query): Path<String>,
    Query(of): Query<OfEnvironment>,
    Json(request): Json<ExtractRequest>,
) -> Response {
    events(move |operation| agent.extract_snapshot(&query, of.environment.as_deref(), &request, operation))
}

async fn export_snapshot(
    State(agent): Shared,
    Path(query): Path<String>,
    Query(of): Query<OfEnvironment>,
    Json(request): Json<ExportRequest>,
) -> Response {
    events(move |operation| agent.export_snapshot(&query, of.environment.as_deref(), &request, operation))
}

async fn import_snapshot(State(agent): Shared, Json(request): Json<ImportRequest>) -> Response {
    events(move |operation| agent.import_snapshot(&request, operation))
}

async fn push_snapshots(State(agent): Shared, Json(request): Json<TransferRequest>) -> Response {
    events(move |operation| agent.push_snapshots(&request, operation))
}

async fn pull_snapshots(State(agent): Shared, Json(request): Json<TransferRequest>) -> Response {
    events(move |operation| agent.pull_snapshots(&request, operation))
}

async fn store_stats(State(agent): Shared) -> Response {
    document(blocking(move || agent.store_stats()).await)
}

async fn check_store(State(agent): Shared, Json(request): Json<StoreCheckRequest>) -> Response {
    events(move |operation| agent.check_store(request, operation))
}

async fn collect_store(State(agent): Shared, Json(request): Json<StoreGcRequest>) -> Response {
    events(move |operation| agent.collect_store(request, operation))
}

async fn prune_snapshots(State(agent): Shared, Json(request): Json<PruneRequest>) -> Response {
    events(move |operation| agent.prune_snapshots(&request, operation))
}

/// Joins the client's connection and the machine's serial console.
async fn console(
    State(agent): Shared,
    Path((name, machine)): Path<(String, String)>,
    request: Request,
) -> Response {
    let opened = blocking(move || agent.open_console(&name, &machine)).await;
    let stream = match opened {
        Ok(stream) => stream,
        Err(error) => return failure(&error),
    };
    tokio::spawn(async move {
        let joined = async {
            let upgraded = hyper::upgrade::on(request).await.map_err(std::io::Error::other)?;
            let mut client = hyper_util::rt::TokioIo::new(upgraded);
            let mut console = tokio::net::UnixStream::from_std(stream)?;
            tokio::io::copy_bidirectional(&mut client, &mut console).await
        };
        // Either side closing is how a console ends.
        if let Err(error) = joined.await {
            tracing::debug!(%error, "a console ended");
        }
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, "diorama-console")
        .body(Body::empty())
        .expect("a response of constants")
}

#[derive(Debug, Default, Deserialize)]
struct LogQuery {
    #[serde(default)]
    follow: bool,
    lines: Option<usize>,
}

/// How often a followed log is looked at.
const FOLLOW_INTERVAL: std::time::Duration = std::time::Duration::from_millis(200);

async fn log(
    State(agent): Shared,
    Path((name, machine)): Path<(String, String)>,
    Query(query): Query<LogQuery>,
) -> Response {
    let found = blocking(move || agent.console_log(&name, &machine, query.lines)).await;
    let (path, offset) = match found {
        Ok(found) => found,
        Err(error) => return failure(&error),
    };
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(4);
    tokio::spawn(async move {
        let copy = async {
            let mut file = tokio::fs::File::open(&path).await?;
            file.seek(std::io::SeekFrom::Start(offset)).await?;
            let mut chunk = vec![0; 64 * 1024];
            loop {
                let read = file.read(&mut chunk).await?;
                if read > 0 {
                    if sender.send(Ok(Bytes::copy_from_slice(&chunk[..read]))).await.is_err() {
                        return Ok(());
                    }
                } else if query.follow && !sender.is_closed() && tokio::fs::try_exists(&path).await? {
                    tokio::time::sleep(FOLLOW_INTERVAL).await;
                } else {
                    return Ok::<(), std::io::Error>(());
                }
            }
        };
        if let Err(error) = copy.await {
            // The client has gone, or learns of the error by a broken body.
            let _ = sender.send(Err(error)).await;
        }
    });
    let headers = [(header::CONTENT_TYPE, "application/octet-stream")];
    (headers, Body::from_stream(ReceiverStream::new(receiver))).into_response()
}

/// Runs blocking work on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(defect()))
}

/// Runs an operation and streams its events.
fn events<T: Serialize + Send + 'static>(
    work: impl FnOnce(&Operation) -> Result<T, ApiError> + Send + 'static,
) -> Response {
    let (lines, body) = tokio::sync::mpsc::channel::<Result<Bytes, Infallible>>(64);
    let (notices, mut noticed) = unbounded_channel();
    let operation = Operation::new(notices);
    let mut task = tokio::task::spawn_blocking(move || work(&operation));
    tokio::spawn(async move {
        // The connection's end is seen here, also while the operation has nothing to say.
        let result = loop {
            tokio::select! {
                biased;
                Some(notice) = noticed.recv() => {
                    let event = match notice {
                        Notice::Progress(progress) => Event::<T>::Progress(progress),
                        Notice::Warning(message) => Event::Warning { message },
                    };
                    // A client that has gone is seen by `closed`.
                    let _ = lines.send(Ok(line(&event))).await;
                }
                () = lines.closed() => {
                    drop(noticed);
                    return;
                }
                result = &mut task => break result.unwrap_or_else(|_| Err(defect())),
            }
        };
        while let Ok(notice) = noticed.try_recv() {
            if let Notice::Warning(message) = notice {
                // As above.
                let _ = lines.send(Ok(line(&Event::<T>::Warning { message }))).await;
            }
        }
        let event = match result {
            Ok(result) => Event::Done { result },
            Err(error) => Event::Failed { error },
        };
        // As above.
        let _ = lines.send(Ok(line(&event))).await;
    });
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (headers, Body::from_stream(ReceiverStream::new(body))).into_response()
}

fn line<T: Serialize>(event: &Event<T>) -> Bytes {
    let mut line = serde_json::to_vec(event).expect("reports have string keys and no failing serialisers");
    line.push(b'\n');
    line.into()
}

fn document<T: Serialize>(result: Result<T, ApiError>) -> Response {
    match result {
        Ok(document) => Json(document).into_response(),
        Err(error) => failure(&error),
    }
}

pub(crate) fn failure(error: &ApiError) -> Response {
    let status = match error.kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Invalid | ErrorKind::Ambiguous | ErrorKind::EnvironmentFile => StatusCode::BAD_REQUEST,
        ErrorKind::NameInUse | ErrorKind::Busy | ErrorKind::WrongState => StatusCode::CONFLICT,
        ErrorKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, Json(ErrorBody { error: error.clone() })).into_response()
}

fn defect() -> ApiError {
    ApiError::new(ErrorKind::Internal, "the agent ran into a defect of its own while it did this")
        .hint("its log (agent.log in Diorama's state folder) says where; please report it")
}
