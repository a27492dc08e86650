//! What a user sees when a spec is wrong.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

mod values;

use retort_core::{
    Code,
    spec::{GgufType, JobSpec, SoftTargets, parse_yaml},
};

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

fn check(yaml: &str, code: Code, message: &str) {
    let error = parse_yaml("job.yaml", yaml).expect_err("the spec is wrong");
    assert_eq!(error.code, code, "{}", error.message);
    assert_eq!(error.message, message);
}

#[test]
fn a_short_spec_gets_the_defaults() {
    let spec = parse_yaml("job.yaml", GOOD).unwrap();
    assert_eq!(spec.teacher.pool, "default");
    assert_eq!(spec.teacher.soft_targets, SoftTargets::default());
    assert_eq!(spec.train.passes, 3);
    assert_eq!(spec.gates.max_kl, None);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_what_was_meant() {
    check(
        &GOOD.replace("  model:", "  modle:"),
        Code::SpecUnknownKey,
        "job.yaml line 5 column 3: unknown key \"modle\"; did you mean \"model\"?",
    );
    check(
        &format!("{GOOD}colour: blue\n"),
        Code::SpecUnknownKey,
        "job.yaml line 10 column 1: unknown key \"colour\"; known here: name, seed, prompts, teacher, student, train, gates, export",
    );
}

#[test]
fn what_a_codec_does_not_take_is_refused() {
    check(
        &GOOD.replace("  model: teachers/small", "  model: t\n  soft_targets: {codec: top_k, draws: 3}"),
        Code::SpecInvalid,
        "job.yaml line 6 column 17: teacher.soft_targets.draws is nothing that the codec top_k takes",
    );
    check(
        &GOOD.replace("  model: teachers/small", "  model: t\n  soft_targets: {codec: topk}"),
        Code::SpecInvalid,
        "job.yaml line 6 column 25: \"topk\" is not known here; did you mean \"top_k\"?",
    );
}

#[test]
fn a_missing_key_is_named() {
    let error = parse_yaml("job.yaml", &GOOD.replace("name: support\n", "")).expect_err("no name");
    assert_eq!(error.code, Code::SpecInvalid);
    assert!(error.message.contains("the key \"name\" is missing"), "{}", error.message);
}

#[test]
fn an_unknown_variant_is_named() {
    let error = parse_yaml("job.yaml", &GOOD.replace("prune:", "prun:")).expect_err("no such init");
    assert_eq!(error.code, Code::SpecInvalid);
    assert!(error.message.contains("did you mean \"prune\"?"), "{}", error.message);
}

#[test]
fn values_out_of_bounds_are_named_with_the_bounds() {
    check(
        &GOOD.replace("layers: 10", "layers: 0"),
        Code::SpecInvalid,
        "job.yaml: student.init.prune.layers is 0; it must lie between 1 and 1024",
    );
    check(
        &GOOD.replace("name: support", "name: Support Bot"),
        Code::SpecInvalid,
        "job.yaml: name is \"Support Bot\"; use 1 to 63 lower case letters, digits and dashes, no dash at either end",
    );
    check(
        &format!("{GOOD}train:\n  learning_rate: .nan\n"),
        Code::SpecInvalid,
        "job.yaml: train.learning_rate is NaN; it must lie between 0.000000001 and 10",
    );
}

#[test]
fn shapes_that_do_not_divide_are_refused() {
    let yaml = GOOD.replace(
        "    prune:\n      layers: 10\n",
        "    config: {hidden_size: 100, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 3, num_key_value_heads: 1}\n",
    );
    check(
        &yaml,
        Code::SpecInvalid,
        "job.yaml: student.init.config: num_attention_heads (3) must divide hidden_size (100)",
    );
}

#[test]
fn a_pruning_that_cannot_be_is_named_with_the_way_out() {
    for (text, expected) in [
        ("{}", "student.init.prune cuts nothing; give layers, or a size such as intermediate_size"),
        ("{choose: even}", "cuts nothing"),
        ("{layers: []}", "the length of student.init.prune.layers is 0; it must lie between 1 and 1024"),
        ("{layers: [0, 3, 3]}", "student.init.prune.layers has 3 and then 3; name each layer once, in ascending order"),
        ("{layers: [4, 2]}", "has 4 and then 2"),
        ("{layers: [1, 2], choose: even}", "student.init.prune.choose has nothing to choose; give"),
        ("{hidden_size: 8, choose: block_influence}", "choose has nothing to choose"),
        ("{layers: 2, choose: best}", "\"best\" is not known here; known here: ends, even, block_influence"),
        ("{layers: 2, intermediate_size: 0}", "student.init.prune.intermediate_size is 0; it must lie between 1"),
        ("{layers: 2, calibration_rows: 4096}", "calibration_rows is 4096; it must lie between 1 and 1024"),
        (
            "{num_attention_heads: 7, num_key_value_heads: 2}",
            "student.init.prune: num_key_value_heads (2) must divide num_attention_heads (7)",
        ),
        ("{layers: many}", "student.init.prune.layers is \"many\"; it must be a number of layers, or a list of"),
        ("{layers: -2}", "student.init.prune.layers is -2; it must be a number of layers, or a list of"),
        ("{layers: 2.5}", "layers is 2.5; it must be"),
        ("{layers: 2, width: 3}", "unknown key \"width\""),
    ] {
        let yaml = GOOD.replace("prune:\n      layers: 10", &format!("prune: {text}"));
        let message = parse_yaml("job.yaml", &yaml).unwrap_err().message;
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn random_embeddings_are_not_frozen() {
    let yaml = GOOD.replace(
        "    prune:\n      layers: 10\n",
        "    config: {hidden_size: 96, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 3, num_key_value_heads: 1}\n",
    );
    check(
        &format!("{yaml}train:\n  freeze_embeddings: true\n"),
        Code::SpecInvalid,
        "job.yaml: train.freeze_embeddings would keep the random embeddings of student.init.config; start from prune or \
         checkpoint, or leave it out",
    );
}

#[test]
fn a_best_checkpoint_that_is_not_kept_is_not_promoted() {
    check(
        &format!("{GOOD}train: {{promote: best, keep: {{best: false}}}}\n"),
        Code::SpecInvalid,
        "job.yaml: train.promote is best and train.keep.best is false, so that the best checkpoint may be gone; leave one \
         of them out",
    );
    check(
        &format!("{GOOD}train: {{keep: {{last: 0}}}}\n"),
        Code::SpecInvalid,
        "job.yaml: train.keep.last is 0; it must lie between 1 and 1000",
    );
    check(
        &format!("{GOOD}gates: {{max_calibration_error: 2}}\n"),
        Code::SpecInvalid,
        "job.yaml: gates.max_calibration_error is 2; it must lie between 0 and 1",
    );
}

#[test]
fn keys_that_do_nothing_leave_the_json_as_it_was() {
    let plain = serde_json::to_string(&parse_yaml("job.yaml", GOOD).unwrap()).unwrap();
    let said = format!("{GOOD}train: {{keep: {{last: 2, best: true}}, promote: last}}\n");
    assert_eq!(serde_json::to_string(&parse_yaml("job.yaml", &said).unwrap()).unwrap(), plain);
    for key in ["keep", "promote", "max_calibration_error"] {
        assert!(!plain.contains(key), "{plain}");
    }
}

#[test]
fn adapters_that_cannot_be_are_refused() {
    let of = |lora: &str| format!("{GOOD}  lora: {lora}\n");
    for (lora, wrong) in [
        ("{rank: 0}", "rank is 0; it must lie between 1 and 1024"),
        ("{dropout: 1}", "dropout is 1; it must lie between 0 and 0.99"),
        ("{alpha: 0}", "alpha is 0; it must lie between 0.001 and 1000000"),
        (
            "{targets: []}",
            "targets is empty; name some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, each once",
        ),
        (
            "{targets: [q_proj, q_proj]}",
            "targets has q_proj twice; name some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, each once",
        ),
    ] {
        check(&of(lora), Code::SpecInvalid, &format!("job.yaml: student.lora.{wrong}"));
    }
    check(
        &of("{targets: [qproj]}"),
        Code::SpecInvalid,
        "job.yaml line 10 column 20: \"qproj\" is not known here; did you mean \"q_proj\"?",
    );
    check(
        &of("{base: [int8]}"),
        Code::SpecMalformed,
        "job.yaml line 10 column 16: student.lora.base is a list; it must be model or int8",
    );
    let config = "{hidden_size: 96, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 3, num_key_value_heads: 1}";
    let random = of("{rank: 97}").replace("    prune:\n      layers: 10\n", &format!("    config: {config}\n"));
    check(
        &random,
        Code::SpecInvalid,
        "job.yaml: student.lora.rank is 97, more than the student's hidden_size of 96; lower it",
    );
    // A checkpoint of before this key knows its spec by the hash of its JSON.
    let json = |yaml: &str| serde_json::to_string(&parse_yaml("job.yaml", yaml).unwrap()).unwrap();
    assert!(!json(GOOD).contains("lora"));
    assert_eq!(json(&of("{}")), json(&of("{rank: 16, alpha: 32, base: model, targets: ~}")));
    assert!(json(&of("{}")).contains("\"lora\""));
}

#[test]
fn an_empty_key_is_as_one_that_is_not_there() {
    let plain = parse_yaml("job.yaml", GOOD).unwrap();
    let student = |empty: &str| GOOD.replace("student:", &format!("student:\n  lora: {empty}"));
    let sections =
        "train: {parallel: ~, loss: ~, guard: ~, keep: ~, micro_batch_tokens: ~}\ngates: {max_kl: ~}\nexport: ~\n";
    let teacher = "  model: teachers/small\n  sampling: {stop: ~}\n  soft_targets: {codec: ~, temperatures: ~}";
    for yaml in [
        student("~"),
        student("null"),
        student(""),
        format!("{GOOD}{sections}"),
        format!("{GOOD}export: {{gguf: ~}}\n"),
        GOOD.replace("  model: teachers/small", teacher),
        GOOD.replace("layers: 10", "layers: 10\n      hidden_size: ~"),
    ] {
        assert_eq!(parse_yaml("job.yaml", &yaml).unwrap(), plain, "{yaml}");
    }
    check(
        &GOOD.replace("prune:\n      layers: 10", "prune: ~"),
        Code::SpecMalformed,
        "job.yaml line 8 column 12: student.init.prune is empty; it must be a section of keys",
    );
}

#[test]
fn the_size_of_a_micro_batch_has_bounds() {
    let of = |tokens: &str| format!("{GOOD}train: {{micro_batch_tokens: {tokens}}}\n");
    for tokens in ["0", "15", "1048577"] {
        let message = format!("job.yaml: train.micro_batch_tokens is {tokens}; it must lie between 16 and 1048576");
        check(&of(tokens), Code::SpecInvalid, &message);
    }
    check(
        &of("many"),
        Code::SpecMalformed,
        "job.yaml line 10 column 29: train.micro_batch_tokens is \"many\"; it must be a whole number from 16 to 1048576",
    );
    assert_eq!(parse_yaml("job.yaml", &of("16")).unwrap().train.micro_batch_tokens, Some(16));
    // A checkpoint of before this key knows its spec by the hash of its JSON.
    assert!(!serde_json::to_string(&parse_yaml("job.yaml", GOOD).unwrap()).unwrap().contains("micro_batch"));
}

#[test]
fn a_type_of_gguf_file_may_stand_alone() {
    let of = |types: &str| format!("{GOOD}export: {{gguf: {types}}}\n");
    let alone = parse_yaml("job.yaml", &of("q8_0")).unwrap();
    assert_eq!(alone.export.gguf, [GgufType::Q8_0]);
    assert_eq!(alone, parse_yaml("job.yaml", &of("[q8_0]")).unwrap());
    let json = serde_json::to_string(&alone).unwrap();
    assert!(json.contains(r#""export":{"gguf":["q8_0"]}"#), "{json}");
    assert_eq!(serde_json::from_str::<JobSpec>(&json).unwrap(), alone);
    for (types, wrong) in [
        ("q4_0", "\"q4_0\" is not known here; did you mean \"q8_0\"?"),
        ("[q8_0, q4_0]", "\"q4_0\" is not known here; did you mean \"q8_0\"?"),
        ("8", "export.gguf is 8; it must be one of f32, f16, bf16 and q8_0, or a list of them"),
        (
            "{q8_0: true}",
            "export.gguf is a section of keys; it must be one of f32, f16, bf16 and q8_0, or a list of them",
        ),
        ("[q8_0, q8_0]", "export.gguf names q8_0 twice"),
    ] {
        let message = parse_yaml("job.yaml", &of(types)).unwrap_err().message;
        assert!(message.contains(wrong), "{types}: {message}");
    }
}

#[test]
fn what_is_there_twice_is_named() {
    check(
        &format!("{GOOD}name: again\n"),
        Code::SpecMalformed,
        "job.yaml line 10 column 1: the key \"name\" is given twice",
    );
    check(
        &format!("{GOOD}    checkpoint: {{model: small}}\n"),
        Code::SpecMalformed,
        "job.yaml line 10 column 5: student.init takes one of prune, checkpoint and config, not several",
    );
    check(
        &format!("{GOOD}---\n{GOOD}"),
        Code::SpecMalformed,
        "job.yaml line 11 column 1: a spec is one document; remove \"---\" and what follows",
    );
}

#[test]
fn an_empty_file_has_no_spec_and_an_empty_section_its_defaults() {
    for empty in ["", "\n", "# later\n"] {
        check(
            empty,
            Code::SpecMalformed,
            "job.yaml: there is no spec in it; one says name, prompts, teacher and student",
        );
    }
    let spec = parse_yaml("job.yaml", &format!("{GOOD}train:\ngates:\n")).unwrap();
    assert_eq!(spec, parse_yaml("job.yaml", GOOD).unwrap());
    let spec = GOOD.replace("  model: teachers/small", "  model: t\n  sampling:\n  soft_targets: ~");
    assert_eq!(parse_yaml("job.yaml", &spec).unwrap().teacher.soft_targets, SoftTargets::default());
}

#[test]
fn hostile_yaml_is_an_error_and_no_panic() {
    for yaml in [
        "",
        "\0",
        "- 1",
        "name: [",
        "a: &x [*x]",
        "%TAG ! x",
        "name: !!binary zz",
        &"[".repeat(100_000),
        &"a: ".repeat(50_000),
    ] {
        assert!(parse_yaml("job.yaml", yaml).is_err());
    }
    // Nine levels of nine aliases each would be 9^9 values.
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
    for level in 1..10 {
        let below = format!("*a{}", level - 1);
        bomb.push_str(&format!("a{level}: &a{level} [{}]\n", vec![below; 9].join(",")));
    }
    assert!(parse_yaml("job.yaml", &bomb).is_err());
    assert!(parse_yaml("job.yaml", &" ".repeat(2 << 20)).is_err());
}

#[test]
fn a_spec_survives_the_wire() {
    for (yaml, frozen) in [(GOOD.to_owned(), false), (format!("{GOOD}train:\n  freeze_embeddings: true\n"), true)] {
        let spec = parse_yaml("job.yaml", &yaml).unwrap();
        assert_eq!(spec.train.freeze_embeddings, frozen);
        let back = retort_core::wire::job_spec_from_proto(retort_core::wire::job_spec_to_proto(&spec)).unwrap();
        assert_eq!(spec, back);
        // Checkpoints of before these keys know their spec by the hash of its JSON.
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(json.contains("freeze_embeddings"), frozen);
        assert!(!json.contains("adam_"), "{json}");
    }
}

#[test]
fn the_page_about_specs_shows_the_defaults() {
    let page = std::fs::read_to_string("../../docs/formats/spec.md").unwrap();
    let yaml = page.split("```").nth(1).unwrap().strip_prefix("yaml\n").unwrap();
    let shown = parse_yaml("spec.md", yaml).unwrap();
    let least = "name: support\nprompts: {path: prompts.jsonl}\nteacher: {model: smollm2}\nstudent: {init: {prune: {layers: 8}}}\n";
    let mut plain = parse_yaml("least.yaml", least).unwrap();
    assert!([shown.gates.max_kl, shown.gates.max_kl_ratio, shown.gates.min_top1_agreement].iter().all(Option::is_some));
    plain.gates = shown.gates.clone();
    assert_eq!(shown, plain);
}
