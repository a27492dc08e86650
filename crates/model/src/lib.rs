//! A model's folder but for its numbers: `config.json`, the tokenizer, the chat template, and what the weights' files
//! say they hold.
//!
//! Import, admission and the workers all read through this crate, so a folder that one of them
//! takes is a folder that the others take. Nothing here links libtorch.
//!
//! Errors are `FileNotFound`, `FileUnreadable`, `WeightsTruncated`, `ModelMalformed` (naming the file) and
//! `ModelUnsupported`; a chat template that refuses the messages it is given is `PromptMalformed`.

mod chat_template;
mod config;
mod file;
mod split;
mod text_stream;
mod tokenizer;
mod weights;

pub use chat_template::{ChatMessage, ChatTemplate};
pub use config::{Architecture, Config, Llama3Scaling};
pub use file::open_regular;
pub use split::{TokenFlops, balance_layers, token_flops};
pub use text_stream::TextStream;
pub use tokenizer::{Tokenizer, copy_text_files};
pub use weights::{Dtype, StoredTensor, WeightFile, WeightFolder};
