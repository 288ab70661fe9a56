//! Multi-threaded CPU form of the non-causal additive recurrence, `f32` or `f64`.
//!
//! Tokens are cut into blocks whose size depends on the shape alone, each block is one task, and partial sums are
//! combined in block order: results have the same bits for any number of threads. Inside a block everything but
//! the exponential is a matrix product.

use crate::slice_math::SliceMath;
use crate::strided::{Into, Mat, View, matmul};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens of one softmax step: its keys stay in the second-level cache.
const STEP: usize = 256;
/// Most partial states per head, so that memory stays bounded for long sequences.
const PARTIALS: usize = 64;
/// Tokens of one task of the passes that write tokens.
const ROWS: usize = 128;

/// Sizes of a problem; `width` is the number of state rows: D, or 2D with phases.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    pub(super) b: usize,
    pub(super) n: usize,
    pub(super) h: usize,
    pub(super) d: usize,
    pub(super) e: usize,
    pub(super) width: usize,
}

/// Sine and cosine of the phases, `[N, heads, D]` with `heads` 1 or H.
#[derive(Clone, Copy)]
pub(super) struct Trig<'a, T> {
    pub(super) sin: &'a [T],
    pub(super) cos: &'a [T],
    pub(super) heads: usize,
}

impl<'a, T> Trig<'a, T> {
    /// Sines and cosines of one token and head.
    fn at(&self, token: usize, head: usize, d: usize) -> (&'a [T], &'a [T]) {
        let head = if self.heads == 1 { 0 } else { head };
        let start = (token * self.heads + head) * d;
        (&self.sin[start..start + d], &self.cos[start..start + d])
    }

    /// Doubles rows `x` of width D to `[x cos, x sin]`.
    fn rotate(&self, tokens: &Range<usize>, head: usize, d: usize, x: &[T], out: &mut [T])
    where
        T: SliceMath,
    {
        for ((token, x), out) in tokens
            .clone()
            .zip(x.chunks_exact(d))
            .zip(out.chunks_exact_mut(2 * d))
        {
            let (sin, cos) = self.at(token, head, d);
            let (first, second) = out.split_at_mut(d);
            for c in 0..d {
                first[c] = x[c] * cos[c];
                second[c] = x[c] * sin[c];
            }
        }
    }
}

/// Statistics and unnormalised state of all tokens: `max`, `den` `[B, H, D]`, `num` `[B, H, width, E]`.
pub(super) struct Sums<T> {
    pub(super) max: Vec<T>,
    pub(super) den: Vec<T>,
    pub(super) num: Vec<T>,
}

/// Logits with masked tokens at negative infinity.
struct Keys<'a, T> {
    logits: View<'a, T>,
    keep: Option<&'a [bool]>,
    n: usize,
}

impl<T: SliceMath> Keys<'_, T> {
    fn load(&self, b: usize, tokens: &Range<usize>, head: usize, out: &mut [T]) {
        self.logits.pack(b, tokens, head, out);
        if let Some(keep) = self.keep {
            let keep = &keep[b * self.n..][tokens.clone()];
            for (row, _) in out
                .chunks_exact_mut(self.logits.channels())
                .zip(keep)
                .filter(|(_, keep)| !**keep)
            {
                row.fill(T::NEG_INFINITY);
            }
        }
    }
}

/// Values of a block; masked tokens are zeroed in a copy so that padding may hold anything.
fn values<'a, T: SliceMath>(
    v: &View<'a, T>,
    keep: Option<&[bool]>,
    (b, tokens, head): (usize, &Range<usize>, usize),
    n: usize,
    scratch: &'a mut Vec<T>,
) -> Mat<'a, T> {
    let Some(keep) = keep else {
        return v.tokens(b, tokens, head);
    };
    let e = v.channels();
    scratch.resize(tokens.len() * e, T::zero());
    v.pack(b, tokens, head, scratch);
    for (row, _) in scratch
        .chunks_exact_mut(e)
        .zip(&keep[b * n..][tokens.clone()])
        .filter(|(_, keep)| !**keep)
    {
        row.fill(T::zero());
    }
    Mat::packed(scratch, tokens.len(), e)
}

/// A channel without tokens has the maximum negative infinity; its exponents are taken against zero instead.
fn reference<T: SliceMath>(max: T) -> T {
    if max == T::NEG_INFINITY { T::zero() } else { max }
}

/// Tokens of one partial state.
fn block_len(n: usize) -> usize {
    n.div_ceil(STEP * PARTIALS) * STEP
}

fn steps(block: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    block
        .clone()
        .step_by(step)
        .map(move |start| start..(start + step).min(block.end))
}

/// Statistics and state: one streaming pass over logits and values.
pub(super) fn sums<T: SliceMath>(
    dims: Dims,
    logits: View<T>,
    v: View<T>,
    trig: Option<Trig<T>>,
    keep: Option<&[bool]>,
) -> Sums<T> {
    let Dims { b, n, h, d, e, width } = dims;
    let block = block_len(n);
    let blocks = n.div_ceil(block);
    let keys = Keys { logits, keep, n };
    let partials: Vec<Sums<T>> = (0..b * h * blocks)
        .into_par_iter()
        .map(|task| {
            let (head, start) = (task / blocks, task % blocks * block);
            block_sums(
                dims,
                &keys,
                v,
                trig,
                (head / h, head % h),
                start..(start + block).min(n),
            )
        })
        .collect();
    let (mut max, mut den) = (vec![T::zero(); b * h * d], vec![T::zero(); b * h * d]);
    let mut num = vec![T::zero(); b * h * width * e];
    partials
        .par_chunks(blocks)
        .zip(max.par_chunks_mut(d))
        .zip(den.par_chunks_mut(d))
        .zip(num.par_chunks_mut(width * e))
        .for_each(|(((parts, max), den), num)| {
            let mut factor = vec![T::zero(); d];
            max.fill(T::NEG_INFINITY);
            for part in parts {
                raise(max, &part.max);
            }
            for part in parts {
                for c in 0..d {
                    factor[c] = part.max[c] - reference(max[c]);
                }
                T::exp(&mut factor);
                for c in 0..d {
                    den[c] += part.den[c] * factor[c];
                }
                for (row, (num, part)) in num.chunks_exact_mut(e).zip(part.num.chunks_exact(e)).enumerate() {
                    let factor = factor[row % d];
                    for (num, &part) in num.iter_mut().zip(part) {
                        *num += part * factor;
                    }
                }
            }
        });
    Sums { max, den, num }
}

fn raise<T: SliceMath>(max: &mut [T], values: &[T]) {
    for (max, &value) in max.iter_mut().zip(values) {
        *max = if value > *max { value } else { *max };
    }
}

fn block_sums<T: SliceMath>(
    Dims { d, e, width, n, .. }: Dims,
    keys: &Keys<T>,
    v: View<T>,
    trig: Option<Trig<T>>,
    (b, head): (usize, usize),
    block: Range<usize>,
) -> Sums<T> {
    let rows = block.len().min(STEP);
    let mut sums = Sums {
        max: vec![T::NEG_INFINITY; d],
        den: vec![T::zero(); d],
        num: vec![T::zero(); width * e],
    };
    let mut k = vec![T::zero(); rows * d];
    let mut rotated = vec![T::zero(); if trig.is_some() { rows * width } else { 0 }];
    let (mut old, mut packed) = (vec![T::zero(); d], Vec::new());
    for (index, tokens) in steps(block, STEP).enumerate() {
        let k = &mut k[..tokens.len() * d];
        keys.load(b, &tokens, head, k);
        old.copy_from_slice(&sums.max);
        for row in k.chunks_exact(d) {
            raise(&mut sums.max, row);
        }
        if index > 0 {
            for (old, &max) in old.iter_mut().zip(&sums.max) {
                *old -= reference(max);
            }
            T::exp(&mut old);
            for (den, &factor) in sums.den.iter_mut().zip(&old) {
                *den *= factor;
            }
            for (row, num) in sums.num.chunks_exact_mut(e).enumerate() {
                let factor = old[row % d];
                num.iter_mut().for_each(|num| *num *= factor);
            }
        }
        for row in k.chunks_exact_mut(d) {
            for (k, &max) in row.iter_mut().zip(&sums.max) {
                *k -= reference(max);
            }
        }
        T::exp(k);
        for row in k.chunks_exact(d) {
            for (den, &k) in sums.den.iter_mut().zip(row) {
                *den += k;
            }
        }
        let mat = match trig {
            None => Mat::packed(k, tokens.len(), d),
            Some(trig) => {
                trig.rotate(&tokens, head, d, k, &mut rotated);
                Mat::packed(&rotated, tokens.len(), width)
            }
        };
        let v = values(&v, keys.keep, (b, &tokens, head), n, &mut packed);
        matmul(&mut sums.num, e, mat.t(), v, Into::Add);
    }
    sums
}

/// `num / den` in place; rows without any token become zero.
pub(super) fn normalise<T: SliceMath>(Dims { d, e, width, .. }: Dims, den: &[T], num: &mut [T]) {
    num.par_chunks_mut(width * e)
        .zip(den.par_chunks(d))
        .for_each(|(num, den)| {
            for (row, num) in num.chunks_exact_mut(e).enumerate() {
                let scale = inverse(den[row % d]);
                num.iter_mut().for_each(|num| *num *= scale);
            }
        });
}

fn inverse<T: SliceMath>(den: T) -> T {
    if den == T::zero() {
        T::zero()
    } else {
        T::one() / den
    }
}

/// Output `[B, N, H, E]` = rotated queries times state.
pub(super) fn read<T: SliceMath>(dims: Dims, q: View<T>, state: &[T], trig: Option<Trig<T>>) -> Vec<T> {
    let Dims { b, n, h, d, e, width } = dims;
    let mut o = vec![T::zero(); b * n * h * e];
    let tasks: Vec<_> = o
        .chunks_mut(n * h * e)
        .enumerate()
        .flat_map(|(b, o)| {
            o.chunks_mut(ROWS * h * e)
                .enumerate()
                .map(move |(i, o)| (b, i * ROWS, o))
        })
        .collect();
    tasks.into_par_iter().for_each(|(b, start, o)| {
        let tokens = start..start + o.len() / (h * e);
        let (mut x, mut rotated) = (Vec::new(), Vec::new());
        for head in 0..h {
            let state = Mat::packed(&state[(b * h + head) * width * e..], width, e);
            let q = queries(&q, trig, (b, &tokens, head), d, (&mut x, &mut rotated));
            matmul(&mut o[head * e..], h * e, q, state, Into::Set);
        }
    });
    o
}

/// Queries of a block, rotated into scratch memory where there are phases.
fn queries<'a, T: SliceMath>(
    q: &View<'a, T>,
    trig: Option<Trig<T>>,
    (b, tokens, head): (usize, &Range<usize>, usize),
    d: usize,
    (x, rotated): (&mut Vec<T>, &'a mut Vec<T>),
) -> Mat<'a, T> {
    let Some(trig) = trig else {
        return q.tokens(b, tokens, head);
    };
    x.resize(tokens.len() * d, T::zero());
    rotated.resize(tokens.len() * 2 * d, T::zero());
    q.pack(b, tokens, head, x);
    trig.rotate(tokens, head, d, x, rotated);
    Mat::packed(rotated, tokens.len(), 2 * d)
}

/// Adjoints of `read`: of the queries `[B, N, H, D]`, of the state, and of the phases `[N, heads, D]`.
pub(super) struct ReadAdjoints<T> {
    pub(super) dq: Vec<T>,
    pub(super) dstate: Vec<T>,
    pub(super) dphase: Vec<T>,
}

/// Backward of `read`.
pub(super) fn read_backward<T: SliceMath>(
    dims: Dims,
    q: View<T>,
    state: &[T],
    trig: Option<Trig<T>>,
    d_o: View<T>,
    want_phase: bool,
) -> ReadAdjoints<T> {
    let Dims { b, n, h, d, e, width } = dims;
    let mut dq = vec![T::zero(); b * n * h * d];
    let mut phase = PhaseAdjoint::new(dims, trig.filter(|_| want_phase).map(|t| t.heads));
    let tasks: Vec<_> = dq
        .chunks_mut(n * h * d)
        .zip(phase.batches())
        .enumerate()
        .flat_map(|(b, (dq, dphase))| {
            dq.chunks_mut(ROWS * h * d)
                .zip(dphase)
                .enumerate()
                .map(move |(i, (dq, dp))| (b, i * ROWS, dq, dp))
        })
        .collect();
    tasks.into_par_iter().for_each(|(b, start, dq, dphase)| {
        let tokens = start..start + dq.len() / (h * d);
        let rows = tokens.len();
        let (mut x, mut wide) = (vec![T::zero(); rows * d], vec![T::zero(); rows * width]);
        for head in 0..h {
            let state = Mat::packed(&state[(b * h + head) * width * e..], width, e);
            let d_o = d_o.tokens(b, &tokens, head);
            match trig {
                None => matmul(&mut dq[head * d..], h * d, d_o, state.t(), Into::Set),
                Some(trig) => {
                    matmul(&mut wide, width, d_o, state.t(), Into::Set);
                    q.pack(b, &tokens, head, &mut x);
                    for (row, token) in tokens.clone().enumerate() {
                        let out = &mut dq[(row * h + head) * d..][..d];
                        let wide = &wide[row * width..][..width];
                        rotate_back(trig.at(token, head, d), &x[row * d..][..d], wide, out);
                        PhaseAdjoint::add(dphase, trig, (row, head), token, &x[row * d..][..d], wide);
                    }
                }
            }
        }
    });
    let block = block_len(n);
    let blocks = n.div_ceil(block);
    let partials: Vec<Vec<T>> = (0..b * h * blocks)
        .into_par_iter()
        .map(|task| {
            let (head, start) = (task / blocks, task % blocks * block);
            let (b, head) = (head / h, head % h);
            let mut sum = vec![T::zero(); width * e];
            let (mut x, mut rotated) = (Vec::new(), Vec::new());
            for tokens in steps(start..(start + block).min(n), STEP) {
                let q = queries(&q, trig, (b, &tokens, head), d, (&mut x, &mut rotated));
                matmul(&mut sum, e, q.t(), d_o.tokens(b, &tokens, head), Into::Add);
            }
            sum
        })
        .collect();
    let mut dstate = vec![T::zero(); b * h * width * e];
    dstate
        .par_chunks_mut(width * e)
        .zip(partials.par_chunks(blocks))
        .for_each(|(sum, parts)| {
            for part in parts {
                for (sum, &part) in sum.iter_mut().zip(part) {
                    *sum += part;
                }
            }
        });
    let dphase = phase.finish();
    ReadAdjoints { dq, dstate, dphase }
}

/// Adjoint of the rotation with respect to what was rotated: `cos y_cos + sin y_sin`.
fn rotate_back<T: SliceMath>((sin, cos): (&[T], &[T]), x: &[T], wide: &[T], out: &mut [T]) {
    let (first, second) = wide.split_at(x.len());
    for (c, out) in out.iter_mut().enumerate() {
        *out = cos[c] * first[c] + sin[c] * second[c];
    }
}

/// Phase adjoints: each task adds its heads, batches are added at the end in order.
struct PhaseAdjoint<T> {
    partial: Vec<T>,
    row: usize,
    dims: Dims,
}

impl<T: SliceMath> PhaseAdjoint<T> {
    fn new(dims: Dims, heads: Option<usize>) -> Self {
        let row = heads.map_or(0, |heads| heads * dims.d);
        Self {
            partial: vec![T::zero(); dims.b * dims.n * row],
            row,
            dims,
        }
    }

    /// For each batch, the blocks of `ROWS` tokens; empty ones where nobody wants them.
    fn batches(&mut self) -> impl Iterator<Item = Vec<&mut [T]>> {
        let Self { row, dims, .. } = *self;
        let blocks = dims.n.div_ceil(ROWS);
        let mut rest = self.partial.as_mut_slice();
        (0..dims.b).map(move |_| {
            (0..blocks)
                .map(|block| {
                    let tokens = ROWS.min(dims.n - block * ROWS);
                    let (head, tail) = std::mem::take(&mut rest).split_at_mut(tokens * row);
                    rest = tail;
                    head
                })
                .collect()
        })
    }

    /// Adds `x (cos y_sin - sin y_cos)` of one token and head, unless nobody wants it.
    fn add(out: &mut [T], trig: Trig<T>, (row, head): (usize, usize), token: usize, x: &[T], wide: &[T]) {
        if out.is_empty() {
            return;
        }
        let d = x.len();
        let (sin, cos) = trig.at(token, head, d);
        let (first, second) = wide.split_at(d);
        let head = if trig.heads == 1 { 0 } else { head };
        let out = &mut out[(row * trig.heads + head) * d..][..d];
        for c in 0..d {
            out[c] += x[c] * (cos[c] * second[c] - sin[c] * first[c]);
        }
    }

    fn finish(mut self) -> Vec<T> {
        let len = self.dims.n * self.row;
        let (sum, rest) = self.partial.split_at_mut(len);
        for part in rest.chunks_exact(len.max(1)) {
            for (sum, &part) in sum.iter_mut().zip(part) {
                *sum += part;
            }
        }
        self.partial.truncate(len);
        self.partial
    }
}

/// Adjoints of the state pass: of the logits `[B, N, H, D]`, the values `[B, N, H, E]` and the phases.
pub(super) struct StateAdjoints<T> {
    pub(super) dlogits: Vec<T>,
    pub(super) dv: Vec<T>,
    pub(super) dphase: Vec<T>,
}

/// What the state pass left behind, over all parts of the sequence, and the adjoint of the state.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    pub(super) max: &'a [T],
    pub(super) den: &'a [T],
    pub(super) state: &'a [T],
    pub(super) dstate: &'a [T],
}

/// Backward of the state pass. The softmax over tokens costs no pass of its own: its sum collapses to the state,
/// dg_s = K_s (dK_s - rowsum(S dS)).
pub(super) fn state_backward<T: SliceMath>(
    dims: Dims,
    logits: View<T>,
    v: View<T>,
    trig: Option<Trig<T>>,
    keep: Option<&[bool]>,
    saved: Saved<T>,
    want_phase: bool,
) -> StateAdjoints<T> {
    let Dims { b, n, h, d, e, width } = dims;
    let keys = Keys { logits, keep, n };
    let scale: Vec<T> = saved.den.iter().map(|&den| inverse(den)).collect();
    let mut through = vec![T::zero(); b * h * d];
    for (row, (s, ds)) in saved
        .state
        .chunks_exact(e)
        .zip(saved.dstate.chunks_exact(e))
        .enumerate()
    {
        let mut sum = T::zero();
        for (&s, &ds) in s.iter().zip(ds) {
            sum += s * ds;
        }
        through[row / width * d + row % width % d] += sum;
    }
    let mut dlogits = vec![T::zero(); b * n * h * d];
    let mut dv = vec![T::zero(); b * n * h * e];
    let mut phase = PhaseAdjoint::new(dims, trig.filter(|_| want_phase).map(|t| t.heads));
    let tasks: Vec<_> = dlogits
        .chunks_mut(n * h * d)
        .zip(dv.chunks_mut(n * h * e))
        .zip(phase.batches())
        .enumerate()
        .flat_map(|(b, ((dg, dv), dphase))| {
            dg.chunks_mut(ROWS * h * d)
                .zip(dv.chunks_mut(ROWS * h * e))
                .zip(dphase)
                .enumerate()
                .map(move |(i, ((dg, dv), dphase))| (b, i * ROWS, dg, dv, dphase))
        })
        .collect();
    tasks.into_par_iter().for_each(|(b, start, dg, dv, dphase)| {
        let tokens = start..start + dg.len() / (h * d);
        let rows = tokens.len();
        let (mut k, mut wide) = (vec![T::zero(); rows * d], vec![T::zero(); rows * width]);
        let mut rotated = vec![T::zero(); if trig.is_some() { rows * width } else { 0 }];
        let mut packed = Vec::new();
        for head in 0..h {
            let at = b * h + head;
            keys.load(b, &tokens, head, &mut k);
            let (max, scale) = (&saved.max[at * d..][..d], &scale[at * d..][..d]);
            for row in k.chunks_exact_mut(d) {
                for (k, &max) in row.iter_mut().zip(max) {
                    *k -= reference(max);
                }
            }
            T::exp(&mut k);
            for row in k.chunks_exact_mut(d) {
                for (k, &scale) in row.iter_mut().zip(scale) {
                    *k *= scale;
                }
            }
            let dstate = Mat::packed(&saved.dstate[at * width * e..], width, e);
            let v = values(&v, keep, (b, &tokens, head), n, &mut packed);
            matmul(&mut wide, width, v, dstate.t(), Into::Set);
            let mat = match trig {
                None => Mat::packed(&k, rows, d),
                Some(trig) => {
                    trig.rotate(&tokens, head, d, &k, &mut rotated);
                    Mat::packed(&rotated, rows, width)
                }
            };
            matmul(&mut dv[head * e..], h * e, mat, dstate, Into::Set);
            let through = &through[at * d..][..d];
            for (row, token) in tokens.clone().enumerate() {
                let (k, wide) = (&k[row * d..][..d], &wide[row * width..][..width]);
                let out = &mut dg[(row * h + head) * d..][..d];
                match trig {
                    None => out.copy_from_slice(wide),
                    Some(trig) => {
                        rotate_back(trig.at(token, head, d), k, wide, out);
                        PhaseAdjoint::add(dphase, trig, (row, head), token, k, wide);
                    }
                }
                for c in 0..d {
                    out[c] = k[c] * (out[c] - through[c]);
                }
            }
        }
    });
    let dphase = phase.finish();
    StateAdjoints { dlogits, dv, dphase }
}

/// Sines and cosines of `angle`, in parallel.
pub(super) fn sin_cos<T: SliceMath>(angle: &[T]) -> (Vec<T>, Vec<T>) {
    const CHUNK: usize = 4096;
    let (mut sin, mut cos) = (vec![T::zero(); angle.len()], vec![T::zero(); angle.len()]);
    sin.par_chunks_mut(CHUNK)
        .zip(cos.par_chunks_mut(CHUNK))
        .zip(angle.par_chunks(CHUNK))
        .for_each(|((sin, cos), angle)| T::sin_cos(angle, sin, cos));
    (sin, cos)
}
