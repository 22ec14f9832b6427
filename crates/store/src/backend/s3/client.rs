//! Requests: sent by a runtime of the backend's own, tried again when it may help, and failing in clear words.
//!
//! Invariants:
//! * At most [`REQUESTS_AT_ONCE`] requests are under way, renewals of sessions not counted: these wait for nobody.
//! * A request is tried again only within its patience, which is counted while the computer sleeps too: what was meant
//!   for one moment is not done hours later.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use nix::time::{ClockId, clock_gettime};
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Semaphore;

use super::http::{Connector, innermost};
use super::settings::{S3Settings, S3Timing};
use crate::backend::Object;
use crate::error::{Damage, RemoteProblem, StoreError};

/// Enough to hide the latency of a server far away; each holds a few MiB at most.
const REQUESTS_AT_ONCE: usize = 32;
/// The slowest way on which a try still succeeds, in bytes a second.
const SLOWEST_BYTES_PER_S: u64 = 128 << 10;
const CONNECT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How much of what a server says is passed on.
const DETAIL_CHARS: usize = 300;
/// How often `create` looks again what holds its key.
const LOOKS: usize = 5;

/// A bucket, or a part of one.
#[derive(Debug)]
pub(super) struct Client {
    store: AmazonS3,
    place: Place,
    pub(super) timing: S3Timing,
    runtime: Option<Runtime>,
    permits: Semaphore,
    /// The server has answered once.
    reached: AtomicBool,
    /// It has been seen to refuse a second creation.
    pub(super) creates_once: AtomicBool,
}

/// What messages say of where something is.
#[derive(Debug)]
struct Place {
    /// `s3://bucket/prefix`
    url: String,
    prefix: String,
    server: String,
}

/// A request that has failed for good.
#[derive(Debug)]
struct Failed {
    /// `None`: the last try got no answer in time.
    error: Option<Error>,
    attempts: u32,
    elapsed: Duration,
}

impl Client {
    pub(super) fn new(settings: &S3Settings) -> Result<Self, StoreError> {
        let misconfigured = |detail: String| StoreError::Remote {
            action: "use",
            object: settings.to_string(),
            server: settings.server(),
            problem: RemoteProblem::Misconfigured,
            detail,
        };
        let builder = match &settings.credentials {
            Some(credentials) => {
                let builder = AmazonS3Builder::new()
                    .with_access_key_id(&credentials.access_key_id)
                    .with_secret_access_key(&credentials.secret_access_key);
                match &credentials.session_token {
                    Some(token) => builder.with_token(token),
                    None => builder,
                }
            }
            None => AmazonS3Builder::from_env(),
        };
        let mut builder = builder
            .with_bucket_name(&settings.bucket)
            .with_region(&settings.region)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            // Tried again here, where it is known what is unclear after a try.
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() });
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint).with_allow_http(endpoint.starts_with("http://"));
        }
        let connector = Connector::new(CONNECT, REQUESTS_AT_ONCE)
            .map_err(|error| misconfigured(format!("the system's certificates cannot be read: {error}")))?;
        let store = builder
            .with_http_connector(connector)
            .build()
            .map_err(|error| misconfigured(innermost(&error).to_string()))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("store-s3")
            .enable_all()
            .build()
            .map_err(|error| misconfigured(format!("its threads cannot be started: {error}")))?;
        Ok(Self {
            store,
            place: Place {
                url: settings.to_string(),
                prefix: settings.prefix.clone(),
                server: settings.server(),
            },
            timing: settings.timing,
            runtime: Some(runtime),
            permits: Semaphore::new(REQUESTS_AT_ONCE),
            reached: AtomicBool::new(false),
            creates_once: AtomicBool::new(false),
        })
    }

    /// What to call an object in messages.
    pub(super) fn locate(&self, key: &str) -> PathBuf {
        self.place.locate(key).into()
    }

    pub(super) fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("it is there until it is dropped").handle()
    }

    /// Lets the runtime do something, and waits for it. Works on any thread, also on another runtime's.
    pub(super) fn wait<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (tell, told) = mpsc::sync_channel(1);
        self.handle().spawn(async move { tell.send(future.await) });
        told.recv().expect("requests do not panic")
    }

    fn path(&self, key: &str) -> Path {
        self.place.path(key)
    }

    /// All of an object. One that is longer than `limit_bytes` is damaged.
    pub(super) async fn get(&self, key: &str, limit_bytes: u64) -> Result<Option<Bytes>, StoreError> {
        let path = self.path(key);
        let got = self
            .retrying(limit_bytes.min(64 << 20), || async {
                let found = self.store.get_opts(&path, GetOptions::default()).await?;
                let length = found.meta.size;
                if length > limit_bytes {
                    return Ok(Err(length));
                }
                found.bytes().await.map(Ok)
            })
            .await;
        match got {
            Ok(Ok(bytes)) => Ok(Some(bytes)),
            Ok(Err(actual_bytes)) => {
                let damage = Damage::Length { expected_bytes: limit_bytes, actual_bytes };
                Err(StoreError::corrupt(&self.locate(key), damage))
            }
            Err(failed) if failed.is_missing() => Ok(None),
            Err(failed) => Err(self.failed("read", key, &failed)),
        }
    }

    /// A part of an object, which has to be there.
    pub(super) async fn get_range(&self, key: &str, from: u64, bytes: u64) -> Result<Bytes, StoreError> {
        let path = self.path(key);
        let got = self
            .retrying(bytes, || async {
                let range = Some(GetRange::Bounded(from..from + bytes));
                let options = GetOptions { range, ..GetOptions::default() };
                self.store.get_opts(&path, options).await?.bytes().await
            })
            .await;
        let corrupt = |damage| Err(StoreError::corrupt(&self.locate(key), damage));
        let short = Damage::Unreadable { offset: Some(from), kind: std::io::ErrorKind::UnexpectedEof };
        match got {
            Ok(got) if got.len() as u64 == bytes => Ok(got),
            Ok(_) => corrupt(short),
            Err(failed) if failed.is_missing() => corrupt(Damage::Missing),
            Err(failed) if failed.is_beyond_the_end() => corrupt(short),
            Err(failed) => Err(self.failed("read", key, &failed)),
        }
    }

    /// What is known of an object.
    pub(super) async fn head(&self, key: &str) -> Result<Option<ObjectMeta>, StoreError> {
        let path = self.path(key);
        match self.retrying(0, || self.store.head(&path)).await {
            Ok(found) => Ok(Some(found)),
            Err(failed) if failed.is_missing() => Ok(None),
            Err(failed) => Err(self.failed("examine", key, &failed)),
        }
    }

    pub(super) async fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError> {
        let prefix = self.path(folder);
        let prefix = (!prefix.as_ref().is_empty()).then_some(&prefix);
        let listed = self
            .retrying(0, || self.store.list_with_delimiter(prefix))
            .await
            .map_err(|failed| self.failed("list", folder, &failed))?;
        // Some servers show a folder as an object in itself.
        let inside = listed.objects.iter().filter(|object| Some(&object.location) != prefix);
        let objects = inside.filter_map(|object| {
            Some(Object {
                name: object.location.filename()?.to_owned(),
                bytes: object.size,
                modified: object.last_modified.into(),
            })
        });
        let folders = listed.common_prefixes.iter().filter_map(|folder| {
            let name = folder.filename()?.to_owned();
            Some(Object { name, bytes: 0, modified: SystemTime::UNIX_EPOCH })
        });
        Ok(objects.chain(folders).collect())
    }

    /// Writes an object, in place of what may be there.
    pub(super) async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(key);
        let put = self.retrying(bytes.len() as u64, || {
            self.store.put_opts(&path, bytes.clone().into(), PutOptions::default())
        });
        put.await.map(drop).map_err(|failed| self.failed("write", key, &failed))
    }

    /// The same by one try, for which nothing else is waited.
    pub(super) async fn put_at_once(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(key);
        let put = self.store.put_opts(&path, bytes.into(), PutOptions::default());
        let error = match tokio::time::timeout(self.timing.attempt, put).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        };
        Err(self.failed("write", key, &Failed { error, attempts: 1, elapsed: self.timing.attempt }))
    }

    /// Writes an object that must not be there yet. `false`: it is there.
    pub(super) async fn create(&self, key: &str, bytes: Bytes) -> Result<bool, StoreError> {
        let path = self.path(key);
        let options = PutOptions::from(PutMode::Create);
        for _ in 0..LOOKS {
            let put = self.retrying(bytes.len() as u64, || {
                self.store.put_opts(&path, bytes.clone().into(), options.clone())
            });
            match put.await {
                Ok(_) => return Ok(true),
                Err(failed) if failed.is_there() => {
                    let found = match self.get(key, bytes.len() as u64).await {
                        Err(error) if error.is_damage() => return Ok(false),
                        found => found?,
                    };
                    match found {
                        // A try of which no answer came may have been ours.
                        Some(found) => return Ok(failed.attempts > 1 && found == bytes),
                        // It was removed just now, or two came at the same moment, and none was let through.
                        None => continue,
                    }
                }
                Err(failed) => return Err(self.failed("create", key, &failed)),
            }
        }
        Ok(false)
    }

    /// Whether the server refuses to create what is there; many that do not know the condition overwrite it.
    pub(super) async fn refuses_to_create(&self, key: &str, same: Bytes) -> Result<bool, StoreError> {
        let path = self.path(key);
        let put = self.retrying(0, || {
            self.store.put_opts(&path, same.clone().into(), PutOptions::from(PutMode::Create))
        });
        match put.await {
            Ok(_) => Ok(false),
            Err(failed) if failed.is_there() => Ok(true),
            Err(failed) => Err(self.failed("create", key, &failed)),
        }
    }

    /// Removes an object, if it is there.
    pub(super) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key);
        match self.retrying(0, || self.store.delete(&path)).await {
            Ok(()) => Ok(()),
            Err(failed) if failed.is_missing() => Ok(()),
            Err(failed) => Err(self.failed("remove", key, &failed)),
        }
    }

    /// The error that says that the server does not know conditions.
    pub(super) fn unconditional(&self, key: &str) -> StoreError {
        StoreError::Remote {
            action: "create",
            object: self.place.locate(key),
            server: self.place.server.clone(),
            problem: RemoteProblem::Unconditional,
            detail: String::new(),
        }
    }

    async fn retrying<T, F>(&self, bytes: u64, attempt: impl Fn() -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let _permit = self.permits.acquire().await.expect("it is never closed");
        let limit = self.timing.attempt + Duration::from_secs(bytes / SLOWEST_BYTES_PER_S);
        let begun = elapsed_time();
        let mut pause = FIRST_PAUSE;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let error = match tokio::time::timeout(limit, attempt()).await {
                Ok(Ok(done)) => {
                    self.reached.store(true, Ordering::Relaxed);
                    return Ok(done);
                }
                Ok(Err(error)) => Some(error),
                Err(_) => None,
            };
            let elapsed = elapsed_time().saturating_sub(begun);
            let failed = Failed { error, attempts, elapsed };
            let reached = self.reached.load(Ordering::Relaxed);
            let patience = if reached { self.timing.patience } else { self.timing.first_patience };
            if !failed.may_pass() || elapsed + pause > patience {
                return Err(failed);
            }
            tracing::debug!(error = ?failed.error, attempts, "a request to the store is tried again");
            // Clients that were cut off at the same moment do not all come back at the same moment.
            let spread = pause.mul_f64(0.5 + 0.5 * f64::from(random_byte()) / 255.0);
            tokio::time::sleep(spread).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn failed(&self, action: &'static str, key: &str, failed: &Failed) -> StoreError {
        let mut detail = failed.detail();
        if failed.attempts > 1 {
            let seconds = failed.elapsed.as_secs_f64();
            detail = format!("{detail} (tried {} times in {seconds:.0} s)", failed.attempts);
        }
        StoreError::Remote {
            action,
            object: self.place.locate(key),
            server: self.place.server.clone(),
            problem: failed.problem(),
            detail,
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which is not allowed on another runtime's.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Place {
    fn locate(&self, key: &str) -> String {
        if key.is_empty() { self.url.clone() } else { format!("{}/{key}", self.url) }
    }

    fn path(&self, key: &str) -> Path {
        // Keys and prefixes are made of what needs no escaping.
        match (self.prefix.is_empty(), key.is_empty()) {
            (true, _) => Path::from(key),
            (false, true) => Path::from(&*self.prefix),
            (false, false) => Path::from(format!("{}/{key}", self.prefix)),
        }
    }
}

impl Failed {
    fn is_missing(&self) -> bool {
        matches!(&self.error, Some(Error::NotFound { .. })) && !self.text().contains("NoSuchBucket")
    }

    fn is_there(&self) -> bool {
        matches!(&self.error, Some(Error::AlreadyExists { .. } | Error::Precondition { .. }))
    }

    fn is_beyond_the_end(&self) -> bool {
        self.status() == Some(416)
    }

    /// Whether another try may succeed.
    fn may_pass(&self) -> bool {
        match &self.error {
            None => true,
            Some(Error::Generic { .. }) => match self.status() {
                Some(status) => status >= 500 || status == 408 || status == 429,
                // It did not come so far as to have one.
                None => true,
            },
            Some(_) => false,
        }
    }

    fn problem(&self) -> RemoteProblem {
        let text = self.text();
        match (&self.error, self.status()) {
            (None, _) => RemoteProblem::Silent,
            (Some(Error::NotFound { .. }), _) => RemoteProblem::NoBucket,
            (Some(Error::PermissionDenied { .. } | Error::Unauthenticated { .. }), _) => {
                RemoteProblem::Denied
            }
            (Some(_), Some(status)) if status >= 500 || status == 429 => RemoteProblem::Failing,
            (Some(_), Some(_)) if text.contains("NoSuchBucket") => RemoteProblem::NoBucket,
            (Some(_), Some(_)) => RemoteProblem::Refused,
            (Some(Error::Generic { .. }), None) if text.contains("169.254.") => RemoteProblem::NoCredentials,
            (Some(Error::Generic { .. }), None) => RemoteProblem::Unreachable,
            (Some(_), None) => RemoteProblem::Refused,
        }
    }

    /// The HTTP status, which errors only show in their text.
    fn status(&self) -> Option<u16> {
        let text = self.text();
        let (_, rest) = text.split_once("status code: ")?;
        rest.get(..3)?.parse().ok()
    }

    fn text(&self) -> String {
        let Some(error) = &self.error else { return String::new() };
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }

    /// What the server, or the way to it, has to say.
    fn detail(&self) -> String {
        let Some(error) = &self.error else { return "no answer came in time".to_owned() };
        let text = self.text();
        let tag = |name: &str| {
            let (_, rest) = text.split_once(&format!("<{name}>"))?;
            rest.split_once(&format!("</{name}>")).map(|(value, _)| value.to_owned())
        };
        let detail = match (tag("Code"), tag("Message")) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code,
            _ => match self.status() {
                Some(status) => format!("status {status}"),
                None => innermost(error).to_string(),
            },
        };
        detail.chars().filter(|c| !c.is_control()).take(DETAIL_CHARS).collect()
    }
}

/// How long it has been since some moment, also while the computer slept.
pub(super) fn elapsed_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

fn random_byte() -> u8 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) as u8
}

/// For what outlives a call.
pub(super) type Shared = Arc<Client>;
