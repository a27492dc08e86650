//! Takes a model out: a Hugging Face folder of the Llama family becomes one GGUF file (version 3) that llama.cpp
//! and its kin load, with the tokenizer, the chat template and every weight inside.
//!
//! The path of an export: the folder's configuration, tokenizer and the headers of its weights are read and checked
//! whole, so that the file's every byte has its place before the first is written; then the tensors stream through,
//! a few megabytes at a time. The file appears under its name when it is whole, or not at all.
//!
//! The same folder, name and type make the same bytes. What GGUF cannot say is an error, never left out in silence;
//! docs/formats/gguf.md lists it.

mod encode;
mod gguf;
mod header;
mod metadata;
mod tensors;
mod tokenizer;
mod unfinished;

pub use gguf::{Gguf, Progress, check, file_name};
pub use unfinished::Unfinished;
