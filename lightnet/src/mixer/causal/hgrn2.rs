//! HGRN2: a gated recurrence whose keys are what its gates forget (arXiv 2404.07904, section 3).
//!
//! ```text
//! q = silu(x W_q)   i = x W_i   f = b + (1 - b) sigmoid(x W_f)      b: lower bound of the layer
//! S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T                         o_t = S_t^T q_t
//! y = norm(o) W_o
//! ```
//!
//! On pictures queries and keys may turn by MD-LRPE; every channel then has its gate twice (LightNet, arXiv 2405.21022, MD-LRPE).

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::decay::LogDecay;
use fulgur_kernels::lrpe::{copy, double};

use super::memory::decayed;
use super::projections::{Projections, Use};
use super::{CausalContext, Memory};
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct Hgrn2 {
    projections: Projections,
}

impl Hgrn2 {
    /// Takes `q_proj`, `f_proj`, `i_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (keys, values) = (config.key_size(), config.value_size());
        let columns = [
            ('q', keys, Use::Activated(config.linear_act)),
            ('f', keys, Use::Gate),
            ('i', values, Use::Activated(config.value_act)),
        ];
        Ok(Self {
            projections: Projections::new(config, &columns, false, vb)?,
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
        let parts = self.projections.parts(&wide, context.lower_bound)?;
        let [q, k, log, v] = [0, 1, 2, 3].map(|part| self.projections.heads(&parts[part]));
        let (mut q, mut k, mut log) = (q?, k?, log?);
        if let Some(phase) = context.turn {
            // Channel c has its cosine at c and its sine at D + c, and one gate for both.
            [q, k] = [double(&q, phase)?, double(&k, phase)?];
            log = copy(&log, log.dim(D::Minus1)?)?;
        }
        let o = decayed(&q, &k, &v?, LogDecay::Channel(&log), memory)?;
        self.projections.finish(&o.flatten_from(2)?, x, &parts)
    }
}
