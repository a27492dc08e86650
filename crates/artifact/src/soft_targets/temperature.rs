//! Soft targets at another temperature than the one they were captured at.

use super::SparseTargets;

impl SparseTargets {
    /// The targets of p^(1/T) / sum p^(1/T), with the log-sum-exps of `temperature`, which is the
    /// `index`-th of the header's `temperatures`. No token outside the support is needed: the stored
    /// sum is over the whole vocabulary.
    ///
    /// A head's entry has its exact mass. A sample drawn in proportion to p stands for p^(1/T) with
    /// weight p^(1/T - 1), which keeps the expectation. `None` if the shard was not captured for so
    /// many temperatures.
    pub fn at_temperature(&self, index: usize, temperature: f64) -> Option<Self> {
        let count = self.log_sum_exps.len().checked_div(self.len())?;
        if index >= count {
            return None;
        }
        let mut tempered = self.clone();
        for p in 0..self.len() {
            let log_sum = f64::from(self.log_sum_exps[p * count + index]);
            let at = |logprob: f64| logprob / temperature - log_sum;
            let mut kept = 0.0;
            for e in self.range(p) {
                let logprob = f64::from(self.logprobs[e]);
                // 1 for a head's entry; a sample's share of the draws over its probability.
                let weight = match logprob.exp() {
                    probability if probability > 0.0 => f64::from(self.masses[e]) / probability,
                    _ => 1.0,
                };
                let mass = at(logprob).exp() * weight;
                tempered.masses[e] = mass as f32;
                tempered.logprobs[e] = at(logprob) as f32;
                kept += mass;
            }
            if self.residuals[p] > 0.0 {
                tempered.residuals[p] = (1.0 - kept).max(0.0) as f32;
            }
            tempered.label_logprobs[p] = at(f64::from(self.label_logprobs[p])) as f32;
        }
        Some(tempered)
    }
}
