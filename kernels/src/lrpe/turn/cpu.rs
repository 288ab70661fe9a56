//! Turned rows on the processor: sines and cosines of all phases once, then tasks of whole tokens.

use super::{Form, Pairing, Turn};
use crate::autograd::Value;
use crate::scalar::{rows_per_task, wide};
use crate::slice_math::SliceMath;
use crate::strided::{contiguous, elements};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Sines and cosines of all phases, `[N, groups, P]`.
struct Turns<T> {
    sin: Vec<T>,
    cos: Vec<T>,
}

impl<T: SliceMath> Turns<T> {
    /// None of what has no phases.
    fn of(phase: Option<&Tensor>) -> Result<Self> {
        const PER_TASK: usize = 1024;
        let Some(phase) = phase else {
            let (sin, cos) = (Vec::new(), Vec::new());
            return Ok(Self { sin, cos });
        };
        let phase: Vec<T> = elements(&phase.detach().to_dtype(T::DTYPE)?)?;
        let (mut sin, mut cos) = (vec![T::zero(); phase.len()], vec![T::zero(); phase.len()]);
        sin.par_chunks_mut(PER_TASK)
            .zip(cos.par_chunks_mut(PER_TASK))
            .zip(phase.par_chunks(PER_TASK))
            .for_each(|((sin, cos), phase)| T::sin_cos(phase, sin, cos));
        Ok(Self { sin, cos })
    }

    /// Those of a head of a token.
    fn row(&self, turn: &Turn, token: usize, head: usize) -> [&[T]; 2] {
        if turn.form == Form::Copied {
            return [&[], &[]];
        }
        let group = if turn.by_head { head } else { 0 };
        let at = (token * turn.groups() + group) * turn.p;
        [&self.sin[at..at + turn.p], &self.cos[at..at + turn.p]]
    }
}

/// `(a, b)` to `(a cos - b sin, a sin + b cos)` for all pairs of a row; `sign` -1 turns back.
#[inline(always)]
fn rotate_row<T: SliceMath>(pairing: Pairing, sign: T, x: &[T], [sin, cos]: [&[T]; 2], y: &mut [T]) {
    match pairing {
        Pairing::Halves => {
            let ((a, b), (y_a, y_b)) = (x.split_at(sin.len()), y.split_at_mut(sin.len()));
            let turns = sin.iter().zip(cos);
            for ((((&a, &b), y_a), y_b), (&sin, &cos)) in a.iter().zip(b).zip(y_a).zip(y_b).zip(turns) {
                *y_a = a * cos - b * sin * sign;
                *y_b = a * sin * sign + b * cos;
            }
        }
        Pairing::Neighbours => {
            let pairs = x.chunks_exact(2).zip(y.chunks_exact_mut(2));
            for ((x, y), (&sin, &cos)) in pairs.zip(sin.iter().zip(cos)) {
                y[0] = x[0] * cos - x[1] * sin * sign;
                y[1] = x[0] * sin * sign + x[1] * cos;
            }
        }
    }
}

pub(super) fn forward<T: SliceMath>(turn: &Turn, x: &Tensor, phase: Option<&Tensor>) -> Result<Value> {
    let turns = Turns::<T>::of(phase)?;
    let guard = x.storage_and_layout().0;
    let x = contiguous::<T>(x, &guard)?;
    let (width, out) = (turn.width(), turn.out());
    let mut y = vec![T::zero(); turn.b * turn.n * turn.h * out];
    let tokens = rows_per_task(turn.h * out);
    let tasks = y
        .par_chunks_mut(tokens * turn.h * out)
        .zip(x.par_chunks(tokens * turn.h * width));
    tasks.enumerate().for_each(|(task, (y, x))| {
        let rows = y.chunks_exact_mut(out).zip(x.chunks_exact(width));
        wide(
            #[inline(always)]
            || {
                for (i, (y, x)) in rows.enumerate() {
                    let token = (task * tokens + i / turn.h) % turn.n;
                    let [sin, cos] = turns.row(turn, token, i % turn.h);
                    match turn.form {
                        Form::Rotated(pairing) => rotate_row(pairing, T::one(), x, [sin, cos], y),
                        Form::Copied => {
                            y[..turn.p].copy_from_slice(&x[..turn.p]);
                            y[turn.p..].copy_from_slice(x);
                        }
                        Form::Doubled => {
                            let (y_a, y_b) = y.split_at_mut(turn.p);
                            y_b[turn.p..].copy_from_slice(&x[turn.p..]);
                            let turns = sin.iter().zip(cos);
                            for (((&x, y_a), y_b), (&sin, &cos)) in x.iter().zip(y_a).zip(y_b).zip(turns) {
                                *y_a = x * cos;
                                *y_b = x * sin;
                            }
                        }
                    }
                }
            },
        );
    });
    let shape = (turn.b, turn.n, turn.h, out);
    Ok(Value::Cpu(T::to_cpu_storage_owned(y), shape.into()))
}

pub(super) fn backward<T: SliceMath>(
    turn: &Turn,
    x: &Tensor,
    phase: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let turns = Turns::<T>::of(phase)?;
    let guards = [x, grad].map(|t| t.storage_and_layout().0);
    let dy = contiguous::<T>(grad, &guards[1])?;
    let (width, out) = (turn.width(), turn.out());
    let mut dx = vec![T::zero(); turn.b * turn.n * turn.h * width];
    let tokens = rows_per_task(turn.h * out);
    let tasks = dx
        .par_chunks_mut(tokens * turn.h * width)
        .zip(dy.par_chunks(tokens * turn.h * out));
    tasks.enumerate().for_each(|(task, (dx, dy))| {
        let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(out));
        wide(
            #[inline(always)]
            || {
                for (i, (dx, dy)) in rows.enumerate() {
                    let token = (task * tokens + i / turn.h) % turn.n;
                    let [sin, cos] = turns.row(turn, token, i % turn.h);
                    match turn.form {
                        Form::Rotated(pairing) => rotate_row(pairing, -T::one(), dy, [sin, cos], dx),
                        Form::Copied => {
                            let (a, b) = dy.split_at(turn.p);
                            dx.copy_from_slice(b);
                            for (dx, &a) in dx.iter_mut().zip(a) {
                                *dx += a;
                            }
                        }
                        Form::Doubled => {
                            let (a, b) = dy.split_at(turn.p);
                            dx[turn.p..].copy_from_slice(&b[turn.p..]);
                            let turns = sin.iter().zip(cos);
                            for (((dx, &a), &b), (&sin, &cos)) in dx.iter_mut().zip(a).zip(b).zip(turns) {
                                *dx = a * cos + b * sin;
                            }
                        }
                    }
                }
            },
        );
    });
    let dphase = match phase.filter(|phase| phase.track_op()) {
        Some(phase) => {
            let sums = phase_adjoints(turn, &turns, contiguous::<T>(x, &guards[0])?, dy, &dx);
            Some(Tensor::from_vec(sums, phase.shape(), phase.device())?)
        }
        None => None,
    };
    Ok((Tensor::from_vec(dx, x.shape(), x.device())?, dphase))
}

/// Sums over the rows that share a phase, in their order.
fn phase_adjoints<T: SliceMath>(turn: &Turn, turns: &Turns<T>, x: &[T], dy: &[T], dx: &[T]) -> Vec<T> {
    let (width, out, p) = (turn.width(), turn.out(), turn.p);
    let of_token = turn.groups() * p;
    let mut sums = vec![T::zero(); turn.n * of_token];
    let tokens = rows_per_task(turn.b * turn.h * out);
    sums.par_chunks_mut(tokens * of_token)
        .enumerate()
        .for_each(|(task, sums)| {
            wide(
                #[inline(always)]
                || {
                    for (i, sums) in sums.chunks_exact_mut(of_token).enumerate() {
                        let token = task * tokens + i;
                        for (b, head) in (0..turn.b).flat_map(|b| (0..turn.h).map(move |head| (b, head))) {
                            let row = (b * turn.n + token) * turn.h + head;
                            let group = if turn.by_head { head } else { 0 };
                            let sums = &mut sums[group * p..(group + 1) * p];
                            let x = &x[row * width..(row + 1) * width];
                            match turn.form {
                                Form::Rotated(pairing) => {
                                    add_areas(pairing, x, &dx[row * width..(row + 1) * width], sums);
                                }
                                Form::Copied => {}
                                Form::Doubled => {
                                    let [sin, cos] = turns.row(turn, token, head);
                                    let (a, b) = dy[row * out..(row + 1) * out].split_at(p);
                                    let turns = sin.iter().zip(cos);
                                    for ((((sum, &x), &a), &b), (&sin, &cos)) in
                                        sums.iter_mut().zip(x).zip(a).zip(b).zip(turns)
                                    {
                                        *sum += x * (b * cos - a * sin);
                                    }
                                }
                            }
                        }
                    }
                },
            );
        });
    sums
}

/// Adds `x_a dx_b - x_b dx_a` of each pair.
#[inline(always)]
fn add_areas<T: SliceMath>(pairing: Pairing, x: &[T], dx: &[T], sums: &mut [T]) {
    match pairing {
        Pairing::Halves => {
            let ((a, b), (d_a, d_b)) = (x.split_at(sums.len()), dx.split_at(sums.len()));
            for ((((sum, &a), &b), &d_a), &d_b) in sums.iter_mut().zip(a).zip(b).zip(d_a).zip(d_b) {
                *sum += a * d_b - b * d_a;
            }
        }
        Pairing::Neighbours => {
            for ((sum, x), dx) in sums.iter_mut().zip(x.chunks_exact(2)).zip(dx.chunks_exact(2)) {
                *sum += x[0] * dx[1] - x[1] * dx[0];
            }
        }
    }
}
