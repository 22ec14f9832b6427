//! Why a command did not do what it was asked, how that is said, and which exit status it has.

use diorama_api::{ApiError, ClientError, ErrorBody, ErrorKind};
use serde::Serialize;

use crate::environment_file::WrongFile;
use crate::output::Output;

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// Something failed, here or in the agent.
    Error(ApiError),
    /// The environment file is wrong.
    EnvironmentFile(WrongFile),
    /// The user, or the system, asked the command to end.
    Interrupted {
        /// The signal's number.
        signal: u8,
        /// Whether an operation was under way; the agent undoes it.
        undone: bool,
    },
    /// Whoever read standard output has stopped reading.
    NobodyReads,
}

impl Failure {
    /// A failure with a hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Error(ApiError::new(kind, message).hint(hint))
    }

    /// A failure of the operating system.
    pub fn io(message: impl Into<String>) -> Self {
        Self::Error(ApiError::new(ErrorKind::Io, message))
    }

    /// Says what is wrong, and gives the exit status.
    pub fn report(self, output: &Output) -> u8 {
        match self {
            Self::Error(error) => {
                // The request, which is wrong, came from the command line.
                let status = match error.kind {
                    ErrorKind::Invalid | ErrorKind::EnvironmentFile => 2,
                    _ => 1,
                };
                report_error(error, output);
                status
            }
            Self::EnvironmentFile(wrong) => {
                if output.json() {
                    say_document(&wrong.document());
                } else {
                    output.errors(&wrong.text(output.stderr_colour()));
                }
                2
            }
            Self::Interrupted { signal, undone } => {
                let error = if undone {
                    ApiError::new(
                        ErrorKind::Cancelled,
                        "interrupted: the connection is closed, and the agent undoes what this command had begun",
                    )
                    .hint("`diorama status` shows where things stand")
                } else {
                    ApiError::new(ErrorKind::Cancelled, "interrupted")
                };
                report_error(error, output);
                signal.saturating_add(128)
            }
            // As if SIGPIPE had ended the program.
            Self::NobodyReads => 141,
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Error(error.into())
    }
}

impl From<WrongFile> for Failure {
    fn from(wrong: WrongFile) -> Self {
        Self::EnvironmentFile(wrong)
    }
}

fn report_error(error: ApiError, output: &Output) {
    if output.json() {
        say_document(&ErrorBody { error });
    } else {
        output.error(&error);
    }
}

/// A failure's own document: when it cannot be written there is nobody left to tell but by exit status.
fn say_document(document: &impl Serialize) {
    let _ = crate::output::write_document(document);
}
