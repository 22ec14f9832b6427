//! The `frames` file: the frames in flight at the cut, in the order in which they are delivered again.
//!
//! ```text
//! magic     8 bytes   "DIOFRM\0\0", the last byte is the version
//! count     u32       number of frames
//! count times:
//!   network u8 length, then that many bytes of a name
//!   machine u8 length, then that many bytes of a name
//!   nic     u16
//!   colour  u32
//!   after   u64       nanoseconds after the receiver's cut
//!   frame   u32 length, then that many bytes
//! ```
//!
//! Integers are little-endian. Invariant: what [`decode`] accepts, [`encode`] writes byte for byte, so nothing is
//! accepted that could have been written in two ways; nothing is allocated that the input does not back.

/// The longest frame that is stored: QEMU's own bound on a packet.
pub const MAX_FRAME_BYTES: usize = 4096 + 65536;
/// The most frames in one snapshot. Bounded queues of 1 MiB a port hold far fewer.
pub const MAX_FRAMES: usize = 4 << 20;
/// The longest `frames` file.
pub const MAX_FRAMES_FILE_BYTES: u64 = 1 << 30;

const MAGIC: &[u8; 8] = b"DIOFRM\0\0";
const NAME_BYTES_MAX: usize = 64;
/// A frame with two names of one byte and no contents.
const SMALLEST_ENTRY_BYTES: usize = 2 + 2 + 2 + 4 + 8 + 4;

/// One frame in flight: sent before its sender's cut, not delivered before its receiver's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoredFrame {
    /// The network that carried it.
    pub network: String,
    /// The receiving machine.
    pub machine: String,
    /// Which of the machine's NICs, from 0.
    pub nic: u16,
    /// The sender's epoch when it sent the frame.
    pub colour: u32,
    /// When it was delivered, after the receiver's cut.
    pub after_cut_ns: u64,
    /// The frame, from its destination address on.
    pub bytes: Vec<u8>,
}

/// Why frames cannot be encoded, or bytes are no list of frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FramesError {
    /// The file starts with something else.
    #[error("not a list of frames of a known version")]
    Magic,
    /// The file ends within something.
    #[error("the list of frames ends at byte {offset}, within frame {frame}")]
    Ends {
        /// Where more was expected.
        offset: usize,
        /// Which frame, from 0.
        frame: usize,
    },
    /// More follows after the last frame.
    #[error("{excess_bytes} bytes follow the last frame")]
    Excess {
        /// How many.
        excess_bytes: usize,
    },
    /// More frames than a snapshot may hold.
    #[error("{count} frames are more than {MAX_FRAMES}")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// A frame longer than any network carries.
    #[error("frame {frame} has {bytes} bytes, more than {MAX_FRAME_BYTES}")]
    TooLong {
        /// Which frame, from 0.
        frame: usize,
        /// Its length.
        bytes: usize,
    },
    /// All the frames together are too long.
    #[error("the frames take {bytes} bytes, more than {MAX_FRAMES_FILE_BYTES}")]
    TooMuch {
        /// The length of the list.
        bytes: u64,
    },
    /// A network's or machine's name that cannot be one.
    #[error("frame {frame} names a network or machine that cannot exist")]
    Name {
        /// Which frame, from 0.
        frame: usize,
    },
}

/// The bytes of a `frames` file.
pub(crate) fn encode(frames: &[StoredFrame]) -> Result<Vec<u8>, FramesError> {
    if frames.len() > MAX_FRAMES {
        return Err(FramesError::TooMany { count: frames.len() });
    }
    let mut out = Vec::with_capacity(12 + frames.iter().map(encoded_bytes).sum::<usize>());
    out.extend_from_slice(MAGIC);
    put_length(&mut out, frames.len());
    for (index, frame) in frames.iter().enumerate() {
        if frame.bytes.len() > MAX_FRAME_BYTES {
            return Err(FramesError::TooLong { frame: index, bytes: frame.bytes.len() });
        }
        for name in [&frame.network, &frame.machine] {
            if !is_name(name.as_bytes()) {
                return Err(FramesError::Name { frame: index });
            }
            // At most NAME_BYTES_MAX, so it fits.
            out.push(name.len() as u8);
            out.extend_from_slice(name.as_bytes());
        }
        out.extend_from_slice(&frame.nic.to_le_bytes());
        out.extend_from_slice(&frame.colour.to_le_bytes());
        out.extend_from_slice(&frame.after_cut_ns.to_le_bytes());
        put_length(&mut out, frame.bytes.len());
        out.extend_from_slice(&frame.bytes);
    }
    let bytes = out.len() as u64;
    if bytes > MAX_FRAMES_FILE_BYTES {
        return Err(FramesError::TooMuch { bytes });
    }
    Ok(out)
}

/// The frames of a `frames` file.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<StoredFrame>, FramesError> {
    let mut input = Input { bytes, offset: 0, frame: 0 };
    if bytes.len() < MAGIC.len() || input.take(MAGIC.len())? != MAGIC {
        return Err(FramesError::Magic);
    }
    let count = u32::from_le_bytes(input.array()?) as usize;
    if count > MAX_FRAMES {
        return Err(FramesError::TooMany { count });
    }
    // A count alone must not reserve memory: no more than the rest of the input could hold.
    let mut frames = Vec::with_capacity(count.min(input.rest() / SMALLEST_ENTRY_BYTES));
    for frame in 0..count {
        input.frame = frame;
        let network = input.name()?;
        let machine = input.name()?;
        let nic = u16::from_le_bytes(input.array()?);
        let colour = u32::from_le_bytes(input.array()?);
        let after_cut_ns = u64::from_le_bytes(input.array()?);
        let length = u32::from_le_bytes(input.array()?) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(FramesError::TooLong { frame, bytes: length });
        }
        frames.push(StoredFrame {
            network,
            machine,
            nic,
            colour,
            after_cut_ns,
            bytes: input.take(length)?.to_vec(),
        });
    }
    match input.rest() {
        0 => Ok(frames),
        excess_bytes => Err(FramesError::Excess { excess_bytes }),
    }
}

struct Input<'a> {
    bytes: &'a [u8],
    offset: usize,
    frame: usize,
}

impl<'a> Input<'a> {
    fn rest(&self) -> usize {
        self.bytes.len() - self.offset
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], FramesError> {
        if self.rest() < length {
            return Err(FramesError::Ends { offset: self.bytes.len(), frame: self.frame });
        }
        let taken = &self.bytes[self.offset..self.offset + length];
        self.offset += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FramesError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn name(&mut self) -> Result<String, FramesError> {
        let [length] = self.array()?;
        let bytes = self.take(length.into())?;
        let bad = FramesError::Name { frame: self.frame };
        if !is_name(bytes) {
            return Err(bad);
        }
        String::from_utf8(bytes.to_vec()).map_err(|_| bad)
    }
}

/// Looser than the names that an environment file allows, and strict enough to be printed.
fn is_name(bytes: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}

fn encoded_bytes(frame: &StoredFrame) -> usize {
    SMALLEST_ENTRY_BYTES + frame.network.len() + frame.machine.len() + frame.bytes.len()
}

/// Callers have checked the length against a bound that fits.
fn put_length(out: &mut Vec<u8>, length: usize) {
    out.extend_from_slice(&(length as u32).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn frame() -> impl Strategy<Value = StoredFrame> {
        (
            "[a-z0-9-]{1,32}",
            "[a-z0-9-]{1,32}",
            any::<u16>(),
            any::<u32>(),
            any::<u64>(),
            vec(any::<u8>(), 0..200),
        )
            .prop_map(|(network, machine, nic, colour, after_cut_ns, bytes)| StoredFrame {
                network,
                machine,
                nic,
                colour,
                after_cut_ns,
                bytes,
            })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(frames in vec(frame(), 0..20)) {
            prop_assert_eq!(decode(&encode(&frames).unwrap()), Ok(frames));
        }

        #[test]
        fn no_bytes_panic_and_what_is_accepted_is_written_alike(
            mut bytes in vec(any::<u8>(), 0..400),
            with_magic in any::<bool>(),
            count in 0u32..4,
        ) {
            if with_magic && bytes.len() >= 12 {
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..12].copy_from_slice(&count.to_le_bytes());
            }
            if let Ok(frames) = decode(&bytes) {
                prop_assert_eq!(encode(&frames).unwrap(), bytes);
            }
        }

        #[test]
        fn a_changed_byte_or_length_never_panics(
            frames in vec(frame(), 1..5),
            at in any::<prop::sample::Index>(),
            with in any::<u8>(),
            keep in any::<prop::sample::Index>(),
        ) {
            let whole = encode(&frames).unwrap();
            let mut changed = whole.clone();
            let at = at.index(changed.len());
            changed[at] = with;
            if let Ok(frames) = decode(&changed) {
                prop_assert_eq!(encode(&frames).unwrap(), changed);
            }
            // Cut off anywhere it is refused; so is anything appended.
            prop_assert!(decode(&whole[..keep.index(whole.len())]).is_err());
            let longer = [&whole[..], &[with]].concat();
            prop_assert_eq!(decode(&longer), Err(FramesError::Excess { excess_bytes: 1 }));
        }
    }

    #[test]
    fn limits_hold_both_ways() {
        let mut frame = StoredFrame {
            network: "lan".into(),
            machine: "a".into(),
            nic: 0,
            colour: 1,
            after_cut_ns: 2,
            bytes: vec![7; MAX_FRAME_BYTES],
        };
        let longest = encode(std::slice::from_ref(&frame)).unwrap();
        assert_eq!(decode(&longest).unwrap(), [frame.clone()]);
        frame.bytes.push(7);
        let too_long = FramesError::TooLong { frame: 0, bytes: MAX_FRAME_BYTES + 1 };
        assert_eq!(encode(std::slice::from_ref(&frame)), Err(too_long));
        frame.bytes.clear();
        for name in ["", "two words", "\u{e9}", &"x".repeat(65)] {
            frame.network = name.into();
            let refused = encode(std::slice::from_ref(&frame));
            assert_eq!(refused, Err(FramesError::Name { frame: 0 }), "{name:?}");
        }
        let mut many = MAGIC.to_vec();
        many.extend_from_slice(&u32::MAX.to_le_bytes());
        let count = u32::MAX as usize;
        assert_eq!(decode(&many), Err(FramesError::TooMany { count }));
    }
}
