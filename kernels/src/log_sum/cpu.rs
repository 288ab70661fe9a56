//! The scans on the processor: one task for each sequence and block of channels.

use super::{NOTHING, Scan};
use crate::scalar::{Real, wide};
use crate::strided::elements;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Channels of a task: the lanes of a few vectors.
const BLOCK: usize = 64;

/// Runs `task` on (sequence number, batch, start, end) and blocks of columns; it fills rows of its block.
fn blocks<T: Real>(
    scan: &Scan,
    shape: &Tensor,
    task: impl Fn(usize, (usize, usize, usize), std::ops::Range<usize>, &mut [T]) + Sync,
) -> Result<Tensor> {
    let columns = scan.columns();
    let sequences = scan.sequences();
    let jobs: Vec<_> = (0..sequences.len())
        .flat_map(|index| (0..columns).step_by(BLOCK).map(move |first| (index, first)))
        .collect();
    let pieces: Vec<_> = jobs
        .into_par_iter()
        .map(|(index, first)| {
            let (batch, start, end) = sequences[index];
            let range = first..(first + BLOCK).min(columns);
            let mut rows = vec![T::zero(); (end - start) * range.len()];
            task(index, (batch, start, end), range.clone(), &mut rows);
            (batch * scan.tokens + start, range, rows)
        })
        .collect();
    let mut out = vec![T::zero(); shape.elem_count()];
    for (first, range, rows) in pieces {
        for (token, row) in rows.chunks_exact(range.len()).enumerate() {
            out[(first + token) * columns + range.start..][..range.len()].copy_from_slice(row);
        }
    }
    Tensor::from_vec(out, shape.shape(), shape.device())
}

pub(super) fn gates<T: Real>(scan: &Scan, logits: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
    let columns = scan.columns();
    let g = elements::<T>(logits)?;
    let before = before.map(elements::<T>).transpose()?;
    blocks(scan, logits, |index, (batch, start, _), range, out| {
        let nothing = T::from_f64(NOTHING);
        let mut z: Vec<T> = match &before {
            Some(before) => before[index * columns..][range.clone()].to_vec(),
            None => vec![nothing; range.len()],
        };
        for (token, out) in out.chunks_exact_mut(range.len()).enumerate() {
            let g = &g[(batch * scan.tokens + start + token) * columns..][range.clone()];
            wide(
                #[inline(always)]
                || {
                    for (z, &g) in z.iter_mut().zip(g) {
                        let (high, low) = if g > *z { (g, *z) } else { (*z, g) };
                        *z = high + ((low - high).exponential() + T::one()).logarithm();
                    }
                },
            );
            out.copy_from_slice(&z);
        }
    })
}

pub(super) fn pull<T: Real>(scan: &Scan, terms: &Tensor, z: &Tensor) -> Result<Tensor> {
    let columns = scan.columns();
    let (x, z) = (elements::<T>(terms)?, elements::<T>(z)?);
    blocks(scan, terms, |_, (batch, start, end), range, out| {
        let row = |values: &[T], token: usize| -> Vec<T> {
            values[(batch * scan.tokens + token) * columns..][range.clone()].to_vec()
        };
        let mut y = vec![T::zero(); range.len()];
        let mut after = row(&z, (end.max(start + 1) - 1).min(scan.tokens - 1));
        for (token, out) in (start..end).zip(out.chunks_exact_mut(range.len())).rev() {
            let (x, here) = (row(&x, token), row(&z, token));
            wide(
                #[inline(always)]
                || {
                    for i in 0..y.len() {
                        y[i] = x[i] + (here[i] - after[i]).exponential() * y[i];
                    }
                },
            );
            after = here;
            out.copy_from_slice(&y);
        }
    })
}
