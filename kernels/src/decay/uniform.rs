//! Inside a chunk of the decayed recurrence with at most one decay a head and token.
//!
//! With P_ij = exp(sum of log-decays over i >= t > j) for i >= j, else 0, and the states that enter (S) and their
//! adjoints that leave (G):
//!
//! ```text
//!   o  = ((Q K^T) (*) P) V + diag(start) Q S
//!   dQ = ((dO V^T) (*) P) K + diag(start) dO S^T
//!   dK = ((dO V^T) (*) P)^T Q + diag(end) V G^T
//!   dV = ((Q K^T) (*) P)^T dO + diag(end) K G
//! ```
//!
//! `start` decays from the start of the chunk to each token, `end` from each token to the end.

use super::chunk::{Borders, Decay, Inputs, Slots, multiple, scale, scale_rows};
use super::plan::Chunk;
use super::triangle;
use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, matmul};

/// Memory of one task.
pub(super) struct Scratch<T> {
    rows: usize,
    log: Vec<T>,
    start: Vec<T>,
    end: Vec<T>,
    /// P, row-major; what lies above its diagonal is not read.
    powers: Vec<T>,
    scores: Vec<T>,
    d_scores: Vec<T>,
    /// Transposes.
    turned: Vec<T>,
}

impl<T: SliceMath> Scratch<T> {
    pub(super) fn new(rows: usize) -> Self {
        Self {
            rows,
            log: vec![T::zero(); rows],
            start: vec![T::zero(); rows],
            end: vec![T::zero(); rows],
            powers: Vec::new(),
            scores: Vec::new(),
            d_scores: Vec::new(),
            turned: Vec::new(),
        }
    }

    /// Computes all decays of a chunk and head.
    fn prepare(&mut self, decay: &Decay<T>, (chunk, head): (&Chunk, usize)) {
        let rows = self.rows;
        self.powers.resize(rows * rows, T::zero());
        self.scores.resize(rows * rows, T::zero());
        decay.load(chunk, head, &mut self.log);
        decay.sums_from_start(&self.log, 1, &mut self.start);
        decay.sums_to_end(&self.log, 1, &mut self.end);
        T::exp(&mut self.start);
        T::exp(&mut self.end);
        match decay {
            Decay::None => self.powers.fill(T::one()),
            Decay::Head(log) => self.powers_of(log[head]),
            Decay::Token(_) | Decay::Channel(_) => self.powers_by_row(),
        }
    }

    /// P of a constant: every row is a piece of one table.
    fn powers_of(&mut self, log: T) {
        let rows = self.rows;
        let mut table: Vec<T> = (0..rows).rev().map(|i| multiple(log, i)).collect();
        T::exp(&mut table);
        for (i, row) in self.powers.chunks_exact_mut(rows).enumerate() {
            row[..=i].copy_from_slice(&table[rows - 1 - i..]);
        }
    }

    /// P token by token: the exponents of a row are those of the row before plus one log-decay.
    fn powers_by_row(&mut self) {
        let mut sums = vec![T::zero(); self.rows];
        for (i, row) in self.powers.chunks_exact_mut(self.rows).enumerate() {
            sums[..i].iter_mut().for_each(|sum| *sum += self.log[i]);
            row[..=i].copy_from_slice(&sums[..=i]);
            T::exp(&mut row[..=i]);
        }
    }

    pub(super) fn output(
        &mut self,
        inputs: &Inputs<T>,
        (chunk, head): (&Chunk, usize),
        state: Option<Mat<T>>,
        (o, stride): (&mut [T], usize),
    ) {
        self.prepare(&inputs.decay, (chunk, head));
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| x.tokens(chunk.batch, &chunk.tokens, head));
        let (rows, d, e) = (self.rows, inputs.q.channels(), inputs.v.channels());
        // Without a state, `o` holds zeros.
        if let Some(state) = state {
            matmul(o, stride, q, state, Into::Set);
            scale_rows(o, stride, e, &self.start, 1);
        }
        triangle::product(&mut self.scores, rows, q, k.turned(&mut self.turned), d);
        mask(&mut self.scores, &self.powers, rows);
        triangle::add_times((o, stride), &self.scores, rows, v, e);
    }

    pub(super) fn adjoints(
        &mut self,
        inputs: &Inputs<T>,
        (chunk, head): (&Chunk, usize),
        Borders { d_o, state, adjoint }: Borders<T>,
        slots: Slots<T>,
    ) {
        self.prepare(&inputs.decay, (chunk, head));
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| x.tokens(chunk.batch, &chunk.tokens, head));
        let (rows, d, e) = (self.rows, inputs.q.channels(), inputs.v.channels());
        let (key_stride, value_stride) = (slots.key_stride, slots.value_stride);
        self.d_scores.resize(rows * rows, T::zero());
        let turned = &mut self.turned;
        triangle::product(&mut self.scores, rows, q, k.turned(turned), d);
        mask(&mut self.scores, &self.powers, rows);
        triangle::product(&mut self.d_scores, rows, d_o, v.turned(turned), e);
        mask(&mut self.d_scores, &self.powers, rows);
        matmul(slots.dq, key_stride, d_o, state.turned(turned), Into::Set);
        scale_rows(slots.dq, key_stride, d, &self.start, 1);
        triangle::add_times((slots.dq, key_stride), &self.d_scores, rows, k, d);
        matmul(slots.dk, key_stride, v, adjoint.turned(turned), Into::Set);
        scale_rows(slots.dk, key_stride, d, &self.end, 1);
        triangle::add_transposed_times((slots.dk, key_stride), &self.d_scores, rows, q, d);
        matmul(slots.dv, value_stride, k, adjoint, Into::Set);
        scale_rows(slots.dv, value_stride, e, &self.end, 1);
        triangle::add_transposed_times((slots.dv, value_stride), &self.scores, rows, d_o, e);
    }
}

/// Weighs what lies on and below the diagonal and clears the rest.
fn mask<T: SliceMath>(scores: &mut [T], powers: &[T], rows: usize) {
    for (i, (scores, powers)) in scores
        .chunks_exact_mut(rows)
        .zip(powers.chunks_exact(rows))
        .enumerate()
    {
        let (seen, rest) = scores.split_at_mut(i + 1);
        scale(seen, powers);
        rest.fill(T::zero());
    }
}
