//! Proving a snapshot: every byte read and hashed again, and every frame counted again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blake3::Hasher;
use diorama_topology::Environment;

use crate::Progress;
use crate::blocks::{self, BLOCK_BYTES};
use crate::catalog::Stored;
use crate::error::{Damage, StoreError};
use crate::files;
use crate::frames::StoredFrame;
use crate::id::SnapshotId;
use crate::manifest::{Accounting, InFlightPolicy, Manifest, NamedFile, RamRecord, Role};
use crate::read::{MANIFEST_FILE, open_ram};
use crate::root::Store;

/// What verifying found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The snapshot.
    pub id: SnapshotId,
    /// What is wrong; empty if nothing is.
    pub problems: Vec<Problem>,
    /// How many files were read.
    pub checked_files: u64,
    /// How many bytes they have, holes included.
    pub checked_bytes: u64,
    /// The frame accounting of each network.
    pub accounting: Vec<AccountingCheck>,
}

/// One thing that is wrong with a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, as a full path.
    pub file: PathBuf,
    /// What is wrong.
    pub kind: ProblemKind,
}

/// What can be wrong with a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// A file is not what was written. With [`Damage::Contents`], the first bad block is named; more may follow.
    #[error("{0}")]
    Damaged(Damage),
    /// The accounting of a network does not come out even.
    #[error(
        "network {network}: {balance} copies of frames are unaccounted for, and the snapshot says {recorded}"
    )]
    Unaccounted {
        /// The network.
        network: String,
        /// Owed, minus everything accounted for; should be 0.
        balance: i128,
        /// What the snapshot says of that; should be 0.
        recorded: i64,
    },
    /// The list of frames in flight has more or fewer of a network than its accounting.
    #[error("network {network}: {recorded} frames were in flight, and {stored} are stored")]
    FrameCount {
        /// The network.
        network: String,
        /// What the accounting says.
        recorded: u64,
        /// How many there are.
        stored: u64,
    },
    /// A frame in flight is for a NIC that the environment does not have.
    #[error("frame {frame} is for NIC {nic} of {machine} on {network}, which is not in the environment")]
    FrameWithoutReceiver {
        /// Which frame of the list, from 0.
        frame: usize,
        /// The network it names.
        network: String,
        /// The machine it names.
        machine: String,
        /// The NIC it names.
        nic: u16,
    },
    /// Frames were to be dropped at the cut, and some are stored all the same.
    #[error("{stored} frames are stored although the snapshot was to drop them")]
    FramesDespiteDrop {
        /// How many.
        stored: usize,
    },
}

/// The frame accounting of one network, counted again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountingCheck {
    /// The network.
    pub network: String,
    /// What the snapshot says.
    pub accounting: Accounting,
    /// How many frames of this network are stored.
    pub stored_frames: u64,
    /// Whether it all comes out even.
    pub holds: bool,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

impl Store {
    /// Reads every byte of a snapshot and checks its hash, and checks that no frame vanished or appeared.
    ///
    /// Damage goes into the report, of every damaged file; an error means that nothing could be said.
    pub fn verify(&self, id: &SnapshotId, progress: Progress<'_>) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport {
            id: *id,
            problems: Vec::new(),
            checked_files: 0,
            checked_bytes: 0,
            accounting: Vec::new(),
        };
        let stored = match self.load(id) {
            Ok(stored) => stored,
            Err(StoreError::Corrupt { file, damage }) => {
                let kind = ProblemKind::Damaged(damage);
                report.problems.push(Problem { file, kind });
                return Ok(report);
            }
            Err(error) => return Err(error),
        };
        report.checked_files = 1;
        check_files(&stored, &mut report, progress)?;
        check_frames(self, &stored, &mut report)?;
        Ok(report)
    }
}

fn check_files(stored: &Stored, report: &mut VerifyReport, progress: Progress<'_>) -> Result<(), StoreError> {
    let files = stored.manifest.files();
    let total = files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.bytes));
    let mut done: u64 = 0;
    for file in &files {
        let mut within = |bytes: u64| progress(done.saturating_add(bytes).min(total), total);
        let checked = match file.role {
            Role::Ram(ram) => check_ram(&stored.folder, ram, &mut within),
            _ => check_whole(&stored.folder, file, &mut within),
        };
        match checked {
            Ok(()) => {}
            Err(StoreError::Corrupt { file, damage }) => {
                let kind = ProblemKind::Damaged(damage);
                report.problems.push(Problem { file, kind });
            }
            Err(error) => return Err(error),
        }
        done = done.saturating_add(file.bytes);
        progress(done, total);
        report.checked_files += 1;
    }
    report.checked_bytes = total;
    Ok(())
}

fn check_ram(folder: &Path, ram: &RamRecord, progress: &mut dyn FnMut(u64)) -> Result<(), StoreError> {
    let (file, path, hashes) = open_ram(folder, ram)?;
    blocks::walk(
        &file,
        ram.bytes,
        |offset, e| files::read_failed(&path, Some(offset), &e),
        |block| {
            if hashes.get(block.offset / BLOCK_BYTES) != Some(block.hash().as_bytes()) {
                let offset = Some(block.offset);
                return Err(StoreError::corrupt(&path, Damage::Contents { offset }));
            }
            progress(block.end());
            Ok(())
        },
    )
}

fn check_whole(
    folder: &Path,
    named: &NamedFile<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let path = folder.join(named.file);
    let file = files::open_stored(&path, named.bytes)?;
    let mut hasher = Hasher::new();
    blocks::walk(
        &file,
        named.bytes,
        |offset, e| files::read_failed(&path, Some(offset), &e),
        |block| {
            hasher.update(block.bytes);
            progress(block.end());
            Ok(())
        },
    )?;
    if hasher.finalize().to_hex().as_str() != named.blake3 {
        return Err(StoreError::corrupt(&path, Damage::Contents { offset: None }));
    }
    Ok(())
}

/// Only as good as the frames file; where that is damaged, which has been reported, only the sums are checked.
fn check_frames(store: &Store, stored: &Stored, report: &mut VerifyReport) -> Result<(), StoreError> {
    let manifest = &stored.manifest;
    let frames_path = stored.folder.join(&manifest.frames.file);
    let manifest_path = stored.folder.join(MANIFEST_FILE);
    let frames = match store.read_frames(stored) {
        Ok(frames) => Some(frames),
        Err(StoreError::Corrupt { file, damage: damage @ Damage::Frames(_) }) => {
            // The hash was right, so that this is news.
            let kind = ProblemKind::Damaged(damage);
            report.problems.push(Problem { file, kind });
            None
        }
        Err(StoreError::Corrupt { .. }) => None,
        Err(error) => return Err(error),
    };
    let mut problems = Vec::new();
    let counts = frames.as_deref().map(|frames| {
        check_receivers(manifest, frames, |kind| {
            problems.push(Problem { file: frames_path.clone(), kind });
        })
    });
    for network in &manifest.networks {
        let accounting = network.accounting;
        let balance = accounting.balance();
        let even = balance == 0 && accounting.unaccounted == 0;
        if !even {
            problems.push(Problem {
                file: manifest_path.clone(),
                kind: ProblemKind::Unaccounted {
                    network: network.name.clone(),
                    balance,
                    recorded: accounting.unaccounted,
                },
            });
        }
        let stored_frames =
            counts.as_ref().map(|counts| counts.get(network.name.as_str()).copied().unwrap_or(0));
        if let Some(stored) = stored_frames.filter(|stored| *stored != accounting.in_flight) {
            problems.push(Problem {
                file: frames_path.clone(),
                kind: ProblemKind::FrameCount {
                    network: network.name.clone(),
                    recorded: accounting.in_flight,
                    stored,
                },
            });
        }
        report.accounting.push(AccountingCheck {
            network: network.name.clone(),
            accounting,
            stored_frames: stored_frames.unwrap_or(0),
            holds: even && stored_frames == Some(accounting.in_flight),
        });
    }
    report.problems.append(&mut problems);
    Ok(())
}

/// Checks that every frame has somewhere to go; returns how many there are of each network.
fn check_receivers<'a>(
    manifest: &Manifest,
    frames: &'a [StoredFrame],
    mut problem: impl FnMut(ProblemKind),
) -> BTreeMap<&'a str, u64> {
    let mut counts = BTreeMap::new();
    let mut first_lost = None;
    for (index, frame) in frames.iter().enumerate() {
        *counts.entry(frame.network.as_str()).or_insert(0) += 1;
        if first_lost.is_none() && !has_receiver(&manifest.specification, frame) {
            first_lost = Some((index, frame));
        }
    }
    if let Some((index, frame)) = first_lost {
        problem(ProblemKind::FrameWithoutReceiver {
            frame: index,
            network: frame.network.clone(),
            machine: frame.machine.clone(),
            nic: frame.nic,
        });
    }
    if manifest.in_flight_policy == InFlightPolicy::Drop && !frames.is_empty() {
        problem(ProblemKind::FramesDespiteDrop { stored: frames.len() });
    }
    counts
}

fn has_receiver(environment: &Environment, frame: &StoredFrame) -> bool {
    environment
        .machine(&frame.machine)
        .and_then(|machine| machine.nics.get(usize::from(frame.nic)))
        .is_some_and(|nic| nic.network.to_string() == frame.network)
}
