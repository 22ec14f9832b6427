//! The file as a tree of YAML nodes that know their place in the text.
//!
//! A tree, and not the target types at once, because a typed reader stops at the first mistake and this one must go on.
//! Invariants: the tree is at most [`MAX_DEPTH`] deep and holds at most [`MAX_NODES`] nodes, aliases expanded; a
//! mapping keeps its entries in order, repeated keys included; every span lies inside the text, on character borders.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Location, NonFiniteFloatPolicy, Spanned};

use crate::limits::MAX_FILE_BYTES;
use crate::problem::{At, Excerpt, Problem};

/// The deepest nesting: a NIC's field is six deep, so this is generous.
const MAX_DEPTH: usize = 16;
/// The most nodes, aliases not expanded; also how many more nodes aliases may add.
const MAX_NODES: usize = 250_000;

/// A node of the document.
#[derive(Debug)]
pub(crate) struct Node {
    pub value: Value,
    pub at: At,
}

/// What a node is. A number keeps its spelling: `007` may be meant as a name.
#[derive(Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// The key of an entry of a mapping.
#[derive(Debug)]
pub(crate) struct Key {
    pub text: String,
    pub at: At,
}

impl Node {
    /// What the node is, in a user's words.
    pub fn described(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("`{value}`"),
            Value::Number(text) | Value::Text(text) => Excerpt(text).to_string(),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a mapping".to_owned(),
        }
    }

    /// That the node is not what belongs there.
    pub fn unexpected(&self, expected: &str) -> Problem {
        self.at.problem(
            format!("expected {expected}, found {}", self.described()),
            format!("expected {expected}"),
        )
    }
}

/// Reads the text's only document.
pub(crate) fn read(text: &str) -> Result<Node, Problem> {
    if text.len() > MAX_FILE_BYTES {
        let message =
            format!("the file has {} bytes; an environment file has at most {MAX_FILE_BYTES}", text.len());
        return Err(At::start().problem(message, "too long"));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_documents: 2,
            max_recorded_anchor_events: MAX_NODES,
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: MAX_DEPTH,
        },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        // `no` and `on` are names like any other here.
        strict_booleans: true,
        with_snippet: false,
    };
    let mut root: Node =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| syntax_problem(text, &error))?;
    root.settle(text);
    Ok(root)
}

/// The reader's own complaint: YAML that is none, or too much of it.
fn syntax_problem(text: &str, error: &serde_saphyr::Error) -> Problem {
    use serde_saphyr::MessageFormatter;

    let mut at = error.location().map_or_else(At::start, |location| At::from(&location));
    at.settle(text);
    let message = serde_saphyr::UserMessageFormatter.format_message(error.without_snippet());
    // Only shortened and escaped: the message may quote the file.
    let message: String = message.chars().take(300).flat_map(printable).collect();
    at.problem(format!("not a readable YAML document: {message}"), "here")
}

fn printable(character: char) -> impl Iterator<Item = char> {
    let keep = matches!(character, '\'' | '"' | '\\');
    let escaped = (!keep).then(|| character.escape_debug());
    keep.then_some(character).into_iter().chain(escaped.into_iter().flatten())
}

impl Node {
    /// Gives numbers the spelling they have in the text, and bounds all spans by it.
    fn settle(&mut self, text: &str) {
        self.at.settle(text);
        match &mut self.value {
            Value::Number(number) => {
                let spelling = self.at.span.clone().and_then(|span| text.get(span)).map(str::trim);
                if let Some(spelling) = spelling.filter(|spelling| !spelling.is_empty()) {
                    *number = spelling.to_owned();
                }
            }
            Value::List(nodes) => nodes.iter_mut().for_each(|node| node.settle(text)),
            Value::Map(entries) => {
                for (key, node) in entries {
                    key.at.settle(text);
                    node.settle(text);
                }
            }
            Value::Null | Value::Bool(_) | Value::Text(_) => {}
        }
    }
}

impl At {
    fn settle(&mut self, text: &str) {
        if self.span.clone().is_some_and(|span| text.get(span).is_none()) {
            self.span = None;
        }
    }
}

impl From<&Location> for At {
    fn from(location: &Location) -> At {
        let one_based = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).max(1);
        let span = location.span();
        let span = span.byte_offset().zip(span.byte_len()).and_then(|(offset, length)| {
            let start = usize::try_from(offset).ok()?;
            Some(start..start.checked_add(usize::try_from(length).ok()?)?)
        });
        At { line: one_based(location.line()), column: one_based(location.column()), span }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node { at: At::from(&spanned.defined), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<String>::deserialize(deserializer)?;
        Ok(Key { at: At::from(&spanned.defined), text: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML node")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = sequence.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut mapping: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = mapping.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}
