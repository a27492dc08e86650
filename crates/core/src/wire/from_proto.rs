use retort_proto as proto;

use crate::{
    Code, Error, Result,
    spec::{
        Choose, CodecName, Export, FlatSoftTargets, Gates, GgufType, Guard, Init, JobSpec, Keep, Layers, Lora,
        LoraBase, LoraTarget, Loss, Parallel, Promote, Prompts, Prune, Quantiser, Sampling, Schedule, Sharing,
        SoftTargets, Student, Teacher, TeacherMode, Train, Weight,
    },
    state::{JobState, Split},
};

/// Reads and validates what is kept of each distribution.
pub fn soft_targets_from_proto(soft_targets: proto::SoftTargetSpec) -> Result<SoftTargets> {
    let unknown = |field: &str, value: i32| {
        Error::new(Code::SpecInvalid, format!("teacher.soft_targets.{field} {value} is not known"))
    };
    let codec = match proto::Codec::try_from(soft_targets.codec) {
        Ok(proto::Codec::Unspecified) => None,
        Ok(proto::Codec::Full) => Some(CodecName::Full),
        Ok(proto::Codec::TopK) => Some(CodecName::TopK),
        Ok(proto::Codec::TopKTail) => Some(CodecName::TopKTail),
        Ok(proto::Codec::HeadDraws) => Some(CodecName::HeadDraws),
        Ok(proto::Codec::Threshold) => Some(CodecName::Threshold),
        Ok(proto::Codec::Random) => Some(CodecName::Random),
        Err(_) => return Err(unknown("codec", soft_targets.codec)),
    };
    let quantiser = match proto::Quantiser::try_from(soft_targets.quantiser) {
        Ok(proto::Quantiser::Unspecified | proto::Quantiser::U8) => Quantiser::U8,
        Ok(proto::Quantiser::F32) => Quantiser::F32,
        Err(_) => return Err(unknown("quantiser", soft_targets.quantiser)),
    };
    let proto::SoftTargetSpec { head, draws, threshold, temperatures, .. } = soft_targets;
    FlatSoftTargets { codec, head, draws, threshold, quantiser, temperatures }
        .try_into()
        .map_err(|message: String| Error::new(Code::SpecInvalid, message))
}

/// Reads and validates a spec from the wire. Keys that do nothing pass: it may be of a job that runs, admitted before
/// they were refused ([`JobSpec::check_idle`]).
pub fn job_spec_from_proto(spec: proto::JobSpec) -> Result<JobSpec> {
    let prompts = required("prompts", spec.prompts)?;
    let teacher = required("teacher", spec.teacher)?;
    let student = required("student", spec.student)?;
    let sampling = teacher.sampling.map_or_else(Sampling::default, |s| Sampling {
        temperature: s.temperature,
        top_p: s.top_p,
        max_new_tokens: s.max_new_tokens,
        top_k: s.top_k,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty.unwrap_or(1.0),
        stop: s.stop,
        completions: s.completions.unwrap_or(1),
    });
    let soft_targets = teacher.soft_targets.map(soft_targets_from_proto).transpose()?.unwrap_or_default();
    let init = match required("student.init", student.init)? {
        proto::student_spec::Init::Prune(prune) => Init::Prune(prune_from_proto(prune)?),
        proto::student_spec::Init::Checkpoint(model) => Init::Checkpoint { model },
        proto::student_spec::Init::Config(config) => Init::Config {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
        },
    };
    let spec = JobSpec {
        name: spec.name,
        seed: spec.seed,
        prompts: Prompts {
            path: prompts.uri,
            held_out_fraction: prompts.held_out_fraction,
            shard_rows: prompts.shard_rows,
        },
        teacher: Teacher {
            model: teacher.model,
            pool: teacher.pool,
            mode: match proto::TeacherMode::try_from(teacher.mode) {
                Ok(proto::TeacherMode::Score) => TeacherMode::Score,
                Ok(proto::TeacherMode::Generate | proto::TeacherMode::Unspecified) => TeacherMode::Generate,
                Err(_) => {
                    return Err(Error::new(Code::SpecInvalid, format!("teacher.mode {} is not known", teacher.mode)));
                }
            },
            sampling,
            soft_targets,
        },
        student: Student { pool: student.pool, init, lora: student.lora.map(lora_from_proto).transpose()? },
        train: spec.train.map_or_else(|| Ok(Train::default()), train_from_proto)?,
        gates: spec.gates.map_or_else(Gates::default, |g| Gates {
            max_kl: g.max_kl,
            max_kl_ratio: g.max_kl_ratio,
            min_top1_agreement: g.min_top1_agreement,
            max_perplexity_ratio: g.max_perplexity_ratio,
            max_calibration_error: g.max_calibration_error,
        }),
        export: spec.export.map_or_else(|| Ok(Export::default()), export_from_proto)?,
    };
    spec.validate()?;
    Ok(spec)
}

fn prune_from_proto(prune: proto::PruneInit) -> Result<Prune> {
    let choose = match proto::ChooseLayers::try_from(prune.choose) {
        Ok(proto::ChooseLayers::Unspecified | proto::ChooseLayers::Ends) => Choose::Ends,
        Ok(proto::ChooseLayers::Even) => Choose::Even,
        Ok(proto::ChooseLayers::BlockInfluence) => Choose::BlockInfluence,
        Err(_) => {
            let message = format!("student.init.prune.choose {} is not known", prune.choose);
            return Err(Error::new(Code::SpecInvalid, message));
        }
    };
    let layers = match (prune.layers, prune.these_layers) {
        (0, these) if these.is_empty() => None,
        (0, these) => Some(Layers::These(these)),
        (layers, these) if these.is_empty() => Some(Layers::Count(layers)),
        (layers, _) => {
            let message = format!("student.init.prune has {layers} layers and a list of them; give one of the two");
            return Err(Error::new(Code::SpecInvalid, message));
        }
    };
    Ok(Prune {
        layers,
        choose,
        hidden_size: prune.hidden_size,
        intermediate_size: prune.intermediate_size,
        num_attention_heads: prune.num_attention_heads,
        num_key_value_heads: prune.num_key_value_heads,
        calibration_rows: prune.calibration_rows.unwrap_or(Prune::default().calibration_rows),
    })
}

fn lora_from_proto(lora: proto::LoraSpec) -> Result<Lora> {
    let unknown =
        |field: &str, value: i32| Error::new(Code::SpecInvalid, format!("student.lora.{field} {value} is not known"));
    let target = |&target: &i32| match proto::LoraTarget::try_from(target) {
        Ok(proto::LoraTarget::QProj) => Ok(LoraTarget::QProj),
        Ok(proto::LoraTarget::KProj) => Ok(LoraTarget::KProj),
        Ok(proto::LoraTarget::VProj) => Ok(LoraTarget::VProj),
        Ok(proto::LoraTarget::OProj) => Ok(LoraTarget::OProj),
        Ok(proto::LoraTarget::GateProj) => Ok(LoraTarget::GateProj),
        Ok(proto::LoraTarget::UpProj) => Ok(LoraTarget::UpProj),
        Ok(proto::LoraTarget::DownProj) => Ok(LoraTarget::DownProj),
        Ok(proto::LoraTarget::Unspecified) | Err(_) => Err(unknown("targets", target)),
    };
    let base = match proto::LoraBase::try_from(lora.base) {
        Ok(proto::LoraBase::Unspecified | proto::LoraBase::Model) => LoraBase::Model,
        Ok(proto::LoraBase::Int8) => LoraBase::Int8,
        Err(_) => return Err(unknown("base", lora.base)),
    };
    let default = Lora::default();
    Ok(Lora {
        rank: lora.rank.unwrap_or(default.rank),
        alpha: lora.alpha.unwrap_or(default.alpha),
        targets: match &lora.targets[..] {
            [] => default.targets,
            targets => targets.iter().map(target).collect::<Result<_>>()?,
        },
        dropout: lora.dropout,
        base,
    })
}

fn train_from_proto(train: proto::TrainSpec) -> Result<Train> {
    let schedule = match train.schedule() {
        proto::LearningRateSchedule::Unspecified if train.schedule != 0 => {
            let message = format!("train.schedule {} is not known", train.schedule);
            return Err(Error::new(Code::SpecInvalid, message));
        }
        proto::LearningRateSchedule::Unspecified | proto::LearningRateSchedule::Cosine => Schedule::Cosine,
        proto::LearningRateSchedule::Linear => Schedule::Linear,
        proto::LearningRateSchedule::Constant => Schedule::Constant,
        proto::LearningRateSchedule::Wsd => Schedule::Wsd,
    };
    let promote = match proto::Promote::try_from(train.promote) {
        Ok(proto::Promote::Unspecified | proto::Promote::Last) => Promote::Last,
        Ok(proto::Promote::Best) => Promote::Best,
        Err(_) => {
            return Err(Error::new(Code::SpecInvalid, format!("train.promote {} is not known", train.promote)));
        }
    };
    let default = Train::default();
    Ok(Train {
        passes: train.passes,
        batch_rows: train.batch_rows,
        micro_batch_tokens: train.micro_batch_tokens,
        learning_rate: train.learning_rate,
        warmup_ratio: train.warmup_ratio,
        schedule,
        decay_ratio: train.decay_ratio.unwrap_or(default.decay_ratio),
        weight_decay: train.weight_decay,
        adam_beta1: train.adam_beta1.unwrap_or(default.adam_beta1),
        adam_beta2: train.adam_beta2.unwrap_or(default.adam_beta2),
        adam_epsilon: train.adam_epsilon.unwrap_or(default.adam_epsilon),
        adam_embedding_epsilon: train.adam_embedding_epsilon.unwrap_or(default.adam_embedding_epsilon),
        clip_norm: train.clip_norm,
        loss: train.loss.map_or_else(Loss::default, loss_from_proto),
        checkpoint_steps: train.checkpoint_steps,
        freeze_embeddings: train.freeze_embeddings,
        activation_checkpointing: train.activation_checkpointing,
        guard: train.guard.map_or_else(Guard::default, |proto::GuardSpec { norm_ratio, loss_ratio }| Guard {
            norm_ratio,
            loss_ratio,
        }),
        ema_decay: train.ema_decay,
        parallel: train.parallel.map(parallel_from_proto).transpose()?,
        keep: train.keep.map_or_else(Keep::default, |proto::KeepSpec { last, best }| Keep {
            last: last.unwrap_or(Keep::default().last),
            best: best.unwrap_or(Keep::default().best),
        }),
        promote,
    })
}

fn parallel_from_proto(parallel: proto::ParallelSpec) -> Result<Parallel> {
    let mode = match parallel.mode() {
        proto::Sharing::Unspecified if parallel.mode != 0 => {
            let message = format!("train.parallel.mode {} is not known", parallel.mode);
            return Err(Error::new(Code::SpecInvalid, message));
        }
        proto::Sharing::Unspecified | proto::Sharing::Synchronous => Sharing::Synchronous,
        proto::Sharing::Diloco => Sharing::Diloco,
    };
    let default = Parallel::of(parallel.workers);
    Ok(Parallel {
        mode,
        inner_steps: parallel.inner_steps.unwrap_or(default.inner_steps),
        outer_learning_rate: parallel.outer_learning_rate.unwrap_or(default.outer_learning_rate),
        outer_momentum: parallel.outer_momentum.unwrap_or(default.outer_momentum),
        ..default
    })
}

fn export_from_proto(export: proto::ExportSpec) -> Result<Export> {
    let gguf = |number: i32| match proto::GgufType::try_from(number) {
        Ok(proto::GgufType::F32) => Ok(GgufType::F32),
        Ok(proto::GgufType::F16) => Ok(GgufType::F16),
        Ok(proto::GgufType::Bf16) => Ok(GgufType::Bf16),
        Ok(proto::GgufType::Q80) => Ok(GgufType::Q8_0),
        Ok(proto::GgufType::Unspecified) | Err(_) => {
            Err(Error::new(Code::SpecInvalid, format!("export.gguf {number} is not known")))
        }
    };
    Ok(Export { gguf: export.gguf.into_iter().map(gguf).collect::<Result<_>>()? })
}

fn loss_from_proto(loss: proto::LossSpec) -> Loss {
    let weight = |weight: Option<proto::LossWeight>| {
        weight.map_or_else(Weight::default, |proto::LossWeight { from, to, until }| Weight { from, to, until })
    };
    let default = Loss::default();
    Loss {
        forward_kl: weight(loss.forward_kl),
        reverse_kl: weight(loss.reverse_kl),
        jensen_shannon: weight(loss.jensen_shannon),
        skew_forward_kl: weight(loss.skew_forward_kl),
        skew_reverse_kl: weight(loss.skew_reverse_kl),
        total_variation: weight(loss.total_variation),
        logit_mse: weight(loss.logit_mse),
        label_ce: weight(loss.label_ce),
        jensen_shannon_beta: loss.jensen_shannon_beta.unwrap_or(default.jensen_shannon_beta),
        skew_alpha: loss.skew_alpha.unwrap_or(default.skew_alpha),
        temperature: loss.temperature.unwrap_or(default.temperature),
    }
}

/// `None` for unspecified or unknown.
pub fn job_state_from_proto(state: i32) -> Option<JobState> {
    match proto::JobState::try_from(state).ok()? {
        proto::JobState::Unspecified => None,
        proto::JobState::Queued => Some(JobState::Queued),
        proto::JobState::Running => Some(JobState::Running),
        proto::JobState::Succeeded => Some(JobState::Succeeded),
        proto::JobState::Rejected => Some(JobState::Rejected),
        proto::JobState::Failed => Some(JobState::Failed),
        proto::JobState::Cancelled => Some(JobState::Cancelled),
    }
}

/// An error that another process told; one of a code that is not known here is internal.
pub fn error_from_proto(error: proto::ErrorDetail) -> Error {
    Error::new(Code::parse(&error.code).unwrap_or(Code::Internal), error.message)
}

pub fn split_from_proto(split: i32) -> Option<Split> {
    match proto::Split::try_from(split).ok()? {
        proto::Split::Unspecified => None,
        proto::Split::Train => Some(Split::Train),
        proto::Split::HeldOut => Some(Split::HeldOut),
    }
}

fn required<T>(field: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| Error::new(Code::SpecInvalid, format!("{field} is missing")))
}
