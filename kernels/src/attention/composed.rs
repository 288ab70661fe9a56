//! Softmax attention of one sequence over another as one node of the graph.
//!
//! ```text
//! P = softmax over keys of (scale Q K^T + penalty where a key is padding)      O = P V
//! dV = P^T dO     dS = scale P (*) (dO V^T - rowsum(dO (*) O))     dQ = dS K     dK = dS^T Q
//! ```
//!
//! The weights `[B, H, N, L]` are kept for the backward pass: this is the form for short contexts (a text, the other
//! stream of a clip). On CUDA in bf16 the products are cuBLAS's and what lies between them is fused.

use crate::autograd::{Gradient, Value, attach3};
use crate::error::OpError;
use candle_core::{D, Result, Tensor};

const OP: &str = "attention";
/// Added to the scores of padding: a context of nothing else gives the mean of its values.
const PENALTY: f64 = -1e9;

/// Attention of `q` [B, N, H, D] over `k` [B, L, H, D] and `v` [B, L, H, E], scaled by D^-1/2: [B, N, H, E].
///
/// `mask` [B, L] is 1 where a key counts and 0 where it is padding. Differentiable in `q`, `k` and `v`, which are of one
/// type: f32 or f64 on the CPU, f32 or bf16 on CUDA.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let &[b, n, h, d] = q.dims() else {
        return Err(OpError::shape(OP, "q", q, "[B, N, H, D]").into());
    };
    let l = k.dims().get(1).copied().unwrap_or(0);
    if k.dims() != [b, l, h, d] || b * n * h * l * d == 0 {
        return Err(OpError::shape(OP, "k", k, format!("[{b}, L, {h}, {d}] to go with q")).into());
    }
    if v.rank() != 4 || v.dims()[..3] != [b, l, h] {
        return Err(OpError::shape(OP, "v", v, format!("[{b}, {l}, {h}, E] to go with k")).into());
    }
    if let Some(mask) = mask
        && mask.dims() != [b, l]
    {
        return Err(OpError::shape(OP, "mask", mask, format!("[{b}, {l}]")).into());
    }
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let saved = Saved {
        q_bhnd: swapped(&q.detach())?,
        k_bhld: swapped(&k.detach())?,
        v_bhle: swapped(&v.detach())?,
        scale: (d as f64).powf(-0.5),
        weights: None,
    };
    let scores = saved.q_bhnd.matmul(&saved.k_bhld.t()?)?;
    let weights = softmax(scores, mask, saved.scale)?;
    let o = swapped(&weights.matmul(&saved.v_bhle)?)?;
    let saved = Saved {
        weights: Some(weights),
        ..saved
    };
    attach3(Value::Tensor(o), [&q, &k, &v], saved)
}

/// What the backward pass needs, heads before tokens.
struct Saved {
    q_bhnd: Tensor,
    k_bhld: Tensor,
    v_bhle: Tensor,
    weights: Option<Tensor>,
    scale: f64,
}

impl Gradient<3> for Saved {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, _: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let Some(weights) = &self.weights else {
            candle_core::bail!("{OP}: no weights were kept")
        };
        let d_o = swapped(&grad.contiguous()?)?;
        let dv = weights.t()?.matmul(&d_o)?;
        let dscores = softmax_back(weights, d_o.matmul(&self.v_bhle.t()?)?, self.scale)?;
        let dq = dscores.matmul(&self.k_bhld)?;
        let dk = dscores.t()?.matmul(&self.q_bhnd)?;
        Ok([Some(swapped(&dq)?), Some(swapped(&dk)?), Some(swapped(&dv)?)])
    }
}

/// `[B, N, H, D]` to contiguous `[B, H, N, D]`, or back.
fn swapped(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::applies(x) && x.dim(3)? % cuda::VECTOR == 0 {
        return cuda::swapped(x);
    }
    x.transpose(1, 2)?.contiguous()
}

/// Weights from scores `[B, H, N, L]`, which it may overwrite: nothing else holds them.
fn softmax(scores: Tensor, mask: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let mask = mask.map(Tensor::detach);
    #[cfg(feature = "cuda")]
    if cuda::applies(&scores) {
        return cuda::softmax(scores, mask.as_ref(), scale);
    }
    let dtype = scores.dtype();
    let mut scores = (scores * scale)?;
    if let Some(mask) = mask {
        let (batch, length) = mask.dims2()?;
        let penalty = mask
            .ne(0f64)?
            .to_dtype(dtype)?
            .affine(-PENALTY, PENALTY)?
            .reshape((batch, 1, 1, length))?;
        scores = scores.broadcast_add(&penalty)?;
    }
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)
}

/// Adjoint of the unscaled scores from the weights and their adjoint, which it may overwrite.
fn softmax_back(weights: &Tensor, adjoint: Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::applies(weights) {
        return cuda::softmax_back(weights, adjoint, scale);
    }
    let dot = (weights * &adjoint)?.sum_keepdim(D::Minus1)?;
    (weights * adjoint.broadcast_sub(&dot)?)? * scale
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Launches of `cuda/attention_composed.cu`.

    use super::OP;
    use crate::cuda_module::{Module, THREADS, flat, launch, module, room};
    use crate::gpu::{self, Locked};
    use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
    use candle_core::{DType, Result, Tensor};
    use half::bf16;

    const ATTENTION: Module = module!("attention_composed");
    /// Elements of a vector that moves at once.
    pub(super) const VECTOR: usize = 8;

    /// Whether the fused kernels take this tensor.
    pub(super) fn applies(x: &Tensor) -> bool {
        x.device().is_cuda() && x.dtype() == DType::BF16
    }

    pub(super) fn swapped(x: &Tensor) -> Result<Tensor> {
        let (b, n, h, d) = x.dims4()?;
        let device = x.device().as_cuda_device()?;
        // A vector must start on a multiple of its size.
        let x = if Locked::new(OP, x).address()?.0 % 16 == 0 {
            x.clone()
        } else {
            x.copy()?
        };
        let y = room::<bf16>(device, x.elem_count())?;
        let count = x.elem_count() / VECTOR;
        let x = Locked::new(OP, &x);
        launch!(device, ATTENTION, "swap_heads", flat(count);
            x.view::<bf16>()?, y.as_view(), n as u32, h as u32, (d / VECTOR) as u32, count);
        Ok(gpu::tensor(y, device, &(b, h, n, d).into()))
    }

    fn warp_per_row(rows: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (rows.div_ceil(THREADS as usize / 32) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    pub(super) fn softmax(scores: Tensor, mask: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        let (b, h, n, l) = scores.dims4()?;
        let device = scores.device().as_cuda_device()?;
        let mask = mask
            .map(|mask| mask.to_dtype(DType::F32)?.contiguous())
            .transpose()?;
        {
            let mask = mask.as_ref().map(|mask| Locked::new(OP, mask));
            let mask = mask
                .as_ref()
                .map_or(Ok(0), |mask| Ok::<_, candle_core::Error>(mask.address()?.0))?;
            let scores = Locked::new(OP, &scores);
            launch!(device, ATTENTION, "softmax", warp_per_row(b * h * n);
                scores.view::<bf16>()?, mask, (b * h * n) as u32, l as u32, (h * n) as u32, scale as f32);
        }
        Ok(scores)
    }

    pub(super) fn softmax_back(weights: &Tensor, adjoint: Tensor, scale: f64) -> Result<Tensor> {
        let (b, h, n, l) = weights.dims4()?;
        let device = weights.device().as_cuda_device()?;
        {
            let (weights, adjoint) = (Locked::new(OP, weights), Locked::new(OP, &adjoint));
            launch!(device, ATTENTION, "softmax_back", warp_per_row(b * h * n);
                weights.view::<bf16>()?, adjoint.view::<bf16>()?, (b * h * n) as u32, l as u32, scale as f32);
        }
        Ok(adjoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::{DType, Device};

    struct Sizes {
        b: usize,
        n: usize,
        l: usize,
        h: usize,
        d: usize,
        e: usize,
    }

    const SMALL: Sizes = Sizes {
        b: 2,
        n: 3,
        l: 4,
        h: 2,
        d: 3,
        e: 5,
    };

    fn inputs(s: &Sizes) -> [Tensor; 3] {
        [
            normal(1, &[s.b, s.n, s.h, s.d]),
            normal(2, &[s.b, s.l, s.h, s.d]),
            normal(3, &[s.b, s.l, s.h, s.e]),
        ]
    }

    fn mask(s: &Sizes) -> Tensor {
        let valid: Vec<f64> = (0..s.b * s.l)
            .map(|i| f64::from(u8::from(i % s.l <= i / s.l)))
            .collect();
        Tensor::from_vec(valid, (s.b, s.l), &Device::Cpu).unwrap()
    }

    /// The definition, one query at a time.
    fn reference(s: &Sizes, [q, k, v]: &[Tensor; 3], mask: Option<&Tensor>) -> Vec<f64> {
        let (q, k, v) = (values(q), values(k), values(v));
        let mask = mask.map(values);
        let mut o = vec![f64::NAN; s.b * s.n * s.h * s.e];
        for b in 0..s.b {
            for n in 0..s.n {
                for h in 0..s.h {
                    let key = |l: usize| ((b * s.l + l) * s.h + h) * s.d;
                    let query = ((b * s.n + n) * s.h + h) * s.d;
                    let weight = |l: usize| {
                        let valid = mask.as_ref().is_none_or(|mask| mask[b * s.l + l] != 0.0);
                        let dot: f64 = (0..s.d).map(|c| q[query + c] * k[key(l) + c]).sum();
                        if valid {
                            (dot / (s.d as f64).sqrt()).exp()
                        } else {
                            0.0
                        }
                    };
                    let total: f64 = (0..s.l).map(weight).sum();
                    for e in 0..s.e {
                        let sum: f64 = (0..s.l)
                            .map(|l| weight(l) * v[((b * s.l + l) * s.h + h) * s.e + e])
                            .sum();
                        o[((b * s.n + n) * s.h + h) * s.e + e] = sum / total;
                    }
                }
            }
        }
        o
    }

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        let t = inputs(&SMALL);
        let found = values(&attention(&t[0], &t[1], &t[2], None)?);
        assert!(relative_rms(&found, &reference(&SMALL, &t, None)) < 1e-13);
        let mask = mask(&SMALL);
        let found = values(&attention(&t[0], &t[1], &t[2], Some(&mask))?);
        assert!(relative_rms(&found, &reference(&SMALL, &t, Some(&mask))) < 1e-13);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let mask = mask(&SMALL);
        check_gradients(&inputs(&SMALL), |t| attention(&t[0], &t[1], &t[2], None))?;
        check_gradients(&inputs(&SMALL), |t| attention(&t[0], &t[1], &t[2], Some(&mask)))?;
        let large = Sizes {
            b: 2,
            n: 131,
            l: 63,
            h: 3,
            d: 16,
            e: 24,
        };
        check_precision(&inputs(&large), |t| attention(&t[0], &t[1], &t[2], None), 1e-5)?;
        check_threads(&inputs(&large), |t| attention(&t[0], &t[1], &t[2], None))
    }

    /// A prompt without words has to give something finite.
    #[test]
    fn a_context_of_padding_gives_the_mean_of_its_values() -> Result<()> {
        let t = inputs(&SMALL).map(|t| t.to_dtype(DType::F32).unwrap());
        let none = Tensor::zeros((SMALL.b, SMALL.l), DType::F32, &Device::Cpu)?;
        let found = attention(&t[0], &t[1], &t[2], Some(&none))?;
        let wanted = t[2].mean_keepdim(1)?.broadcast_as(found.shape())?;
        assert!(relative_rms(&values(&found), &values(&wanted)) < 1e-6);
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let t = inputs(&SMALL);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(attention(&t[0], &t[2], &t[2], None)),
            "attention: k has shape [2, 4, 2, 5], expected [2, L, 2, 3] to go with q"
        );
        assert_eq!(
            message(attention(&t[0], &t[1], &t[0], None)),
            "attention: v has shape [2, 3, 2, 3], expected [2, 4, 2, E] to go with k"
        );
    }
}
