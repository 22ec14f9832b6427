//! The status file: one line of JSON that a reader always sees whole.
//!
//! Invariant: the file is only ever replaced by `rename`, so that its content is one
//! instant of the program. It is at most [`PERIOD`] old while the program runs, or as old as `--status-every` says.

use std::fmt::{Display, Write as _};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::arguments::{ArgumentError, Arguments};

/// How often the file is replaced, unless it is said otherwise. Short, because tests wait for it; an emulated machine spends
/// a twentieth of a processor on it.
pub const PERIOD: Duration = Duration::from_millis(50);

/// Writes the status file, if one was asked for.
#[derive(Debug)]
pub struct StatusFile {
    path: Option<PathBuf>,
    period: Duration,
    last: String,
    due: Instant,
}

impl StatusFile {
    /// Takes `--status FILE`, which may be absent, and `--status-every MS`. Nothing is written until the first
    /// [`StatusFile::update`].
    pub fn optional(arguments: &mut Arguments) -> Result<Self, ArgumentError> {
        let path = arguments.optional("status")?;
        let period = arguments.optional("status-every")?.map_or(PERIOD, Duration::from_millis);
        Ok(Self { path, period, last: String::new(), due: Instant::now() })
    }

    /// The same where `--status` must be there.
    pub fn required(arguments: &mut Arguments) -> Result<Self, ArgumentError> {
        let file = Self::optional(arguments)?;
        if file.path.is_some() { Ok(file) } else { Err(ArgumentError::Missing { name: "status" }) }
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
        self.due = Instant::now() + self.period;
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
    fn the_file_is_replaced_as_often_as_is_said() {
        let arguments = |line: &str| Arguments::parse(line.split_whitespace().map(str::to_owned).collect());
        let file = |line: &str| StatusFile::optional(&mut arguments(line).expect("pairs"));
        assert_eq!(file("--status f").expect("valid").period, PERIOD);
        assert_eq!(file("--status f --status-every 1000").expect("valid").period, Duration::from_secs(1));
        let wrong = ArgumentError::BadValue { name: "status-every", value: "1s".into() };
        assert_eq!(file("--status-every 1s").expect_err("no number"), wrong);
        let without = StatusFile::required(&mut arguments("--status-every 50").expect("pairs"));
        assert_eq!(without.expect_err("no file"), ArgumentError::Missing { name: "status" });
    }

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
