//! The gradient of the log-decays of one chunk, from finished gradients of queries and keys.
//!
//! ```text
//!   dlog a_t = sum_{s >= t, same chunk} (q_s (*) dq_s - k_s (*) dk_s) + rowsum(S (*) G)
//! ```
//!
//! with the state S that leaves the chunk and its adjoint G. The sums subtract large similar numbers: they are in f64.

use super::chunk::Inputs;
use super::plan::Chunk;
use crate::scalar::wide;
use crate::slice_math::SliceMath;

/// Sums `[tokens, H]` to `[H]`, in f64.
pub(super) fn sums_of_heads<T: SliceMath>(dlog: &[T], h: usize) -> Vec<T> {
    let mut sums = vec![0f64; h];
    for row in dlog.chunks_exact(h) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x.to_f64();
        }
    }
    sums.into_iter().map(T::from_f64).collect()
}

/// Scratch memory for the gradient of the log-decays of a chunk.
pub(super) struct Gate<T> {
    q: Vec<T>,
    k: Vec<T>,
    decay: Vec<T>,
    sum: Vec<f64>,
    width: usize,
}

impl<T: SliceMath> Gate<T> {
    pub(super) fn new(rows: usize, d: usize, width: usize) -> Self {
        Self {
            q: vec![T::zero(); rows * d],
            k: vec![T::zero(); rows * d],
            decay: vec![T::zero(); rows * width],
            sum: vec![0.0; width],
            width,
        }
    }

    /// Writes the gradient to rows `stride` apart, from finished rows of dq and dk; exactly zero where a decay is.
    pub(super) fn run(
        &mut self,
        inputs: &Inputs<T>,
        (chunk, head): (&Chunk, usize),
        (leaves, adjoint): (&[T], &[T]),
        (dq, dk, key_stride): (&[T], &[T], usize),
        (out, stride): (&mut [T], usize),
    ) {
        let (d, width) = (inputs.q.channels(), self.width);
        let e = leaves.len() / d;
        inputs.q.pack(chunk.batch, &chunk.tokens, head, &mut self.q);
        inputs.k.pack(chunk.batch, &chunk.tokens, head, &mut self.k);
        inputs.decay.load(chunk, head, &mut self.decay);
        T::exp(&mut self.decay);
        self.sum.fill(0.0);
        for (c, (leaves, adjoint)) in leaves.chunks_exact(e).zip(adjoint.chunks_exact(e)).enumerate() {
            self.sum[c % width] += dot(leaves, adjoint);
        }
        for row in (0..chunk.len()).rev() {
            let (q, k) = (&self.q[row * d..][..d], &self.k[row * d..][..d]);
            let (dq, dk) = (&dq[row * key_stride..][..d], &dk[row * key_stride..][..d]);
            if width == 1 {
                self.sum[0] += dot(q, dq) - dot(k, dk);
            } else {
                for (c, sum) in self.sum.iter_mut().enumerate() {
                    *sum += q[c].to_f64() * dq[c].to_f64() - k[c].to_f64() * dk[c].to_f64();
                }
            }
            let decay = &self.decay[row * width..][..width];
            let out = &mut out[row * stride..][..width];
            for (c, out) in out.iter_mut().enumerate() {
                let is_zero = decay[c] == T::zero();
                *out = if is_zero {
                    T::zero()
                } else {
                    T::from_f64(self.sum[c])
                };
            }
        }
    }
}

/// Inner product in f64.
fn dot<T: SliceMath>(a: &[T], b: &[T]) -> f64 {
    wide(
        #[inline(always)]
        || {
            const LANES: usize = 8;
            let mut lanes = [0f64; LANES];
            let (heads_a, heads_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
            let tail = heads_a.remainder().iter().zip(heads_b.remainder());
            let tail: f64 = tail.map(|(a, b)| a.to_f64() * b.to_f64()).sum();
            for (a, b) in heads_a.zip(heads_b) {
                for lane in 0..LANES {
                    lanes[lane] += a[lane].to_f64() * b[lane].to_f64();
                }
            }
            lanes.iter().sum::<f64>() + tail
        },
    )
}
