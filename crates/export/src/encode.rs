//! Values as GGML stores them.

use half::{bf16, f16, slice::HalfFloatSliceExt as _};
use retort_import::gguf::Kind;

/// Values a block of Q8_0.
pub(crate) const BLOCK: usize = 32;

/// Appends finite values to `bytes`; of Q8_0 whole blocks.
///
/// # Errors
/// The first value that the kind cannot hold.
pub(crate) fn encode(kind: Kind, values: &[f32], bytes: &mut Vec<u8>) -> Result<(), f32> {
    match kind {
        Kind::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
            match halves.iter().position(|half| !half.is_finite()) {
                Some(at) => Err(values[at]),
                None => Ok(()),
            }
        }
        Kind::BF16 => {
            let halves = values.iter().map(|value| bf16::from_f32(*value));
            bytes.extend(halves.clone().flat_map(bf16::to_le_bytes));
            values.iter().zip(halves).find(|(_, half)| !half.is_finite()).map_or(Ok(()), |(value, _)| Err(*value))
        }
        Kind::Q8_0 => values.as_chunks::<BLOCK>().0.iter().try_for_each(|block| q8_0(block, bytes)),
        _ => {
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            Ok(())
        }
    }
}

/// An f16 scale, the largest magnitude over 127, and each value over the scale, rounded half away from zero. Divided by
/// the scale in f32, before it is rounded to f16, as GGML's reference does.
fn q8_0(block: &[f32; BLOCK], bytes: &mut Vec<u8>) -> Result<(), f32> {
    let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let stored = f16::from_f32(scale);
    bytes.extend(stored.to_le_bytes());
    // The cast saturates.
    bytes.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
    if stored.is_finite() { Ok(()) } else { Err(largest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(kind: Kind, values: &[f32]) -> Result<Vec<u8>, f32> {
        let mut bytes = Vec::new();
        encode(kind, values, &mut bytes).map(|()| bytes)
    }

    #[test]
    fn a_block_is_its_scale_and_what_is_left() {
        let mut block = [0f32; BLOCK];
        block[..6].copy_from_slice(&[127.0, -127.0, 0.5, -0.5, 2.5, 0.49]);
        let bytes = encoded(Kind::Q8_0, &block).unwrap();
        assert_eq!(bytes.len(), 34);
        assert_eq!(f16::from_le_bytes([bytes[0], bytes[1]]), f16::ONE);
        // Half goes away from zero, on both sides.
        assert_eq!(bytes[2..8].iter().map(|byte| *byte as i8).collect::<Vec<_>>(), [127, -127, 1, -1, 3, 0]);
        assert_eq!(encoded(Kind::Q8_0, &[0.0; BLOCK]).unwrap(), [0; 34]);
    }

    #[test]
    fn what_comes_back_is_within_half_a_step() {
        let block: [f32; BLOCK] = std::array::from_fn(|i| ((i * 37 % 64) as f32 - 31.5) * 0.013);
        let mut back = Vec::new();
        Kind::Q8_0.dequantise(&encoded(Kind::Q8_0, &block).unwrap(), &mut back);
        let step = block.iter().fold(0f32, |largest, value| largest.max(value.abs())) / 127.0;
        for (value, back) in block.iter().zip(&back) {
            // The scale itself is rounded to f16's 11 bits.
            assert!((value - back).abs() <= 0.5 * step + value.abs() / 2048.0, "{value} {back}");
        }
    }

    #[test]
    fn a_value_that_does_not_fit_is_named() {
        assert_eq!(encoded(Kind::F16, &[1.0, 65504.0, -70000.0]).unwrap_err(), -70000.0);
        assert_eq!(encoded(Kind::BF16, &[f32::MAX]).unwrap_err(), f32::MAX);
        let mut block = [1f32; BLOCK];
        block[3] = -1e7;
        assert_eq!(encoded(Kind::Q8_0, &block).unwrap_err(), 1e7);
        assert_eq!(encoded(Kind::F16, &[65504.0]).unwrap(), f16::MAX.to_le_bytes());
        assert_eq!(encoded(Kind::F32, &[f32::MAX]).unwrap(), f32::MAX.to_le_bytes());
    }
}
