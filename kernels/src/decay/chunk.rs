//! Multi-threaded CPU form of the decayed recurrence, `f32` or `f64`: passes over chunks of 64 tokens.
//!
//! ```text
//!   forward    U_c = (K decayed to the end of chunk c)^T V          all chunks in parallel
//!              S_c = diag(exp A_c) S_{c-1} + U_c                    in order, heads in parallel
//!              o   = intra + (Q decayed from the start) S_{c-1}     all chunks in parallel
//!   backward   W_c = (Q decayed from the start)^T dO                all chunks in parallel
//!              G_{c-1} = diag(exp A_c) G_c + W_c                    in reverse, heads in parallel
//!              dq, dk, dv, dlog a from S_{c-1}, S_c and G_c         all chunks in parallel
//! ```
//!
//! A_c is the total log-decay of chunk c and G_c the adjoint of the state after it. What happens inside a chunk is in
//! `uniform.rs` for one decay a head and token, and in `channel.rs` for one a channel. Chunks depend on the shape alone
//! and sums over them are taken in order: results have the same bits for any number of threads. The passes that write
//! tokens have one task a chunk, for all heads: sequences of up to 64 tokens in a batch of one run on one thread there.
//!
//! Exponents are sums of log-decays, never differences: they are at most zero, a decay of zero (negative infinity) does
//! no harm, and nothing cancels. The gradient of the log-decays is taken chunk by chunk, in `gate.rs`.

use super::gate::{Gate, sums_of_heads};
use super::plan::{Chunk, Dims, Plan};
use super::{channel, uniform};
use crate::exchange::Direction;
use crate::scalar::wide;
use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, View, matmul};
use rayon::prelude::*;

/// Logarithms of decays.
#[derive(Clone, Copy)]
pub(super) enum Decay<'a, T> {
    None,
    /// `[H]`.
    Head(&'a [T]),
    /// `[B, N, H, 1]`.
    Token(View<'a, T>),
    /// `[B, N, H, D]`.
    Channel(View<'a, T>),
}

impl<T: SliceMath> Decay<'_, T> {
    /// Decays of a token and head.
    pub(super) fn width(&self, d: usize) -> usize {
        if matches!(self, Self::Channel(_)) { d } else { 1 }
    }

    /// Logarithms of a chunk `[tokens, width]`.
    pub(super) fn load(&self, chunk: &Chunk, head: usize, out: &mut [T]) {
        match self {
            Self::None => out.fill(T::zero()),
            Self::Head(log) => out.fill(log[head]),
            Self::Token(log) | Self::Channel(log) => log.pack(chunk.batch, &chunk.tokens, head, out),
        }
    }

    /// Sums of `log` over the tokens up to each, itself included; a constant is multiplied.
    pub(super) fn sums_from_start(&self, log: &[T], width: usize, out: &mut [T]) {
        out.copy_from_slice(log);
        if let Self::Head(_) = self {
            for (i, out) in out.iter_mut().enumerate() {
                *out = multiple(*out, i + 1);
            }
            return;
        }
        for row in 1..out.len() / width {
            let (before, out) = out.split_at_mut(row * width);
            add(&mut out[..width], &before[(row - 1) * width..]);
        }
    }

    /// Sums of `log` over the tokens after each; a constant is multiplied.
    pub(super) fn sums_to_end(&self, log: &[T], width: usize, out: &mut [T]) {
        let rows = out.len() / width;
        out[(rows - 1) * width..].fill(T::zero());
        if let Self::Head(_) = self {
            for (i, (out, &log)) in out.iter_mut().rev().zip(log).enumerate() {
                *out = multiple(log, i);
            }
            return;
        }
        for row in (0..rows - 1).rev() {
            let (out, after) = out[row * width..].split_at_mut(width);
            out.copy_from_slice(&after[..width]);
            add(out, &log[(row + 1) * width..][..width]);
        }
    }
}

/// `count` times a log-decay, zero for none of it even where it is infinite.
pub(super) fn multiple<T: SliceMath>(log: T, count: usize) -> T {
    if count == 0 {
        T::zero()
    } else {
        log * T::from_f64(count as f64)
    }
}

#[inline(always)]
pub(super) fn add<T: SliceMath>(sum: &mut [T], terms: &[T]) {
    for (sum, &term) in sum.iter_mut().zip(terms) {
        *sum += term;
    }
}

#[inline(always)]
pub(super) fn scale<T: SliceMath>(values: &mut [T], factors: &[T]) {
    for (value, &factor) in values.iter_mut().zip(factors) {
        *value *= factor;
    }
}

/// Scales rows of `width` values, `stride` apart: each by its own factor, or by its own row of factors.
pub(super) fn scale_rows<T: SliceMath>(
    values: &mut [T],
    stride: usize,
    width: usize,
    factors: &[T],
    each: usize,
) {
    wide(
        #[inline(always)]
        || {
            for (row, factors) in values.chunks_mut(stride).zip(factors.chunks_exact(each)) {
                let row = &mut row[..width];
                if each == 1 {
                    let factor = factors[0];
                    row.iter_mut().for_each(|value| *value *= factor);
                } else {
                    scale(row, factors);
                }
            }
        },
    );
}

/// What the recurrence reads.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a, T> {
    pub(super) q: View<'a, T>,
    pub(super) k: View<'a, T>,
    pub(super) v: View<'a, T>,
    pub(super) decay: Decay<'a, T>,
}

/// Total log-decay of every slot, `[slots, width]`.
pub(super) fn log_totals<T: SliceMath>(plan: &Plan, decay: Decay<T>) -> Vec<T> {
    let width = decay.width(plan.dims.d);
    let slots = plan.slots();
    let mut totals = vec![T::zero(); slots.len() * width];
    totals
        .par_chunks_mut(width)
        .zip(slots)
        .for_each(|(total, (chunk, head))| match decay {
            Decay::None => {}
            Decay::Head(log) => total.fill(multiple(log[head], chunk.len())),
            Decay::Token(_) | Decay::Channel(_) => {
                let mut log = vec![T::zero(); chunk.len() * width];
                decay.load(chunk, head, &mut log);
                log.chunks_exact(width).for_each(|log| add(total, log));
            }
        });
    totals
}

/// Total log-decay of every sequence and head, `[sequences, H, width]`.
pub(super) fn sequence_totals<T: SliceMath>(plan: &Plan, totals: &[T]) -> Vec<T> {
    let width = totals.len() / plan.slot_count();
    let mut sums = Vec::with_capacity(plan.sequences() * plan.dims.h * width);
    for line in plan.lines() {
        sums.extend((0..width).map(|c| {
            let totals = line.clone().map(|slot| totals[slot * width + c].to_f64());
            T::from_f64(totals.sum())
        }));
    }
    sums
}

/// `U_c`, `[slots, D, E]`: what every chunk adds to the state.
pub(super) fn local_states<T: SliceMath>(plan: &Plan, inputs: &Inputs<T>) -> Vec<T> {
    outer_products(plan, inputs.decay, inputs.k, inputs.v, Direction::Forward)
}

/// `W_c`, `[slots, D, E]`: what every chunk adds to the adjoint of the state before it.
pub(super) fn local_adjoints<T: SliceMath>(plan: &Plan, inputs: &Inputs<T>, d_o: View<T>) -> Vec<T> {
    outer_products(plan, inputs.decay, inputs.q, d_o, Direction::Backward)
}

/// `(x decayed)^T y` of every slot: decayed from each token to the end of the chunk, or back to its start.
fn outer_products<T: SliceMath>(
    plan: &Plan,
    decay: Decay<T>,
    x: View<T>,
    y: View<T>,
    direction: Direction,
) -> Vec<T> {
    let Dims { d, e, .. } = plan.dims;
    let width = decay.width(d);
    let slots = plan.slots();
    let mut products = vec![T::zero(); slots.len() * d * e];
    products
        .par_chunks_mut(d * e)
        .zip(slots)
        .for_each(|(product, (chunk, head))| {
            let y = y.tokens(chunk.batch, &chunk.tokens, head);
            if let Decay::None = decay {
                let x = x.tokens(chunk.batch, &chunk.tokens, head);
                matmul(product, e, x.t(), y, Into::Set);
                return;
            }
            let mut decayed = vec![T::zero(); chunk.len() * d];
            let mut log = vec![T::zero(); chunk.len() * width];
            let mut factors = log.clone();
            x.pack(chunk.batch, &chunk.tokens, head, &mut decayed);
            decay.load(chunk, head, &mut log);
            match direction {
                Direction::Forward => decay.sums_to_end(&log, width, &mut factors),
                Direction::Backward => decay.sums_from_start(&log, width, &mut factors),
            }
            T::exp(&mut factors);
            scale_rows(&mut decayed, d, d, &factors, width);
            matmul(
                product,
                e,
                Mat::packed(&decayed, chunk.len(), d).t(),
                y,
                Into::Set,
            );
        });
    products
}

/// `state += diag(exp(log)) entered`.
fn add_decayed<T: SliceMath>(state: &mut [T], entered: &[T], log: &[T], e: usize) {
    let mut factors = log.to_vec();
    T::exp(&mut factors);
    wide(
        #[inline(always)]
        || {
            for (row, (state, entered)) in state.chunks_exact_mut(e).zip(entered.chunks_exact(e)).enumerate()
            {
                let factor = factors[row % factors.len()];
                for (state, &entered) in state.iter_mut().zip(entered) {
                    *state += factor * entered;
                }
            }
        },
    );
}

/// States that enter at one end of every sequence, or zeros.
fn entering_or_zeros<T: SliceMath>(plan: &Plan, entering: Option<&[T]>) -> Vec<T> {
    let Dims { h, d, e, .. } = plan.dims;
    match entering {
        Some(entering) => entering.to_vec(),
        None => vec![T::zero(); plan.sequences() * h * d * e],
    }
}

fn order(slots: usize, direction: Direction) -> impl Iterator<Item = usize> {
    (0..slots).map(move |i| match direction {
        Direction::Forward => i,
        Direction::Backward => slots - 1 - i,
    })
}

/// The states that leave every sequence, `[sequences, H, D, E]`, given those that enter.
pub(super) fn leaving<T: SliceMath>(
    plan: &Plan,
    totals: &[T],
    locals: &[T],
    entering: Option<&[T]>,
    direction: Direction,
) -> Vec<T> {
    let Dims { d, e, .. } = plan.dims;
    let width = totals.len() / plan.slot_count();
    let mut states = entering_or_zeros(plan, entering);
    states
        .par_chunks_mut(d * e)
        .zip(plan.lines())
        .for_each(|(state, line)| {
            let mut entered = vec![T::zero(); d * e];
            for i in order(line.len(), direction) {
                let slot = line.start + i;
                entered.copy_from_slice(state);
                state.copy_from_slice(&locals[slot * d * e..][..d * e]);
                add_decayed(state, &entered, &totals[slot * width..][..width], e);
            }
        });
    states
}

/// [`leaving`], with the local states replaced by those that enter every chunk.
pub(super) fn scan<T: SliceMath>(
    plan: &Plan,
    totals: &[T],
    locals: &mut [T],
    entering: Option<&[T]>,
    direction: Direction,
) -> Vec<T> {
    let Dims { d, e, .. } = plan.dims;
    let width = totals.len() / plan.slot_count();
    let mut states = entering_or_zeros(plan, entering);
    let mut rest = locals;
    let mut tasks = Vec::with_capacity(plan.sequences() * plan.dims.h);
    for (state, line) in states.chunks_exact_mut(d * e).zip(plan.lines()) {
        let (locals, tail) = std::mem::take(&mut rest).split_at_mut(line.len() * d * e);
        tasks.push((state, locals, &totals[line.start * width..line.end * width]));
        rest = tail;
    }
    tasks.into_par_iter().for_each(|(state, locals, totals)| {
        for i in order(totals.len() / width, direction) {
            let local = &mut locals[i * d * e..][..d * e];
            // The state that enters stays behind, and what the chunk adds goes on to the state that leaves.
            local.swap_with_slice(state);
            add_decayed(state, local, &totals[i * width..][..width], e);
        }
    });
    states
}

/// Outputs `[B, N, H, E]`, given the states that enter every chunk; without them, what tokens of the same chunk give.
pub(super) fn outputs<T: SliceMath>(plan: &Plan, inputs: &Inputs<T>, states: Option<&[T]>) -> Vec<T> {
    let Dims { b, n, h, d, e } = plan.dims;
    let mut o = vec![T::zero(); b * n * h * e];
    let tasks: Vec<_> = plan
        .split(&mut o, h * e)
        .into_iter()
        .zip(&plan.chunks)
        .zip(plan.places())
        .collect();
    tasks.into_par_iter().for_each(|((o, chunk), place)| {
        let mut uniform = uniform::Scratch::new(chunk.len());
        let mut channel = channel::Scratch::default();
        for head in 0..h {
            let slot = place.slot + head * place.stride;
            let state = states.map(|states| Mat::packed(&states[slot * d * e..][..d * e], d, e));
            let o = &mut o[head * e..];
            match inputs.decay {
                Decay::Channel(_) => channel.output(inputs, (chunk, head), state, (o, h * e)),
                _ => uniform.output(inputs, (chunk, head), state, (o, h * e)),
            }
        }
    });
    o
}

/// Adjoints of the inputs: `dlog` is shaped like the log-decays, and empty without.
pub(super) struct Adjoints<T> {
    pub(super) dq: Vec<T>,
    pub(super) dk: Vec<T>,
    pub(super) dv: Vec<T>,
    pub(super) dlog: Vec<T>,
}

/// What the two scans left behind.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    /// States that enter chunks, `[slots, D, E]`.
    pub(super) states: &'a [T],
    /// Final states of sequences, `[sequences, H, D, E]`.
    pub(super) finals: &'a [T],
    /// Adjoints of the states that leave chunks, `[slots, D, E]`.
    pub(super) adjoints: &'a [T],
}

/// The matrices that one chunk and head see in backward.
pub(super) struct Borders<'a, T> {
    pub(super) d_o: Mat<'a, T>,
    /// The state that enters.
    pub(super) state: Mat<'a, T>,
    /// The adjoint of the state that leaves.
    pub(super) adjoint: Mat<'a, T>,
}

/// Where a chunk and head write their adjoints: first rows, with the distance of rows for keys and for values.
pub(super) struct Slots<'a, T> {
    pub(super) dq: &'a mut [T],
    pub(super) dk: &'a mut [T],
    pub(super) dv: &'a mut [T],
    pub(super) key_stride: usize,
    pub(super) value_stride: usize,
}

/// Backward of [`outputs`] and of the states; the gradient of the decays only where it is wanted.
pub(super) fn backward<T: SliceMath>(
    plan: &Plan,
    inputs: &Inputs<T>,
    d_o: View<T>,
    saved: Saved<T>,
    want_decay: bool,
) -> Adjoints<T> {
    let Dims { b, n, h, d, e } = plan.dims;
    let width = inputs.decay.width(d);
    let mut dq = vec![T::zero(); b * n * h * d];
    let mut dk = vec![T::zero(); b * n * h * d];
    let mut dv = vec![T::zero(); b * n * h * e];
    let mut dlog = vec![T::zero(); if want_decay { b * n * h * width } else { 0 }];
    let tasks: Vec<_> = plan
        .split(&mut dq, h * d)
        .into_iter()
        .zip(plan.split(&mut dk, h * d))
        .zip(plan.split(&mut dv, h * e))
        .zip(plan.split(&mut dlog, h * width))
        .zip(&plan.chunks)
        .zip(plan.places())
        .collect();
    tasks
        .into_par_iter()
        .for_each(|(((((dq, dk), dv), dlog), chunk), place)| {
            let mut uniform = uniform::Scratch::new(chunk.len());
            let mut channel = channel::Scratch::default();
            let mut gate = Gate::new(chunk.len(), d, width);
            for head in 0..h {
                let slot = place.slot + head * place.stride;
                let adjoint = &saved.adjoints[slot * d * e..][..d * e];
                let borders = Borders {
                    d_o: d_o.tokens(chunk.batch, &chunk.tokens, head),
                    state: Mat::packed(&saved.states[slot * d * e..][..d * e], d, e),
                    adjoint: Mat::packed(adjoint, d, e),
                };
                let slots = Slots {
                    dq: &mut dq[head * d..],
                    dk: &mut dk[head * d..],
                    dv: &mut dv[head * e..],
                    key_stride: h * d,
                    value_stride: h * e,
                };
                match inputs.decay {
                    Decay::Channel(_) => channel.adjoints(inputs, (chunk, head), borders, slots),
                    _ => uniform.adjoints(inputs, (chunk, head), borders, slots),
                }
                if want_decay {
                    let leaves = if place.is_last {
                        &saved.finals[(place.sequence * h + head) * d * e..][..d * e]
                    } else {
                        &saved.states[(slot + 1) * d * e..][..d * e]
                    };
                    let rows = (&dq[head * d..], &dk[head * d..], h * d);
                    gate.run(
                        inputs,
                        (chunk, head),
                        (leaves, adjoint),
                        rows,
                        (&mut dlog[head * width..], h * width),
                    );
                }
            }
        });
    if let (true, Decay::Head(_)) = (want_decay, inputs.decay) {
        dlog = sums_of_heads(&dlog, h);
    }
    Adjoints { dq, dk, dv, dlog }
}
