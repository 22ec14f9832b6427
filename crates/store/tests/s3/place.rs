//! Where this program's tests have their stores: in a bucket of one server, each below a prefix of its own.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use diorama_store::Location;
use diorama_store::backend::s3::S3Settings;

use crate::s3_server::{BUCKET, Server, variable};
use crate::sample::{Make, Sample};

/// Each so many operations one is made to fail: each try takes hundreds of requests.
pub const FAULT_STRIDE: usize = 5;
/// How many cases a property test tries.
pub const CASES: u32 = 3;
/// What a writer has staged is left to a collection: others may rely on it by then.
pub const STAGED_GOES: bool = false;

/// From what to what snapshots are moved.
pub const WAYS: [(Make, Make); 5] = [
    (Sample::in_folder, Sample::new),
    (Sample::new, Sample::in_folder),
    (Sample::new, Sample::encrypted),
    (Sample::encrypted, Sample::new),
    (Sample::in_folder, Sample::encrypted),
];

/// The one for all tests.
pub fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(Server::shared)
}

/// Which operation is the first to fail: another of each kind of fault.
pub fn first_fault(kind: usize) -> usize {
    kind % FAULT_STRIDE
}

/// A place for a new store.
pub fn new(folder: &Path) -> Location {
    let name = folder.file_name().unwrap().to_str().unwrap();
    Location::from(settings(server(), name))
}

/// The place of this name, of this process.
pub fn settings(server: &Server, name: &str) -> S3Settings {
    at(&server.endpoint(), &format!("{}/{name}", std::process::id()))
}

/// The place below this prefix.
pub fn at(endpoint: &str, prefix: &str) -> S3Settings {
    let location = Location::parse(format!("s3://{BUCKET}/{prefix}"), &|name| variable(endpoint, name));
    let Ok(Location::S3(mut settings)) = location else { panic!("{location:?}") };
    // Nobody has to wait for what was refused on purpose.
    settings.timing.first_patience = Duration::from_secs(3);
    *settings
}

/// As much time has passed as it takes until whatever died is known to be dead.
pub fn let_time_pass(sample: &Sample) {
    for session in sample.names_in("sessions") {
        sample.backend.remove(&format!("sessions/{session}"), None).unwrap();
    }
}
