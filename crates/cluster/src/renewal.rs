//! Renewing certificates before they end.
//!
//! A host asks an issuer for a new certificate for its old key, over the connection that its present one opens. When less
//! than a third of a certificate's time is left (a month), it is due; an attempt that fails is made again after a hundredth of
//! what is left, and within the hour. A host whose certificate has ended all the same joins again. One that was given the
//! authority's file gets a certificate at once that says so: hosts that join show their token to no other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use http_body_util::{BodyExt, Limited};
use hyper::{Method, Request};

use crate::admission::{Admission, AdmissionError};
use crate::channel::{Lane, Peer, Peers};
use crate::identity::tls::{Tls, TlsError};
use crate::identity::{Certificate, Credentials, CredentialsError};

/// How often is looked whether the certificate is due.
const CHECK_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// How soon an attempt that failed is made again, at least.
const LEAST_PAUSE: Duration = Duration::from_secs(2);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: usize = 64 << 10;
const PATH: &str = "/v1/cluster/renew";

/// Why a certificate was not renewed. The one before stays.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// No issuer gave one.
    #[error("no issuer renews this host's certificate: {}", .0.join("; "))]
    NoIssuer(
        /// What each said; empty when the cluster has none.
        Vec<String>,
    ),
    /// What was given cannot be used or kept.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// This host is the issuer.
    #[error(transparent)]
    Own(#[from] AdmissionError),
    /// It cannot be put to use.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The route by which an issuer renews members' certificates, to be merged with an agent's other routes.
pub fn routes(admission: Arc<Admission>) -> Router {
    Router::new().route(PATH, post(answer)).with_state(admission)
}

async fn answer(State(admission): State<Arc<Admission>>, Extension(peer): Extension<Peer>) -> Response {
    match admission.renew(peer.host, peer.key) {
        Ok(certificate) => Json(certificate).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

/// Renews one host's certificate.
#[derive(Debug)]
pub struct Renewal {
    /// Where the credentials are.
    pub folder: PathBuf,
    /// What uses them.
    pub tls: Tls,
    /// The way to issuers.
    pub peers: Peers,
    /// This host's own authority, if it is an issuer.
    pub admission: Option<Arc<Admission>>,
}

impl Renewal {
    /// Renews the certificate whenever it is due. Never ends.
    pub async fn run(&self, mut credentials: Credentials) {
        loop {
            let mut pause = CHECK_INTERVAL;
            let becomes_issuer = self.admission.is_some() && !credentials.is_issuer();
            if credentials.renewal_is_due(SystemTime::now()) || becomes_issuer {
                match self.renew(&credentials).await {
                    Ok(renewed) => {
                        tracing::info!(until = %renewed.certificate().not_after, "this host's certificate is renewed");
                        credentials = renewed;
                    }
                    Err(error) => {
                        let until = credentials.certificate().not_after;
                        tracing::warn!(%error, %until, "this host's certificate is due and was not renewed");
                        let left = until.duration_since(jiff::Timestamp::now());
                        let left = Duration::try_from(left).unwrap_or_default();
                        pause = (left / 100).clamp(LEAST_PAUSE, CHECK_INTERVAL);
                    }
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Renews the certificate now: kept in the folder, and used for the connections to come.
    ///
    /// # Errors
    /// See [`RenewalError`].
    pub async fn renew(&self, credentials: &Credentials) -> Result<Credentials, RenewalError> {
        let renewed = match &self.admission {
            Some(admission) => admission.renew_own(&self.folder, credentials)?,
            None => {
                let certificate = self.ask_issuers().await?;
                Credentials::store(
                    &self.folder,
                    credentials.name().clone(),
                    credentials.cluster(),
                    certificate,
                )?
            }
        };
        self.tls.renew(&renewed)?;
        Ok(renewed)
    }

    async fn ask_issuers(&self) -> Result<Certificate, RenewalError> {
        let issuers: Vec<_> = {
            let members = self.tls.members().borrow();
            members
                .iter()
                .filter(|member| member.issuer)
                .map(|member| (member.id, member.name.clone()))
                .collect()
        };
        let mut problems = Vec::new();
        for (issuer, name) in issuers {
            let request = Request::builder().method(Method::POST).uri(PATH).body(Body::empty());
            let request = request.expect("a request of constants");
            let asked = async {
                let response = self
                    .peers
                    .send(issuer, Lane::Control, request)
                    .await
                    .map_err(|error| error.to_string())?;
                let status = response.status();
                let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
                let body = body.map_err(|error| error.to_string())?.to_bytes();
                match status {
                    StatusCode::OK => serde_json::from_slice(&body).map_err(|error| error.to_string()),
                    _ => Err(format!("host `{name}`: {status} {}", String::from_utf8_lossy(&body))),
                }
            };
            match tokio::time::timeout(ANSWER_LIMIT, asked).await {
                Ok(Ok(certificate)) => return Ok(certificate),
                Ok(Err(problem)) => problems.push(problem),
                Err(_) => problems.push(format!("host `{name}`: no answer within {ANSWER_LIMIT:?}")),
            }
        }
        Err(RenewalError::NoIssuer(problems))
    }
}
