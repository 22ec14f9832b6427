//! How many threads work at a time, of those that each do one machine's slow work.

use std::sync::{Condvar, Mutex, PoisonError};

/// How many of them get on best.
pub(super) fn threads_beside(machines_run: bool) -> usize {
    let processors = crate::processors::count();
    // Guests need the rest. Niceness does not give it to them where threads are grouped by session.
    if machines_run { (processors / 2).max(1) } else { processors }
}

/// Lets so many threads go on at a time.
pub(super) struct Turns {
    count: usize,
    left: Mutex<usize>,
    ended: Condvar,
}

/// One of them goes on until this is dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    pub(super) fn new(count: usize) -> Self {
        Self { count, left: Mutex::new(count), ended: Condvar::new() }
    }

    /// How many go on at a time.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Waits for a turn.
    pub(super) fn take(&self) -> Turn<'_> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = self.ended.wait_while(left, |left| *left == 0).unwrap_or_else(PoisonError::into_inner);
        *left -= 1;
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.left.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.ended.notify_one();
    }
}
