//! The byte stream of QEMU's `-netdev stream`: a big-endian 32-bit length, then the frame. Stateless over a chunk.

use crate::{MIN_FRAME, Mac};

/// The length prefix, in bytes.
pub const LENGTH_BYTES: usize = 4;

/// The longest frame that QEMU passes on, in bytes (its NET_BUFSIZE). A guest can make QEMU send frames up to this
/// length, which [`Switch::ingress`](crate::Switch::ingress) counts as giants; a longer one means that the stream has lost its framing.
pub const MAX_STREAM_FRAME: usize = 4096 + 65536;

/// The stream cannot be what it should be. There is no way to find the next frame: close the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// A length prefix that no sender writes.
    #[error("a frame of {len} bytes is announced at byte {at} of the chunk; the longest possible has {max}", max = MAX_STREAM_FRAME)]
    ImpossibleLength {
        /// Where the prefix stands in the chunk, in bytes.
        at: usize,
        /// What it says, in bytes.
        len: usize,
    },
}

/// Splits a chunk of the stream into whole frames. Iterate, then keep the bytes from [`FrameReader::consumed`] on
/// and read more behind them; a buffer of `LENGTH_BYTES + MAX_STREAM_FRAME` bytes always makes progress.
#[derive(Clone, Debug)]
pub struct FrameReader<'a> {
    chunk: &'a [u8],
    consumed: usize,
    failed: bool,
}

impl<'a> FrameReader<'a> {
    /// Starts at a frame's first byte.
    pub fn new(chunk: &'a [u8]) -> Self {
        Self { chunk, consumed: 0, failed: false }
    }

    /// Bytes of the frames that were returned, prefixes included.
    pub fn consumed(&self) -> usize {
        self.consumed
    }
}

impl<'a> Iterator for FrameReader<'a> {
    type Item = Result<&'a [u8], StreamError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let (prefix, rest) = self.chunk[self.consumed..].split_first_chunk()?;
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > MAX_STREAM_FRAME {
            self.failed = true;
            return Some(Err(StreamError::ImpossibleLength { at: self.consumed, len }));
        }
        let frame = rest.get(..len)?;
        self.consumed += LENGTH_BYTES + len;
        Some(Ok(frame))
    }
}

/// Finds where frames begin in a chunk that starts inside one, as after an agent's crash: QEMU first sends the rest of
/// the frame that it had half sent.
///
/// Returns the smallest offset from which the chunk is, exactly to its end, a sequence of frames of possible lengths,
/// the first of which comes from `mac`. None if there is no such offset: read more, or give up.
///
/// A guest can place bytes in its frames that look like this, and so lose or invent frames of its own; it cannot do
/// more than it could by sending them. Takes time and memory in proportion to the chunk, whatever it holds.
pub fn resync(chunk: &[u8], mac: Mac) -> Option<usize> {
    // From the end backwards: a frame begins here if its length leads to the end or to where another begins.
    let mut begins = vec![false; chunk.len() + 1];
    begins[chunk.len()] = true;
    let mut smallest = None;
    for at in (0..chunk.len().saturating_sub(LENGTH_BYTES + MIN_FRAME - 1)).rev() {
        let Some((prefix, frame)) = chunk[at..].split_first_chunk() else { continue };
        let len = u32::from_be_bytes(*prefix) as usize;
        if (MIN_FRAME..=MAX_STREAM_FRAME).contains(&len) && begins.get(at + LENGTH_BYTES + len) == Some(&true)
        {
            begins[at] = true;
            if frame[6..12] == mac {
                smallest = Some(at);
            }
        }
    }
    smallest
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 9];

    fn encoded(len: usize, source: Mac) -> Vec<u8> {
        let mut bytes = (len as u32).to_be_bytes().to_vec();
        bytes.extend([0xff; 6]);
        bytes.extend(source);
        bytes.resize(LENGTH_BYTES + len, 0x5a);
        bytes
    }

    #[test]
    fn yields_whole_frames_and_says_what_it_used() {
        let stream = [encoded(14, MAC), encoded(60, MAC), vec![0; 4], encoded(1500, MAC)].concat();
        for cut in 0..=stream.len() {
            let mut reader = FrameReader::new(&stream[..cut]);
            let lengths: Vec<usize> = reader.by_ref().map(|f| f.unwrap().len()).collect();
            let expected: Vec<usize> = [(18, 14), (82, 60), (86, 0), (1590, 1500)]
                .iter()
                .filter(|(end, _)| *end <= cut)
                .map(|(_, l)| *l)
                .collect();
            assert_eq!(lengths, expected, "chunk of {cut} bytes");
            assert_eq!(reader.consumed(), lengths.iter().map(|l| l + 4).sum::<usize>());
        }
    }

    #[test]
    fn an_impossible_length_ends_the_stream() {
        let chunk =
            [encoded(20, MAC), (MAX_STREAM_FRAME as u32 + 1).to_be_bytes().to_vec(), vec![0; 40]].concat();
        let mut reader = FrameReader::new(&chunk);
        assert!(reader.next().unwrap().is_ok());
        assert_eq!(reader.next(), Some(Err(StreamError::ImpossibleLength { at: 24, len: 69_633 })));
        assert_eq!(reader.next(), None);
        let longest = encoded(MAX_STREAM_FRAME, MAC);
        assert_eq!(FrameReader::new(&longest).next().unwrap().unwrap().len(), MAX_STREAM_FRAME);
    }

    #[test]
    fn resync_finds_the_first_frame_after_a_rest_of_any_length() {
        let whole =
            [encoded(300, MAC), encoded(60, MAC), encoded(1514, [2, 0, 0, 0, 0, 1]), encoded(42, MAC)]
                .concat();
        for lost in 1..304 {
            assert_eq!(resync(&whole[lost..], MAC), Some(304 - lost), "{lost} bytes lost");
        }
        assert_eq!(resync(&whole, MAC), Some(0));
    }

    #[test]
    fn resync_refuses_a_chunk_that_ends_inside_a_frame_or_lacks_the_sender() {
        let whole = [vec![0x5a; 33], encoded(60, MAC)].concat();
        assert_eq!(resync(&whole[..whole.len() - 1], MAC), None);
        assert_eq!(resync(&whole, [2, 0, 0, 0, 0, 8]), None);
        assert_eq!(resync(&[], MAC), None);
        assert_eq!(resync(&[0; 17], MAC), None);
    }

    #[test]
    fn resync_of_hostile_bytes_is_linear() {
        // Every fourth offset announces a frame that leads to another: quadratic for a walk from each.
        let chunk: Vec<u8> = (0..1 << 18).flat_map(|_| 16u32.to_be_bytes()).collect();
        assert_eq!(resync(&chunk, MAC), None);
    }
}
