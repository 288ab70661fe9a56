//! LightNet in its causal form (arXiv 2405.21022, section 3): the state is a running mean of values, weighted by the exponentials
//! of logits.
//!
//! ```text
//! q = silu(x W_q)   g = x W_k   v = x W_v       z_t = log sum_{s <= t} exp(g_s)
//! S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(g_t - z_t) v_t^T      o_t = S_t^T q_t
//! y = (norm(o) * sigmoid(x W_1 W_2)) W_o
//! ```
//!
//! The scalar form has one logit a head, `x W_f`, for the decay, and keys `silu(x W_k)`, by choice times one minus the decay. With
//! LRPE keys turn after they were normalised, and decays are doubled with them.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::decay::LogDecay;
use fulgur_kernels::lrpe::{copy, double};

use super::memory::{additive, decayed, log_sums};
use super::parts::Theta;
use super::projections::{Projections, Use, queries_keys_values};
use super::{CausalContext, Memory};
use crate::lm::{Activation, Config, Decay};

/// The mixer.
#[derive(Clone, Debug)]
pub struct CausalLightNet {
    decay: Decay,
    seeded: bool,
    projections: Projections,
    theta: Option<Theta>,
}

impl CausalLightNet {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`; in the scalar form `f_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let key_act = match config.decay {
            Decay::Vector => Activation::None,
            Decay::Scalar | Decay::Tied => config.linear_act,
        };
        let mut columns = queries_keys_values(config, key_act).to_vec();
        if config.decay != Decay::Vector {
            columns.push(('f', config.num_attention_heads, Use::Activated(Activation::None)));
        }
        Ok(Self {
            decay: config.decay,
            seeded: config.seeded,
            projections: Projections::new(config, &columns, true, vb)?,
            theta: Theta::shared(config, vb)?,
        })
    }

    /// As [`crate::linear::Linear::round`], of all its maps.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.projections.round(dtype)
    }

    /// Mixes `x` `[B, N, d]`.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &CausalContext<'_>,
        mut memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let wide = self.projections.wide(x, memory.as_deref_mut())?;
        let parts = self.projections.parts(&wide, None)?;
        let heads = |part: usize| self.projections.heads(&parts[part]);
        let [q, k, v] = [0, 1, 2].map(heads);
        let (q, k, v) = (q?, k?, v?);
        let phase = match &self.theta {
            Some(theta) => Some(theta.phases(x.dim(1)?, context)?),
            None => None,
        };
        let o = match (self.decay, &phase) {
            (Decay::Vector, None) => additive(&q, &k, &v, self.seeded, memory)?,
            (Decay::Vector, Some(phase)) => {
                let [z, log] = log_sums(&k, self.seeded, memory.as_deref_mut())?;
                let keys = (k.to_dtype(z.dtype())? - &z)?.exp()?.to_dtype(k.dtype())?;
                // A channel that turns has a sine beside its cosine, with its decay.
                let log = copy(&log, phase.dim(D::Minus1)?)?;
                let (q, keys) = (double(&q, phase)?, double(&keys, phase)?);
                decayed(&q, &keys, &v, LogDecay::Channel(&log), memory)?
            }
            (Decay::Scalar | Decay::Tied, phase) => {
                let [z, log] = log_sums(&heads(3)?, self.seeded, memory.as_deref_mut())?;
                let mut k = k;
                if self.decay == Decay::Tied {
                    let share = (heads(3)?.to_dtype(z.dtype())? - &z)?.exp()?;
                    k = k.broadcast_mul(&share.to_dtype(k.dtype())?)?;
                }
                let (q, k) = match phase {
                    Some(phase) => (double(&q, phase)?, double(&k, phase)?),
                    None => (q, k),
                };
                decayed(&q, &k, &v, LogDecay::Token(&log.squeeze(3)?), memory)?
            }
        };
        self.projections.finish(&o.flatten_from(2)?, x, &parts)
    }
}
