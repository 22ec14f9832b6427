//! From an environment file to an [`Environment`], or to everything that is wrong with it.
//!
//! Networks are read first, since NICs name them; then machines, one by one; then what only shows over all machines
//! (addresses given twice, MAC addresses not given at all).
//!
//! Invariant: where a part cannot be read, a problem has been pushed, and reading goes on with the next part. So no
//! problem means that every part is there.

mod fields;
mod machine;
mod network;
mod nic;

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::document::{self, Key, Node, Value};
use crate::environment::Environment;
use crate::limits::MAX_PATH_BYTES;
use crate::names::{EnvironmentName, NameError};
use crate::problem::{At, Excerpt, Problem, Problems, listed};
use crate::size::{parse_size, size_text};

use fields::Fields;

#[cfg(test)]
pub(crate) use {
    machine::{DISK_FIELDS, MACHINE_FIELDS},
    network::NETWORK_FIELDS,
    nic::NIC_FIELDS,
};

/// The only thing asked of the outside: does a file that is named exist.
pub trait Files {
    /// Whether there is a regular file, or what a link to one leads to, at this path.
    fn is_file(&self, path: &Path) -> bool;
}

/// An environment file's text and where it came from.
#[derive(Debug, Clone, Copy)]
pub struct SourceFile<'a> {
    /// What to call the file in messages.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
    /// Its folder: relative paths in the file start here, and its name stands in for a missing `name`. Absolute, unless
    /// the resolved paths may depend on the working folder.
    pub folder: &'a Path,
}

/// The fields of the file itself.
pub(crate) const FILE_FIELDS: &[&str] = &["name", "machines", "networks"];

/// Reads an environment file. `built_in_images` are the names that `image` may give.
///
/// On failure, everything found wrong, in the order of the text: never empty, and at most
/// [`MAX_PROBLEMS`](crate::limits::MAX_PROBLEMS).
pub fn parse(
    source: &SourceFile<'_>,
    files: &dyn Files,
    built_in_images: &[&str],
) -> Result<Environment, Vec<Problem>> {
    let root = document::read(source.text).map_err(|problem| vec![problem])?;
    let mut reader = Reader { source, files, built_in_images, problems: Problems::default() };
    match reader.environment(&root) {
        Some(environment) if reader.problems.is_empty() => Ok(environment),
        _ => Err(reader.problems.into_sorted()),
    }
}

/// What every part's reader needs.
struct Reader<'a> {
    source: &'a SourceFile<'a>,
    files: &'a dyn Files,
    built_in_images: &'a [&'a str],
    problems: Problems,
}

impl Reader<'_> {
    fn environment(&mut self, root: &Node) -> Option<Environment> {
        let fields = match &root.value {
            Value::Map(entries) => {
                Fields::read("an environment file", entries, FILE_FIELDS, &mut self.problems)
            }
            Value::Null => {
                let problem =
                    At::start().problem(format!("{} is empty", Excerpt(self.source.name)), "nothing here");
                self.problems.push(problem.hint("the least is `machines: {one: {image: micro}}`"));
                return None;
            }
            _ => {
                self.problems.push(root.unexpected("a mapping with `name`, `machines` and `networks`"));
                return None;
            }
        };
        let name = self.environment_name(&fields);
        let networks = self.networks(&fields);
        let machines = self.machines(&fields, &networks.declared);
        Some(Environment { name: name?, machines: machines?, networks: networks.read })
    }

    fn environment_name(&mut self, fields: &Fields<'_>) -> Option<EnvironmentName> {
        if let Some((_, node)) = fields.get("name") {
            return self.name(node, "the environment's name");
        }
        let folder = self.source.folder.file_name().and_then(|name| name.to_str());
        let name = folder.and_then(EnvironmentName::nearest);
        if name.is_none() {
            let problem =
                At::start().problem("the environment has no name, and its folder's cannot serve as one", "");
            self.problems.push(problem.hint("add `name: my-environment`"));
        }
        name
    }

    /// The entries of a mapping from names, each name once; `kind` is what they name. What stands under a bad name is
    /// worth reading too.
    fn named<'n, N>(&mut self, kind: &str, entries: &'n [(Key, Node)]) -> Vec<(Option<N>, &'n Key, &'n Node)>
    where
        N: FromStr<Err = NameError>,
    {
        let mut first_lines: HashMap<&str, u32> = HashMap::new();
        let mut named = Vec::new();
        for (key, node) in entries {
            if self.problems.is_full() {
                break;
            }
            if let Some(first_line) = first_lines.get(key.text.as_str()) {
                let message = format!("the {kind} {} is declared twice", Excerpt(&key.text));
                let hint = format!("the first is on line {first_line}: rename or remove one");
                self.problems.push(key.at.problem(message, "declared again").hint(hint));
                continue;
            }
            first_lines.insert(&key.text, key.at.line);
            let name = key.text.parse().map_err(|error| self.bad_name(&key.at, &error)).ok();
            named.push((name, key, node));
        }
        named
    }

    /// A name as a value; `expected` says whose.
    fn name<N>(&mut self, node: &Node, expected: &str) -> Option<N>
    where
        N: FromStr<Err = NameError>,
    {
        let text = self.text(node, expected)?;
        text.parse().map_err(|error| self.bad_name(&node.at, &error)).ok()
    }

    fn bad_name(&mut self, at: &At, error: &NameError) {
        let hint = match error {
            NameError::Character { name, .. }
            | NameError::Hyphen { name }
            | NameError::TooLong { name, .. } => {
                EnvironmentName::nearest(name).map(|near| format!("for example {}", Excerpt(&near)))
            }
            NameError::Empty => None,
        };
        let hint = hint.unwrap_or_else(|| "a name is 1 to 32 of `a-z`, `0-9` and `-`".to_owned());
        self.problems.push(at.problem(error.to_string(), "not a name").hint(hint));
    }

    /// A scalar as it is spelled; `expected` says what it should be.
    fn text<'n>(&mut self, node: &'n Node, expected: &str) -> Option<&'n str> {
        match &node.value {
            Value::Text(text) | Value::Number(text) => Some(text),
            Value::Null | Value::Bool(_) | Value::List(_) | Value::Map(_) => {
                self.problems.push(node.unexpected(expected));
                None
            }
        }
    }

    /// A whole number in a range; `expected` says what it counts.
    fn whole_number(&mut self, node: &Node, expected: &str, range: &RangeInclusive<u64>) -> Option<u64> {
        let expected = format!("{expected} from {} to {}", range.start(), range.end());
        let text = self.text(node, &expected)?;
        let number = text.parse().ok().filter(|number| range.contains(number));
        if number.is_none() {
            self.problems.push(node.unexpected(&expected));
        }
        number
    }

    /// A size in a range and a multiple of `step_bytes`; `what` has it.
    fn size(&mut self, node: &Node, what: &str, range: &RangeInclusive<u64>, step_bytes: u64) -> Option<u64> {
        let text = self.text(node, "a size such as `256MiB`")?;
        let bytes = match parse_size(text) {
            Ok(bytes) => bytes,
            Err(error) => {
                let problem = node.at.problem(error.to_string(), "not a size");
                self.problems
                    .push(problem.hint("a size is a number and a unit: `256MiB`, `1GiB`, `512M`, `1048576`"));
                return None;
            }
        };
        if !range.contains(&bytes) {
            let (least, most) = (size_text(*range.start()), size_text(*range.end()));
            let message = format!("{} is out of range for {what}: {least} to {most}", Excerpt(text));
            self.problems.push(node.at.problem(message, "out of range"));
            return None;
        }
        if bytes % step_bytes != 0 {
            let message = format!(
                "{what} must be a multiple of {}; {} is {bytes} bytes",
                size_text(step_bytes),
                Excerpt(text)
            );
            let nearest = bytes.next_multiple_of(step_bytes).min(*range.end());
            let hint = format!("the next larger one is {}", Excerpt(&size_text(nearest)));
            self.problems.push(node.at.problem(message, "not a multiple").hint(hint));
            return None;
        }
        Some(bytes)
    }

    /// The path of a file that must exist; `expected` says which.
    fn file(&mut self, node: &Node, expected: &str) -> Option<PathBuf> {
        let text = self.text(node, expected)?;
        if text.is_empty() || text.len() > MAX_PATH_BYTES || text.contains('\0') {
            self.problems.push(node.unexpected(&format!("{expected} of 1 to {MAX_PATH_BYTES} bytes")));
            return None;
        }
        let path: PathBuf =
            self.source.folder.join(text).components().filter(|part| *part != Component::CurDir).collect();
        let Some(path_text) = path.to_str() else {
            let message = format!("the folder of {} has a name that is not UTF-8", Excerpt(self.source.name));
            self.problems.push(node.at.problem(message, "relative to that folder"));
            return None;
        };
        if !self.files.is_file(&path) {
            let hint = if text.starts_with('~') {
                "`~` is not expanded here: write the home folder out"
            } else if Path::new(text).is_absolute() {
                "check the path"
            } else {
                "relative paths start at the environment file's folder"
            };
            let problem = node.at.problem(format!("there is no file {}", Excerpt(path_text)), "no such file");
            self.problems.push(problem.hint(hint));
            return None;
        }
        Some(path)
    }

    /// One of a few words.
    fn word<'w>(&mut self, node: &Node, words: &[&'w str]) -> Option<&'w str> {
        let expected = format!("one of {}", listed(words.iter().copied()));
        let text = self.text(node, &expected)?;
        let word = words.iter().copied().find(|word| *word == text);
        if word.is_none() {
            self.problems.push(node.unexpected(&expected));
        }
        word
    }
}
