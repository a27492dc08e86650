//! The loss's passes over a chunk's logits on the CPU: each row is read from memory once, turned into its
//! gradient while it lies in the cache, and written once. Threads share out the rows.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;
use retort_kernels::{exponentiate, narrow_bf16, scale, widen_bf16};
use retort_llama::numbers;
use tch::{Kind, Tensor};

use super::{
    Sums,
    objective::{Objective, Position},
};
use crate::batch::Targets;

/// The numbers of a contiguous tensor on the CPU, to be written in place.
pub(super) enum Rows<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl Rows<'_> {
    /// Those of a tensor whose memory no other tensor shares that is used meanwhile; `None` where it is elsewhere or of
    /// another kind.
    pub(super) fn of(tensor: &mut Tensor) -> Option<Rows<'_>> {
        let count = tensor.numel();
        // SAFETY: so many numbers of the kind lie at the tensor's address, and it is borrowed as long as they are.
        unsafe {
            match tensor.kind() {
                kind @ Kind::BFloat16 => {
                    numbers(tensor, kind).map(|at| Rows::Bf16(std::slice::from_raw_parts_mut(at, count)))
                }
                _ => numbers(tensor, Kind::Float).map(|at| Rows::F32(std::slice::from_raw_parts_mut(at, count))),
            }
        }
    }
}

/// Turns the logits of these positions into their gradient, and sums up. What is computed of a row of bf16 is
/// computed in f32 and rounded at the end.
pub(super) fn gradient(
    objective: &Objective,
    targets: &Targets,
    positions: Range<usize>,
    logits_nv: Rows,
    vocab_size: usize,
) -> Sums {
    match logits_nv {
        Rows::F32(numbers) => {
            each_row(numbers, positions, vocab_size, |scratch, p, row| scratch.row(objective, targets, p, row))
        }
        Rows::Bf16(numbers) => each_row(numbers, positions, vocab_size, |scratch, p, row| {
            let mut wide = std::mem::take(&mut scratch.wide);
            wide.resize(row.len(), 0.0);
            widen_bf16(row, &mut wide);
            let sums = scratch.row(objective, targets, p, &mut wide);
            narrow_bf16(&wide, row);
            scratch.wide = wide;
            sums
        }),
    }
}

/// Sums over positions of what `work` says of each and its row of numbers.
fn each_row<T: Send>(
    numbers: &mut [T],
    positions: Range<usize>,
    vocab_size: usize,
    work: impl Fn(&mut Scratch, usize, &mut [T]) -> Sums + Sync,
) -> Sums {
    let threads = tch::get_num_threads().max(1) as usize;
    let rows = positions.len().div_ceil(threads).max(1);
    let parts = numbers.par_chunks_mut(rows * vocab_size).enumerate().map(|(part, numbers)| {
        let mut scratch = Scratch::default();
        let first = positions.start + part * rows;
        let mut sums = Sums::default();
        for (p, row) in (first..).zip(numbers.chunks_exact_mut(vocab_size)) {
            sums.add(work(&mut scratch, p, row));
        }
        sums
    });
    // In the order of the rows: the same sums whoever was ready first.
    let parts: Vec<Sums> = parts.collect();
    parts.into_iter().fold(Sums::default(), |mut sums, part| {
        sums.add(part);
        sums
    })
}

#[derive(Default)]
struct Scratch {
    student_e: Vec<f32>,
    corrections_e: Vec<f64>,
    cold: Vec<f32>,
    /// A row of narrow numbers, made wide.
    wide: Vec<f32>,
}

impl Scratch {
    /// Turns the logits of position `p` into their gradient.
    fn row(&mut self, objective: &Objective, targets: &Targets, p: usize, row: &mut [f32]) -> Sums {
        let temperature = objective.temperature;
        let ids = &targets.ids[targets.offsets[p]..targets.offsets[p + 1]];
        let label = targets.labels[p] as usize;
        let raw_label = f64::from(row[label]);
        self.student_e.clear();
        self.student_e.extend(ids.iter().map(|&id| row[id as usize]));
        let cold = (objective.label_ce > 0.0 && temperature != 1.0).then(|| {
            self.cold.clear();
            self.cold.extend_from_slice(row);
            exponentiate(&mut self.cold, 1.0)
        });
        let (max, sum) = exponentiate(row, (1.0 / temperature) as f32);
        let log_sum_exp = f64::from(max) / temperature + sum.ln();
        for logit in &mut self.student_e {
            *logit = (f64::from(*logit) / temperature - log_sum_exp) as f32;
        }
        self.corrections_e.clear();
        self.corrections_e.resize(ids.len(), 0.0);
        let position = Position::of(targets, p, &self.student_e, row.len());
        let judged = objective.judge(&position, &mut self.corrections_e);
        let weight = f64::from(targets.weights[p]);
        let label_ce = weight * objective.label_ce;
        let mut sums = Sums { loss: weight * judged.loss, kl: weight * judged.kl, ce: 0.0, positions: 1 };
        let mut spread = weight * judged.spread / temperature;
        if label_ce > 0.0 {
            let (max, sum) = cold.unwrap_or((max, sum));
            sums.ce = weight * (f64::from(max) + sum.ln() - raw_label);
            sums.loss += objective.label_ce * sums.ce;
        }
        match cold {
            Some((_, cold_sum)) => {
                let (hot, cold) = ((spread / sum) as f32, (label_ce / cold_sum) as f32);
                row.iter_mut().zip(&self.cold).for_each(|(x, y)| *x = *x * hot + y * cold);
            }
            None => {
                spread += label_ce;
                scale(row, (spread / sum) as f32);
            }
        }
        for (&id, correction) in ids.iter().zip(&self.corrections_e) {
            row[id as usize] += (weight * correction / temperature) as f32;
        }
        if label_ce > 0.0 {
            row[label] -= label_ce as f32;
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn both_kinds_are_taken_where_they_lie_in_rows_on_the_cpu() {
        let of = |kind: Kind| Tensor::ones([3, 4], (kind, Device::Cpu));
        assert!(matches!(Rows::of(&mut of(Kind::Float)), Some(Rows::F32(numbers)) if numbers == [1.0; 12]));
        assert!(matches!(Rows::of(&mut of(Kind::BFloat16)), Some(Rows::Bf16(numbers)) if numbers == [bf16::ONE; 12]));
        assert!(Rows::of(&mut of(Kind::Half)).is_none());
        assert!(Rows::of(&mut of(Kind::Float).tr()).is_none());
    }
}
