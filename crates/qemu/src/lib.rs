//! One QEMU machine, seen from outside its process.
//!
//! This crate knows QEMU's command line, its control protocol (QMP), its migration stream, its disk format and its
//! guest agent; it knows nothing of environments, networks or snapshots. Callers hand it plain values.
//!
//! | module | owns | does input or output |
//! | --- | --- | --- |
//! | [`capability`] | what the installed QEMU, the kernel and the processor allow | yes |
//! | [`command_line`] | the arguments and with them the virtual hardware's layout | no |
//! | [`process`] | the QEMU process: start, identity, end, scheduling of its threads | yes |
//! | [`qmp`] | the control protocol: codec (pure) and blocking client | client only |
//! | [`nic`] | connections to network interfaces | yes |
//! | [`migration`] | splitting a migration stream into RAM pages and a residual stream | RAM file only |
//! | [`qcow2`] | disk images without a QEMU: what is where in one, and new ones | through its callers |
//! | [`core_file`] | where a board has its memory, and ELF core files of it | no |
//! | [`disk`] | empty overlays and a bounded look at disk images | yes |
//! | [`memory`] | main memory seen from outside: huge pages | yes |
//! | [`userfault`] | pages that a guest writes to while it is captured, as they were before | yes |
//! | [`time_stamp_counter`] | what emulated guests count time with | yes |
//! | [`guest_agent`] | commands run inside the guest | yes |
//!
//! Guests are hostile, and so is everything that carries their bytes: the migration stream, guest agent replies and
//! disk images. Each parser here bounds its memory and returns an error instead of panicking.

pub mod capability;
pub mod command_line;
pub mod core_file;
pub mod disk;
pub mod guest_agent;
pub mod memory;
pub mod migration;
pub mod nic;
pub mod process;
pub mod qcow2;
pub mod qmp;
pub mod socket_path;
pub mod time_stamp_counter;
pub mod userfault;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
#[path = "../../../testing/mangle.rs"]
mod mangle;
