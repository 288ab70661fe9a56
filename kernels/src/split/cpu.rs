//! Splits on the processor: tasks of whole rows; sums over rows of fixed runs, in order.

use super::{Activation, LOWEST_LOG, Plan, Run};
use crate::autograd::Value;
use crate::scalar::{Real, rows_per_task, wide};
use crate::strided::elements;
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Rows whose share of the adjoint of the lower bound one task sums.
const ROWS_PER_PARTIAL: usize = 64;

/// f, its complement, and its derivative by x over (1 - b), of a gate.
struct Gate<T> {
    f: T,
    key: T,
    down: T,
    slope: T,
}

impl<T: Real> Gate<T> {
    #[inline(always)]
    fn new(x: T, bound: T) -> Self {
        let (up, down) = (x.sigmoid(), (-x).sigmoid());
        let free = T::one() - bound;
        Self {
            f: bound + free * up,
            key: free * down,
            down,
            slope: free * up * down,
        }
    }

    fn log(&self) -> T {
        let half = T::from_f64(0.5);
        if self.key < half {
            // log1p, to which candle's floats have no door: exact where the key is small.
            let u = T::one() - self.key;
            if u == T::one() {
                return -self.key;
            }
            return u.logarithm() * (-self.key) / (u - T::one());
        }
        let lowest = T::from_f64(LOWEST_LOG);
        let log = self.f.logarithm();
        if log > lowest { log } else { lowest }
    }

    /// f, where something is divided by it.
    #[inline(always)]
    fn divisor(&self) -> T {
        let least = T::from_f64(LOWEST_LOG.exp());
        if self.f > least { self.f } else { least }
    }

    /// df/dx over f.
    #[inline(always)]
    fn relative_slope(&self, bound: T) -> T {
        if bound == T::zero() {
            self.down
        } else {
            self.slope / self.divisor()
        }
    }
}

fn at<T: Real>(bound: &[T], c: usize) -> T {
    bound.get(c).copied().unwrap_or(T::zero())
}

pub(super) fn forward<T: Real>(plan: &Plan, x: &Tensor, bound: Option<&Tensor>) -> Result<Vec<Value>> {
    let bound = bound.map(elements::<T>).transpose()?.unwrap_or_default();
    let data = elements::<T>(x)?;
    let mut values = Vec::new();
    for run in &plan.runs {
        let mut made = vec![vec![T::zero(); plan.rows * run.width]];
        let rows = rows_per_task(run.width);
        let source = || data.par_chunks(rows * plan.width);
        let columns = run.first..run.first + run.width;
        if run.activation == Activation::Gate {
            let mut logs = vec![T::zero(); plan.rows * run.width];
            let results = made[0]
                .par_chunks_mut(rows * run.width)
                .zip(logs.par_chunks_mut(rows * run.width));
            results.zip(source()).for_each(|((keys, logs), x)| {
                let results = keys
                    .chunks_exact_mut(run.width)
                    .zip(logs.chunks_exact_mut(run.width));
                for ((keys, logs), x) in results.zip(x.chunks_exact(plan.width)) {
                    for (c, &x) in x[columns.clone()].iter().enumerate() {
                        let gate = Gate::new(x, at(&bound, c));
                        (keys[c], logs[c]) = (gate.key, gate.log());
                    }
                }
            });
            made.push(logs);
        } else {
            made[0]
                .par_chunks_mut(rows * run.width)
                .zip(source())
                .for_each(|(y, x)| {
                    wide(|| {
                        for (y, x) in y.chunks_exact_mut(run.width).zip(x.chunks_exact(plan.width)) {
                            let x = &x[columns.clone()];
                            match run.activation {
                                Activation::Silu => {
                                    for (y, &x) in y.iter_mut().zip(x) {
                                        *y = x * x.sigmoid();
                                    }
                                }
                                _ => y.copy_from_slice(x),
                            }
                        }
                    });
                });
        }
        let shape = plan.shape(x, run);
        values.extend(
            made.into_iter()
                .map(|made| Value::Cpu(T::to_cpu_storage_owned(made), shape.clone())),
        );
    }
    Ok(values)
}

pub(super) fn backward<T: Real>(
    plan: &Plan,
    x: &Tensor,
    bound: Option<&Tensor>,
    adjoints: &[Option<Tensor>],
) -> Result<Vec<Option<Tensor>>> {
    let limits = bound.map(elements::<T>).transpose()?.unwrap_or_default();
    let data = match plan.is_plain() {
        true => Vec::new(),
        false => elements::<T>(x)?,
    };
    let mut dx = vec![T::zero(); plan.rows * plan.width];
    let mut d_bound = None;
    for run in &plan.runs {
        let adjoint = |result: usize| -> Result<Option<Vec<T>>> {
            match adjoints.get(result) {
                Some(adjoint) => adjoint.as_ref().map(elements::<T>).transpose(),
                None => bail!("split: {} adjoints", adjoints.len()),
            }
        };
        let dy = adjoint(run.result)?;
        if run.activation == Activation::Gate {
            let d_log = adjoint(run.result + 1)?;
            let sums = gate(
                plan,
                run,
                &data,
                &limits,
                [dy.as_deref(), d_log.as_deref()],
                &mut dx,
            );
            d_bound = bound
                .map(|bound| Tensor::from_vec(sums, run.width, bound.device()))
                .transpose()?;
            continue;
        }
        let Some(dy) = dy else { continue };
        let rows = rows_per_task(run.width);
        let columns = run.first..run.first + run.width;
        let tasks = dx.par_chunks_mut(rows * plan.width);
        if run.activation == Activation::Plain {
            tasks.zip(dy.par_chunks(rows * run.width)).for_each(|(dx, dy)| {
                for (dx, dy) in dx.chunks_exact_mut(plan.width).zip(dy.chunks_exact(run.width)) {
                    dx[columns.clone()].copy_from_slice(dy);
                }
            });
            continue;
        }
        tasks
            .zip(data.par_chunks(rows * plan.width))
            .zip(dy.par_chunks(rows * run.width))
            .for_each(|((dx, x), dy)| {
                wide(|| {
                    let rows = dx.chunks_exact_mut(plan.width).zip(x.chunks_exact(plan.width));
                    for ((dx, x), dy) in rows.zip(dy.chunks_exact(run.width)) {
                        let (dx, x) = (&mut dx[columns.clone()], &x[columns.clone()]);
                        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
                            let s = x.sigmoid();
                            *dx = dy * s * (T::one() + x * (T::one() - s));
                        }
                    }
                });
            });
    }
    let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
    Ok([vec![Some(dx)], bound.map(|_| d_bound).into_iter().collect()].concat())
}

/// Writes the adjoint of the columns of a gate, and returns that of its lower bound.
fn gate<T: Real>(
    plan: &Plan,
    run: &Run,
    x: &[T],
    bound: &[T],
    [d_key, d_log]: [Option<&[T]>; 2],
    dx: &mut [T],
) -> Vec<T> {
    let given = |adjoint: Option<&[T]>, at: usize| adjoint.map_or(T::zero(), |adjoint| adjoint[at]);
    let partials: Vec<Vec<T>> = dx
        .par_chunks_mut(ROWS_PER_PARTIAL * plan.width)
        .zip(x.par_chunks(ROWS_PER_PARTIAL * plan.width))
        .enumerate()
        .map(|(task, (dx, x))| {
            let mut sums = vec![T::zero(); run.width];
            let rows = dx.chunks_exact_mut(plan.width).zip(x.chunks_exact(plan.width));
            for (row, (dx, x)) in rows.enumerate() {
                let first = (task * ROWS_PER_PARTIAL + row) * run.width;
                for (c, sum) in sums.iter_mut().enumerate() {
                    let (b, column) = (at(bound, c), run.first + c);
                    let gate = Gate::new(x[column], b);
                    let (d_key, d_log) = (given(d_key, first + c), given(d_log, first + c));
                    dx[column] = d_log * gate.relative_slope(b) - d_key * gate.slope;
                    *sum += (d_log / gate.divisor() - d_key) * gate.down;
                }
            }
            sums
        })
        .collect();
    let mut sums = vec![T::zero(); run.width];
    for partial in partials {
        for (sum, part) in sums.iter_mut().zip(partial) {
            *sum += part;
        }
    }
    sums
}
