//! The catalogue: listing, showing, proving and deleting snapshots.

use diorama_api::{
    ApiError, BytesReport, CaptureMode, CutReport, DamagedSnapshot, DiskReport, DroppedReport, FramesReport,
    Here, InFlightPolicy, MachineReport, NetworkReport, RemoveReport, SignatureReport, SnapshotList,
    SnapshotReport, SnapshotSummary, VerifyProblem, VerifyReport, VerifyRequest,
};
use diorama_store::{Accounting, Capture, MachineState, SnapshotId, StoreError, Stored, Summary};

use crate::Agent;
use crate::operation::Operation;
use crate::problem::store_error;

impl Agent {
    /// All snapshots.
    pub(crate) fn list_snapshots(&self) -> Result<SnapshotList, ApiError> {
        let mut list = SnapshotList { snapshots: Vec::new(), damaged: Vec::new(), here: Vec::new() };
        for summary in self.store.list().map_err(store_error)? {
            match summary {
                Summary::Intact(entry) => list.snapshots.push(SnapshotSummary {
                    id: entry.id.to_string(),
                    name: entry.name,
                    environment: entry.environment,
                    parent: entry.parent.map(|parent| parent.to_string()),
                    created: entry.created,
                    message: Some(entry.message).filter(|message| !message.is_empty()),
                    machines: u32::try_from(entry.machines).unwrap_or(u32::MAX),
                    stored_bytes: entry.bytes.new,
                    cached: self.cache.holds(&entry.id),
                }),
                Summary::Damaged { id, error } => {
                    list.damaged.push(DamagedSnapshot { id: id.to_string(), problem: error.to_string() });
                }
            }
        }
        for slot in self.slots.all() {
            if let Some(snapshot) = slot.state().record.as_ref().and_then(|record| record.snapshot) {
                list.here.push(Here { environment: slot.name.to_string(), snapshot: snapshot.to_string() });
            }
        }
        Ok(list)
    }

    /// Everything known of one.
    pub(crate) fn show_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
    ) -> Result<SnapshotReport, ApiError> {
        let id = self.resolve_snapshot(query, environment)?;
        self.report_snapshot(&id)
    }

    /// The same by its id: also what `snapshot create` prints.
    pub(crate) fn report_snapshot(&self, id: &SnapshotId) -> Result<SnapshotReport, ApiError> {
        let stored = self.store.load(id).map_err(store_error)?;
        let signature = self.store.signature(id).map_err(store_error)?;
        Ok(report(&stored, self.signature_report(&signature)))
    }

    /// Deletes one. Running environments and other snapshots are not touched.
    pub(crate) fn remove_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
    ) -> Result<RemoveReport, ApiError> {
        let id = self.resolve_snapshot(query, environment)?;
        // A damaged one is deleted all the same; then it has no name.
        let name = self.store.load(&id).map(|stored| stored.name).unwrap_or_default();
        self.drop_snapshot(&id).map_err(store_error)?;
        let freed_bytes = self.collect_after_removal();
        Ok(RemoveReport { id: id.to_string(), name, freed_bytes })
    }

    /// Deletes one, and what the caches hold of it. The store's space is given back by collecting.
    pub(crate) fn drop_snapshot(&self, id: &SnapshotId) -> Result<(), StoreError> {
        let parts = self.store.load(id).map(|stored| stored.manifest.parts()).unwrap_or_default();
        self.store.remove(id)?;
        self.cache.remove(id);
        self.files.forget(parts.iter().map(|part| part.root));
        Ok(())
    }

    /// Gives back the memory that snapshots have here which another host has removed.
    pub(crate) fn forget_removed_snapshots(&self) {
        // What cannot be looked up now is kept.
        self.cache.forget_removed(|id| self.store.exists(id).unwrap_or(true));
    }

    /// Hashes and counts everything again.
    pub(crate) fn verify_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
        request: &VerifyRequest,
        operation: &Operation,
    ) -> Result<VerifyReport, ApiError> {
        let id = self.resolve_snapshot(query, environment)?;
        let signature = self.store.signature(&id).map_err(store_error)?;
        let unsigned = self.signature_problem(&signature, &request.signed_by)?;
        let stored = self.store.load(&id).ok();
        let verified = self
            .store
            .verify(&id, &mut |done, total| operation.bytes("verifying", done, total))
            .map_err(store_error)?;
        let problems = verified.problems.iter().map(|problem| VerifyProblem {
            file: problem.part.clone(),
            offset: problem.offset,
            problem: match &problem.object {
                Some(object) => format!("{}: {}", object.display(), problem.kind),
                None => problem.kind.to_string(),
            },
        });
        Ok(VerifyReport {
            id: id.to_string(),
            name: stored.as_ref().map(|stored| stored.name.clone()).unwrap_or_default(),
            ok: verified.problems.is_empty() && unsigned.is_none(),
            checked_bytes: verified.checked_bytes,
            frames: stored.as_ref().map(total_frames).unwrap_or_default(),
            signature: self.signature_report(&signature),
            problems: problems.chain(unsigned).collect(),
        })
    }

    /// The snapshot that the user means.
    pub(crate) fn resolve_snapshot(
        &self,
        query: &str,
        environment: Option<&str>,
    ) -> Result<SnapshotId, ApiError> {
        self.store.resolve(query, environment).map_err(store_error)
    }
}

fn report(stored: &Stored, signature: SignatureReport) -> SnapshotReport {
    let manifest = &stored.manifest;
    let machine = |machine: &diorama_store::MachineRecord| MachineReport {
        name: machine.name.clone(),
        host: machine.host.clone(),
        state: match machine.state {
            MachineState::Running => "running",
            MachineState::Paused => "paused",
            MachineState::Shutdown => "shutdown",
        }
        .to_owned(),
        pause_us: machine.pause_us,
        stall_us: machine.stall_us,
        drain_incomplete: machine.drain_incomplete,
        ram_bytes: machine.ram.bytes,
        ram_used_bytes: machine.ram.used_bytes,
        disks: machine
            .disks
            .iter()
            .map(|disk| DiskReport {
                name: disk.name.clone(),
                bytes: disk.layers.iter().map(|layer| layer.bytes).sum(),
            })
            .collect(),
    };
    SnapshotReport {
        id: stored.id.to_string(),
        name: stored.name.clone(),
        environment: manifest.environment.clone(),
        parent: manifest.parent.map(|parent| parent.to_string()),
        created: manifest.created.clone(),
        state: "complete".to_owned(),
        message: Some(manifest.message.clone()).filter(|message| !message.is_empty()),
        capture: match manifest.capture {
            Capture::Live => CaptureMode::Live,
            Capture::Precopy => CaptureMode::Precopy,
            Capture::Stop => CaptureMode::Stop,
        },
        in_flight_policy: match manifest.in_flight_policy {
            diorama_store::InFlightPolicy::Record => InFlightPolicy::Record,
            diorama_store::InFlightPolicy::Drop => InFlightPolicy::Drop,
        },
        cut: CutReport {
            epoch: manifest.cut.epoch,
            skew_us: manifest.cut.skew_us,
            hosts: manifest.cut.hosts,
        },
        machines: manifest.machines.iter().map(machine).collect(),
        frames: total_frames(stored),
        networks: manifest
            .networks
            .iter()
            .map(|network| NetworkReport { name: network.name.clone(), frames: frames(&network.accounting) })
            .collect(),
        bytes: BytesReport { logical: manifest.bytes.logical, new: manifest.bytes.new },
        create_ms: stored.receipt.map_or(0, |receipt| receipt.create_ms),
        signature,
    }
}

fn total_frames(stored: &Stored) -> FramesReport {
    stored.manifest.networks.iter().map(|network| frames(&network.accounting)).fold(
        FramesReport::default(),
        |sum, next| FramesReport {
            sent_before: sum.sent_before + next.sent_before,
            delivered_before: sum.delivered_before + next.delivered_before,
            in_flight: sum.in_flight + next.in_flight,
            dropped: DroppedReport {
                queue_full: sum.dropped.queue_full + next.dropped.queue_full,
                link_loss: sum.dropped.link_loss + next.dropped.link_loss,
                wire_loss: sum.dropped.wire_loss + next.dropped.wire_loss,
                no_receiver: sum.dropped.no_receiver + next.dropped.no_receiver,
                cut_drop: sum.dropped.cut_drop + next.dropped.cut_drop,
            },
            unaccounted: sum.unaccounted + next.unaccounted,
        },
    )
}

fn frames(accounting: &Accounting) -> FramesReport {
    FramesReport {
        sent_before: accounting.sent_before,
        delivered_before: accounting.delivered_before,
        in_flight: accounting.in_flight,
        dropped: DroppedReport {
            queue_full: accounting.dropped.queue_full,
            link_loss: accounting.dropped.link_loss,
            wire_loss: accounting.dropped.wire_loss,
            no_receiver: accounting.dropped.no_receiver,
            cut_drop: accounting.dropped.cut_drop,
        },
        unaccounted: accounting.unaccounted,
    }
}
