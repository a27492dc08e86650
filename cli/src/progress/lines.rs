//! Events as lines of text.

use retort_process::escaped;
use retort_proto::{self as proto, job_event::What};

use super::state::State;
use crate::{json, text};

/// What a reader of a log wants to know of an event.
pub fn line(event: &proto::JobEvent, state: &State) -> Option<String> {
    let left = state.left().map_or_else(String::new, |left| format!(", {} left", text::duration(left.as_secs_f64())));
    Some(match event.what.as_ref()? {
        What::ShardPublished(_) => format!(
            "teach     shard {} of {}, {} tokens, {} tokens/s{left}",
            state.shards_done,
            state.shards_total,
            text::count(state.teacher_tokens),
            text::rate(state.teacher_rate)
        ),
        What::TrainStepped(stepped) if stepped.step == 0 => "train     started".to_owned(),
        What::TrainStepped(stepped) => format!(
            "train     step {} of {}, loss {:.4}{}, {} tokens/s{left}",
            stepped.step,
            state.steps_total,
            stepped.loss,
            state.latest_kl.map_or_else(String::new, |kl| format!(", held-out KL {kl:.4}")),
            text::rate(state.student_rate)
        ),
        What::CheckpointSaved(saved) => {
            let judged = saved.held_out.as_ref().map_or_else(String::new, |point| {
                format!(
                    ", held-out KL {:.4}, top-1 agreement {:.1} %, calibration error {:.1} %",
                    point.kl,
                    100.0 * point.top1_agreement,
                    100.0 * point.calibration_error
                )
            });
            format!("train     checkpoint at step {}: {}{judged}", saved.step, text::clean(&saved.key))
        }
        What::Evaluated(evaluated) => {
            let quality = evaluated.quality.as_ref()?;
            format!(
                "evaluate  step {}: held-out KL {:.4}, top-1 agreement {:.1} %",
                evaluated.step,
                quality.kl,
                100.0 * quality.top1_agreement
            )
        }
        _ => return remarkable(event),
    })
}

/// What is worth a line that stays, even where bars show the rest.
pub fn remarkable(event: &proto::JobEvent) -> Option<String> {
    match event.what.as_ref()? {
        What::AttemptLost(lost) => {
            let redone = lost.redone.as_ref()?;
            let task = redone.task.rsplit('/').next().unwrap_or_default();
            Some(escaped(&format!("redone    {task}, attempt {}: {}", redone.epoch, redone.reason)))
        }
        What::TaskUnclaimed(unclaimed) => Some(escaped(&format!(
            "waiting   nobody takes {}: is a {} of the pool {:?} up?",
            unclaimed.task, unclaimed.role, unclaimed.pool
        ))),
        What::StateChanged(changed) => {
            let why = changed.error.as_ref().map_or_else(String::new, |error| format!(": {}", error.message));
            Some(escaped(&format!("job       {}{why}", json::state(changed.to))))
        }
        _ => None,
    }
}
