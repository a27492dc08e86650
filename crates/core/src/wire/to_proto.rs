use retort_proto as proto;

use crate::{
    Error,
    spec::{
        Choose, CodecName, FlatSoftTargets, GgufType, Init, JobSpec, Layers, Lora, LoraBase, LoraTarget, Loss,
        Parallel, Promote, Prune, Quantiser, Schedule, Sharing, SoftTargets, TeacherMode, Weight,
    },
    state::{JobState, Split, TaskKind},
};

pub fn job_spec_to_proto(spec: &JobSpec) -> proto::JobSpec {
    proto::JobSpec {
        name: spec.name.clone(),
        seed: spec.seed,
        prompts: Some(proto::Prompts {
            uri: spec.prompts.path.clone(),
            held_out_fraction: spec.prompts.held_out_fraction,
            shard_rows: spec.prompts.shard_rows,
        }),
        teacher: Some(proto::TeacherSpec {
            model: spec.teacher.model.clone(),
            pool: spec.teacher.pool.clone(),
            mode: match spec.teacher.mode {
                TeacherMode::Generate => proto::TeacherMode::Generate,
                TeacherMode::Score => proto::TeacherMode::Score,
            } as i32,
            sampling: Some(proto::Sampling {
                temperature: spec.teacher.sampling.temperature,
                top_p: spec.teacher.sampling.top_p,
                max_new_tokens: spec.teacher.sampling.max_new_tokens,
                top_k: spec.teacher.sampling.top_k,
                min_p: spec.teacher.sampling.min_p,
                repetition_penalty: Some(spec.teacher.sampling.repetition_penalty),
                stop: spec.teacher.sampling.stop.clone(),
                completions: Some(spec.teacher.sampling.completions),
            }),
            soft_targets: Some(soft_targets_to_proto(&spec.teacher.soft_targets)),
        }),
        student: Some(proto::StudentSpec {
            pool: spec.student.pool.clone(),
            init: Some(match &spec.student.init {
                Init::Prune(prune) => proto::student_spec::Init::Prune(prune_to_proto(prune)),
                Init::Checkpoint { model } => proto::student_spec::Init::Checkpoint(model.clone()),
                Init::Config {
                    hidden_size,
                    intermediate_size,
                    num_hidden_layers,
                    num_attention_heads,
                    num_key_value_heads,
                } => proto::student_spec::Init::Config(proto::ConfigInit {
                    hidden_size: *hidden_size,
                    intermediate_size: *intermediate_size,
                    num_hidden_layers: *num_hidden_layers,
                    num_attention_heads: *num_attention_heads,
                    num_key_value_heads: *num_key_value_heads,
                }),
            }),
            lora: spec.student.lora.as_ref().map(lora_to_proto),
        }),
        train: Some(proto::TrainSpec {
            passes: spec.train.passes,
            batch_rows: spec.train.batch_rows,
            micro_batch_tokens: spec.train.micro_batch_tokens,
            learning_rate: spec.train.learning_rate,
            warmup_ratio: spec.train.warmup_ratio,
            weight_decay: spec.train.weight_decay,
            adam_beta1: Some(spec.train.adam_beta1),
            adam_beta2: Some(spec.train.adam_beta2),
            adam_epsilon: Some(spec.train.adam_epsilon),
            adam_embedding_epsilon: Some(spec.train.adam_embedding_epsilon),
            clip_norm: spec.train.clip_norm,
            checkpoint_steps: spec.train.checkpoint_steps,
            freeze_embeddings: spec.train.freeze_embeddings,
            loss: Some(loss_to_proto(&spec.train.loss)),
            schedule: match spec.train.schedule {
                Schedule::Cosine => proto::LearningRateSchedule::Cosine,
                Schedule::Linear => proto::LearningRateSchedule::Linear,
                Schedule::Constant => proto::LearningRateSchedule::Constant,
                Schedule::Wsd => proto::LearningRateSchedule::Wsd,
            }
            .into(),
            decay_ratio: Some(spec.train.decay_ratio),
            activation_checkpointing: spec.train.activation_checkpointing,
            guard: Some(proto::GuardSpec {
                norm_ratio: spec.train.guard.norm_ratio,
                loss_ratio: spec.train.guard.loss_ratio,
            }),
            ema_decay: spec.train.ema_decay,
            parallel: spec.train.parallel.map(parallel_to_proto),
            keep: Some(proto::KeepSpec { last: Some(spec.train.keep.last), best: Some(spec.train.keep.best) }),
            promote: match spec.train.promote {
                Promote::Last => proto::Promote::Last,
                Promote::Best => proto::Promote::Best,
            }
            .into(),
        }),
        gates: Some(proto::GateSpec {
            max_kl: spec.gates.max_kl,
            max_kl_ratio: spec.gates.max_kl_ratio,
            min_top1_agreement: spec.gates.min_top1_agreement,
            max_perplexity_ratio: spec.gates.max_perplexity_ratio,
            max_calibration_error: spec.gates.max_calibration_error,
        }),
        export: Some(proto::ExportSpec {
            gguf: spec.export.gguf.iter().map(|kind| gguf_to_proto(*kind).into()).collect(),
        }),
    }
}

fn gguf_to_proto(kind: GgufType) -> proto::GgufType {
    match kind {
        GgufType::F32 => proto::GgufType::F32,
        GgufType::F16 => proto::GgufType::F16,
        GgufType::Bf16 => proto::GgufType::Bf16,
        GgufType::Q8_0 => proto::GgufType::Q80,
    }
}

fn parallel_to_proto(parallel: Parallel) -> proto::ParallelSpec {
    let Parallel { workers, mode, inner_steps, outer_learning_rate, outer_momentum } = parallel;
    proto::ParallelSpec {
        workers,
        mode: match mode {
            Sharing::Synchronous => proto::Sharing::Synchronous,
            Sharing::Diloco => proto::Sharing::Diloco,
        }
        .into(),
        inner_steps: Some(inner_steps),
        outer_learning_rate: Some(outer_learning_rate),
        outer_momentum: Some(outer_momentum),
    }
}

fn prune_to_proto(prune: &Prune) -> proto::PruneInit {
    let (layers, these_layers) = match &prune.layers {
        None => (0, vec![]),
        Some(Layers::Count(layers)) => (*layers, vec![]),
        Some(Layers::These(layers)) => (0, layers.clone()),
    };
    let choose = match prune.choose {
        Choose::Ends => proto::ChooseLayers::Ends,
        Choose::Even => proto::ChooseLayers::Even,
        Choose::BlockInfluence => proto::ChooseLayers::BlockInfluence,
    };
    proto::PruneInit {
        layers,
        these_layers,
        choose: choose.into(),
        hidden_size: prune.hidden_size,
        intermediate_size: prune.intermediate_size,
        num_attention_heads: prune.num_attention_heads,
        num_key_value_heads: prune.num_key_value_heads,
        calibration_rows: Some(prune.calibration_rows),
    }
}

fn lora_to_proto(lora: &Lora) -> proto::LoraSpec {
    let target = |target: &LoraTarget| match target {
        LoraTarget::QProj => proto::LoraTarget::QProj,
        LoraTarget::KProj => proto::LoraTarget::KProj,
        LoraTarget::VProj => proto::LoraTarget::VProj,
        LoraTarget::OProj => proto::LoraTarget::OProj,
        LoraTarget::GateProj => proto::LoraTarget::GateProj,
        LoraTarget::UpProj => proto::LoraTarget::UpProj,
        LoraTarget::DownProj => proto::LoraTarget::DownProj,
    };
    proto::LoraSpec {
        rank: Some(lora.rank),
        alpha: Some(lora.alpha),
        targets: lora.targets.iter().map(|of| target(of).into()).collect(),
        dropout: lora.dropout,
        base: match lora.base {
            LoraBase::Model => proto::LoraBase::Model,
            LoraBase::Int8 => proto::LoraBase::Int8,
        }
        .into(),
    }
}

fn loss_to_proto(loss: &Loss) -> proto::LossSpec {
    let weight = |weight: Weight| {
        let Weight { from, to, until } = weight;
        (!weight.is_zero()).then_some(proto::LossWeight { from, to, until })
    };
    proto::LossSpec {
        forward_kl: weight(loss.forward_kl),
        reverse_kl: weight(loss.reverse_kl),
        jensen_shannon: weight(loss.jensen_shannon),
        skew_forward_kl: weight(loss.skew_forward_kl),
        skew_reverse_kl: weight(loss.skew_reverse_kl),
        total_variation: weight(loss.total_variation),
        logit_mse: weight(loss.logit_mse),
        label_ce: weight(loss.label_ce),
        jensen_shannon_beta: Some(loss.jensen_shannon_beta),
        skew_alpha: Some(loss.skew_alpha),
        temperature: Some(loss.temperature),
    }
}

pub fn soft_targets_to_proto(soft_targets: &SoftTargets) -> proto::SoftTargetSpec {
    let flat = FlatSoftTargets::from(soft_targets.clone());
    let codec = match flat.codec {
        None => proto::Codec::Unspecified,
        Some(CodecName::Full) => proto::Codec::Full,
        Some(CodecName::TopK) => proto::Codec::TopK,
        Some(CodecName::TopKTail) => proto::Codec::TopKTail,
        Some(CodecName::HeadDraws) => proto::Codec::HeadDraws,
        Some(CodecName::Threshold) => proto::Codec::Threshold,
        Some(CodecName::Random) => proto::Codec::Random,
    };
    proto::SoftTargetSpec {
        head: flat.head,
        draws: flat.draws,
        codec: codec as i32,
        threshold: flat.threshold,
        quantiser: match flat.quantiser {
            Quantiser::U8 => proto::Quantiser::U8,
            Quantiser::F32 => proto::Quantiser::F32,
        } as i32,
        temperatures: flat.temperatures,
    }
}

pub fn job_state_to_proto(state: JobState) -> proto::JobState {
    match state {
        JobState::Queued => proto::JobState::Queued,
        JobState::Running => proto::JobState::Running,
        JobState::Succeeded => proto::JobState::Succeeded,
        JobState::Rejected => proto::JobState::Rejected,
        JobState::Failed => proto::JobState::Failed,
        JobState::Cancelled => proto::JobState::Cancelled,
    }
}

pub fn split_to_proto(split: Split) -> proto::Split {
    match split {
        Split::Train => proto::Split::Train,
        Split::HeldOut => proto::Split::HeldOut,
    }
}

pub fn task_kind_to_proto(kind: TaskKind) -> proto::TaskKind {
    match kind {
        TaskKind::Shard => proto::TaskKind::Shard,
        TaskKind::Train => proto::TaskKind::Train,
        TaskKind::Replica => proto::TaskKind::Replica,
        TaskKind::Evaluate => proto::TaskKind::Evaluate,
    }
}

pub fn error_to_proto(error: &Error) -> proto::ErrorDetail {
    proto::ErrorDetail { code: error.code.as_str().to_owned(), message: error.chain() }
}

/// Milliseconds since the Unix epoch.
pub fn timestamp_to_proto(ms: i64) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: ms.div_euclid(1000), nanos: (ms.rem_euclid(1000) * 1_000_000) as i32 }
}

pub fn duration_to_proto(duration: std::time::Duration) -> prost_types::Duration {
    prost_types::Duration { seconds: duration.as_secs() as i64, nanos: duration.subsec_nanos() as i32 }
}
