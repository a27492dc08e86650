//! DistillKit's two published settings, after the description in its README: the most likely `k`
//! log-probabilities sorted, the first `exact` of them in bfloat16, the others as a curve over their
//! rank (powers 0 to `powers` and a square root, float32 coefficients), indices packed into as few bits
//! as the vocabulary needs. <https://github.com/arcee-ai/DistillKit>
//!
//! The curve is fitted by least squares in double precision, on ranks scaled to 0..1, which is kinder
//! to it than the program itself was when it was measured (`docs/fidelity.md`). Its loss drops what is
//! missing ("missing_probability_handling: zero"), as a bare top-k's does.

use retort_artifact::soft_targets::SparseTargets;

pub struct DistillKit {
    pub k: usize,
    pub exact: usize,
    pub powers: i32,
}

impl DistillKit {
    /// Of one position, by the layout's own arithmetic.
    pub fn bytes(&self, vocab_size: usize) -> usize {
        let index_bits = (vocab_size as f64).log2().ceil() as usize;
        self.exact * 2 + (self.powers as usize + 2) * 4 + (self.k * index_bits).div_ceil(8)
    }

    /// What a reader gets of each position's log-probabilities `[v]`.
    pub fn decode(&self, positions: impl Iterator<Item = Vec<f32>>, labels: &[u32]) -> SparseTargets {
        let mut targets = SparseTargets { offsets: vec![0], ..SparseTargets::default() };
        for (logprobs, &label) in positions.zip(labels) {
            let mut order: Vec<u32> = (0..logprobs.len() as u32).collect();
            let by_logprob = |a: &u32, b: &u32| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]);
            order.select_nth_unstable_by(self.k - 1, by_logprob);
            order.truncate(self.k);
            order.sort_by(by_logprob);
            let sorted: Vec<f64> = order.iter().map(|&id| logprobs[id as usize].into()).collect();
            let curve = self.fit(&sorted[self.exact..]);
            let read = |rank: usize| {
                if rank < self.exact {
                    f64::from(bfloat16(sorted[rank] as f32))
                } else {
                    self.terms(rank).iter().zip(&curve).map(|(term, factor)| term * f64::from(*factor)).sum()
                }
            };
            targets.top_ids.push(order[0]);
            let mut entries: Vec<(u32, f64)> = order.iter().enumerate().map(|(rank, &id)| (id, read(rank))).collect();
            entries.sort_unstable_by_key(|entry| entry.0);
            for (id, logprob) in entries {
                targets.ids.push(id);
                targets.logprobs.push(logprob as f32);
                targets.masses.push(logprob.exp() as f32);
                targets.heads.push(true);
            }
            targets.offsets.push(targets.ids.len() as u32);
            targets.residuals.push(0.0);
            targets.label_logprobs.push(logprobs[label as usize]);
        }
        targets
    }

    fn terms(&self, rank: usize) -> Vec<f64> {
        let t = rank as f64 / self.k as f64;
        (0..=self.powers).map(|power| t.powi(power)).chain([t.sqrt()]).collect()
    }

    /// Least squares through the normal equations.
    fn fit(&self, values: &[f64]) -> Vec<f32> {
        let n = self.powers as usize + 2;
        let mut system = vec![vec![0.0; n + 1]; n];
        for (at, value) in values.iter().enumerate() {
            let terms = self.terms(self.exact + at);
            for i in 0..n {
                for j in 0..n {
                    system[i][j] += terms[i] * terms[j];
                }
                system[i][n] += terms[i] * value;
            }
        }
        for i in 0..n {
            let pivot = (i..n).max_by(|&a, &b| system[a][i].abs().total_cmp(&system[b][i].abs())).unwrap_or(i);
            system.swap(i, pivot);
            let pivot = system[i].clone();
            for (_, row) in system.iter_mut().enumerate().filter(|(row, _)| *row != i) {
                let factor = row[i] / pivot[i];
                row.iter_mut().zip(&pivot).for_each(|(value, above)| *value -= factor * above);
            }
        }
        (0..n).map(|i| (system[i][n] / system[i][i]) as f32).collect()
    }
}

fn bfloat16(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}
