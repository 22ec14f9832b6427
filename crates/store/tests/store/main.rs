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
#[path = "../../../../fuzz/mangle.rs"]
mod mangle;
mod model;
mod names;
mod place;
mod round_trip;
mod sample;
mod sharing;
mod signing;
mod transfer;
