//! The store as its users see it, on a real file system.

mod crash;
mod damage;
mod full_disk;
mod names;
mod round_trip;
mod sample;
mod sharing;
