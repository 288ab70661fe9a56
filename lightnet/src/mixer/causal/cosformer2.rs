//! cosFormer2 (of the scaling-law study, arXiv 2406.16690): linear attention without decay, whose scores weigh offsets by
//! cosines.
//!
//! ```text
//! q = silu(x W_q)   k = silu(x W_k)   v = x W_v       q, k = LRPE(q), LRPE(k)
//! S_t = S_{t-1} + k_t v_t^T                           o_t = S_t^T q_t
//! y = (norm(o) * sigmoid(x W_1 W_2)) W_o
//! LRPE(x)_t = [x cos t theta, x sin t theta]          theta_j = 10000^(-2 j / D)
//! ```
//!
//! By default only the D / 2 channels of the highest frequencies turn, and frequencies are fixed. It is the same as a complex
//! recurrence: `S_t = diag(exp(i theta)) S_{t-1} + k_t v_t^T`, `o_t = Re(S_t)^T q_t`.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::decay::LogDecay;

use super::memory::decayed;
use super::parts::Theta;
use super::projections::{Projections, queries_keys_values};
use super::{CausalContext, Memory};
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct CosFormer2 {
    projections: Projections,
    theta: Option<Theta>,
}

impl CosFormer2 {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`, and `lrpe.theta` where it is learnt.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let columns = queries_keys_values(config, config.linear_act);
        Ok(Self {
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
        let [q, k, v] = [0, 1, 2].map(|part| self.projections.heads(&parts[part]));
        let [q, k] = Theta::turn(self.theta.as_ref(), [q?, k?], context)?;
        let o = decayed(&q, &k, &v?, LogDecay::None, memory)?.flatten_from(2)?;
        self.projections.finish(&o, x, &parts)
    }
}
