//! The whole numbers of a spec and their bounds: what checks one and what explains that a value is none read the same.

use super::{Init, JobSpec, MAX_HEAD, Parallel, Prune, lora::MAX_RANK, validate::count};
use crate::Result;

/// Path, least, most, and the value where a spec has one.
type Count = (&'static str, u32, u32, fn(&JobSpec) -> Option<u32>);

/// Without `draws`, whose bounds are the codec's.
const COUNTS: &[Count] = &[
    ("prompts.shard_rows", 1, 4096, |spec| Some(spec.prompts.shard_rows)),
    ("teacher.sampling.max_new_tokens", 1, 131_072, |spec| Some(spec.teacher.sampling.max_new_tokens)),
    ("teacher.sampling.top_k", 0, 1 << 24, |spec| Some(spec.teacher.sampling.top_k)),
    ("teacher.sampling.completions", 1, 256, |spec| Some(spec.teacher.sampling.completions)),
    ("teacher.soft_targets.head", 1, MAX_HEAD, elsewhere),
    ("student.init.prune.hidden_size", 1, 1 << 17, |spec| prune(spec)?.hidden_size),
    ("student.init.prune.intermediate_size", 1, 1 << 20, |spec| prune(spec)?.intermediate_size),
    ("student.init.prune.num_attention_heads", 1, 1024, |spec| prune(spec)?.num_attention_heads),
    ("student.init.prune.num_key_value_heads", 1, 1024, |spec| prune(spec)?.num_key_value_heads),
    // A student holds these rows at once to measure by.
    ("student.init.prune.calibration_rows", 1, 1024, |spec| Some(prune(spec)?.calibration_rows)),
    ("student.init.config.hidden_size", 8, 65_536, |spec| Some(config(spec)?[0])),
    ("student.init.config.intermediate_size", 8, 262_144, |spec| Some(config(spec)?[1])),
    ("student.init.config.num_hidden_layers", 1, 1024, |spec| Some(config(spec)?[2])),
    ("student.init.config.num_attention_heads", 1, 1024, |spec| Some(config(spec)?[3])),
    ("student.init.config.num_key_value_heads", 1, 1024, |spec| Some(config(spec)?[4])),
    ("student.lora.rank", 1, MAX_RANK, elsewhere),
    ("train.passes", 1, 10_000, |spec| Some(spec.train.passes)),
    ("train.batch_rows", 1, 65_536, |spec| Some(spec.train.batch_rows)),
    // Fewer tokens starve every product, more are never in a step.
    ("train.micro_batch_tokens", 16, 1 << 20, |spec| spec.train.micro_batch_tokens),
    ("train.checkpoint_steps", 0, u32::MAX, |spec| Some(spec.train.checkpoint_steps)),
    ("train.parallel.workers", 1, 64, |spec| Some(parallel(spec)?.workers)),
    ("train.parallel.inner_steps", 1, 100_000, |spec| Some(parallel(spec)?.inner_steps)),
    ("train.keep.last", 1, 1000, |spec| Some(spec.train.keep.last)),
];

impl JobSpec {
    /// The first whole number out of its bounds.
    pub(super) fn check_counts(&self) -> Result<()> {
        COUNTS.iter().try_for_each(|(path, least, most, value)| match value(self) {
            Some(value) => count(path, value, *least, *most),
            None => Ok(()),
        })
    }
}

/// Least and most of the whole number at this path, as in `train.passes`.
pub(super) fn bounds(path: &str) -> Option<(u32, u32)> {
    COUNTS.iter().find(|(listed, ..)| *listed == path).map(|(_, least, most, _)| (*least, *most))
}

/// Of a number that is also checked outside of specs, and there.
fn elsewhere(_: &JobSpec) -> Option<u32> {
    None
}

fn prune(spec: &JobSpec) -> Option<&Prune> {
    match &spec.student.init {
        Init::Prune(prune) => Some(prune),
        _ => None,
    }
}

/// The sizes of `student.init.config`, in the order of its keys.
fn config(spec: &JobSpec) -> Option<[u32; 5]> {
    match spec.student.init {
        Init::Config {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
        } => Some([hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads]),
        _ => None,
    }
}

fn parallel(spec: &JobSpec) -> Option<&Parallel> {
    spec.train.parallel.as_ref()
}
