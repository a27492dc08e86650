//! How far a job is, and when it may end.

use std::time::Duration;

use retort_core::{Result, state::JobState};

use crate::database::{Connection, jobs::Job, shards, tasks};

/// The fields are those of `retort.v1.Progress`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    pub shards_published: u32,
    pub shards_total: u32,
    /// Of published shards and of those being computed.
    pub teacher_target_tokens: u64,
    /// Median of the shards' own rates; tokens a second of one worker.
    pub teacher_tokens_per_second: f64,
    pub step: u32,
    pub steps_total: u32,
    pub train_loss: f64,
    pub student_tokens_per_second: f64,
    pub held_out_kl: Option<f64>,
    pub attempts_redone: u32,
    pub eta: Option<Duration>,
}

pub async fn of(conn: &mut Connection, job: &Job) -> Result<Progress> {
    let recent = shards::recent(&mut *conn, &job.id).await?;
    let running = tasks::running_progress(&mut *conn, &job.id).await?;
    let teacher_rate = median_rate(if recent.is_empty() { &running } else { &recent });
    let shard_seconds = median(recent.iter().map(|(_, seconds)| *seconds));
    let training = &job.training;
    let finished = job.train_finish.as_ref();
    let step = if finished.is_some() { job.plan.optimizer_steps } else { training.step.min(job.plan.optimizer_steps) };
    let eta = (!job.state.is_final()).then(|| {
        eta(&Estimate {
            shards_left: job.plan.shards().saturating_sub(job.shards_published),
            shard_seconds,
            teachers: running.len(),
            step,
            steps_total: job.plan.optimizer_steps,
            passes: job.spec.train.passes,
            steps_per_second: steps_per_second(job),
            evaluation_steps: if job.evaluation.is_some() { 0.0 } else { evaluation_steps(job) },
        })
    });
    Ok(Progress {
        shards_published: job.shards_published,
        shards_total: job.plan.shards(),
        teacher_target_tokens: running.iter().fold(job.target_tokens, |sum, (tokens, _)| sum.saturating_add(*tokens)),
        teacher_tokens_per_second: teacher_rate,
        step,
        steps_total: job.plan.optimizer_steps,
        train_loss: finished.map(|finish| finish.final_loss).or(training.loss).unwrap_or(0.0),
        student_tokens_per_second: finished.map(|f| f.tokens_per_second).or(training.tokens_per_second).unwrap_or(0.0),
        held_out_kl: training.held_out_kl,
        attempts_redone: tasks::count_redone(conn, &job.id).await?,
        eta: if job.state == JobState::Running { eta.flatten() } else { None },
    })
}

/// What the time to the end is estimated from.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    pub shards_left: u32,
    /// Median seconds of a shard.
    pub shard_seconds: Option<f64>,
    /// Workers that compute shards now.
    pub teachers: usize,
    pub step: u32,
    pub steps_total: u32,
    pub passes: u32,
    /// While computing; the time spent waiting for shards not counted.
    pub steps_per_second: Option<f64>,
    /// What the evaluation takes, in optimiser steps.
    pub evaluation_steps: f64,
}

/// Until the job is judged; `None` while nothing was measured.
///
/// Training overlaps the teacher in its first pass only: the later passes wait for the last shard.
pub fn eta(estimate: &Estimate) -> Option<Duration> {
    let teacher = if estimate.shards_left == 0 {
        0.0
    } else {
        f64::from(estimate.shards_left) * estimate.shard_seconds? / estimate.teachers.max(1) as f64
    };
    let steps_left = estimate.steps_total.saturating_sub(estimate.step);
    let rate = estimate.steps_per_second?;
    let first_pass = estimate.steps_total / estimate.passes.max(1);
    let later_passes = steps_left.min(estimate.steps_total - first_pass);
    let after_teacher = if teacher > 0.0 { teacher + f64::from(later_passes) / rate } else { 0.0 };
    let trained = after_teacher.max(f64::from(steps_left) / rate);
    Duration::try_from_secs_f64(trained + estimate.evaluation_steps / rate).ok()
}

/// The median of `(tokens, seconds)` pairs' rates; 0 while there is none.
pub fn median_rate(parts: &[(u64, f64)]) -> f64 {
    median(
        parts
            .iter()
            .filter(|(tokens, seconds)| *tokens > 0 && *seconds > 0.0)
            .map(|(tokens, seconds)| *tokens as f64 / seconds),
    )
    .unwrap_or(0.0)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

fn steps_per_second(job: &Job) -> Option<f64> {
    let tokens_a_step = job.training.processed_tokens as f64 / f64::from(job.training.step);
    let tokens_a_second = job.training.tokens_per_second?;
    Some(tokens_a_second / tokens_a_step).filter(|rate| rate.is_finite() && *rate > 0.0)
}

/// The held-out rows go forward through two students, and a forward is about a third of a step.
fn evaluation_steps(job: &Job) -> f64 {
    job.plan.held_out_rows as f64 / f64::from(job.spec.train.batch_rows.max(1)) * 2.0 / 3.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(estimate: Estimate, seconds: Option<u64>) {
        assert_eq!(eta(&estimate).map(|eta| eta.as_secs()), seconds);
    }

    const ESTIMATE: Estimate = Estimate {
        shards_left: 4,
        shard_seconds: Some(10.0),
        teachers: 1,
        step: 10,
        steps_total: 60,
        passes: 3,
        steps_per_second: Some(1.0),
        evaluation_steps: 0.0,
    };

    #[test]
    fn later_passes_wait_for_the_teacher() {
        // 40 s of teacher, then two passes of 20 steps.
        check(ESTIMATE, Some(80));
        // Four teachers leave 10 s: the steps themselves take longer than waiting and two passes.
        check(Estimate { teachers: 4, ..ESTIMATE }, Some(50));
        check(Estimate { shards_left: 0, ..ESTIMATE }, Some(50));
        check(Estimate { passes: 1, ..ESTIMATE }, Some(50));
    }

    #[test]
    fn the_evaluation_comes_last() {
        check(Estimate { evaluation_steps: 7.0, ..ESTIMATE }, Some(87));
        check(Estimate { step: 60, shards_left: 0, evaluation_steps: 7.0, ..ESTIMATE }, Some(7));
    }

    #[test]
    fn nothing_is_guessed_before_it_was_measured() {
        check(Estimate { shard_seconds: None, ..ESTIMATE }, None);
        check(Estimate { steps_per_second: None, ..ESTIMATE }, None);
        check(Estimate { steps_per_second: Some(1e-300), ..ESTIMATE }, None);
    }

    #[test]
    fn one_slow_shard_does_not_move_the_median() {
        assert_eq!(median_rate(&[(100, 1.0), (100, 1.0), (100, 50.0)]), 100.0);
        assert_eq!(median_rate(&[(100, 1.0), (300, 1.0)]), 200.0);
        assert_eq!(median_rate(&[(0, 0.0)]), 0.0);
    }
}
