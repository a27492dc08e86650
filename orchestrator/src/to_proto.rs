//! The orchestrator's own types -> `retort.v1`.

use std::collections::{BTreeMap, HashMap};

use retort_artifact::checkpoint::HeldOut;
use retort_core::wire::{
    duration_to_proto, job_spec_to_proto, job_state_to_proto, pruning_to_proto, timestamp_to_proto,
};
use retort_plan::{
    forecast::{CONFIDENCE, Prediction},
    training::{Memory, Place, Training},
};
use retort_proto as proto;

use crate::{
    database::{
        jobs::Job,
        models::Model,
        shards::{Fidelity, Published},
    },
    planner::Plan,
    progress::Progress,
    report::{Forecast, GateResult, Quality, Redone, Report, Sample},
};

pub fn job_to_proto(job: &Job, progress: &Progress) -> proto::Job {
    proto::Job {
        name: job.id.resource_name(),
        uid: job.id.as_str().to_owned(),
        spec: Some(job_spec_to_proto(&job.spec)),
        state: job_state_to_proto(job.state) as i32,
        create_time: Some(timestamp_to_proto(job.create_ms)),
        start_time: job.start_ms.map(timestamp_to_proto),
        end_time: job.end_ms.map(timestamp_to_proto),
        error: job.error.as_ref().map(|(code, message)| error_to_proto(code, message)),
        plan: Some(plan_to_proto(&job.plan)),
        progress: Some(progress_to_proto(progress)),
        report: job.report.as_ref().map(report_to_proto),
    }
}

pub fn plan_to_proto(plan: &Plan) -> proto::Plan {
    proto::Plan {
        train_rows: plan.train_rows,
        held_out_rows: plan.held_out_rows,
        train_shards: plan.train_shards,
        held_out_shards: plan.held_out_shards,
        max_target_tokens: plan.max_target_tokens,
        optimizer_steps: plan.optimizer_steps,
        teacher_parameters: plan.teacher_parameters,
        student_parameters: plan.student_parameters,
        max_store_bytes: plan.max_store_bytes,
        training: plan.training.as_ref().map(training_to_proto),
    }
}

fn training_to_proto(training: &Training) -> proto::TrainingPlan {
    let place = |place: &Place| proto::TrainingPlace {
        device: place.device.as_str().to_owned(),
        dtype: place.dtype.as_str().to_owned(),
        micro_batch_tokens: place.micro_batch_tokens,
        head_positions: place.head_positions,
        memory: Some(memory_to_proto(&place.memory)),
    };
    proto::TrainingPlan {
        batch_rows: training.batch_rows,
        micro_batch_tokens: training.micro_batch_tokens,
        trained_parameters: training.trained_parameters,
        checkpoints_activations: training.checkpoints_activations,
        places: training.places.iter().map(place).collect(),
    }
}

fn memory_to_proto(memory: &Memory) -> proto::TrainingMemory {
    proto::TrainingMemory {
        weights: memory.weights,
        gradients: memory.gradients,
        optimizer: memory.optimizer,
        exchange: memory.exchange,
        head: memory.head,
        activations: memory.activations,
        activations_checkpointed: memory.activations_checkpointed,
        program: memory.program,
        total: memory.total,
        checkpoint_copy: memory.checkpoint_copy,
    }
}

pub fn progress_to_proto(progress: &Progress) -> proto::Progress {
    proto::Progress {
        shards_published: progress.shards_published,
        shards_total: progress.shards_total,
        teacher_target_tokens: progress.teacher_target_tokens,
        teacher_tokens_per_second: progress.teacher_tokens_per_second,
        step: progress.step,
        steps_total: progress.steps_total,
        train_loss: progress.train_loss,
        student_tokens_per_second: progress.student_tokens_per_second,
        held_out_kl: progress.held_out_kl,
        attempts_redone: progress.attempts_redone,
        eta: progress.eta.map(duration_to_proto),
    }
}

pub fn report_to_proto(report: &Report) -> proto::Report {
    proto::Report {
        before: Some(quality_to_proto(&report.before)),
        after: Some(quality_to_proto(&report.after)),
        gates: report.gates.iter().map(gate_to_proto).collect(),
        samples: report.samples.iter().map(sample_to_proto).collect(),
        target_tokens: report.target_tokens,
        store_bytes: report.store_bytes,
        bytes_per_token: report.bytes_per_token,
        teacher_tokens_per_second: report.teacher_tokens_per_second,
        student_tokens_per_second: report.student_tokens_per_second,
        processed_tokens: report.processed_tokens,
        trained_target_tokens: report.trained_target_tokens,
        trained_parameters: report.trained_parameters,
        lora_rank: report.lora_rank,
        ema_decay: report.ema_decay,
        workers: report.workers,
        left_out_steps: report.left_out_steps,
        redone: report.redone.iter().map(redone_to_proto).collect(),
        promoted: report.promoted.clone(),
        artifacts: report.artifacts.iter().map(|(name, key)| (name.clone(), key.clone())).collect(),
        before_by_tag: by_tag_to_proto(&report.before_by_tag),
        after_by_tag: by_tag_to_proto(&report.after_by_tag),
        reused: report.reused,
        soft_targets: Some(proto::SoftTargetReport {
            train: fidelity_to_proto(&report.soft_targets.train),
            held_out: fidelity_to_proto(&report.soft_targets.held_out),
        }),
        pruning: report.pruning.as_ref().map(pruning_to_proto),
        forecast: report.forecast.as_ref().map(forecast_to_proto),
    }
}

fn by_tag_to_proto(by_tag: &BTreeMap<String, Quality>) -> HashMap<String, proto::Quality> {
    by_tag.iter().map(|(tag, quality)| (tag.clone(), quality_to_proto(quality))).collect()
}

fn forecast_to_proto(forecast: &Forecast) -> proto::Forecast {
    let mut sent = proto::Forecast {
        curve: forecast.curve.iter().map(held_out_to_proto).collect(),
        none: forecast.none.clone(),
        decaying: forecast.decaying,
        ..Default::default()
    };
    if let Some(fit) = &forecast.fit {
        sent.points = fit.points as u32;
        (sent.floor, sent.scale, sent.exponent) = (fit.law.floor, fit.law.scale, fit.law.exponent);
        sent.confidence = CONFIDENCE;
        let predictions = fit.predictions.iter().map(|&Prediction { factor, tokens, kl, low, high }| {
            proto::Prediction { factor, target_tokens: tokens, kl, low, high }
        });
        sent.predictions = predictions.collect();
    }
    sent
}

pub fn held_out_to_proto(point: &HeldOut) -> proto::CurvePoint {
    let &HeldOut { step, target_tokens, kl, top1_agreement, calibration_error, tokens } = point;
    proto::CurvePoint { step, target_tokens, kl, top1_agreement, calibration_error, tokens }
}

pub fn quality_to_proto(quality: &Quality) -> proto::Quality {
    proto::Quality {
        kl: quality.kl,
        top1_agreement: quality.top1_agreement,
        student_perplexity: quality.student_perplexity,
        teacher_perplexity: quality.teacher_perplexity,
        tokens: quality.tokens,
        calibration_error: quality.calibration_error,
        teacher_calibration_error: quality.teacher_calibration_error,
    }
}

pub fn redone_to_proto(redone: &Redone) -> proto::Redone {
    proto::Redone {
        task: redone.task.clone(),
        epoch: redone.epoch,
        worker: redone.worker.clone(),
        reason: redone.reason.clone(),
    }
}

pub fn published_to_proto(shard: Published) -> proto::PublishedShard {
    proto::PublishedShard {
        shard: shard.shard,
        epoch: shard.epoch,
        key: shard.key,
        sha256: shard.sha256,
        bytes: shard.bytes,
        rows: shard.rows,
        target_tokens: shard.target_tokens,
        work_sha256: shard.work_sha256.unwrap_or_default(),
        reused: shard.reused,
        teacher_sha256: shard.teacher_sha256.unwrap_or_default(),
    }
}

/// Absent when it was not measured, or not as a finite number.
pub fn fidelity_to_proto(fidelity: &Fidelity) -> Option<proto::Fidelity> {
    Some(proto::Fidelity {
        head_mass: fidelity.head_mass?,
        mean_abs_error: fidelity.mean_abs_error?,
        argmax_agreement: fidelity.argmax_agreement?,
        kl: fidelity.kl?,
    })
}

pub fn model_to_proto(model: &Model) -> proto::Model {
    proto::Model {
        name: model.resource_name(),
        job: model.job_id.resource_name(),
        create_time: model.promote_ms.map(timestamp_to_proto),
        key: model.key.clone(),
        quality: Some(quality_to_proto(&model.quality)),
    }
}

pub fn error_to_proto(code: &str, message: &str) -> proto::ErrorDetail {
    proto::ErrorDetail { code: code.to_owned(), message: message.to_owned() }
}

fn gate_to_proto(gate: &GateResult) -> proto::GateResult {
    proto::GateResult { gate: gate.gate.clone(), limit: gate.limit, value: gate.value, passed: gate.passed }
}

fn sample_to_proto(sample: &Sample) -> proto::Sample {
    proto::Sample {
        row_id: sample.row_id.clone(),
        prompt: sample.prompt.clone(),
        teacher: sample.teacher.clone(),
        student_before: sample.student_before.clone(),
        student_after: sample.student_after.clone(),
    }
}
