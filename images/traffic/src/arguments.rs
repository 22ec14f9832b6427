//! The command line: `--name value` pairs, each taken once by the subcommand that knows it.
//!
//! Invariant: a subcommand calls [`Arguments::finish`] before it does anything, so that a
//! misspelt option is an error and not silently ignored.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The options of one subcommand that nobody has taken yet.
#[derive(Debug)]
pub struct Arguments {
    values: BTreeMap<String, String>,
}

/// What is wrong with the command line.
#[derive(Debug, PartialEq, Eq)]
pub enum ArgumentError {
    /// No subcommand was given.
    NoCommand,
    /// There is no such subcommand.
    UnknownCommand { command: String },
    /// A word where `--name` was expected.
    NotAnOption { word: String },
    /// `--name` without a value after it.
    NoValue { name: String },
    /// An option given twice.
    Twice { name: String },
    /// An option that this subcommand does not know.
    Unknown { name: String },
    /// An option that must be there.
    Missing { name: &'static str },
    /// A value that does not parse, or is out of range.
    BadValue { name: &'static str, value: String },
}

impl fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCommand => write!(f, "no subcommand given"),
            Self::UnknownCommand { command } => write!(f, "no such subcommand: {command}"),
            Self::NotAnOption { word } => write!(f, "expected an option, found {word}"),
            Self::NoValue { name } => write!(f, "--{name} needs a value"),
            Self::Twice { name } => write!(f, "--{name} is given twice"),
            Self::Unknown { name } => write!(f, "--{name} is not an option here"),
            Self::Missing { name } => write!(f, "--{name} is missing"),
            Self::BadValue { name, value } => write!(f, "--{name} {value}: not a valid value"),
        }
    }
}

impl Arguments {
    /// Reads `--name value` pairs.
    pub fn parse(words: Vec<String>) -> Result<Self, ArgumentError> {
        let mut values = BTreeMap::new();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--").map(str::to_owned) else {
                return Err(ArgumentError::NotAnOption { word });
            };
            let Some(value) = words.next() else {
                return Err(ArgumentError::NoValue { name });
            };
            if values.insert(name.clone(), value).is_some() {
                return Err(ArgumentError::Twice { name });
            }
        }
        Ok(Self { values })
    }

    /// Takes an option that may be absent.
    pub fn optional<T: FromStr>(&mut self, name: &'static str) -> Result<Option<T>, ArgumentError> {
        let Some(value) = self.values.remove(name) else {
            return Ok(None);
        };
        match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(_) => Err(ArgumentError::BadValue { name, value }),
        }
    }

    /// Takes an option that must be there.
    pub fn required<T: FromStr>(&mut self, name: &'static str) -> Result<T, ArgumentError> {
        self.optional(name)?.ok_or(ArgumentError::Missing { name })
    }

    /// Takes a number of bytes (`4096`, `64KiB`, `1MiB`, `2GiB`) that must lie in `range`.
    pub fn bytes(
        &mut self,
        name: &'static str,
        default: Option<u64>,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<u64, ArgumentError> {
        let Some(value) = self.values.remove(name) else {
            return default.ok_or(ArgumentError::Missing { name });
        };
        match parse_bytes(&value) {
            Some(bytes) if range.contains(&bytes) => Ok(bytes),
            _ => Err(ArgumentError::BadValue { name, value }),
        }
    }

    /// Takes a rate in something per second: at least 1, absent means no limit.
    pub fn rate(&mut self) -> Result<Option<u64>, ArgumentError> {
        if !self.values.contains_key("rate") {
            return Ok(None);
        }
        self.bytes("rate", None, 1..=1 << 40).map(Some)
    }

    /// Fails if an option is left that nobody took.
    pub fn finish(&mut self) -> Result<(), ArgumentError> {
        match self.values.pop_first() {
            None => Ok(()),
            Some((name, _)) => Err(ArgumentError::Unknown { name }),
        }
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (digits, shift) = if let Some(digits) = text.strip_suffix("KiB") {
        (digits, 10)
    } else if let Some(digits) = text.strip_suffix("MiB") {
        (digits, 20)
    } else if let Some(digits) = text.strip_suffix("GiB") {
        (digits, 30)
    } else {
        (text, 0)
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Result<Arguments, ArgumentError> {
        Arguments::parse(line.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn sizes_with_units() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("3KiB", Some(3 << 10)),
            ("64MiB", Some(64 << 20)),
            ("2GiB", Some(2 << 30)),
            ("18446744073709551615KiB", None),
            ("-1", None),
            ("1MB", None),
            ("", None),
        ] {
            assert_eq!(parse_bytes(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(arguments("stray").unwrap_err(), ArgumentError::NotAnOption { word: "stray".into() });
        assert_eq!(arguments("--port").unwrap_err(), ArgumentError::NoValue { name: "port".into() });
        assert_eq!(arguments("--port 1 --port 2").unwrap_err(), ArgumentError::Twice { name: "port".into() });
        let mut known = arguments("--port 70000 --speed 3 --rate 0").unwrap();
        assert_eq!(
            known.required::<u16>("port").unwrap_err(),
            ArgumentError::BadValue { name: "port", value: "70000".into() }
        );
        assert_eq!(known.rate().unwrap_err(), ArgumentError::BadValue { name: "rate", value: "0".into() });
        assert_eq!(known.required::<u16>("id").unwrap_err(), ArgumentError::Missing { name: "id" });
        assert_eq!(known.finish().unwrap_err(), ArgumentError::Unknown { name: "speed".into() });
    }
}
