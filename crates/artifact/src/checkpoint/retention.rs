//! Which checkpoints stay. What decides lies in their manifests, so whoever asks, after whatever crash, finds
//! the same ones.

use std::collections::BTreeSet;

use retort_core::{Code, Result, spec::Keep};
use serde::{Deserialize, Serialize};

use super::{Manifest, complete, manifest};
use crate::{Store, paths};

/// Name in a manifest's extra fields of the [`HeldOut`] at that step.
pub const HELD_OUT: &str = "held_out";

/// How a student did on a sample of the held-out rows, at one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    pub step: u32,
    /// Target tokens that it was trained at by then.
    pub target_tokens: u64,
    /// Mean KL(teacher || student), nats a target token.
    pub kl: f64,
    pub top1_agreement: f64,
    /// Expected calibration error.
    pub calibration_error: f64,
    /// Target tokens it was judged on. The sample only grows, so equal numbers are the same sample.
    pub tokens: u64,
}

impl HeldOut {
    /// Whether it says something.
    pub fn is_sound(&self) -> bool {
        self.tokens > 0
            && [self.kl, self.top1_agreement, self.calibration_error].iter().all(|figure| figure.is_finite())
    }
}

impl Manifest {
    /// None where the student was not judged at this step.
    pub fn held_out(&self) -> Option<HeldOut> {
        HeldOut::deserialize(self.extra.get(HELD_OUT)?).ok().filter(HeldOut::is_sound)
    }
}

/// The job's checkpoint with the lowest held-out KL, of several the newest. One that was judged on a smaller
/// sample than another does not count: easy rows would make it the best. None where no checkpoint was judged; a
/// manifest that cannot be read is passed over.
pub async fn best(store: &Store, job: &str) -> Result<Option<(String, Manifest)>> {
    let mut best: Option<(HeldOut, String, Manifest)> = None;
    for (step, epoch) in complete(store, job).await? {
        let prefix = paths::checkpoint(job, step, epoch);
        let Some(manifest) = readable(store, &prefix).await? else { continue };
        let Some(judged) = manifest.held_out() else { continue };
        let beats =
            |other: &HeldOut| judged.tokens > other.tokens || (judged.tokens == other.tokens && judged.kl <= other.kl);
        if best.as_ref().is_none_or(|(other, ..)| beats(other)) {
            best = Some((judged, prefix, manifest));
        }
    }
    Ok(best.map(|(_, prefix, manifest)| (prefix, manifest)))
}

/// Removes all checkpoints of a job but the newest `keep.last` and, if `keep.best`, the [`best`]; and
/// uploads without a manifest that are older than the newest ones. One whose manifest cannot be read is none of the
/// newest. The removed prefixes. A manifest goes before its files, and nothing that stays is touched, so a crash on
/// the way loses nothing that should stay.
pub async fn prune(store: &Store, job: &str, keep: Keep) -> Result<Vec<String>> {
    let best = if keep.best { best(store, job).await?.map(|(prefix, _)| prefix) } else { None };
    let mut left = keep.last.max(1);
    let mut oldest_kept = None;
    for of in complete(store, job).await?.into_iter().rev() {
        if left > 0 && readable(store, &paths::checkpoint(job, of.0, of.1)).await?.is_some() {
            left -= 1;
            oldest_kept = Some(of);
        }
    }
    let Some(oldest_kept) = oldest_kept else { return Ok(Vec::new()) };
    let all: BTreeSet<(u32, u64)> = store
        .list(&paths::checkpoints_prefix(job))
        .await?
        .iter()
        .filter_map(|entry| paths::parse_checkpoint(job, &entry.key))
        .collect();
    let mut removed = Vec::new();
    for (step, epoch) in all.into_iter().filter(|of| *of < oldest_kept) {
        let prefix = paths::checkpoint(job, step, epoch);
        if best.as_ref() == Some(&prefix) {
            continue;
        }
        store.delete(&paths::manifest(&prefix)).await?;
        store.delete_prefix(&prefix).await?;
        removed.push(prefix);
    }
    Ok(removed)
}

/// None where the manifest is damaged, gone or newer than this build.
async fn readable(store: &Store, prefix: &str) -> Result<Option<Manifest>> {
    match manifest(store, prefix).await {
        Ok(manifest) => Ok(Some(manifest)),
        Err(error) => match error.code {
            Code::CheckpointCorrupt | Code::CheckpointMismatch | Code::ObjectNotFound => Ok(None),
            _ => Err(error),
        },
    }
}
