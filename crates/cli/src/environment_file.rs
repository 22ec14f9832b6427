//! Reading an environment file: from the disk (or standard input) to a checked [`Environment`], or to every problem in
//! it with its place and the line it stands in.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use diorama_api::{ApiError, ErrorKind};
use diorama_topology::{Environment, Files, Problem, SourceFile};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Colour, printable};

/// The file that is meant when none is named.
pub const DEFAULT: &str = "diorama.yaml";

/// How much of a file is read: more than any that is accepted, so that the check for its size can say so.
const READ_BYTES_MAX: u64 = (1 << 20) + 1;

/// An environment file with problems.
#[derive(Debug)]
pub struct WrongFile {
    name: String,
    text: String,
    problems: Vec<Problem>,
}

/// Reads and checks a file; `-` is standard input, relative to the current folder.
///
/// # Errors
/// [`Failure::EnvironmentFile`] when it is wrong; another when it cannot be read.
pub fn read(path: &Path) -> Result<Environment, Failure> {
    let name = path.display().to_string();
    let (bytes, folder) = load(path).map_err(|error| unreadable(path, &error))?;
    check(&name, bytes, &folder, &Disk).map_err(Failure::from)
}

/// The environment that the current folder's file describes, when there is one and it is in order. Images that it
/// names need not exist: this is only for its name.
pub fn in_current_folder() -> Option<Environment> {
    let (bytes, folder) = load(Path::new(DEFAULT)).ok()?;
    check(DEFAULT, bytes, &folder, &AllThere).ok()
}

impl WrongFile {
    /// The problems for people: `FILE:LINE:COLUMN: error: …`, the line, and what would be right.
    pub fn text(&self, colour: Colour) -> String {
        let mut text = String::new();
        for problem in &self.problems {
            let place = format!("{}:{}:{}:", self.name, problem.line, problem.column);
            let message = printable(&problem.message);
            let _ = writeln!(text, "{} {} {message}", colour.strong(&place), colour.bad("error:"));
            self.excerpt(problem, colour, &mut text);
            if let Some(hint) = &problem.hint {
                let _ = writeln!(text, "  {} {}", colour.dim("hint:"), printable(hint));
            }
        }
        text
    }

    /// The problems for programs.
    pub fn document(&self) -> impl Serialize + use<'_> {
        let number = self.problems.len();
        let error = ApiError::new(
            ErrorKind::EnvironmentFile,
            format!("{} has {}", self.name, crate::quantity::count(number as u64, "problem")),
        )
        .hint("`diorama schema` prints what may stand in the file");
        WrongFileDocument {
            error: WrongFileError {
                error,
                problems: self
                    .problems
                    .iter()
                    .map(|problem| ProblemDocument {
                        file: &self.name,
                        line: problem.line,
                        column: problem.column,
                        message: &problem.message,
                        hint: problem.hint.as_deref(),
                    })
                    .collect(),
            },
        }
    }

    /// The line that the problem is in, with the place marked.
    fn excerpt(&self, problem: &Problem, colour: Colour, text: &mut String) {
        /// Longer lines are not shown: they would fill the screen and help nobody.
        const LINE_CHARACTERS_MAX: usize = 200;
        let Some(line) = usize::try_from(problem.line)
            .ok()
            .and_then(|line| self.text.lines().nth(line.checked_sub(1)?))
            .filter(|line| line.chars().count() <= LINE_CHARACTERS_MAX && !line.trim().is_empty())
        else {
            return;
        };
        // One column on the screen for each character, so that the mark stands below what it marks.
        let shown: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let before =
            usize::try_from(problem.column).unwrap_or(1).saturating_sub(1).min(shown.chars().count());
        let marked = problem
            .span
            .clone()
            .and_then(|span| self.text.get(span))
            .and_then(|marked| marked.lines().next())
            .map_or(1, |marked| marked.chars().count())
            .clamp(1, (shown.chars().count() - before).max(1));
        let number = problem.line.to_string();
        let margin = " ".repeat(number.len());
        let bar = colour.dim("|");
        let _ = writeln!(text, "  {} {bar} {shown}", colour.dim(&number));
        let mark = format!("{} {}", "^".repeat(marked), printable(&problem.label));
        let _ = writeln!(text, "  {margin} {bar} {}{}", " ".repeat(before), colour.warning(mark.trim_end()));
    }
}

#[derive(Serialize)]
struct WrongFileDocument<'a> {
    error: WrongFileError<'a>,
}

#[derive(Serialize)]
struct WrongFileError<'a> {
    #[serde(flatten)]
    error: ApiError,
    problems: Vec<ProblemDocument<'a>>,
}

#[derive(Serialize)]
struct ProblemDocument<'a> {
    file: &'a str,
    line: u32,
    column: u32,
    message: &'a str,
    hint: Option<&'a str>,
}

struct Disk;

impl Files for Disk {
    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }
}

struct AllThere;

impl Files for AllThere {
    fn is_file(&self, _path: &Path) -> bool {
        true
    }
}

fn load(path: &Path) -> io::Result<(Vec<u8>, PathBuf)> {
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        io::stdin().lock().take(READ_BYTES_MAX).read_to_end(&mut bytes)?;
        return Ok((bytes, std::env::current_dir()?));
    }
    File::open(path)?.take(READ_BYTES_MAX).read_to_end(&mut bytes)?;
    let mut folder = std::path::absolute(path)?;
    folder.pop();
    Ok((bytes, folder))
}

fn check(name: &str, bytes: Vec<u8>, folder: &Path, files: &dyn Files) -> Result<Environment, WrongFile> {
    let wrong = |text, problems| WrongFile { name: name.to_owned(), text, problems };
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let problem = not_text(error.as_bytes(), error.utf8_error().valid_up_to());
            return Err(wrong(String::from_utf8_lossy(error.as_bytes()).into_owned(), vec![problem]));
        }
    };
    let source = SourceFile { name, text: &text, folder };
    diorama_topology::parse(&source, files, diorama_agent::BUILT_IN_IMAGES)
        .map_err(|problems| wrong(text, problems))
}

fn not_text(bytes: &[u8], good_bytes: usize) -> Problem {
    let good = String::from_utf8_lossy(&bytes[..good_bytes]);
    let line = good.matches('\n').count() + 1;
    let column = good.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Problem {
        message: format!("the byte 0x{:02x} is not UTF-8 text", bytes.get(good_bytes).copied().unwrap_or(0)),
        hint: Some("an environment file is YAML in UTF-8; is this the right file?".to_owned()),
        line: u32::try_from(line).unwrap_or(u32::MAX),
        column: u32::try_from(column).unwrap_or(u32::MAX),
        span: None,
        label: String::new(),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let hint = if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT) {
        "name an environment file: `diorama up FILE` (see `diorama up --help` for a first one)"
    } else {
        "name an environment file that you may read"
    };
    // A wrong name on the command line, like any other: exit status 2.
    Failure::new(ErrorKind::EnvironmentFile, format!("cannot read {}: {error}", path.display()), hint)
}
