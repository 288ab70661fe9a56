//! The gated norm on the processor: tasks of whole tokens, sweeps over heads that lie in the first cache.

use super::{Gate, Gated};
use crate::autograd::Value;
use crate::norm::cpu::{TOKENS_PER_PARTIAL, add_partials, inverse_rms, parameter_or};
use crate::scalar::{Real, rows_per_task, sum_of, wide};
use crate::strided::Rows;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// An activation and its derivative.
trait Activation {
    fn of<T: Real>(g: T) -> (T, T);
}

struct Identity;
struct Sigmoid;
struct Silu;

impl Activation for Identity {
    #[inline(always)]
    fn of<T: Real>(g: T) -> (T, T) {
        (g, T::one())
    }
}

impl Activation for Sigmoid {
    #[inline(always)]
    fn of<T: Real>(g: T) -> (T, T) {
        let s = g.sigmoid();
        (s, s * (T::one() - s))
    }
}

impl Activation for Silu {
    #[inline(always)]
    fn of<T: Real>(g: T) -> (T, T) {
        let s = g.sigmoid();
        (g * s, s * (T::one() + g * (T::one() - s)))
    }
}

/// Operands of a pass; a gain of ones where there is none.
struct Operands<'a, T> {
    x: Rows<'a, T>,
    gate: Rows<'a, T>,
    gain: &'a [T],
}

pub(super) fn forward<T: Real>(
    op: &Gated,
    x: &Tensor,
    gate: &Tensor,
    gain: Option<&Tensor>,
) -> Result<Value> {
    let gain = parameter_or(gain, T::one(), op.columns())?;
    let guards = [x.storage_and_layout().0, gate.storage_and_layout().0];
    let operands = Operands {
        x: Rows::of(x, &guards[0])?,
        gate: Rows::of(gate, &guards[1])?,
        gain: &gain,
    };
    let y = match op.activation {
        Gate::Identity => outputs::<T, Identity>(op, &operands),
        Gate::Sigmoid => outputs::<T, Sigmoid>(op, &operands),
        Gate::Silu => outputs::<T, Silu>(op, &operands),
    };
    Ok(Value::Cpu(T::to_cpu_storage_owned(y), x.shape().clone()))
}

fn outputs<T: Real, A: Activation>(op: &Gated, operands: &Operands<'_, T>) -> Vec<T> {
    let (columns, width) = (op.columns(), op.width);
    let tokens = rows_per_task(columns);
    let mut y = vec![T::zero(); op.tokens * columns];
    y.par_chunks_mut(tokens * columns)
        .enumerate()
        .for_each(|(task, y)| {
            wide(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_exact_mut(columns).enumerate() {
                        let token = task * tokens + i;
                        let heads = y
                            .chunks_exact_mut(width)
                            .zip(operands.x.row(token).chunks_exact(width))
                            .zip(operands.gate.row(token).chunks_exact(width))
                            .zip(operands.gain.chunks_exact(width));
                        for (((y, x), gate), gain) in heads {
                            let r = inverse_rms(x, op.eps);
                            for (((y, &x), &g), &gain) in y.iter_mut().zip(x).zip(gate).zip(gain) {
                                *y = x * r * gain * A::of(g).0;
                            }
                        }
                    }
                },
            );
        });
    y
}

pub(super) fn backward<T: Real>(
    op: &Gated,
    [x, gate]: [&Tensor; 2],
    gain: Option<&Tensor>,
    grad: &Tensor,
) -> Result<[Option<Tensor>; 3]> {
    let weights = parameter_or(gain, T::one(), op.columns())?;
    let guards = [x, gate, grad].map(|t| t.storage_and_layout().0);
    let operands = Operands {
        x: Rows::of(x, &guards[0])?,
        gate: Rows::of(gate, &guards[1])?,
        gain: &weights,
    };
    let dy = Rows::of(grad, &guards[2])?;
    let adjoints = match op.activation {
        Gate::Identity => adjoints::<T, Identity>(op, &operands, dy),
        Gate::Sigmoid => adjoints::<T, Sigmoid>(op, &operands, dy),
        Gate::Silu => adjoints::<T, Silu>(op, &operands, dy),
    };
    let dgain = gain
        .map(|gain| Tensor::from_vec(adjoints.dgain, gain.shape(), gain.device()))
        .transpose()?;
    let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
    Ok([
        Some(tensor(adjoints.dx, x)?),
        Some(tensor(adjoints.dgate, gate)?),
        dgain,
    ])
}

struct Adjoints<T> {
    dx: Vec<T>,
    dgate: Vec<T>,
    dgain: Vec<T>,
}

fn adjoints<T: Real, A: Activation>(op: &Gated, operands: &Operands<'_, T>, dy: Rows<'_, T>) -> Adjoints<T> {
    let columns = op.columns();
    let mut dx = vec![T::zero(); op.tokens * columns];
    let mut dgate = vec![T::zero(); op.tokens * columns];
    let mut partials = vec![T::zero(); op.tokens.div_ceil(TOKENS_PER_PARTIAL) * columns];
    let runs = dx
        .par_chunks_mut(TOKENS_PER_PARTIAL * columns)
        .zip(dgate.par_chunks_mut(TOKENS_PER_PARTIAL * columns))
        .zip(partials.par_chunks_mut(columns));
    runs.enumerate().for_each(|(run, ((dx, dgate), dgain))| {
        let mut u = vec![T::zero(); op.width];
        let tokens = dx.chunks_exact_mut(columns).zip(dgate.chunks_exact_mut(columns));
        wide(
            #[inline(always)]
            || {
                for (i, (dx, dgate)) in tokens.enumerate() {
                    let token = run * TOKENS_PER_PARTIAL + i;
                    for head in 0..op.heads {
                        let part = head * op.width..(head + 1) * op.width;
                        head_adjoints::<T, A>(
                            op,
                            [
                                &operands.x.row(token)[part.clone()],
                                &operands.gate.row(token)[part.clone()],
                                &operands.gain[part.clone()],
                                &dy.row(token)[part.clone()],
                            ],
                            [&mut dx[part.clone()], &mut dgate[part.clone()], &mut dgain[part]],
                            &mut u,
                        );
                    }
                }
            },
        );
    });
    Adjoints {
        dx,
        dgate,
        dgain: add_partials(&partials, columns),
    }
}

/// One head of a token from x, gate, gain and dy: writes dx and dgate and adds to dgain.
#[inline(always)]
fn head_adjoints<T: Real, A: Activation>(
    op: &Gated,
    [x, gate, gain, dy]: [&[T]; 4],
    [dx, dgate, dgain]: [&mut [T]; 3],
    u: &mut [T],
) {
    let r = inverse_rms(x, op.eps);
    let operands = x.iter().zip(gate).zip(gain).zip(dy);
    let results = u.iter_mut().zip(dgate).zip(dgain);
    for ((((&x, &g), &gain), &dy), ((u, dgate), dgain)) in operands.zip(results) {
        let (value, slope) = A::of(g);
        *u = dy * gain * value;
        *dgate = dy * x * r * gain * slope;
        *dgain += dy * x * r * value;
    }
    let pull = sum_of(u, x, |u, x| u * x) / T::from_f64(x.len() as f64) * r * r;
    for ((dx, &x), &u) in dx.iter_mut().zip(x).zip(&*u) {
        *dx = r * (u - x * pull);
    }
}
