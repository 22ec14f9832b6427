//! A byte ring that grows. Owns the encoded frames which wait for one port.
//!
//! Invariants: the capacity is 0 or a power of two; `len <= capacity`; `head < capacity` (or both are 0). An empty ring
//! starts again at 0, so a port that keeps up reuses the same few cache lines, and one that never got a frame costs nothing.

/// First allocation, in bytes: two full-sized frames and a bit.
const SMALLEST_BYTES: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Ring {
    bytes: Box<[u8]>,
    head: usize,
    len: usize,
}

impl Ring {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Appends both parts, growing as needed. The caller has checked its bound.
    #[inline]
    pub(crate) fn push(&mut self, prefix: [u8; 4], body: &[u8]) {
        let added = prefix.len() + body.len();
        if self.len + added > self.bytes.len() {
            self.grow(self.len + added);
        }
        let mask = self.bytes.len() - 1;
        let at = (self.head + self.len) & mask;
        match self.bytes.get_mut(at..at + added) {
            Some(room) => {
                room[..4].copy_from_slice(&prefix);
                room[4..].copy_from_slice(body);
            }
            None => {
                self.put(at, &prefix);
                self.put((at + prefix.len()) & mask, body);
            }
        }
        self.len += added;
    }

    /// Forgets the first `count` bytes.
    #[inline]
    pub(crate) fn pop(&mut self, count: usize) {
        debug_assert!(count <= self.len, "popping {count} of {} bytes", self.len);
        self.len -= count.min(self.len);
        self.head = if self.len == 0 { 0 } else { (self.head + count) & (self.bytes.len() - 1) };
    }

    /// The bytes `from..from + count`, in at most two pieces.
    #[inline]
    pub(crate) fn slices(&self, from: usize, count: usize) -> [&[u8]; 2] {
        debug_assert!(from + count <= self.len, "bytes {from}+{count} of {}", self.len);
        if count == 0 {
            return [&[], &[]];
        }
        let at = (self.head + from) & (self.bytes.len() - 1);
        let first = count.min(self.bytes.len() - at);
        [&self.bytes[at..at + first], &self.bytes[..count - first]]
    }

    /// Gives the memory back. The ring must be empty.
    pub(crate) fn free(&mut self) {
        debug_assert_eq!(self.len, 0, "freeing a ring in use");
        *self = Self::default();
    }

    fn put(&mut self, at: usize, part: &[u8]) {
        let first = part.len().min(self.bytes.len() - at);
        self.bytes[at..at + first].copy_from_slice(&part[..first]);
        self.bytes[..part.len() - first].copy_from_slice(&part[first..]);
    }

    #[cold]
    fn grow(&mut self, needed: usize) {
        let mut bytes = vec![0; needed.next_power_of_two().max(SMALLEST_BYTES)].into_boxed_slice();
        let [a, b] = self.slices(0, self.len);
        bytes[..a.len()].copy_from_slice(a);
        bytes[a.len()..self.len].copy_from_slice(b);
        self.bytes = bytes;
        self.head = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn content(ring: &Ring) -> Vec<u8> {
        ring.slices(0, ring.len()).concat()
    }

    #[test]
    fn wraps_and_grows_like_a_deque() {
        let mut ring = Ring::default();
        let mut model = VecDeque::new();
        let mut next = 0u8;
        for round in 0..4000usize {
            let body: Vec<u8> = (0..round * 7 % 301).map(|i| next.wrapping_add(i as u8)).collect();
            next = next.wrapping_add(91);
            let prefix = (round as u32).to_be_bytes();
            ring.push(prefix, &body);
            model.extend(prefix);
            model.extend(body);
            // Phases in which it fills, and in which it empties.
            let most = if round / 500 % 2 == 0 { 200 } else { 600 };
            let pop = (round * 13 % most).min(model.len());
            ring.pop(pop);
            model.drain(..pop);
            assert_eq!(ring.len(), model.len());
            assert!(ring.capacity().is_power_of_two());
            if round % 97 == 0 {
                assert_eq!(content(&ring), Vec::from(model.clone()));
            }
        }
        assert!(ring.capacity() > SMALLEST_BYTES, "never grew");
    }

    #[test]
    fn slices_of_the_middle_cross_the_end() {
        let mut ring = Ring::default();
        ring.push([0; 4], &[1; 4000]);
        ring.pop(4000);
        ring.push([2; 4], &[3; 200]);
        let [a, b] = ring.slices(2, 150);
        assert!(!a.is_empty() && !b.is_empty());
        assert_eq!([a, b].concat(), [&[1, 1, 2, 2, 2, 2][..], &[3; 144]].concat());
        assert_eq!(ring.slices(0, 0), [&[] as &[u8], &[]]);
        assert_eq!(Ring::default().slices(0, 0), [&[] as &[u8], &[]]);
    }
}
