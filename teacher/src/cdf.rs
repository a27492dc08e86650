//! Draws from many categorical distributions at once, by inverting their cumulative sums.
//!
//! Shapes: n rows, v vocabulary, b blocks, s block size, d draws a row.
//!
//! A running f32 sum over 50,000 small numbers drifts, and an f64 one over the whole row is slow. So
//! the vocabulary is cut into blocks: each is summed on the tensor in f32 (256 terms, added
//! pairwise), block sums are accumulated in f64 on the host, and only the blocks a draw falls into
//! are brought over and walked in f64.

use retort_core::Result;
use tch::{Kind, Tensor};

use crate::torch::{host_f32, torch};

/// Terms of a block.
const BLOCK: i64 = 256;

/// The cumulative distribution of each row of a non-negative matrix; rows need not sum to one.
pub(crate) struct Cdf {
    mass_nbs: Tensor,
    /// Running f64 sums over blocks, row after row: b a row.
    ends_nb: Vec<f64>,
    rows: usize,
    blocks: usize,
}

impl Cdf {
    /// `mass_nv` is f32 and finite.
    pub(crate) fn new(mass_nv: Tensor) -> Result<Self> {
        let (rows, vocab) = mass_nv.size2().map_err(torch)?;
        let short = (BLOCK - vocab % BLOCK) % BLOCK;
        let padded_nv = if short == 0 { mass_nv } else { mass_nv.f_constant_pad_nd([0, short]).map_err(torch)? };
        let blocks = (vocab + short) / BLOCK;
        let mass_nbs = padded_nv.f_view([rows, blocks, BLOCK]).map_err(torch)?;
        let sums_nb = mass_nbs.f_sum_dim_intlist([2i64].as_slice(), false, Kind::Float).map_err(torch)?;
        let (rows, blocks) = (rows as usize, blocks as usize);
        let mut ends_nb: Vec<f64> = host_f32(&sums_nb)?.into_iter().map(f64::from).collect();
        for row in ends_nb.chunks_exact_mut(blocks.max(1)) {
            let mut running = 0.0;
            for end in row {
                running += *end;
                *end = running;
            }
        }
        Ok(Self { mass_nbs, ends_nb, rows, blocks })
    }

    /// The whole mass of a row.
    pub(crate) fn total(&self, row: usize) -> f64 {
        self.row(row).last().copied().unwrap_or(0.0)
    }

    /// For each uniform (d a row, row after row, each in [0, 1)) the column it falls on and that
    /// column's mass. A row without mass gives column 0 and mass 0.
    pub(crate) fn invert(&self, uniforms_nd: &[f64], draws: usize) -> Result<Vec<(u32, f32)>> {
        if uniforms_nd.is_empty() || draws == 0 {
            return Ok(Vec::new());
        }
        let mut block_nd = Vec::with_capacity(uniforms_nd.len());
        let mut rest_nd = Vec::with_capacity(uniforms_nd.len());
        for (row, uniforms) in uniforms_nd.chunks(draws).enumerate().take(self.rows) {
            let (ends, total) = (self.row(row), self.total(row));
            // Rounding can bring u * total up to total; the last block with mass takes it.
            let last = ends.partition_point(|&end| end < total);
            for uniform in uniforms {
                let target = uniform * total;
                let block = ends.partition_point(|&end| end <= target).min(last);
                let before = if block == 0 { 0.0 } else { ends[block - 1] };
                block_nd.push(block as i64);
                rest_nd.push(target - before);
            }
        }
        let rows = self.rows as i64;
        let block_nds = Tensor::from_slice(&block_nd)
            .f_to_device(self.mass_nbs.device())
            .and_then(|blocks| blocks.f_view([rows, draws as i64, 1]))
            .and_then(|blocks| blocks.f_expand([rows, draws as i64, BLOCK], false))
            .map_err(torch)?;
        let picked = host_f32(&self.mass_nbs.f_gather(1, &block_nds, false).map_err(torch)?)?;
        let found = picked.chunks_exact(BLOCK as usize).zip(rest_nd).zip(block_nd);
        Ok(found
            .map(|((masses, rest), block)| {
                let (offset, mass) = walk(masses, rest);
                ((block as usize * BLOCK as usize + offset) as u32, mass)
            })
            .collect())
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.ends_nb[row * self.blocks..(row + 1) * self.blocks]
    }
}

/// The first place where the running sum passes `rest`; the last place with mass when rounding kept
/// the sum below.
fn walk(masses: &[f32], rest: f64) -> (usize, f32) {
    let mut running = 0.0;
    let mut last = (0, 0.0);
    for (place, &mass) in masses.iter().enumerate() {
        if mass > 0.0 {
            running += f64::from(mass);
            last = (place, mass);
            if running > rest {
                break;
            }
        }
    }
    last
}
