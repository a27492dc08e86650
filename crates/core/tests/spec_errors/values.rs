//! What a user sees when a value of a spec is of the wrong kind.

use super::{GOOD, check};
use retort_core::{Code, spec::parse_yaml};

#[test]
fn a_value_of_the_wrong_kind_is_named_with_its_field_and_what_it_must_be() {
    let whole = "it must be a whole number from 1 to 10000";
    for (value, shown) in
        [("-2", "-2"), ("two", "\"two\""), ("2.5", "2.5"), ("true", "true"), ("99999999999", "99999999999")]
    {
        check(
            &format!("{GOOD}train:\n  passes: {value}\n"),
            Code::SpecMalformed,
            &format!("job.yaml line 11 column 11: train.passes is {shown}; {whole}"),
        );
    }
    check(
        &format!("{GOOD}train:\n  passes: [1]\n"),
        Code::SpecMalformed,
        "job.yaml line 11 column 11: train.passes is a list; it must be a single value",
    );
    check(
        &GOOD.replace("  model: teachers/small", "  model: t\n  sampling: {temperature: hot}"),
        Code::SpecMalformed,
        "job.yaml line 6 column 27: teacher.sampling.temperature is \"hot\"; it must be a number",
    );
    check(
        &GOOD.replace("name: support", "name: null"),
        Code::SpecMalformed,
        "job.yaml line 1 column 7: name is empty; it must be a text",
    );
    check(
        &GOOD.replace("prompts:\n  path: prompts.jsonl", "prompts: 5"),
        Code::SpecMalformed,
        "job.yaml line 2 column 10: prompts is 5; it must be a section of keys",
    );
    check(
        &GOOD.replace("    prune:\n      layers: 10", "    [prune]"),
        Code::SpecMalformed,
        "job.yaml line 8 column 5: student.init is a list; it must be one of prune, checkpoint and config, as in {prune: {layers: 8}}",
    );
}

#[test]
fn a_whole_number_is_shown_as_it_is_written_with_the_way_to_write_it() {
    for (value, way_out) in
        [("1.0", "; write 1"), ("1e1", "; write 10"), ("010", "; write 10"), ("1e5", ""), (".nan", ""), (".inf", "")]
    {
        check(
            &format!("{GOOD}train:\n  passes: {value} # over all rows\n"),
            Code::SpecMalformed,
            &format!(
                "job.yaml line 11 column 11: train.passes is {value}; it must be a whole number from 1 to 10000{way_out}"
            ),
        );
    }
    // Behind letters of several bytes.
    check(
        &GOOD.replace("prompts.jsonl", "gr\u{f6}\u{df}e.jsonl\n  shard_rows: 1.50"),
        Code::SpecMalformed,
        "job.yaml line 4 column 15: prompts.shard_rows is 1.50; it must be a whole number from 1 to 4096",
    );
    check(
        &format!("{GOOD}seed: 2.0\n"),
        Code::SpecMalformed,
        "job.yaml line 10 column 7: seed is 2.0; it must be a whole number from 0 to 18446744073709551615; write 2",
    );
}

#[test]
fn the_bounds_of_a_whole_number_are_its_fields_own() {
    let (path, model) = ("path: prompts.jsonl", "model: teachers/small");
    for (from, to, field, bounds) in [
        (path, "path: p\n  shard_rows: -1", "prompts.shard_rows", "from 1 to 4096"),
        (model, "model: t\n  sampling: {top_k: -1}", "teacher.sampling.top_k", "from 0 to 16777216"),
        (model, "model: t\n  soft_targets: {head: -1}", "teacher.soft_targets.head", "from 1 to 1024"),
        (
            model,
            "model: t\n  soft_targets: {draws: -1}",
            "teacher.soft_targets.draws",
            "up to 4294967295, not a negative one",
        ),
        ("layers: 10", "hidden_size: -1", "student.init.prune.hidden_size", "from 1 to 131072"),
        ("layers: 10", "layers: [-1]", "student.init.prune.layers[0]", "up to 4294967295, not a negative one"),
        ("student:", "student:\n  lora: {rank: -1}", "student.lora.rank", "from 1 to 1024"),
        ("name: support", "name: s\ntrain: {parallel: {workers: -1}}", "train.parallel.workers", "from 1 to 64"),
    ] {
        let message = parse_yaml("job.yaml", &GOOD.replace(from, to)).unwrap_err().message;
        assert!(message.ends_with(&format!(": {field} is -1; it must be a whole number {bounds}")), "{message}");
    }
}

#[test]
fn a_weight_of_the_wrong_kind_is_named_with_its_term() {
    for (value, shown) in [
        ("true", "true"),
        (".nan", ".nan"),
        ("-.inf", "-.inf"),
        ("1e999", "1e999"),
        ("much", "\"much\""),
        ("[1]", "a list"),
        ("~", "empty"),
    ] {
        check(
            &format!("{GOOD}train:\n  loss: {{forward_kl: {value}}}\n"),
            Code::SpecMalformed,
            &format!(
                "job.yaml line 11 column 22: train.loss.forward_kl is {shown}; it must be a number from 0 to 1000000, or \
                 {{from, to, until}}"
            ),
        );
    }
    check(
        &format!("{GOOD}train:\n  loss: {{forward_kl: {{from: much, to: 0}}}}\n"),
        Code::SpecMalformed,
        "job.yaml line 11 column 29: train.loss.forward_kl.from is \"much\"; it must be a number",
    );
    check(
        &GOOD.replace("layers: 10", "layers: {most: 3}"),
        Code::SpecInvalid,
        "job.yaml line 9 column 15: student.init.prune.layers is a section of keys; it must be a number of layers, or a list \
         of their indices as in [0, 1, 29]",
    );
}

#[test]
fn what_must_be_chosen_is_not_left_empty() {
    let inits = "student.init is empty; it must be one of prune, checkpoint and config, as in {prune: {layers: 8}}";
    check(
        &GOOD.replace("init:\n    prune:\n      layers: 10", "init: ~"),
        Code::SpecMalformed,
        &format!("job.yaml line 7 column 9: {inits}"),
    );
    let message = parse_yaml("job.yaml", &GOOD.replace("    prune:\n      layers: 10\n", "")).unwrap_err().message;
    assert!(message.starts_with("job.yaml line 7 ") && message.ends_with(inits), "{message}");
    check(
        &format!("{GOOD}train: {{promote: ~}}\n"),
        Code::SpecMalformed,
        "job.yaml line 10 column 18: train.promote is empty; it must be one of last, best",
    );
    check(
        &GOOD.replace("  model: teachers/small", "  model: t\n  mode: ~"),
        Code::SpecMalformed,
        "job.yaml line 6 column 9: teacher.mode is empty; it must be generate or score",
    );
}

#[test]
fn an_alias_of_no_value_is_named_with_its_field() {
    check(
        &GOOD.replace("student:\n  init:\n    prune:\n      layers: 10", "student: &a {init: *a}"),
        Code::SpecMalformed,
        "job.yaml line 6 column 20: student.init is an alias of what it stands in; write the value out",
    );
    check(
        &GOOD.replace("name: support", "name: *support"),
        Code::SpecMalformed,
        "job.yaml line 1 column 7: name is an alias without an anchor above it; write the value out",
    );
}

#[test]
fn no_message_speaks_of_the_library() {
    let yaml = |lines: &str| format!("{GOOD}{lines}");
    for text in [
        GOOD.replace("name: support", "name: !!binary zz"),
        GOOD.replace("name: support", "name: [support]"),
        GOOD.replace("name: support", "name: *support"),
        GOOD.replace("name: support", "name: {a: b}"),
        GOOD.replace("layers: 10", "layers:"),
        GOOD.replace("    prune:\n      layers: 10", "    prune"),
        GOOD.replace("teacher:", "teacher: &a\n  sampling: *a"),
        GOOD.replace("layers: 10", "layers: {most: 3}"),
        yaml("gates: [1]\n"),
        yaml("train: {loss: {forward_kl: .nan}}\n"),
        yaml("train: {loss: {forward_kl: no}}\n"),
        yaml("train: {promote: ~}\n"),
        yaml("train: 7\n"),
        yaml("seed: -1\n"),
        yaml("\tseed: 1\n"),
        yaml("seed: {\n"),
        "- 1".to_owned(),
        "a: &x [*x]".to_owned(),
        "[".repeat(100_000),
    ] {
        let message = parse_yaml("job.yaml", &text).unwrap_err().message;
        let words =
            "Option, from_str, u32, u64, struct, serde, variant, deserialize, weak, recursive, policy, invalid type";
        for word in words.split(", ") {
            assert!(!message.contains(word), "{message}");
        }
        assert_eq!(message.matches(" line ").count().max(1), 1, "{message}");
    }
}
