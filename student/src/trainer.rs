//! The student in training: model, loss, optimiser and schedule, one optimiser step at a time.
//!
//! Synchronous and alone: no store, no bus, no clock but the one that measures its own speed. What
//! a step does is a function of the weights, the moments, the step's index and its rows, so a trainer
//! that was saved and read back goes on as it was: on a CPU bit for bit.

use std::time::Instant;

use retort_core::{Code, Error, Result, spec::Train};
use retort_llama::{Masks, Model};
use serde::{Deserialize, Serialize};
use tch::{Kind, TchError, Tensor, no_grad};

use crate::{
    batch::{self, MicroBatch},
    example::Example,
    failure::{llama, torch},
    guard::Watched,
    loss::{ChunkedLoss, Sums, objective::Objective},
    optimizer::{AdamW, Hyper},
    parallel::diloco::outer::Outer,
    schedule::Schedule,
    settings::Settings,
};

/// What of a job's spec decides the training, besides its data.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    pub train: Train,
    /// Optimiser steps of the whole run.
    pub steps: u32,
    pub limits: batch::Limits,
}

impl Options {
    /// Sizes that the spec leaves open are chosen for the device.
    pub(crate) fn of(train: &Train, steps: u32, settings: &Settings) -> Self {
        Self { train: train.clone(), steps, limits: settings.limits(train) }
    }
}

/// How far a run has come; travels with its checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps done. It alone says which rows come next.
    pub step: u32,
    /// Tokens that went through the student, prompts and all, each as often as it came. A checkpoint of before calls
    /// it `trained_tokens`.
    #[serde(alias = "trained_tokens")]
    pub processed_tokens: u64,
    /// Of these, tokens that the loss was computed at.
    pub target_tokens: u64,
    /// Spent computing, over all attempts; waiting for shards not counted.
    pub seconds: f64,
    /// Loss of the last step that had targets, nats a target token.
    pub loss: f64,
    /// Steps that the guard left out.
    #[serde(default)]
    pub left_out: u32,
    #[serde(default)]
    pub watched: Watched,
    /// The most that computed a step or a round together, this one included; 0 before the first.
    #[serde(default)]
    pub workers: u32,
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u32,
    /// Mean over the step's target tokens, nats; `None` when no row had any.
    pub loss: Option<f64>,
    /// Before clipping.
    pub gradient_norm: f64,
    pub learning_rate: f64,
    pub tokens: u64,
    pub seconds: f64,
}

/// What some rows of a step came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Sum over their target tokens, nats.
    pub loss: f64,
    pub positions: u64,
    /// Of these together in the loss.
    pub weight: f64,
    /// That went through the student.
    pub tokens: u64,
}

impl Share {
    pub fn add(&mut self, other: Share) {
        self.loss += other.loss;
        self.positions += other.positions;
        self.weight += other.weight;
        self.tokens += other.tokens;
    }
}

/// Of all target tokens of these rows together.
pub fn weight(examples: &[Example]) -> f64 {
    examples.iter().flat_map(|example| &example.weights).map(|&weight| f64::from(weight)).sum()
}

/// Name of the input embeddings, which are the head too where both are tied.
pub(crate) const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// Name of a head of its own.
pub(crate) const HEAD: &str = "lm_head.weight";

#[derive(Debug)]
pub struct Trainer {
    pub(crate) model: Model,
    pub(crate) loss: ChunkedLoss,
    pub(crate) optimizer: AdamW,
    pub(crate) options: Options,
    pub(crate) progress: Progress,
    /// Where weights are exchanged with other workers.
    pub(crate) outer: Option<Outer>,
    schedule: Schedule,
    /// Gradients that are not autograd's, shared with the optimiser; of a tied head one and the same. `None` where
    /// they stay as they are.
    head_grad_vh: Option<Tensor>,
    embedding_grad_vh: Option<Tensor>,
}

impl Trainer {
    /// At step 0, with `model`'s weights. Of one with adapters these alone train.
    pub fn new(model: Model, options: Options) -> Result<Self> {
        let optimizer = AdamW::new(trained(&model, &options.train), Hyper::of(&options.train))?;
        let head = if model.config().tie_word_embeddings { EMBEDDINGS } else { HEAD };
        let keeps_both = options.train.freeze_embeddings || model.lora().is_some();
        let gradient = |name| if keeps_both { Ok(None) } else { optimizer.gradient(name).map(Some) };
        let (head_grad_vh, embedding_grad_vh) = (gradient(head)?, gradient(EMBEDDINGS)?);
        let loss = ChunkedLoss::new(model.config().vocab_size, model.kind(), model.device())?;
        let outer = options.train.diloco().map(|parallel| Outer::new(parallel, options.steps));
        let schedule = Schedule::new(&options.train, options.steps);
        let progress = Progress::default();
        Ok(Self { model, loss, optimizer, options, progress, outer, schedule, head_grad_vh, embedding_grad_vh })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Works with the weights that are judged and exported: their running average, where there is one.
    pub fn judged<T>(&mut self, work: impl FnOnce(&Model, &mut ChunkedLoss) -> Result<T>) -> Result<T> {
        self.optimizer.show_averages(true)?;
        let done = work(&self.model, &mut self.loss);
        self.optimizer.show_averages(false)?;
        done
    }

    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Numbers that train.
    pub fn trainable(&self) -> u64 {
        self.optimizer.numbers()
    }

    /// Logs what was taken from the spec and what was chosen for the device.
    pub(crate) fn say_sizes(&self) {
        let Options { train, steps, limits } = &self.options;
        tracing::info!(
            trainable = self.trainable(),
            parameters = self.model.config().parameters(),
            steps,
            batch_rows = train.batch_rows,
            micro_batch_tokens = limits.max_tokens,
            micro_batch_chosen_for = if train.micro_batch_tokens.is_some() { "the spec" } else { "the device" },
            head_positions = self.loss.positions(),
            "sizes of the training"
        );
    }

    /// One optimiser step on `examples`: the loss is the mean over all their target tokens, by weight. `check`
    /// is asked between micro-batches and may end the attempt.
    ///
    /// A loss or gradient that is not finite is [`Code::LossNotFinite`], and the weights stay as they
    /// were. Without a single target token the step counts and changes nothing.
    pub fn step(&mut self, examples: &[Example], check: &dyn Fn() -> Result<()>) -> Result<StepReport> {
        let started = Instant::now();
        let share = self.share(examples, weight(examples), check)?;
        self.update(share, started)
    }

    /// Adds the gradient of `examples` to what this step has by now: their part of the loss's mean over
    /// the whole step's target tokens, which together weigh `whole`.
    pub fn share(&mut self, examples: &[Example], whole: f64, check: &dyn Fn() -> Result<()>) -> Result<Share> {
        let objective = Objective::of(&self.options.train.loss, self.progress.step, self.options.steps);
        let mut share = Share::default();
        for (micro_batch, micro) in (0u32..).zip(&batch::cut(examples, self.options.limits)) {
            check()?;
            let masks = Masks { step: self.progress.step, micro_batch };
            share.loss += self.accumulate(micro, masks, &objective, 1.0 / whole)?.loss;
            share.positions += micro.targets.len() as u64;
            share.weight += micro.targets.weights.iter().map(|&weight| f64::from(weight)).sum::<f64>();
            share.tokens += micro.ids_n.len() as u64;
        }
        Ok(share)
    }

    /// Ends a step that began at `started`, whose rows came to `whole` and whose gradient is collected.
    pub fn update(&mut self, whole: Share, started: Instant) -> Result<StepReport> {
        let Share { loss: sum, positions, weight, tokens } = whole;
        let learning_rate = self.schedule.learning_rate(self.progress.step);
        let mut gradient_norm = 0.0;
        let mut loss = None;
        if positions > 0 {
            let mean = sum / weight;
            gradient_norm = self.optimizer.gradient_norm()?;
            if !mean.is_finite() || !gradient_norm.is_finite() {
                self.optimizer.discard()?;
                return Err(self.not_finite(mean, gradient_norm, learning_rate));
            }
            loss = Some(mean);
            let step = self.progress.step + 1;
            match self.progress.watched.objection(&self.options.train.guard, gradient_norm, mean) {
                Some(why) => {
                    tracing::warn!(step, "a step is left out, the weights stay as they were: {why}");
                    self.optimizer.discard()?;
                    self.progress.left_out += 1;
                }
                None => {
                    let clip_norm = self.options.train.clip_norm;
                    let scale = if gradient_norm > clip_norm { clip_norm / gradient_norm } else { 1.0 };
                    self.optimizer.update(learning_rate, scale)?;
                    self.progress.loss = mean;
                }
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        self.progress.step += 1;
        self.progress.processed_tokens += tokens;
        self.progress.workers = self.progress.workers.max(1);
        self.progress.target_tokens += positions;
        self.progress.seconds += seconds;
        Ok(StepReport { step: self.progress.step, loss, gradient_norm, learning_rate, tokens, seconds })
    }

    /// Adds one micro-batch's gradients: the head's by its closed form, then one backward pass through the body from
    /// the hidden states' gradient, then the embedding's, row by row: autograd would make it whole, of all the
    /// vocabulary. A graph over a whole narrow model would hold its weights wide, so there each block is computed twice.
    fn accumulate(&mut self, micro: &MicroBatch, masks: Masks, objective: &Objective, scale: f64) -> Result<Sums> {
        let failed = torch("cannot run the student");
        let Inputs { ids_n, positions_m } = Inputs::of(&self.model, micro)?;
        let embedded_nh = no_grad(|| self.model.embedded(&ids_n)).map_err(llama)?;
        let weight_vh = self.model.head_weight();
        let head_grad_vh = self.head_grad_vh.as_mut();
        let recomputed = self.options.train.activation_checkpointing || self.model.is_narrow();
        let (hidden_nh, tape) =
            self.model.hidden_taped(&embedded_nh, &micro.lengths, Some(masks), recomputed).map_err(llama)?;
        let hidden_mh = hidden_nh.f_index_select(0, &positions_m).map_err(&failed)?;
        let (sums, grad_mh) =
            self.loss.backward(objective, &hidden_mh, &weight_vh, head_grad_vh, &micro.targets, scale)?;
        let whole_nh = hidden_nh.f_zeros_like().and_then(|mut grad| grad.f_index_add_(0, &positions_m, &grad_mh));
        let grad_nh = self.model.backward(tape, &whole_nh.map_err(&failed)?).map_err(llama)?;
        if let Some(embedding_grad_vh) = &mut self.embedding_grad_vh {
            let mut add = || -> Result<Tensor, TchError> {
                let ids_n = ids_n.f_to(grad_nh.device())?;
                embedding_grad_vh.f_index_add_(0, &ids_n, &grad_nh.f_to_kind(Kind::Float)?)
            };
            let _ = no_grad(&mut add).map_err(&failed)?;
        }
        self.optimizer.collect()?;
        Ok(sums)
    }

    fn not_finite(&self, loss: f64, gradient_norm: f64, learning_rate: f64) -> Error {
        let has_others = |tensor: &Tensor| {
            no_grad(|| tensor.f_isfinite()?.f_all()?.f_int64_value(&[])).is_ok_and(|all_finite| all_finite == 0)
        };
        // Steps that are not finite change no weight, so these came so.
        if let Some((name, _)) = self.model.parameters().iter().find(|(_, tensor)| has_others(tensor)) {
            let when = if self.progress.step == 0 { "before training" } else { "in training" };
            return Error::new(
                Code::ModelMalformed,
                format!(
                    "the student's weights {when} hold a number that is not finite, in {name}; see to the model that \
                     student.init starts from"
                ),
            );
        }
        Error::new(
            Code::LossNotFinite,
            format!(
                "step {}: the loss is {loss} and the gradient's norm {gradient_norm} at learning rate {learning_rate:.2e}; \
                 the weights were left as they were; lower train.learning_rate or train.clip_norm, or raise train.warmup_ratio",
                self.progress.step + 1
            ),
        )
    }
}

/// A micro-batch as tensors.
struct Inputs {
    ids_n: Tensor,
    /// On the model's device.
    positions_m: Tensor,
}

impl Inputs {
    fn of(model: &Model, micro: &MicroBatch) -> Result<Self> {
        let inputs = || -> Result<_, TchError> {
            let ids_n = Tensor::f_from_slice(&micro.ids_n)?;
            Ok(Self { ids_n, positions_m: Tensor::f_from_slice(&micro.positions_m)?.f_to(model.device())? })
        };
        inputs().map_err(torch("cannot run the student"))
    }
}

/// The model's weights that train, by name. Those that autograd has the gradients of require them; the head's and the
/// embedding's are computed without it.
fn trained(model: &Model, train: &Train) -> Vec<(String, Tensor)> {
    if model.lora().is_some() {
        return model.adapters();
    }
    model.set_trainable(true);
    let mut parameters = model.parameters();
    let is_apart = |name: &str| [EMBEDDINGS, HEAD].contains(&name);
    for (_, tensor) in parameters.iter().filter(|(name, _)| is_apart(name)) {
        let _ = tensor.set_requires_grad(false);
    }
    parameters.retain(|(name, _)| !(train.freeze_embeddings && is_apart(name)));
    parameters
}

/// Hidden states `[m, h]` that predict the micro-batch's targets. Records a graph unless inside [`tch::no_grad`].
pub(crate) fn target_hidden(model: &Model, micro: &MicroBatch) -> Result<Tensor> {
    let Inputs { ids_n, positions_m } = Inputs::of(model, micro)?;
    let hidden_nh = model.hidden_packed(&ids_n, &micro.lengths).map_err(llama)?;
    hidden_nh.f_index_select(0, &positions_m).map_err(torch("cannot run the student"))
}

#[cfg(test)]
mod lora_tests;
#[cfg(test)]
mod tests;
