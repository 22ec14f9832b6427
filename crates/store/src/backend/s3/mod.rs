//! A store in a bucket of any server that speaks S3.
//!
//! Keys are those of a folder, below the prefix that the user chose. What the folder has from its file system, this has
//! from two promises of S3: an object that was written is seen by every later read and list, and of several writers
//! that create a key (`If-None-Match: *`) one succeeds. A server that does not know that condition is refused.
//!
//! ```text
//! <prefix>/<folder>/<name>              objects, as in a folder
//! <prefix>/sessions/<random>            a session, renewed as long as its writer lives
//! <prefix>/sessions/<random>.verdict    how it ended: by its writer's commit, or by others who had waited long enough
//! <prefix>/cache/clock                  written to learn the server's time
//! ```
//!
//! # Staging
//!
//! A staged object is uploaded at once to its key, in the background, some at a time; `publish` waits for that. So it
//! is visible before it is published. That does no harm: an object is there whole or not at all, it is durable once it
//! is there, its key is never used again, and whoever relies on it holds a session of its own. It saves a copy (S3
//! cannot rename), hides the upload behind the capture, and a snapshot that is tried again after a failure finds what
//! had been uploaded. What an aborted session has uploaded is not removed by it, since others may rely on it by then;
//! the next collection finds that nobody does.
//!
//! Objects are sent whole: packs have 16 MiB. Several parts would make them visible no earlier, and parts that a dead
//! writer left would be paid for and shown by no list of objects.
//!
//! # Sessions
//!
//! See [`session`], and docs/store-format.md for why it is safe.

mod client;
mod http;
mod session;
mod settings;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use self::client::{Client, Shared};
use super::{Backend, Object, Reading, Recovered, Session};
use crate::error::StoreError;

pub use settings::{S3Credentials, S3Settings, S3Timing};

/// Reading is worth doing in large pieces, many at once: each request takes a way to the server and back.
const READING: Reading =
    Reading { at_once: 16, run_bytes: 4 << 20, gap_bytes: 256 << 10, node_bytes: 1 << 20 };

/// Objects in a bucket.
#[derive(Debug)]
pub struct S3 {
    client: Shared,
}

impl S3 {
    /// Nothing is asked of the server yet.
    ///
    /// # Errors
    /// When the settings make no sense.
    pub fn open(settings: &S3Settings) -> Result<Self, StoreError> {
        Ok(Self { client: Arc::new(Client::new(settings)?) })
    }

    /// Does something with the client and a key, and waits for it.
    fn run<T, F>(&self, key: &str, work: impl FnOnce(Shared, String) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.client.wait(work(Arc::clone(&self.client), key.to_owned()))
    }
}

impl Backend for S3 {
    fn locate(&self, key: &str) -> PathBuf {
        self.client.locate(key)
    }

    fn read(&self, key: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.run(key, move |client, key| async move { client.get(&key, limit_bytes).await })?;
        Ok(found.map(Vec::from))
    }

    fn read_range(&self, key: &str, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        if buffer.is_empty() {
            return Ok(());
        }
        let bytes = buffer.len() as u64;
        let got =
            self.run(key, move |client, key| async move { client.get_range(&key, offset, bytes).await })?;
        buffer.copy_from_slice(&got);
        Ok(())
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>, StoreError> {
        self.run(folder, |client, folder| async move { client.list(&folder).await })
    }

    fn length(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let found = self.run(key, |client, key| async move { client.head(&key).await })?;
        Ok(found.map(|found| found.size))
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        let bytes = Bytes::copy_from_slice(bytes);
        self.run(key, |client, key| async move { client.create(&key, bytes).await })
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let bytes = Bytes::copy_from_slice(bytes);
        self.run(key, |client, key| async move { client.put(&key, bytes).await })
    }

    /// Between looking and removing somebody else may do the same: of two that remove an object at the same moment both
    /// may be told that it was there. With `only`, see docs/store-format.md for what names make of that.
    fn remove(&self, key: &str, only: Option<&[u8]>) -> Result<bool, StoreError> {
        let only = only.map(<[u8]>::to_vec);
        self.run(key, |client, key| async move {
            let there = match only {
                Some(only) => match client.get(&key, only.len() as u64).await {
                    Err(error) if error.is_damage() => false,
                    found => found?.is_some_and(|found| found == only),
                },
                None => client.head(&key).await?.is_some(),
            };
            if there {
                client.delete(&key).await?;
            }
            Ok(there)
        })
    }

    fn begin(&self) -> Result<Box<dyn Session>, StoreError> {
        Ok(Box::new(session::S3Session::begin(&self.client)?))
    }

    fn sessions(&self) -> Result<usize, StoreError> {
        let judged = self.run("", |client, _| async move { session::judge(&client).await })?;
        Ok(judged.alive)
    }

    fn recover(&self) -> Result<Recovered, StoreError> {
        let judged = self.run("", |client, _| async move { session::judge(&client).await })?;
        Ok(Recovered { sessions: judged.ended, bytes: 0, failed: judged.failed })
    }

    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        Ok(None)
    }

    fn reading(&self) -> Reading {
        READING
    }
}
