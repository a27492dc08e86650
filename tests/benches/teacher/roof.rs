//! The roof: how fast libtorch multiplies matrices of the model's shapes when there is nothing else to do.
//!
//! Scoring must do every product of every layer for every token, and the head's for every target. Whatever
//! the fastest way of cutting the tokens into blocks, those products take this long: their sum is a time
//! that no engine on these products can beat, and the tokens over it the roof.
//!
//! Shapes: n tokens of a block, i inputs, o outputs.

use std::{path::Path, time::Instant};

use retort_llama::Config;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{Failure, answering::Done, work::Request};

/// Tokens of a block, of which the fastest counts; the first is tried whatever its size.
const BLOCKS: [i64; 3] = [512, 1024, 4096];
/// Numbers that a block's outcome may have: the head's over all tokens would be 0.8 GB.
const MOST: i64 = 64 << 20;
/// How often a large product is done in a round; a small one more often.
const REPEATS: usize = 2;

pub struct Roof {
    products: Vec<Product>,
    kind: Kind,
}

struct Product {
    name: &'static str,
    inputs: i64,
    outputs: i64,
    /// How many of them a token goes through.
    times: i64,
}

impl Roof {
    pub fn of(model: &Path, dtype: &str, threads: usize) -> Result<Self, Failure> {
        tch::set_num_threads(i32::try_from(threads)?);
        let config = Config::from_dir(model)?;
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) =
            (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let layers = config.num_hidden_layers;
        let product = |name, inputs, outputs, times| Product { name, inputs, outputs, times };
        let products = vec![
            product("query", hidden, queries, layers),
            product("key", hidden, keys, layers),
            product("value", hidden, keys, layers),
            product("output", queries, hidden, layers),
            product("gate", hidden, wide, layers),
            product("up", hidden, wide, layers),
            product("down", wide, hidden, layers),
            product("head", hidden, config.vocab_size, 1),
        ];
        Ok(Self { products, kind: retort_llama::dtype_from_flag(dtype, Device::Cpu)? })
    }

    /// The tokens of the request and the least time that their products take.
    pub fn work(&self, request: &Request) -> Result<Done, Failure> {
        let tokens: i64 = request.token_ids.iter().map(|ids| ids.len() as i64).sum();
        let _guard = tch::no_grad_guard();
        let (mut seconds, mut detail) = (0.0, Vec::new());
        for product in &self.products {
            let best = self.best(product, tokens)?;
            seconds += best.0 * product.times as f64;
            let operations = 2.0 * (tokens * product.inputs * product.outputs) as f64;
            detail.push(json!({
                "product": product.name, "inputs": product.inputs, "outputs": product.outputs, "times": product.times,
                "block": best.1, "ms": 1e3 * best.0, "gflops": operations / best.0 / 1e9,
            }));
        }
        Ok(Done { tokens: tokens as u64, seconds, detail: detail.into() })
    }

    /// Least seconds of one product over all tokens, and the block that had them.
    fn best(&self, product: &Product, tokens: i64) -> Result<(f64, i64), Failure> {
        let weight_oi = Tensor::f_randn([product.outputs, product.inputs], (Kind::Float, Device::Cpu))?;
        let weight_oi = weight_oi.f_to_kind(self.kind)?;
        let mut best = (f64::INFINITY, 0);
        for block in BLOCKS.map(|block| block.min(tokens)) {
            if best.1 > 0 && block * product.outputs > MOST {
                break;
            }
            let given_ni =
                Tensor::f_randn([block, product.inputs], (Kind::Float, Device::Cpu))?.f_to_kind(self.kind)?;
            let blocks = tokens.div_euclid(block).max(1);
            let repeats = REPEATS * (MOST / (block * product.outputs * blocks).max(1)).clamp(1, 8) as usize;
            let _warm_no = given_ni.f_linear(&weight_oi, None::<&Tensor>)?;
            for _ in 0..repeats {
                let started = Instant::now();
                for _ in 0..blocks {
                    let _given_no = given_ni.f_linear(&weight_oi, None::<&Tensor>)?;
                }
                let rest = tokens as f64 / (block * blocks) as f64;
                let seconds = started.elapsed().as_secs_f64() * rest;
                if seconds < best.0 {
                    best = (seconds, block);
                }
            }
        }
        Ok(best)
    }
}
