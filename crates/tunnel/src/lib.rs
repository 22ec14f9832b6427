//! Tunnels: what carries an environment's frames between two hosts' switches, and keeps everybody else out.
//!
//! A [`Tunnel`] is one host's end of the way to one other host, as state without input or output: it wraps a frame into
//! a Geneve packet ([`diorama_switch::geneve`]), sealed with AEAD, and unwraps what arrives. A [`TunnelSocket`] moves many
//! packets by one call. Between them stands only memory: packets are sealed where they are sent from
//! ([`SendBatch::push`]), and opened where they were received.
//!
//! # Who is kept out, and how
//!
//! Frame, colour, network and number of a packet are authenticated; the frame is encrypted too, the headers stay readable
//! (they are AEAD's associated data), so that a dissector shows sane Geneve. The nonce is the key's name and the packet's
//! number. A host without the key can neither make a packet that opens, nor change one, nor read the frame; a packet that
//! comes twice is dropped by its number; one that was made for another tunnel has another key. What opens, but names a
//! network that this tunnel does not carry, is dropped too. What is not hidden: lengths, times, networks' numbers, epochs.
//!
//! # Keys
//!
//! There is no handshake here. Agents know each other by certificates and talk over mutual TLS; a sender makes a fresh key
//! ([`SendingKey::generate`]) and hands it to the receiver on that channel ([`SendingKey::to_bytes`],
//! [`ReceivingKey::from_bytes`]). Each direction has keys of its own. A sending key cannot be made from bytes, cannot be
//! cloned, and is used up by the tunnel it is given to: so no key and number are ever used twice, whoever crashes.
//!
//! A new key, by and by: the sender generates it and hands it over; the receiver installs it, answers, and goes on to take
//! packets of the old; the sender, having the answer, installs it and seals with it from then on. The receiver forgets the
//! old key [`GRACE_NS`] after the first packet of the new one. Numbers go on across keys. Agents do this when
//! [`Tunnel::rekey_due`] says so, and every hour: a key that is stolen later opens no more than that.
//!
//! # Incarnations
//!
//! Counts and numbers live as long as a pair of tunnels. When either agent starts anew, both make new tunnels with new keys:
//! no packet of an older incarnation opens any more, and the switches begin their counts anew
//! ([`diorama_switch::Switch::restart_peer`]).
//!
//! # Choices
//!
//! *ring*: the AEADs and nothing else is needed; rustls can use it as well, and it builds with a C compiler alone.
//! AES-256-GCM where both processors have AES instructions, else ChaCha20-Poly1305. *Own system calls* rather than quinn-udp:
//! that sends one train of equal packets to one address by one call; a switch's traffic mixes lengths and peers, so here one
//! `sendmmsg` takes many trains, each with its own UDP_SEGMENT.
//!
//! # For the event loop
//!
//! Tell tunnels apart by the address that packets come from: a forged one only gets as far as [`OpenError`]. Bound how often
//! [`TunnelSocket::receive`] is called in a row: whoever floods the socket must not keep machines from being served. Fill a
//! [`SendBatch`] only while [`SendBatch::has_room`], and leave frames in the switch's bounded queue when
//! [`Sent::would_block`].

mod counters;
mod key;
mod mtu;
mod socket;
mod tunnel;

pub use counters::TunnelCounters;
pub use key::{Cipher, KEY_BYTES, KeyError, ReceivingKey, SendingKey};
pub use mtu::{Ip, LEAST_GUEST_MTU, MtuError, guest_mtu, packet_overhead};
pub use socket::{Offload, ReceiveBatch, Received, SendBatch, Sent, TunnelSocket};
pub use tunnel::{
    BYTES_PER_KEY, FORGED_PER_KEY, FRAMES_PER_KEY, GRACE_NS, OpenError, Opened, Protection, SealError, Tunnel,
};
