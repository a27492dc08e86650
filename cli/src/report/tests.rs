use std::collections::HashMap;

use super::*;

fn quality(kl: f64, top1_agreement: f64, student_perplexity: f64) -> proto::Quality {
    proto::Quality {
        kl,
        top1_agreement,
        student_perplexity,
        teacher_perplexity: 2.5,
        tokens: 4321,
        calibration_error: Some(kl / 16.0),
        teacher_calibration_error: Some(0.0625),
    }
}

fn forecast() -> proto::Forecast {
    let prediction = |factor: f64, kl| proto::Prediction {
        factor,
        target_tokens: factor * 1000.0,
        kl,
        low: kl - 0.125,
        high: kl + 0.25,
    };
    proto::Forecast {
        points: 9,
        predictions: vec![prediction(2.0, 0.875), prediction(10.0, 0.625)],
        confidence: 0.8,
        ..Default::default()
    }
}

fn job() -> proto::Job {
    let report = proto::Report {
        before: Some(quality(4.25, 0.125, 6_944_413.4)),
        after: Some(quality(1.0625, 0.5, 7.25)),
        gates: vec![
            proto::GateResult { gate: "max_kl".to_owned(), limit: 1.5, value: 1.0625, passed: true },
            proto::GateResult { gate: "min_top1_agreement".to_owned(), limit: 0.6, value: 0.5, passed: false },
        ],
        samples: vec![proto::Sample {
            row_id: "refund-3".to_owned(),
            prompt: "Where is my refund?".to_owned(),
            teacher: "Refunds take five days to reach your bank, and you will hear from us by mail.".to_owned(),
            student_before: String::new(),
            student_after: "Your refund \u{1b}]0;owned\u{7}is on\nits way.".to_owned(),
        }],
        target_tokens: 34_567,
        store_bytes: 2_300_000,
        bytes_per_token: 66.54,
        teacher_tokens_per_second: 212.4,
        student_tokens_per_second: 640.2,
        processed_tokens: 103_701,
        trained_target_tokens: 34_000,
        trained_parameters: 24_300_000,
        left_out_steps: 0,
        lora_rank: 0,
        ema_decay: 0.0,
        workers: 1,
        redone: vec![proto::Redone {
            task: "0123/shard-00002".to_owned(),
            epoch: 1,
            worker: "teacher-9".to_owned(),
            reason: "lease expired".to_owned(),
        }],
        reused: 0,
        soft_targets: None,
        pruning: None,
        forecast: Some(forecast()),
        promoted: String::new(),
        artifacts: HashMap::from([
            ("shards".to_owned(), "jobs/j/shards/".to_owned()),
            ("checkpoint".to_owned(), "jobs/j/checkpoints/000040-1/".to_owned()),
        ]),
        before_by_tag: HashMap::new(),
        after_by_tag: HashMap::from([
            ("billing".to_owned(), quality(1.5, 0.4, 9.0)),
            ("greeting".to_owned(), quality(0.5, 0.75, 3.0)),
        ]),
    };
    proto::Job {
        name: "jobs/j".to_owned(),
        spec: Some(proto::JobSpec { name: "support".to_owned(), ..Default::default() }),
        state: proto::JobState::Rejected as i32,
        plan: Some(proto::Plan {
            train_rows: 200,
            held_out_rows: 40,
            student_parameters: 24_300_000,
            ..Default::default()
        }),
        report: Some(report),
        ..Default::default()
    }
}

const EXPECTED: &str = "\
support  jobs/j  REJECTED

prompts       200 for training, 40 held out
soft targets  34,567 tokens
stored in     2.3 MB, 66.5 bytes per token to train on
teacher       212 tokens/s
student       640 tokens/s, 103,701 tokens processed, 34,000 of them targets
redone        1 attempt
  shard-00002 attempt 1 on teacher-9: lease expired

held out                          before   after  teacher
KL to the teacher, nats/token     4.2500  1.0625
top-1 agreement                   12.5 %  50.0 %
perplexity                     6,944,413    7.25     2.50
calibration error                 26.6 %   6.6 %    6.2 %
KL is 25.0 % of what it was, judged on 4,321 tokens

after, by tag      KL   top-1  perplexity  teacher's  calibration  tokens
billing        1.5000  40.0 %        9.00       2.50        9.4 %   4,321
greeting       0.5000  75.0 %        3.00       2.50        3.1 %   4,321

forecast   2x the target tokens: KL 0.8750, 80 % interval 0.7500 to 1.1250
          10x the target tokens: KL 0.6250, 80 % interval 0.5000 to 0.8750

gate                 limit   value
max_kl              1.5000  1.0625  passed
min_top1_agreement  0.6000  0.5000  FAILED

sample 1 of 1: refund-3
  prompt          Where is my refund?
  teacher         Refunds take five days to reach your
                  bank, and you will hear from us by
                  mail.
  student before  (nothing)
  student after   Your refund ]0;ownedis on
                  its way.

promoted                no
exported (a candidate)  /data/exports/support
checkpoint              /data/store/jobs/j/checkpoints/000040-1/
shards                  /data/store/jobs/j/shards/
";

#[test]
fn the_report_reads_like_this() {
    let around = Surroundings {
        width: 56,
        store: Some(PathBuf::from("/data/store")),
        export: Some((PathBuf::from("/data/exports/support"), true)),
    };
    assert_eq!(render(&job(), &around), EXPECTED);
}

#[test]
fn without_a_local_store_keys_are_shown_as_keys() {
    let text = render(&job(), &Surroundings { width: 80, ..Default::default() });
    assert!(text.contains("shards      jobs/j/shards/\n"), "{text}");
    assert!(text.contains("(keys of the object store)"), "{text}");
}

#[test]
fn a_job_without_a_report_says_why() {
    let job = proto::Job {
        report: None,
        state: proto::JobState::Failed as i32,
        error: Some(proto::ErrorDetail {
            code: "loss-not-finite".to_owned(),
            message: "loss is NaN at step 3".to_owned(),
        }),
        ..job()
    };
    let text = render(&job, &Surroundings::default());
    assert_eq!(text, "support  jobs/j  FAILED\nloss-not-finite: loss is NaN at step 3\n");
}

#[test]
fn figures_that_are_no_numbers_do_not_break_the_table() {
    let mut job = job();
    let report = job.report.as_mut().unwrap();
    report.after = Some(quality(f64::NAN, f64::INFINITY, f64::NAN));
    report.bytes_per_token = f64::NAN;
    let text = render(&job, &Surroundings::default());
    let line: Vec<&str> = text.lines().filter(|line| line.starts_with("top-1 agreement")).collect();
    assert_eq!(line, ["top-1 agreement                   12.5 %      -"], "{text}");
}

#[test]
fn perplexities_too_large_to_read_are_in_scientific_form() {
    let shown = |before: f64, after: f64| {
        let mut job = job();
        let report = job.report.as_mut().unwrap();
        (report.before, report.after) = (Some(quality(4.25, 0.125, before)), Some(quality(1.0625, 0.5, after)));
        let text = render(&job, &Surroundings::default());
        let line = text.lines().find(|line| line.starts_with("perplexity")).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(shown(2f64.powi(64), 1e9), ["1.84e19", "1.00e9", "2.50"]);
    assert_eq!(shown(999_999_998.6, 10_000.0), ["999,999,999", "10,000", "2.50"]);
}

#[test]
fn what_was_reused_and_what_storing_cost_is_said_when_known() {
    let mut job = job();
    let report = job.report.as_mut().unwrap();
    report.reused = 3;
    report.teacher_tokens_per_second = 0.0;
    let stored = proto::Fidelity { head_mass: 0.9, mean_abs_error: 0.01, argmax_agreement: 0.998, kl: 0.0123 };
    report.soft_targets = Some(proto::SoftTargetReport { train: Some(stored), held_out: None });
    let plan = job.plan.as_mut().unwrap();
    (plan.train_shards, plan.held_out_shards) = (4, 1);
    let text = render(&job, &Surroundings { width: 60, ..Default::default() });
    assert!(text.contains("rounding      KL 0.0123 nats/token over what is kept, top-1 kept at 99.8 %\n"), "{text}");
    assert!(text.contains("reused        3 of 5 shards, computed for other jobs\n"), "{text}");
    assert!(!text.contains("0 tokens/s\n"), "{text}");
}

#[test]
fn how_it_was_trained_is_said_where_it_is_not_the_plain_way() {
    let mut job = job();
    let parallel = proto::ParallelSpec { workers: 4, ..Default::default() };
    let train = proto::TrainSpec { parallel: Some(parallel), ..Default::default() };
    job.spec.as_mut().unwrap().train = Some(train);
    let report = job.report.as_mut().unwrap();
    (report.trained_parameters, report.lora_rank, report.ema_decay, report.workers) = (700_000, 16, 0.99, 3);
    report.left_out_steps = 2;
    let before = report.before.as_ref().unwrap().kl;
    report.after.as_mut().unwrap().kl = before + 1.0;
    let text = render(&job, &Surroundings::default());
    for line in [
        "adapters      LoRA, rank 16: 700,000 of 24,300,000 parameters trained\n",
        "averaged      the weights judged are a running average, decay 0.99\n",
        "workers       3 trained together, of up to 4\n",
        "left out      2 steps whose gradient or loss leapt up (train.guard)\n",
        "\nThe student is worse than before training: a lower train.learning_rate may help.\n",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    let json = json::report(job.report.as_ref().unwrap());
    assert_eq!((&json["lora_rank"], &json["trained_parameters"]), (&16.into(), &700_000.into()));
    assert_eq!((&json["ema_decay"], &json["workers"]), (&0.99.into(), &3.into()));
    assert_eq!((&json["processed_tokens"], &json["trained_target_tokens"]), (&103_701.into(), &34_000.into()));
    // Embeddings that stayed as they were.
    job.report.as_mut().unwrap().lora_rank = 0;
    let text = render(&job, &Surroundings::default());
    assert!(text.contains("trained       700,000 of 24,300,000 parameters\n"), "{text}");
    // What an older worker does not say.
    let report = job.report.as_mut().unwrap();
    (report.trained_parameters, report.trained_target_tokens, report.workers, report.ema_decay) = (0, 0, 0, 0.0);
    let text = render(&job, &Surroundings::default());
    assert!(text.contains("103,701 tokens processed\n") && !text.contains("workers"), "{text}");
    let json = json::report(job.report.as_ref().unwrap());
    assert!(
        ["trained_target_tokens", "trained_parameters", "lora_rank", "workers"].iter().all(|key| json[key].is_null())
    );
}

#[test]
fn what_was_pruned_is_said_in_two_lines() {
    let mut job = job();
    let axis = |kept, of, share| Some(proto::PrunedAxis { kept, of, share });
    let layer = |layer| proto::PrunedLayer { layer, ..Default::default() };
    let report = job.report.as_mut().unwrap();
    report.pruning = Some(proto::Pruning {
        layers: [0, 1, 2, 5, 28, 29].map(layer).to_vec(),
        depth: axis(6, 30, Some(0.5)),
        hidden: axis(576, 576, None),
        intermediate: axis(1024, 1536, Some(0.875)),
        attention_heads: axis(6, 9, Some(0.75)),
        key_value_heads: axis(3, 3, None),
        calibration_rows: 32,
        calibration_tokens: 4000,
    });
    let text = render(&job, &Surroundings::default());
    assert!(text.contains("pruned        layers 0-2, 5, 28-29 of 30, 50.0 % of their influence\n"), "{text}");
    let width =
        "1,024 of 1,536 intermediate channels (87.5 %), 6 of 9 attention heads (75.0 %); of importance on 32 rows\n";
    assert!(text.contains(width), "{text}");
    let json = json::report(job.report.as_ref().unwrap());
    assert_eq!((&json["pruning"]["depth"]["kept"], &json["pruning"]["layers"][3]["layer"]), (&6.into(), &5.into()));
}

#[test]
fn a_better_checkpoint_is_named() {
    let point = |step, kl, tokens| proto::CurvePoint { step, kl, tokens, ..Default::default() };
    let shown = |curve: Vec<proto::CurvePoint>, promote: proto::Promote| {
        let mut job = job();
        job.report.as_mut().unwrap().forecast = Some(proto::Forecast { curve, ..forecast() });
        job.spec.as_mut().unwrap().train = Some(proto::TrainSpec { promote: promote.into(), ..Default::default() });
        render(&job, &Surroundings::default())
    };
    let said = "At step 20 its KL was lower, 1.0000: train.promote best takes that checkpoint.\n";
    // That of step 10 was judged on fewer tokens.
    let curve = vec![point(10, 0.5, 50), point(20, 1.0, 100), point(30, 1.0625, 100)];
    assert!(shown(curve.clone(), proto::Promote::Last).contains(said));
    assert!(!shown(curve, proto::Promote::Best).contains("train.promote"));
    let before = vec![point(0, 0.5, 100), point(30, 1.0625, 100)];
    assert!(!shown(before, proto::Promote::Last).contains("train.promote"));
    let close = vec![point(20, 1.0, 100), point(30, 1.005, 100)];
    assert!(!shown(close, proto::Promote::Last).contains("train.promote"));
    assert!(!shown(Vec::new(), proto::Promote::Last).contains("train.promote"));
}

#[test]
fn a_forecast_says_what_it_is_worth() {
    let shown = |forecast: proto::Forecast| {
        let mut job = job();
        job.report.as_mut().unwrap().forecast = Some(forecast);
        render(&job, &Surroundings::default())
    };
    let text = shown(proto::Forecast { decaying: true, ..forecast() });
    assert!(text.contains("interval 0.5000 to 0.8750; biased, the learning rate fell\n"), "{text}");
    let text = shown(proto::Forecast { none: "the curve is flat".to_owned(), ..Default::default() });
    assert!(text.contains("\nno forecast: the curve is flat\n"), "{text}");
}

#[test]
fn a_report_of_an_older_worker_has_no_calibration() {
    let mut job = job();
    let report = job.report.as_mut().unwrap();
    report.forecast = None;
    let tags = report.after_by_tag.values_mut();
    for quality in [&mut report.before, &mut report.after].into_iter().flatten().chain(tags) {
        (quality.calibration_error, quality.teacher_calibration_error) = (None, None);
    }
    let text = render(&job, &Surroundings::default());
    assert!(!text.contains("calibration error") && !text.contains("forecast"), "{text}");
}

#[test]
fn a_gate_whose_value_is_no_number_says_so() {
    let gate = |value: f64| proto::GateResult { gate: "max_kl_ratio".to_owned(), limit: 0.5, value, passed: false };
    for value in [f64::NAN, f64::INFINITY] {
        let report = proto::Report { gates: vec![gate(value)], ..Default::default() };
        assert!(gates(&report).contains("0.5000      -  FAILED: its value is no finite number"), "{}", gates(&report));
    }
    let report = proto::Report { gates: vec![gate(0.75)], ..Default::default() };
    assert!(gates(&report).trim_end().ends_with("FAILED"), "{}", gates(&report));
}
