//! Draws from many categorical distributions at once, by inverting their cumulative sums.
//!
//! Shapes: n rows, v vocabulary, b blocks, s block size, d draws of all rows.
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

    /// For each row's uniforms, each in [0, 1), the column it falls on and that column's mass. A row
    /// without mass gives column 0 and mass 0.
    pub(crate) fn invert(&self, uniforms: &[Vec<f64>]) -> Result<Vec<Vec<(u32, f32)>>> {
        let total: usize = uniforms.iter().map(Vec::len).sum();
        if total == 0 {
            return Ok(vec![Vec::new(); uniforms.len()]);
        }
        // Block of each draw, counted over all rows, and what is left of its target inside the block.
        let mut places = Vec::with_capacity(total);
        let mut rests = Vec::with_capacity(total);
        for (row, uniforms) in uniforms.iter().enumerate().take(self.rows) {
            let (ends, total) = (self.row(row), self.total(row));
            // Rounding can bring u * total up to total; the last block with mass takes it.
            let last = ends.partition_point(|&end| end < total);
            for uniform in uniforms {
                let target = uniform * total;
                let block = ends.partition_point(|&end| end <= target).min(last);
                let before = if block == 0 { 0.0 } else { ends[block - 1] };
                places.push((row * self.blocks + block) as i64);
                rests.push(target - before);
            }
        }
        let places_d = Tensor::from_slice(&places).f_to_device(self.mass_nbs.device()).map_err(torch)?;
        let blocks_s = self.mass_nbs.f_view([-1, BLOCK]).map_err(torch)?;
        let picked = host_f32(&blocks_s.f_index_select(0, &places_d).map_err(torch)?)?;
        let found = picked.chunks_exact(BLOCK as usize).zip(rests).zip(places).map(|((masses, rest), place)| {
            let (offset, mass) = walk(masses, rest);
            ((place as usize % self.blocks * BLOCK as usize + offset) as u32, mass)
        });
        let mut found = found.collect::<Vec<_>>().into_iter();
        Ok(uniforms.iter().map(|uniforms| found.by_ref().take(uniforms.len()).collect()).collect())
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.ends_nb[row * self.blocks..(row + 1) * self.blocks]
    }
}

/// The first place where the running sum passes `rest`; the last place with mass when rounding kept
/// the sum below.
pub(crate) fn walk(masses: &[f32], rest: f64) -> (usize, f32) {
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
