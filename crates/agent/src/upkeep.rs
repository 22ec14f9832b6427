//! The store as a whole: checking it, giving space back, counting, and thinning snapshots out.

use std::collections::BTreeMap;

use diorama_api::{
    ApiError, ErrorKind, PruneReport, PruneRequest, PrunedSnapshot, StoreCheckReport, StoreCheckRequest,
    StoreGcReport, StoreGcRequest, StoreProblem, StoreStats,
};
use diorama_store::{CheckOptions, CollectOptions, CollectPlan, Entry, Policy, StoreError, Summary};

use crate::Agent;
use crate::operation::Operation;
use crate::problem::store_error;

impl Agent {
    /// Looks whether the store is whole.
    pub(crate) fn check_store(
        &self,
        request: StoreCheckRequest,
        operation: &Operation,
    ) -> Result<StoreCheckReport, ApiError> {
        operation.step("checking");
        let options = CheckOptions { read_data: request.read_data, repair: request.repair };
        let report = self
            .store
            .check(options, &mut |done, total| operation.bytes("checking", done, total))
            .map_err(store_error)?;
        let problem = |problem: &diorama_store::CheckProblem| StoreProblem {
            object: problem.object.display().to_string(),
            problem: problem.kind.to_string(),
        };
        Ok(StoreCheckReport {
            ok: report.is_sound(),
            snapshots: report.snapshots as u64,
            packs: report.packs as u64,
            chunks: report.chunks,
            checked_bytes: report.checked_bytes,
            problems: report.problems.iter().map(problem).collect(),
            repaired: report.repaired.iter().map(problem).collect(),
        })
    }

    /// Gives back the space of what no snapshot needs.
    pub(crate) fn collect_store(
        &self,
        request: StoreGcRequest,
        operation: &Operation,
    ) -> Result<StoreGcReport, ApiError> {
        operation.step("collecting");
        let mut options = CollectOptions::default();
        if let Some(percent) = request.max_unused_percent {
            if percent > 100 {
                return Err(ApiError::new(ErrorKind::Invalid, format!("{percent} is no percentage")));
            }
            options.unused_percent_max = percent;
        }
        let mut progress = |done, total| operation.bytes("collecting", done, total);
        if request.dry_run {
            let plan = self.store.plan_collection(options, &mut progress).map_err(store_error)?;
            let would_free = plan.remove_bytes.saturating_sub(plan.repack_bytes);
            return Ok(gc_report(&plan, true, 0, would_free, false));
        }
        let collected = self.store.collect(options, &mut progress).map_err(store_error)?;
        if collected.deferred {
            operation.warn(
                "a snapshot is being written: what can go is marked, and the next `diorama store gc` removes it",
            );
        }
        Ok(gc_report(
            &collected.plan,
            false,
            collected.removed_packs as u64,
            collected.freed_bytes,
            collected.deferred,
        ))
    }

    /// After snapshots were removed. They are gone whatever becomes of this; returns what was freed.
    pub(crate) fn collect_after_removal(&self) -> u64 {
        match self.store.collect(CollectOptions::default(), &mut |_, _| {}) {
            Ok(collected) => collected.freed_bytes,
            Err(error @ StoreError::CannotCollect { .. }) => {
                tracing::warn!(%error, "no space is given back");
                0
            }
            Err(error) => {
                tracing::error!(%error, "space could not be given back");
                0
            }
        }
    }

    /// Counts.
    pub(crate) fn store_stats(&self) -> Result<StoreStats, ApiError> {
        let stats = self.store.stats().map_err(store_error)?;
        Ok(StoreStats {
            snapshots: stats.snapshots,
            damaged_snapshots: stats.damaged_snapshots,
            logical_bytes: stats.logical_bytes,
            stored_bytes: stats.stored_bytes,
            tree_bytes: stats.tree_bytes,
            unused_bytes: stats.unused_bytes,
            packs: stats.packs,
            chunks: stats.chunks,
            index_bytes: stats.index_bytes,
        })
    }

    /// Removes the snapshots that a policy does not keep.
    pub(crate) fn prune_snapshots(
        &self,
        request: &PruneRequest,
        operation: &Operation,
    ) -> Result<PruneReport, ApiError> {
        let policy = Policy {
            last: request.keep_last,
            hourly: request.keep_hourly,
            daily: request.keep_daily,
            weekly: request.keep_weekly,
            monthly: request.keep_monthly,
            yearly: request.keep_yearly,
            within_s: request.keep_within_s,
        };
        if policy.is_empty() {
            return Err(ApiError::new(ErrorKind::Invalid, "no rule says which snapshots to keep")
                .hint("such as `--keep-last 10 --keep-daily 7`; `diorama snapshot rm` deletes single ones"));
        }
        let list = self.store.list().map_err(store_error)?;
        let mut environments: BTreeMap<&str, Vec<&Entry>> = BTreeMap::new();
        for entry in list.iter().filter_map(Summary::entry) {
            if request.environment.as_ref().is_none_or(|wanted| *wanted == entry.environment) {
                environments.entry(&entry.environment).or_default().push(entry);
            }
        }
        let mut report =
            PruneReport { dry_run: request.dry_run, kept: Vec::new(), removed: Vec::new(), freed_bytes: 0 };
        for entries in environments.values() {
            for (entry, verdict) in entries.iter().zip(policy.apply(entries)) {
                let pruned = PrunedSnapshot {
                    id: entry.id.to_string(),
                    name: entry.name.clone(),
                    environment: entry.environment.clone(),
                    created: entry.created.clone(),
                    kept_by: verdict.kept_by.iter().map(ToString::to_string).collect(),
                };
                if !pruned.kept_by.is_empty() {
                    report.kept.push(pruned);
                    continue;
                }
                if !request.dry_run {
                    operation.check()?;
                    match self.drop_snapshot(&entry.id) {
                        // Somebody else removed it.
                        Ok(()) | Err(StoreError::Missing { .. }) => {}
                        Err(error) => return Err(store_error(error)),
                    }
                }
                report.removed.push(pruned);
            }
        }
        if !request.dry_run && !report.removed.is_empty() {
            operation.step("collecting");
            report.freed_bytes = self.collect_after_removal();
        }
        Ok(report)
    }
}

fn gc_report(
    plan: &CollectPlan,
    dry_run: bool,
    removed_packs: u64,
    freed_bytes: u64,
    deferred: bool,
) -> StoreGcReport {
    StoreGcReport {
        dry_run,
        snapshots: plan.snapshots as u64,
        needed_bytes: plan.needed_bytes,
        unused_bytes: plan.unused_bytes,
        packs_to_remove: plan.remove.len() as u64,
        packs_to_repack: plan.repack.len() as u64,
        removed_packs,
        freed_bytes,
        deferred,
    }
}
