//! What must hold for any bytes that the soft-target decoder is given.
//!
//! The fuzzer calls [`check`] on what it makes up, `cargo test` on every file of `corpus/decode`.

use bytes::Bytes;
use retort_artifact::soft_targets::{DecodedSequence, Header, Limits, Shard, SparseTargets, decode, describe};
use retort_core::{Code, Error, spec::Codec};

/// Small, so that a file which takes more than it should stands out.
pub const LIMITS: Limits = Limits { max_bytes: 64 << 10, max_rows: 64, max_tokens_per_row: 1024, max_entries: 1 << 14 };

/// Most that rounding may add to a position's masses, as the format has it.
const MASS_TOLERANCE: f64 = 1e-3;
/// Longest message of an error, bytes: a file must not choose how much is logged.
const MAX_MESSAGE: usize = 2 << 10;
/// Rows of which the description tells each.
const DESCRIBED: usize = 2;

/// Decodes and describes a file; whether it is a sound shard.
///
/// Panics where one of the two does not keep what it promises: a refusal has one of the codes of a
/// damaged file, both agree, and what is handed out keeps the invariants of [`SparseTargets`].
pub fn check(file: &[u8]) -> bool {
    let bytes = Bytes::copy_from_slice(file);
    match (decode(bytes.clone(), LIMITS), describe(bytes, LIMITS, DESCRIBED)) {
        (Ok(shard), Ok(description)) => {
            check_shard(&shard);
            assert_eq!(description.header, shard.header);
            assert_eq!(description.rows, shard.sequences.len() as u64);
            assert_eq!(description.target_tokens, shard.target_tokens());
            assert_eq!(description.sequences.len(), shard.sequences.len().min(DESCRIBED));
            for number in [description.bytes_per_token, description.mean_support, description.mean_tail_mass] {
                assert!(number.is_finite() && number >= 0.0, "a description says {number}");
            }
            assert!(description.teacher_perplexity >= 0.0, "its perplexity is {}", description.teacher_perplexity);
            true
        }
        (Err(decoded), Err(described)) => {
            check_refusal(&decoded);
            // Decoding holds all row groups at once, so it counts them together before it reads one.
            let together = decoded.code == Code::ObjectTooLarge;
            assert!(together || decoded.code == described.code, "decode says {decoded}, describe says {described}");
            false
        }
        (Ok(_), Err(error)) => panic!("it is decoded, but not described: {error}"),
        (Err(error), Ok(_)) if error.code == Code::ObjectTooLarge => false,
        (Err(error), Ok(_)) => panic!("it is described, but not decoded: {error}"),
    }
}

fn check_refusal(error: &Error) {
    let known = matches!(error.code, Code::ShardCorrupt | Code::ShardTooNew | Code::ObjectTooLarge);
    assert!(known, "a file is refused with {:?}: {error}", error.code);
    let length = error.to_string().len();
    assert!(length <= MAX_MESSAGE, "a refusal takes {length} bytes: {:.200}", error.to_string());
}

fn check_shard(shard: &Shard) {
    assert!(shard.sequences.len() as u64 <= LIMITS.max_rows);
    let entries: u64 = shard.sequences.iter().map(|sequence| sequence.targets.ids.len() as u64).sum();
    assert!(entries <= LIMITS.max_entries + LIMITS.max_rows, "{entries} entries");
    for sequence in &shard.sequences {
        check_sequence(sequence, &shard.header);
    }
}

fn check_sequence(sequence: &DecodedSequence, header: &Header) {
    let vocab_size = header.vocab_size;
    let DecodedSequence { token_ids, target_mask, targets, .. } = sequence;
    assert!(token_ids.len() as u64 <= LIMITS.max_tokens_per_row);
    assert!(token_ids.iter().all(|&id| id < vocab_size), "a token is outside the vocabulary");
    assert_eq!(target_mask.len(), token_ids.len());
    assert_ne!(target_mask.first(), Some(&true), "the first token is a target");
    let positions = target_mask.iter().filter(|&&target| target).count();
    assert_eq!(targets.len(), positions);
    assert_eq!((targets.offsets.len(), targets.top_ids.len()), (positions + 1, positions));
    let entries = targets.ids.len();
    assert_eq!([targets.masses.len(), targets.logprobs.len(), targets.heads.len()], [entries; 3]);
    assert_eq!((targets.offsets[0], targets.offsets[positions]), (0, entries as u32));
    for p in 0..positions {
        check_position(targets, p, header);
    }
}

fn check_position(targets: &SparseTargets, p: usize, header: &Header) {
    let vocab_size = header.vocab_size;
    let range = targets.range(p);
    assert!(range.start < range.end, "position {p} has no support");
    let ids = &targets.ids[range.clone()];
    assert!(ids.is_sorted_by(|a, b| a < b), "ids of position {p} do not rise: {ids:?}");
    assert!(ids.iter().all(|&id| id < vocab_size), "an id of position {p} is outside the vocabulary: {ids:?}");
    assert!(ids.binary_search(&targets.top_ids[p]).is_ok(), "the likeliest token of position {p} has no mass");
    let masses = &targets.masses[range.clone()];
    assert!(masses.iter().all(|&mass| mass.is_finite() && mass >= 0.0), "masses of position {p}: {masses:?}");
    let residual = targets.residuals[p];
    assert!((0.0..=1.0).contains(&residual), "the residual of position {p} is {residual}");
    let whole: f64 = masses.iter().chain([&residual]).map(|&mass| f64::from(mass)).sum();
    // Below where nothing was drawn: then the tail's mass belongs to no entry. Above where the one sample
    // of a light tail weighs more than the tail.
    let above = match header.soft_targets.codec {
        Codec::Threshold { threshold } => threshold,
        _ => 0.0,
    };
    assert!(whole <= 1.0 + above + 2.0 * MASS_TOLERANCE, "masses of position {p} sum to {whole}");
    let temperatures = header.soft_targets.temperatures.len();
    assert_eq!(targets.log_sum_exps.len(), temperatures * targets.len());
    assert!(targets.log_sum_exps.iter().all(|value| value.is_finite()), "a log-sum-exp is not finite");
    let label = targets.label_logprobs[p];
    for &logprob in targets.logprobs[range].iter().chain([&label]) {
        let sound = logprob.is_finite() && f64::from(logprob) <= 2.0 * MASS_TOLERANCE;
        assert!(sound, "a log-probability of position {p} is {logprob}");
    }
}
