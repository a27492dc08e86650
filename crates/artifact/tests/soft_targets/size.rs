//! What a shard weighs, on distributions of the shape of a 135 M model's.

use retort_artifact::soft_targets::{Limits, describe, encode};

use crate::sample;

#[test]
fn a_token_takes_about_two_and_a_half_bytes_an_entry() {
    let header = sample::header(49_152, 32, 16);
    let sequences = sample::sequences(&header, 4, 64);
    let encoded = encode(&header, &sequences).unwrap();
    let description = describe(encoded.bytes, Limits::default(), 0).unwrap();
    let of = |name: &str| description.columns.iter().find(|column| column.name == name).unwrap().bytes as f64;
    let tokens = description.target_tokens as f64;
    let per_entry = (of("support_delta") + of("count") + of("logprob_q")) / tokens / description.mean_support;
    assert!(per_entry < 2.9, "{per_entry} bytes an entry: {description:#?}");
    let rest: f64 = description.columns.iter().map(|column| column.bytes as f64).sum::<f64>() / tokens
        - per_entry * description.mean_support;
    assert!(rest < 22.0, "{rest} bytes a token besides: {description:#?}");
}
