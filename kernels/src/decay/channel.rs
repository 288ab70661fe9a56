//! Inside a chunk of the decayed recurrence with a decay for every channel.
//!
//! The chunk is cut into blocks of 16 tokens. A score between two blocks factors at the start of the later one, and
//! keys, once decayed to the end of their block, are decayed from block to block:
//!
//! ```text
//!   qt_i = q_i (*) exp(sum of log a over the block up to i)      kt_j = k_j (*) exp(the sum over the block after j)
//!   keys before block I:   X_I = [X_{I-1} (*) exp(total_{I-1}); kt_{I-1}]        A_I = qt_I X_I^T
//! ```
//!
//! so that every exponent is at most zero. Inside a block scores are sums over channels, token by token, with products
//! of at most 15 decays. Backward takes the same way: `Y` below carries the adjoints of the keys from the last block
//! to the first.

use super::chunk::{Borders, Inputs, Slots, add, scale, scale_rows};
use super::plan::Chunk;
use super::triangle;
use crate::scalar::{sum_of, wide};
use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, matmul};
use std::ops::Range;

/// Tokens of a block.
const BLOCK: usize = 16;

/// Memory of one task; matrices are `[tokens, D]` where nothing else is said.
pub(super) struct Scratch<T> {
    rows: usize,
    d: usize,
    q: Vec<T>,
    k: Vec<T>,
    decay: Vec<T>,
    /// exp(sums over the block up to each token).
    start: Vec<T>,
    /// exp(sums over the block after each token).
    end: Vec<T>,
    /// exp(totals) `[blocks, D]`.
    total: Vec<T>,
    /// `qt` above.
    queries: Vec<T>,
    /// `X` above.
    keys: Vec<T>,
    /// exp(sums over the chunk before the current block) `[D]`.
    before: Vec<T>,
    /// `[tokens, tokens]`, zero above the diagonal.
    scores: Vec<T>,
    d_scores: Vec<T>,
    /// `Y`: adjoints of keys, decayed to the end of their block.
    d_keys: Vec<T>,
    /// Transposes.
    turned: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            rows: 0,
            d: 0,
            q: Vec::new(),
            k: Vec::new(),
            decay: Vec::new(),
            start: Vec::new(),
            end: Vec::new(),
            total: Vec::new(),
            queries: Vec::new(),
            keys: Vec::new(),
            before: Vec::new(),
            scores: Vec::new(),
            d_scores: Vec::new(),
            d_keys: Vec::new(),
            turned: Vec::new(),
        }
    }
}

impl<T: SliceMath> Scratch<T> {
    /// Loads a chunk and head and computes the decays inside its blocks.
    fn prepare(&mut self, inputs: &Inputs<T>, (chunk, head): (&Chunk, usize)) {
        let (rows, d) = (chunk.len(), inputs.q.channels());
        (self.rows, self.d) = (rows, d);
        for matrix in [
            &mut self.q,
            &mut self.k,
            &mut self.decay,
            &mut self.start,
            &mut self.end,
            &mut self.queries,
            &mut self.keys,
        ] {
            matrix.resize(rows * d, T::zero());
        }
        self.total.resize(rows.div_ceil(BLOCK) * d, T::zero());
        self.scores.resize(rows * rows, T::zero());
        self.before.clear();
        self.before.resize(d, T::one());
        inputs.q.pack(chunk.batch, &chunk.tokens, head, &mut self.q);
        inputs.k.pack(chunk.batch, &chunk.tokens, head, &mut self.k);
        inputs.decay.load(chunk, head, &mut self.decay);
        for block in blocks(rows) {
            let at = block.start * d..block.end * d;
            let log = &self.decay[at.clone()];
            inputs.decay.sums_from_start(log, d, &mut self.start[at.clone()]);
            inputs.decay.sums_to_end(log, d, &mut self.end[at.clone()]);
        }
        for exponents in [&mut self.decay, &mut self.start, &mut self.end] {
            T::exp(exponents);
        }
        for (total, block) in self.total.chunks_exact_mut(d).zip(blocks(rows)) {
            total.copy_from_slice(&self.start[(block.end - 1) * d..][..d]);
        }
        self.queries.copy_from_slice(&self.q);
        scale(&mut self.queries, &self.start);
        self.keys.copy_from_slice(&self.k);
        scale(&mut self.keys, &self.end);
    }

    /// Scores of a block of queries with the keys before it and its own.
    fn score(&mut self, block: &Range<usize>) {
        let (rows, d) = (self.rows, self.d);
        let queries = Mat::packed(&self.queries[block.start * d..], block.len(), d);
        let keys = Mat::packed(&self.keys, block.start, d);
        if block.start > 0 {
            matmul(
                &mut self.scores[block.start * rows..],
                rows,
                queries,
                keys.t(),
                Into::Set,
            );
        }
        let (q, k, decay, scores) = (&self.q, &self.k, &self.decay, &mut self.scores);
        let mut x = vec![T::zero(); d];
        wide(
            #[inline(always)]
            || {
                for i in block.clone() {
                    x.copy_from_slice(&q[i * d..][..d]);
                    for j in (block.start..=i).rev() {
                        if j < i {
                            scale(&mut x, &decay[(j + 1) * d..][..d]);
                        }
                        scores[i * rows + j] = sum_of(&x, &k[j * d..][..d], |x, k| x * k);
                    }
                }
            },
        );
    }

    /// Decays what lies before `block` to its end.
    fn advance(&mut self, block: &Range<usize>) {
        let d = self.d;
        let total = &self.total[block.start / BLOCK * d..][..d];
        for row in self.keys[..block.start * d].chunks_exact_mut(d) {
            scale(row, total);
        }
        scale(&mut self.before, total);
    }

    pub(super) fn output(
        &mut self,
        inputs: &Inputs<T>,
        (chunk, head): (&Chunk, usize),
        state: Option<Mat<T>>,
        (o, stride): (&mut [T], usize),
    ) {
        self.prepare(inputs, (chunk, head));
        let (rows, d) = (self.rows, self.d);
        for block in blocks(rows) {
            self.score(&block);
            for row in self.queries[block.start * d..block.end * d].chunks_exact_mut(d) {
                scale(row, &self.before);
            }
            self.advance(&block);
        }
        let v = inputs.v.tokens(chunk.batch, &chunk.tokens, head);
        if let Some(state) = state {
            matmul(o, stride, Mat::packed(&self.queries, rows, d), state, Into::Set);
        }
        triangle::add_times((o, stride), &self.scores, rows, v, inputs.v.channels());
    }

    pub(super) fn adjoints(
        &mut self,
        inputs: &Inputs<T>,
        (chunk, head): (&Chunk, usize),
        Borders { d_o, state, adjoint }: Borders<T>,
        slots: Slots<T>,
    ) {
        self.prepare(inputs, (chunk, head));
        let (rows, d) = (self.rows, self.d);
        let (key_stride, value_stride) = (slots.key_stride, slots.value_stride);
        self.d_scores.resize(rows * rows, T::zero());
        self.d_keys.resize(rows * d, T::zero());
        let v = inputs.v.tokens(chunk.batch, &chunk.tokens, head);
        let e = inputs.v.channels();
        triangle::product(&mut self.d_scores, rows, d_o, v.turned(&mut self.turned), e);
        matmul(
            slots.dq,
            key_stride,
            d_o,
            state.turned(&mut self.turned),
            Into::Set,
        );
        for block in blocks(rows) {
            self.score(&block);
            self.query_adjoints(&block, &mut slots.dq[block.start * key_stride..], key_stride);
            self.advance(&block);
        }
        matmul(
            &mut self.d_keys,
            d,
            v,
            adjoint.turned(&mut self.turned),
            Into::Set,
        );
        for block in blocks(rows).rev() {
            self.key_adjoints(&block, &mut slots.dk[block.start * key_stride..], key_stride);
        }
        let keys = Mat::packed(&self.keys, rows, d);
        matmul(slots.dv, value_stride, keys, adjoint, Into::Set);
        triangle::add_transposed_times((slots.dv, value_stride), &self.scores, rows, d_o, e);
    }

    /// Adjoints of the queries of a block, on top of `dO S^T`.
    fn query_adjoints(&mut self, block: &Range<usize>, dq: &mut [T], stride: usize) {
        let (rows, d) = (self.rows, self.d);
        for row in dq.chunks_mut(stride).take(block.len()) {
            scale(&mut row[..d], &self.before);
        }
        if block.start > 0 {
            let d_scores = &self.d_scores[block.start * rows..];
            let d_scores = Mat::strided(d_scores, [block.len(), block.start], [rows, 1]);
            matmul(
                dq,
                stride,
                d_scores,
                Mat::packed(&self.keys, block.start, d),
                Into::Add,
            );
        }
        scale_rows(dq, stride, d, &self.start[block.start * d..block.end * d], d);
        let (k, decay, d_scores) = (&self.k, &self.decay, &self.d_scores);
        let mut sum = vec![T::zero(); d];
        wide(
            #[inline(always)]
            || {
                for (i, dq) in block.clone().zip(dq.chunks_mut(stride)) {
                    sum.fill(T::zero());
                    for j in block.start..=i {
                        step(
                            &mut sum,
                            &decay[j * d..][..d],
                            d_scores[i * rows + j],
                            &k[j * d..][..d],
                        );
                    }
                    add(&mut dq[..d], &sum);
                }
            },
        );
    }

    /// Adjoints of the keys of a block, whose later blocks are done; `Y` goes on to the block before.
    fn key_adjoints(&mut self, block: &Range<usize>, dk: &mut [T], stride: usize) {
        let (rows, d) = (self.rows, self.d);
        let own = block.start * d..block.end * d;
        for (dk, d_key) in dk
            .chunks_mut(stride)
            .zip(self.d_keys[own.clone()].chunks_exact(d))
        {
            dk[..d].copy_from_slice(d_key);
        }
        scale_rows(dk, stride, d, &self.end[own], d);
        let (q, decay, d_scores) = (&self.q, &self.decay, &self.d_scores);
        let (mut sum, one) = (vec![T::zero(); d], vec![T::one(); d]);
        wide(
            #[inline(always)]
            || {
                for (j, dk) in block.clone().zip(dk.chunks_mut(stride)) {
                    sum.fill(T::zero());
                    for i in (j..block.end).rev() {
                        let after = if i + 1 < block.end {
                            &decay[(i + 1) * d..][..d]
                        } else {
                            &one
                        };
                        step(&mut sum, after, d_scores[i * rows + j], &q[i * d..][..d]);
                    }
                    add(&mut dk[..d], &sum);
                }
            },
        );
        if block.start == 0 {
            return;
        }
        let total = &self.total[block.start / BLOCK * d..][..d];
        for row in self.d_keys[..block.start * d].chunks_exact_mut(d) {
            scale(row, total);
        }
        let d_scores = Mat::strided(
            &self.d_scores[block.start * rows..],
            [block.len(), block.start],
            [rows, 1],
        );
        let queries = Mat::packed(&self.queries[block.start * d..], block.len(), d);
        matmul(&mut self.d_keys, d, d_scores.t(), queries, Into::Add);
    }
}

/// `sum = sum (*) decay + weight x`.
#[inline(always)]
fn step<T: SliceMath>(sum: &mut [T], decay: &[T], weight: T, x: &[T]) {
    for ((sum, &decay), &x) in sum.iter_mut().zip(decay).zip(x) {
        *sum = *sum * decay + weight * x;
    }
}

fn blocks(rows: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    (0..rows.div_ceil(BLOCK)).map(move |block| block * BLOCK..(block * BLOCK + BLOCK).min(rows))
}
