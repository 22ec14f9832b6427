//! Messages: a kind and some bytes, answered by some bytes.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;

use super::Peer;

/// The longest message, and the longest answer, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Where messages go.
pub(super) const PATH: &str = "/v1/peer/messages/";

/// The handler does not answer: why, in a word for programs and in words for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The class, such as `busy`.
    pub kind: String,
    /// What happened.
    pub message: String,
}

/// Answers messages from members.
pub trait MessageHandler: Send + Sync + 'static {
    /// Answers one. Dropped half-way when the sender stops waiting.
    fn handle<'a>(
        &'a self,
        peer: &'a Peer,
        kind: &'a str,
        body: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Refusal>> + Send + 'a>>;
}

/// The route that takes messages, to be merged with an agent's other routes.
pub fn messages(handler: Arc<dyn MessageHandler>) -> Router {
    Router::new()
        .route(&format!("{PATH}{{kind}}"), post(take))
        .layer(DefaultBodyLimit::max(MESSAGE_BYTES_MAX))
        .with_state(handler)
}

async fn take(
    State(handler): State<Arc<dyn MessageHandler>>,
    Extension(peer): Extension<Peer>,
    Path(kind): Path<String>,
    body: Bytes,
) -> Response {
    match handler.handle(&peer, &kind, body).await {
        Ok(answer) => answer.into_response(),
        Err(refusal) => (StatusCode::UNPROCESSABLE_ENTITY, axum::Json(refusal)).into_response(),
    }
}
