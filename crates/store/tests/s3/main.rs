//! The store in a bucket of a real S3 server: the tests that it has for a folder, and what only a server can do.

#[path = "../store/collection.rs"]
mod collection;
mod damage;
mod failing;
#[path = "../store/faults.rs"]
mod faults;
#[path = "../store/faulty.rs"]
mod faulty;
#[path = "../store/model.rs"]
mod model;
#[path = "../store/moving.rs"]
mod moving;
#[path = "../store/names.rs"]
mod names;
mod place;
mod proxy;
mod reading;
#[path = "../store/round_trip.rs"]
mod round_trip;
#[path = "../../../../testing/s3_server.rs"]
mod s3_server;
#[allow(dead_code, reason = "what only a folder's tests need")]
#[path = "../store/sample.rs"]
mod sample;
#[path = "../../../../testing/scratch.rs"]
mod scratch;
mod sessions;
#[path = "../store/sharing.rs"]
mod sharing;
