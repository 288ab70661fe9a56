//! The tiles on the CPU: one task for each tile and head, products by gemm.
//!
//! Tiles depend on the shape alone, and each sum belongs to one task: results have the same bits for any number of threads.
//! Tasks write rows of one head behind each other; these are put between those of the other heads at the end.

use super::super::{OP, Problem, Span};
use crate::autograd::{Gradient, Value, attach3};
use crate::error::OpError;
use crate::scalar::{sum_of, wide};
use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, View, matmul};
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a tile, of queries and of keys: its scores stay in the first-level cache.
const TILE: usize = 64;

/// [`super::softmax`] on the CPU.
pub(super) fn softmax(
    problem: Problem,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let live = match mask {
        Some(mask) => {
            let mask = mask.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            Some(mask.iter().map(|&keep| keep != 0.0).collect())
        }
        None => None,
    };
    let Problem {
        b, n, l, h, g, d, e, ..
    } = problem;
    tracing::debug!(
        form = "tiles on the CPU",
        b,
        n,
        l,
        h,
        g,
        d,
        e,
        causal = problem.causal,
        "{OP}"
    );
    match q.dtype() {
        DType::F32 => attach::<f32>(problem, live, [q, k, v]),
        DType::F64 => attach::<f64>(problem, live, [q, k, v]),
        found => Err(OpError::DType {
            op: OP,
            field: "q",
            found,
            device: "the CPU",
            supported: "f32, f64",
        }
        .into()),
    }
}

fn attach<T: SliceMath>(problem: Problem, live: Option<Vec<bool>>, args: [&Tensor; 3]) -> Result<Tensor> {
    let Problem { b, n, h, e, .. } = problem;
    let (o, log_sum) = {
        let [q, k, v] = args.map(Tensor::storage_and_layout).map(|(guard, _)| guard);
        let call = Call {
            problem: &problem,
            live: live.as_deref(),
            q: View::<T>::of(args[0], &q)?,
            k: View::of(args[1], &k)?,
            v: View::of(args[2], &v)?,
        };
        call.forward()
    };
    let log_sum = Tensor::from_vec(log_sum, (b, h, n), &Device::Cpu)?;
    let o = Value::Cpu(T::to_cpu_storage_owned(o), (b, n, h, e).into());
    let saved = Saved {
        problem,
        live,
        log_sum,
    };
    attach3(o, args, saved)
}

/// What the backward pass needs besides inputs and output.
struct Saved {
    problem: Problem,
    live: Option<Vec<bool>>,
    /// `[B, H, N]`.
    log_sum: Tensor,
}

impl Gradient<3> for Saved {
    fn name(&self) -> &'static str {
        OP
    }

    fn holds(&self) -> Vec<Tensor> {
        vec![self.log_sum.clone()]
    }

    fn backward(&self, args: [&Tensor; 3], o: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        match self.log_sum.dtype() {
            DType::F64 => self.adjoints::<f64>(args, o, grad),
            _ => self.adjoints::<f32>(args, o, grad),
        }
    }
}

impl Saved {
    fn adjoints<T: SliceMath>(
        &self,
        args: [&Tensor; 3],
        o: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let [q, k, v] = args.map(Tensor::storage_and_layout).map(|(guard, _)| guard);
        let [o_guard, grad_guard] = [o, grad].map(Tensor::storage_and_layout).map(|(guard, _)| guard);
        let call = Call {
            problem: &self.problem,
            live: self.live.as_deref(),
            q: View::<T>::of(args[0], &q)?,
            k: View::of(args[1], &k)?,
            v: View::of(args[2], &v)?,
        };
        let d_o = View::of(grad, &grad_guard)?;
        let log_sum = self.log_sum.flatten_all()?.to_vec1::<T>()?;
        let dots = call.dots(View::of(o, &o_guard)?, d_o);
        let out = Out {
            d_o,
            log_sum: &log_sum,
            dots: &dots,
        };
        let dq = call.d_queries(&out);
        let (dk, dv) = call.d_keys(&out);
        let made = |data: Vec<T>, like: &Tensor| Tensor::from_vec(data, like.shape(), &Device::Cpu).map(Some);
        Ok([made(dq, args[0])?, made(dk, args[1])?, made(dv, args[2])?])
    }
}

/// Operands of a call.
struct Call<'a, T> {
    problem: &'a Problem,
    /// `[B, L]`: whether a key counts.
    live: Option<&'a [bool]>,
    q: View<'a, T>,
    k: View<'a, T>,
    v: View<'a, T>,
}

/// What only the backward pass has; the vectors are `[B, H, N]`.
struct Out<'a, T> {
    d_o: View<'a, T>,
    log_sum: &'a [T],
    dots: &'a [T],
}

/// Rows of one head and sequence, counted from its start.
struct Tile {
    span: Span,
    head: usize,
    rows: Range<usize>,
}

/// Memory of a thread.
struct Memory<T> {
    /// Scores, then weights, `TILE` a row.
    weights: Vec<T>,
    d_weights: Vec<T>,
    /// Transpose of a right factor.
    turned: Vec<T>,
}

impl<T: SliceMath> Memory<T> {
    fn new() -> Self {
        Self {
            weights: vec![T::zero(); TILE * TILE],
            d_weights: vec![T::zero(); TILE * TILE],
            turned: Vec::new(),
        }
    }
}

/// Ranges of at most `TILE` of `range`.
fn tiles(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(TILE)
        .map(move |start| start..(start + TILE).min(end))
}

/// `range` of a sequence as a range of the batch.
fn behind(start: usize, range: &Range<usize>) -> Range<usize> {
    start + range.start..start + range.end
}

/// Pieces of `data` with so many rows of `width` each.
fn cut<'a, T>(mut data: &'a mut [T], tiles: &[Tile], width: usize) -> Vec<&'a mut [T]> {
    let mut pieces = Vec::with_capacity(tiles.len());
    for tile in tiles {
        let (piece, rest) = data.split_at_mut(tile.rows.len() * width);
        pieces.push(piece);
        data = rest;
    }
    pieces
}

/// `[B, H, N, C]` to `[B, N, H, C]`.
fn tokens_first<T: SliceMath>(data: Vec<T>, heads: usize, tokens: usize, width: usize) -> Vec<T> {
    if heads == 1 || tokens == 1 {
        return data;
    }
    let mut out = vec![T::zero(); data.len()];
    out.par_chunks_mut(heads * width)
        .enumerate()
        .for_each(|(row, out)| {
            let (batch, token) = (row / tokens, row % tokens);
            for (head, out) in out.chunks_exact_mut(width).enumerate() {
                let from = ((batch * heads + head) * tokens + token) * width;
                out.copy_from_slice(&data[from..from + width]);
            }
        });
    out
}

/// The largest value, in fixed lanes so that it vectorises; NaN is passed over.
#[inline(always)]
fn largest<T: SliceMath>(values: &[T]) -> T {
    const LANES: usize = 16;
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [T::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder().iter().copied();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value);
        }
    }
    lanes.into_iter().chain(tail).fold(T::NEG_INFINITY, larger)
}

impl<T: SliceMath> Call<'_, T> {
    /// Tiles in the order `[B, heads, tokens]`.
    fn tiles(&self, heads: usize, rows: impl Fn(&Span) -> usize) -> Vec<Tile> {
        let spans = self.problem.spans();
        let mut all = Vec::new();
        for batch in 0..self.problem.b {
            for head in 0..heads {
                for span in spans.iter().filter(|span| span.batch == batch) {
                    all.extend(tiles(0..rows(span)).map(|rows| Tile {
                        span: span.clone(),
                        head,
                        rows,
                    }));
                }
            }
        }
        all
    }

    /// Keys that the queries `rows` meet, in tiles.
    fn keys_of(&self, span: &Span, rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<T> {
        let all = span.keys.len();
        tiles(
            0..if self.problem.causal {
                span.keys_of(rows.end - 1).min(all)
            } else {
                all
            },
        )
    }

    /// Scores of queries and keys of a span: scaled, and minus infinity where they do not meet.
    fn scores(
        &self,
        span: &Span,
        head: usize,
        (rows, keys): (&Range<usize>, &Range<usize>),
        memory: &mut Memory<T>,
    ) {
        let q = self.q.tokens(span.batch, &behind(span.queries.start, rows), head);
        let places = behind(span.keys.start, keys);
        let k = self.k.tokens(span.batch, &places, head / self.problem.share());
        matmul(
            &mut memory.weights,
            TILE,
            q,
            k.turned(&mut memory.turned),
            Into::Set,
        );
        let scale = T::from_f64(self.problem.scale);
        let live = self.live.map(|live| &live[span.batch * self.problem.l..][places]);
        for (query, scores) in rows.clone().zip(memory.weights.chunks_exact_mut(TILE)) {
            let scores = &mut scores[..keys.len()];
            wide(
                #[inline(always)]
                || scores.iter_mut().for_each(|score| *score *= scale),
            );
            if let Some(live) = live {
                for (score, &live) in scores.iter_mut().zip(live) {
                    if !live {
                        *score = T::NEG_INFINITY;
                    }
                }
            }
            if self.problem.causal {
                let met = span.keys_of(query).saturating_sub(keys.start).min(keys.len());
                scores[met..].fill(T::NEG_INFINITY);
            }
        }
    }

    /// The output `[B, N, H, E]` and the logarithms of sums `[B, H, N]`.
    fn forward(&self) -> (Vec<T>, Vec<T>) {
        let &Problem { b, n, h, e, .. } = self.problem;
        let tiles = self.tiles(h, |span| span.queries.len());
        let (mut o, mut log_sum) = (vec![T::zero(); b * h * n * e], vec![T::zero(); b * h * n]);
        let outputs = cut(&mut o, &tiles, e);
        let sums = cut(&mut log_sum, &tiles, 1);
        tiles
            .par_iter()
            .zip(outputs)
            .zip(sums)
            .for_each_init(Memory::new, |memory, ((tile, o), log_sum)| {
                self.attend(tile, o, log_sum, memory);
            });
        (tokens_first(o, h, n, e), log_sum)
    }

    /// One tile of queries: `o` starts as zeros.
    fn attend(&self, tile: &Tile, o: &mut [T], log_sum: &mut [T], memory: &mut Memory<T>) {
        let Tile { span, head, rows } = tile;
        let e = self.problem.e;
        let mut most = vec![T::NEG_INFINITY; rows.len()];
        let mut total = vec![T::zero(); rows.len()];
        for keys in self.keys_of(span, rows) {
            self.scores(span, *head, (rows, &keys), memory);
            let weights = memory.weights.chunks_exact_mut(TILE);
            for (((weights, o), most), total) in
                weights.zip(o.chunks_exact_mut(e)).zip(&mut most).zip(&mut total)
            {
                let weights = &mut weights[..keys.len()];
                let top = largest(weights);
                let top = if top > *most { top } else { *most };
                let origin = if top > T::NEG_INFINITY { top } else { T::zero() };
                let mut keep = [*most - origin];
                T::exp(&mut keep);
                wide(
                    #[inline(always)]
                    || weights.iter_mut().for_each(|weight| *weight -= origin),
                );
                T::exp(weights);
                *most = top;
                wide(
                    #[inline(always)]
                    || {
                        *total = *total * keep[0] + sum_of(weights, weights, |a, _| a);
                        o.iter_mut().for_each(|o| *o *= keep[0]);
                    },
                );
            }
            let places = behind(span.keys.start, &keys);
            let v = self.v.tokens(span.batch, &places, head / self.problem.share());
            let weights = Mat::strided(&memory.weights, [rows.len(), keys.len()], [TILE, 1]);
            matmul(o, e, weights, v, Into::Add);
        }
        for (((o, log_sum), &most), &total) in o.chunks_exact_mut(e).zip(log_sum).zip(&most).zip(&total) {
            if total == T::zero() {
                *log_sum = -T::NEG_INFINITY;
            } else {
                *log_sum = most + total.logarithm();
                let inverse = T::one() / total;
                o.iter_mut().for_each(|o| *o *= inverse);
            }
        }
    }

    /// Sums of o do, `[B, H, N]`.
    fn dots(&self, o: View<'_, T>, d_o: View<'_, T>) -> Vec<T> {
        let &Problem { b, n, h, e, .. } = self.problem;
        let mut dots = vec![T::zero(); b * h * n];
        dots.par_chunks_mut(n).enumerate().for_each_init(
            || [vec![T::zero(); TILE * e], vec![T::zero(); TILE * e]],
            |[left, right], (row, dots)| {
                for (tokens, dots) in tiles(0..n).zip(dots.chunks_mut(TILE)) {
                    o.pack(row / h, &tokens, row % h, left);
                    d_o.pack(row / h, &tokens, row % h, right);
                    let rows = left.chunks_exact(e).zip(right.chunks_exact(e));
                    for (dot, (left, right)) in dots.iter_mut().zip(rows) {
                        *dot = wide(
                            #[inline(always)]
                            || sum_of(left, right, |a, b| a * b),
                        );
                    }
                }
            },
        );
        dots
    }

    /// Weights of a pair of tiles and the adjoints of their scores, before the scale.
    fn weights(
        &self,
        out: &Out<'_, T>,
        span: &Span,
        head: usize,
        (rows, keys): (&Range<usize>, &Range<usize>),
        memory: &mut Memory<T>,
    ) {
        self.scores(span, head, (rows, keys), memory);
        let Memory {
            weights,
            d_weights,
            turned,
        } = memory;
        let (queries, places) = (behind(span.queries.start, rows), behind(span.keys.start, keys));
        let d_o = out.d_o.tokens(span.batch, &queries, head);
        let v = self.v.tokens(span.batch, &places, head / self.problem.share());
        matmul(d_weights, TILE, d_o, v.turned(turned), Into::Set);
        let first = (span.batch * self.problem.h + head) * self.problem.n + queries.start;
        let each = weights
            .chunks_exact_mut(TILE)
            .zip(d_weights.chunks_exact_mut(TILE));
        for (row, (weights, d_weights)) in (first..first + rows.len()).zip(each) {
            let (log_sum, dot) = (out.log_sum[row], out.dots[row]);
            let (weights, d_weights) = (&mut weights[..keys.len()], &mut d_weights[..keys.len()]);
            wide(
                #[inline(always)]
                || weights.iter_mut().for_each(|weight| *weight -= log_sum),
            );
            T::exp(weights);
            wide(
                #[inline(always)]
                || {
                    for (d_weight, &weight) in d_weights.iter_mut().zip(&*weights) {
                        *d_weight = weight * (*d_weight - dot);
                    }
                },
            );
        }
    }

    /// Adjoint of the queries, `[B, N, H, D]`.
    fn d_queries(&self, out: &Out<'_, T>) -> Vec<T> {
        let &Problem { b, n, h, d, .. } = self.problem;
        let tiles = self.tiles(h, |span| span.queries.len());
        let mut dq = vec![T::zero(); b * h * n * d];
        let pieces = cut(&mut dq, &tiles, d);
        tiles
            .par_iter()
            .zip(pieces)
            .for_each_init(Memory::new, |memory, (tile, dq)| {
                let Tile { span, head, rows } = tile;
                for keys in self.keys_of(span, rows) {
                    self.weights(out, span, *head, (rows, &keys), memory);
                    let places = behind(span.keys.start, &keys);
                    let k = self.k.tokens(span.batch, &places, head / self.problem.share());
                    let ds = Mat::strided(&memory.d_weights, [rows.len(), keys.len()], [TILE, 1]);
                    matmul(dq, d, ds, k, Into::Add);
                }
                self.times_scale(dq);
            });
        tokens_first(dq, h, n, d)
    }

    /// Adjoints of the keys `[B, L, G, D]` and of the values `[B, L, G, E]`.
    fn d_keys(&self, out: &Out<'_, T>) -> (Vec<T>, Vec<T>) {
        let &Problem { b, l, g, d, e, .. } = self.problem;
        let tiles = self.tiles(g, |span| span.keys.len());
        let (mut dk, mut dv) = (vec![T::zero(); b * g * l * d], vec![T::zero(); b * g * l * e]);
        let (keys_out, values_out) = (cut(&mut dk, &tiles, d), cut(&mut dv, &tiles, e));
        tiles.par_iter().zip(keys_out).zip(values_out).for_each_init(
            Memory::new,
            |memory, ((tile, dk), dv)| {
                self.d_keys_of(out, tile, (dk, dv), memory);
            },
        );
        (tokens_first(dk, g, l, d), tokens_first(dv, g, l, e))
    }

    /// One tile of keys, over all heads that share them.
    fn d_keys_of(
        &self,
        out: &Out<'_, T>,
        tile: &Tile,
        (dk, dv): (&mut [T], &mut [T]),
        memory: &mut Memory<T>,
    ) {
        let Tile {
            span,
            head: group,
            rows: keys,
        } = tile;
        let &Problem { d, e, causal, .. } = self.problem;
        // The first query that meets the first key.
        let first = if causal {
            (keys.start + span.queries.len()).saturating_sub(span.keys.len())
        } else {
            0
        };
        let share = self.problem.share();
        for head in group * share..(group + 1) * share {
            for rows in tiles(first.min(span.queries.len())..span.queries.len()) {
                self.weights(out, span, head, (&rows, keys), memory);
                let queries = behind(span.queries.start, &rows);
                let q = self.q.tokens(span.batch, &queries, head);
                let d_o = out.d_o.tokens(span.batch, &queries, head);
                let of = |data| Mat::strided(data, [rows.len(), keys.len()], [TILE, 1]).t();
                matmul(dv, e, of(&memory.weights), d_o, Into::Add);
                matmul(dk, d, of(&memory.d_weights), q, Into::Add);
            }
        }
        self.times_scale(dk);
    }

    fn times_scale(&self, values: &mut [T]) {
        let scale = T::from_f64(self.problem.scale);
        wide(
            #[inline(always)]
            || values.iter_mut().for_each(|value| *value *= scale),
        );
    }
}
