//! Messages of the API as JSON, for `--json`. Field names are those of the `.proto` files, states
//! are lower case words, times are RFC 3339, durations are seconds.

use std::collections::{BTreeMap, HashMap};

use retort_core::wire::job_state_from_proto;
use retort_proto as proto;
use serde_json::{Map, Value, json};

/// `{"type": "error", "code": ..., "message": ...}`
pub fn error(code: &str, message: &str) -> Value {
    json!({ "type": "error", "code": code, "message": message })
}

/// `{"type": "notice", "message": ...}`: something beside the job's own events.
pub fn notice(message: &str) -> Value {
    json!({ "type": "notice", "message": message })
}

/// `{"type": "event", "sequence", "time", "state", "progress", "event": {"kind": ...}}`
pub fn event(event: &proto::JobEvent) -> Value {
    use proto::job_event::What;
    let what = match &event.what {
        Some(What::StateChanged(changed)) => json!({
            "kind": "state_changed",
            "from": state(changed.from),
            "to": state(changed.to),
            "error": changed.error.as_ref().map(error_detail),
        }),
        Some(What::ShardPublished(shard)) => json!({
            "kind": "shard_published",
            "shard": shard.shard,
            "epoch": shard.epoch,
            "target_tokens": shard.target_tokens,
            "bytes": shard.bytes,
            "reused": shard.reused,
        }),
        Some(What::AttemptLost(lost)) => json!({
            "kind": "attempt_lost",
            "redone": lost.redone.as_ref().map(redone),
        }),
        Some(What::TrainStepped(stepped)) => {
            json!({ "kind": "train_stepped", "step": stepped.step, "loss": stepped.loss })
        }
        Some(What::CheckpointSaved(saved)) => {
            let held_out = saved.held_out.as_ref().map(curve_point);
            json!({ "kind": "checkpoint_saved", "step": saved.step, "key": saved.key, "held_out": held_out })
        }
        Some(What::TaskUnclaimed(unclaimed)) => json!({
            "kind": "task_unclaimed",
            "task": unclaimed.task,
            "pool": unclaimed.pool,
            "role": unclaimed.role,
        }),
        Some(What::Evaluated(evaluated)) => json!({
            "kind": "evaluated",
            "step": evaluated.step,
            "quality": evaluated.quality.as_ref().map(quality),
        }),
        None => Value::Null,
    };
    json!({
        "type": "event",
        "sequence": event.sequence,
        "time": time(event.time.as_ref()),
        "state": state(event.state),
        "progress": event.progress.as_ref().map(progress),
        "event": what,
    })
}

pub fn job(job: &proto::Job) -> Value {
    json!({
        "name": job.name,
        "uid": job.uid,
        "spec": job.spec.as_ref().map(spec),
        "state": state(job.state),
        "create_time": time(job.create_time.as_ref()),
        "start_time": time(job.start_time.as_ref()),
        "end_time": time(job.end_time.as_ref()),
        "error": job.error.as_ref().map(error_detail),
        "plan": job.plan.as_ref().map(plan),
        "progress": job.progress.as_ref().map(progress),
        "report": job.report.as_ref().map(report),
    })
}

pub fn plan(plan: &proto::Plan) -> Value {
    json!({
        "train_rows": plan.train_rows,
        "held_out_rows": plan.held_out_rows,
        "train_shards": plan.train_shards,
        "held_out_shards": plan.held_out_shards,
        "max_target_tokens": plan.max_target_tokens,
        "optimizer_steps": plan.optimizer_steps,
        "teacher_parameters": plan.teacher_parameters,
        "student_parameters": plan.student_parameters,
        "max_store_bytes": plan.max_store_bytes,
        "training": plan.training.as_ref().map(training),
    })
}

fn training(training: &proto::TrainingPlan) -> Value {
    let place = |place: &proto::TrainingPlace| {
        json!({
            "device": place.device,
            "dtype": place.dtype,
            "micro_batch_tokens": place.micro_batch_tokens,
            "head_positions": place.head_positions,
            "memory": place.memory.as_ref().map(|memory| json!({
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "exchange": memory.exchange,
                "head": memory.head,
                "activations": memory.activations,
                "activations_checkpointed": memory.activations_checkpointed,
                "program": memory.program,
                "total": memory.total,
                "checkpoint_copy": memory.checkpoint_copy,
            })),
        })
    };
    json!({
        "batch_rows": training.batch_rows,
        "micro_batch_tokens": training.micro_batch_tokens,
        "trained_parameters": training.trained_parameters,
        "checkpoints_activations": training.checkpoints_activations,
        "places": training.places.iter().map(place).collect::<Vec<_>>(),
    })
}

pub fn model(model: &proto::Model) -> Value {
    json!({
        "name": model.name,
        "job": model.job,
        "create_time": time(model.create_time.as_ref()),
        "key": model.key,
        "quality": model.quality.as_ref().map(quality),
    })
}

pub fn report(report: &proto::Report) -> Value {
    let by_tag = |tags: &HashMap<String, proto::Quality>| -> BTreeMap<String, Value> {
        tags.iter().map(|(tag, value)| (tag.clone(), quality(value))).collect()
    };
    let artifacts: BTreeMap<_, _> = report.artifacts.iter().collect();
    json!({
        "before": report.before.as_ref().map(quality),
        "after": report.after.as_ref().map(quality),
        "before_by_tag": by_tag(&report.before_by_tag),
        "after_by_tag": by_tag(&report.after_by_tag),
        "gates": report.gates.iter().map(|gate| json!({
            "gate": gate.gate, "limit": gate.limit, "value": gate.value, "passed": gate.passed,
        })).collect::<Vec<_>>(),
        "samples": report.samples.iter().map(|sample| json!({
            "row_id": sample.row_id,
            "prompt": sample.prompt,
            "teacher": sample.teacher,
            "student_before": sample.student_before,
            "student_after": sample.student_after,
        })).collect::<Vec<_>>(),
        "target_tokens": report.target_tokens,
        "store_bytes": report.store_bytes,
        "bytes_per_token": report.bytes_per_token,
        "teacher_tokens_per_second": report.teacher_tokens_per_second,
        "student_tokens_per_second": report.student_tokens_per_second,
        "processed_tokens": report.processed_tokens,
        "trained_target_tokens": told(report.trained_target_tokens),
        "trained_parameters": told(report.trained_parameters),
        "lora_rank": told(report.lora_rank.into()),
        "ema_decay": (report.ema_decay > 0.0).then_some(report.ema_decay),
        "workers": told(report.workers.into()),
        "left_out_steps": report.left_out_steps,
        "redone": report.redone.iter().map(redone).collect::<Vec<_>>(),
        "reused": report.reused,
        "soft_targets": report.soft_targets.as_ref().map(|stored| json!({
            "train": stored.train.as_ref().map(fidelity),
            "held_out": stored.held_out.as_ref().map(fidelity),
        })),
        "pruning": report.pruning.as_ref().map(pruning),
        "forecast": report.forecast.as_ref().map(forecast),
        "promoted": report.promoted,
        "artifacts": artifacts,
    })
}

/// `null` of what was not used, or that no worker told.
fn told(number: u64) -> Option<u64> {
    (number > 0).then_some(number)
}

/// `queued`, `running`, `succeeded`, `rejected`, `failed` or `cancelled`.
pub fn state(state: i32) -> &'static str {
    job_state_from_proto(state).map_or("unknown", retort_core::state::JobState::as_str)
}

fn progress(progress: &proto::Progress) -> Value {
    let eta_seconds = progress.eta.as_ref().map(|eta| eta.seconds as f64 + f64::from(eta.nanos) / 1e9);
    json!({
        "shards_published": progress.shards_published,
        "shards_total": progress.shards_total,
        "teacher_target_tokens": progress.teacher_target_tokens,
        "teacher_tokens_per_second": progress.teacher_tokens_per_second,
        "step": progress.step,
        "steps_total": progress.steps_total,
        "train_loss": progress.train_loss,
        "student_tokens_per_second": progress.student_tokens_per_second,
        "held_out_kl": progress.held_out_kl,
        "attempts_redone": progress.attempts_redone,
        "eta_seconds": eta_seconds,
    })
}

fn quality(quality: &proto::Quality) -> Value {
    json!({
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        "student_perplexity": quality.student_perplexity,
        "teacher_perplexity": quality.teacher_perplexity,
        "tokens": quality.tokens,
        "calibration_error": quality.calibration_error,
        "teacher_calibration_error": quality.teacher_calibration_error,
    })
}

fn curve_point(point: &proto::CurvePoint) -> Value {
    json!({
        "step": point.step,
        "target_tokens": point.target_tokens,
        "kl": point.kl,
        "top1_agreement": point.top1_agreement,
        "calibration_error": point.calibration_error,
        "tokens": point.tokens,
    })
}

/// The numbers of the fit are null where there is none.
fn forecast(forecast: &proto::Forecast) -> Value {
    let fitted = forecast.none.is_empty();
    let of_fit = |value: f64| fitted.then_some(value);
    json!({
        "curve": forecast.curve.iter().map(curve_point).collect::<Vec<_>>(),
        "points": forecast.points,
        "floor": of_fit(forecast.floor),
        "scale": of_fit(forecast.scale),
        "exponent": of_fit(forecast.exponent),
        "confidence": of_fit(forecast.confidence),
        "predictions": forecast.predictions.iter().map(|prediction| json!({
            "factor": prediction.factor,
            "target_tokens": prediction.target_tokens,
            "kl": prediction.kl,
            "low": prediction.low,
            "high": prediction.high,
        })).collect::<Vec<_>>(),
        "none": if fitted { None } else { Some(&forecast.none) },
        "decaying": forecast.decaying,
    })
}

fn fidelity(fidelity: &proto::Fidelity) -> Value {
    json!({
        "head_mass": fidelity.head_mass,
        "mean_abs_error": fidelity.mean_abs_error,
        "argmax_agreement": fidelity.argmax_agreement,
        "kl": fidelity.kl,
    })
}

fn pruning(pruning: &proto::Pruning) -> Value {
    let axis = |axis: &Option<proto::PrunedAxis>| {
        axis.as_ref().map(|axis| json!({ "kept": axis.kept, "of": axis.of, "share": axis.share }))
    };
    json!({
        "layers": pruning.layers.iter().map(|layer| json!({
            "layer": layer.layer,
            "influence": layer.influence,
            "attention_heads_share": layer.attention_heads_share,
            "intermediate_share": layer.intermediate_share,
        })).collect::<Vec<_>>(),
        "depth": axis(&pruning.depth),
        "hidden": axis(&pruning.hidden),
        "intermediate": axis(&pruning.intermediate),
        "attention_heads": axis(&pruning.attention_heads),
        "key_value_heads": axis(&pruning.key_value_heads),
        "calibration_rows": pruning.calibration_rows,
        "calibration_tokens": pruning.calibration_tokens,
    })
}

fn redone(redone: &proto::Redone) -> Value {
    json!({ "task": redone.task, "epoch": redone.epoch, "worker": redone.worker, "reason": redone.reason })
}

fn error_detail(detail: &proto::ErrorDetail) -> Value {
    json!({ "code": detail.code, "message": detail.message })
}

/// The spec as YAML would write it; `null` when it is not one this version knows.
fn spec(spec: &proto::JobSpec) -> Value {
    retort_core::wire::job_spec_from_proto(spec.clone())
        .ok()
        .and_then(|spec| serde_json::to_value(spec).ok())
        .unwrap_or_else(|| Value::Object(Map::from_iter([("name".to_owned(), json!(spec.name))])))
}

fn time(time: Option<&prost_types::Timestamp>) -> Value {
    time.map_or(Value::Null, |time| json!(time.to_string()))
}
