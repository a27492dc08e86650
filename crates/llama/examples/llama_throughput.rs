//! Tokens a second of a model on this machine: a batch's forward with and without the head, and
//! greedy decoding of a batch. Prints one JSON object.
//!
//! Run it beside the peer it is compared with: absolute figures drift on a shared machine.
//!
//! ```text
//! cargo run -p retort-llama --example llama_throughput -- MODEL [cpu|cuda:0] [f32|bf16]
//! ```

use std::{path::Path, time::Instant};

use retort_llama::{KvCache, Model, Result, device_from_flag, dtype_from_flag};
use serde_json::json;
use tch::{Kind, Tensor};

const ROWS: i64 = 4;
const TOKENS: i64 = 256;
const DECODE_ROWS: i64 = 16;
const PROMPT: i64 = 32;
const STEPS: i64 = 24;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, default: &'static str| arguments.get(at).map_or(default, String::as_str).to_owned();
    let device = device_from_flag(&argument(1, "cpu"))?;
    let kind = dtype_from_flag(&argument(2, "f32"), device)?;
    let model = Model::load(Path::new(&argument(0, "model")), device, kind)?;
    let ids = |rows: i64, tokens: i64| {
        Tensor::randint(model.config().vocab_size, [rows, tokens], (Kind::Int64, tch::Device::Cpu))
    };

    let ids_bt = ids(ROWS, TOKENS);
    let hidden = best_of(3, || Ok(tch::no_grad(|| model.hidden(&ids_bt))?.double_value(&[0, 0, 0])))?;
    let logits = best_of(2, || {
        let hidden_bth = tch::no_grad(|| model.hidden(&ids_bt))?;
        let hidden_nh = hidden_bth.view([ROWS * TOKENS, -1]);
        let mut sum = 0.0;
        for chunk_nh in hidden_nh.split(512, 0) {
            sum += tch::no_grad(|| model.head(&chunk_nh))?.double_value(&[0, 0]);
        }
        Ok(sum)
    })?;
    let prompt_bt = ids(DECODE_ROWS, PROMPT);
    let decode = best_of(2, || {
        let mut cache = KvCache::new(model.config(), DECODE_ROWS, PROMPT + STEPS, device, kind)?;
        let mut hidden_bh = model.prefill(&prompt_bt, &[PROMPT; DECODE_ROWS as usize], &mut cache)?;
        for _ in 0..STEPS {
            let next_b = tch::no_grad(|| model.head(&hidden_bh))?.argmax(-1, false);
            hidden_bh = model.decode(&next_b, &mut cache)?;
        }
        Ok(hidden_bh.double_value(&[0, 0]))
    })?;
    let batch = (ROWS * TOKENS) as f64;
    let figures = json!({
        "device": format!("{device:?}"), "kind": format!("{kind:?}"), "threads": tch::get_num_threads(),
        "forward_without_head_tokens_per_second": batch / hidden,
        "forward_tokens_per_second": batch / logits,
        "decode_16_rows_tokens_per_second": (DECODE_ROWS * STEPS) as f64 / decode,
    });
    println!("{figures:#}");
    Ok(())
}

/// Seconds of the fastest of some runs; the value read waits for a GPU.
fn best_of(runs: usize, mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        std::hint::black_box(run()?);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}
