//! `disk` and `disk-check`: blocks that tell whether what was synced is there.
//!
//! The writer goes round a file (or a block device) of `blocks` blocks: block number
//! `n % blocks` is written with `n`, for n = 0, 1, 2, ... Each block carries, besides `n`,
//! the writer's random run id, the count that was known to be synced when it was written,
//! and a checksum over all of it.
//!
//! From the blocks alone a checker can therefore say:
//!
//! - *torn*: a block that does not match its checksum;
//! - *missing*: a block below the highest synced count found that is older than it must be.
//!   What came after the last sync may be there or not.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Instant;

use crate::arguments::Arguments;
use crate::pace::Pace;
use crate::status::{Line, PERIOD, StatusFile};
use crate::{Failure, random_id};

const BLOCK: usize = 4096;
const MAGIC: [u8; 8] = *b"DIODSK01";

/// Blocks between two syncs, at most.
const BATCH: u64 = 256;

/// `traffic disk`.
pub fn write(arguments: &mut Arguments) -> Result<(), Failure> {
    let path: PathBuf = arguments.required("file")?;
    let rate = arguments.rate()?;
    let size = arguments.bytes("size", Some(16 << 20), BLOCK as u64..=1 << 40)?;
    let seconds: Option<u64> = arguments.optional("seconds")?;
    let mut status = StatusFile::optional(arguments)?;
    arguments.finish()?;

    let failed = |e| Failure::Io("write the file", e);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| Failure::Io("open the file", e))?;
    let blocks = size / BLOCK as u64;
    let run = random_id()?;
    let (mut written, mut synced) = (0, 0);
    let start = Instant::now();
    // At least one block a second, whatever was asked for.
    let rate = rate.map(|bytes| (bytes / BLOCK as u64).max(1));
    let mut pace = Pace::new(rate, start);
    loop {
        let now = Instant::now();
        if seconds.is_some_and(|s| now.duration_since(start).as_secs() >= s) {
            break;
        }
        let allowed = pace.allowed(now, BATCH);
        for _ in 0..allowed {
            let block = Block { run, blocks, number: written, synced };
            file.seek(SeekFrom::Start(written % blocks * BLOCK as u64)).map_err(failed)?;
            file.write_all(&block.encode()).map_err(failed)?;
            written += 1;
        }
        pace.did(allowed);
        if allowed > 0 {
            file.sync_data().map_err(failed)?;
            synced = written;
        } else {
            std::thread::sleep(pace.wait(now, 1).min(PERIOD));
        }
        status.update(|| line(run, written, synced, "open"))?;
    }
    status.write(line(run, written, synced, "done"))
}

/// `traffic disk-check`: prints what it found, and fails if something is torn or missing.
pub fn check(arguments: &mut Arguments) -> Result<(), Failure> {
    let path: PathBuf = arguments.required("file")?;
    arguments.finish()?;
    let mut file = File::open(&path).map_err(|e| Failure::Io("open the file", e))?;
    let found = read_blocks(&mut file)?;
    let report = judge(&found);
    print!("{}", report.line().finish());
    if report.torn > 0 || report.missing > 0 {
        return Err(Failure::Check(format!(
            "{} blocks torn, {} synced blocks missing",
            report.torn, report.missing
        )));
    }
    Ok(())
}

fn line(run: u64, written: u64, synced: u64, state: &'static str) -> Line {
    Line::new("disk")
        .id("run", run)
        .word("state", state)
        .value("written_blocks", written)
        .value("synced_blocks", synced)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    run: u64,
    blocks: u64,
    number: u64,
    synced: u64,
}

/// What a block's place holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Whole(Block),
    /// Ours by its first bytes, but not whole.
    Torn,
    /// Never written by us.
    Foreign,
}

impl Block {
    fn encode(&self) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        bytes[..8].copy_from_slice(&MAGIC);
        for (field, value) in [self.run, self.blocks, self.number, self.synced].iter().enumerate() {
            bytes[8 + 8 * field..16 + 8 * field].copy_from_slice(&value.to_be_bytes());
        }
        // A body that differs in every sector, so that a stale sector cannot pass.
        for (index, part) in bytes[48..].chunks_mut(8).enumerate() {
            let word =
                (self.run ^ self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(index as u64);
            part.copy_from_slice(&word.to_be_bytes()[..part.len()]);
        }
        let sum = checksum(&bytes);
        bytes[40..48].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8; BLOCK]) -> Found {
        if bytes[..8] != MAGIC {
            return Found::Foreign;
        }
        let field = |n: usize| u64::from_be_bytes(bytes[8 + 8 * n..16 + 8 * n].try_into().expect("8 bytes"));
        let mut blank = *bytes;
        blank[40..48].fill(0);
        let block = Block { run: field(0), blocks: field(1), number: field(2), synced: field(3) };
        if field(4) != checksum(&blank) || block.blocks == 0 {
            return Found::Torn;
        }
        Found::Whole(block)
    }
}

/// FNV-1a over 8-byte words: it guards against tearing, not against malice.
fn checksum(bytes: &[u8; BLOCK]) -> u64 {
    bytes.chunks_exact(8).fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        let word = u64::from_be_bytes(word.try_into().expect("8 bytes"));
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17)
    })
}

/// The blocks of the file, as many as its first one says there are.
fn read_blocks(file: &mut File) -> Result<Vec<Found>, Failure> {
    let failed = |e| Failure::Io("read the file", e);
    let mut found = Vec::new();
    let mut bytes = [0; BLOCK];
    let mut blocks = 1;
    while (found.len() as u64) < blocks {
        let mut filled = 0;
        while filled < BLOCK {
            match file.read(&mut bytes[filled..]).map_err(failed)? {
                0 => return Ok(found),
                read => filled += read,
            }
        }
        let block = Block::decode(&bytes);
        if let (true, Found::Whole(first)) = (found.is_empty(), block) {
            blocks = first.blocks;
        }
        found.push(block);
    }
    Ok(found)
}

/// What the blocks say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    blocks: u64,
    newest: Option<u64>,
    synced: u64,
    torn: u64,
    missing: u64,
}

impl Report {
    fn line(&self) -> Line {
        Line::new("disk-check")
            .value("blocks", self.blocks)
            .optional("newest", self.newest)
            .value("synced_blocks", self.synced)
            .value("torn", self.torn)
            .value("missing", self.missing)
    }
}

/// Block 0 is the first that a run writes, and a run's blocks are written in order: so the
/// last run is block 0's, and blocks of other runs have simply not been reached.
fn judge(found: &[Found]) -> Report {
    let torn = found.iter().filter(|f| **f == Found::Torn).count() as u64;
    let mut report = Report { torn, ..Report::default() };
    let Some(Found::Whole(first)) = found.first().copied() else {
        return report;
    };
    report.blocks = first.blocks;
    let ours = |f: &Found| match f {
        Found::Whole(block) if block.run == first.run => Some(*block),
        _ => None,
    };
    for block in found.iter().filter_map(ours) {
        report.newest = report.newest.max(Some(block.number));
        report.synced = report.synced.max(block.synced);
    }
    // The newest synced number of each place must be there, or a newer one.
    let places = report.synced.min(first.blocks);
    // Blocks that the file is too short for are missing too; only those it has are looked
    // at, since the counts are the file's word and may be anything.
    report.missing = places.saturating_sub(found.len() as u64);
    for place in 0..places.min(found.len() as u64) {
        let laps = (report.synced - 1 - place) / first.blocks;
        let at_least = laps * first.blocks + place;
        let there = usize::try_from(place).ok().and_then(|p| found.get(p));
        match there.and_then(ours) {
            Some(block) if block.number >= at_least && block.number % first.blocks == place => {}
            _ => report.missing += 1,
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of `blocks` after `written` blocks of which `batch` go to each sync.
    fn disk(blocks: u64, written: u64, batch: u64) -> Vec<Found> {
        let mut found = vec![Found::Foreign; blocks as usize];
        for number in 0..written {
            let block = Block { run: 7, blocks, number, synced: number / batch * batch };
            found[(number % blocks) as usize] = Block::decode(&block.encode());
        }
        found
    }

    #[test]
    fn what_was_written_is_whole() {
        for written in [1, 5, 15, 16, 17, 40] {
            let report = judge(&disk(16, written, 4));
            assert_eq!((report.torn, report.missing), (0, 0), "{written} written");
            assert_eq!(report.newest, Some(written - 1));
            assert_eq!(report.synced, (written - 1) / 4 * 4);
        }
    }

    #[test]
    fn a_lost_block_is_missing_only_if_it_was_synced() {
        // 22 written, 20 synced, 16 places: places 4 and 5 hold 20 and 21, unsynced.
        let older = disk(16, 16, 4);
        for place in 0..16 {
            let mut found = disk(16, 22, 4);
            found[place] = older[place];
            let expected = u64::from(place < 4);
            assert_eq!(judge(&found).missing, expected, "place {place}");
        }
    }

    #[test]
    fn any_flipped_bit_tears_a_block() {
        let block = Block { run: 1, blocks: 2, number: 3, synced: 2 };
        let whole = block.encode();
        assert_eq!(Block::decode(&whole), Found::Whole(block));
        for at in (8..BLOCK).step_by(7) {
            let mut bytes = whole;
            bytes[at] ^= 1;
            assert_eq!(Block::decode(&bytes), Found::Torn, "byte {at}");
        }
    }

    #[test]
    fn a_mix_of_two_generations_in_one_block_is_torn() {
        let old = Block { run: 1, blocks: 2, number: 1, synced: 0 }.encode();
        let mut mixed = Block { run: 1, blocks: 2, number: 3, synced: 2 }.encode();
        mixed[3584..].copy_from_slice(&old[3584..]);
        assert_eq!(Block::decode(&mixed), Found::Torn);
    }

    #[test]
    fn an_earlier_run_s_blocks_are_not_held_against_this_one() {
        let mut found = disk(16, 16, 4);
        let block = Block { run: 8, blocks: 16, number: 0, synced: 0 };
        found[0] = Found::Whole(block);
        assert_eq!(judge(&found).missing, 0);
        assert_eq!(judge(&found).newest, Some(0));
    }

    #[test]
    fn hostile_blocks_do_no_harm() {
        let block = Block { run: 8, blocks: u64::MAX, number: u64::MAX, synced: 0 };
        assert_eq!(judge(&[Found::Whole(block)]).missing, 0);
        let block = Block { synced: u64::MAX, ..block };
        assert_eq!(judge(&[Found::Whole(block)]).missing, u64::MAX - 1);
        assert_eq!(judge(&[]), Report::default());
    }
}
