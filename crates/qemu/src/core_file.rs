//! A machine's memory as an ELF core file: where QEMU's board has it in the guest's physical address space, and the
//! file's head. Pure.
//!
//! ```text
//! ELF header, program headers: one PT_NOTE, one PT_LOAD for each segment of memory; the note; zeros up to a page
//! the segments, one after another, each at a multiple of a page
//! ```
//!
//! A segment has the same physical and virtual address, so that a debugger without page tables finds physical
//! addresses, and the same length in the file and in memory: what is zero can be a hole in the file.

/// A page, and how segments are aligned.
const PAGE_BYTES: u64 = 4096;
const FOUR_GIB: u64 = 4 << 30;
/// What QEMU's q35 keeps below 4 GiB for devices begins here at the latest...
const LOW_MAX_BYTES: u64 = 0xb000_0000;
/// ... and when memory reaches up to there, what is below is cut at a whole GiB.
const LOW_SPLIT_BYTES: u64 = 0x8000_0000;
/// From about here on, QEMU moves memory above an AMD processor's reserved range at 1 TiB.
const KNOWN_MAX_BYTES: u64 = 960 << 30;

const ELF_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const NOTE_NAME: &[u8; 8] = b"Diorama\0";
/// None that others have: readers look at the number alone.
const NOTE_TYPE: u32 = u32::from_be_bytes(*b"DIO1");
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Readable, writable, executable.
const FLAGS: u32 = 7;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;

/// Where a piece of main memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where the guest has it.
    pub physical: u64,
    /// Where it is in main memory.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// The board's layout is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("where {memory_bytes} bytes of memory are on a {machine_type} is not known here")]
pub struct UnknownLayout {
    /// The machine type.
    pub machine_type: String,
    /// How much memory.
    pub memory_bytes: u64,
}

/// A core file's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The bytes before the first segment.
    pub bytes: Vec<u8>,
    /// Where each segment is in the file.
    pub offsets: Vec<u64>,
    /// How long the whole file is.
    pub file_bytes: u64,
}

/// Where a machine's main memory is in its physical address space.
///
/// A q35 has less than 2.75 GiB in one piece from 0 on. Of more, 2 GiB are there, and the rest is at 4 GiB.
pub fn segments(machine_type: &str, memory_bytes: u64) -> Result<Vec<Segment>, UnknownLayout> {
    let is_q35 = machine_type.strip_prefix("pc-q35-").is_some();
    if !is_q35
        || memory_bytes == 0
        || memory_bytes > KNOWN_MAX_BYTES
        || !memory_bytes.is_multiple_of(PAGE_BYTES)
    {
        return Err(UnknownLayout { machine_type: machine_type.to_owned(), memory_bytes });
    }
    let low = if memory_bytes >= LOW_MAX_BYTES { LOW_SPLIT_BYTES } else { memory_bytes };
    let mut segments = vec![Segment { physical: 0, offset: 0, bytes: low }];
    if low < memory_bytes {
        segments.push(Segment { physical: FOUR_GIB, offset: low, bytes: memory_bytes - low });
    }
    Ok(segments)
}

/// The head of a core file with these segments, whole pages each, and a note of text.
pub fn head(segments: &[Segment], note: &str) -> Head {
    let mut notes = Vec::new();
    notes.extend_from_slice(&(NOTE_NAME.len() as u32).to_le_bytes());
    notes.extend_from_slice(&(note.len() as u32).to_le_bytes());
    notes.extend_from_slice(&NOTE_TYPE.to_le_bytes());
    notes.extend_from_slice(NOTE_NAME);
    notes.extend_from_slice(note.as_bytes());
    notes.resize(notes.len().next_multiple_of(4), 0);

    let headers = 1 + segments.len() as u64;
    let notes_at = ELF_HEADER_BYTES + headers * PROGRAM_HEADER_BYTES;
    let mut bytes = Vec::new();
    // 64 bits, little-endian, version 1.
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01");
    bytes.resize(16, 0);
    bytes.extend_from_slice(&ET_CORE.to_le_bytes());
    bytes.extend_from_slice(&EM_X86_64.to_le_bytes());
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    bytes.extend_from_slice(&0_u64.to_le_bytes()); // no entry point
    bytes.extend_from_slice(&ELF_HEADER_BYTES.to_le_bytes()); // program headers
    bytes.extend_from_slice(&0_u64.to_le_bytes()); // no section headers
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    for number in [ELF_HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, headers as u16, 0, 0, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let mut program_header = |kind: u32, flags: u32, offset: u64, address: u64, length: u64, align: u64| {
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        for number in [offset, address, address, length, length, align] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
    };
    program_header(PT_NOTE, 0, notes_at, 0, notes.len() as u64, 4);
    let mut at = (notes_at + notes.len() as u64).next_multiple_of(PAGE_BYTES);
    let mut offsets = Vec::new();
    for segment in segments {
        program_header(PT_LOAD, FLAGS, at, segment.physical, segment.bytes, PAGE_BYTES);
        offsets.push(at);
        at += segment.bytes;
    }
    bytes.extend_from_slice(&notes);
    Head { bytes, offsets, file_bytes: at }
}

#[cfg(test)]
#[path = "core_file_tests.rs"]
mod tests;
