//! Measures the native engine on one shard: `cargo run -p retort-teacher --example speed -- DIR ROWS`.
//!
//! Prints target tokens a second for generating with capture, for capture alone on logits of the
//! same shape, and for scoring what was generated.

use std::{path::PathBuf, time::Instant};

use retort_core::{Code, Error, Result};
use retort_llama::ChatMessage;
use retort_teacher::{
    capture::{Capture, Target},
    engine::{Engine, Generation, Text, native::Native},
    sampling::{Place, Sampler},
};
use tch::{Kind, Tensor};

const NEW_TOKENS: u32 = 96;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = || Error::new(Code::RequestInvalid, "usage: speed MODEL_FOLDER [ROWS] [HEAD] [DRAWS]");
    let dir = PathBuf::from(arguments.next().ok_or_else(usage)?);
    let mut number = |default: u32| arguments.next().map_or(Ok(default), |text| text.parse().map_err(|_| usage()));
    let (rows, head, draws) = (number(16)?, number(32)?, number(16)?);
    let device = retort_llama::device_from_flag("auto").map_err(|error| Error::internal(error.to_string()))?;
    let kind = retort_llama::dtype_from_flag("auto", device).map_err(|error| Error::internal(error.to_string()))?;
    let mut engine = Native::load(&dir, device, kind)?;
    let capture = Capture { head, draws, seed: 1 };
    let sampler = Sampler { temperature: 0.7, top_p: 0.95, seed: 1 };
    let order = Generation { sampler, max_new_tokens: NEW_TOKENS };
    let texts = texts(&engine, rows)?;

    let started = Instant::now();
    let sequences = engine.generate(&texts, &order, &capture, &mut |_| Ok(()))?;
    let seconds = started.elapsed().as_secs_f64();
    let targets: usize = sequences.iter().map(|sequence| sequence.positions.len()).sum();
    let steps = sequences.iter().map(|sequence| sequence.positions.len()).max().unwrap_or(0);
    println!(
        "generate {rows} rows: {targets} targets in {seconds:.2} s, {:.1} tokens/s, {:.1} ms a step over {steps} steps",
        targets as f64 / seconds,
        1e3 * seconds / steps.max(1) as f64
    );

    let vocab = i64::from(engine.capabilities().vocab_size);
    let logits_nv = Tensor::randn([i64::from(rows), vocab], (Kind::Float, device)) * 3.0;
    let targets_n: Vec<Target> = (0..u64::from(rows)).map(|row| Target { row, position: 9, token: 7 }).collect();
    let places_n: Vec<Place> = (0..u64::from(rows)).map(|row| Place { row, position: 9 }).collect();
    let repeats = 20;
    let started = Instant::now();
    for _ in 0..repeats {
        capture.positions(&logits_nv, &targets_n)?;
    }
    println!("capture alone: {:.2} ms a step", 1e3 * started.elapsed().as_secs_f64() / f64::from(repeats));
    let started = Instant::now();
    for _ in 0..repeats {
        sampler.next(&logits_nv, &places_n)?;
    }
    println!("sampling alone: {:.2} ms a step", 1e3 * started.elapsed().as_secs_f64() / f64::from(repeats));

    let given = sequences.iter().zip(&texts);
    let given: Vec<Text> =
        given.map(|(sequence, text)| Text { token_ids: sequence.token_ids.clone(), ..text.clone() }).collect();
    let started = Instant::now();
    engine.score(&given, &capture, &mut |_| Ok(()))?;
    let seconds = started.elapsed().as_secs_f64();
    let all: usize = given.iter().map(|text| text.token_ids.len()).sum();
    println!(
        "score: {:.1} targets/s, {:.1} tokens/s with their prompts",
        targets as f64 / seconds,
        all as f64 / seconds
    );
    Ok(())
}

fn texts(engine: &Native, rows: u32) -> Result<Vec<Text>> {
    let subjects = ["a parcel that never came", "a refund", "changing my address", "a broken kettle", "my invoice"];
    let text = |row: u32| {
        let subject = subjects[row as usize % subjects.len()];
        let content = format!("Customer {row} writes about {subject}. Answer politely and say what happens next.");
        let message = ChatMessage { role: "user".to_owned(), content };
        let token_ids = engine
            .tokenizer()
            .encode_chat(&[message], true)
            .map_err(|error| Error::new(Code::ModelMalformed, error.to_string()))?;
        Ok(Text {
            row: u64::from(row),
            row_id: row.to_string(),
            tags: vec![],
            prompt_tokens: token_ids.len(),
            token_ids,
        })
    };
    (0..rows).map(text).collect()
}
