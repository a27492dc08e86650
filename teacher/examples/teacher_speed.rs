//! Where a decode step's time goes: `cargo run -p retort-teacher --example teacher_speed -- MODEL_FOLDER 16`.
//!
//! Generates one shard with capture, then times the parts alone on tensors of the same shape, then
//! scores what was generated.

use std::{path::PathBuf, time::Instant};

use retort_core::{Code, Error, Result, spec::Codec};
use retort_llama::ChatMessage;
use retort_teacher::{
    capture::{Capture, Target},
    engine::{Engine, Generation, Text, native::Native},
    sampling::{Place, Sampler},
    stage::Arithmetic,
};
use tch::{Kind, Tensor};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage =
        || Error::new(Code::RequestInvalid, "usage: teacher_speed MODEL_FOLDER [ROWS] [NEW_TOKENS] [HEAD] [DRAWS]");
    let dir = PathBuf::from(arguments.next().ok_or_else(usage)?);
    let mut number = |default: u32| arguments.next().map_or(Ok(default), |text| text.parse().map_err(|_| usage()));
    let (rows, max_new_tokens, head, draws) = (number(16)?, number(96)?, number(32)?, number(16)?);
    let device = retort_llama::device_from_flag("auto").map_err(wrong)?;
    let kind = retort_llama::dtype_from_flag("auto", device).map_err(wrong)?;
    let mut engine = Native::load(&dir, &Arithmetic::on(device, kind, None))?;
    let capture = Capture { codec: Codec::HeadDraws { head, draws }, temperatures: vec![], seed: 1 };
    let sampler = Sampler::new(0.7, 0.95, 1);
    let texts = texts(&engine, rows)?;

    let clock = Clock::start();
    let order = Generation { sampler, max_new_tokens: 1, completions: 1 };
    engine.generate(&texts, &order, &capture, &mut |_| Ok(()))?;
    let prompt_tokens: usize = texts.iter().map(|text| text.token_ids.len()).sum();
    clock.tell("prefill", 1, prompt_tokens);

    let clock = Clock::start();
    let order = Generation { sampler, max_new_tokens, completions: 1 };
    let sequences = engine.generate(&texts, &order, &capture, &mut |_| Ok(()))?;
    let targets: usize = sequences.iter().map(|sequence| sequence.positions.len()).sum();
    let steps = sequences.iter().map(|sequence| sequence.positions.len()).max().unwrap_or(0);
    clock.tell("generate, prefill included", steps, targets);

    let vocab = i64::from(engine.capabilities().vocab_size);
    let logits_nv = Tensor::randn([i64::from(rows), vocab], (Kind::Float, device)) * 3.0;
    let targets_n: Vec<Target> = (0..u64::from(rows)).map(|row| Target { row, position: 9, token: 7 }).collect();
    let places_n: Vec<Place> = (0..u64::from(rows)).map(|row| Place { row, position: 9 }).collect();
    let clock = Clock::start();
    for _ in 0..REPEATS {
        capture.positions(&logits_nv, &targets_n)?;
    }
    clock.tell("  of which capture", REPEATS, REPEATS * rows as usize);
    let clock = Clock::start();
    for _ in 0..REPEATS {
        sampler.next(&logits_nv, &places_n, &[])?;
    }
    clock.tell("  of which sampling", REPEATS, REPEATS * rows as usize);
    let hidden_size = retort_llama::Config::from_dir(&dir).map_err(wrong)?.hidden_size;
    let hidden_nh = Tensor::randn([i64::from(rows), hidden_size], (kind, device));
    let head_vh = Tensor::randn([vocab, hidden_size], (kind, device));
    let clock = Clock::start();
    for _ in 0..REPEATS {
        let _logits = hidden_nh.linear(&head_vh, None::<&Tensor>);
    }
    clock.tell("  of which the head", REPEATS, REPEATS * rows as usize);

    let given = sequences.iter().zip(&texts);
    let given: Vec<Text> =
        given.map(|(sequence, text)| Text { token_ids: sequence.token_ids.clone(), ..text.clone() }).collect();
    let clock = Clock::start();
    engine.score(&given, &capture, &mut |_| Ok(()))?;
    clock.tell("score, targets", 1, targets);
    Ok(())
}

const REPEATS: usize = 20;

/// Wall time, and the time this thread had a core: on a busy machine only the second says something,
/// and only with one thread (`OMP_NUM_THREADS=1`).
struct Clock {
    wall: Instant,
    core: f64,
}

impl Clock {
    fn start() -> Self {
        Self { wall: Instant::now(), core: core_seconds() }
    }

    fn tell(self, what: &str, steps: usize, tokens: usize) {
        let (wall, core) = (self.wall.elapsed().as_secs_f64(), core_seconds() - self.core);
        let (steps, tokens) = (steps.max(1) as f64, tokens as f64);
        println!(
            "{what:28} {:8.2} ms a step, {:8.1} tokens/s; on the core {:8.2} ms a step",
            1e3 * wall / steps,
            tokens / wall,
            1e3 * core / steps
        );
    }
}

fn core_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok()).unwrap_or(0.0) * 1e-9
}

fn wrong(error: impl std::fmt::Display) -> Error {
    Error::internal(error.to_string())
}

fn texts(engine: &Native, rows: u32) -> Result<Vec<Text>> {
    let subjects = ["a parcel that never came", "a refund", "changing my address", "a broken kettle", "my invoice"];
    let text = |row: u32| {
        let subject = subjects[row as usize % subjects.len()];
        let content = format!("Customer {row} writes about {subject}. Answer politely and say what happens next.");
        let message = ChatMessage { role: "user".to_owned(), content };
        let token_ids = engine.tokenizer().encode_chat(&[message], true).map_err(wrong)?;
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
