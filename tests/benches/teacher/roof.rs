//! The roof: how fast libtorch multiplies matrices of the model's shapes when there is nothing else to do.
//!
//! Scoring must do every product of every layer for every token, and the head's for every target. Here
//! they are done in the model's order, on weights of their own, and nothing between them: the tokens over
//! that time are the roof. Each kind of product cuts the tokens into the blocks that were fastest for it
//! when it was tried, before the first round.
//!
//! Shapes: n tokens of a block, i inputs, o outputs.

use std::{path::Path, time::Instant};

use retort_llama::Config;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{Failure, answering::Done, work::Request};

/// Tokens of a block, of which the fastest is taken; the first is tried whatever its size.
const BLOCKS: [i64; 3] = [512, 1024, 4096];
/// Numbers that a block's outcome may have: the head's over all tokens would be 0.8 GB.
const MOST: i64 = 64 << 20;
/// How often each block is tried; the least time counts.
const TRIES: usize = 4;

pub struct Roof {
    products: Vec<Product>,
    /// How many layers have all products but the last, the head.
    layers: usize,
    kind: Kind,
    /// The fastest block of each product, for so many tokens.
    blocks: Option<(i64, Vec<i64>)>,
}

struct Product {
    name: &'static str,
    inputs: i64,
    outputs: i64,
    /// A layer's each, `[o, i]`; the head has one.
    weights_oi: Vec<Tensor>,
}

impl Roof {
    pub fn of(model: &Path, dtype: &str, threads: usize) -> Result<Self, Failure> {
        tch::set_num_threads(i32::try_from(threads)?);
        let config = Config::from_dir(model)?;
        let kind = retort_llama::dtype_from_flag(dtype, Device::Cpu)?;
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) =
            (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let layers = usize::try_from(config.num_hidden_layers)?;
        let product = |name, inputs, outputs, times| -> Result<Product, Failure> {
            let weight = |_| Tensor::f_randn([outputs, inputs], (Kind::Float, Device::Cpu))?.f_to_kind(kind);
            let weights_oi = (0..times).map(weight).collect::<Result<_, _>>()?;
            Ok(Product { name, inputs, outputs, weights_oi })
        };
        let products = vec![
            product("query", hidden, queries, layers)?,
            product("key", hidden, keys, layers)?,
            product("value", hidden, keys, layers)?,
            product("output", queries, hidden, layers)?,
            product("gate", hidden, wide, layers)?,
            product("up", hidden, wide, layers)?,
            product("down", wide, hidden, layers)?,
            product("head", hidden, config.vocab_size, 1)?,
        ];
        Ok(Self { products, layers, kind, blocks: None })
    }

    /// The tokens of the request and the time that their products take.
    pub fn work(&mut self, request: &Request) -> Result<Done, Failure> {
        let tokens: i64 = request.token_ids.iter().map(|ids| ids.len() as i64).sum();
        let _guard = tch::no_grad_guard();
        let blocks = match self.blocks.take() {
            Some((of, blocks)) if of == tokens => blocks,
            _ => self.products.iter().map(|product| self.fastest(product, tokens)).collect::<Result<_, _>>()?,
        };
        let given = self.products.iter().zip(&blocks).map(|(product, block)| self.given(product, *block));
        let given: Vec<Tensor> = given.collect::<Result<_, _>>()?;
        let mut spent = vec![0.0; self.products.len()];
        for layer in 0..=self.layers {
            for (at, product) in self.products.iter().enumerate() {
                let is_head = at + 1 == self.products.len();
                if is_head == (layer == self.layers) {
                    spent[at] += multiply(&given[at], &product.weights_oi[if is_head { 0 } else { layer }], tokens)?;
                }
            }
        }
        let detail: Vec<_> = self
            .products
            .iter()
            .zip(&spent)
            .zip(&blocks)
            .map(|((product, seconds), block)| {
                let times = product.weights_oi.len();
                let operations = 2.0 * (tokens * product.inputs * product.outputs) as f64 * times as f64;
                json!({
                    "product": product.name, "inputs": product.inputs, "outputs": product.outputs, "times": times,
                    "block": block, "ms": 1e3 * seconds, "gflops": operations / seconds / 1e9,
                })
            })
            .collect();
        self.blocks = Some((tokens, blocks));
        Ok(Done { tokens: tokens as u64, seconds: spent.iter().sum(), detail: detail.into() })
    }

    /// Activations of a block, `[n, i]`.
    fn given(&self, product: &Product, block: i64) -> Result<Tensor, Failure> {
        Ok(Tensor::f_randn([block, product.inputs], (Kind::Float, Device::Cpu))?.f_to_kind(self.kind)?)
    }

    /// The block in which one product over all tokens takes least.
    fn fastest(&self, product: &Product, tokens: i64) -> Result<i64, Failure> {
        let mut best = (f64::INFINITY, 0);
        for block in BLOCKS.map(|block| block.min(tokens)) {
            if best.1 > 0 && block * product.outputs > MOST {
                break;
            }
            let given_ni = self.given(product, block)?;
            for weight_oi in product.weights_oi.iter().cycle().take(TRIES) {
                let seconds = multiply(&given_ni, weight_oi, tokens)?;
                if seconds < best.0 {
                    best = (seconds, block);
                }
            }
        }
        Ok(best.1)
    }
}

/// Seconds for all tokens, a block after another.
fn multiply(given_ni: &Tensor, weight_oi: &Tensor, tokens: i64) -> Result<f64, Failure> {
    let block = given_ni.size()[0];
    let started = Instant::now();
    for first in (0..tokens).step_by(usize::try_from(block)?) {
        let rows = block.min(tokens - first);
        let _given_no = given_ni.f_narrow(0, 0, rows)?.f_linear(weight_oi, None::<&Tensor>)?;
    }
    Ok(started.elapsed().as_secs_f64())
}
