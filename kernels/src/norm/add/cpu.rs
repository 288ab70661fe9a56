//! A sum and its norm on the processor: tasks of whole rows, sweeps over a row that lies in the first cache.

use super::{AddNorm, Adjoints};
use crate::autograd::Value;
use crate::norm::cpu::{TOKENS_PER_PARTIAL, add_partials, inverse_rms, parameter_or};
use crate::scalar::{Real, rows_per_task, sum_of, wide};
use crate::strided::Rows;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

pub(super) fn forward<T: Real>(
    op: &AddNorm,
    residual: &Tensor,
    branch: &Tensor,
    gain: Option<&Tensor>,
) -> Result<[Value; 2]> {
    let width = op.width;
    let gain = parameter_or(gain, T::one(), width)?;
    let (shape, dtype) = (residual.shape().clone(), branch.dtype());
    let branch = branch.detach().to_dtype(T::DTYPE)?;
    let guards = [residual, &branch].map(|t| t.storage_and_layout().0);
    let (x, branch) = (
        Rows::<T>::of(residual, &guards[0])?,
        Rows::<T>::of(&branch, &guards[1])?,
    );
    let (mut sum, mut normed) = (vec![T::zero(); op.rows * width], vec![T::zero(); op.rows * width]);
    let rows = rows_per_task(width);
    let tasks = sum
        .par_chunks_mut(rows * width)
        .zip(normed.par_chunks_mut(rows * width));
    tasks.enumerate().for_each(|(task, (sum, normed))| {
        let results = sum.chunks_exact_mut(width).zip(normed.chunks_exact_mut(width));
        wide(
            #[inline(always)]
            || {
                for (i, (sum, normed)) in results.enumerate() {
                    let row = task * rows + i;
                    for ((sum, &x), &branch) in sum.iter_mut().zip(x.row(row)).zip(branch.row(row)) {
                        *sum = x + branch;
                    }
                    let r = inverse_rms(sum, op.eps);
                    for ((normed, &sum), &gain) in normed.iter_mut().zip(&*sum).zip(&gain) {
                        *normed = sum * r * gain;
                    }
                }
            },
        );
    });
    let normed = T::to_cpu_storage_owned(normed);
    let normed = if dtype == T::DTYPE {
        Value::Cpu(normed, shape.clone())
    } else {
        let none = candle_core::op::BackpropOp::none();
        let normed = Tensor::from_storage(candle_core::Storage::Cpu(normed), shape.clone(), none, false);
        Value::Tensor(normed.to_dtype(dtype)?)
    };
    Ok([Value::Cpu(T::to_cpu_storage_owned(sum), shape), normed])
}

pub(super) fn backward<T: Real>(
    op: &AddNorm,
    sum: &Tensor,
    gain: Option<&Tensor>,
    d_sum: Option<&Tensor>,
    d_normed: &Tensor,
) -> Result<Adjoints> {
    let width = op.width;
    let weights = parameter_or(gain, T::one(), width)?;
    let dtype = d_normed.dtype();
    let d_normed = d_normed.detach().to_dtype(T::DTYPE)?;
    let guards = [sum, &d_normed].map(|t| t.storage_and_layout().0);
    let d_sum_guard = d_sum.map(|d_sum| d_sum.storage_and_layout().0);
    let (s, dn) = (
        Rows::<T>::of(sum, &guards[0])?,
        Rows::<T>::of(&d_normed, &guards[1])?,
    );
    let ds = match (d_sum, &d_sum_guard) {
        (Some(d_sum), Some(guard)) => Some(Rows::<T>::of(d_sum, guard)?),
        _ => None,
    };
    let mut dx = vec![T::zero(); op.rows * width];
    let mut partials = vec![T::zero(); op.rows.div_ceil(TOKENS_PER_PARTIAL) * width];
    let runs = dx
        .par_chunks_mut(TOKENS_PER_PARTIAL * width)
        .zip(partials.par_chunks_mut(width));
    runs.enumerate().for_each(|(run, (dx, dgain))| {
        wide(
            #[inline(always)]
            || {
                for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
                    let row = run * TOKENS_PER_PARTIAL + i;
                    row_adjoints(op.eps, [s.row(row), dn.row(row), &weights], dx, dgain);
                    if let Some(ds) = ds {
                        for (dx, &ds) in dx.iter_mut().zip(ds.row(row)) {
                            *dx += ds;
                        }
                    }
                }
            },
        );
    });
    let d_gain = gain
        .map(|gain| Tensor::from_vec(add_partials(&partials, width), width, gain.device()))
        .transpose()?;
    let d_residual = Tensor::from_vec(dx, sum.shape(), sum.device())?;
    Ok(Adjoints {
        d_branch: d_residual.to_dtype(dtype)?,
        d_residual,
        d_gain,
    })
}

/// One row from the sum, the adjoint of the norm and the gain: writes the adjoint of the sum and adds to that of the gain.
#[inline(always)]
fn row_adjoints<T: Real>(eps: f64, [s, dn, gain]: [&[T]; 3], dx: &mut [T], dgain: &mut [T]) {
    let r = inverse_rms(s, eps);
    let operands = s.iter().zip(dn).zip(gain);
    for (((&s, &dn), &gain), (u, dgain)) in operands.zip(dx.iter_mut().zip(dgain)) {
        *u = dn * gain;
        *dgain += dn * s * r;
    }
    let pull = sum_of(dx, s, |u, s| u * s) / T::from_f64(s.len() as f64) * r * r;
    for (dx, &s) in dx.iter_mut().zip(s) {
        *dx = r * (*dx - s * pull);
    }
}
