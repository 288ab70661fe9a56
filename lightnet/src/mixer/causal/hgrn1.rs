//! HGRN, the element-wise recurrence that HGRN2 expands (arXiv 2311.04823), in the form that HGRN2 has with heads of width 1.
//!
//! ```text
//! q = silu(x W_q)   i = x W_i   f = b + (1 - b) sigmoid(x W_f)      b: lower bound of the layer
//! h_t = f_t h_{t-1} + (1 - f_t) i_t                                 y = norm(q h) W_o
//! ```

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::split::{Part, split};

use super::memory::elementwise;
use super::parts::{Maps, Output};
use super::{CausalContext, Memory, map};
use crate::linear::Linear;
use crate::lm::{Activation, Config};

/// The mixer.
#[derive(Clone, Debug)]
pub struct Hgrn1 {
    width: usize,
    query_act: Activation,
    value_act: Activation,
    maps: Maps,
    norm: Output,
    output: Linear,
}

impl Hgrn1 {
    /// Takes `q_proj`, `f_proj`, `i_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        Ok(Self {
            width,
            query_act: config.linear_act,
            value_act: config.value_act,
            maps: Maps::new(config, &[('q', width), ('f', width), ('i', width)], vb)?,
            norm: Output::new(config, vb)?,
            output: map(config, width, width, &vb.pp("o_proj"))?,
        })
    }

    /// As [`Linear::round`], of all its maps.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.maps.round(dtype, None)?;
        self.norm.round(dtype)?;
        self.output.round(dtype)
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
        let wide = self.maps.forward(x, memory.as_deref_mut())?;
        let runs = [
            self.query_act.part(self.width),
            Part::Gate(self.width, context.lower_bound),
            self.value_act.part(self.width),
        ];
        let parts = split(&wide, &runs)?;
        let (q, v) = (
            self.query_act.finish(&parts[0])?,
            self.value_act.finish(&parts[3])?,
        );
        let h = elementwise(&parts[1], &v, &parts[2], memory)?;
        self.output.forward(&self.norm.forward(&(q * h)?, None)?)
    }
}
