//! Products of f32 matrices in any layout, for training: the crate `gemm`'s, whose kernels follow the processor
//! (docs/decisions/018), and so do the last bits. What must be the same bits everywhere is [`crate::Panels`]'.

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;

/// A matrix of f32 in somebody's memory.
#[derive(Clone, Copy, Debug)]
pub struct Strided {
    at: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: isize,
    column_stride: isize,
}

impl Strided {
    /// Row after row, `stride` numbers from the beginning of one to that of the next.
    pub fn rows(at: *mut f32, rows: usize, columns: usize, stride: usize) -> Self {
        Self { at, rows, columns, row_stride: stride as isize, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// `out = keep * out + scale * left right`, on up to `threads` threads of the pool that this runs in.
///
/// # Panics
/// Where the shapes do not fit.
///
/// # Safety
/// The three must lie in memory that is good for their shapes and strides, and that nobody else writes; nobody else
/// reads that of `out`, which shares none with the others. Where `keep` is not zero its numbers are there.
pub unsafe fn multiply(out: Strided, keep: f32, scale: f32, left: Strided, right: Strided, threads: usize) {
    assert!(
        left.columns == right.rows && out.rows == left.rows && out.columns == right.columns,
        "a product of {}x{} and {}x{} into {}x{}",
        left.rows,
        left.columns,
        right.rows,
        right.columns,
        out.rows,
        out.columns
    );
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: as the caller promises.
    unsafe {
        get_gemm_fn()(
            out.rows,
            out.columns,
            left.columns,
            out.at,
            out.column_stride,
            out.row_stride,
            keep != 0.0,
            left.at,
            left.column_stride,
            left.row_stride,
            right.at,
            right.column_stride,
            right.row_stride,
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
