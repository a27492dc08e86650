//! The edge between the domain's types and `retort.v1`: one module a direction, and one mapping
//! of errors to gRPC.

mod from_proto;
mod pruning;
mod status;
mod to_proto;

pub use from_proto::{
    error_from_proto, job_spec_from_proto, job_state_from_proto, soft_targets_from_proto, split_from_proto,
};
pub use pruning::{pruning_from_proto, pruning_to_proto};
pub use status::{from_status, to_status};
pub use to_proto::{
    duration_to_proto, error_to_proto, job_spec_to_proto, job_state_to_proto, soft_targets_to_proto, split_to_proto,
    task_kind_to_proto, timestamp_to_proto,
};

#[cfg(test)]
mod tests {
    use retort_proto as proto;

    use super::*;
    use crate::spec::{GgufType, JobSpec, Loss, parse_yaml};

    const SPEC: &str = "
name: all
prompts: {path: /p.jsonl}
teacher:
  model: /t
  soft_targets: {codec: head_draws, head: 40, temperatures: [2]}
student:
  init: {prune: {layers: 3}}
  lora: {rank: 4, alpha: 8, targets: [v_proj, down_proj], dropout: 0.25, base: int8}
train:
  warmup_ratio: 0.1
  schedule: wsd
  decay_ratio: 0.3
  adam_beta1: 0.8
  adam_beta2: 0.99
  adam_epsilon: 0.001
  micro_batch_tokens: 2048
  activation_checkpointing: true
  guard: {norm_ratio: 7}
  ema_decay: 0.99
  parallel: {workers: 3}
  keep: {last: 5}
  promote: best
  loss:
    forward_kl: {from: 1, to: 0.5, until: 0.25}
    reverse_kl: 0.1
    jensen_shannon: 0.2
    skew_forward_kl: 0.3
    skew_reverse_kl: 0.4
    total_variation: 0.5
    logit_mse: 0.6
    label_ce: 0.7
    jensen_shannon_beta: 0.9
    skew_alpha: 0.2
    temperature: 2
export: {gguf: [q8_0, f16]}
";

    fn spec() -> JobSpec {
        let mut spec = parse_yaml("job.yaml", SPEC).unwrap();
        // Beside LoRA no file may say it.
        spec.train.adam_embedding_epsilon = 0.002;
        spec
    }

    #[test]
    fn a_spec_survives_the_wire_and_json() {
        let spec = spec();
        assert_eq!(job_spec_from_proto(job_spec_to_proto(&spec)).unwrap(), spec);
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<JobSpec>(&json).unwrap(), spec);
        assert_eq!(spec.loss_temperature(), Some((0, 2.0)));
        let exchanging = SPEC
            .replace("ema_decay: 0.99", "ema_decay: 0")
            .replace("workers: 3", "workers: 3, mode: diloco, inner_steps: 20, outer_learning_rate: 0.5");
        let spec = parse_yaml("job.yaml", &exchanging).unwrap();
        assert!(spec.train.diloco().is_some());
        assert_eq!(job_spec_from_proto(job_spec_to_proto(&spec)).unwrap(), spec);
    }

    #[test]
    fn an_export_that_is_not_asked_for_leaves_no_trace_in_the_json() {
        let mut spec = spec();
        assert_eq!(spec.export.gguf, [GgufType::Q8_0, GgufType::F16]);
        assert!(serde_json::to_string(&spec).unwrap().contains(r#""export":{"gguf":["q8_0","f16"]}"#));
        spec.export = Default::default();
        assert!(!serde_json::to_string(&spec).unwrap().contains("export"));
        let mut sent = job_spec_to_proto(&spec);
        sent.export = None;
        assert_eq!(job_spec_from_proto(sent.clone()).unwrap(), spec);
        sent.export = Some(proto::ExportSpec { gguf: vec![9] });
        assert!(job_spec_from_proto(sent).unwrap_err().message.contains("export.gguf 9"));
        let twice = SPEC.replace("[q8_0, f16]", "[f16, f16]");
        assert_eq!(parse_yaml("job.yaml", &twice).unwrap_err().message, "job.yaml: export.gguf names f16 twice");
        let unknown = SPEC.replace("[q8_0, f16]", "[q4_0]");
        let message = parse_yaml("job.yaml", &unknown).unwrap_err().message;
        assert!(message.contains("\"q8_0\"?"), "{message}");
    }

    #[test]
    fn what_an_older_client_leaves_out_has_its_default() {
        let mut sent = job_spec_to_proto(&spec());
        let train = sent.train.as_mut().unwrap();
        (train.loss, train.schedule, train.decay_ratio, train.guard) = (None, 0, None, None);
        (train.keep, train.promote) = (None, 0);
        (train.adam_beta1, train.adam_beta2) = (None, None);
        (train.adam_epsilon, train.adam_embedding_epsilon) = (None, None);
        let train = job_spec_from_proto(sent.clone()).unwrap().train;
        assert_eq!((train.loss, train.decay_ratio, train.guard), (Default::default(), 0.2, Default::default()));
        assert_eq!((train.keep, train.promote), (Default::default(), Default::default()));
        assert_eq!((train.adam_beta1, train.adam_beta2), (0.9, 0.95));
        assert_eq!((train.adam_epsilon, train.adam_embedding_epsilon), (1e-8, 1e-6));
        let mut unknown = sent.clone();
        unknown.train.as_mut().unwrap().promote = 99;
        assert!(job_spec_from_proto(unknown).unwrap_err().message.contains("train.promote 99"));
        sent.student.as_mut().unwrap().lora = Some(proto::LoraSpec::default());
        assert_eq!(job_spec_from_proto(sent.clone()).unwrap().student.lora, Some(Default::default()));
        sent.student.as_mut().unwrap().lora = Some(proto::LoraSpec { targets: vec![8], ..Default::default() });
        assert!(job_spec_from_proto(sent.clone()).unwrap_err().message.contains("student.lora.targets 8"));
        sent.student.as_mut().unwrap().lora = None;
        sent.train.as_mut().unwrap().schedule = 99;
        assert!(job_spec_from_proto(sent).unwrap_err().message.contains("train.schedule 99"));
    }

    /// A worker claims jobs that an older version admitted.
    #[test]
    fn keys_that_do_nothing_pass_the_wire() {
        let mut idle = spec();
        idle.train.freeze_embeddings = true;
        idle.train.schedule = Default::default();
        idle.train.loss.jensen_shannon = Default::default();
        idle.train.parallel.as_mut().unwrap().inner_steps = 7;
        assert_eq!(job_spec_from_proto(job_spec_to_proto(&idle)).unwrap(), idle);
        idle.train.loss = Loss { forward_kl: Default::default(), ..Loss::default() };
        assert_eq!(job_spec_from_proto(job_spec_to_proto(&idle)).unwrap(), idle);
        assert!(idle.check_idle().is_err());
    }

    #[test]
    fn a_loss_that_the_soft_targets_cannot_serve_is_refused() {
        let message = |from: &str, to: &str| {
            assert!(SPEC.contains(from));
            parse_yaml("job.yaml", &SPEC.replace(from, to)).unwrap_err().message
        };
        let no_sum = message("temperatures: [2]", "temperatures: [3]");
        assert!(no_sum.contains("add it to teacher.soft_targets.temperatures, which is [3.0]"), "{no_sum}");
        let no_head = message("codec: head_draws, head: 40", "codec: random");
        assert!(no_head.contains("codec random keeps none"), "{no_head}");
        let unknown = message("label_ce: 0.7", "lable_ce: 0.7");
        assert!(unknown.contains("label_ce") && unknown.contains("line 32"), "{unknown}");
        let nothing = message("reverse_kl: 0.1", "reverse_kl: much");
        assert!(nothing.contains("line 26"), "{nothing}");
    }

    #[test]
    fn a_proto_without_a_section_is_refused_or_filled() {
        let sent = proto::JobSpec { train: None, ..job_spec_to_proto(&spec()) };
        assert_eq!(job_spec_from_proto(sent).unwrap().train, Default::default());
    }
}
