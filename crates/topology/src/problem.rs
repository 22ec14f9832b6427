//! What is wrong with an environment file, and where.
//!
//! Invariant: messages, hints and labels are single lines without control characters, whatever the file holds.

use std::fmt;
use std::ops::Range;

use crate::limits::MAX_PROBLEMS;

/// One thing that is wrong with an environment file, with its place in the text and what would be right.
///
/// Plain data, for a program to render with the text beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub message: String,
    /// What would be right, or what to do.
    pub hint: Option<String>,
    /// The line, counted from 1.
    pub line: u32,
    /// The column, counted from 1 in characters.
    pub column: u32,
    /// The bytes of the text that are meant, where known; always inside the text.
    pub span: Option<Range<usize>>,
    /// A few words to write under those bytes.
    pub label: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Problem {}

/// A place in the file's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct At {
    pub line: u32,
    pub column: u32,
    pub span: Option<Range<usize>>,
}

impl At {
    /// The file as a whole.
    pub fn start() -> At {
        At { line: 1, column: 1, span: None }
    }

    pub fn problem(&self, message: impl Into<String>, label: impl Into<String>) -> Problem {
        Problem {
            message: message.into(),
            hint: None,
            line: self.line,
            column: self.column,
            span: self.span.clone(),
            label: label.into(),
        }
    }
}

impl Problem {
    pub(crate) fn hint(self, hint: impl Into<String>) -> Problem {
        Problem { hint: Some(hint.into()), ..self }
    }
}

/// The problems found so far, at most [`MAX_PROBLEMS`].
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    pub fn push(&mut self, problem: Problem) {
        // An anchor's text is read once for each alias: the same problem in the same place is one problem.
        if !self.is_full() && !self.0.contains(&problem) {
            self.0.push(problem);
        }
    }

    /// There is no use in looking for more.
    pub fn is_full(&self) -> bool {
        self.0.len() >= MAX_PROBLEMS
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In the order of the text.
    pub fn into_sorted(mut self) -> Vec<Problem> {
        self.0.sort_by_key(|problem| (problem.line, problem.column));
        self.0
    }
}

/// Text from outside, fit for a message: between backquotes, shortened, control characters escaped.
pub(crate) struct Excerpt<'a>(pub &'a str);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_CHARACTERS: usize = 80;
        f.write_str("`")?;
        for (index, character) in self.0.chars().enumerate() {
            if index == MAX_CHARACTERS {
                f.write_str("…")?;
                break;
            }
            match character {
                '\'' | '"' | '\\' => write!(f, "{character}")?,
                other => write!(f, "{}", other.escape_debug())?,
            }
        }
        f.write_str("`")
    }
}

/// A few of the texts for a hint: `` `lan`, `wan` and 7 more ``.
pub(crate) fn listed<'a>(texts: impl ExactSizeIterator<Item = &'a str>) -> String {
    const MAX_SHOWN: usize = 10;
    let total = texts.len();
    let shown: Vec<String> = texts.take(MAX_SHOWN).map(|text| Excerpt(text).to_string()).collect();
    let more = total - shown.len();
    let shown = shown.join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}

/// The candidate that `text` was probably meant to be.
pub(crate) fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const MAX_CHARACTERS: usize = 64;
    let text: Vec<char> = text.chars().take(MAX_CHARACTERS + 1).flat_map(char::to_lowercase).collect();
    if text.len() > MAX_CHARACTERS {
        return None;
    }
    let farthest = (text.len() / 3).max(1);
    candidates
        .map(|candidate| {
            (distance(&text, &candidate.chars().take(MAX_CHARACTERS).collect::<Vec<_>>()), candidate)
        })
        .filter(|(distance, candidate)| *distance <= farthest && *distance < candidate.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn one text into the other.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word() {
        let words = || ["memory", "nics", "lan", "x"].into_iter();
        for (text, word) in [
            ("memroy", Some("memory")),
            ("Memory", Some("memory")),
            ("mem", None),
            ("nic", Some("nics")),
            ("lam", Some("lan")),
            ("y", None),
            ("", None),
        ] {
            assert_eq!(nearest(text, words()), word, "{text}");
        }
        assert_eq!(nearest(&"m".repeat(1 << 20), words()), None);
    }

    #[test]
    fn excerpts_are_short_and_harmless() {
        assert_eq!(Excerpt("a\n\u{1b}[31m\u{202e}\"b\"").to_string(), "`a\\n\\u{1b}[31m\\u{202e}\"b\"`");
        assert_eq!(Excerpt(&"x".repeat(1000)).to_string().chars().count(), 83);
    }
}
