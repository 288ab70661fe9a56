//! Products with matrices of scores `[tokens, tokens]` that are zero above the diagonal: blocks of rows skip what is.

use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, matmul};
use std::ops::Range;

/// Rows at a time.
const BLOCK: usize = 16;

fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows)
        .step_by(BLOCK)
        .map(move |start| start..(start + BLOCK).min(rows))
}

/// `scores = a b`, without the blocks above the diagonal, which keep what they held.
pub(super) fn product<T: SliceMath>(scores: &mut [T], rows: usize, a: Mat<T>, b: Mat<T>, width: usize) {
    for block in blocks(rows) {
        let (a, b) = (a.part(block.clone(), 0..width), b.part(0..width, 0..block.end));
        matmul(&mut scores[block.start * rows..], rows, a, b, Into::Set);
    }
}

/// `dst += scores x`, for `x` `[tokens, width]`.
pub(super) fn add_times<T: SliceMath>(
    (dst, stride): (&mut [T], usize),
    scores: &[T],
    rows: usize,
    x: Mat<T>,
    width: usize,
) {
    let scores = Mat::packed(scores, rows, rows);
    for block in blocks(rows) {
        let (a, x) = (
            scores.part(block.clone(), 0..block.end),
            x.part(0..block.end, 0..width),
        );
        matmul(&mut dst[block.start * stride..], stride, a, x, Into::Add);
    }
}

/// `dst += scores^T x`, for `x` `[tokens, width]`.
pub(super) fn add_transposed_times<T: SliceMath>(
    (dst, stride): (&mut [T], usize),
    scores: &[T],
    rows: usize,
    x: Mat<T>,
    width: usize,
) {
    let scores = Mat::packed(scores, rows, rows);
    for block in blocks(rows) {
        let (a, x) = (
            scores.part(block.start..rows, block.clone()).t(),
            x.part(block.start..rows, 0..width),
        );
        matmul(&mut dst[block.start * stride..], stride, a, x, Into::Add);
    }
}
