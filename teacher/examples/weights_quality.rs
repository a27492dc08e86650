//! What narrow weights cost: `make weights-quality`.
//!
//! The teacher answers a few questions; then it scores its answers with its weights kept in f32, bf16,
//! int8 and fp8, and each distribution is compared with the one of the stored weights: mean KL(stored ||
//! narrow) in nats a token, and how often both find the same token likeliest.

use std::path::PathBuf;

use retort_artifact::soft_targets::Position;
use retort_core::{Code, Error, Result, spec::Codec};
use retort_llama::{ChatMessage, Keep};
use retort_teacher::{
    capture::Capture,
    engine::{Engine, Generation, Text, native::Native},
    sampling::Sampler,
    stage::Arithmetic,
};
use tch::{Device, Kind};

const QUESTIONS: [&str; 8] = [
    "My parcel never came. What happens next?",
    "How do I return a broken kettle?",
    "Explain in three sentences why the sky is blue.",
    "Write a haiku about winter.",
    "What is the capital of Portugal, and what is it known for?",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into French and German.",
    "Why does ice float on water?",
];
const NEW_TOKENS: u32 = 160;

fn main() -> Result<()> {
    let usage = || Error::new(Code::RequestInvalid, "usage: weights_quality MODEL_FOLDER");
    let dir = PathBuf::from(std::env::args().nth(1).ok_or_else(usage)?);
    let arithmetic = |keep| Arithmetic::on(Device::Cpu, Kind::Float, None).keeping(keep);
    let mut stored = Native::load(&dir, &arithmetic(Keep::Stored))?;
    let given = answers(&mut stored)?;
    let expected = distributions(&mut stored, &given)?;
    println!("{} tokens\n\n| weights | KL, nats a token | top-1 agreement |\n|---|---|---|", expected.len());
    for keep in [Keep::Stored, Keep::Bf16, Keep::Int8, Keep::F8E4m3] {
        let mut engine = Native::load(&dir, &arithmetic(keep))?;
        let found = distributions(&mut engine, &given)?;
        let count = expected.len() as f64;
        let kl = expected.iter().zip(&found).map(|(a, b)| kl(a, b)).sum::<f64>() / count;
        let alike = expected.iter().zip(&found).filter(|(a, b)| likeliest(a) == likeliest(b)).count();
        println!("| {keep:?} | {kl:.6} | {:.2} % |", 100.0 * alike as f64 / count);
    }
    Ok(())
}

fn answers(engine: &mut Native) -> Result<Vec<Text>> {
    let text = |(row, question): (usize, &&str)| {
        let message = ChatMessage { role: "user".to_owned(), content: (*question).to_owned() };
        let token_ids = engine.tokenizer().encode_chat(&[message], true)?;
        let prompt_tokens = token_ids.len();
        Ok(Text { row: row as u64, row_id: row.to_string(), tags: vec![], token_ids, prompt_tokens })
    };
    let texts: Vec<Text> = QUESTIONS.iter().enumerate().map(text).collect::<Result<_>>()?;
    let capture = Capture { codec: Codec::TopK { head: 1 }, temperatures: vec![], seed: 1 };
    let sampler = Sampler::new(0.7, 0.95, 1);
    let order = Generation { sampler, max_new_tokens: NEW_TOKENS, completions: 1, stop: vec![] };
    let sequences = engine.generate(&texts, &order, &capture, &mut |_| Ok(()))?;
    Ok(texts.into_iter().zip(sequences).map(|(text, done)| Text { token_ids: done.token_ids, ..text }).collect())
}

/// Log-probabilities of the whole vocabulary at every target, by id.
fn distributions(engine: &mut Native, given: &[Text]) -> Result<Vec<Vec<f32>>> {
    let capture = Capture { codec: Codec::Full, temperatures: vec![], seed: 1 };
    let vocab = engine.capabilities().vocab_size as usize;
    let sequences = engine.score(given, &capture, &mut |_| Ok(()))?;
    let spread = |position: &Position| {
        let mut logprobs = vec![f32::NEG_INFINITY; vocab];
        position.head.iter().for_each(|&(id, logprob)| logprobs[id as usize] = logprob);
        logprobs
    };
    Ok(sequences.iter().flat_map(|sequence| &sequence.positions).map(spread).collect())
}

fn kl(expected: &[f32], found: &[f32]) -> f64 {
    let term = |(&p, &q): (&f32, &f32)| f64::from(p).exp() * (f64::from(p) - f64::from(q));
    expected.iter().zip(found).filter(|(p, _)| **p > -80.0).map(term).sum()
}

fn likeliest(logprobs: &[f32]) -> Option<usize> {
    (0..logprobs.len()).max_by(|&a, &b| logprobs[a].total_cmp(&logprobs[b]))
}
