//! GGML's block formats, dequantised to f32 in the reference's order of operations, so that the
//! result is equal bit for bit.

use half::{bf16, f16};

/// How a tensor's values are stored. `Q4_K` and its kin are super-blocks of 256 values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl Kind {
    pub(crate) const ALL: [Kind; 11] = [
        Kind::F32,
        Kind::F16,
        Kind::BF16,
        Kind::Q4_0,
        Kind::Q4_1,
        Kind::Q5_0,
        Kind::Q5_1,
        Kind::Q8_0,
        Kind::Q4K,
        Kind::Q5K,
        Kind::Q6K,
    ];

    /// GGML's number, name, values a block, bytes a block.
    const fn facts(self) -> (u32, &'static str, u64, u64) {
        match self {
            Kind::F32 => (0, "F32", 1, 4),
            Kind::F16 => (1, "F16", 1, 2),
            Kind::BF16 => (30, "BF16", 1, 2),
            Kind::Q4_0 => (2, "Q4_0", 32, 18),
            Kind::Q4_1 => (3, "Q4_1", 32, 20),
            Kind::Q5_0 => (6, "Q5_0", 32, 22),
            Kind::Q5_1 => (7, "Q5_1", 32, 24),
            Kind::Q8_0 => (8, "Q8_0", 32, 34),
            Kind::Q4K => (12, "Q4_K", 256, 144),
            Kind::Q5K => (13, "Q5_K", 256, 176),
            Kind::Q6K => (14, "Q6_K", 256, 210),
        }
    }

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Kind::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// GGML's number of it.
    pub fn number(self) -> u32 {
        self.facts().0
    }

    pub fn name(self) -> &'static str {
        self.facts().1
    }

    pub fn block_values(self) -> u64 {
        self.facts().2
    }

    pub fn block_bytes(self) -> u64 {
        self.facts().3
    }

    /// Appends the values of whole blocks to `values`; a rest shorter than a block is ignored.
    pub fn dequantise(self, blocks: &[u8], values: &mut Vec<f32>) {
        match self {
            Kind::F32 => values.extend(blocks.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
            Kind::F16 => values.extend(blocks.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
            Kind::BF16 => values.extend(blocks.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
            Kind::Q4_0 => blocks.as_chunks::<18>().0.iter().for_each(|block| {
                let scale = half(block, 0);
                values.extend(nibbles(&block[2..]).map(|q| scale * (f32::from(q) - 8.0)));
            }),
            Kind::Q4_1 => blocks.as_chunks::<20>().0.iter().for_each(|block| {
                let (scale, min) = (half(block, 0), half(block, 2));
                values.extend(nibbles(&block[4..]).map(|q| scale * f32::from(q) + min));
            }),
            Kind::Q5_0 => blocks.as_chunks::<22>().0.iter().for_each(|block| {
                let scale = half(block, 0);
                values.extend(five_bits(&block[2..6], &block[6..]).map(|q| scale * (f32::from(q) - 16.0)));
            }),
            Kind::Q5_1 => blocks.as_chunks::<24>().0.iter().for_each(|block| {
                let (scale, min) = (half(block, 0), half(block, 2));
                values.extend(five_bits(&block[4..8], &block[8..]).map(|q| scale * f32::from(q) + min));
            }),
            Kind::Q8_0 => blocks.as_chunks::<34>().0.iter().for_each(|block| {
                let scale = half(block, 0);
                values.extend(block[2..].iter().map(|q| f32::from(*q as i8) * scale));
            }),
            Kind::Q4K => blocks.as_chunks::<144>().0.iter().for_each(|block| q4_k(block, values)),
            Kind::Q5K => blocks.as_chunks::<176>().0.iter().for_each(|block| q5_k(block, values)),
            Kind::Q6K => blocks.as_chunks::<210>().0.iter().for_each(|block| q6_k(block, values)),
        }
    }
}

/// What GGML calls a number that retort does not read, for error messages.
pub(crate) fn foreign_name(number: u32) -> Option<&'static str> {
    Some(match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return None,
    })
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The low nibbles of all bytes, then the high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|byte| byte & 15).chain(bytes.iter().map(|byte| byte >> 4))
}

/// As [`nibbles`], the fifth bit of value `i` being bit `i` of `high`.
fn five_bits<'a>(high: &'a [u8], low: &'a [u8]) -> impl Iterator<Item = u8> + 'a {
    nibbles(low).enumerate().map(|(i, q)| q | (((high[i / 8] >> (i % 8)) & 1) << 4))
}

/// The eight 6-bit scales and minima packed into 12 bytes: the first four of each in the low six
/// bits of bytes 0-3 and 4-7, the others split between bytes 8-11 and those bytes' top bits.
fn scale_and_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        ((packed[i + 4] & 15) | ((packed[i - 4] >> 6) << 4), (packed[i + 4] >> 4) | ((packed[i] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// f16 scale, f16 scale of the minima, 12 bytes of scales and minima, 128 bytes of nibbles.
fn q4_k(block: &[u8; 144], values: &mut Vec<f32>) {
    let (scale_of_scales, scale_of_mins) = (half(block, 0), half(block, 2));
    for i in 0..8 {
        let (scale, min) = scale_and_min(&block[4..16], i);
        let (scale, min) = (scale_of_scales * scale, scale_of_mins * min);
        let bytes = &block[16 + i / 2 * 32..][..32];
        values.extend(bytes.iter().map(|byte| scale * f32::from((byte >> (i % 2 * 4)) & 15) - min));
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits before the nibbles.
fn q5_k(block: &[u8; 176], values: &mut Vec<f32>) {
    let (scale_of_scales, scale_of_mins) = (half(block, 0), half(block, 2));
    for i in 0..8 {
        let (scale, min) = scale_and_min(&block[4..16], i);
        let (scale, min) = (scale_of_scales * scale, scale_of_mins * min);
        let (high, low) = (&block[16..48], &block[48 + i / 2 * 32..][..32]);
        values.extend(
            high.iter()
                .zip(low)
                .map(|(high, low)| scale * f32::from(((low >> (i % 2 * 4)) & 15) | (((high >> i) & 1) << 4)) - min),
        );
    }
}

/// 128 bytes of low nibbles, 64 of top bit pairs, 16 signed scales, f16 scale; two halves of 128
/// values, each of four runs of 32.
fn q6_k(block: &[u8; 210], values: &mut Vec<f32>) {
    let scale_of_scales = half(block, 208);
    for run in 0..8 {
        let (side, quarter) = (run / 4, run % 4);
        let low = &block[side * 64 + quarter % 2 * 32..][..32];
        let high = &block[128 + side * 32..][..32];
        for (i, (low, high)) in low.iter().zip(high).enumerate() {
            let q = ((low >> (quarter / 2 * 4)) & 15) | (((high >> (quarter * 2)) & 3) << 4);
            let scale = scale_of_scales * f32::from(block[192 + run * 2 + i / 16] as i8);
            values.push(scale * (f32::from(q) - 32.0));
        }
    }
}

#[cfg(test)]
mod tests;
