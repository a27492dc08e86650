//! A checkpoint in the structure of Llama 3.1 405B: 126 layers, 128 heads over 8 KV heads, 128,256 tokens,
//! llama3 RoPE scaling, an untied head, bf16, 191 files and their index. Only the width is shrunk, 64 times.
//!
//! Hidden size and MLP keep the real one's proportion. A head is not 2 numbers wide, which would be a 64th
//! of 128, but 8: that is the least at which RoPE's scaling has frequencies of all three kinds, one that is
//! kept, one that is scaled, and one in between. Two thirds of the numbers lie in the layers, as many a layer
//! as in the next; embedding and head, which shrink in one direction only, weigh more than in the real one.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    ops::Range,
    path::{Path, PathBuf},
};

use retort_artifact::{sha256_file, sha256_hex};
use retort_core::random::{Counter, Purpose};
use retort_llama::{Config, Part};
use serde_json::{Map, Value, json};

use crate::{Failure, vocabulary};

pub const FILES: usize = 191;
/// The real one's are 16,384, 53,248 and 128.
pub const HIDDEN: i64 = 256;
pub const INNER: i64 = 832;
pub const HEAD_DIM: i64 = 8;
/// Written last: what is in the folder.
const MANIFEST: &str = "rehearsal.json";
/// Of what `write` writes; another one makes earlier checkpoints void.
const RECIPE: u32 = 1;

/// A checkpoint that is there, whole.
pub struct Checkpoint {
    pub folder: PathBuf,
    pub config: Config,
    /// Name of each tensor's file.
    files: BTreeMap<String, String>,
}

impl Checkpoint {
    /// The one in `folder`, which is written, or written again, unless it is whole.
    pub fn ready(folder: &Path) -> Result<Self, Failure> {
        match whole(folder) {
            Ok(()) => println!("checkpoint     {} is there, its 191 files as their SHA-256 says", folder.display()),
            Err(why) => {
                println!("checkpoint     writes {}: {why}", folder.display());
                if folder.exists() {
                    fs::remove_dir_all(folder)?;
                }
                write(folder)?;
            }
        }
        let index: Value = serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json"))?)?;
        let files = serde_json::from_value(index["weight_map"].clone())?;
        Ok(Self { folder: folder.to_owned(), config: Config::from_dir(folder)?, files })
    }

    pub fn tensors(&self) -> usize {
        self.files.len()
    }

    pub fn parameters(&self) -> u64 {
        self.config.tensors().iter().map(|(_, shape)| numbers(shape)).sum()
    }

    /// Bytes of a part's tensors, and the files in which they lie.
    pub fn of(&self, part: &Part) -> (u64, Vec<String>) {
        let tensors = part.tensors(&self.config);
        let bytes = tensors.iter().map(|(_, shape)| 2 * numbers(shape)).sum();
        let mut files: Vec<String> = tensors.iter().filter_map(|(name, _)| self.files.get(name).cloned()).collect();
        files.sort();
        files.dedup();
        (bytes, files)
    }
}

/// Whether the manifest is this recipe's and every file is what it says.
fn whole(folder: &Path) -> Result<(), String> {
    let path = folder.join(MANIFEST);
    let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let manifest: Value = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    if manifest["recipe"] != json!(recipe()) {
        return Err("the one there is of another recipe".to_owned());
    }
    let files = manifest["files"].as_object().ok_or("its manifest names no files")?;
    for (name, expected) in files {
        let sha256 = sha256_file(&folder.join(name)).map_err(|error| error.to_string())?;
        if *expected != json!(sha256) {
            return Err(format!("{name} is not what was written"));
        }
    }
    Ok(())
}

fn recipe() -> String {
    sha256_hex(format!("{RECIPE} {}", config()).as_bytes())
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "head_dim": HEAD_DIM, "vocab_size": vocabulary::SIZE,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": false, "bos_token_id": vocabulary::BEGIN, "eos_token_id": vocabulary::ENDS,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    })
}

fn write(folder: &Path) -> Result<(), Failure> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("config.json"), config().to_string())?;
    vocabulary::write(folder)?;
    let tensors = Config::from_dir(folder)?.tensors();
    let sizes: Vec<u64> = tensors.iter().map(|(_, shape)| 2 * numbers(shape)).collect();
    let mut map = BTreeMap::new();
    for (file, share) in cut(&sizes, FILES).into_iter().enumerate() {
        let name = format!("model-{:05}-of-{FILES:05}.safetensors", file + 1);
        let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
        let mut end = 0;
        for at in share.clone() {
            let (tensor, shape) = &tensors[at];
            let offsets = [end, end + sizes[at]];
            end = offsets[1];
            header.insert(tensor.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": offsets }));
            map.insert(tensor.clone(), name.clone());
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = fs::File::create(folder.join(&name))?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for at in share {
            let (tensor, shape) = &tensors[at];
            out.write_all(&weights(at as u64, tensor, numbers(shape)))?;
        }
    }
    let index = json!({ "metadata": { "total_size": sizes.iter().sum::<u64>() }, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;

    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, sha256_file(&path)?);
    }
    let part = folder.join(format!("{MANIFEST}.part"));
    fs::write(&part, json!({ "recipe": recipe(), "files": files }).to_string())?;
    fs::rename(part, folder.join(MANIFEST))?;
    Ok(())
}

/// Tensors in their order over `files` files: the first and the last tensor, which are the largest, have
/// one each, as in the real checkpoint, and the others share the rest in about equal parts, which end in
/// the middle of a layer as often as not.
fn cut(sizes: &[u64], files: usize) -> Vec<Range<usize>> {
    let last = sizes.len() - 1;
    let total: u64 = sizes[1..last].iter().sum();
    let mut begins = vec![0];
    let (mut before, mut file) = (0, None);
    for (at, size) in sizes.iter().enumerate().take(last).skip(1) {
        let own = before * (files as u64 - 2) / total;
        if file != Some(own) {
            begins.push(at);
        }
        (before, file) = (before + size, Some(own));
    }
    begins.extend([last, sizes.len()]);
    assert_eq!(begins.len(), files + 1, "every file has a tensor");
    begins.windows(2).map(|ends| ends[0]..ends[1]).collect()
}

/// Uniform numbers in bf16, of a size that keeps hidden states from vanishing or growing, and with it
/// distributions in which some tokens are likely: with flat ones nothing would be worth comparing.
fn weights(index: u64, tensor: &str, count: u64) -> Vec<u8> {
    let most = match tensor {
        "lm_head.weight" => 0.5,
        "model.embed_tokens.weight" => 1.0,
        _ => 0.1,
    };
    let norm = tensor.ends_with("norm.weight");
    let mut draws = Counter::new(405, Purpose::Init, index, 0);
    let mut bytes = Vec::with_capacity(2 * count as usize);
    for _ in 0..count.div_ceil(4) {
        // Four numbers of sixteen bits from each draw.
        let draw = draws.next_u64();
        for lane in 0..4 {
            let uniform = f32::from((draw >> (16 * lane)) as u16) / 32_768.0 - 1.0;
            let number: f32 = if norm { 1.0 + 0.1 * uniform } else { most * uniform };
            // bf16 is the upper half of an f32.
            bytes.extend_from_slice(&((number.to_bits() >> 16) as u16).to_le_bytes());
        }
    }
    bytes.truncate(2 * count as usize);
    bytes
}

fn numbers(shape: &[i64]) -> u64 {
    shape.iter().map(|side| side.unsigned_abs()).product()
}
