//! The nouns of Diorama and the environment file that describes them.
//!
//! Owns: the names and addresses ([`EnvironmentName`], [`MacAddress`], …), the resolved [`Environment`], and the way
//! from a YAML file to one ([`parse`]) and back ([`Environment::to_yaml`]), with the file's JSON Schema ([`schema`]).
//!
//! States: text → a tree of YAML nodes that know their place in the text → a checked [`Environment`]. There is nothing
//! in between to hold: [`parse`] either gives an environment that keeps every rule, or every [`Problem`] it found.
//!
//! Invariants:
//! - Pure: the one question asked of the outside is [`Files::is_file`].
//! - Any bytes may be in the file: sizes, depths and counts are bounded ([`limits`]), nothing panics, and text from the
//!   file reaches a message only shortened and without control characters.
//! - An [`Environment`] does not depend on its own name: [`Environment::renamed`] is what a fork runs, with the same MAC
//!   and IP addresses inside.

mod address;
mod document;
mod environment;
mod file;
pub mod limits;
mod names;
mod parse;
mod problem;
mod size;

pub use address::{AddressError, InterfaceAddress, MacAddress, MacError};
pub use environment::{Accelerator, Boot, Disk, Environment, Machine, Network, Nic};
pub use file::{WriteError, schema};
pub use names::{
    DiskName, EnvironmentName, HostName, LabelName, LabelValue, LabelValueError, MachineName, NameError,
    NetworkName,
};
pub use parse::{Files, SourceFile, parse};
pub use problem::Problem;
pub use size::{SizeError, parse_size};
