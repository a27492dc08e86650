use std::collections::BTreeMap;

use retort_core::{id::JobId, spec::parse_yaml, state::JobState};

use super::*;
use crate::{database::jobs::Training, planner::Plan};

const SPEC: &str = "
name: support
seed: 7
prompts: {path: /p.jsonl}
teacher: {model: /data/secret/smollm2-135m}
student: {init: {prune: {layers: 10}}}
gates: {max_kl_ratio: 0.5}
";

fn quality(kl: f64, tokens: u64) -> Quality {
    Quality {
        kl,
        top1_agreement: 0.334,
        student_perplexity: 51.54,
        teacher_perplexity: 3.73,
        tokens,
        calibration_error: Some(0.0421),
        teacher_calibration_error: None,
    }
}

fn job(spec: &str) -> Job {
    let after_by_tag = BTreeMap::from([
        ("refund".to_owned(), quality(1.9913, 120)),
        ("a|b\n---\n<script>".to_owned(), quality(f64::NAN, 5)),
    ]);
    Job {
        id: "0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4".parse::<JobId>().unwrap(),
        spec: parse_yaml("job.yaml", spec).unwrap(),
        spec_sha256: "0".into(),
        plan: Plan {
            train_rows: 263,
            held_out_rows: 40,
            train_shards: 17,
            held_out_shards: 3,
            max_target_tokens: 1,
            optimizer_steps: 132,
            teacher_parameters: 134_515_008,
            student_parameters: 63_710_784,
            max_store_bytes: 1,
            training: None,
        },
        prompt_set_sha256: "ab".repeat(32),
        state: JobState::Running,
        create_ms: 1,
        start_ms: None,
        end_ms: None,
        error: None,
        last_sequence: 0,
        shards_published: 20,
        target_tokens: 11_438,
        store_bytes: 9,
        training: Training::default(),
        checkpoint_key: None,
        train_finish: None,
        evaluation: Some(Evaluation {
            before: quality(8.7786, 1476),
            after: quality(2.3382, 1476),
            before_by_tag: BTreeMap::new(),
            after_by_tag,
            samples: Vec::new(),
        }),
        report: None,
    }
}

fn card(spec: &str, license: Option<&str>) -> String {
    card_of(spec, license, Some(3))
}

fn card_of(spec: &str, license: Option<&str>, version: Option<u32>) -> String {
    let job = job(spec);
    let evaluation = job.evaluation.clone().unwrap();
    let finish = TrainFinish {
        steps: 132,
        checkpoint_key: "c".into(),
        initial_key: "i".into(),
        processed_tokens: 105_396,
        target_tokens: 31_000,
        trained_parameters: 700_000,
        workers: 2,
        left_out_steps: 0,
        seconds: 1.0,
        tokens_per_second: 1.0,
        final_loss: 1.0,
        pruning: None,
        curve: Vec::new(),
    };
    render(&Facts {
        version,
        job: &job,
        evaluation: &evaluation,
        finish: &finish,
        gates: gates::judge(&job.spec.gates, &evaluation.before, &evaluation.after),
        shards: Shards {
            count: 17,
            tokens: 10_000,
            bytes: 1_500_000,
            sha256: "cd".repeat(32),
            fidelity: Fidelity { kl: Some(0.00123), ..Fidelity::default() },
        },
        license: license.map(str::to_owned),
        gguf: vec!["support-Q8_0.gguf".into()],
    })
}

#[test]
fn a_card_tells_how_the_student_came_to_be() {
    let card = card(SPEC, Some("apache-2.0"));
    for part in [
        "---\nbase_model: \"smollm2-135m\"\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: \"apache-2.0\"\ntags:\n- distillation\n",
        "- name: \"support\"\n  results:\n  - task:\n",
        "    - type: perplexity\n      name: \"perplexity\"\n      value: 51.54\n---\n\n# support, version 3\n",
        "A student of 63,710,784 parameters",
        "- <code>support-Q8&#95;0.gguf</code>\n",
        "| optimiser steps | 132 of up to 8 sequences, 3 passes |\n",
        "| tokens processed | 105,396 |\n| target tokens trained on | 31,000 |\n| parameters trained | 700,000 |\n",
        "| KL to the teacher, nats a token | 8.779 | 2.338 |  |\n",
        "| perplexity | 51.54 | 51.54 | 3.730 |\n",
        "| <code>max&#95;kl&#95;ratio</code> | 0.5000 | 0.2664 | passed |\n",
        "| refund | 1.991 | 33.4 % | 120 |\n",
        "Storing them moved them by 0.001230 nats a token",
        &format!("SHA-256 <code>{}</code> as a whole", "ab".repeat(32)),
        &"cd".repeat(32),
    ] {
        assert!(card.contains(part), "{part}\nis not in\n{card}");
    }
    assert!(!card.contains("secret"), "where the teacher lies is told");
    assert!(!super::tests::card(SPEC, None).contains("license:"));
    assert!(!card.to_lowercase().contains("not promoted") && !card.contains("not-promoted"), "{card}");
}

#[test]
fn a_card_of_a_candidate_says_that_it_is_none_and_why() {
    let card = card_of(&SPEC.replace("0.5", "0.25, max_kl: 1"), None, None);
    for part in [
        "- retort\n- not-promoted\nmodel-index:\n- name: \"support\"\n",
        "\n# support, a candidate that was not promoted\n\n**Not promoted: it failed the gates <code>max&#95;kl</code>, \
         <code>max&#95;kl&#95;ratio</code>.** It is no version of support.\n\nA student of",
        "| <code>max&#95;kl</code> | 1.000 | 2.338 | failed |\n",
    ] {
        assert!(card.contains(part), "{part}\nis not in\n{card}");
    }
    let parallel = format!("{SPEC}train: {{parallel: {{workers: 3}}}}\n");
    assert!(card_of(&parallel, None, None).contains("| workers | 2 at once, of <code>"));
}

#[test]
fn the_front_matter_is_yaml_whatever_the_names_are() {
    let hostile = SPEC.replace("/data/secret/smollm2-135m", "\"/data/x\\\"\\n---\\nlicense: mit\\u2028\"");
    let card = card(&hostile, None);
    let front = card.split("---\n").nth(1).unwrap();
    assert!(front.starts_with("base_model: \"x\\\"\\U0000000a---\\U0000000alicense: mit\\U00002028\"\n"), "{front}");
    assert!(!front.contains("\nlicense:"));
}

#[test]
fn a_hostile_tag_stays_in_its_cell_and_a_missing_figure_is_a_dash() {
    let card = card(SPEC, None);
    assert!(card.contains("| a&#124;b \\-\\-\\- &#60;script&#62; | - | 33.4 % | 5 |\n"), "{card}");
}
