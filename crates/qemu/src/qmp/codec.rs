//! The QMP codec: one JSON object per line.
//!
//! Invariants: the decoder never holds more than its limit plus one fed chunk; a line that is no valid message costs
//! one error and the next line decodes as usual; a message that outgrows the limit ends the stream, since its end
//! cannot be found within the bound. A decoded value takes some hundred bytes of memory for a few of text, so that a line
//! with more values than its limit is not decoded.

use serde_json::{Value, json};
use std::collections::VecDeque;

/// The largest message accepted from QEMU. `query-named-block-nodes` of a machine with a long disk chain is the
/// largest seen, at some hundred kilobytes.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// The most values in a message from QEMU; one of some hundred kilobytes has tens of thousands.
const MAX_MESSAGE_VALUES: usize = 1 << 18;

/// One message from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first message on a connection.
    Greeting {
        /// QEMU's version: major, minor, micro.
        version: (u64, u64, u64),
    },
    /// A command succeeded.
    Return {
        /// The command's id, where it was sent with a number.
        id: Option<u64>,
        /// What the command returned.
        value: Value,
    },
    /// A command failed.
    Error {
        /// The command's id, where it was sent with a number.
        id: Option<u64>,
        /// QEMU's error class, such as `GenericError`.
        class: String,
        /// QEMU's description, for people.
        desc: String,
    },
    /// Something happened.
    Event(Event),
    /// A well-formed object of a kind this codec does not know; newer versions may send some.
    Unknown(Value),
}

/// An asynchronous event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The event's name, such as `RESUME`.
    pub name: String,
    /// Its data, `Null` where it has none.
    pub data: Value,
    /// When QEMU emitted it.
    pub timestamp: Timestamp,
}

/// Host time of an event, as QEMU gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timestamp {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: i64,
}

impl Timestamp {
    /// Microseconds since the epoch.
    pub fn as_micros(self) -> i64 {
        self.seconds.saturating_mul(1_000_000).saturating_add(self.microseconds)
    }
}

/// Why bytes were not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A line was not a JSON object.
    #[error("a line of {length_bytes} bytes is not a JSON object: {reason}")]
    NotJson {
        /// The line's length.
        length_bytes: usize,
        /// What the JSON parser said.
        reason: String,
    },
    /// A line has more values than any message.
    #[error("a line of {length_bytes} bytes has {values} values, more than {limit}")]
    TooMany {
        /// The line's length.
        length_bytes: usize,
        /// How many values there may be in it.
        values: usize,
        /// The limit that was exceeded.
        limit: usize,
    },
    /// A message outgrew the limit; the decoder gives nothing more.
    #[error("a message exceeds {limit_bytes} bytes")]
    TooLong {
        /// The limit that was exceeded.
        limit_bytes: usize,
    },
}

/// Bytes in, messages out.
#[derive(Debug)]
pub struct Decoder {
    buffer: VecDeque<u8>,
    /// Bytes at the buffer's start that are known to hold no line end.
    scanned: usize,
    limit_bytes: usize,
    limit_values: usize,
    overflowed: bool,
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder::new()
    }
}

impl Decoder {
    /// A decoder with the usual limit, [`MAX_MESSAGE_BYTES`].
    pub fn new() -> Decoder {
        Decoder::with_limits(MAX_MESSAGE_BYTES, MAX_MESSAGE_VALUES)
    }

    /// A decoder that accepts messages of up to `limit_bytes`, with about `limit_values` values.
    pub fn with_limits(limit_bytes: usize, limit_values: usize) -> Decoder {
        Decoder { buffer: VecDeque::new(), scanned: 0, limit_bytes, limit_values, overflowed: false }
    }

    /// Takes bytes as they arrived. Drain [`Decoder::next_message`] between calls: that keeps the memory bounded.
    pub fn feed(&mut self, bytes: &[u8]) {
        if !self.overflowed {
            self.buffer.extend(bytes);
        }
    }

    /// The next complete message, or `None` until more bytes arrive.
    pub fn next_message(&mut self) -> Option<Result<Message, DecodeError>> {
        Some(self.next_value()?.map(classify))
    }

    /// The next complete JSON value, unclassified: for protocols that share the framing.
    pub fn next_value(&mut self) -> Option<Result<Value, DecodeError>> {
        loop {
            let line = match self.next_line()? {
                Ok(line) => line,
                Err(error) => return Some(Err(error)),
            };
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            // Each value but the first follows one of these. In strings they count as well.
            let values = line.iter().filter(|byte| matches!(byte, b',' | b':' | b'[' | b'{')).count();
            if values > self.limit_values {
                let (length_bytes, limit) = (line.len(), self.limit_values);
                return Some(Err(DecodeError::TooMany { length_bytes, values, limit }));
            }
            return Some(match serde_json::from_slice::<Value>(line) {
                Ok(value) if value.is_object() => Ok(value),
                Ok(_) => Err(DecodeError::NotJson {
                    length_bytes: line.len(),
                    reason: "it is another kind of value".to_owned(),
                }),
                Err(error) => {
                    Err(DecodeError::NotJson { length_bytes: line.len(), reason: error.to_string() })
                }
            });
        }
    }

    /// The bytes that were fed and not yet given out.
    pub fn into_bytes(self) -> Vec<u8> {
        self.buffer.into()
    }

    fn next_line(&mut self) -> Option<Result<Vec<u8>, DecodeError>> {
        if self.overflowed {
            return None;
        }
        let found = self.buffer.iter().skip(self.scanned).position(|&byte| byte == b'\n');
        let length = found.map_or(self.buffer.len(), |at| self.scanned + at);
        if length > self.limit_bytes {
            self.overflowed = true;
            self.buffer = VecDeque::new();
            return Some(Err(DecodeError::TooLong { limit_bytes: self.limit_bytes }));
        }
        if found.is_none() {
            self.scanned = length;
            return None;
        }
        self.scanned = 0;
        Some(Ok(self.buffer.drain(..=length).collect()))
    }
}

/// One command as the bytes to write, line end included. `Null` arguments are left out.
pub fn encode(id: u64, command: &str, arguments: Value) -> Vec<u8> {
    let mut message = json!({"execute": command, "id": id});
    if !arguments.is_null() {
        message["arguments"] = arguments;
    }
    let mut bytes = message.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

fn classify(mut value: Value) -> Message {
    let id = value.get("id").and_then(Value::as_u64);
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(greeting) = value.get("QMP") {
        let part =
            |key| greeting.pointer(&format!("/version/qemu/{key}")).and_then(Value::as_u64).unwrap_or(0);
        return Message::Greeting { version: (part("major"), part("minor"), part("micro")) };
    }
    if let Some(value) = value.get_mut("return") {
        return Message::Return { id, value: value.take() };
    }
    if let Some(error) = value.get("error") {
        return Message::Error { id, class: text(error, "class"), desc: text(error, "desc") };
    }
    if value.get("event").is_some_and(Value::is_string) {
        let part = |key| value.pointer(&format!("/timestamp/{key}")).and_then(Value::as_i64).unwrap_or(0);
        let timestamp = Timestamp { seconds: part("seconds"), microseconds: part("microseconds") };
        let name = text(&value, "event");
        let data = value.get_mut("data").map(Value::take).unwrap_or(Value::Null);
        return Message::Event(Event { name, data, timestamp });
    }
    Message::Unknown(value)
}

/// What a QEMU says, for tests.
#[cfg(test)]
pub(crate) const SESSION: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}"#,
    "\r\n",
    r#"{"return": {}, "id": 1}"#,
    "\r\n",
    r#"{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "STOP"}"#,
    "\r\n",
    r#"{"id": 2, "error": {"class": "GenericError", "desc": "no"}}"#,
    "\r\n",
    r#"{"timestamp": {"seconds": 5, "microseconds": 8}, "event": "NEW_ONE", "data": {"a": [1]}}"#,
    "\r\n",
    r#"{"surprise": true}"#,
    "\r\n",
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(decoder: &mut Decoder) -> Vec<Message> {
        std::iter::from_fn(|| decoder.next_message()).map(|message| message.expect("valid")).collect()
    }

    #[test]
    fn a_session_decodes() {
        let mut decoder = Decoder::new();
        decoder.feed(SESSION.as_bytes());
        assert_eq!(
            drain(&mut decoder),
            [
                Message::Greeting { version: (7, 2, 22) },
                Message::Return { id: Some(1), value: json!({}) },
                Message::Event(Event {
                    name: "STOP".into(),
                    data: Value::Null,
                    timestamp: Timestamp { seconds: 5, microseconds: 7 },
                }),
                Message::Error { id: Some(2), class: "GenericError".into(), desc: "no".into() },
                Message::Event(Event {
                    name: "NEW_ONE".into(),
                    data: json!({"a": [1]}),
                    timestamp: Timestamp { seconds: 5, microseconds: 8 },
                }),
                Message::Unknown(json!({"surprise": true})),
            ]
        );
    }

    #[test]
    fn a_bad_line_costs_one_error_only() {
        let mut decoder = Decoder::new();
        decoder.feed(b"garbage\n[1]\n{\"return\": 3, \"id\": 9}\n");
        assert!(matches!(decoder.next_message(), Some(Err(DecodeError::NotJson { length_bytes: 7, .. }))));
        assert!(matches!(decoder.next_message(), Some(Err(DecodeError::NotJson { length_bytes: 3, .. }))));
        assert_eq!(drain(&mut decoder), [Message::Return { id: Some(9), value: json!(3) }]);
    }

    #[test]
    fn an_endless_message_is_refused() {
        let mut decoder = Decoder::with_limits(100, 10);
        decoder.feed(&[b'x'; 101]);
        assert!(matches!(decoder.next_message(), Some(Err(DecodeError::TooLong { limit_bytes: 100 }))));
        decoder.feed(b"\n{}\n");
        assert!(decoder.next_message().is_none());
    }

    #[test]
    fn a_message_of_too_many_values_costs_one_error_only() {
        let mut decoder = Decoder::new();
        let many = format!("{{\"return\": [{}0]}}\n{{}}\n", "0,".repeat(MAX_MESSAGE_VALUES));
        decoder.feed(many.as_bytes());
        assert!(matches!(
            decoder.next_message(),
            Some(Err(DecodeError::TooMany { limit: MAX_MESSAGE_VALUES, .. }))
        ));
        assert_eq!(drain(&mut decoder), [Message::Unknown(json!({}))]);
    }

    #[test]
    fn commands_encode_to_one_line() {
        assert_eq!(encode(4, "stop", Value::Null), b"{\"execute\":\"stop\",\"id\":4}\n");
        let with_newline = encode(5, "getfd", json!({"fdname": "a\nb"}));
        assert_eq!(with_newline.iter().filter(|&&byte| byte == b'\n').count(), 1);
    }

    proptest! {
        #[test]
        fn chunking_does_not_matter(cuts in proptest::collection::vec(0..SESSION.len(), 0..20)) {
            let mut whole = Decoder::new();
            whole.feed(SESSION.as_bytes());
            let expected = drain(&mut whole);

            let mut cuts = cuts;
            cuts.extend([0, SESSION.len()]);
            cuts.sort_unstable();
            let mut decoder = Decoder::new();
            let mut messages = Vec::new();
            for pair in cuts.windows(2) {
                decoder.feed(&SESSION.as_bytes()[pair[0]..pair[1]]);
                messages.extend(drain(&mut decoder));
            }
            prop_assert_eq!(messages, expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::with_limits(256, 100);
            decoder.feed(&bytes);
            let lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
            let yielded = std::iter::from_fn(|| decoder.next_message()).count();
            prop_assert!(yielded <= lines + 1);
        }
    }
}
