//! Random tensors that depend on their seed alone: libtorch has one generator for all threads of a process.

use rayon::prelude::*;
use retort_core::random::{Counter, Purpose};
use tch::Tensor;

use crate::{Error, Result};

/// Numbers drawn from one key. It is even: they are drawn in pairs.
const PIECE: usize = 1 << 16;

/// An f32 tensor on the CPU of numbers normal around zero, by Box and Muller ("A note on the generation of
/// random normal deviates", Annals of Mathematical Statistics, 1958). `(seed, stream)` names them; how many threads
/// draw them does not matter.
///
/// # Errors
/// [`Error::Invalid`] for a shape that is not one.
pub fn normal(shape: &[i64], deviation: f64, (seed, stream): (u64, u64)) -> Result<Tensor> {
    let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(usize::try_from(size).ok()?));
    let count = count.ok_or_else(|| Error::Invalid(format!("random numbers of shape {shape:?}")))?;
    let mut numbers = vec![0f32; count];
    numbers.par_chunks_mut(PIECE).enumerate().for_each(|(at, piece)| {
        let mut random = Counter::new(seed, Purpose::Init, stream, at as u64);
        for pair in piece.chunks_mut(2) {
            // Above 0: the logarithm is finite.
            let radius = deviation * (-2.0 * (1.0 - random.next_f64()).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * random.next_f64()).sin_cos();
            for (number, part) in pair.iter_mut().zip([cos, sin]) {
                *number = (radius * part) as f32;
            }
        }
    });
    Ok(Tensor::f_from_slice(&numbers)?.f_view(shape)?)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn numbers_are_normal_and_their_seeds_alone() {
        let drawn = |key| normal(&[3, 70_001], 0.5, key).unwrap();
        let one = drawn((7, 1));
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one, single.install(|| drawn((7, 1))));
        for other in [(7, 2), (8, 1)] {
            assert!(
                (&one - drawn(other)).abs().gt(1e-3).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]) > 0.9
            );
        }
        // 210,003 draws: the deviations of these estimates are 0.0011, 0.0008, and 0.0011 of a share of one half.
        let scaled = &one / 0.5;
        let mean = |tensor: &Tensor| tensor.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!(mean(&scaled).abs() < 0.01);
        assert!((mean(&scaled.square()) - 1.0).abs() < 0.02);
        assert!((mean(&scaled.square().square()) - 3.0).abs() < 0.15);
        assert!((mean(&scaled.abs().lt(0.674_49)) - 0.5).abs() < 0.006, "half of them lie within the quartiles");
        // Neighbours, pairs and pieces do not go together.
        let flat = scaled.view([-1]);
        for apart in [1, 2, PIECE as i64] {
            let product = flat.narrow(0, 0, 210_003 - apart) * flat.narrow(0, apart, 210_003 - apart);
            assert!(mean(&product).abs() < 0.012, "{apart} apart");
        }
        assert!(normal(&[-1], 1.0, (0, 0)).is_err() && normal(&[i64::MAX, 3], 1.0, (0, 0)).is_err());
    }
}
