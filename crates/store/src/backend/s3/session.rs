//! Sessions without locks.
//!
//! ```text
//!             renewed, renewed, ...
//!  begin ──> sessions/<x> ────────────────┬── end: removed
//!                │                        │
//!                │ not renewed in time    │ confirm: sessions/<x>.verdict created with "commits"
//!                │                        │
//!                ▼ judge, on any host     ▼
//!         .verdict created with "ended"   what needs the session becomes visible, then end
//! ```
//!
//! A session is an object that its writer writes again every [`S3Timing::renew`](super::S3Timing). Whoever wants to know
//! who is alive writes an object of its own, and so learns the server's time: a session whose object is older than
//! `expiry` by that time has ended. No clock of any client is asked.
//!
//! That alone would not be safe: a writer may be stopped for any time between looking at its clock and committing. So
//! both sides have to *create the same object*, the verdict, and one of them succeeds: a writer before it commits, others
//! before they take a session for dead. A wrong guess about time costs a live writer its snapshot, with a clear error,
//! and never a snapshot its packs.
//!
//! A writer that has created the verdict creates the manifest next, and removes session and verdict. If it dies in
//! between, nobody knows whether the manifest is still on its way. So the session counts as alive until the verdict is
//! older than `in_flight`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;

use super::client::{Client, Shared, elapsed_time};
use crate::backend::{Object, Session};
use crate::error::StoreError;
use crate::keys::hex;
use crate::seal::random_bytes;

const SESSIONS: &str = "sessions";
const VERDICT: &str = ".verdict";
const CLOCK: &str = "cache/clock";
/// Enough to fill a fast line; each holds a pack of 16 MiB in memory.
const UPLOADS_AT_ONCE: usize = 6;
const COMMITS: &[u8] = b"commits\n";
const ENDED: &[u8] = b"ended\n";

/// What became known of all sessions.
#[derive(Debug, Default)]
pub(super) struct Judged {
    /// Sessions that count.
    pub(super) alive: usize,
    /// Sessions that were ended just now.
    pub(super) ended: usize,
    /// What could not be removed.
    pub(super) failed: Vec<StoreError>,
}

#[derive(Debug)]
pub(super) struct S3Session {
    client: Shared,
    key: String,
    lease: Arc<Lease>,
    /// Told to stop renewing; the renewal under way is waited for.
    stop: watch::Sender<bool>,
    renewing: Mutex<Option<JoinHandle<()>>>,
    slots: Arc<Semaphore>,
    uploads: Mutex<BTreeMap<String, JoinHandle<()>>>,
    /// The first upload that failed.
    failed: Arc<Mutex<Option<StoreError>>>,
    confirmed: AtomicBool,
    ended: bool,
}

/// How long a session counts, as its writer knows for certain.
#[derive(Debug)]
struct Lease {
    key: String,
    /// When the last renewal that succeeded was sent, by [`elapsed_time`].
    renewed: Mutex<Duration>,
    lasts: Duration,
    /// It did not count at some time: it never will again.
    lost: AtomicBool,
}

impl S3Session {
    pub(super) fn begin(client: &Shared) -> Result<Self, StoreError> {
        let key = format!("{SESSIONS}/{}", hex::encode(&random_bytes::<16>()));
        // For people who look into the bucket.
        let host = nix::unistd::gethostname().unwrap_or_default();
        let host = host.to_string_lossy().chars().filter(char::is_ascii_graphic).collect::<String>();
        let text = Bytes::from(format!("process {} on {host}\n", std::process::id()));
        let sent = elapsed_time();
        let created = {
            let (client, key, text) = (Arc::clone(client), key.clone(), text.clone());
            move || async move {
                client.create(&key, text.clone()).await?;
                if !client.creates_once.load(Ordering::Relaxed) {
                    if !client.refuses_to_create(&key, text).await? {
                        client.delete(&key).await?;
                        return Err(client.unconditional(&key));
                    }
                    client.creates_once.store(true, Ordering::Relaxed);
                }
                Ok(())
            }
        };
        client.wait(created())?;
        let lease = Arc::new(Lease {
            key: client.locate(&key).display().to_string(),
            renewed: Mutex::new(sent),
            lasts: client.timing.expiry.mul_f64(0.8),
            lost: AtomicBool::new(false),
        });
        let (stop, stopped) = watch::channel(false);
        let renewing = renew(Arc::clone(client), key.clone(), text, Arc::clone(&lease), stopped);
        let renewing = client.handle().spawn(renewing);
        Ok(Self {
            client: Arc::clone(client),
            key,
            lease,
            stop,
            renewing: Mutex::new(Some(renewing)),
            slots: Arc::new(Semaphore::new(UPLOADS_AT_ONCE)),
            uploads: Mutex::default(),
            failed: Arc::default(),
            confirmed: AtomicBool::new(false),
            ended: false,
        })
    }

    fn upload_failed(&self) -> Result<(), StoreError> {
        lock(&self.failed).take().map_or(Ok(()), Err)
    }

    /// Waits for the renewal under way, so that none comes after the end.
    fn stop_renewing(&self) {
        self.stop.send_replace(true);
        let renewing = lock(&self.renewing).take();
        if let Some(renewing) = renewing {
            self.client.wait(async move { drop(renewing.await) });
        }
    }

    fn remove(&self) -> Result<(), StoreError> {
        for (_, upload) in std::mem::take(&mut *lock(&self.uploads)) {
            upload.abort();
        }
        self.stop_renewing();
        let confirmed = self.confirmed.load(Ordering::Relaxed);
        let (client, key) = (Arc::clone(&self.client), self.key.clone());
        self.client.wait(async move {
            client.delete(&key).await?;
            // After the session: a verdict without one counts for nothing.
            if confirmed { client.delete(&verdict(&key)).await } else { Ok(()) }
        })
    }
}

impl Session for S3Session {
    fn stage(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.check()?;
        self.upload_failed()?;
        let slots = Arc::clone(&self.slots);
        let slot: OwnedSemaphorePermit =
            self.client.wait(async move { slots.acquire_owned().await }).expect("it is never closed");
        let bytes = Bytes::copy_from_slice(bytes);
        let (client, failed, key) = (Arc::clone(&self.client), Arc::clone(&self.failed), key.to_owned());
        let upload = {
            let key = key.clone();
            self.client.handle().spawn(async move {
                let put = client.put(&key, bytes).await;
                drop(slot);
                if let Err(error) = put {
                    lock(&failed).get_or_insert(error);
                }
            })
        };
        lock(&self.uploads).insert(key, upload);
        Ok(())
    }

    fn publish(&self, keys: &[String]) -> Result<(), StoreError> {
        let uploads: Vec<JoinHandle<()>> = {
            let mut uploads = lock(&self.uploads);
            keys.iter().map(|key| uploads.remove(key).expect("only what was staged is published")).collect()
        };
        self.client.wait(async move {
            for upload in uploads {
                upload.await.expect("uploads do not panic");
            }
        });
        self.upload_failed()?;
        self.check()
    }

    fn check(&self) -> Result<(), StoreError> {
        self.lease.check()
    }

    fn confirm(&self) -> Result<(), StoreError> {
        self.check()?;
        // From here on it is not known whether the verdict is there.
        self.confirmed.store(true, Ordering::Relaxed);
        let (client, key) = (Arc::clone(&self.client), verdict(&self.key));
        if self.client.wait(async move { client.create(&key, Bytes::from_static(COMMITS)).await })? {
            // How long its request took does not matter: nobody ends this session now.
            return Ok(());
        }
        self.confirmed.store(false, Ordering::Relaxed);
        self.lease.lost.store(true, Ordering::Relaxed);
        self.check()
    }

    fn end(mut self: Box<Self>) -> Result<(), StoreError> {
        self.ended = true;
        self.remove()
    }
}

impl Drop for S3Session {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.confirmed.load(Ordering::Relaxed) {
            // What it confirmed may be on its way still, and keeps it alive; others end it when it cannot be any more.
            self.stop_renewing();
            return;
        }
        if let Err(error) = self.remove() {
            tracing::warn!(session = %self.lease.key, %error, "cannot end a session of the store; it will expire");
        }
    }
}

impl Lease {
    fn check(&self) -> Result<(), StoreError> {
        let since = elapsed_time().saturating_sub(*lock(&self.renewed));
        if since > self.lasts {
            self.lost.store(true, Ordering::Relaxed);
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(StoreError::SessionLost { session: self.key.clone(), silent_s: since.as_secs() });
        }
        Ok(())
    }
}

async fn renew(
    client: Shared,
    key: String,
    text: Bytes,
    lease: Arc<Lease>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut pause = client.timing.renew;
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return,
            () = tokio::time::sleep(pause) => {}
        }
        if lease.check().is_err() {
            // Others may take it for dead, and nobody is served by a sign of life.
            return;
        }
        let sent = elapsed_time();
        match client.put_at_once(&key, text.clone()).await {
            Ok(()) => {
                *lock(&lease.renewed) = sent;
                pause = client.timing.renew;
            }
            Err(error) => {
                tracing::debug!(session = key, %error, "a session of the store could not be renewed");
                pause = client.timing.renew / 8;
            }
        }
    }
}

/// Looks who is alive, and ends the sessions of those who are not.
pub(super) async fn judge(client: &Client) -> Result<Judged, StoreError> {
    let mut judged = Judged::default();
    if client.list(SESSIONS).await?.is_empty() {
        return Ok(judged);
    }
    // The time before the list: so no session looks older than it is.
    let now = server_time(client).await?;
    let listed = client.list(SESSIONS).await?;
    let names: BTreeSet<&str> = listed.iter().map(|object| object.name.as_str()).collect();
    let verdicts: BTreeMap<&str, &Object> =
        listed.iter().filter_map(|object| Some((object.name.strip_suffix(VERDICT)?, object))).collect();
    for object in &listed {
        let name = object.name.as_str();
        let key = format!("{SESSIONS}/{name}");
        let age = age(now, object);
        if let Some(session) = name.strip_suffix(VERDICT) {
            if !names.contains(session) && age > client.timing.remembered {
                judged.note(client.delete(&key).await);
            }
        } else if age <= client.timing.expiry {
            judged.alive += 1;
        } else if is_over(client, &key, verdicts.get(name).copied(), now).await? {
            judged.ended += 1;
            judged.note(client.delete(&key).await);
        } else {
            judged.alive += 1;
        }
    }
    Ok(judged)
}

/// Whether a session that has expired can never commit any more: sees to it that it cannot.
async fn is_over(
    client: &Client,
    key: &str,
    known: Option<&Object>,
    now: SystemTime,
) -> Result<bool, StoreError> {
    let verdict = verdict(key);
    match known {
        None => client.create(&verdict, Bytes::from_static(ENDED)).await,
        Some(known) if age(now, known) > client.timing.in_flight => Ok(true),
        Some(_) => match client.get(&verdict, ENDED.len().max(COMMITS.len()) as u64).await {
            Ok(found) => Ok(found.is_some_and(|found| found == ENDED)),
            Err(error) if error.is_damage() => Ok(false),
            Err(error) => Err(error),
        },
    }
}

impl Judged {
    fn note(&mut self, result: Result<(), StoreError>) {
        self.failed.extend(result.err());
    }
}

/// The server's time, as it gives it to an object that is written now.
async fn server_time(client: &Client) -> Result<SystemTime, StoreError> {
    client.put(CLOCK, Bytes::from_static(b"clock\n")).await?;
    let found = client.head(CLOCK).await?;
    // Without it, nobody is old enough to be dead.
    Ok(found.map_or(SystemTime::UNIX_EPOCH, |found| found.last_modified.into()))
}

fn age(now: SystemTime, object: &Object) -> Duration {
    now.duration_since(object.modified).unwrap_or_default()
}

fn verdict(key: &str) -> String {
    format!("{key}{VERDICT}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
