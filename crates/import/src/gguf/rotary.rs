//! The two ways to order a head's rows: Hugging Face has one rotary half behind the other, llama.cpp's `llama`
//! has a pair's two rows side by side.

/// Rows `x0 y0 x1 y1 ...` of each head become `x0 x1 ... y0 y1 ...`; `row_bytes` a row.
pub(crate) fn separate_halves(rows: &[u8], row_bytes: usize, head_rows: usize) -> Vec<u8> {
    let mut separated = Vec::with_capacity(rows.len());
    for head in rows.chunks(row_bytes * head_rows) {
        for half in 0..2 {
            for row in head.chunks(row_bytes).skip(half).step_by(2) {
                separated.extend_from_slice(row);
            }
        }
    }
    separated
}

/// The way back: `x0 x1 ... y0 y1 ...` of each head become `x0 y0 x1 y1 ...`.
pub fn interleave_halves(rows: &[u8], row_bytes: usize, head_rows: usize) -> Vec<u8> {
    let mut interleaved = Vec::with_capacity(rows.len());
    for head in rows.chunks(row_bytes * head_rows) {
        let (first, second) = head.split_at(head.len() / 2);
        for (x, y) in first.chunks(row_bytes).zip(second.chunks(row_bytes)) {
            interleaved.extend_from_slice(x);
            interleaved.extend_from_slice(y);
        }
    }
    interleaved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_undoes_the_other() {
        // Two heads of four rows of two bytes.
        let rows: Vec<u8> = (0..16).collect();
        let interleaved = interleave_halves(&rows, 2, 4);
        assert_eq!(interleaved, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        assert_eq!(separate_halves(&interleaved, 2, 4), rows);
    }
}
