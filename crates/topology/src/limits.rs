//! The bounds of an environment. Each is there so that one file cannot ask for more than a host could ever carry; none
//! is meant to be felt.

use std::ops::RangeInclusive;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// The longest environment file that is read, in bytes: room for the most machines with the most NICs.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// How many problems [`parse`](crate::parse) reports at most: more than anyone reads, and a bound on hostile files.
pub const MAX_PROBLEMS: usize = 100;
/// The most machines in one environment.
pub const MAX_MACHINES: usize = 1000;
/// The most networks in one environment.
pub const MAX_NETWORKS: usize = 1000;
/// The most NICs on one machine: a PCI bus has 32 slots, shared with disks and everything else.
pub const MAX_NICS: usize = 16;
/// The most disks on one machine, its boot disk not counted.
pub const MAX_DISKS: usize = 8;
/// The most labels that one machine asks for, or one host carries.
pub const MAX_LABELS: usize = 32;
/// Virtual CPUs of one machine.
pub const CPUS: RangeInclusive<u64> = 1..=64;
/// Memory of one machine, in bytes.
pub const MEMORY_BYTES: RangeInclusive<u64> = 32 * MIB..=TIB;
/// Memory is a multiple of this many bytes, so that it is whole pages whatever a host's page size.
pub const MEMORY_STEP_BYTES: u64 = MIB;
/// Memory of a machine that names none, in bytes.
pub const DEFAULT_MEMORY_BYTES: u64 = 256 * MIB;
/// Size of one disk, in bytes.
pub const DISK_BYTES: RangeInclusive<u64> = MIB..=64 * TIB;
/// A disk is a multiple of this many bytes: a sector.
pub const DISK_STEP_BYTES: u64 = 512;
/// MTU of a network, in bytes: from what IPv4 requires to what a frame's length field and a tunnel's headers leave room for.
pub const MTU: RangeInclusive<u64> = 68..=65000;
/// MTU of a network that names none, in bytes.
pub const DEFAULT_MTU: u16 = 1500;
/// Queue of each of a network's ports, in bytes: at least one frame of the largest MTU.
pub const QUEUE_BYTES: RangeInclusive<u64> = 128 * KIB..=GIB;
/// Queue of a network that names none, in bytes.
pub const DEFAULT_QUEUE_BYTES: u64 = MIB;
/// The longest kernel command line, in bytes: x86 kernels keep 2048 with the terminating zero.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// The longest CPU model with its flags, in bytes.
pub const MAX_CPU_MODEL_BYTES: usize = 1024;
/// The longest path as written in the file, in bytes.
pub const MAX_PATH_BYTES: usize = 4096;
