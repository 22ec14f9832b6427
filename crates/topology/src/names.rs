//! Names of environments, machines, networks and disks.
//!
//! Invariant: a name is 1 to 32 characters of `a-z`, `0-9` and `-`, and neither starts nor ends with `-`. So it is safe
//! as a file name, a QEMU id, a host name and a word on a command line, without quoting.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::problem::Excerpt;

/// The longest name, in characters.
pub(crate) const MAX_NAME_LENGTH: usize = 32;

/// The rule as a regular expression, for the JSON Schema.
pub(crate) const NAME_PATTERN: &str = "^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$";

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is no text.
    #[error("a name cannot be empty")]
    Empty,
    /// More than 32 characters.
    #[error("{} has {length} characters; a name has at most {MAX_NAME_LENGTH}", Excerpt(name))]
    TooLong {
        /// The text.
        name: String,
        /// Its length in characters.
        length: usize,
    },
    /// Something else than a lower-case letter, a digit or a hyphen.
    #[error(
        "{} cannot be a name: {} is not a lower-case letter, a digit or a hyphen",
        Excerpt(name),
        Excerpt(character.encode_utf8(&mut [0; 4]))
    )]
    Character {
        /// The text.
        name: String,
        /// The first offending character.
        character: char,
    },
    /// A hyphen at the start or the end.
    #[error("{} cannot be a name: it starts or ends with a hyphen", Excerpt(name))]
    Hyphen {
        /// The text.
        name: String,
    },
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                check(&text)?;
                Ok(Self(text))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl Deref for $type {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name! {
    /// The name of an environment, unique on its hosts.
    EnvironmentName
}
name! {
    /// The name of a machine, unique in its environment.
    MachineName
}
name! {
    /// The name of a network, unique in its environment.
    NetworkName
}
name! {
    /// The name of a host, unique in its cluster.
    HostName
}
name! {
    /// The name of a label that hosts carry and machines ask for.
    LabelName
}
name! {
    /// The name of a disk, unique on its machine.
    DiskName
}

/// The longest value of a label, in characters.
pub(crate) const MAX_LABEL_VALUE_LENGTH: usize = 63;

/// The rule of labels' values as a regular expression, for the JSON Schema.
pub(crate) const LABEL_VALUE_PATTERN: &str = "^[A-Za-z0-9._-]{1,63}$";

/// The value of a label: 1 to 63 of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabelValue(String);

/// Why a text is not the value of a label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} cannot be a label's value: it is not 1 to {MAX_LABEL_VALUE_LENGTH} of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`",
    Excerpt(text)
)]
pub struct LabelValueError {
    /// The text.
    pub text: String,
}

impl LabelValue {
    /// The value as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabelValue {
    type Err = LabelValueError;

    fn from_str(text: &str) -> Result<Self, LabelValueError> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for LabelValue {
    type Error = LabelValueError;

    fn try_from(text: String) -> Result<Self, LabelValueError> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let fits = (1..=MAX_LABEL_VALUE_LENGTH).contains(&text.len());
        if fits && text.bytes().all(allowed) { Ok(Self(text)) } else { Err(LabelValueError { text }) }
    }
}

impl From<LabelValue> for String {
    fn from(value: LabelValue) -> String {
        value.0
    }
}

impl fmt::Display for LabelValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl HostName {
    /// The nearest name to any text, such as a computer's own: `Node1.example.org` becomes `node1-example-org`. `None`
    /// when nothing is left.
    pub fn nearest(text: &str) -> Option<Self> {
        EnvironmentName::nearest(text).map(|name| Self(name.0))
    }
}

impl EnvironmentName {
    /// The nearest name to any text, such as a folder's: `My Lab_2` becomes `my-lab-2`. `None` when nothing is left.
    pub fn nearest(text: &str) -> Option<Self> {
        let mut name = String::new();
        for character in text.chars() {
            if name.len() == MAX_NAME_LENGTH {
                break;
            }
            match character.to_ascii_lowercase() {
                kept @ ('a'..='z' | '0'..='9') => name.push(kept),
                _ if name.is_empty() || name.ends_with('-') => {}
                _ => name.push('-'),
            }
        }
        name.truncate(name.trim_end_matches('-').len());
        name.parse().ok()
    }
}

fn check(text: &str) -> Result<(), NameError> {
    let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-');
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if let Some(character) = text.chars().find(|c| !allowed(*c)) {
        return Err(NameError::Character { name: text.to_owned(), character });
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(NameError::Hyphen { name: text.to_owned() });
    }
    if text.len() > MAX_NAME_LENGTH {
        return Err(NameError::TooLong { name: text.to_owned(), length: text.len() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_the_rule() {
        let longest = "a".repeat(32);
        for good in ["a", "0", "web-1", "a--b", longest.as_str()] {
            assert_eq!(good.parse::<MachineName>().unwrap().as_str(), good);
        }
        let too_long = "a".repeat(33);
        for (bad, message) in [
            ("", "a name cannot be empty"),
            ("-a", "`-a` cannot be a name: it starts or ends with a hyphen"),
            ("a-", "`a-` cannot be a name: it starts or ends with a hyphen"),
            ("Web", "`Web` cannot be a name: `W` is not a lower-case letter, a digit or a hyphen"),
            ("a/../b", "`a/../b` cannot be a name: `/` is not a lower-case letter, a digit or a hyphen"),
            (
                "a\u{1b}[2J",
                "`a\\u{1b}[2J` cannot be a name: `\\u{1b}` is not a lower-case letter, a digit or a hyphen",
            ),
            (&too_long, &format!("`{too_long}` has 33 characters; a name has at most 32")),
        ] {
            assert_eq!(bad.parse::<MachineName>().unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn deserialising_checks() {
        assert_eq!(serde_json::from_str::<DiskName>("\"data\"").unwrap().as_str(), "data");
        assert!(serde_json::from_str::<DiskName>("\"../data\"").is_err());
        assert_eq!(serde_json::to_string(&"lan".parse::<NetworkName>().unwrap()).unwrap(), "\"lan\"");
    }

    #[test]
    fn the_nearest_name_of_a_folder() {
        for (folder, name) in [
            ("pair", Some("pair")),
            ("My Lab_2", Some("my-lab-2")),
            ("--x--", Some("x")),
            ("...", None),
            ("", None),
            ("aaaaaaaaaabbbbbbbbbbccccccccccd eeee", Some("aaaaaaaaaabbbbbbbbbbccccccccccd")),
        ] {
            assert_eq!(EnvironmentName::nearest(folder).as_deref(), name, "{folder}");
        }
    }
}
