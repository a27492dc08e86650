//! Llama-family models on libtorch: Llama 2 to 3.3, SmolLM, Qwen2 and 2.5, Mistral.
//!
//! The graph is written once and serves both sides: a teacher runs it under [`tch::no_grad`] with
//! a [`KvCache`], a student goes there by [`Model::hidden_taped`] and back by [`Model::backward`]. No call
//! here materialises `positions x vocabulary`: [`Model::hidden`] stops at the final norm, and the caller puts
//! as many positions through [`Model::head`] as it can hold.
//!
//! Shape letters, used at the end of tensor names everywhere:
//! `b` rows of a batch, `t` positions, `h` hidden size, `v` vocabulary, `q` query heads,
//! `k` key-value heads, `g` query heads a key-value head serves, `d` head size, `s` positions
//! attended to, `n` any number of rows.

mod attention;
mod cache;
mod device;
mod error;
mod generate;
mod hash;
mod memory;
mod model;
mod part;
mod random;
mod rope;
mod weights;

pub use cache::KvCache;
pub use device::{device_from_flag, dtype_from_flag};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Sampler, generate, greedy};
pub use hash::{TensorHash, folder_print, folder_sha256, tensor_hashes, tensors_sha256};
pub use memory::numbers;
pub use model::{Cut, Importance, LayerCut, LayerImportance, Masks, Model, Observer, Tape, Weights};
pub use part::{Keep, Part, Piece, Room, Share, host::HostPart, torch::TorchPart};
pub use random::normal;
pub use retort_model::{
    Architecture, ChatMessage, ChatTemplate, Config, Llama3Scaling, TextStream, Tokenizer, copy_text_files,
};
pub use weights::write_tensors;
