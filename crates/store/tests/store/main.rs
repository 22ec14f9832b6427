//! The store as its users see it, on a real file system.

mod collection;
mod crash;
mod damage;
mod encryption;
mod faults;
mod faulty;
mod full_disk;
mod fuzz;
mod kept;
mod lazy;
#[path = "../../../../testing/mangle.rs"]
mod mangle;
mod model;
mod moving;
mod names;
mod place;
mod power;
mod round_trip;
mod sample;
#[path = "../../../../testing/scratch.rs"]
mod scratch;
mod sharing;
mod signing;
mod transfer;
