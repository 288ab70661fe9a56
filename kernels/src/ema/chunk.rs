//! Multi-threaded CPU form of the moving average, `f32` or `f64`.
//!
//! Tokens are cut into blocks of 64, which are scanned from zero in parallel; the states between blocks are then
//! chained in order and what enters a block is added to its tokens. Blocks depend on the shape alone: results have
//! the same bits for any number of threads. A row is everything after the scanned axis, which is adjacent in memory.

use crate::exchange::Direction;
use crate::scalar::{Real, wide};
use rayon::prelude::*;

const BLOCK: usize = 64;

/// Sizes of `x` `[outer, n, rest, H, C]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    pub(super) outer: usize,
    pub(super) n: usize,
    pub(super) rest: usize,
    pub(super) heads: usize,
    pub(super) channels: usize,
}

impl Dims {
    /// Elements of one row, and of its repeating part.
    fn row(&self) -> usize {
        self.rest * self.period()
    }

    fn period(&self) -> usize {
        self.heads * self.channels
    }

    /// `per_head` once for each channel of a period.
    fn expand<T: Real>(&self, per_head: impl Fn(usize) -> T) -> Vec<T> {
        (0..self.period()).map(|c| per_head(c / self.channels)).collect()
    }
}

fn power<T: Real>(rate: T, steps: usize) -> T {
    T::from_f64((-rate.to_f64() * steps as f64).exp())
}

/// Order of `len` things: first to last, or last to first.
fn order(len: usize, direction: Direction) -> impl Iterator<Item = usize> {
    (0..len).map(move |i| {
        if direction == Direction::Forward {
            i
        } else {
            len - 1 - i
        }
    })
}

/// `u_t = lambda u_{t-1} + w x_t` (or from `u_{t+1}`), shaped like `x`; without weights they are 1.
pub(super) fn scan<T: Real>(
    dims: Dims,
    x: &[T],
    rate: &[T],
    weight: Option<&[T]>,
    direction: Direction,
) -> Vec<T> {
    let (row, n) = (dims.row(), dims.n);
    let lambda = dims.expand(|h| power(rate[h], 1));
    let weight = dims.expand(|h| weight.map_or(T::one(), |w| w[h]));
    let mut u = vec![T::zero(); x.len()];
    let tasks: Vec<_> = u
        .chunks_mut(n * row)
        .zip(x.chunks(n * row))
        .flat_map(|(u, x)| u.chunks_mut(BLOCK * row).zip(x.chunks(BLOCK * row)))
        .collect();
    tasks
        .into_par_iter()
        .for_each(|(u, x)| scan_block(u, x, &lambda, &weight, row, direction));
    if n > BLOCK {
        carry(dims, &mut u, rate, direction);
    }
    u
}

/// Scans the rows of one block from zero.
fn scan_block<T: Real>(u: &mut [T], x: &[T], lambda: &[T], weight: &[T], row: usize, direction: Direction) {
    let tokens = u.len() / row;
    let mut previous: Option<usize> = None;
    for t in order(tokens, direction) {
        let x = &x[t * row..][..row];
        match previous {
            None => step(&mut u[t * row..][..row], None, x, lambda, weight),
            Some(before) if before < t => {
                let (done, rest) = u.split_at_mut(t * row);
                step(&mut rest[..row], Some(&done[before * row..]), x, lambda, weight);
            }
            Some(_) => {
                let (rest, done) = u.split_at_mut((t + 1) * row);
                step(&mut rest[t * row..], Some(&done[..row]), x, lambda, weight);
            }
        }
        previous = Some(t);
    }
}

fn step<T: Real>(u: &mut [T], before: Option<&[T]>, x: &[T], lambda: &[T], weight: &[T]) {
    let period = lambda.len();
    wide(
        #[inline(always)]
        || {
            for (i, (u, x)) in u.chunks_exact_mut(period).zip(x.chunks_exact(period)).enumerate() {
                match before {
                    None => {
                        for c in 0..period {
                            u[c] = weight[c] * x[c];
                        }
                    }
                    Some(before) => {
                        let before = &before[i * period..][..period];
                        for c in 0..period {
                            u[c] = lambda[c] * before[c] + weight[c] * x[c];
                        }
                    }
                }
            }
        },
    );
}

/// Adds to every block what enters it from the blocks before.
fn carry<T: Real>(dims: Dims, u: &mut [T], rate: &[T], direction: Direction) {
    let (row, n) = (dims.row(), dims.n);
    let blocks = n.div_ceil(BLOCK);
    let mut entering = vec![T::zero(); dims.outer * blocks * row];
    entering
        .par_chunks_mut(blocks * row)
        .zip(u.par_chunks(n * row))
        .for_each(|(entering, u)| {
            let mut state = vec![T::zero(); row];
            for block in order(blocks, direction) {
                entering[block * row..][..row].copy_from_slice(&state);
                let (start, end) = (block * BLOCK, (block * BLOCK + BLOCK).min(n));
                let decay = dims.expand(|h| power(rate[h], end - start));
                let last = if direction == Direction::Forward {
                    end - 1
                } else {
                    start
                };
                let last = &u[last * row..][..row];
                for (state, last) in state
                    .chunks_exact_mut(decay.len())
                    .zip(last.chunks_exact(decay.len()))
                {
                    for c in 0..decay.len() {
                        state[c] = decay[c] * state[c] + last[c];
                    }
                }
            }
        });
    let powers: Vec<Vec<T>> = (1..=BLOCK)
        .map(|steps| dims.expand(|h| power(rate[h], steps)))
        .collect();
    let tasks: Vec<_> = u
        .chunks_mut(n * row)
        .flat_map(|u| u.chunks_mut(BLOCK * row))
        .zip(entering.chunks(row))
        .collect();
    tasks.into_par_iter().for_each(|(u, entering)| {
        for (t, powers) in order(u.len() / row, direction).zip(&powers) {
            step_in(&mut u[t * row..][..row], entering, powers);
        }
    });
}

fn step_in<T: Real>(u: &mut [T], entering: &[T], powers: &[T]) {
    let period = powers.len();
    wide(
        #[inline(always)]
        || {
            for (u, entering) in u.chunks_exact_mut(period).zip(entering.chunks_exact(period)) {
                for c in 0..period {
                    u[c] += powers[c] * entering[c];
                }
            }
        },
    );
}

/// Inputs and result of the forward scan.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    pub(super) x: &'a [T],
    pub(super) rate: &'a [T],
    pub(super) weight: &'a [T],
    pub(super) u: &'a [T],
}

/// Adjoints of values, rates and weights.
pub(super) struct Adjoints<T> {
    pub(super) dx: Vec<T>,
    pub(super) drate: Vec<T>,
    pub(super) dweight: Vec<T>,
}

/// Backward of `scan`: one scan the other way, and two sums a head in block order.
pub(super) fn backward<T: Real>(dims: Dims, saved: Saved<T>, du: &[T], direction: Direction) -> Adjoints<T> {
    let (row, n, period) = (dims.row(), dims.n, dims.period());
    let opposite = match direction {
        Direction::Forward => Direction::Backward,
        Direction::Backward => Direction::Forward,
    };
    let mut a = scan(dims, du, saved.rate, None, opposite);
    let weight = dims.expand(|h| saved.weight[h]);
    let tasks: Vec<_> = a
        .chunks_mut(n * row)
        .zip(saved.x.chunks(n * row))
        .zip(saved.u.chunks(n * row))
        .flat_map(|((a, x), u)| {
            a.chunks_mut(BLOCK * row)
                .zip(x.chunks(BLOCK * row))
                .enumerate()
                .map(move |(block, (a, x))| (block * BLOCK, a, x, u))
        })
        .collect();
    let sums: Vec<(Vec<T>, Vec<T>)> = tasks
        .into_par_iter()
        .map(|(start, a, x, u)| {
            let (mut with_x, mut with_u) = (vec![T::zero(); period], vec![T::zero(); period]);
            for (t, (a, x)) in a.chunks_exact_mut(row).zip(x.chunks_exact(row)).enumerate() {
                let before = match direction {
                    Direction::Forward => (start + t).checked_sub(1),
                    Direction::Backward => Some(start + t + 1).filter(|&t| t < n),
                };
                if let Some(before) = before {
                    accumulate(&mut with_u, a, &u[before * row..][..row]);
                }
                accumulate(&mut with_x, a, x);
                for a in a.chunks_exact_mut(period) {
                    for (a, &weight) in a.iter_mut().zip(&weight) {
                        *a *= weight;
                    }
                }
            }
            (with_x, with_u)
        })
        .collect();
    // Few numbers and many terms: the last sum is in f64.
    let (mut dweight, mut drate) = (vec![0f64; dims.heads], vec![0f64; dims.heads]);
    for (with_x, with_u) in &sums {
        for c in 0..period {
            dweight[c / dims.channels] += with_x[c].to_f64();
            drate[c / dims.channels] += with_u[c].to_f64();
        }
    }
    Adjoints {
        dx: a,
        drate: drate
            .iter()
            .zip(saved.rate)
            .map(|(sum, rate)| T::from_f64(-(-rate.to_f64()).exp() * sum))
            .collect(),
        dweight: dweight.into_iter().map(T::from_f64).collect(),
    }
}

fn accumulate<T: Real>(sums: &mut [T], a: &[T], b: &[T]) {
    let period = sums.len();
    wide(
        #[inline(always)]
        || {
            for (a, b) in a.chunks_exact(period).zip(b.chunks_exact(period)) {
                for c in 0..period {
                    sums[c] += a[c] * b[c];
                }
            }
        },
    );
}
