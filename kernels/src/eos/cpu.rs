//! The scan on the processor. One task takes a block of columns of the memory of one sequence and head through all tokens:
//! columns do not know of each other. Blocks depend on the shape alone, and sums over them are taken in order: results have
//! the same bits for any number of threads.

use super::Dims;
use crate::scalar::wide;
use crate::slice_math::SliceMath;
use crate::strided::elements;
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of a task.
const BLOCK: usize = 64;
/// Tokens between memories that the backward pass starts again from.
const CHUNK: usize = 32;

/// Operands, row-major.
pub(super) struct Inputs<T> {
    expand: Vec<T>,
    input: Vec<T>,
    shrink: Vec<T>,
    log: Vec<T>,
    /// Of the five axes of the gates; zero where all are alike.
    strides: [usize; 5],
}

impl<T: SliceMath> Inputs<T> {
    pub(super) fn new(args: &[Tensor]) -> Result<Self> {
        let mut strides = [0; 5];
        let mut step = 1;
        for (stride, &length) in strides.iter_mut().zip(args[3].dims()).rev() {
            *stride = if length == 1 { 0 } else { step };
            step *= length;
        }
        Ok(Self {
            expand: elements(&args[0])?,
            input: elements(&args[1])?,
            shrink: elements(&args[2])?,
            log: elements(&args[3])?,
            strides,
        })
    }

    /// Gates of a token in a block of columns: rows of `columns`, or of one where they are alike along them.
    fn gates(&self, line: &Line, token: usize, rows: usize, out: &mut Vec<T>) {
        out.clear();
        let [sb, sn, sh, sk, sd] = self.strides;
        let at = line.batch * sb + token * sn + line.head * sh;
        for row in 0..rows {
            let from = at + row * sk + line.columns.start * sd;
            let count = if sd == 0 { 1 } else { line.columns.len() };
            out.extend_from_slice(&self.log[from..from + count]);
        }
    }
}

/// The columns of one task.
#[derive(Clone, Debug)]
pub(super) struct Line {
    sequence: usize,
    batch: usize,
    head: usize,
    tokens: Range<usize>,
    columns: Range<usize>,
}

/// How a call is cut into tasks.
pub(super) struct Lines {
    pub(super) dims: Dims,
    /// Batch and tokens of each sequence.
    sequences: Vec<(usize, Range<usize>)>,
}

/// Adjoints of all operands.
pub(super) struct Adjoints<T> {
    pub(super) d_expand: Vec<T>,
    pub(super) d_input: Vec<T>,
    pub(super) d_shrink: Vec<T>,
    pub(super) d_log: Vec<T>,
    pub(super) d_initial: Vec<T>,
}

/// What one task of the backward pass makes: rows of its tokens, and the adjoint of the memory before them.
struct Part<T> {
    d_expand: Vec<T>,
    d_input: Vec<T>,
    d_shrink: Vec<T>,
    d_log: Vec<T>,
    d_initial: Vec<T>,
}

impl Lines {
    pub(super) fn new(dims: Dims, borders: Option<&[usize]>) -> Self {
        let whole = [0, dims.n];
        let borders = borders.unwrap_or(&whole);
        let sequences = (0..dims.b)
            .flat_map(|batch| borders.windows(2).map(move |pair| (batch, pair[0]..pair[1])))
            .collect();
        Self { dims, sequences }
    }

    pub(super) fn sequences(&self) -> usize {
        self.sequences.len()
    }

    fn all(&self) -> Vec<Line> {
        let Dims { h, d, .. } = self.dims;
        let mut lines = Vec::new();
        for (sequence, (batch, tokens)) in self.sequences.iter().enumerate() {
            for head in 0..h {
                lines.extend((0..d).step_by(BLOCK).map(|first| Line {
                    sequence,
                    batch: *batch,
                    head,
                    tokens: tokens.clone(),
                    columns: first..(first + BLOCK).min(d),
                }));
            }
        }
        lines
    }

    /// Row of a token and head.
    fn row(&self, line: &Line, token: usize) -> usize {
        (line.batch * self.dims.n + token) * self.dims.h + line.head
    }

    /// A block of a memory `[S, H, K, D]`, or zeros.
    fn block<T: SliceMath>(&self, line: &Line, memories: Option<&[T]>) -> Vec<T> {
        let Dims { h, k, d, .. } = self.dims;
        let Some(memories) = memories else {
            return vec![T::zero(); k * line.columns.len()];
        };
        let first = (line.sequence * h + line.head) * k;
        (first..first + k)
            .flat_map(|row| memories[row * d..][line.columns.clone()].iter().copied())
            .collect()
    }

    fn put_block<T: SliceMath>(&self, line: &Line, block: &[T], memories: &mut [T]) {
        let Dims { h, k, d, .. } = self.dims;
        let first = (line.sequence * h + line.head) * k;
        for (row, block) in (first..).zip(block.chunks_exact(line.columns.len())) {
            memories[row * d..][line.columns.clone()].copy_from_slice(block);
        }
    }

    fn memories<T: SliceMath>(&self) -> Vec<T> {
        let Dims { h, k, d, .. } = self.dims;
        vec![T::zero(); self.sequences() * h * k * d]
    }

    /// One token forward: `m = gates m + e i^T`.
    fn advance<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        line: &Line,
        token: usize,
        gates: &mut Vec<T>,
        m: &mut [T],
    ) {
        let Dims { k, d, .. } = self.dims;
        inputs.gates(line, token, k, gates);
        T::exp(gates);
        let row = self.row(line, token);
        let (e, i) = (
            &inputs.expand[row * k..][..k],
            &inputs.input[row * d..][line.columns.clone()],
        );
        let width = gates.len() / k;
        wide(
            #[inline(always)]
            || {
                for ((m, gate), &e) in m.chunks_exact_mut(i.len()).zip(gates.chunks_exact(width)).zip(e) {
                    if let &[gate] = gate {
                        for (m, &i) in m.iter_mut().zip(i) {
                            *m = gate * *m + e * i;
                        }
                    } else {
                        for ((m, &gate), &i) in m.iter_mut().zip(gate).zip(i) {
                            *m = gate * *m + e * i;
                        }
                    }
                }
            },
        );
    }

    /// Outputs, if wanted, and final memories.
    pub(super) fn forward<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        entering: Option<&[T]>,
        want_output: bool,
    ) -> (Vec<T>, Vec<T>) {
        let Dims { b, n, h, k, d } = self.dims;
        let parts: Vec<(Line, Vec<T>, Vec<T>)> = self
            .all()
            .into_par_iter()
            .map(|line| {
                let mut m = self.block(&line, entering);
                let mut gates = Vec::new();
                let width = line.columns.len();
                let mut y = vec![T::zero(); if want_output { line.tokens.len() * width } else { 0 }];
                for (index, token) in line.tokens.clone().enumerate() {
                    self.advance(inputs, &line, token, &mut gates, &mut m);
                    if want_output {
                        let s = &inputs.shrink[self.row(&line, token) * k..][..k];
                        combine(&m, s, &mut y[index * width..][..width]);
                    }
                }
                (line, y, m)
            })
            .collect();
        let mut y = vec![T::zero(); if want_output { b * n * h * d } else { 0 }];
        let mut last = self.memories();
        for (line, rows, m) in parts {
            self.put_block(&line, &m, &mut last);
            let width = line.columns.len();
            for (token, rows) in line.tokens.clone().zip(rows.chunks_exact(width)) {
                y[self.row(&line, token) * d..][line.columns.clone()].copy_from_slice(rows);
            }
        }
        (y, last)
    }

    /// Sums of log-gates over each sequence, spread to `[S, H, K, D]`.
    pub(super) fn log_totals<T: SliceMath>(&self, inputs: &Inputs<T>) -> Vec<T> {
        let k = self.dims.k;
        let mut totals = self.memories();
        for line in self.all() {
            let mut sum = vec![T::zero(); k * line.columns.len()];
            let mut gates = Vec::new();
            for token in line.tokens.clone() {
                inputs.gates(&line, token, k, &mut gates);
                let each = line.columns.len() * k / gates.len();
                for (sum, &gate) in sum.chunks_exact_mut(each).zip(&gates) {
                    sum.iter_mut().for_each(|sum| *sum += gate);
                }
            }
            self.put_block(&line, &sum, &mut totals);
        }
        totals
    }

    /// Adjoints of the memories before each sequence, from those that arrive behind it.
    pub(super) fn leaving_adjoints<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        d_y: &[T],
        arriving: Option<&[T]>,
    ) -> Vec<T> {
        let Dims { k, d, .. } = self.dims;
        let parts: Vec<(Line, Vec<T>)> = self
            .all()
            .into_par_iter()
            .map(|line| {
                let mut dm = self.block(&line, arriving);
                let mut gates = Vec::new();
                for token in line.tokens.clone().rev() {
                    let row = self.row(&line, token);
                    let s = &inputs.shrink[row * k..][..k];
                    add_outer(s, &d_y[row * d..][line.columns.clone()], &mut dm);
                    inputs.gates(&line, token, k, &mut gates);
                    T::exp(&mut gates);
                    scale(&gates, k, &mut dm);
                }
                (line, dm)
            })
            .collect();
        let mut all = self.memories();
        for (line, dm) in parts {
            self.put_block(&line, &dm, &mut all);
        }
        all
    }

    pub(super) fn backward<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        entering: Option<&[T]>,
        d_y: &[T],
        arriving: Option<&[T]>,
    ) -> Adjoints<T> {
        let Dims { b, n, h, k, d } = self.dims;
        let parts: Vec<(Line, Part<T>)> = self
            .all()
            .into_par_iter()
            .map(|line| {
                let part = self.backward_line(inputs, &line, entering, d_y, arriving);
                (line, part)
            })
            .collect();
        let mut all = Adjoints {
            d_expand: vec![T::zero(); b * n * h * k],
            d_input: vec![T::zero(); b * n * h * d],
            d_shrink: vec![T::zero(); b * n * h * k],
            d_log: vec![T::zero(); inputs.log.len()],
            d_initial: self.memories(),
        };
        let [sb, sn, sh, sk, sd] = inputs.strides;
        for (line, part) in parts {
            self.put_block(&line, &part.d_initial, &mut all.d_initial);
            let width = line.columns.len();
            let each = part.d_log.len() / line.tokens.len().max(1) / k;
            for (index, token) in line.tokens.clone().enumerate() {
                let row = self.row(&line, token);
                all.d_input[row * d..][line.columns.clone()]
                    .copy_from_slice(&part.d_input[index * width..][..width]);
                for c in 0..k {
                    all.d_expand[row * k + c] += part.d_expand[index * k + c];
                    all.d_shrink[row * k + c] += part.d_shrink[index * k + c];
                    let at = line.batch * sb + token * sn + line.head * sh + c * sk + line.columns.start * sd;
                    let found = &part.d_log[(index * k + c) * each..][..each];
                    for (to, &found) in all.d_log[at..at + each].iter_mut().zip(found) {
                        *to += found;
                    }
                }
            }
        }
        all
    }

    fn backward_line<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        line: &Line,
        entering: Option<&[T]>,
        d_y: &[T],
        arriving: Option<&[T]>,
    ) -> Part<T> {
        let Dims { k, d, .. } = self.dims;
        let (count, width) = (line.tokens.len(), line.columns.len());
        let gate_width = if inputs.strides[4] == 0 { 1 } else { width };
        let mut part = Part {
            d_expand: vec![T::zero(); count * k],
            d_input: vec![T::zero(); count * width],
            d_shrink: vec![T::zero(); count * k],
            d_log: vec![T::zero(); count * k * gate_width],
            d_initial: Vec::new(),
        };
        let mut gates = Vec::new();
        // Memories before every chunk.
        let mut m = self.block(line, entering);
        let mut starts = Vec::with_capacity(count.div_ceil(CHUNK));
        for (index, token) in line.tokens.clone().enumerate() {
            if index % CHUNK == 0 {
                starts.push(m.clone());
            }
            self.advance(inputs, line, token, &mut gates, &mut m);
        }
        let mut dm = self.block(line, arriving);
        for (chunk, start) in starts.into_iter().enumerate().rev() {
            let first = chunk * CHUNK;
            let tokens = first..(first + CHUNK).min(count);
            let mut memories = vec![start];
            for index in tokens.clone() {
                let mut next = memories[index - first].clone();
                self.advance(inputs, line, line.tokens.start + index, &mut gates, &mut next);
                memories.push(next);
            }
            for index in tokens.rev() {
                let token = line.tokens.start + index;
                let row = self.row(line, token);
                let (before, after) = (&memories[index - first], &memories[index - first + 1]);
                let (e, s) = (&inputs.expand[row * k..][..k], &inputs.shrink[row * k..][..k]);
                let i = &inputs.input[row * d..][line.columns.clone()];
                let dy = &d_y[row * d..][line.columns.clone()];
                add_outer(s, dy, &mut dm);
                combine(&dm, e, &mut part.d_input[index * width..][..width]);
                inputs.gates(line, token, k, &mut gates);
                T::exp(&mut gates);
                for c in 0..k {
                    let (dm, after) = (&dm[c * width..][..width], &after[c * width..][..width]);
                    part.d_shrink[index * k + c] = dot(after, dy);
                    part.d_expand[index * k + c] = dot(dm, i);
                }
                scale(&gates, k, &mut dm);
                for c in 0..k {
                    let (dm, before) = (&dm[c * width..][..width], &before[c * width..][..width]);
                    let d_log = &mut part.d_log[(index * k + c) * gate_width..][..gate_width];
                    if let [d_log] = d_log
                        && width > 1
                    {
                        *d_log = dot(dm, before);
                    } else {
                        for ((d_log, &dm), &before) in d_log.iter_mut().zip(dm).zip(before) {
                            *d_log = dm * before;
                        }
                    }
                }
            }
        }
        part.d_initial = dm;
        part
    }
}

/// `out = m^T weights` for rows of `m`.
fn combine<T: SliceMath>(m: &[T], weights: &[T], out: &mut [T]) {
    wide(
        #[inline(always)]
        || {
            out.fill(T::zero());
            for (m, &weight) in m.chunks_exact(out.len()).zip(weights) {
                for (out, &m) in out.iter_mut().zip(m) {
                    *out += weight * m;
                }
            }
        },
    );
}

/// `m += rows columns^T`.
fn add_outer<T: SliceMath>(rows: &[T], columns: &[T], m: &mut [T]) {
    wide(
        #[inline(always)]
        || {
            for (m, &row) in m.chunks_exact_mut(columns.len()).zip(rows) {
                for (m, &column) in m.iter_mut().zip(columns) {
                    *m += row * column;
                }
            }
        },
    );
}

/// Scales the `k` rows of `m` by their gates, one each or one an element.
fn scale<T: SliceMath>(gates: &[T], k: usize, m: &mut [T]) {
    let (width, each) = (m.len() / k, gates.len() / k);
    wide(
        #[inline(always)]
        || {
            for (m, gate) in m.chunks_exact_mut(width).zip(gates.chunks_exact(each)) {
                if let &[gate] = gate {
                    m.iter_mut().for_each(|m| *m *= gate);
                } else {
                    for (m, &gate) in m.iter_mut().zip(gate) {
                        *m *= gate;
                    }
                }
            }
        },
    );
}

fn dot<T: SliceMath>(a: &[T], b: &[T]) -> T {
    crate::scalar::sum_of(a, b, |a, b| a * b)
}
