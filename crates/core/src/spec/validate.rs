//! Checks across a spec's fields that need no file.

use super::{Codec, Init, JobSpec, Lora, Promote, Schedule};
use crate::{Code, Error, Result};

impl JobSpec {
    /// The first field that cannot be right, named with its value and its bounds. What can run and is a slip all
    /// the same, [`Self::check_idle`] finds.
    pub fn validate(&self) -> Result<()> {
        name("name", &self.name)?;
        name("teacher.pool", &self.teacher.pool)?;
        name("student.pool", &self.student.pool)?;
        filled("prompts.path", &self.prompts.path)?;
        filled("teacher.model", &self.teacher.model)?;
        self.check_counts()?;
        within("prompts.held_out_fraction", self.prompts.held_out_fraction, 0.001, 0.9)?;
        let sampling = &self.teacher.sampling;
        within("teacher.sampling.temperature", sampling.temperature, 0.0, 10.0)?;
        within("teacher.sampling.top_p", sampling.top_p, 1e-6, 1.0)?;
        within("teacher.sampling.min_p", sampling.min_p, 0.0, 1.0)?;
        within("teacher.sampling.repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)?;
        count("teacher.sampling.stop", sampling.stop.len() as u32, 0, 16)?;
        for stop in &sampling.stop {
            if stop.is_empty() || stop.len() > 256 {
                return Err(invalid(format!(
                    "teacher.sampling.stop holds a text of {} bytes; each has 1 to 256",
                    stop.len()
                )));
            }
        }
        self.teacher.soft_targets.check()?;
        match &self.student.init {
            Init::Prune(prune) => prune.check()?,
            Init::Checkpoint { model } => filled("student.init.checkpoint.model", model)?,
            Init::Config { hidden_size, num_attention_heads, num_key_value_heads, .. } => {
                self.student.lora.as_ref().map_or(Ok(()), |lora| lora.check_width((*hidden_size).into()))?;
                count("student.init.config.num_key_value_heads", *num_key_value_heads, 1, *num_attention_heads)?;
                divides(
                    "student.init.config",
                    "num_attention_heads",
                    *num_attention_heads,
                    "hidden_size",
                    *hidden_size,
                )?;
                divides(
                    "student.init.config",
                    "num_key_value_heads",
                    *num_key_value_heads,
                    "num_attention_heads",
                    *num_attention_heads,
                )?;
                if (hidden_size / num_attention_heads) % 2 != 0 {
                    return Err(invalid(format!(
                        "student.init.config: hidden_size / num_attention_heads is {}, an odd head size; rotary embeddings need an even one",
                        hidden_size / num_attention_heads
                    )));
                }
            }
        }
        self.student.lora.as_ref().map_or(Ok(()), Lora::check)?;
        let train = &self.train;
        if train.freeze_embeddings && matches!(self.student.init, Init::Config { .. }) {
            return Err(invalid(
                "train.freeze_embeddings would keep the random embeddings of student.init.config; start from prune \
                 or checkpoint, or leave it out"
                    .to_owned(),
            ));
        }
        within("train.learning_rate", train.learning_rate, 1e-9, 10.0)?;
        within("train.warmup_ratio", train.warmup_ratio, 0.0, 1.0)?;
        within("train.decay_ratio", train.decay_ratio, 0.0, 1.0)?;
        if train.schedule == Schedule::Wsd && train.warmup_ratio + train.decay_ratio > 1.0 {
            return Err(invalid(format!(
                "train.warmup_ratio {} and train.decay_ratio {} are more than all steps together",
                train.warmup_ratio, train.decay_ratio
            )));
        }
        within("train.weight_decay", train.weight_decay, 0.0, 10.0)?;
        within("train.adam_beta1", train.adam_beta1, 0.0, 0.999_999)?;
        within("train.adam_beta2", train.adam_beta2, 0.0, 0.999_999)?;
        within("train.adam_epsilon", train.adam_epsilon, 1e-12, 1.0)?;
        within("train.adam_embedding_epsilon", train.adam_embedding_epsilon, 1e-12, 1.0)?;
        within("train.clip_norm", train.clip_norm, 1e-6, 1e6)?;
        self.check_loss()?;
        within("train.guard.norm_ratio", train.guard.norm_ratio, 0.0, 1e9)?;
        within("train.guard.loss_ratio", train.guard.loss_ratio, 0.0, 1e9)?;
        within("train.ema_decay", train.ema_decay, 0.0, 0.999_999)?;
        if let Some(parallel) = &train.parallel {
            within("train.parallel.outer_learning_rate", parallel.outer_learning_rate, 1e-6, 10.0)?;
            within("train.parallel.outer_momentum", parallel.outer_momentum, 0.0, 0.999)?;
            if train.diloco().is_some() && train.ema_decay > 0.0 {
                return Err(invalid(
                    "train.ema_decay averages one worker's weights, and with train.parallel.mode diloco each has its \
                     own; leave one of them out"
                        .to_owned(),
                ));
            }
        }
        if train.promote == Promote::Best && !train.keep.best {
            return Err(invalid(
                "train.promote is best and train.keep.best is false, so that the best checkpoint may be gone; leave one \
                 of them out"
                    .to_owned(),
            ));
        }
        self.export.check()?;
        for (gate, limit, max) in [
            ("gates.max_kl", self.gates.max_kl, 1e6),
            ("gates.max_kl_ratio", self.gates.max_kl_ratio, 1e6),
            ("gates.min_top1_agreement", self.gates.min_top1_agreement, 1.0),
            ("gates.max_perplexity_ratio", self.gates.max_perplexity_ratio, 1e6),
            ("gates.max_calibration_error", self.gates.max_calibration_error, 1.0),
        ] {
            if let Some(limit) = limit {
                within(gate, limit, 0.0, max)?;
            }
        }
        Ok(())
    }

    /// The loss asks for no more than the soft targets hold.
    fn check_loss(&self) -> Result<()> {
        let (loss, soft_targets) = (&self.train.loss, &self.teacher.soft_targets);
        loss.check()?;
        if loss.needs_exact_entries() && matches!(soft_targets.codec, Codec::Random { .. }) {
            return Err(invalid(
                "train.loss compares with the teacher's exact probabilities, and teacher.soft_targets.codec random keeps \
                 none; take another codec, or forward_kl and label_ce alone"
                    .to_owned(),
            ));
        }
        let hot = loss.temperature != 1.0 && loss.goes_by_temperature();
        if hot && !soft_targets.temperatures.contains(&loss.temperature) {
            return Err(invalid(format!(
                "train.loss.temperature is {}, for which the shards must keep a sum; add it to \
                 teacher.soft_targets.temperatures, which is {:?}",
                loss.temperature, soft_targets.temperatures
            )));
        }
        Ok(())
    }
}

fn name(field: &str, value: &str) -> Result<()> {
    let valid = (1..=63).contains(&value.len())
        && value.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !value.starts_with('-')
        && !value.ends_with('-');
    if valid {
        Ok(())
    } else {
        let shown: String = value.chars().take(80).collect();
        Err(invalid(format!(
            "{field} is {shown:?}; use 1 to 63 lower case letters, digits and dashes, no dash at either end"
        )))
    }
}

fn filled(field: &str, value: &str) -> Result<()> {
    if value.is_empty() || value.len() > 4096 || value.contains('\0') {
        Err(invalid(format!("{field} must be a path of 1 to 4096 bytes")))
    } else {
        Ok(())
    }
}

pub(super) fn within(field: &str, value: f64, min: f64, max: f64) -> Result<()> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(invalid(format!("{field} is {value}; it must lie between {min} and {max}")))
    }
}

pub(super) fn count(field: &str, value: u32, min: u32, max: u32) -> Result<()> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(invalid(format!("{field} is {value}; it must lie between {min} and {max}")))
    }
}

pub(super) fn divides(field: &str, part: &str, divisor: u32, whole: &str, dividend: u32) -> Result<()> {
    if dividend.is_multiple_of(divisor) {
        Ok(())
    } else {
        Err(invalid(format!("{field}: {part} ({divisor}) must divide {whole} ({dividend})")))
    }
}

pub(super) fn invalid(message: String) -> Error {
    Error::new(Code::SpecInvalid, message)
}
