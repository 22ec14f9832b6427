//! One request that takes time: where its progress goes, and whether it is still wanted.
//!
//! Invariant: an operation that finds itself cancelled undoes what it began and returns
//! [`ErrorKind::Cancelled`]; once it has passed its point of no return it does not ask any more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use diorama_api::{ApiError, ErrorKind, Progress, ProgressUnit};
use tokio::sync::mpsc::UnboundedSender;

/// What an operation tells its client before it ends.
#[derive(Debug, Clone)]
pub(crate) enum Notice {
    /// Something moved on.
    Progress(Progress),
    /// Something that the user should know.
    Warning(String),
}

/// Handed to everything that works on behalf of one request.
#[derive(Debug, Clone)]
pub(crate) struct Operation {
    /// None for what no client asked for.
    notices: Option<UnboundedSender<Notice>>,
    withdrawn: Arc<AtomicBool>,
}

impl Operation {
    /// An operation that reports to `notices`; when the receiver is dropped, it is cancelled.
    pub(crate) fn new(notices: UnboundedSender<Notice>) -> Self {
        Self { notices: Some(notices), withdrawn: Arc::default() }
    }

    /// An operation that no client of this agent asked for: it ends when it is withdrawn.
    pub(crate) fn unattended() -> Self {
        Self { notices: None, withdrawn: Arc::default() }
    }

    /// Names the step that begins now.
    pub(crate) fn step(&self, step: &str) {
        self.send(Notice::Progress(Progress {
            step: step.to_owned(),
            done: None,
            total: None,
            unit: ProgressUnit::Items,
        }));
    }

    /// Says how many bytes of the step are done.
    pub(crate) fn bytes(&self, step: &str, done: u64, total: u64) {
        self.send(Notice::Progress(Progress {
            step: step.to_owned(),
            done: Some(done),
            total: Some(total),
            unit: ProgressUnit::Bytes,
        }));
    }

    /// Tells the user something that does not stop the operation.
    pub(crate) fn warn(&self, message: impl Into<String>) {
        let message = message.into();
        tracing::warn!("{message}");
        self.send(Notice::Warning(message));
    }

    /// Cancels the operation from inside the agent (it is stopping, say).
    pub(crate) fn withdraw(&self) {
        self.withdrawn.store(true, Ordering::Relaxed);
    }

    /// Whether nobody waits for this operation any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.withdrawn.load(Ordering::Relaxed)
            || self.notices.as_ref().is_some_and(UnboundedSender::is_closed)
    }

    /// Returns an error when nobody waits any more.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        if self.is_cancelled() {
            return Err(ApiError::new(ErrorKind::Cancelled, "cancelled; everything begun was undone"));
        }
        Ok(())
    }

    /// [`check`](Self::check) for what reads or writes: the error says no more, as whoever sees it asks here why.
    pub(crate) fn check_io(&self) -> io::Result<()> {
        if self.is_cancelled() { Err(io::Error::other("cancelled")) } else { Ok(()) }
    }

    fn send(&self, notice: Notice) {
        if let Some(notices) = &self.notices {
            // A client that has gone is noticed by `is_cancelled`.
            let _ = notices.send(notice);
        }
    }
}
