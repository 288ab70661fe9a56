//! Norms on the processor: tasks of whole rows, two sweeps over a row that lies in the first cache.

use super::{Norm, NormBackward};
use crate::pass::Pass;
use crate::scalar::{Real, rows_per_task, sum_of, wide};
use crate::strided::elements;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Tokens whose share of dscale and dshift is summed by one task; fixed, so that the bits do not depend on threads.
pub(super) const TOKENS_PER_PARTIAL: usize = 64;

#[inline(always)]
pub(super) fn inverse_rms<T: Real>(x: &[T], eps: f64) -> T {
    let mean = sum_of(x, x, |a, b| a * b) / T::from_f64(x.len() as f64);
    T::one() / (mean + T::from_f64(eps)).root()
}

/// The elements of a parameter in the type of the computation, or as many times `absent`.
pub(super) fn parameter_or<T: Real>(parameter: Option<&Tensor>, absent: T, count: usize) -> Result<Vec<T>> {
    match parameter {
        Some(parameter) => elements(&parameter.detach().to_dtype(T::DTYPE)?),
        None => Ok(vec![absent; count]),
    }
}

/// The sum over rows of `partials`, in order.
pub(super) fn add_partials<T: Real>(partials: &[T], width: usize) -> Vec<T> {
    let mut total = vec![T::zero(); width];
    for partial in partials.chunks_exact(width) {
        for (total, &part) in total.iter_mut().zip(partial) {
            *total += part;
        }
    }
    total
}

impl<const I: usize> Pass<I> for Norm {
    const NAME: &'static str = "rms_norm";

    fn cpu<T: Real>(&self, operands: [&[T]; I]) -> Vec<Vec<T>> {
        let (x, width, heads) = (operands[0], self.width, self.heads);
        let of_row = |operand: usize, row: usize| {
            let at = (row / heads / self.tokens_per_group * heads + row % heads) * width;
            operands.get(operand).map(|values| &values[at..at + width])
        };
        let offset = T::from_f64(self.offset);
        let mut y = vec![T::zero(); x.len()];
        let rows = rows_per_task(width);
        let tasks = y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width));
        tasks.enumerate().for_each(|(task, (y, x))| {
            wide(|| {
                let pairs = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for (row, (y, x)) in pairs.enumerate() {
                    let row = task * rows + row;
                    let r = inverse_rms(x, self.eps);
                    match (of_row(1, row), of_row(2, row)) {
                        (Some(scale), Some(shift)) => {
                            for (((y, &x), &scale), &shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
                                *y = x * r * (offset + scale) + shift;
                            }
                        }
                        (Some(scale), None) => {
                            for ((y, &x), &scale) in y.iter_mut().zip(x).zip(scale) {
                                *y = x * r * (offset + scale);
                            }
                        }
                        (None, _) => {
                            for (y, &x) in y.iter_mut().zip(x) {
                                *y = x * r;
                            }
                        }
                    }
                }
            });
        });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; I],
    ) -> Result<Vec<super::cuda::Slice<T>>> {
        Ok(vec![super::cuda::forward::<T, T>(self, device, &operands)?])
    }
}

/// One run of tokens of one group: writes `dx` and this run's share of dscale and dshift, `[2, columns]`.
fn backward_rows<T: Real>(norm: &Norm, x: &[T], dy: &[T], scale: Option<&[T]>, dx: &mut [T], sums: &mut [T]) {
    let (width, offset) = (norm.width, T::from_f64(norm.offset));
    let (dscales, dshifts) = sums.split_at_mut(norm.columns());
    let mut g = vec![T::zero(); width];
    let rows = dx
        .chunks_exact_mut(width)
        .zip(x.chunks_exact(width))
        .zip(dy.chunks_exact(width));
    for (row, ((dx, x), dy)) in rows.enumerate() {
        let r = inverse_rms(x, norm.eps);
        let head = row % norm.heads * width;
        let (dscale, dshift) = (&mut dscales[head..head + width], &mut dshifts[head..head + width]);
        match scale.map(|scale| &scale[head..head + width]) {
            Some(scale) => {
                for ((g, &dy), &scale) in g.iter_mut().zip(dy).zip(scale) {
                    *g = dy * (offset + scale);
                }
                for (((dscale, dshift), &x), &dy) in dscale.iter_mut().zip(dshift).zip(x).zip(dy) {
                    *dscale += dy * x * r;
                    *dshift += dy;
                }
            }
            None => g.copy_from_slice(dy),
        }
        let pull = sum_of(&g, x, |g, x| g * x) / T::from_f64(width as f64) * r * r;
        for ((dx, &x), &g) in dx.iter_mut().zip(x).zip(&g) {
            *dx = r * (g - x * pull);
        }
    }
}

impl<const I: usize> Pass<I> for NormBackward {
    const NAME: &'static str = "rms_norm backward";

    fn cpu<T: Real>(&self, operands: [&[T]; I]) -> Vec<Vec<T>> {
        let (width, tokens_per_group) = (self.norm.columns(), self.norm.tokens_per_group);
        let (x, dy, scale) = (operands[0], operands[1], operands.get(2));
        let groups = x.len() / (width * tokens_per_group);
        let runs = tokens_per_group.div_ceil(TOKENS_PER_PARTIAL);
        let mut dx = vec![T::zero(); x.len()];
        let mut partials = vec![T::zero(); groups * runs * 2 * width];
        let by_group = dx
            .par_chunks_mut(tokens_per_group * width)
            .zip(partials.par_chunks_mut(runs * 2 * width));
        by_group.enumerate().for_each(|(group, (dx, sums))| {
            let scale = scale.map(|scale| &scale[group * width..(group + 1) * width]);
            let by_run = dx
                .par_chunks_mut(TOKENS_PER_PARTIAL * width)
                .zip(sums.par_chunks_mut(2 * width));
            by_run.enumerate().for_each(|(run, (dx, sums))| {
                let start = (group * tokens_per_group + run * TOKENS_PER_PARTIAL) * width;
                let rows = start..start + dx.len();
                wide(|| backward_rows(&self.norm, &x[rows.clone()], &dy[rows], scale, dx, sums));
            });
        });
        let mut results = vec![dx];
        let kinds = if scale.is_none() {
            0
        } else {
            1 + usize::from(self.shift)
        };
        for kind in 0..kinds {
            let mut total = vec![T::zero(); groups * width];
            for (total, partials) in total
                .chunks_exact_mut(width)
                .zip(partials.chunks_exact(runs * 2 * width))
            {
                for partial in partials.chunks_exact(2 * width) {
                    for (total, &part) in total.iter_mut().zip(&partial[kind * width..]) {
                        *total += part;
                    }
                }
            }
            results.push(total);
        }
        results
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; I],
    ) -> Result<Vec<super::cuda::Slice<T>>> {
        let [x, dy, scale @ ..] = &operands[..] else {
            unreachable!("the pass has at least x and dy");
        };
        super::cuda::backward::<T, T>(self, device, x, dy, scale.first())
    }
}
