//! The short convolution on the processor: tokens as rows of channels, a multiple of an earlier row added for each tap.

use super::ShortConv;
use crate::autograd::Value;
use crate::scalar::{rows_per_task, wide};
use crate::slice_math::SliceMath;
use crate::strided::{contiguous, elements};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Channels whose weights one task has the adjoints of.
const CHANNELS_PER_TASK: usize = 32;

/// `[C, W]` to `[W, C]`, in the type of the tokens.
fn by_tap<T: SliceMath>(weights: &Tensor) -> Result<Vec<T>> {
    elements(&weights.detach().to_dtype(T::DTYPE)?.t()?.contiguous()?)
}

/// Adds up `from` `[B, rows, C]` for `rows` of `to` tokens: tap j of row t takes row t + j - shift, or t + shift - j if `back`.
fn sums<T: SliceMath>(call: &ShortConv, w: &[T], from: &[T], [rows, to]: [usize; 2], back: bool) -> Vec<T> {
    let (width, taps, shift) = (call.channels, call.taps, call.before);
    let mut y = vec![T::zero(); call.batch * to * width];
    let tokens = rows_per_task(width * taps);
    y.par_chunks_mut(tokens * width)
        .enumerate()
        .for_each(|(task, y)| {
            wide(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_exact_mut(width).enumerate() {
                        let token = task * tokens + i;
                        let (b, t) = (token / to, token % to);
                        for (tap, w) in w.chunks_exact(width).enumerate() {
                            let at = match back {
                                false => (t + tap).checked_sub(shift),
                                true => (t + shift).checked_sub(tap),
                            };
                            let Some(at) = at.filter(|&at| at < rows) else {
                                continue;
                            };
                            let x = &from[(b * rows + at) * width..][..width];
                            for ((y, &w), &x) in y.iter_mut().zip(w).zip(x) {
                                *y += w * x;
                            }
                        }
                    }
                },
            );
        });
    y
}

pub(super) fn forward<T: SliceMath>(call: &ShortConv, x: &Tensor, weights: &Tensor) -> Result<Value> {
    let w = by_tap::<T>(weights)?;
    let guard = x.storage_and_layout().0;
    let x = contiguous::<T>(x, &guard)?;
    let y = sums(call, &w, x, [call.tokens, call.out], false);
    let shape = (call.batch, call.out, call.channels);
    Ok(Value::Cpu(T::to_cpu_storage_owned(y), shape.into()))
}

/// Adjoints of tokens and weights.
pub(super) fn backward<T: SliceMath>(
    call: &ShortConv,
    x: &Tensor,
    weights: &Tensor,
    grad: &Tensor,
) -> Result<[Tensor; 2]> {
    let w = by_tap::<T>(weights)?;
    let guards = [x, grad].map(|t| t.storage_and_layout().0);
    let dy = contiguous::<T>(grad, &guards[1])?;
    let dx = sums(call, &w, dy, [call.out, call.tokens], true);
    let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
    let x = contiguous::<T>(x, &guards[0])?;
    let (width, taps) = (call.channels, call.taps);
    let mut dw = vec![T::zero(); width * taps];
    dw.par_chunks_mut(CHANNELS_PER_TASK * taps)
        .enumerate()
        .for_each(|(task, dw)| {
            let (first, channels) = (task * CHANNELS_PER_TASK, dw.len() / taps);
            let mut by_tap = vec![T::zero(); dw.len()];
            wide(
                #[inline(always)]
                || {
                    for row in 0..call.batch * call.out {
                        let (b, t) = (row / call.out, row % call.out);
                        let dy = &dy[row * width + first..][..channels];
                        for (tap, sums) in by_tap.chunks_exact_mut(channels).enumerate() {
                            let at = (t + tap).checked_sub(call.before);
                            let Some(at) = at.filter(|&at| at < call.tokens) else {
                                continue;
                            };
                            let x = &x[(b * call.tokens + at) * width + first..][..channels];
                            for ((sum, &x), &dy) in sums.iter_mut().zip(x).zip(dy) {
                                *sum += x * dy;
                            }
                        }
                    }
                },
            );
            for (c, dw) in dw.chunks_exact_mut(taps).enumerate() {
                for (tap, dw) in dw.iter_mut().enumerate() {
                    *dw = by_tap[tap * channels + c];
                }
            }
        });
    Ok([dx, Tensor::from_vec(dw, weights.shape(), weights.device())?])
}
