//! One snapshot of several hosts' parts: what the initiator's host puts together.

use std::collections::BTreeMap;

use diorama_api::{ApiError, CaptureMode, CreateSnapshotRequest, ErrorKind, InFlightPolicy};
use diorama_cut::{Frames, NetworkId, Snapshot};
use diorama_store::{
    Accounting, Capture as StoredCapture, CutRecord, Dropped, FORMAT, MachineRecord, Manifest, NetworkRecord,
    Receipt, SnapshotId,
};

use super::HostPart;
use crate::Agent;
use crate::problem::store_error;
use crate::record::{Record, SpanRecord};

impl Agent {
    /// Writes the manifest of all parts, which makes the snapshot. Each part's data is in the store already, and is looked
    /// for here once more.
    pub(crate) fn commit_snapshot_of_parts(
        &self,
        record: &Record,
        span: &SpanRecord,
        (name, request): (&str, &CreateSnapshotRequest),
        snapshot: &Snapshot,
        (mut machines, parts): (BTreeMap<String, MachineRecord>, Vec<HostPart>),
    ) -> Result<SnapshotId, ApiError> {
        self.store.look_again().map_err(store_error)?;
        let writer = self.store.begin().map_err(store_error)?;
        let mut frames = Vec::new();
        for part in &parts {
            frames.extend(self.store.frames_of(&part.frames).map_err(store_error)?);
        }
        let frames = writer.put_frames(&frames).map_err(store_error)?;
        for machine in machines.values() {
            writer.adopt(machine).map_err(store_error)?;
        }
        let mut bytes = writer.seal().map_err(store_error)?;
        for part in &parts {
            bytes.logical = bytes.logical.saturating_add(part.bytes.logical);
            bytes.new = bytes.new.saturating_add(part.bytes.new);
        }
        let accounts = snapshot.networks();
        let networks = (0_u16..).zip(&span.whole.networks).map(|(index, network)| NetworkRecord {
            name: network.name.to_string(),
            accounting: accounts.get(&NetworkId(index)).map(stored_accounting).unwrap_or_default(),
            learned: parts
                .iter()
                .filter_map(|part| part.learned.get(usize::from(index)))
                .flatten()
                .cloned()
                .collect(),
        });
        let networks = networks.collect();
        let machines = span
            .whole
            .machines
            .iter()
            .map(|machine| {
                machines.remove(machine.name.as_str()).ok_or_else(|| {
                    ApiError::new(
                        ErrorKind::CutFailed,
                        format!("no host has reported machine {}", machine.name),
                    )
                })
            })
            .collect::<Result<_, _>>()?;
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            name: name.to_owned(),
            message: request.message.clone().unwrap_or_default(),
            environment: span.whole.name.to_string(),
            parent: record.snapshot,
            created: crate::up::now(),
            capture: match snapshot.capture {
                diorama_cut::CaptureMode::Live => StoredCapture::Live,
                diorama_cut::CaptureMode::PreCopy => StoredCapture::Precopy,
                diorama_cut::CaptureMode::Stop => StoredCapture::Stop,
            },
            in_flight_policy: match snapshot.in_flight {
                diorama_cut::InFlight::Record => diorama_store::InFlightPolicy::Record,
                diorama_cut::InFlight::Drop => diorama_store::InFlightPolicy::Drop,
            },
            specification: span.whole.clone(),
            cut: CutRecord {
                epoch: snapshot.cut.epoch.0,
                skew_us: snapshot.skew_us(),
                hosts: u32::try_from(snapshot.parts.len()).unwrap_or(u32::MAX),
                attempt: snapshot.cut.snapshot.to_string(),
            },
            machines,
            networks,
            frames,
            bytes,
        };
        writer.commit(manifest).map_err(store_error)
    }

    /// Writes down how long a snapshot took.
    pub(crate) fn note_created(&self, id: &SnapshotId, create_ms: u64) {
        if let Err(error) = self.store.put_receipt(id, &Receipt { create_ms }) {
            tracing::warn!(%error, "how long the snapshot took is not recorded");
        }
    }
}

/// In the protocol's words.
pub(crate) fn protocol_capture(mode: CaptureMode) -> diorama_cut::CaptureMode {
    match mode {
        CaptureMode::Live => diorama_cut::CaptureMode::Live,
        CaptureMode::Precopy => diorama_cut::CaptureMode::PreCopy,
        CaptureMode::Stop => diorama_cut::CaptureMode::Stop,
    }
}

/// In the protocol's words.
pub(crate) fn protocol_in_flight(policy: InFlightPolicy) -> diorama_cut::InFlight {
    match policy {
        InFlightPolicy::Record => diorama_cut::InFlight::Record,
        InFlightPolicy::Drop => diorama_cut::InFlight::Drop,
    }
}

fn stored_accounting(frames: &Frames) -> Accounting {
    Accounting {
        sent_before: frames.sent_before,
        delivered_before: frames.delivered_before,
        in_flight: frames.in_flight,
        dropped: Dropped {
            queue_full: frames.dropped.queue_full,
            link_loss: frames.dropped.link_loss,
            wire_loss: frames.dropped.wire_loss,
            no_receiver: frames.dropped.no_receiver,
            cut_drop: frames.dropped.cut_drop,
        },
        unaccounted: i64::try_from(frames.unaccounted()).unwrap_or(i64::MAX),
    }
}
