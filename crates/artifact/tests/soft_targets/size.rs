//! What a shard weighs, on distributions of the shape of a 135 M model's; `docs/fidelity.md` has real ones.

use retort_artifact::soft_targets::{Limits, TailLogprobs, describe, encode};
use retort_core::spec::Codec;

use crate::sample;

/// Bytes a target token, without the footer, and entries a position.
fn weigh(codec: Codec) -> (f64, f64) {
    let mut header = sample::with_codec(49_152, codec);
    header.tail_logprobs = TailLogprobs::Mean(0.0);
    let encoded = encode(&header, &sample::sequences(&header, 4, 64)).unwrap();
    let description = describe(encoded.bytes, Limits::default(), 0).unwrap();
    let columns: u64 = description.columns.iter().map(|column| column.bytes).sum();
    (columns as f64 / description.target_tokens as f64, description.mean_support)
}

#[test]
fn an_entry_takes_about_two_bytes_and_a_position_a_dozen_more() {
    for (codec, an_entry) in [
        (Codec::TopK { head: 50 }, 2.6),
        (Codec::HeadDraws { head: 32, draws: 16 }, 2.6),
        (Codec::Threshold { threshold: 0.025 }, 2.6),
    ] {
        let (bytes, entries) = weigh(codec);
        assert!(bytes < 14.0 + an_entry * entries, "{codec:?}: {bytes} bytes for {entries} entries");
    }
}

#[test]
fn a_whole_distribution_takes_less_than_a_byte_a_token_of_the_vocabulary() {
    let (bytes, entries) = weigh(Codec::Full);
    assert_eq!(entries, 49_152.0);
    assert!(bytes < 49_152.0, "{bytes}");
}
