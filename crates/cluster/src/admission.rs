//! How a host becomes a member: founding a cluster, tokens, joining, renewing certificates.
//!
//! [`found`] makes the first member, an issuer. An issuer's [`Admission`] makes tokens and admits hosts that show one;
//! [`join`] is the other side. Everything can be done again after it failed half-way: a host keeps its key, and one that was
//! admitted with a token is let in with it again without another use.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use diorama_topology::HostName;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::directory::{Directory, DirectoryError, EtcdConfig, OpenError, Options, TokenRecord};
use crate::identity::{
    Authority, AuthorityError, Certificate, Credentials, CredentialsError, Fingerprint, HostId, HostKey,
    JoinToken, MAX_ADDRESSES, Member, PublicKey, tls,
};

/// The longest request to join, in bytes: a name, a key and some addresses.
pub(crate) const JOIN_REQUEST_BYTES_MAX: usize = 8 << 10;
/// The longest answer, in bytes: certificates, and how to reach etcd.
const JOIN_REPLY_BYTES_MAX: usize = 256 << 10;
/// How long a host may take to be admitted.
pub(crate) const JOIN_LIMIT: Duration = Duration::from_secs(15);
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// The longest time for which a token is good.
pub const MAX_TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// The most hosts that join with one token.
pub const MAX_TOKEN_USES: u32 = 1000;
/// How long a new cluster waits for its directory.
const DIRECTORY_LIMIT: Duration = Duration::from_secs(10);

/// Where requests to join go.
pub(crate) const JOIN_PATH: &str = "/v1/cluster/join";

/// Why a host is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", content = "detail", rename_all = "kebab-case")]
pub enum JoinRefusal {
    /// There is no such token, or its secret is another: which of the two is not said.
    #[error("the cluster does not know this join token")]
    TokenUnknown,
    /// Its time is over.
    #[error("the join token has expired")]
    TokenExpired,
    /// As many hosts have joined with it as may.
    #[error("the join token has been used as often as it may")]
    TokenUsedUp,
    /// Another host has the name.
    #[error("the cluster has another host `{0}`")]
    NameTaken(HostName),
    /// The request itself is wrong.
    #[error("the request to join is wrong: {0}")]
    Invalid(String),
    /// The directory cannot be reached, or others came between again and again.
    #[error("the cluster cannot admit a host now: {0}")]
    NotNow(String),
}

/// Why there is no cluster, or this host is not in it.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// This host is in a cluster already.
    #[error("this host is in a cluster already, as `{name}`")]
    MemberAlready {
        /// Its name there.
        name: HostName,
    },
    /// What was asked for is out of bounds.
    #[error("{0}")]
    Invalid(String),
    /// None of the token's addresses could be reached, or none of them is the token's cluster.
    #[error("the cluster cannot be reached: {}", tried.iter().map(|(address, problem)| format!("{address}: {problem}")).collect::<Vec<_>>().join("; "))]
    Unreachable {
        /// Addresses, and what happened there.
        tried: Vec<(SocketAddr, String)>,
    },
    /// The cluster refuses.
    #[error(transparent)]
    Refused(#[from] JoinRefusal),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// This host's key or certificate.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The directory cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

/// A request to join.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    token: String,
    secret: String,
    name: HostName,
    #[serde(with = "crate::base64_bytes")]
    key: Vec<u8>,
    addresses: Vec<SocketAddr>,
    /// A signature by the key: whoever joins has it.
    #[serde(with = "crate::base64_bytes")]
    proof: Vec<u8>,
}

impl JoinRequest {
    /// With a token, for the host of this key.
    ///
    /// # Errors
    /// When the key cannot sign.
    pub fn new(
        token: &JoinToken,
        key: &HostKey,
        name: HostName,
        addresses: Vec<SocketAddr>,
    ) -> Result<Self, AdmissionError> {
        let proof = key.sign(&proof_message(&token.secret_text(), &name))?;
        let secret = token.secret_text();
        Ok(Self { token: token.id.clone(), secret, name, key: key.public().0.to_vec(), addresses, proof })
    }

    fn checked_key(&self) -> Result<PublicKey, JoinRefusal> {
        let wrong = |what: &str| JoinRefusal::Invalid(what.to_owned());
        check_addresses(&self.addresses).map_err(JoinRefusal::Invalid)?;
        let key: [u8; 32] = self.key.as_slice().try_into().map_err(|_| wrong("not an Ed25519 key"))?;
        UnparsedPublicKey::new(&ED25519, key)
            .verify(&proof_message(&self.secret, &self.name), &self.proof)
            .map_err(|_| wrong("the signature is not by the key"))?;
        Ok(PublicKey(key))
    }
}

fn proof_message(secret: &str, name: &HostName) -> Vec<u8> {
    format!("diorama join 1\n{secret}\n{name}\n").into_bytes()
}

fn check_addresses(addresses: &[SocketAddr]) -> Result<(), String> {
    if addresses.is_empty() || addresses.len() > MAX_ADDRESSES {
        return Err(format!("{} addresses; a host has 1 to {MAX_ADDRESSES}", addresses.len()));
    }
    match addresses.iter().find(|address| address.port() == 0 || address.ip().is_unspecified()) {
        Some(address) => Err(format!("other hosts cannot reach {address}")),
        None => Ok(()),
    }
}

/// What a host gets that is admitted.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinReply {
    certificate: Certificate,
    directory: EtcdConfig,
}

/// What an issuer does: it makes tokens, admits hosts and renews certificates.
#[derive(Debug)]
pub struct Admission {
    authority: Authority,
    directory: Directory,
    etcd: EtcdConfig,
}

impl Admission {
    /// With the authority's key, for the cluster in this directory, which others reach by `etcd`.
    pub fn new(authority: Authority, directory: Directory, etcd: EtcdConfig) -> Self {
        Self { authority, directory, etcd }
    }

    /// The directory that it writes.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// A token for `uses` hosts, good for some time; `addresses` are where this host listens.
    ///
    /// # Errors
    /// When a bound is passed, or the directory cannot be written.
    pub async fn create_token(
        &self,
        valid_for: Duration,
        uses: u32,
        addresses: Vec<SocketAddr>,
    ) -> Result<JoinToken, AdmissionError> {
        check_addresses(&addresses).map_err(AdmissionError::Invalid)?;
        if valid_for > MAX_TOKEN_LIFETIME || !(1..=MAX_TOKEN_USES).contains(&uses) {
            let days = MAX_TOKEN_LIFETIME.as_secs() / (24 * 60 * 60);
            let message =
                format!("a token is good for at most {days} days, and for 1 to {MAX_TOKEN_USES} hosts");
            return Err(AdmissionError::Invalid(message));
        }
        let token = JoinToken::generate(self.authority.fingerprint(), addresses)?;
        let record = TokenRecord {
            secret: token.secret_fingerprint(),
            expires: jiff::Timestamp::now() + valid_for,
            uses_left: uses,
            used_by: Vec::new(),
        };
        self.directory.put_token(&token.id, &record).await?;
        Ok(token)
    }

    /// Admits a host, or says why not. The token's use and the membership are written at once.
    ///
    /// # Errors
    /// See [`JoinRefusal`].
    pub async fn admit(&self, request: &JoinRequest) -> Result<JoinReply, JoinRefusal> {
        let key = request.checked_key()?;
        let id = key.host_id();
        for _ in 0..ATTEMPTS {
            let view = self.directory.view();
            if !view.is_fresh() {
                return Err(JoinRefusal::NotNow("its directory cannot be reached".to_owned()));
            }
            let token = view.tokens.get(&request.token).ok_or(JoinRefusal::TokenUnknown)?;
            if token.value.secret != Fingerprint::of(request.secret.as_bytes()) {
                return Err(JoinRefusal::TokenUnknown);
            }
            if token.value.expires <= jiff::Timestamp::now() {
                return Err(JoinRefusal::TokenExpired);
            }
            let known = view.members.get(id);
            if known.is_some_and(|known| known.name == request.name) && token.value.used_by.contains(&id) {
                // It was admitted, and did not hear of it.
                return self.reply(&request.name, key);
            }
            if token.value.uses_left == 0 {
                return Err(JoinRefusal::TokenUsedUp);
            }
            if known.is_some() {
                return Err(JoinRefusal::Invalid("this host is a member already".to_owned()));
            }
            if view.members.named(&request.name).is_some() {
                return Err(JoinRefusal::NameTaken(request.name.clone()));
            }
            let mut used = TokenRecord::clone(&token.value);
            used.uses_left -= 1;
            used.used_by.push(id);
            let member = Member {
                id,
                name: request.name.clone(),
                addresses: request.addresses.clone(),
                issuer: false,
                draining: false,
                joined: jiff::Timestamp::now(),
            };
            match self.directory.admit(&member, Some((&request.token, token.revision, &used))).await {
                Ok(()) => {
                    tracing::info!(host = %id, name = %member.name, "a host has joined the cluster");
                    return self.reply(&request.name, key);
                }
                // Another host joined at this moment: look again.
                Err(DirectoryError::Conflict { .. } | DirectoryError::Exists { .. }) => {}
                Err(error) => return Err(JoinRefusal::NotNow(error.to_string())),
            }
        }
        Err(JoinRefusal::NotNow("too many hosts join at once".to_owned()))
    }

    fn reply(&self, name: &HostName, key: PublicKey) -> Result<JoinReply, JoinRefusal> {
        let certificate = self
            .authority
            .issue(name, key, false, SystemTime::now())
            .map_err(|error| JoinRefusal::NotNow(error.to_string()))?;
        Ok(JoinReply { certificate, directory: self.etcd.clone() })
    }

    /// A new certificate for a member that has shown its present one.
    ///
    /// # Errors
    /// When it is no member, or the certificate cannot be made.
    pub fn renew(&self, host: HostId, key: PublicKey) -> Result<Certificate, AdmissionError> {
        let members = self.directory.members();
        let member = members.borrow().get(host).cloned();
        let member = member.filter(|_| key.host_id() == host);
        let member = member.ok_or(DirectoryError::Missing { what: format!("host {host}") })?;
        // Only those that hold the key speak for the authority, and they renew their own.
        Ok(self.authority.issue(&member.name, key, false, SystemTime::now())?)
    }

    /// A new certificate for this issuer itself.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn renew_own(&self, folder: &Path, credentials: &Credentials) -> Result<Credentials, AdmissionError> {
        let name = credentials.name().clone();
        let certificate = self.authority.issue(&name, credentials.key().public(), true, SystemTime::now())?;
        Ok(Credentials::store(folder, name, self.authority.fingerprint(), certificate)?)
    }
}

/// How often a host that others come between is tried to be admitted.
const ATTEMPTS: usize = 32;

/// Makes a cluster: the authority and this host's key in the folder, this host as the first member in etcd.
///
/// Made again after it failed half-way, it goes on from there.
///
/// # Errors
/// When this host is in a cluster, or etcd has one of this authority with other members, or cannot be reached.
pub async fn found(
    folder: &Path,
    name: HostName,
    addresses: Vec<SocketAddr>,
    etcd: &EtcdConfig,
    options: Options,
) -> Result<(Credentials, Admission), AdmissionError> {
    check_addresses(&addresses).map_err(AdmissionError::Invalid)?;
    if let Some(credentials) = Credentials::open(folder)? {
        return Err(AdmissionError::MemberAlready { name: credentials.name().clone() });
    }
    let authority = match Authority::open(folder) {
        Err(AuthorityError::Missing { .. }) => Authority::create(folder)?,
        opened => opened?,
    };
    let key = HostKey::open_or_create(folder)?;
    let directory = Directory::etcd(etcd, authority.fingerprint(), key.host_id(), options)?;
    let view = directory.fresh(DIRECTORY_LIMIT).await?;
    let member = Member {
        id: key.host_id(),
        name: name.clone(),
        addresses,
        issuer: true,
        draining: false,
        joined: jiff::Timestamp::now(),
    };
    if view.members.get(member.id).is_none_or(|known| known.name != name) {
        directory.found(&member).await?;
    }
    // Last: with this file, the host is in the cluster.
    let certificate = authority.issue(&name, key.public(), true, SystemTime::now())?;
    let credentials = Credentials::store(folder, name, authority.fingerprint(), certificate)?;
    Ok((credentials, Admission::new(authority, directory, etcd.clone())))
}

/// Joins the cluster of a token: this host's key and certificate are in the folder then. The configuration is how the
/// cluster's etcd is reached; the caller keeps it.
///
/// # Errors
/// When this host is in a cluster, the token's cluster cannot be reached, or refuses.
pub async fn join(
    folder: &Path,
    token: &JoinToken,
    name: HostName,
    addresses: Vec<SocketAddr>,
) -> Result<(Credentials, EtcdConfig), AdmissionError> {
    check_addresses(&addresses).map_err(AdmissionError::Invalid)?;
    if let Some(credentials) = Credentials::open(folder)? {
        return Err(AdmissionError::MemberAlready { name: credentials.name().clone() });
    }
    let key = HostKey::open_or_create(folder)?;
    let request = JoinRequest::new(token, &key, name.clone(), addresses)?;
    let client = Arc::new(tls::joining_client(token.authority)?);
    let mut tried = Vec::new();
    for address in &token.addresses {
        let asked = tokio::time::timeout(JOIN_LIMIT, ask(*address, Arc::clone(&client), &request)).await;
        match asked.unwrap_or_else(|_| Err(format!("no answer within {JOIN_LIMIT:?}"))) {
            Ok(Ok(reply)) => {
                let credentials = Credentials::store(folder, name, token.authority, reply.certificate)?;
                return Ok((credentials, reply.directory));
            }
            Ok(Err(refusal)) => return Err(refusal.into()),
            Err(problem) => tried.push((*address, problem)),
        }
    }
    Err(AdmissionError::Unreachable { tried })
}

async fn ask(
    address: SocketAddr,
    client: Arc<rustls::ClientConfig>,
    request: &JoinRequest,
) -> Result<Result<JoinReply, JoinRefusal>, String> {
    let stream = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(address))
        .await
        .map_err(|_| "cannot be reached".to_owned())?
        .map_err(|error| error.to_string())?;
    // Only after this is the other side known to be the token's cluster, and an issuer.
    let stream = tokio_rustls::TlsConnector::from(client)
        .connect(tls::issuer_name(), stream)
        .await
        .map_err(|error| format!("it is not an issuer of the token's cluster: {error}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let body = serde_json::to_vec(request).map_err(|error| error.to_string())?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(JOIN_PATH)
        .header(hyper::header::HOST, "cluster")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    // Ends with the sender, or when the other side closes.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), JOIN_REPLY_BYTES_MAX).collect().await;
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    let not_understood =
        |error: serde_json::Error| format!("its answer ({status}) is not understood: {error}");
    if status == StatusCode::OK {
        serde_json::from_slice(&body).map(Ok).map_err(not_understood)
    } else {
        serde_json::from_slice(&body).map(Err).map_err(not_understood)
    }
}
