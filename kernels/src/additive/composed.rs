//! The non-causal additive recurrence out of candle's own operators: the form that runs on a GPU.
//!
//! Shapes as in the parent module, everything in the compute type (`f32`, or `f64` in tests). The gradient of the
//! state pass is written by hand because the exchange between parts sits in the middle of it; the read is left to
//! candle's graph.

use crate::exchange::{AdditiveState, finite};
use candle_core::{Result, Tensor};

/// Sine and cosine of the phases as `[1, 1 or H, N, D]`, so that they broadcast over `[B, H, N, D]`.
pub(super) struct Trig {
    sin: Tensor,
    cos: Tensor,
}

impl Trig {
    /// From phases `[N, D]` or `[N, H, D]`; differentiable.
    pub(super) fn new(phase: &Tensor) -> Result<Self> {
        let phase = if phase.rank() == 2 {
            phase.unsqueeze(1)?
        } else {
            phase.clone()
        };
        let phase = phase.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
        Ok(Self {
            sin: phase.sin()?,
            cos: phase.cos()?,
        })
    }

    fn rotate(&self, x_bhnd: &Tensor) -> Result<Tensor> {
        Tensor::cat(
            &[x_bhnd.broadcast_mul(&self.cos)?, x_bhnd.broadcast_mul(&self.sin)?],
            3,
        )
    }

    /// Adjoints of `x` and of the phases `[1 or H, N, D]`, given the adjoint `[B, H, N, 2D]` of the rotated `x`.
    fn rotate_back(&self, x_bhnd: &Tensor, d_rotated: &Tensor) -> Result<(Tensor, Tensor)> {
        let d = x_bhnd.dim(3)?;
        let (first, second) = (d_rotated.narrow(3, 0, d)?, d_rotated.narrow(3, d, d)?);
        let dx = (first.broadcast_mul(&self.cos)? + second.broadcast_mul(&self.sin)?)?;
        let turn = (second.broadcast_mul(&self.cos)? - first.broadcast_mul(&self.sin)?)?;
        let dphase = (x_bhnd * turn)?.sum(0)?;
        let dphase = if self.cos.dim(1)? == 1 {
            dphase.sum_keepdim(0)?
        } else {
            dphase
        };
        Ok((dx, dphase))
    }
}

/// `[B, N, H, C]` to contiguous `[B, H, N, C]`.
fn heads_first(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}

/// Logits `[B, H, D, N]`, so that softmax statistics run over the last dimension; negative infinity where `keep`
/// `[B, N]` is zero.
fn masked_logits(logits: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
    let logits = logits.permute((0, 2, 3, 1))?.contiguous()?;
    let Some(keep) = keep else {
        return Ok(logits);
    };
    let keep = keep.unsqueeze(1)?.unsqueeze(1)?.broadcast_as(logits.shape())?;
    keep.where_cond(
        &logits,
        &Tensor::new(f32::NEG_INFINITY, logits.device())?
            .to_dtype(logits.dtype())?
            .broadcast_as(logits.shape())?,
    )
}

/// Values `[B, H, N, E]`, zero where `keep` is zero, so that padding may hold anything.
fn masked_values(v: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
    let v = heads_first(v)?;
    match keep {
        None => Ok(v),
        Some(keep) => {
            let keep = keep.unsqueeze(1)?.unsqueeze(3)?.broadcast_as(v.shape())?;
            keep.where_cond(&v, &v.zeros_like()?)
        }
    }
}

/// Statistics and unnormalised state of these tokens. Arguments are detached.
pub(super) fn sums(
    logits: &Tensor,
    v: &Tensor,
    trig: Option<&Trig>,
    keep: Option<&Tensor>,
) -> Result<AdditiveState> {
    let logits_bhdn = masked_logits(logits, keep)?;
    let max = logits_bhdn.max_keepdim(3)?;
    let k_bhdn = logits_bhdn.broadcast_sub(&finite(&max)?)?.exp()?;
    let den = k_bhdn.sum(3)?;
    let v_bhne = masked_values(v, keep)?;
    let num = match trig {
        None => k_bhdn.matmul(&v_bhne)?,
        Some(trig) => {
            let k_bhnd = k_bhdn.transpose(2, 3)?.contiguous()?;
            trig.rotate(&k_bhnd)?.transpose(2, 3)?.matmul(&v_bhne)?
        }
    };
    Ok(AdditiveState {
        max: max.squeeze(3)?,
        den,
        num,
    })
}

/// Adjoints of logits `[B, N, H, D]`, values `[B, N, H, E]` and phases `[1 or H, N, D]`, given statistics, state and
/// the adjoint of the state over all parts.
pub(super) fn state_backward(
    (logits, v): (&Tensor, &Tensor),
    trig: Option<&Trig>,
    keep: Option<&Tensor>,
    (max, den): (&Tensor, &Tensor),
    (state, dstate): (&Tensor, &Tensor),
) -> Result<(Tensor, Tensor, Option<Tensor>)> {
    let d = logits.dim(3)?;
    let inverse = den.eq(0f64)?.where_cond(&den.zeros_like()?, &den.recip()?)?;
    let k_bhdn = masked_logits(logits, keep)?
        .broadcast_sub(&finite(max)?.unsqueeze(3)?)?
        .exp()?
        .broadcast_mul(&inverse.unsqueeze(3)?)?;
    let k_bhnd = k_bhdn.transpose(2, 3)?.contiguous()?;
    let dk_wide = masked_values(v, keep)?.matmul(&dstate.transpose(2, 3)?)?;
    let mut through = (state * dstate)?.sum(3)?;
    let (dk, dphase, rotated) = match trig {
        None => (dk_wide, None, k_bhnd.clone()),
        Some(trig) => {
            through = (through.narrow(2, 0, d)? + through.narrow(2, d, d)?)?;
            let (dk, dphase) = trig.rotate_back(&k_bhnd, &dk_wide)?;
            (dk, Some(dphase), trig.rotate(&k_bhnd)?)
        }
    };
    let dlogits = (k_bhnd * dk.broadcast_sub(&through.unsqueeze(2)?)?)?;
    let dv = rotated.matmul(dstate)?;
    Ok((heads_first(&dlogits)?, heads_first(&dv)?, dphase))
}

/// Output `[B, N, H, E]` = (rotated) queries times state; differentiable by candle's graph.
pub(super) fn read(q: &Tensor, state: &Tensor, phase: Option<&Tensor>) -> Result<Tensor> {
    let q_bhnd = heads_first(q)?;
    let q_bhnd = match phase {
        None => q_bhnd,
        Some(phase) => Trig::new(phase)?.rotate(&q_bhnd)?,
    };
    heads_first(&q_bhnd.matmul(&state.contiguous()?)?)
}
