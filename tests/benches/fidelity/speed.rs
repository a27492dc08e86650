//! How fast shards are written and read, against those who fill and empty them; one thread, one run.

use std::time::Instant;

use retort_artifact::soft_targets::{Limits, decode, encode};
use retort_core::spec::{SoftTargets, Train};
use retort_llama::Model;
use retort_student::{
    batch::Limits as BatchLimits,
    trainer::{Options, Trainer},
};
use retort_teacher::capture::{Capture, Target};
use retort_tests::teacher::smollm2;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::{
    Failure,
    compare::{captured, header},
    corpus::Corpus,
    students::Student,
    training,
};

const ROWS: usize = 64;
/// Encoding and decoding are over in no time, so they are done again and the median counts.
const REPEATS: usize = 9;

pub fn run(corpus: &Corpus) -> Result<Value, Failure> {
    tch::set_num_threads(1);
    let soft_targets = SoftTargets::default();
    let rows: Vec<usize> = corpus.of(false).map(|(index, _)| index).take(ROWS).collect();
    let targets: usize = rows.iter().map(|&index| corpus.rows[index].targets()).sum();

    let sequences =
        rows.iter().map(|&index| captured(corpus, index, &soft_targets, 0)).collect::<Result<Vec<_>, _>>()?;
    let header = header(corpus, &soft_targets, 0, 0);
    let (mut encoding, mut decoding, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let started = Instant::now();
        let encoded = encode(&header, &sequences)?;
        encoding.push(targets as f64 / started.elapsed().as_secs_f64());
        let started = Instant::now();
        let shard = decode(encoded.bytes, Limits::default())?;
        decoding.push(targets as f64 / started.elapsed().as_secs_f64());
        decoded = shard.sequences;
    }

    // The teacher at its fastest: given text, no cache.
    let model = Model::load(&smollm2(), Device::Cpu, Kind::Float)?;
    let capture = Capture { codec: soft_targets.codec, temperatures: vec![], seed: 0 };
    let some = &rows[..ROWS / 8];
    let started = Instant::now();
    for &index in some {
        let row = &corpus.rows[index];
        let logprobs_nv = tch::no_grad(|| training::logprobs(&model, row))?;
        let targets: Vec<Target> =
            (0..row.targets() as u64).map(|position| Target { row: row.row, position, token: 0 }).collect();
        capture.positions(&logprobs_nv, &targets)?;
    }
    let scored: usize = some.iter().map(|&index| corpus.rows[index].targets()).sum();
    let teacher = scored as f64 / started.elapsed().as_secs_f64();
    drop(model);

    let options =
        Options { train: Train::default(), steps: 100, limits: BatchLimits::of(&Train::default(), Device::Cpu) };
    let mut trainer = Trainer::new(Student::named("4-layers")?.start()?, options)?;
    let examples =
        rows.iter().zip(decoded).map(|(&index, sequence)| training::example(&corpus.rows[index], sequence.targets));
    let examples: Vec<_> = examples.collect();
    trainer.step(&examples[..8], &|| Ok(()))?;
    let started = Instant::now();
    for batch in examples[8..40].chunks(8) {
        trainer.step(batch, &|| Ok(()))?;
    }
    let trained: usize = examples[8..40].iter().map(|example| example.targets.len()).sum();
    let student = trained as f64 / started.elapsed().as_secs_f64();

    let median = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let (encode, decode) = (median(&mut encoding), median(&mut decoding));
    Ok(json!({
        "target_tokens": targets, "encode_tokens_per_s": encode, "decode_tokens_per_s": decode,
        "teacher_tokens_per_s": teacher, "student_tokens_per_s": student,
        "encode_over_teacher": encode / teacher, "decode_over_student": decode / student,
    }))
}
