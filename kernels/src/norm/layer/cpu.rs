//! Layer norms on the processor: tasks of whole rows, sweeps over a row that lies in the first cache.

use super::{Adjoints, LayerNorm, Named};
use crate::autograd::Value;
use crate::norm::cpu::{TOKENS_PER_PARTIAL, add_partials, parameter_or};
use crate::scalar::{Real, rows_per_task, sum_of, wide};
use crate::strided::Rows;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// The mean of a row and one over its standard deviation.
#[inline(always)]
fn statistics<T: Real>(x: &[T], eps: f64) -> (T, T) {
    let count = T::from_f64(x.len() as f64);
    let mean = sum_of(x, x, |x, _| x) / count;
    let variance = sum_of(x, x, |x, _| (x - mean) * (x - mean)) / count;
    (mean, T::one() / (variance + T::from_f64(eps)).root())
}

pub(super) fn forward<T: Real>(op: &LayerNorm, named: Named<'_>) -> Result<Value> {
    let width = op.width;
    let gain = parameter_or(named.gain, T::one(), width)?;
    let bias = parameter_or(named.bias, T::zero(), width)?;
    let guard = named.x.storage_and_layout().0;
    let x = Rows::<T>::of(named.x, &guard)?;
    let mut y = vec![T::zero(); op.rows * width];
    let rows = rows_per_task(width);
    y.par_chunks_mut(rows * width).enumerate().for_each(|(task, y)| {
        wide(
            #[inline(always)]
            || {
                for (i, y) in y.chunks_exact_mut(width).enumerate() {
                    let x = x.row(task * rows + i);
                    let (mean, r) = statistics(x, op.eps);
                    for (((y, &x), &gain), &bias) in y.iter_mut().zip(x).zip(&gain).zip(&bias) {
                        *y = (x - mean) * r * gain + bias;
                    }
                }
            },
        );
    });
    Ok(Value::Cpu(T::to_cpu_storage_owned(y), named.x.shape().clone()))
}

pub(super) fn backward<T: Real>(op: &LayerNorm, named: Named<'_>, grad: &Tensor) -> Result<Adjoints> {
    let width = op.width;
    let gain = parameter_or(named.gain, T::one(), width)?;
    let guards = [named.x, grad].map(|t| t.storage_and_layout().0);
    let (x, dy) = (
        Rows::<T>::of(named.x, &guards[0])?,
        Rows::<T>::of(grad, &guards[1])?,
    );
    let mut dx = vec![T::zero(); op.rows * width];
    let mut partials = vec![T::zero(); op.rows.div_ceil(TOKENS_PER_PARTIAL) * 2 * width];
    let runs = dx
        .par_chunks_mut(TOKENS_PER_PARTIAL * width)
        .zip(partials.par_chunks_mut(2 * width));
    runs.enumerate().for_each(|(run, (dx, sums))| {
        let (dgain, dbias) = sums.split_at_mut(width);
        let (mut u, mut normed) = (vec![T::zero(); width], vec![T::zero(); width]);
        wide(
            #[inline(always)]
            || {
                for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
                    let row = run * TOKENS_PER_PARTIAL + i;
                    let scratch = [&mut u[..], &mut normed];
                    let sums = [&mut *dgain, &mut *dbias];
                    row_adjoints(op.eps, [x.row(row), dy.row(row), &gain], dx, sums, scratch);
                }
            },
        );
    });
    let parameters = match named.gain.or(named.bias) {
        None => None,
        Some(parameter) => {
            let sums = add_partials(&partials, 2 * width);
            let tensor = |sums: &[T]| Tensor::from_slice(sums, width, parameter.device());
            Some([tensor(&sums[..width])?, tensor(&sums[width..])?])
        }
    };
    Ok(Adjoints {
        dx: Tensor::from_vec(dx, named.x.shape(), named.x.device())?,
        parameters,
    })
}

/// One row from x, dy and gain: writes dx and adds to dgain and dbias.
#[inline(always)]
fn row_adjoints<T: Real>(
    eps: f64,
    [x, dy, gain]: [&[T]; 3],
    dx: &mut [T],
    [dgain, dbias]: [&mut [T]; 2],
    [u, normed]: [&mut [T]; 2],
) {
    let (mean, r) = statistics(x, eps);
    let operands = x.iter().zip(dy).zip(gain);
    let results = u.iter_mut().zip(normed.iter_mut()).zip(dgain).zip(dbias);
    for (((&x, &dy), &gain), (((u, normed), dgain), dbias)) in operands.zip(results) {
        *u = dy * gain;
        *normed = (x - mean) * r;
        *dgain += dy * *normed;
        *dbias += dy;
    }
    let count = T::from_f64(x.len() as f64);
    let mean_u = sum_of(u, u, |u, _| u) / count;
    let pull = sum_of(u, normed, |u, normed| u * normed) / count;
    for ((dx, &u), &normed) in dx.iter_mut().zip(&*u).zip(&*normed) {
        *dx = r * (u - mean_u - normed * pull);
    }
}
