//! HGRN, the element-wise recurrence that HGRN2 expands (arXiv 2311.04823), in the form that HGRN2 has with heads of width 1.
//!
//! ```text
//! q = silu(x W_q)   i = x W_i   f = b + (1 - b) sigmoid(x W_f)      b: lower bound of the layer
//! h_t = f_t h_{t-1} + (1 - f_t) i_t                                 y = norm(q h) W_o
//! ```

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::memory::elementwise;
use super::projections::{Projections, Use};
use super::{CausalContext, Memory};
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct Hgrn1 {
    projections: Projections,
}

impl Hgrn1 {
    /// Takes `q_proj`, `f_proj`, `i_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let columns = [
            ('q', width, Use::Activated(config.linear_act)),
            ('f', width, Use::Gate),
            ('i', width, Use::Activated(config.value_act)),
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
        let h = elementwise(&parts[1], &parts[3], &parts[2], memory)?;
        self.projections.finish(&(&parts[0] * h)?, x, &parts)
    }
}
