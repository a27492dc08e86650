//! A job's plan as text: what will be done, in which sizes, and what that takes.

use retort_proto as proto;

use crate::text::{bytes, count, table};

/// As an aligned table.
pub fn render(plan: &proto::Plan) -> String {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![format!("  {name}"), value]);
    row("rows", format!("{} for training, {} held out", count(plan.train_rows), count(plan.held_out_rows)));
    row("shards", format!("{} for training, {} held out", plan.train_shards, plan.held_out_shards));
    row("target tokens", format!("at most {}", count(plan.max_target_tokens)));
    let steps = count(u64::from(plan.optimizer_steps));
    match &plan.training {
        Some(training) => {
            row("optimiser steps", format!("{steps}, of {} rows each", count(training.batch_rows.into())));
            row("micro-batches", micro_batches(training));
        }
        None => row("optimiser steps", steps),
    }
    row("teacher", format!("{} parameters", count(plan.teacher_parameters)));
    row("student", student(plan));
    row("soft targets", format!("at most {}", bytes(plan.max_store_bytes)));
    let training = plan.training.as_ref();
    for place in training.map_or(&[][..], |training| &training.places[..]) {
        let checkpointed = training.is_some_and(|training| training.checkpoints_activations);
        row(&format!("memory, {} in {}", device(place), place.dtype), memory(place, checkpointed));
    }
    table(&rows, &[])
}

fn device(place: &proto::TrainingPlace) -> String {
    place.device.to_uppercase()
}

/// `1,024 tokens on a CPU, 16,384 on a GPU`.
fn micro_batches(training: &proto::TrainingPlan) -> String {
    if let Some(tokens) = training.micro_batch_tokens {
        return format!("{} tokens, as the spec says", count(tokens.into()));
    }
    let chosen = training.places.iter().enumerate().map(|(nth, place)| {
        let unit = if nth == 0 { " tokens" } else { "" };
        format!("{}{unit} on a {}", count(place.micro_batch_tokens.into()), device(place))
    });
    chosen.collect::<Vec<_>>().join(", ")
}

fn student(plan: &proto::Plan) -> String {
    let all = format!("{} parameters", count(plan.student_parameters));
    match &plan.training {
        Some(training) if training.trained_parameters != plan.student_parameters => {
            format!("{all}; {} train", count(training.trained_parameters))
        }
        _ => all,
    }
}

/// `about 1.0 GB: weights 97 MB, ...`
fn memory(place: &proto::TrainingPlace, checkpointed: bool) -> String {
    let memory = place.memory.unwrap_or_default();
    let activations = if checkpointed {
        format!("{} (checkpointed)", bytes(memory.activations_checkpointed))
    } else {
        let (kept, less) = (bytes(memory.activations), bytes(memory.activations_checkpointed));
        format!("{kept} ({less} with activation_checkpointing)")
    };
    let parts = [
        ("weights", bytes(memory.weights)),
        ("gradients", bytes(memory.gradients)),
        ("optimiser", bytes(memory.optimizer)),
        ("other workers", bytes(memory.exchange)),
        ("head", format!("{} ({} positions)", bytes(memory.head), count(place.head_positions.into()))),
        ("activations", activations),
        ("program", bytes(memory.program)),
    ];
    let told = parts.iter().filter(|(name, _)| *name != "other workers" || memory.exchange > 0);
    let told: Vec<String> = told.map(|(name, size)| format!("{name} {size}")).collect();
    format!(
        "about {}: {}; {} more while a checkpoint is written",
        bytes(memory.total),
        told.join(", "),
        bytes(memory.checkpoint_copy)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> proto::Plan {
        let place = |device: &str, dtype: &str, micro_batch_tokens| proto::TrainingPlace {
            device: device.to_owned(),
            dtype: dtype.to_owned(),
            micro_batch_tokens,
            head_positions: 682,
            memory: Some(proto::TrainingMemory {
                weights: 97_000_000,
                gradients: 98_000_000,
                optimizer: 195_000_000,
                exchange: 0,
                head: 268_000_000,
                activations: 218_000_000,
                activations_checkpointed: 41_000_000,
                program: 200_000_000,
                total: 1_076_000_000,
                checkpoint_copy: 290_000_000,
            }),
        };
        proto::Plan {
            train_rows: 263,
            held_out_rows: 40,
            train_shards: 17,
            held_out_shards: 3,
            max_target_tokens: 38_784,
            optimizer_steps: 99,
            teacher_parameters: 134_515_008,
            student_parameters: 24_300_000,
            max_store_bytes: 5_000_000,
            training: Some(proto::TrainingPlan {
                batch_rows: 8,
                micro_batch_tokens: None,
                trained_parameters: 24_300_000,
                checkpoints_activations: false,
                places: vec![place("cpu", "f32", 1024), place("gpu", "bf16", 16_384)],
            }),
        }
    }

    #[test]
    fn a_plan_reads_like_this() {
        let memory = "about 1.1 GB: weights 97.0 MB, gradients 98.0 MB, optimiser 195.0 MB, head 268.0 MB (682 positions), \
                      activations 218.0 MB (41.0 MB with activation_checkpointing), program 200.0 MB; 290.0 MB more while \
                      a checkpoint is written";
        let expected = format!(
            "  rows                 263 for training, 40 held out
  shards               17 for training, 3 held out
  target tokens        at most 38,784
  optimiser steps      99, of 8 rows each
  micro-batches        1,024 tokens on a CPU, 16,384 on a GPU
  teacher              134,515,008 parameters
  student              24,300,000 parameters
  soft targets         at most 5.0 MB
  memory, CPU in f32   {memory}
  memory, GPU in bf16  {memory}
"
        );
        assert_eq!(render(&plan()), expected);
    }

    #[test]
    fn what_the_spec_says_and_what_is_used_is_told() {
        let mut plan = plan();
        let training = plan.training.as_mut().unwrap();
        training.micro_batch_tokens = Some(2048);
        training.trained_parameters = 700_000;
        training.checkpoints_activations = true;
        training.places[0].memory.as_mut().unwrap().exchange = 7_000_000;
        let text = render(&plan);
        for part in [
            "micro-batches        2,048 tokens, as the spec says\n",
            "student              24,300,000 parameters; 700,000 train\n",
            "optimiser 195.0 MB, other workers 7.0 MB, head",
            "activations 41.0 MB (checkpointed), program",
        ] {
            assert!(text.contains(part), "{part}\nis not in\n{text}");
        }
        let json = crate::json::plan(&plan);
        assert_eq!(json["training"]["places"][0]["memory"]["exchange"], 7_000_000);
        assert_eq!(
            (&json["training"]["micro_batch_tokens"], &json["training"]["batch_rows"]),
            (&2048.into(), &8.into())
        );
    }

    #[test]
    fn a_plan_of_before_has_no_sizes() {
        let text = render(&proto::Plan { training: None, ..plan() });
        assert!(text.contains("optimiser steps  99\n") && !text.contains("micro-batches"), "{text}");
        assert!(crate::json::plan(&proto::Plan { training: None, ..plan() })["training"].is_null());
    }
}
