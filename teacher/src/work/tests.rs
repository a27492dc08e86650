use std::sync::Arc;

use retort_artifact::prompts::{Message, Role};
use retort_core::{
    spec::{Codec, Init, JobSpec, Quantiser, parse_yaml},
    state::Split,
};

use super::*;

const LINES: std::ops::Range<usize> = 2..4;

fn teacher() -> Capabilities {
    Capabilities {
        engine: "native",
        engine_version: "1.2.3",
        dtype: "f32",
        vocab_size: 300,
        context: 96,
        max_head: 300,
        max_draws: 255,
        generates: true,
        scores: true,
        teacher_sha256: "aa".repeat(32),
        config_sha256: "bb".repeat(32),
        tokenizer_sha256: "cc".repeat(32),
        chat_template_sha256: "dd".repeat(32),
    }
}

fn spec() -> JobSpec {
    parse_yaml(
        "spec.yaml",
        "name: test\nseed: 9\nprompts: {path: p.jsonl}\nteacher: {model: /teacher}\nstudent: {init: {prune: {layers: 2}}}\n",
    )
    .unwrap()
}

fn order() -> Order {
    let row = |index: usize| Row {
        id: format!("row-{index}"),
        messages: vec![Message { role: Role::User, content: format!("question {index}") }],
        tags: vec!["a".to_owned(), "bc".to_owned()],
        split: None,
        completion: Some(format!("answer {index}")),
        pieces: vec![],
        weight: 1.0,
    };
    Order {
        job: "0190a5b4c6d87e8fa0b1c2d3e4f50617".to_owned(),
        epoch: 4,
        shard: 1,
        split: Split::Train,
        spec: spec(),
        prompt_set_sha256: "ab".repeat(32),
        rows: Arc::new((0..6).map(row).collect()),
        lines: LINES,
    }
}

fn name(change: impl FnOnce(&mut Order, &mut Capabilities)) -> String {
    let (mut order, mut teacher) = (order(), teacher());
    change(&mut order, &mut teacher);
    work_sha256(&order, &teacher).unwrap()
}

fn row(order: &mut Order, change: impl FnOnce(&mut Row)) {
    change(&mut Arc::get_mut(&mut order.rows).unwrap()[LINES.start]);
}

type Change = fn(&mut Order, &mut Capabilities);

#[test]
fn the_name_says_nothing_of_who_asks() {
    let changes: &[(&str, Change)] = &[
        ("job", |o, _| o.job = "f".repeat(32)),
        ("shard", |o, _| o.shard = 7),
        ("epoch", |o, _| o.epoch = 9),
        ("the job's name", |o, _| o.spec.name = "other".to_owned()),
        ("prompts elsewhere", |o, _| o.spec.prompts.path = "/other.jsonl".to_owned()),
        ("rows of other shards", |o, _| {
            o.prompt_set_sha256 = "0".repeat(64);
            Arc::get_mut(&mut o.rows).unwrap()[0].id = "other".to_owned();
        }),
        ("the teacher's folder", |o, _| o.spec.teacher.model = "/copy".to_owned()),
        ("the pool", |o, _| o.spec.teacher.pool = "large".to_owned()),
        ("the student", |o, _| o.spec.student.init = Init::Prune(retort_core::spec::Prune::to_layers(9))),
        ("training", |o, _| o.spec.train.learning_rate = 1.0),
        ("gates", |o, _| o.spec.gates.max_kl = Some(0.1)),
        ("a completion that is not read", |o, _| row(o, |row| row.completion = None)),
        ("what the teacher could do besides", |_, t| (t.context, t.max_head, t.scores) = (1 << 20, 8, false)),
    ];
    let expected = name(|_, _| {});
    for (what, change) in changes {
        assert_eq!(name(change), expected, "{what}");
    }
}

#[test]
fn the_name_changes_with_each_part() {
    let changes: &[(&str, Change)] = &[
        ("weights", |_, t| t.teacher_sha256 = "0".repeat(64)),
        ("config", |_, t| t.config_sha256 = "0".repeat(64)),
        ("tokenizer", |_, t| t.tokenizer_sha256 = "0".repeat(64)),
        ("template", |_, t| t.chat_template_sha256 = "0".repeat(64)),
        ("engine", |_, t| t.engine = "other"),
        ("engine version", |_, t| t.engine_version = "1.2.4"),
        ("dtype", |_, t| t.dtype = "bf16"),
        ("vocabulary", |_, t| t.vocab_size = 301),
        ("seed", |o, _| o.spec.seed = 10),
        ("mode", |o, _| o.spec.teacher.mode = TeacherMode::Score),
        ("max_new_tokens", |o, _| o.spec.teacher.sampling.max_new_tokens += 1),
        ("temperature", |o, _| o.spec.teacher.sampling.temperature = 0.0),
        ("top_p", |o, _| o.spec.teacher.sampling.top_p = 0.5),
        ("top_k", |o, _| o.spec.teacher.sampling.top_k = 5),
        ("min_p", |o, _| o.spec.teacher.sampling.min_p = 0.1),
        ("repetition_penalty", |o, _| o.spec.teacher.sampling.repetition_penalty = 1.1),
        ("stop", |o, _| o.spec.teacher.sampling.stop = vec!["x".to_owned()]),
        ("completions", |o, _| o.spec.teacher.sampling.completions = 2),
        ("split", |o, _| o.split = Split::HeldOut),
        ("head", |o, _| o.spec.teacher.soft_targets.codec = Codec::HeadDraws { head: 33, draws: 16 }),
        ("draws", |o, _| o.spec.teacher.soft_targets.codec = Codec::HeadDraws { head: 33, draws: 17 }),
        ("codec", |o, _| o.spec.teacher.soft_targets.codec = Codec::TopK { head: 33 }),
        ("threshold", |o, _| o.spec.teacher.soft_targets.codec = Codec::Threshold { threshold: 0.03 }),
        ("quantiser", |o, _| o.spec.teacher.soft_targets.quantiser = Quantiser::F32),
        ("temperatures", |o, _| o.spec.teacher.soft_targets.temperatures = vec![2.0]),
        ("fewer rows", |o, _| o.lines = LINES.start..LINES.end - 1),
        ("the same rows elsewhere", |o, _| {
            Arc::get_mut(&mut o.rows).unwrap().rotate_left(1);
            o.lines = LINES.start - 1..LINES.end - 1;
        }),
        ("id", |o, _| row(o, |row| row.id.push('x'))),
        ("a tag more", |o, _| row(o, |row| row.tags.push(String::new()))),
        ("tags cut elsewhere", |o, _| row(o, |row| row.tags = vec!["ab".to_owned(), "c".to_owned()])),
        ("role", |o, _| row(o, |row| row.messages[0].role = Role::System)),
        ("content", |o, _| row(o, |row| row.messages[0].content.push('?'))),
        ("a message more", |o, _| row(o, |row| row.messages.insert(0, row.messages[0].clone()))),
    ];
    let mut seen = vec![name(|_, _| {})];
    for (what, change) in changes {
        let named = name(change);
        assert!(!seen.contains(&named), "{what}");
        seen.push(named);
    }
}

#[test]
fn what_is_not_read_is_not_named() {
    let score = |change: Change| {
        name(|order, teacher| {
            order.spec.teacher.mode = TeacherMode::Score;
            change(order, teacher);
        })
    };
    let expected = score(|_, _| {});
    assert_eq!(score(|o, _| o.spec.teacher.sampling.temperature = 0.0), expected, "nothing is sampled");
    assert_ne!(score(|o, _| row(o, |row| row.completion = Some("other".to_owned()))), expected);

    let held_out = |change: Change| {
        name(|order, teacher| {
            order.split = Split::HeldOut;
            change(order, teacher);
        })
    };
    let expected = held_out(|_, _| {});
    let other = held_out(|o, _| o.spec.teacher.soft_targets.codec = Codec::Full);
    assert_eq!(other, expected, "held-out shards keep what they do");
    assert_ne!(held_out(|o, _| o.spec.seed = 1), expected);
}
