//! The status file: one line of JSON that a reader always sees whole.
//!
//! Invariant: the file is only ever replaced by `rename`, so that its content is one
//! instant of the program. It is at most [`PERIOD`] old while the program runs.

use std::fmt::{Display, Write as _};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::Failure;

/// How often the file is replaced. Short, because tests wait for it; long enough that
/// writing costs an emulated machine next to nothing.
pub const PERIOD: Duration = Duration::from_millis(50);

/// Writes the status file, if one was asked for.
#[derive(Debug)]
pub struct StatusFile {
    path: Option<PathBuf>,
    last: String,
    due: Instant,
}

impl StatusFile {
    /// Nothing is written until the first [`StatusFile::update`].
    pub fn new(path: Option<PathBuf>) -> Self {
        Self { path, last: String::new(), due: Instant::now() }
    }

    /// Replaces the file if it is due; `line` is only made then.
    pub fn update(&mut self, line: impl FnOnce() -> Line) -> Result<(), Failure> {
        if self.path.is_none() || Instant::now() < self.due {
            return Ok(());
        }
        self.write(line())
    }

    /// Replaces the file now.
    pub fn write(&mut self, line: Line) -> Result<(), Failure> {
        let Some(path) = &self.path else { return Ok(()) };
        self.due = Instant::now() + PERIOD;
        let text = line.finish();
        if text == self.last {
            return Ok(());
        }
        let mut next = path.clone().into_os_string();
        next.push(".next");
        fs::write(&next, &text)
            .and_then(|()| fs::rename(&next, path))
            .map_err(|e| Failure::Io("write the status file", e))?;
        self.last = text;
        Ok(())
    }
}

/// One JSON object in the making. Names and texts are ours, never a peer's.
#[derive(Debug)]
pub struct Line(String);

impl Line {
    /// An object that says which subcommand it is of.
    pub fn new(kind: &str) -> Self {
        Self(format!("{{\"kind\":\"{kind}\""))
    }

    /// Adds a number or a boolean.
    pub fn value(mut self, name: &str, value: impl Display) -> Self {
        let _ = write!(self.0, ",\"{name}\":{value}");
        self
    }

    /// Adds a number, or null.
    pub fn optional(self, name: &str, value: Option<impl Display>) -> Self {
        match value {
            Some(value) => self.value(name, value),
            None => self.value(name, "null"),
        }
    }

    /// Adds an identifier: hexadecimal text, since many JSON readers round large numbers.
    pub fn id(mut self, name: &str, id: u64) -> Self {
        let _ = write!(self.0, ",\"{name}\":\"{id:016x}\"");
        self
    }

    /// Adds one of a few fixed words.
    pub fn word(mut self, name: &str, word: &'static str) -> Self {
        let _ = write!(self.0, ",\"{name}\":\"{word}\"");
        self
    }

    /// Adds an object of numbers.
    pub fn map<K: Display, V: Display>(mut self, name: &str, entries: impl Iterator<Item = (K, V)>) -> Self {
        let _ = write!(self.0, ",\"{name}\":{{");
        for (index, (key, value)) in entries.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(self.0, "{comma}\"{key}\":{value}");
        }
        self.0.push('}');
        self
    }

    /// The line, with its newline.
    pub fn finish(mut self) -> String {
        self.0.push_str("}\n");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_json_object() {
        let line = Line::new("x")
            .value("a", 1)
            .optional("b", None::<u64>)
            .id("c", 255)
            .word("d", "open")
            .map("e", [(1, 2), (3, 4)].into_iter())
            .finish();
        assert_eq!(
            line,
            "{\"kind\":\"x\",\"a\":1,\"b\":null,\"c\":\"00000000000000ff\",\"d\":\"open\",\"e\":{\"1\":2,\"3\":4}}\n"
        );
    }
}
