//! The head on the processor: tiles of the vocabulary are tasks.
//!
//! A tile computes its columns of the logits of a chunk and their part of each row's softmax; then, with the softmaxes of
//! whole rows, its gradients: its rows of dW, and a part of dx. Weights are read twice a chunk. The number of tiles depends
//! on sizes alone, and parts are added in order, so that the bits do not depend on the number of threads.

use super::{Head, Made, OP, Options, Reduction};
use crate::error::OpError;
use crate::scalar::{Real, rows_per_task, sum_of, wide};
use crate::strided::{Into, Mat, contiguous, matmul};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Error, Layout, Result, Tensor};
use rayon::prelude::*;

/// Most tiles of a vocabulary.
const TILES: usize = 64;
/// Elements of a task that scales.
const BLOCK: usize = 16 * 1024;

/// What is known of a row from some of its logits: the largest, the sum of exp(logit - largest), the sum of all.
#[derive(Clone, Copy)]
struct Part<T> {
    top: T,
    sum: T,
    total: T,
}

impl<T: Real> Part<T> {
    fn of(logits: &[T]) -> Self {
        wide(
            #[inline(always)]
            || {
                let top = largest(logits);
                Self {
                    top,
                    sum: sum_of(logits, logits, |l, _| (l - top).exponential()),
                    total: sum_of(logits, logits, |l, _| l),
                }
            },
        )
    }

    fn join(self, other: Self) -> Self {
        let top = if other.top > self.top { other.top } else { self.top };
        let scaled = |part: Self| part.sum * (part.top - top).exponential();
        Self {
            top,
            sum: scaled(self) + scaled(other),
            total: self.total + other.total,
        }
    }
}

#[inline(always)]
fn largest<T: Real>(values: &[T]) -> T {
    const LANES: usize = 16;
    let mut lanes = [values[0]; LANES];
    for part in values.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(part) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let larger = |a: T, b: T| if b > a { b } else { a };
    lanes[1..].iter().fold(lanes[0], |a, &b| larger(a, b))
}

/// What the gradient of a row needs.
#[derive(Clone, Copy)]
struct Row<T> {
    target: usize,
    top: T,
    /// (1 + 2 c z) over the sum of exponentials.
    factor: T,
}

/// Constants of the loss.
#[derive(Clone, Copy)]
struct Terms<T> {
    /// 1 - label smoothing.
    hot: T,
    smoothing: T,
    z_loss: T,
    vocabulary: T,
}

impl<T: Real> Terms<T> {
    fn new(options: &Options, vocabulary: usize) -> Self {
        Self {
            hot: T::from_f64(1.0 - options.label_smoothing),
            smoothing: T::from_f64(options.label_smoothing),
            z_loss: T::from_f64(options.z_loss),
            vocabulary: T::from_f64(vocabulary as f64),
        }
    }

    /// Loss of a row, and what its gradient needs.
    fn row(&self, part: Part<T>, target: usize, hit: T) -> (T, Row<T>) {
        let rest = part.sum.logarithm();
        let z = part.top + rest;
        // Differences first: logits may be large.
        let loss = rest
            + self.hot * (part.top - hit)
            + self.smoothing * (part.top - part.total / self.vocabulary)
            + self.z_loss * z * z;
        let two = T::one() + T::one();
        let row = Row {
            target,
            top: part.top,
            factor: (T::one() + two * self.z_loss * z) / part.sum,
        };
        (loss, row)
    }

    /// Turns the logits of columns `first..` of a row into its gradient; `None` does not count.
    fn gradient(&self, logits: &mut [T], first: usize, row: Option<&Row<T>>) {
        let Some(row) = row else {
            logits.fill(T::zero());
            return;
        };
        let base = self.smoothing / self.vocabulary;
        wide(
            #[inline(always)]
            || {
                for l in &mut *logits {
                    *l = (*l - row.top).exponential() * row.factor - base;
                }
            },
        );
        if let Some(hit) = row.target.checked_sub(first).and_then(|at| logits.get_mut(at)) {
            *hit -= self.hot;
        }
    }
}

/// A range of the vocabulary and what is computed for it.
struct Tile<'a, T> {
    first: usize,
    /// Its rows of the weight, [width, D].
    weight: Mat<'a, T>,
    width: usize,
    /// [rows, width].
    logits: &'a mut [T],
    /// Its rows of dW, [width, D].
    dweight: Option<&'a mut [T]>,
    /// Its part of dx, [rows, D].
    dx: Option<&'a mut [T]>,
}

pub(super) fn run<T: Real>(head: &Head) -> Result<Made> {
    let [rows, vocabulary, width] = head.sizes()?;
    let guards = [head.x.storage_and_layout().0, head.weight.storage_and_layout().0];
    let x = contiguous::<T>(&head.x, &guards[0])?;
    let weight = contiguous::<T>(&head.weight, &guards[1])?;
    let targets = head.targets.to_vec1::<u32>()?;
    let terms = Terms::<T>::new(&head.options, vocabulary);
    // No more tiles than that their parts of dx take the memory of the logits.
    let tile = vocabulary.div_ceil((vocabulary / width).clamp(1, TILES));
    let tiles = vocabulary.div_ceil(tile);
    let room = |wanted: bool, count: usize| vec![T::zero(); if wanted { count } else { 0 }];
    let mut logits = room(true, head.chunk * vocabulary);
    let mut parts = room(head.wanted.dx, tiles * head.chunk * width);
    let mut dweight = room(head.wanted.dweight, vocabulary * width);
    let mut dx = room(head.wanted.dx, rows * width);
    let mut losses = room(true, rows);
    for start in (0..rows).step_by(head.chunk) {
        let count = head.chunk.min(rows - start);
        // The last chunk may be smaller.
        let parts = &mut parts[..if head.wanted.dx { tiles * count * width } else { 0 }];
        let x = Mat::packed(&x[start * width..][..count * width], count, width);
        let mut tiles = cut(
            (weight, tile, width),
            &mut logits[..count * vocabulary],
            &mut dweight,
            parts,
            count,
        );
        let softmax: Vec<Vec<Part<T>>> = tiles
            .par_iter_mut()
            .map(|tile| {
                matmul(tile.logits, tile.width, x, tile.weight.t(), Into::Set);
                tile.logits.chunks_exact(tile.width).map(Part::of).collect()
            })
            .collect();
        let mut rows = Vec::with_capacity(count);
        for (i, (loss, &id)) in losses[start..][..count]
            .iter_mut()
            .zip(&targets[start..])
            .enumerate()
        {
            if Some(id) == head.options.ignore {
                rows.push(None);
                continue;
            }
            let target = id as usize;
            let part = softmax[1..].iter().fold(softmax[0][i], |a, b| a.join(b[i]));
            let hit = &tiles[target / tile];
            let (value, row) = terms.row(part, target, hit.logits[i * hit.width + target - hit.first]);
            *loss = value;
            rows.push(Some(row));
        }
        if !head.wanted.any() {
            continue;
        }
        let into = if start == 0 { Into::Set } else { Into::Add };
        tiles.par_iter_mut().for_each(|tile| {
            for (logits, row) in tile.logits.chunks_exact_mut(tile.width).zip(&rows) {
                terms.gradient(logits, tile.first, row.as_ref());
            }
            let dl = Mat::packed(tile.logits, count, tile.width);
            if let Some(dweight) = tile.dweight.as_deref_mut() {
                matmul(dweight, width, dl.t(), x, into);
            }
            if let Some(dx) = tile.dx.as_deref_mut() {
                matmul(dx, width, dl, tile.weight, Into::Set);
            }
        });
        if head.wanted.dx {
            add_parts(
                &mut dx[start * width..][..count * width],
                parts,
                count * width,
                width,
            );
        }
    }
    let device = head.x.device();
    let tensor = |wanted: bool, values: Vec<T>, shape: &[usize]| {
        wanted
            .then(|| Tensor::from_vec(values, shape, device))
            .transpose()
    };
    Ok(Made {
        losses: Tensor::from_vec(losses, rows, device)?,
        dx: tensor(head.wanted.dx, dx, &[rows, width])?,
        dweight: tensor(head.wanted.dweight, dweight, &[vocabulary, width])?,
    })
}

/// Cuts everything into tiles of `tile` ids for a chunk of `count` rows.
fn cut<'a, T: Real>(
    (weight, tile, width): (&'a [T], usize, usize),
    logits: &'a mut [T],
    dweight: &'a mut [T],
    parts: &'a mut [T],
    count: usize,
) -> Vec<Tile<'a, T>> {
    let mut dweight = dweight.chunks_mut(tile * width);
    let mut parts = parts.chunks_mut(count * width);
    weight
        .chunks(tile * width)
        .zip(logits.chunks_mut(count * tile))
        .enumerate()
        .map(|(i, (weight, logits))| Tile {
            first: i * tile,
            width: weight.len() / width,
            weight: Mat::packed(weight, weight.len() / width, width),
            logits,
            dweight: dweight.next(),
            dx: parts.next(),
        })
        .collect()
}

/// Adds the parts of all tiles, `size` elements each, in their order.
fn add_parts<T: Real>(dx: &mut [T], parts: &[T], size: usize, width: usize) {
    let task = rows_per_task(width) * width;
    dx.par_chunks_mut(task).enumerate().for_each(|(i, dx)| {
        let mut parts = parts.chunks_exact(size);
        if let Some(first) = parts.next() {
            dx.copy_from_slice(&first[i * task..][..dx.len()]);
        }
        for part in parts {
            wide(
                #[inline(always)]
                || {
                    for (dx, &part) in dx.iter_mut().zip(&part[i * task..]) {
                        *dx += part;
                    }
                },
            );
        }
    });
}

pub(super) fn reduce(
    losses: &Tensor,
    targets: &Tensor,
    ignore: Option<u32>,
    reduction: Reduction,
) -> Result<(Tensor, Tensor)> {
    let counts = |id: &u32| Some(*id) != ignore;
    let count = targets.to_vec1::<u32>()?.iter().filter(|id| counts(id)).count();
    let share = match reduction {
        Reduction::Sum => 1.0,
        Reduction::Mean if count == 0 => 0.0,
        Reduction::Mean => 1.0 / count as f64,
    };
    let sum: f64 = losses.to_dtype(DType::F64)?.to_vec1::<f64>()?.iter().sum();
    let scalar = |x: f64| Tensor::new(x, losses.device())?.to_dtype(losses.dtype());
    Ok((scalar(sum * share)?, scalar(share)?))
}

/// Multiplies `values` by two scalars.
pub(super) fn scale(
    (values, layout): (&mut CpuStorage, &Layout),
    grad: (&CpuStorage, &Layout),
    share: (&CpuStorage, &Layout),
) -> Result<()> {
    fn typed<T: Real>(values: &mut [T], factor: T) {
        values.par_chunks_mut(BLOCK).for_each(|values| {
            wide(|| {
                for value in values {
                    *value *= factor;
                }
            });
        });
    }
    fn factor<T: Real>(factors: [(&CpuStorage, &Layout); 2]) -> Result<T> {
        let [a, b] = factors.map(|(storage, layout)| crate::pass::slice::<T>(OP, storage, layout));
        Ok(a?[0] * b?[0])
    }
    let range = match layout.contiguous_offsets() {
        Some((start, end)) => start..end,
        None => return Err(Error::RequiresContiguous { op: OP }),
    };
    match values {
        CpuStorage::F32(values) => typed(&mut values[range], factor::<f32>([grad, share])?),
        CpuStorage::F64(values) => typed(&mut values[range], factor::<f64>([grad, share])?),
        _ => {
            return Err(OpError::DType {
                op: OP,
                field: "gradient",
                found: values.dtype(),
                device: "the CPU",
                supported: "f32, f64",
            }
            .into());
        }
    }
    Ok(())
}
