//! What a command prints: text for people or one JSON document on standard output, everything else on standard error.
//!
//! Invariant: text that comes from elsewhere (guests, files, other versions) passes through [`printable`], so that
//! nothing but this program and the raw streams of `exec`, `console` and `logs` can steer the user's terminal.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table};
use diorama_api::ApiError;
use serde::Serialize;

use crate::failure::Failure;

/// Where and how a command prints.
#[derive(Debug)]
pub struct Output {
    json: bool,
    verbose: u8,
    stdout_colour: Colour,
    stderr_colour: Colour,
    stderr_is_terminal: bool,
}

/// Whether to colour, decided once for each stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Colour(bool);

impl Output {
    /// Looks at the process's streams and environment variables once.
    pub fn new(json: bool, verbose: u8) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let wanted = !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let stderr_is_terminal = io::stderr().is_terminal();
        Self {
            json,
            verbose,
            stdout_colour: Colour(wanted && io::stdout().is_terminal()),
            stderr_colour: Colour(wanted && stderr_is_terminal),
            stderr_is_terminal,
        }
    }

    /// Whether standard output is one JSON document.
    pub fn json(&self) -> bool {
        self.json
    }

    /// How often `-v` was given.
    pub fn verbosity(&self) -> u8 {
        self.verbose
    }

    /// Whether progress bars may be drawn.
    pub fn draws_progress(&self) -> bool {
        self.stderr_is_terminal
    }

    /// Colours for standard output.
    pub fn colour(&self) -> Colour {
        self.stdout_colour
    }

    /// Colours for standard error.
    pub fn stderr_colour(&self) -> Colour {
        self.stderr_colour
    }

    /// Prints the command's one document (with `--json`) or the text that says the same.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn result<T: Serialize>(&self, document: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.json {
            write_document(document).map_err(|error| stdout_failure(&error))
        } else {
            self.raw(text().as_bytes())
        }
    }

    /// Writes bytes to standard output as they are, at once.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn raw(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| stdout_failure(&error))
    }

    /// Writes to standard error. A closed standard error is no reason to stop.
    pub fn errors(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Writes bytes to standard error as they are.
    pub fn raw_errors(&self, bytes: &[u8]) {
        let _ = io::stderr().lock().write_all(bytes);
    }

    /// Prints a report that may say that something is wrong. With `--json` it is still one document: the report, and
    /// beside it the `error` that every failed command has.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn verdict<T: Serialize>(
        &self,
        report: &T,
        wrong: Option<ApiError>,
        text: impl FnOnce() -> String,
    ) -> Result<u8, Failure> {
        #[derive(Serialize)]
        struct Verdict<'a, T> {
            #[serde(flatten)]
            report: &'a T,
            #[serde(skip_serializing_if = "Option::is_none")]
            error: Option<&'a ApiError>,
        }
        self.result(&Verdict { report, error: wrong.as_ref() }, text)?;
        let Some(wrong) = wrong else { return Ok(0) };
        if !self.json {
            self.error(&wrong);
        }
        Ok(1)
    }

    /// Says on standard error what is wrong and what to do about it.
    pub fn error(&self, error: &ApiError) {
        let colour = self.stderr_colour;
        let mut text = format!("{} {}\n", colour.bad("error:"), printable(&error.message));
        if let Some(hint) = &error.hint {
            text.push_str(&format!("{} {}\n", colour.dim("hint:"), printable(hint)));
        }
        self.errors(&text);
    }

    /// Warns the user.
    pub fn warn(&self, message: &str) {
        self.errors(&format!("{} {}\n", self.stderr_colour.warning("warning:"), printable(message)));
    }

    /// Says something that only matters to those who asked for more.
    pub fn detail(&self, message: impl FnOnce() -> String) {
        if self.verbose > 0 {
            self.errors(&format!("{}\n", self.stderr_colour.dim(&printable(&message()))));
        }
    }

    /// An empty table in this program's style; [`lines`] makes text of it.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        // Not the spaces around it: `lines` counts on them.
        table.style_text_only();
        // Colour was decided above; the table must not look at the terminal a second time.
        if self.stdout_colour.0 {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table
    }
}

impl Colour {
    /// Whether there is any.
    pub fn is_on(self) -> bool {
        self.0
    }

    /// For headings and names.
    pub fn strong(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// For what matters less.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// For what is as it should be.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// For what deserves a look.
    pub fn warning(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// For what is wrong.
    pub fn bad(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A table's lines, each after `indent`.
pub fn lines(table: &Table, indent: &str) -> String {
    let mut text = String::new();
    for line in table.lines() {
        // Each cell has a space on either side, the first one too.
        let line = line.trim_end();
        let _ =
            writeln!(text, "{}", format!("{indent}{}", line.strip_prefix(' ').unwrap_or(line)).trim_end());
    }
    text
}

/// Writes one JSON document and a line feed to standard output.
///
/// # Errors
/// When it cannot be written.
pub fn write_document(document: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(document)?;
    text.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&text)?;
    stdout.flush()
}

/// The text with control characters spelled out, so that it cannot steer a terminal. Line feeds and tabs stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    let steers = |character: char| {
        (character.is_control() && character != '\n' && character != '\t')
            // Bidirectional overrides turn text around.
            || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        if steers(character) {
            clean.extend(character.escape_unicode());
        } else {
            clean.push(character);
        }
    }
    Cow::Owned(clean)
}

fn stdout_failure(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::NobodyReads,
        _ => Failure::io(format!("cannot write to standard output: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_printable_steers_a_terminal() {
        assert_eq!(printable("a\tb\nc ü"), "a\tb\nc ü");
        assert_eq!(printable("\x1b[31mred\r"), "\\u{1b}[31mred\\u{d}");
        assert_eq!(printable("abc\u{202e}fed"), "abc\\u{202e}fed");
        assert_eq!(printable("\u{9b}31m"), "\\u{9b}31m");
    }
}
