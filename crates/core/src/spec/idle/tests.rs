use super::*;
use crate::{Code, spec::parse_yaml};

const GOOD: &str = "\
name: support
prompts:
  path: prompts.jsonl
teacher:
  model: teachers/small
student:
  init:
    prune:
      layers: 10
";

fn check(yaml: &str, message: &str) {
    let error = parse_yaml("job.yaml", yaml).expect_err("a key does nothing");
    assert_eq!((error.code, error.message.as_str()), (Code::SpecInvalid, message));
}

#[test]
fn keys_that_would_do_nothing_are_refused() {
    let frozen = GOOD.replace("student:", "student:\n  lora: {rank: 4}");
    check(
        &format!("{frozen}train: {{freeze_embeddings: true}}\n"),
        "job.yaml: train.freeze_embeddings does nothing with student.lora, whose adapters alone train; leave one of them out",
    );
    parse_yaml("job.yaml", &format!("{frozen}train: {{freeze_embeddings: false}}\n")).unwrap();
    let parallel = |keys: &str| format!("{GOOD}train:\n  parallel: {{workers: 2, {keys}}}\n");
    for (keys, key, column) in [
        ("inner_steps: 50", "inner_steps", 39),
        ("mode: synchronous, inner_steps: 7", "inner_steps", 58),
        ("outer_learning_rate: 0.5", "outer_learning_rate", 47),
        ("outer_momentum: 0.9", "outer_momentum", 42),
    ] {
        check(
            &parallel(keys),
            &format!(
                "job.yaml line 11 column {column}: train.parallel.{key} does nothing with train.parallel.mode synchronous; \
                 say mode: diloco, or leave the key out"
            ),
        );
        parse_yaml("job.yaml", &parallel(&format!("{}, mode: diloco", keys.replace("mode: synchronous, ", ""))))
            .unwrap();
    }
    // From a client that is no YAML: what it sends of the other mode may only be the default.
    let mut spec = parse_yaml("job.yaml", &parallel("mode: synchronous")).unwrap();
    spec.check_idle().unwrap();
    spec.train.parallel.as_mut().unwrap().inner_steps = 7;
    spec.validate().unwrap();
    assert!(spec.check_idle().unwrap_err().message.starts_with("train.parallel.inner_steps does nothing"));
}

#[test]
fn values_that_nothing_reads_are_refused() {
    let train = |keys: &str| format!("{GOOD}train: {{{keys}}}\n");
    for (idle, read, message) in [
        (
            "decay_ratio: 0.5",
            "decay_ratio: 0.5, schedule: wsd",
            "decay_ratio 0.5 does nothing without train.schedule wsd; say schedule: wsd, or leave the key out",
        ),
        (
            "adam_embedding_epsilon: 0.5, freeze_embeddings: true",
            "adam_embedding_epsilon: 0.5",
            "adam_embedding_epsilon 0.5 does nothing where the embeddings stay as they are, as with \
             train.freeze_embeddings and with student.lora; leave the key out",
        ),
        (
            "decay_ratio: 0, schedule: wsd",
            "decay_ratio: 0.2, schedule: wsd",
            "decay_ratio 0 never lets the learning rate of train.schedule wsd fall; say schedule: constant, or give a share \
             of the steps",
        ),
        (
            "loss: {forward_kl: 1, jensen_shannon_beta: 0.9}",
            "loss: {jensen_shannon: 1, jensen_shannon_beta: 0.9}",
            "loss.jensen_shannon_beta 0.9 does nothing without jensen_shannon; give that a weight, or leave the key out",
        ),
        (
            "loss: {forward_kl: 1, skew_alpha: 0.2}",
            "loss: {skew_reverse_kl: 1, skew_alpha: 0.2}",
            "loss.skew_alpha 0.2 does nothing without skew_forward_kl or skew_reverse_kl; give one of them a weight, or \
             leave the key out",
        ),
        (
            "parallel: {workers: 1, mode: diloco, inner_steps: 7}",
            "parallel: {workers: 2, mode: diloco, inner_steps: 7}",
            "parallel.mode diloco does nothing with train.parallel.workers 1, who has nobody to exchange with; raise \
             workers, or leave parallel out",
        ),
        (
            "promote: best, checkpoint_steps: 0",
            "promote: best, checkpoint_steps: 1",
            "promote best does nothing with train.checkpoint_steps 0, whose one checkpoint is the last; raise \
             checkpoint_steps, or leave promote out",
        ),
        (
            "loss: {label_ce: 1, temperature: 2}",
            "loss: {label_ce: 1, temperature: 1}",
            "loss.temperature 2 does nothing with label_ce alone, which is at temperature 1; give another term a weight, \
             or leave the key out",
        ),
        (
            "loss: {forward_kl: 1e-300}",
            "loss: {forward_kl: 1e-6}",
            "loss.forward_kl is 1e-300, too small to train by; give it 0, or at least 0.000001",
        ),
        (
            "loss: {forward_kl: 1, label_ce: {from: 9e-7, to: 1}}",
            "loss: {forward_kl: 1, label_ce: {from: 0, to: 1}}",
            "loss.label_ce.from is 9e-7, too small to train by; give it 0, or at least 0.000001",
        ),
        (
            "loss: {forward_kl: {from: 1, to: 1e-30, until: 0.5}}",
            "loss: {forward_kl: {from: 1, to: 1e-6, until: 0.5}}",
            "loss.forward_kl.to is 1e-30, too small to train by; give it 0, or at least 0.000001",
        ),
        (
            "loss: {forward_kl: {from: 1, to: 0, until: 0.5}}",
            "loss: {forward_kl: {from: 1, to: 0.1, until: 0.5}}",
            "loss weighs nothing at the last steps; give at least one term a weight there",
        ),
    ] {
        check(&train(idle), &format!("job.yaml: train.{message}"));
        parse_yaml("job.yaml", &train(read)).unwrap();
    }
    // Said as it would be anyway, a value is no slip.
    let plain = parse_yaml("job.yaml", GOOD).unwrap();
    let said = "decay_ratio: 0.2, loss: {forward_kl: 1, jensen_shannon_beta: 0.5, skew_alpha: 0.1}";
    assert_eq!(parse_yaml("job.yaml", &train(said)).unwrap(), plain);
}

#[test]
fn rows_that_nothing_is_measured_on_are_refused() {
    let prune = |keys: &str| GOOD.replace("prune:\n      layers: 10", &format!("prune: {{{keys}}}"));
    for keys in ["layers: 10", "layers: [0, 9]", "layers: 10, choose: even"] {
        check(
            &prune(&format!("{keys}, calibration_rows: 64")),
            "job.yaml: student.init.prune.calibration_rows 64 does nothing where importance chooses nothing; say choose: \
             block_influence, give a size such as intermediate_size, or leave the key out",
        );
        parse_yaml("job.yaml", &prune(&format!("{keys}, calibration_rows: 32"))).unwrap();
    }
    for keys in ["layers: 10, choose: block_influence", "intermediate_size: 64"] {
        parse_yaml("job.yaml", &prune(&format!("{keys}, calibration_rows: 64"))).unwrap();
    }
}

#[test]
fn random_weights_that_would_stay_are_refused() {
    let sizes =
        "hidden_size: 96, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 3, num_key_value_heads: 1";
    let random = GOOD.replace("    prune:\n      layers: 10\n", &format!("    config: {{{sizes}}}\n"));
    let spec = parse_yaml("job.yaml", &random).unwrap();
    check(
        &format!("{random}  lora: {{}}\n"),
        "job.yaml: student.lora would keep the random embeddings and head of student.init.config; start from prune or \
         checkpoint, or leave lora out",
    );
    // One that was admitted before goes on.
    let mut admitted = spec;
    admitted.student.lora = Some(Default::default());
    admitted.validate().unwrap();
}

fn read(json: &str) -> Loss {
    serde_json::from_str(json).unwrap()
}

#[test]
fn a_loss_that_weighs_nothing_is_named_with_when() {
    for (json, expected) in [
        (r#"{"forward_kl": 0}"#, "weighs nothing; "),
        (r#"{"forward_kl": {"from": 1, "to": 0, "until": 0}}"#, "weighs nothing at the first step; "),
        (r#"{"forward_kl": {"from": 0, "to": 1}}"#, "weighs nothing at the first step; "),
        (r#"{"forward_kl": {"from": 1, "to": 0, "until": 0.9}}"#, "weighs nothing at the last steps; "),
        (
            r#"{"forward_kl": {"from": 1, "to": 0, "until": 0.5}, "label_ce": {"from": 1, "to": 0, "until": 0.9}}"#,
            "weighs nothing at the last steps; ",
        ),
    ] {
        read(json).check().unwrap();
        let message = read(json).check_idle().unwrap_err().message;
        assert!(message.contains(expected), "{json}: {message}");
    }
}

/// What is refused is what some step of a run finds without weight, and nothing else.
#[test]
fn a_loss_that_passes_weighs_something_at_every_step() {
    let mut weights = Vec::new();
    for from in [0.0, 0.5] {
        for to in [0.0, 0.5] {
            weights.extend([0.0, 0.25, 0.9, 1.0].map(|until| Weight { from, to, until }));
        }
    }
    for &forward_kl in &weights {
        for &label_ce in &weights {
            let loss = Loss { forward_kl, label_ce, ..Loss::default() };
            let empty =
                (1..60).any(|steps| (0..steps).any(|at| loss.terms().iter().all(|(_, w)| w.at(at, steps) == 0.0)));
            assert_eq!(loss.check_idle().is_err(), empty, "{loss:?}");
        }
    }
}
