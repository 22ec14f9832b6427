//! The frames that wait for one port: their encoded bytes in a ring, what we know of each beside it.
//!
//! Owns how far the first frame has been written and how much of the queue may go out (`open`). Does not know of holds
//! (the port does) nor of what a copy's fate means (the ledger does).
//!
//! Invariants:
//! - `ring.len() == sum(4 + frame.len)`: the first frame stays whole in the ring until its last byte was written, so
//!   that it can still be recorded. `head_written` is less than its encoded length, and 0 if there is none.
//! - `open` is the encoded length of the longest prefix of frames whose colour is not newer than the epoch, less
//!   `head_written`; `blocked` tells whether a frame stands behind that prefix.
//! - `head_written > 0` only if the first frame is in that prefix.

use std::collections::VecDeque;

use crate::{Epoch, LENGTH_BYTES, Time, ring::Ring};

/// One frame copy in a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queued {
    pub(crate) colour: Epoch,
    /// Length without the prefix.
    pub(crate) len: u32,
    /// Serial number of the last recording that holds this copy; 0 if none does.
    pub(crate) recorded_in: u32,
    pub(crate) enqueued: Time,
}

impl Queued {
    fn encoded_len(&self) -> usize {
        LENGTH_BYTES + self.len as usize
    }
}

/// What [`Queue::visit`] does with a frame.
pub(crate) enum Keep {
    Yes,
    No,
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    ring: Ring,
    frames: VecDeque<Queued>,
    head_written: usize,
    open: usize,
    blocked: bool,
}

impl Queue {
    /// Appends a frame unless more than `limit` encoded bytes would wait. `open` is whether its colour may be delivered.
    #[inline]
    pub(crate) fn push(&mut self, frame: &[u8], queued: Queued, open: bool, limit: usize) -> bool {
        let encoded = LENGTH_BYTES + frame.len();
        if self.ring.len() + encoded > limit {
            return false;
        }
        self.ring.push(queued.len.to_be_bytes(), frame);
        self.frames.push_back(queued);
        if open && !self.blocked {
            self.open += encoded;
        } else {
            self.blocked = true;
        }
        true
    }

    /// The encoded bytes up to the first frame that may not be delivered yet.
    #[inline]
    pub(crate) fn open(&self) -> [&[u8]; 2] {
        self.ring.slices(self.head_written, self.open)
    }

    /// What is left of a frame that was partly written.
    pub(crate) fn rest_of_head(&self) -> [&[u8]; 2] {
        match self.frames.front() {
            Some(head) if self.head_written > 0 => {
                self.ring.slices(self.head_written, head.encoded_len() - self.head_written)
            }
            _ => [&[], &[]],
        }
    }

    pub(crate) fn mid_frame(&self) -> bool {
        self.head_written > 0
    }

    pub(crate) fn has_open(&self) -> bool {
        self.open > 0
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    pub(crate) fn bytes(&self) -> usize {
        self.ring.len()
    }

    pub(crate) fn frames(&self) -> &VecDeque<Queued> {
        &self.frames
    }

    pub(crate) fn last_mut(&mut self) -> Option<&mut Queued> {
        self.frames.back_mut()
    }

    /// Consumes `count` bytes from the front and calls `done` for each frame whose last byte was among them.
    /// Memory beyond `keep_bytes` is given back when the queue runs empty.
    #[inline]
    pub(crate) fn written(&mut self, count: usize, keep_bytes: usize, mut done: impl FnMut(&Queued)) {
        debug_assert!(count <= self.open, "{count} bytes written, {} were open", self.open);
        let count = count.min(self.open);
        self.open -= count;
        let mut finished = 0;
        let mut reached = self.head_written + count;
        while let Some(head) = self.frames.front() {
            let encoded = head.encoded_len();
            if reached < encoded {
                break;
            }
            reached -= encoded;
            finished += encoded;
            done(head);
            self.frames.pop_front();
        }
        self.head_written = reached;
        self.ring.pop(finished);
        if self.frames.is_empty() && self.ring.capacity() > keep_bytes {
            self.ring.free();
            self.frames = VecDeque::new();
        }
    }

    /// Recomputes what is open after the port's epoch changed.
    pub(crate) fn reopen(&mut self, epoch: Epoch) {
        let (open, blocked) = self.open_at(epoch);
        self.open = open;
        self.blocked = blocked;
    }

    /// The colour of the first frame that `epoch` does not admit.
    pub(crate) fn first_newer(&self, epoch: Epoch) -> Option<Epoch> {
        if !self.blocked {
            return None;
        }
        self.frames.iter().map(|f| f.colour).find(|&colour| colour > epoch)
    }

    /// Drops everything, a partly written frame too, and gives the memory back.
    pub(crate) fn clear(&mut self, mut dropped: impl FnMut(&Queued)) {
        for frame in &self.frames {
            dropped(frame);
        }
        *self = Self::default();
    }

    /// Shows every frame and its bytes (without the prefix) to `visit`, in order, and removes those that it does not
    /// keep. The third argument tells that the frame is partly written: it is kept whatever `visit` says.
    pub(crate) fn visit(
        &mut self,
        epoch: Epoch,
        mut visit: impl FnMut(&mut Queued, [&[u8]; 2], bool) -> Keep,
    ) {
        let mut from = 0;
        let mut partly = self.head_written > 0;
        let mut removed = Vec::new();
        for (index, frame) in self.frames.iter_mut().enumerate() {
            let body = self.ring.slices(from + LENGTH_BYTES, frame.len as usize);
            from += frame.encoded_len();
            if matches!(visit(frame, body, partly), Keep::No) && !partly {
                removed.push(index);
            }
            partly = false;
        }
        if !removed.is_empty() {
            self.remove(&removed, epoch);
        }
    }

    /// Panics unless the invariants hold. Costs time in proportion to the frames that wait.
    pub(crate) fn assert_consistent(&self, epoch: Epoch) {
        let encoded: usize = self.frames.iter().map(Queued::encoded_len).sum();
        assert_eq!(self.ring.len(), encoded, "ring and frames disagree");
        assert!(
            self.head_written < self.frames.front().map_or(1, Queued::encoded_len),
            "a whole frame lies written"
        );
        assert_eq!((self.open, self.blocked), self.open_at(epoch), "what is open is stale");
        assert!(self.head_written == 0 || self.open > 0, "a frame of a newer colour was begun");
        let mut from = 0;
        for frame in &self.frames {
            let prefix = self.ring.slices(from, LENGTH_BYTES).concat();
            assert_eq!(prefix, frame.len.to_be_bytes(), "a length prefix does not match its frame");
            from += frame.encoded_len();
        }
    }

    /// Rebuilds the queue without the frames at `removed` (ascending). Rare, so it copies rather than moves in place.
    fn remove(&mut self, removed: &[usize], epoch: Epoch) {
        let mut ring = Ring::default();
        let mut frames = VecDeque::new();
        let mut removed = removed.iter().copied().peekable();
        let mut from = 0;
        for (index, frame) in self.frames.iter().enumerate() {
            if removed.next_if_eq(&index).is_none() {
                let body = self.ring.slices(from + LENGTH_BYTES, frame.len as usize).concat();
                ring.push(frame.len.to_be_bytes(), &body);
                frames.push_back(*frame);
            }
            from += frame.encoded_len();
        }
        self.ring = ring;
        self.frames = frames;
        self.reopen(epoch);
    }

    /// `open` and `blocked`, computed from scratch.
    fn open_at(&self, epoch: Epoch) -> (usize, bool) {
        let open =
            self.frames.iter().take_while(|f| f.colour <= epoch).map(Queued::encoded_len).sum::<usize>();
        (open.saturating_sub(self.head_written), self.frames.iter().any(|f| f.colour > epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: [u8; 20] = [7; 20];
    const ENCODED: usize = LENGTH_BYTES + FRAME.len();

    fn push(queue: &mut Queue, colour: u32, epoch: u32) -> bool {
        let queued = Queued { colour: Epoch(colour), len: 20, recorded_in: 0, enqueued: Time(0) };
        let fits = queue.push(&FRAME, queued, colour <= epoch, 10 * ENCODED);
        queue.assert_consistent(Epoch(epoch));
        fits
    }

    fn open_bytes(queue: &Queue) -> usize {
        queue.open().concat().len()
    }

    #[test]
    fn a_newer_colour_blocks_what_follows_until_the_epoch_rises() {
        let mut queue = Queue::default();
        for colour in [1, 2, 1] {
            assert!(push(&mut queue, colour, 1));
        }
        assert_eq!(open_bytes(&queue), ENCODED);
        assert_eq!(queue.first_newer(Epoch(1)), Some(Epoch(2)));
        queue.reopen(Epoch(2));
        assert_eq!(open_bytes(&queue), 3 * ENCODED);
        assert_eq!(queue.first_newer(Epoch(2)), None);
    }

    #[test]
    fn a_frame_is_done_with_its_last_byte() {
        let mut queue = Queue::default();
        push(&mut queue, 0, 0);
        push(&mut queue, 0, 0);
        let mut done = 0;
        for (bytes, expected, rest) in
            [(1, 0, ENCODED - 1), (ENCODED - 2, 0, 1), (2, 1, ENCODED - 1), (ENCODED - 1, 2, 0)]
        {
            queue.written(bytes, usize::MAX, |_| done += 1);
            queue.assert_consistent(Epoch(0));
            assert_eq!(
                (done, queue.rest_of_head().concat().len()),
                (expected, rest),
                "after {bytes} more bytes"
            );
        }
    }

    #[test]
    fn the_limit_counts_encoded_bytes() {
        let mut queue = Queue::default();
        for n in 0..12 {
            assert_eq!(push(&mut queue, 0, 0), n < 10, "frame {n}");
        }
    }

    #[test]
    fn visit_removes_but_never_a_partly_written_frame() {
        let mut queue = Queue::default();
        for colour in [0, 0, 1, 0] {
            push(&mut queue, colour, 1);
        }
        queue.written(3, usize::MAX, |_| ());
        queue.visit(Epoch(1), |frame, body, _| {
            assert_eq!(body.concat(), FRAME);
            if frame.colour == Epoch(0) { Keep::No } else { Keep::Yes }
        });
        queue.assert_consistent(Epoch(1));
        let colours: Vec<u32> = queue.frames().iter().map(|f| f.colour.0).collect();
        assert_eq!(colours, [0, 1]);
        assert_eq!(open_bytes(&queue), 2 * ENCODED - 3);
    }

    #[test]
    fn an_empty_queue_gives_back_what_a_hold_made_it_take() {
        let mut queue = Queue::default();
        for _ in 0..10 {
            push(&mut queue, 0, 0);
        }
        queue.written(10 * ENCODED, 64, |_| ());
        assert_eq!(queue.ring.capacity(), 0);
    }
}
