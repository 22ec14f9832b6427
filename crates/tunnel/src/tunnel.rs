//! One host's end of the way to one other: frames to packets, packets to frames. No input or output, no clock.
//!
//! States of the receiving keys: at most two, the newest last.
//!
//! ```text
//! none --install--> newest --install--> older + newest --first packet of the newest--> older ends at now + GRACE_NS
//!                     ^                                                                            |
//!                     +---------------- first packet later than that, or install ------------------+
//! ```
//!
//! Invariants: a packet's number is used once, whatever the key; numbers ascend. Nothing of a packet is believed, and no
//! state but a counter changes, before it has been opened; so whoever has no key cannot move the window of arrivals,
//! end a key's life, or mark a packet that is yet to come as a repetition.

use diorama_switch::{
    Epoch, Time,
    arrivals::{Arrival, Arrivals},
    geneve::{GeneveError, HEADER_BYTES, Header, KeyId, Payload, Vni},
};

use crate::{
    counters::TunnelCounters,
    key::{ReceivingKey, SendingKey, TAG_BYTES},
};

/// How long an older key's packets are taken after the first of a newer key, in nanoseconds: a second, which is far more
/// than packets overtake one another by.
pub const GRACE_NS: u64 = 1_000_000_000;

/// The most packets that one key seals; see [`BYTES_PER_KEY`].
pub const FRAMES_PER_KEY: u64 = 1 << 28;

/// The most bytes that one key seals. AES-GCM stays as far from a random function as RFC 9001 (appendix B.1) wants it with
/// 2^28 packets of 2^11 bytes, or 2^23 of 2^16: the same number of bytes. 512 GiB; at 10 Gbit/s, seven minutes.
pub const BYTES_PER_KEY: u64 = 1 << 39;

/// How many forged packets are tried with one key before it is given up: RFC 9001's limit for ChaCha20-Poly1305, the smaller
/// of the two ciphers'.
pub const FORGED_PER_KEY: u64 = 1 << 36;

/// Whether packets are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// Encrypted and authenticated; only such packets are taken.
    Sealed,
    /// Neither: anybody who can send to the host can inject frames. For measuring, and for networks that nobody else is on.
    Open,
}

/// No packet was made of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The tunnel has no key to seal with yet.
    #[error("the tunnel has no key yet")]
    NoKey,
    /// The key has sealed as much as it may. Install another.
    #[error("{frames} packets of {bytes} bytes in all are sealed with this key: it must be replaced")]
    KeyExhausted {
        /// Packets sealed.
        frames: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// There is no room for the packet.
    #[error("a packet of {needed} bytes does not fit into {room}")]
    Room {
        /// What it takes, in bytes.
        needed: usize,
        /// What was given, in bytes.
        room: usize,
    },
    /// All numbers have been used.
    #[error("the tunnel's packet numbers are used up")]
    NumbersExhausted,
}

/// Why a packet was dropped. Each is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It is not a packet of ours.
    #[error(transparent)]
    Malformed(#[from] GeneveError),
    /// It is sealed and should not be, or the other way round.
    #[error("the packet's payload is {payload:?}")]
    WrongProtection {
        /// What it has.
        payload: Payload,
    },
    /// This tunnel does not have its key.
    #[error("key {} is not known", key.0)]
    UnknownKey {
        /// The key.
        key: KeyId,
    },
    /// Its key has been replaced.
    #[error("key {} has been replaced", key.0)]
    OldKey {
        /// The key.
        key: KeyId,
    },
    /// Its key does not open it.
    #[error("packet {sequence} is not genuine")]
    Forged {
        /// The number that it claims.
        sequence: u64,
    },
    /// A packet of this number came before.
    #[error("packet {sequence} came before")]
    Replayed {
        /// Its number.
        sequence: u64,
    },
    /// It is too late to tell whether it came before; it has been counted as lost.
    #[error("packet {sequence} is too old")]
    TooOld {
        /// Its number.
        sequence: u64,
    },
    /// It is genuine, and for a network that this tunnel does not carry.
    #[error("network {} is not in this tunnel", vni.get())]
    NotAMember {
        /// The network.
        vni: Vni,
    },
}

/// A frame that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened<'p> {
    /// Its network.
    pub vni: Vni,
    /// Its sender's epoch when it was sent.
    pub colour: Epoch,
    /// The packet's number.
    pub sequence: u64,
    /// The frame.
    pub frame: &'p [u8],
}

#[derive(Debug)]
struct Sending {
    key: SendingKey,
    frames: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Receiving {
    key: ReceivingKey,
    forged: u64,
}

/// One host's end of a tunnel. See the crate's documentation.
#[derive(Debug)]
pub struct Tunnel {
    protection: Protection,
    /// Those that it carries; ascending.
    networks: Vec<Vni>,
    sending: Option<Sending>,
    next_sequence: u64,
    /// At most two; the newest last.
    receiving: Vec<Receiving>,
    /// When the older of two ends; None before a packet of the newer has come.
    older_ends: Option<Time>,
    /// The one that was forgotten last.
    forgotten: Option<KeyId>,
    arrivals: Arrivals,
    counters: TunnelCounters,
}

impl Tunnel {
    /// A tunnel that carries no network, and when sealed has no keys.
    pub fn new(protection: Protection) -> Self {
        Self {
            protection,
            networks: Vec::new(),
            sending: None,
            next_sequence: 0,
            receiving: Vec::with_capacity(2),
            older_ends: None,
            forgotten: None,
            arrivals: Arrivals::default(),
            counters: TunnelCounters::default(),
        }
    }

    /// Lets frames of a network in.
    pub fn admit(&mut self, vni: Vni) {
        if let Err(at) = self.networks.binary_search(&vni) {
            self.networks.insert(at, vni);
        }
    }

    /// Does so no more.
    pub fn revoke(&mut self, vni: Vni) {
        if let Ok(at) = self.networks.binary_search(&vni) {
            self.networks.remove(at);
        }
    }

    /// Seals with this key from now on. The other end must have it already.
    pub fn install_sending(&mut self, key: SendingKey) {
        self.sending = Some(Sending { key, frames: 0, bytes: 0 });
    }

    /// Opens packets of this key too. A key before the last is forgotten at once; one of the same name is replaced.
    pub fn install_receiving(&mut self, key: ReceivingKey) {
        self.receiving.retain(|known| known.key.id() != key.id());
        if self.receiving.len() == 2 {
            self.forget_older();
        }
        self.receiving.push(Receiving { key, forged: 0 });
        self.older_ends = None;
    }

    /// Whether the sending key has sealed half of what it may: time to replace it. Also if there is none.
    pub fn rekey_due(&self) -> bool {
        self.protection == Protection::Sealed
            && self.sending.as_ref().is_none_or(|sending| {
                sending.frames >= FRAMES_PER_KEY / 2 || sending.bytes >= BYTES_PER_KEY / 2
            })
    }

    /// How long the packet of a frame is, in bytes.
    pub fn packet_bytes(&self, frame_bytes: usize) -> usize {
        let tag = if self.protection == Protection::Sealed { TAG_BYTES } else { 0 };
        HEADER_BYTES + frame_bytes + tag
    }

    /// Makes a packet of a frame, given in two pieces, at the beginning of `room`; returns its length.
    #[inline]
    pub fn seal(
        &mut self,
        vni: Vni,
        colour: Epoch,
        frame: [&[u8]; 2],
        room: &mut [u8],
    ) -> Result<usize, SealError> {
        let [first, second] = frame;
        let frame_bytes = first.len() + second.len();
        let needed = self.packet_bytes(frame_bytes);
        let available = room.len();
        let packet = room.get_mut(..needed).ok_or(SealError::Room { needed, room: available })?;
        let sequence = self.next_sequence;
        if sequence == u64::MAX {
            return Err(SealError::NumbersExhausted);
        }
        let (payload, key) = match (self.protection, &self.sending) {
            (Protection::Open, _) => (Payload::Ethernet, KeyId(0)),
            (Protection::Sealed, None) => return Err(SealError::NoKey),
            (Protection::Sealed, Some(sending)) => {
                let &Sending { ref key, frames, bytes } = sending;
                if frames >= FRAMES_PER_KEY || bytes >= BYTES_PER_KEY {
                    return Err(SealError::KeyExhausted { frames, bytes });
                }
                (Payload::Sealed, key.id())
            }
        };
        let (header, rest) = packet.split_at_mut(HEADER_BYTES);
        header.copy_from_slice(&Header { vni, payload, key, colour, sequence }.encode());
        let (body, tag) = rest.split_at_mut(frame_bytes);
        body[..first.len()].copy_from_slice(first);
        body[first.len()..].copy_from_slice(second);
        // Before the key is used: should anything fail behind this, the number must not be used again.
        self.next_sequence = sequence + 1;
        if let (Protection::Sealed, Some(sending)) = (self.protection, &mut self.sending) {
            sending.frames += 1;
            sending.bytes += frame_bytes as u64;
            let made = sending.key.seal(sequence, header, body);
            tag.copy_from_slice(&made.ok_or(SealError::Room { needed, room: available })?);
        }
        self.counters.sent += 1;
        self.counters.sent_bytes += frame_bytes as u64;
        Ok(needed)
    }

    /// Takes the frame out of a packet that came, in place. Every packet given is counted by what became of it.
    #[inline]
    pub fn open<'p>(&mut self, packet: &'p mut [u8], now: Time) -> Result<Opened<'p>, OpenError> {
        let opened = self.try_open(packet, now);
        let counters = &mut self.counters;
        match &opened {
            Ok(opened) => {
                counters.opened += 1;
                counters.opened_bytes += opened.frame.len() as u64;
            }
            Err(OpenError::Malformed(_)) => counters.malformed += 1,
            Err(OpenError::WrongProtection { .. }) => counters.wrong_protection += 1,
            Err(OpenError::UnknownKey { .. }) => counters.unknown_key += 1,
            Err(OpenError::OldKey { .. }) => counters.old_key += 1,
            Err(OpenError::Forged { .. }) => counters.forged += 1,
            Err(OpenError::Replayed { .. }) => counters.replayed += 1,
            Err(OpenError::TooOld { .. }) => counters.too_old += 1,
            Err(OpenError::NotAMember { .. }) => counters.not_a_member += 1,
        }
        opened
    }

    /// What it has seen.
    pub fn counters(&self) -> TunnelCounters {
        TunnelCounters { lost: self.arrivals.lost(), missing: self.arrivals.missing(), ..self.counters }
    }

    #[inline]
    fn try_open<'p>(&mut self, packet: &'p mut [u8], now: Time) -> Result<Opened<'p>, OpenError> {
        let (Header { vni, payload, key, colour, sequence }, at) = Header::decode(packet)?;
        let (header, body) = packet.split_at_mut(at);
        let frame = match (self.protection, payload) {
            (Protection::Sealed, Payload::Sealed) => {
                let place = self.receiving_key(key, now)?;
                self.check_arrival(self.arrivals.judge(sequence), sequence)?;
                let Some(frame) = self.receiving[place].key.open(sequence, header, body) else {
                    self.count_forged(place);
                    return Err(OpenError::Forged { sequence });
                };
                let is_newer_of_two = place == 1;
                if is_newer_of_two && self.older_ends.is_none() {
                    self.older_ends = Some(Time(now.0.saturating_add(GRACE_NS)));
                }
                frame
            }
            (Protection::Open, Payload::Ethernet) => body,
            (_, payload) => return Err(OpenError::WrongProtection { payload }),
        };
        let arrival = self.arrivals.accept(sequence);
        self.check_arrival(arrival, sequence)?;
        if self.networks.binary_search(&vni).is_err() {
            return Err(OpenError::NotAMember { vni });
        }
        Ok(Opened { vni, colour, sequence, frame })
    }

    fn check_arrival(&self, arrival: Arrival, sequence: u64) -> Result<(), OpenError> {
        match arrival {
            Arrival::New => Ok(()),
            Arrival::Repeated => Err(OpenError::Replayed { sequence }),
            Arrival::TooOld => Err(OpenError::TooOld { sequence }),
        }
    }

    /// The place of a packet's key, the newest first.
    #[inline]
    fn receiving_key(&mut self, id: KeyId, now: Time) -> Result<usize, OpenError> {
        if self.older_ends.is_some_and(|end| end < now) {
            self.forget_older();
        }
        match self.receiving.iter().rposition(|known| known.key.id() == id) {
            Some(place) => Ok(place),
            None if self.forgotten == Some(id) => Err(OpenError::OldKey { key: id }),
            None => Err(OpenError::UnknownKey { key: id }),
        }
    }

    #[cold]
    fn forget_older(&mut self) {
        self.older_ends = None;
        self.forgotten = Some(self.receiving.remove(0).key.id());
    }

    #[cold]
    fn count_forged(&mut self, place: usize) {
        self.receiving[place].forged += 1;
        if self.receiving[place].forged >= FORGED_PER_KEY {
            self.forgotten = Some(self.receiving.remove(place).key.id());
            self.older_ends = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Cipher;

    fn key(id: u16) -> SendingKey {
        SendingKey::generate(KeyId(id), Cipher::ChaCha20Poly1305).unwrap()
    }

    fn seal(tunnel: &mut Tunnel, room: usize) -> Result<usize, SealError> {
        tunnel.seal(Vni::MAX, Epoch(0), [b"frame", &[]], &mut vec![0; room])
    }

    #[test]
    fn what_cannot_be_sealed_says_why_and_uses_no_number() {
        let mut tunnel = Tunnel::new(Protection::Sealed);
        assert_eq!(seal(&mut tunnel, 100), Err(SealError::NoKey));
        tunnel.install_sending(key(1));
        let needed = HEADER_BYTES + 5 + TAG_BYTES;
        assert_eq!(seal(&mut tunnel, needed - 1), Err(SealError::Room { needed, room: needed - 1 }));
        assert_eq!(tunnel.next_sequence, 0);
        assert_eq!(seal(&mut tunnel, needed), Ok(needed));

        let sending = tunnel.sending.as_mut().unwrap();
        sending.frames = FRAMES_PER_KEY / 2 - 1;
        assert!(!tunnel.rekey_due());
        seal(&mut tunnel, needed).unwrap();
        assert!(tunnel.rekey_due());
        for (frames, bytes) in [(FRAMES_PER_KEY, 9), (9, BYTES_PER_KEY)] {
            tunnel.sending = Some(Sending { key: key(1), frames, bytes });
            assert_eq!(seal(&mut tunnel, needed), Err(SealError::KeyExhausted { frames, bytes }));
            assert!(tunnel.rekey_due());
        }
        tunnel.install_sending(key(2));
        assert_eq!(seal(&mut tunnel, needed), Ok(needed));
        assert_eq!(tunnel.next_sequence, 3);
        tunnel.next_sequence = u64::MAX;
        assert_eq!(seal(&mut tunnel, needed), Err(SealError::NumbersExhausted));
        assert_eq!(tunnel.counters().sent, 3);
    }

    #[test]
    fn a_key_that_was_attacked_too_often_is_given_up() {
        let mut tunnel = Tunnel::new(Protection::Sealed);
        tunnel.install_receiving(ReceivingKey::from_bytes(&key(1).to_bytes()).unwrap());
        tunnel.receiving[0].forged = FORGED_PER_KEY - 1;
        let mut forger = Tunnel::new(Protection::Sealed);
        forger.install_sending(key(1));
        let mut packet = vec![0; 100];
        let len = seal_into(&mut forger, &mut packet);
        let forged = &mut packet[..len];
        assert_eq!(tunnel.open(&mut forged.to_vec(), Time(0)), Err(OpenError::Forged { sequence: 0 }));
        assert_eq!(tunnel.open(forged, Time(0)), Err(OpenError::OldKey { key: KeyId(1) }));
    }

    #[test]
    fn a_network_is_carried_while_it_is_admitted() {
        let (mut from, mut to) = (Tunnel::new(Protection::Open), Tunnel::new(Protection::Open));
        let mut packet = vec![0; 100];
        for (step, admitted) in [false, true, false].into_iter().enumerate() {
            if admitted {
                to.admit(Vni::MAX)
            } else {
                to.revoke(Vni::MAX)
            }
            let len = seal_into(&mut from, &mut packet);
            let opened = to.open(&mut packet[..len], Time(0)).map(|opened| opened.frame.to_vec());
            let expected =
                if admitted { Ok(b"frame".to_vec()) } else { Err(OpenError::NotAMember { vni: Vni::MAX }) };
            assert_eq!(opened, expected, "step {step}");
        }
    }

    fn seal_into(tunnel: &mut Tunnel, packet: &mut [u8]) -> usize {
        tunnel.seal(Vni::MAX, Epoch(0), [b"fra", b"me"], packet).unwrap()
    }
}
