//! Weights as they lie in a file: mapped, read in place, turned into f32 a few rows at a time.

use std::{ops::Range, sync::Arc};

use half::{bf16, f16};

/// Bytes that somebody else owns, a mapped file most often.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
    end: usize,
}

/// How a matrix's numbers are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Storage {
    F32,
    Bf16,
    F16,
    /// Signed bytes; row `i` stands for `bytes * scales[i]`.
    Int8 {
        scales: Vec<f32>,
    },
    /// Bytes of eight-bit floats with four bits of exponent and three of mantissa ("e4m3fn": no
    /// infinities; Micikevicius et al., "FP8 Formats for Deep Learning", 2022), a scale a row.
    F8E4m3 {
        scales: Vec<f32>,
    },
}

/// A matrix `[rows, columns]` of weights: `rows` outputs of `columns` inputs each.
#[derive(Clone)]
pub struct Matrix {
    bytes: Bytes,
    storage: Storage,
    rows: usize,
    columns: usize,
}

impl Bytes {
    /// `start..end` of what `owner` holds; `None` where it holds less.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, start: usize, end: usize) -> Option<Self> {
        (*owner).as_ref().get(start..end)?;
        Some(Self { owner, start, end })
    }

    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let end = bytes.len();
        Self { owner: Arc::new(bytes), start: 0, end }
    }

    pub fn as_slice(&self) -> &[u8] {
        (*self.owner).as_ref().get(self.start..self.end).unwrap_or_default()
    }
}

impl Storage {
    /// Bytes a number, scales left out.
    pub fn number_bytes(&self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Int8 { .. } | Self::F8E4m3 { .. } => 1,
        }
    }

    fn scales(&self) -> Option<&[f32]> {
        match self {
            Self::Int8 { scales } | Self::F8E4m3 { scales } => Some(scales),
            Self::F32 | Self::Bf16 | Self::F16 => None,
        }
    }
}

impl Matrix {
    /// `None` where the bytes, or the scales, are not as many as the shape needs.
    pub fn new(bytes: Bytes, storage: Storage, rows: usize, columns: usize) -> Option<Self> {
        let needed = rows.checked_mul(columns)?.checked_mul(storage.number_bytes())?;
        let sound = bytes.as_slice().len() == needed && storage.scales().is_none_or(|scales| scales.len() == rows);
        sound.then_some(Self { bytes, storage, rows, columns })
    }

    pub fn from_f32(numbers: &[f32], rows: usize, columns: usize) -> Option<Self> {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::new(Bytes::from_vec(bytes), Storage::F32, rows, columns)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Where the rows can be read as f32 without a copy, one right after another.
    pub(crate) fn in_place(&self) -> Option<*const f32> {
        // Whoever reads does so unaligned; the machine's own byte order is the file's.
        (cfg!(target_endian = "little") && self.storage == Storage::F32).then(|| self.bytes.as_slice().as_ptr().cast())
    }

    /// One row in f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        self.read(row, 0..self.columns, out);
    }

    /// Some columns of one row in f32.
    pub(crate) fn read(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let width = self.storage.number_bytes();
        let first = row * self.columns * width;
        let bytes = &self.bytes.as_slice()[first + columns.start * width..first + columns.end * width];
        match &self.storage {
            Storage::F32 => copy(bytes, out, f32::from_le_bytes),
            Storage::Bf16 => widen_bf16(bytes, out),
            Storage::F16 => copy(bytes, out, |pair| f16::from_le_bytes(pair).to_f32()),
            Storage::Int8 { scales } => {
                let scale = scales[row];
                copy(bytes, out, |[byte]: [u8; 1]| f32::from(byte.cast_signed()) * scale);
            }
            Storage::F8E4m3 { scales } => {
                let scale = scales[row];
                copy(bytes, out, |[byte]: [u8; 1]| E4M3[usize::from(byte)] * scale);
            }
        }
    }

    /// The nearest matrix of bf16 numbers.
    pub fn to_bf16(&self) -> Self {
        let mut bytes = Vec::with_capacity(self.rows * self.columns * 2);
        let mut numbers = vec![0.0; self.columns];
        for row in 0..self.rows {
            self.read_row(row, &mut numbers);
            bytes.extend(numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
        }
        Self { bytes: Bytes::from_vec(bytes), storage: Storage::Bf16, ..*self }
    }

    /// The nearest matrix of signed bytes, each row scaled so that its largest number is 127. `Err` has the
    /// row of a number that is not finite, which no byte says.
    pub fn to_int8(&self) -> Result<Self, usize> {
        self.requantise(
            127.0,
            |x| x.round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
            |scales| Storage::Int8 { scales },
        )
    }

    /// The nearest matrix of e4m3 bytes, each row scaled so that its largest number is 448. `Err` as of
    /// [`Matrix::to_int8`].
    pub fn to_f8_e4m3(&self) -> Result<Self, usize> {
        self.requantise(E4M3_MAX, to_e4m3, |scales| Storage::F8E4m3 { scales })
    }

    fn requantise(
        &self,
        most: f32,
        to_byte: impl Fn(f32) -> u8,
        storage: impl Fn(Vec<f32>) -> Storage,
    ) -> Result<Self, usize> {
        let mut bytes = Vec::with_capacity(self.rows * self.columns);
        let mut scales = Vec::with_capacity(self.rows);
        let mut numbers = vec![0.0; self.columns];
        for row in 0..self.rows {
            self.read_row(row, &mut numbers);
            if !numbers.iter().all(|x| x.is_finite()) {
                return Err(row);
            }
            let largest = numbers.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let scale = if largest > 0.0 { largest / most } else { 1.0 };
            scales.push(scale);
            bytes.extend(numbers.iter().map(|x| to_byte(x / scale)));
        }
        Ok(Self { bytes: Bytes::from_vec(bytes), storage: storage(scales), ..*self })
    }
}

fn copy<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    for (out, number) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = read(*number);
    }
}

fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
    // A shift: written so that it compiles to vectors.
    copy(bytes, out, |pair: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(pair)) << 16));
}

/// The largest e4m3 number.
const E4M3_MAX: f32 = 448.0;

/// The value of each e4m3 byte.
static E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (exponent, mantissa) = ((byte >> 3) & 15, byte & 7);
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            // Steps of 2^-9.
            mantissa as f32 / 512.0
        } else {
            f32::from_bits(((exponent as u32 + 127 - 7) << 23) | ((mantissa as u32) << 20))
        };
        table[byte] = if byte >= 128 { -magnitude } else { magnitude };
        byte += 1;
    }
    table
};

/// The nearest e4m3 number's byte, ties to even; what is too large becomes the largest.
fn to_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    // The positive bytes stand in ascending order.
    let above = E4M3[..0x7f].partition_point(|&value| value < magnitude);
    if above >= 0x7e {
        let byte = if above == 0x7e && nearer_below(0x7d, magnitude) { 0x7d } else { 0x7e };
        return sign | byte;
    }
    if above == 0 || E4M3[above] == magnitude {
        return sign | above as u8;
    }
    let below = above - 1;
    sign | if nearer_below(below, magnitude) { below } else { above } as u8
}

/// Whether `magnitude` rounds to the byte `below` rather than to the one above it.
fn nearer_below(below: usize, magnitude: f32) -> bool {
    let (down, up) = (magnitude - E4M3[below], E4M3[below + 1] - magnitude);
    down < up || (down == up && below.is_multiple_of(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_its_known_values() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(E4M3[byte], value, "{byte:#x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        for byte in (0..=255u8).filter(|byte| byte & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(E4M3[usize::from(byte)]), byte, "{byte:#x}");
        }
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_and_ties_to_even() {
        let nearest = |x: f32| {
            let distance = |byte: &u8| (E4M3[usize::from(*byte)] - x).abs();
            (0..0x7f).min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)))).unwrap()
        };
        for step in 0..20_000 {
            let x = step as f32 * 0.023;
            assert_eq!(to_e4m3(x), nearest(x), "{x}");
        }
        assert_eq!(to_e4m3(1e9), 0x7e);
        assert_eq!(to_e4m3(-1e9), 0xfe);
    }

    #[test]
    fn bytes_and_scales_that_do_not_fit_are_no_matrix() {
        assert!(Matrix::new(Bytes::from_vec(vec![0; 11]), Storage::F32, 1, 3).is_none());
        assert!(Matrix::new(Bytes::from_vec(vec![0; 6]), Storage::Int8 { scales: vec![1.0] }, 2, 3).is_none());
        assert!(Matrix::new(Bytes::from_vec(Vec::new()), Storage::F32, usize::MAX, 2).is_none());
        assert!(Bytes::new(Arc::new(vec![0u8; 4]), 2, 5).is_none());
    }

    #[test]
    fn eight_bits_keep_what_they_can() {
        let numbers: Vec<f32> =
            (0..6 * 50).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01 * (1 + i / 50) as f32).collect();
        let matrix = Matrix::from_f32(&numbers, 6, 50).unwrap();
        for (narrow, error) in [(matrix.to_int8().unwrap(), 0.5 / 127.0), (matrix.to_f8_e4m3().unwrap(), 1.0 / 16.0)] {
            let mut row = vec![0.0; 50];
            for (at, numbers) in numbers.chunks(50).enumerate() {
                narrow.read_row(at, &mut row);
                let largest = numbers.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (a, b) in row.iter().zip(numbers) {
                    assert!((a - b).abs() <= largest * error * 1.001, "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_made_narrow() {
        for bad in [f32::NAN, f32::INFINITY] {
            let matrix = Matrix::from_f32(&[1.0, 2.0, 3.0, bad], 2, 2).unwrap();
            assert_eq!((matrix.to_int8().err(), matrix.to_f8_e4m3().err()), (Some(1), Some(1)));
        }
    }
}
