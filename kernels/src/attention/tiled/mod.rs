//! Softmax attention in tiles of queries and keys: weights exist for one pair of tiles at a time.
//!
//! ```text
//!   S = scale Q K^T, minus infinity where a query does not meet a key
//!   z_i = log sum_j exp S_ij        P_ij = exp(S_ij - z_i)        O = P V
//!   D_i = sum_e dO_ie O_ie          dS = P (*) (dO V^T - D)
//!   dQ = scale dS K                 dK = scale dS^T Q             dV = P^T dO
//! ```
//!
//! Forward, a tile of queries meets the tiles of keys one after the other and keeps the largest score m_i of each query so far,
//! with l_i = sum exp(S_ij - m_i) and o_i = sum exp(S_ij - m_i) v_j; when m_i grows, both are scaled by exp of the difference.
//! At the end O_i = o_i / l_i and z_i = m_i + log l_i, infinite where a query meets no key: its weights are then zero. Backward
//! makes P anew from z, once for tiles of keys (dK, dV) and once for tiles of queries (dQ): seven products instead of five, and
//! every sum is taken by one task, in order. Tiles that causality excludes are left out.
//!
//! | form | file | runs |
//! |---|---|---|
//! | reference | `../reference.rs` | loops in `f64`, for tests |
//! | tiles on the CPU | `cpu.rs` | multi-threaded, `f32` and `f64` |
//! | tensor cores | `cuda.rs`, `cuda/attention_{forward,backward}.cu` | GPU, `bf16`, widths of 8, 16 .. 128 |
//! | plain | `cuda.rs`, `cuda/attention_plain.cu` | GPU, `f32` and everything else, widths up to 256 |

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use super::Problem;
use candle_core::{Result, Tensor};

/// [`super::softmax`] of checked inputs.
pub(super) fn softmax(
    problem: Problem,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return cuda::softmax(problem, q, k, v, mask);
    }
    cpu::softmax(problem, q, k, v, mask)
}
