//! QEMU's control protocol.
//!
//! [`codec`] turns bytes into messages and back and does no input or output; [`client`] is a blocking connection that
//! uses it. An event loop that wants to own the socket takes the client apart with [`Client::into_parts`].

mod client;
mod codec;

pub use client::{Client, MAX_QUEUED_EVENTS, Parts, QmpError};
#[cfg(test)]
pub(crate) use codec::SESSION;
pub use codec::{DecodeError, Decoder, Event, MAX_MESSAGE_BYTES, Message, Timestamp, encode};
