//! What the states of other parts add to results that were computed without them, while they were on their way.
//!
//! ```text
//!   o  += diag(start) Q S        dK += diag(end) V G^T       dV += diag(end) K G
//! ```
//!
//! with what enters each chunk, S, and the adjoint G of what leaves it; `start` decays from the start of the chunk to each token,
//! `end` from each token to its end. In passes over chunks as those of `chunk.rs`, with the same bits for any number of threads.

use super::chunk::{Adjoints, Inputs, Saved, add, scale_rows};
use super::gate::{Gate, sums_of_heads};
use super::plan::{Chunk, Dims, Plan};
use super::{Direction, chunk};
use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, View, matmul};
use rayon::prelude::*;

/// Rows of a chunk and head, and what scales them.
struct Rows<T> {
    rows: Vec<T>,
    log: Vec<T>,
    factors: Vec<T>,
}

impl<T: SliceMath> Rows<T> {
    fn new(tokens: usize, channels: usize, width: usize) -> Self {
        Self {
            rows: vec![T::zero(); tokens * channels],
            log: vec![T::zero(); tokens * width],
            factors: vec![T::zero(); tokens * width],
        }
    }

    /// Decays from the start of the chunk to each token, or from each token to its end.
    fn decays(&mut self, inputs: &Inputs<T>, (chunk, head): (&Chunk, usize), direction: Direction) {
        let width = self.factors.len() / chunk.len();
        inputs.decay.load(chunk, head, &mut self.log);
        match direction {
            Direction::Forward => inputs.decay.sums_from_start(&self.log, width, &mut self.factors),
            Direction::Backward => inputs.decay.sums_to_end(&self.log, width, &mut self.factors),
        }
        T::exp(&mut self.factors);
    }

    /// The rows of `x`, decayed.
    fn decayed(&mut self, x: View<T>, (chunk, head): (&Chunk, usize)) -> Mat<'_, T> {
        let (d, width) = (x.channels(), self.factors.len() / chunk.len());
        x.pack(chunk.batch, &chunk.tokens, head, &mut self.rows);
        scale_rows(&mut self.rows, d, d, &self.factors, width);
        Mat::packed(&self.rows, chunk.len(), d)
    }
}

/// Adds what `states` `[slots, D, E]`, which enter chunks, give to the outputs `o`.
pub(super) fn add_outputs<T: SliceMath>(plan: &Plan, inputs: &Inputs<T>, states: &[T], o: &mut [T]) {
    let Dims { h, d, e, .. } = plan.dims;
    let width = inputs.decay.width(d);
    let tasks: Vec<_> = plan
        .split(o, h * e)
        .into_iter()
        .zip(&plan.chunks)
        .zip(plan.places())
        .collect();
    tasks.into_par_iter().for_each(|((o, chunk), place)| {
        let mut queries = Rows::new(chunk.len(), d, width);
        for head in 0..h {
            let slot = place.slot + head * place.stride;
            queries.decays(inputs, (chunk, head), Direction::Forward);
            let q = queries.decayed(inputs.q, (chunk, head));
            let state = Mat::packed(&states[slot * d * e..][..d * e], d, e);
            matmul(&mut o[head * e..], h * e, q, state, Into::Add);
        }
    });
}

/// Adds what `adjoints` `[slots, D, E]` of the states that leave chunks give to the adjoints of keys and values.
pub(super) fn add_adjoints<T: SliceMath>(
    plan: &Plan,
    inputs: &Inputs<T>,
    adjoints: &[T],
    found: &mut Adjoints<T>,
) {
    let Dims { h, d, e, .. } = plan.dims;
    let width = inputs.decay.width(d);
    let tasks: Vec<_> = plan
        .split(&mut found.dk, h * d)
        .into_iter()
        .zip(plan.split(&mut found.dv, h * e))
        .zip(&plan.chunks)
        .zip(plan.places())
        .collect();
    tasks.into_par_iter().for_each(|(((dk, dv), chunk), place)| {
        let mut keys = Rows::new(chunk.len(), d, width);
        let (mut own, mut turned) = (vec![T::zero(); chunk.len() * d], Vec::new());
        for head in 0..h {
            let slot = place.slot + head * place.stride;
            let adjoint = Mat::packed(&adjoints[slot * d * e..][..d * e], d, e);
            keys.decays(inputs, (chunk, head), Direction::Backward);
            let v = inputs.v.tokens(chunk.batch, &chunk.tokens, head);
            matmul(&mut own, d, v, adjoint.turned(&mut turned), Into::Set);
            scale_rows(&mut own, d, d, &keys.factors, width);
            let rows = dk[head * d..].chunks_mut(h * d);
            for (dk, own) in rows.zip(own.chunks_exact(d)) {
                add(&mut dk[..d], own);
            }
            let k = keys.decayed(inputs.k, (chunk, head));
            matmul(&mut dv[head * e..], h * e, k, adjoint, Into::Add);
        }
    });
}

/// The gradient of the log-decays, from finished adjoints of queries and keys.
pub(super) fn gates<T: SliceMath>(
    plan: &Plan,
    inputs: &Inputs<T>,
    saved: Saved<T>,
    found: &Adjoints<T>,
) -> Vec<T> {
    let Dims { b, n, h, d, e } = plan.dims;
    let width = inputs.decay.width(d);
    let mut dlog = vec![T::zero(); b * n * h * width];
    let mut at = 0;
    let starts: Vec<usize> = plan
        .chunks
        .iter()
        .map(|chunk| {
            at += chunk.len();
            at - chunk.len()
        })
        .collect();
    let tasks: Vec<_> = plan
        .split(&mut dlog, h * width)
        .into_iter()
        .zip(starts)
        .zip(&plan.chunks)
        .zip(plan.places())
        .collect();
    tasks.into_par_iter().for_each(|(((dlog, start), chunk), place)| {
        let mut gate = Gate::new(chunk.len(), d, width);
        for head in 0..h {
            let slot = place.slot + head * place.stride;
            let adjoint = &saved.adjoints[slot * d * e..][..d * e];
            let leaves = if place.is_last {
                &saved.finals[(place.sequence * h + head) * d * e..][..d * e]
            } else {
                &saved.states[(slot + 1) * d * e..][..d * e]
            };
            let own = start * h * d + head * d;
            let rows = (&found.dq[own..], &found.dk[own..], h * d);
            let out = (&mut dlog[head * width..], h * width);
            gate.run(inputs, (chunk, head), (leaves, adjoint), rows, out);
        }
    });
    match inputs.decay {
        chunk::Decay::Head(_) => sums_of_heads(&dlog, h),
        _ => dlog,
    }
}
