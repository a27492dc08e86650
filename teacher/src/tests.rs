//! Shards on a tiny teacher, against slow twins.

mod handler;
pub(crate) mod tiny;

use std::{ops::Range, path::Path, sync::Arc};

use retort_artifact::{
    prompts::{Message, Piece, Role, Row},
    soft_targets::{self, Encoded, Limits, Position, Sequence},
};
use retort_core::{
    Code, Error, Result,
    spec::{Codec, HELD_OUT_CODEC, JobSpec, TeacherMode, parse_yaml},
    state::Split,
};
use retort_llama::Keep;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::{
    capture::Capture,
    engine::{
        Engine, Generation, Text, Watch,
        native::{Loaded, Native},
    },
    sampling::Sampler,
    shard::{self, Order},
    stage::Arithmetic,
    text,
};

/// What a CPU computes with.
fn host() -> Arithmetic {
    Arithmetic::on(Device::Cpu, Kind::Float, None)
}

/// A shard from its rows to its bytes, as the worker makes it.
pub(crate) fn compute(engine: &mut dyn Engine, order: &Order, watch: Watch) -> Result<Encoded> {
    shard::capture(engine, order, watch)?.encode()
}

fn teacher() -> (TempDir, Native) {
    let dir = tempfile::tempdir().unwrap();
    tiny::write(dir.path(), 3);
    let engine = Native::load(dir.path(), &host()).unwrap();
    (dir, engine)
}

pub(crate) fn spec(model: &Path, extra: &str) -> JobSpec {
    let yaml = format!(
        "name: test\nseed: 9\nprompts: {{path: p.jsonl}}\nstudent: {{init: {{prune: {{layers: 2}}}}}}\nteacher:\n  model: {}\n{extra}",
        model.display()
    );
    parse_yaml("spec.yaml", &yaml).unwrap()
}

const SAMPLED: &str =
    "  sampling: {temperature: 1.0, top_p: 0.9, max_new_tokens: 24}\n  soft_targets: {head: 12, draws: 20}\n";

pub(crate) fn rows(count: usize) -> Vec<Row> {
    let row = |index: usize| {
        // Prompts of different lengths, in no order.
        let words: Vec<String> = (0..1 + (index * 5) % 11).map(|word| format!("w{}", 20 + index * 3 + word)).collect();
        Row {
            id: format!("row-{index}"),
            messages: vec![Message { role: Role::User, content: words.join(" ") }],
            tags: vec![format!("tag-{}", index % 2)],
            split: Some(Split::Train),
            completion: Some(format!("w{} w{} w41", 30 + index, 60 + index)),
            pieces: vec![],
            weight: 1.0,
        }
    };
    (0..count).map(row).collect()
}

pub(crate) fn order(spec: JobSpec, rows: Vec<Row>, lines: Range<usize>) -> Order {
    Order {
        job: "0190a5b4c6d87e8fa0b1c2d3e4f50617".to_owned(),
        epoch: 4,
        shard: 1,
        split: Split::Train,
        spec,
        prompt_set_sha256: "ab".repeat(32),
        rows: Arc::new(rows),
        lines,
    }
}

fn on(_: u64) -> Result<()> {
    Ok(())
}

fn texts(engine: &Native, rows: &[Row]) -> Vec<Text> {
    let prompt = |(line, row)| text::prompt(engine.tokenizer(), tiny::CONTEXT, 24, line as u64, row).unwrap();
    rows.iter().enumerate().map(prompt).collect()
}

const CAPTURE: Capture = Capture { codec: Codec::HeadDraws { head: 12, draws: 20 }, temperatures: Vec::new(), seed: 9 };

fn generation(temperature: f64) -> Generation {
    Generation { sampler: Sampler::new(temperature, 0.9, 9), max_new_tokens: 24, completions: 1, stop: vec![] }
}

/// Same tokens in the same places, log-probabilities within `tolerance`.
fn assert_alike(a: &Position, b: &Position, tolerance: f32) {
    assert!((a.label_logprob - b.label_logprob).abs() < tolerance, "{} {}", a.label_logprob, b.label_logprob);
    let sorted = |position: &Position| {
        let mut head = position.head.clone();
        head.sort_by_key(|(id, _)| *id);
        head
    };
    for (a, b) in sorted(a).iter().zip(&sorted(b)) {
        assert_eq!(a.0, b.0);
        assert!((a.1 - b.1).abs() < tolerance, "{a:?} {b:?}");
    }
}

#[test]
fn a_shard_computed_twice_is_the_same_bytes() {
    let (dir, mut engine) = teacher();
    let order = order(spec(dir.path(), SAMPLED), rows(9), 2..9);
    let first = compute(&mut engine, &order, &mut on).unwrap();
    let mut again = Native::load(dir.path(), &host()).unwrap();
    let second = compute(&mut again, &order, &mut on).unwrap();
    assert_eq!(first.sha256, second.sha256);
    assert_eq!(first.bytes, second.bytes);
    assert_eq!(first.rows, 7);

    let other_seed = Order { spec: JobSpec { seed: 10, ..order.spec.clone() }, ..order };
    assert_ne!(compute(&mut engine, &other_seed, &mut on).unwrap().sha256, first.sha256);
}

#[test]
fn the_file_says_what_it_is() {
    let (dir, mut engine) = teacher();
    let order = order(spec(dir.path(), SAMPLED), rows(5), 1..4);
    let encoded = compute(&mut engine, &order, &mut on).unwrap();
    let shard = soft_targets::decode(encoded.bytes, Limits::default()).unwrap();
    let header = &shard.header;
    assert_eq!((header.shard, header.epoch, header.seed, header.vocab_size), (1, 4, 9, tiny::VOCAB));
    assert_eq!(header.soft_targets.codec, CAPTURE.codec);
    assert_eq!((header.split.as_str(), header.mode.as_str(), header.dtype.as_str()), ("train", "generate", "f32"));
    assert_eq!(header.sampling_json, r#"{"temperature":1.0,"top_p":0.9,"max_new_tokens":24}"#);
    assert_eq!(header.teacher_sha256, retort_llama::folder_sha256(dir.path(), |_, _| {}).unwrap());
    assert_eq!(header.tokenizer_sha256, engine.tokenizer().tokenizer_sha256());
    for (sequence, line) in shard.sequences.iter().zip(1..4) {
        assert_eq!(sequence.row, line);
        assert_eq!(sequence.row_id, format!("row-{line}"));
        assert_eq!(sequence.tags, [format!("tag-{}", line % 2)]);
        // The reader gets distributions: masses sum to one.
        for p in 0..sequence.targets.len() {
            let mass: f32 = sequence.targets.masses[sequence.targets.range(p)].iter().sum();
            assert!((mass - 1.0).abs() < 1e-3, "{mass}");
        }
    }
}

#[test]
fn completions_end_with_an_end_token_or_at_the_limit() {
    let (_dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(12));
    let ends = engine.end_tokens().to_vec();
    let sequences = engine.generate(&texts, &generation(1.0), &CAPTURE, &mut on).unwrap();
    let reasons: Vec<&str> = sequences.iter().map(|s| s.finish_reason.as_str()).collect();
    assert!(reasons.contains(&"stop"), "{reasons:?}");
    for (sequence, text) in sequences.iter().zip(&texts) {
        assert_eq!(sequence.row, text.row);
        let (prompt, written) = sequence.token_ids.split_at(text.prompt_tokens);
        assert_eq!(prompt, text.token_ids);
        assert_eq!(sequence.positions.len(), written.len());
        assert_eq!(sequence.target_mask.iter().filter(|target| **target).count(), written.len());
        assert!(!sequence.target_mask[..text.prompt_tokens].contains(&true));
        let first_end = written.iter().position(|id| ends.contains(id));
        match sequence.finish_reason.as_str() {
            "stop" => assert_eq!(first_end, Some(written.len() - 1)),
            "length" => assert_eq!((first_end, written.len()), (None, 24)),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn captured_distributions_are_the_models_raw_ones() {
    // Whatever the sampler does, what is kept is the model's own distribution: one forward pass over
    // the finished sequence, without a cache, must give it again.
    let (dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(6));
    let sequences = engine.generate(&texts, &generation(1.7), &CAPTURE, &mut on).unwrap();
    let model = retort_llama::Model::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
    for sequence in &sequences {
        let ids: Vec<i64> = sequence.token_ids.iter().map(|&id| i64::from(id)).collect();
        let hidden_bth = tch::no_grad(|| model.hidden(&Tensor::from_slice(&ids).unsqueeze(0))).unwrap();
        let log_probs_tv = model.head(&hidden_bth.get(0)).unwrap().log_softmax(-1, Kind::Double);
        let first = sequence.token_ids.len() - sequence.positions.len();
        for (offset, position) in sequence.positions.iter().enumerate() {
            let at = (first + offset) as i64;
            let log_prob = |id: u32| log_probs_tv.double_value(&[at - 1, i64::from(id)]);
            let token = sequence.token_ids[at as usize];
            assert!((f64::from(position.label_logprob) - log_prob(token)).abs() < 1e-4);
            for (id, lp) in position.head.iter().copied().chain(position.tail.iter().map(|&(id, _, lp)| (id, lp))) {
                assert!((f64::from(lp) - log_prob(id)).abs() < 1e-4, "{id}: {lp} {}", log_prob(id));
            }
            let best: i64 = log_probs_tv.get(at - 1).argmax(-1, false).int64_value(&[]);
            assert_eq!(i64::from(position.head[0].0), best);
        }
    }
}

#[test]
fn scoring_what_was_generated_gives_the_same_soft_targets() {
    let (_dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(8));
    let generated = engine.generate(&texts, &generation(1.0), &CAPTURE, &mut on).unwrap();
    let given: Vec<Text> = generated
        .iter()
        .zip(&texts)
        .map(|(sequence, text)| Text { token_ids: sequence.token_ids.clone(), ..text.clone() })
        .collect();
    let scored = engine.score(&given, &CAPTURE, &mut on).unwrap();
    for (generated, scored) in generated.iter().zip(&scored) {
        assert_eq!(scored.finish_reason, "given");
        assert_eq!(generated.target_mask, scored.target_mask);
        assert_eq!(generated.positions.len(), scored.positions.len());
        for (a, b) in generated.positions.iter().zip(&scored.positions) {
            assert_alike(a, b, 1e-4);
        }
    }
}

#[test]
fn a_row_alone_and_in_a_batch_writes_the_same_greedy_tokens() {
    // Kernels add in another order for another number of rows: numbers agree to rounding (1e-4 here),
    // and tokens agree as long as no two are that close.
    let (_dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(10));
    let together = engine.generate(&texts, &generation(0.0), &CAPTURE, &mut on).unwrap();
    for (text, batched) in texts.iter().zip(&together) {
        let alone: Vec<Sequence> =
            engine.generate(std::slice::from_ref(text), &generation(0.0), &CAPTURE, &mut on).unwrap();
        assert_eq!(alone[0].token_ids, batched.token_ids);
        for (a, b) in alone[0].positions.iter().zip(&batched.positions) {
            assert_alike(a, b, 1e-4);
        }
    }
}

#[test]
fn given_completions_are_targets_through_their_end_token() {
    let (dir, mut engine) = teacher();
    let spec = spec(dir.path(), &format!("  mode: score\n{SAMPLED}"));
    assert_eq!(spec.teacher.mode, TeacherMode::Score);
    let order = order(spec, rows(3), 0..3);
    let encoded = compute(&mut engine, &order, &mut on).unwrap();
    let shard = soft_targets::decode(encoded.bytes, Limits::default()).unwrap();
    for (index, sequence) in shard.sequences.iter().enumerate() {
        let targets: Vec<u32> = sequence
            .token_ids
            .iter()
            .zip(&sequence.target_mask)
            .filter(|(_, target)| **target)
            .map(|(id, _)| *id)
            .collect();
        assert_eq!(targets, [30 + index as u32, 60 + index as u32, 41, 2]);
        assert_eq!(sequence.finish_reason, "given");
    }
    assert_eq!(shard.header.mode, "score");
}

#[test]
fn held_out_shards_keep_more_than_the_job_asks() {
    let (dir, mut engine) = teacher();
    let mut held_out = rows(3);
    for row in &mut held_out {
        row.split = Some(Split::HeldOut);
    }
    let order = Order { split: Split::HeldOut, ..order(spec(dir.path(), SAMPLED), held_out, 0..3) };
    let encoded = compute(&mut engine, &order, &mut on).unwrap();
    let header = soft_targets::decode(encoded.bytes, Limits::default()).unwrap().header;
    assert_eq!(header.soft_targets.codec, HELD_OUT_CODEC);
    assert_eq!(header.split, "held_out");
}

#[test]
fn rows_that_do_not_fit_are_named_before_anything_is_computed() {
    let (dir, mut engine) = teacher();
    let mut rows = rows(3);
    rows[2].messages[0].content = vec!["w9"; 80].join(" ");
    let order = order(spec(dir.path(), SAMPLED), rows, 0..3);
    let mut steps = 0;
    let mut count = |_| {
        steps += 1;
        Ok(())
    };
    let error = compute(&mut engine, &order, &mut count).unwrap_err();
    assert_eq!(error.code, Code::PromptTooLong);
    assert!(error.message.contains("row \"row-2\" (line 3 of the prompt set)"), "{error}");
    assert!(error.message.contains("max_new_tokens 24"), "{error}");
    assert_eq!(steps, 0);

    let mut long = order;
    Arc::make_mut(&mut long.rows)[2].completion = Some(vec!["w9"; 80].join(" "));
    long.spec.teacher.mode = TeacherMode::Score;
    assert_eq!(compute(&mut engine, &long, &mut on).unwrap_err().code, Code::PromptTooLong);
}

#[test]
fn a_row_without_completion_cannot_be_scored() {
    let (dir, mut engine) = teacher();
    let mut rows = rows(2);
    rows[1].completion = None;
    let order = order(spec(dir.path(), "  mode: score\n"), rows, 0..2);
    let error = compute(&mut engine, &order, &mut on).unwrap_err();
    assert_eq!(error.code, Code::PromptMalformed);
    assert!(error.message.contains("row-1") && error.message.contains("teacher.mode"), "{error}");
}

#[test]
fn pieces_that_the_chat_template_rewrites_are_refused_before_anything_is_computed() {
    let (dir, mut engine) = teacher();
    let mut order = order(spec(dir.path(), "  mode: score\n"), rows(2), 0..2);
    let row = &mut Arc::make_mut(&mut order.rows)[1];
    row.pieces = [(4, 0.0), (7, 1.0)].map(|(bytes, weight)| Piece { bytes, weight }).to_vec();
    assert_eq!(row.completion.as_ref().map(String::len), Some(11));
    compute(&mut engine, &order, &mut on).unwrap();

    let template = "{% for m in messages %}<|im_start|>{{ m.role }} \
                    {% if m.role == 'assistant' %}w9{% else %}{{ m.content }}{% endif %}<|im_end|> \n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant {% endif %}";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let mut engine = Native::load(dir.path(), &host()).unwrap();
    let mut steps = 0;
    let mut count = |_| {
        steps += 1;
        Ok(())
    };
    let error = compute(&mut engine, &order, &mut count).unwrap_err();
    assert_eq!((error.code, error.is_retryable(), steps), (Code::PromptMalformed, false, 0));
    assert_eq!(
        error.message,
        "row \"row-1\" (line 2 of the prompt set): the teacher's chat template changes the text of \"completion\", so that \
         its pieces cannot be told apart; give it as one text, or as the template writes it"
    );
    // As one text it is scored as the template writes it.
    Arc::make_mut(&mut order.rows)[1].pieces.clear();
    compute(&mut engine, &order, &mut on).unwrap();
}

#[test]
fn the_watch_counts_up_and_stops_the_work() {
    let (_dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(12));
    let mut seen = Vec::new();
    let mut watch = |captured| {
        seen.push(captured);
        if captured > 20 { Err(Error::new(Code::JobCancelled, "enough")) } else { Ok(()) }
    };
    let error = engine.generate(&texts, &generation(1.0), &CAPTURE, &mut watch).unwrap_err();
    assert_eq!(error.code, Code::JobCancelled);
    assert!(seen.is_sorted() && seen.last().is_some_and(|last| *last <= 32), "{seen:?}");
}

#[test]
fn weights_that_are_no_numbers_publish_nothing() {
    let (dir, _) = teacher();
    let model = retort_llama::Model::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
    for (name, tensor) in model.parameters() {
        if name == "model.norm.weight" {
            let mut tensor = tensor;
            let _ = tch::no_grad(|| tensor.fill_(f64::NAN));
        }
    }
    model.save(dir.path(), Kind::Float).unwrap();
    let mut engine = Native::load(dir.path(), &host()).unwrap();
    let order = order(spec(dir.path(), SAMPLED), rows(2), 0..2);
    assert_eq!(compute(&mut engine, &order, &mut on).unwrap_err().code, Code::ShardUnfaithful);
}

#[test]
fn a_teacher_is_loaded_again_only_when_its_files_change() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write(dir.path(), 3);
    let mut loaded = Loaded::new(host());
    let first = loaded.get(dir.path()).unwrap().capabilities().clone();
    let at = std::ptr::from_ref(loaded.get(dir.path()).unwrap().tokenizer());
    assert_eq!(at, std::ptr::from_ref(loaded.get(dir.path()).unwrap().tokenizer()));
    tiny::write(dir.path(), 4);
    let second = loaded.get(dir.path()).unwrap().capabilities().clone();
    assert_ne!(first.teacher_sha256, second.teacher_sha256);
    assert_eq!(first.tokenizer_sha256, second.tokenizer_sha256);

    let gone = loaded.get(&dir.path().join("nowhere")).err().unwrap();
    assert_eq!(gone.code, Code::FileNotFound);
}

#[test]
fn truncated_weights_and_a_foreign_tokenizer_are_named() {
    let (dir, _) = teacher();
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let error = Native::load(dir.path(), &host()).err().unwrap();
    assert_eq!(error.code, Code::WeightsTruncated);
    std::fs::write(&weights, &bytes).unwrap();

    let tokenizer = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, text.replace("\"w299\":299", "\"w299\":1299")).unwrap();
    let error = Native::load(dir.path(), &host()).err().unwrap();
    assert_eq!(error.code, Code::VocabularyMismatch);
}

#[test]
fn both_arithmetics_say_the_same() {
    let (dir, mut host) = teacher();
    let on_torch = Arithmetic::Torch { devices: vec![Device::Cpu; 2], kind: Kind::Float, keep: Keep::Stored };
    let mut torch = Native::load(dir.path(), &on_torch).unwrap();
    let texts = texts(&host, &rows(7));
    let greedy = |engine: &mut Native| engine.generate(&texts, &generation(0.0), &CAPTURE, &mut on).unwrap();
    let (a, b) = (greedy(&mut host), greedy(&mut torch));
    let given: Vec<Text> =
        a.iter().zip(&texts).map(|(a, text)| Text { token_ids: a.token_ids.clone(), ..text.clone() }).collect();
    let score = |engine: &mut Native| engine.score(&given, &CAPTURE, &mut on).unwrap();
    let scored = score(&mut host).into_iter().zip(score(&mut torch));
    for (a, b) in a.into_iter().zip(b).chain(scored) {
        assert_eq!(a.token_ids, b.token_ids);
        for (a, b) in a.positions.iter().zip(&b.positions) {
            assert_alike(a, b, 1e-4);
            assert_eq!(
                a.tail.iter().map(|(id, count, _)| (id, count)).collect::<Vec<_>>(),
                b.tail.iter().map(|(id, count, _)| (id, count)).collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn completions_of_a_prompt_differ_and_the_first_is_the_only_one() {
    let (_dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(5));
    let mut write = |completions| {
        let order = Generation { completions, ..generation(1.0) };
        engine.generate(&texts, &order, &CAPTURE, &mut on).unwrap()
    };
    let (one, three) = (write(1), write(3));
    assert_eq!(three.len(), 15);
    let alike = three.chunks(3).filter(|of| of[0].token_ids == of[1].token_ids || of[1].token_ids == of[2].token_ids);
    // Now and then two end with the same first token.
    assert!(alike.count() <= 1);
    for (one, three) in one.iter().zip(three.chunks(3)) {
        // Bit for bit: its prompt went through the layers with others, and was copied for them.
        assert_eq!(&three[0], one);
        let ids: Vec<&str> = three.iter().map(|sequence| sequence.row_id.as_str()).collect();
        assert_eq!(ids, [one.row_id.clone(), format!("{}#2", one.row_id), format!("{}#3", one.row_id)]);
    }
}

#[test]
fn a_stop_text_is_the_end_of_its_completion() {
    let (_dir, mut engine) = teacher();
    let texts = texts(&engine, &rows(6));
    let free = engine.generate(&texts, &generation(1.0), &CAPTURE, &mut on).unwrap();
    // A word that some completion has in its middle.
    let long = free.iter().find(|sequence| sequence.positions.len() > 4).unwrap();
    let word = long.token_ids[long.token_ids.len() - 3];
    let order = Generation { stop: vec![format!("w{word}")], ..generation(1.0) };
    let stopped = engine.generate(&texts, &order, &CAPTURE, &mut on).unwrap();
    let text = |ids: &[u32]| engine.tokenizer().decode(ids, true).unwrap();
    for (free, stopped) in free.iter().zip(&stopped) {
        assert!(free.token_ids.starts_with(&stopped.token_ids));
        let start = free.target_mask.iter().position(|&target| target).unwrap();
        let (short, whole) = (text(&stopped.token_ids[start..]), text(&free.token_ids[start..]));
        if whole.contains(&order.stop[0]) {
            assert!(short.contains(&order.stop[0]) && stopped.finish_reason == "stop", "{short}");
            assert!(!text(&stopped.token_ids[start..stopped.token_ids.len() - 1]).contains(&order.stop[0]));
        } else {
            assert_eq!(stopped, free);
        }
    }
}
