//! Proving a snapshot: every byte read and hashed again, and every frame counted again.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::path::{Path, PathBuf};

use diorama_topology::Environment;

use crate::Progress;
use crate::address::Address;
use crate::blocks::{self, is_zero};
use crate::catalog::Stored;
use crate::error::{Damage, StoreError};
use crate::files;
use crate::frames::StoredFrame;
use crate::id::SnapshotId;
use crate::known::Version;
use crate::manifest::{Accounting, FRAMES_PART, InFlightPolicy, Manifest};
use crate::root::Store;
use crate::tree::{Builder, Shape};

/// What problems call the manifest.
const MANIFEST: &str = "manifest";

/// What verifying found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The snapshot.
    pub id: SnapshotId,
    /// What is wrong; empty if nothing is.
    pub problems: Vec<Problem>,
    /// How many parts were read, the manifest among them.
    pub checked_parts: u64,
    /// How many bytes they have, zeros included.
    pub checked_bytes: u64,
    /// The frame accounting of each network.
    pub accounting: Vec<AccountingCheck>,
}

/// One thing that is wrong with a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The part of the snapshot: `manifest`, `ram/server`, `frames`, …
    pub part: String,
    /// Where it starts in the part, in bytes, where that is known.
    pub offset: Option<u64>,
    /// The object in the store that is damaged, where it is one.
    pub object: Option<PathBuf>,
    /// What is wrong.
    pub kind: ProblemKind,
}

/// What can be wrong with a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// What was written cannot be read. The first place is named.
    #[error("{damage} ({places} places in all)")]
    Damaged {
        /// The first damage.
        damage: Damage,
        /// How many leaves and nodes of the part cannot be had.
        places: usize,
    },
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

impl Problem {
    fn damage(part: &str, offset: Option<u64>, error: StoreError, places: usize) -> Result<Self, StoreError> {
        let StoreError::Corrupt { file, damage } = error else { return Err(error) };
        let kind = ProblemKind::Damaged { damage, places };
        Ok(Self { part: part.to_owned(), offset, object: Some(file), kind })
    }

    fn of(part: &str, kind: ProblemKind) -> Self {
        Self { part: part.to_owned(), offset: None, object: None, kind }
    }
}

impl Store {
    /// Reads every byte of a snapshot and checks its hash, and checks that no frame vanished or appeared.
    ///
    /// Damage goes into the report, of every damaged part; an error means that nothing could be said.
    pub fn verify(&self, id: &SnapshotId, progress: Progress<'_>) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport {
            id: *id,
            problems: Vec::new(),
            checked_parts: 0,
            checked_bytes: 0,
            accounting: Vec::new(),
        };
        let stored = match self.load(id) {
            Ok(stored) => stored,
            Err(error @ StoreError::Corrupt { .. }) => {
                report.problems.push(Problem::damage(MANIFEST, None, error, 1)?);
                return Ok(report);
            }
            Err(error) => return Err(error),
        };
        report.checked_parts = 1;
        self.check_parts(&stored, &mut report, progress)?;
        check_frames(self, &stored, &mut report)?;
        Ok(report)
    }

    fn check_parts(
        &self,
        stored: &Stored,
        report: &mut VerifyReport,
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let parts = stored.manifest.parts();
        let total = parts.iter().fold(0, |sum: u64, part| sum.saturating_add(part.shape.bytes));
        let mut before: u64 = 0;
        for part in &parts {
            let mut done = before;
            let losses = self.fetch(part, &|_, _| Ok(()), &mut |bytes| {
                done = done.saturating_add(bytes);
                progress(done.min(total), total);
            })?;
            let places = losses.len();
            if let Some(first) = losses.into_iter().next() {
                report.problems.push(Problem::damage(&part.name, Some(first.offset), first.error, places)?);
            }
            before = before.saturating_add(part.shape.bytes);
            progress(before, total);
            report.checked_parts += 1;
        }
        report.checked_bytes = total;
        Ok(())
    }
}

/// The root of an immutable file's tree over clusters, remembered if the file stays as it is.
pub(crate) fn root_of(store: &Store, file: &File, path: &Path, bytes: u64) -> Result<Address, StoreError> {
    let before = Version::of(&files::metadata(file, path)?);
    if let Some(root) = store.known().get(&before) {
        return Ok(root);
    }
    let shape = Shape::file(bytes);
    let mut builder = Builder::new(&shape);
    let mut nothing = |_: Address, _: &[u8]| Ok::<(), Infallible>(());
    blocks::walk(
        file,
        bytes,
        |_, e| StoreError::io("read", path, e),
        |block| {
            for leaf in block.bytes.chunks(shape.leaf_bytes as usize) {
                let address =
                    if block.is_zero() || is_zero(leaf) { Address::ZERO } else { Address::of(leaf) };
                let Ok(()) = builder.leaf(address, &mut nothing);
            }
            Ok(())
        },
    )?;
    let Ok(root) = builder.finish(&mut nothing);
    store.known().remember(before, &files::metadata(file, path)?, root);
    Ok(root)
}

/// Only as good as the list of frames; where that is damaged, which has been reported, only the sums are checked.
fn check_frames(store: &Store, stored: &Stored, report: &mut VerifyReport) -> Result<(), StoreError> {
    let manifest = &stored.manifest;
    let frames = match store.read_frames(stored) {
        Ok(frames) => Some(frames),
        Err(StoreError::PartDamaged { source, .. }) => {
            if let StoreError::Corrupt { damage: Damage::Frames(_), .. } = *source {
                // The hash was right, so that this is news.
                report.problems.push(Problem::damage(FRAMES_PART, None, *source, 1)?);
            }
            None
        }
        Err(error) => return Err(error),
    };
    let mut problems = Vec::new();
    let counts = frames.as_deref().map(|frames| {
        check_receivers(manifest, frames, |kind| problems.push(Problem::of(FRAMES_PART, kind)))
    });
    for network in &manifest.networks {
        let accounting = network.accounting;
        let balance = accounting.balance();
        let even = balance == 0 && accounting.unaccounted == 0;
        if !even {
            let recorded = accounting.unaccounted;
            let kind = ProblemKind::Unaccounted { network: network.name.clone(), balance, recorded };
            problems.push(Problem::of(MANIFEST, kind));
        }
        let stored_frames =
            counts.as_ref().map(|counts| counts.get(network.name.as_str()).copied().unwrap_or(0));
        if let Some(stored) = stored_frames.filter(|stored| *stored != accounting.in_flight) {
            let recorded = accounting.in_flight;
            let kind = ProblemKind::FrameCount { network: network.name.clone(), recorded, stored };
            problems.push(Problem::of(FRAMES_PART, kind));
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
