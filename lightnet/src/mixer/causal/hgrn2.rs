//! HGRN2: a gated recurrence whose keys are what its gates forget (arXiv 2404.07904, section 3).
//!
//! ```text
//! q = silu(x W_q)   i = x W_i   f = b + (1 - b) sigmoid(x W_f)      b: lower bound of the layer
//! S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T                         o_t = S_t^T q_t
//! y = norm(o) W_o
//! ```

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::decay::LogDecay;
use fulgur_kernels::split::{Part, split};

use super::memory::decayed;
use super::parts::{Maps, Output};
use super::{CausalContext, Memory, heads, map};
use crate::linear::Linear;
use crate::lm::{Activation, Config};

/// The mixer.
#[derive(Clone, Debug)]
pub struct Hgrn2 {
    heads: usize,
    query_act: Activation,
    value_act: Activation,
    widths: [usize; 2],
    maps: Maps,
    norm: Output,
    output: Linear,
}

impl Hgrn2 {
    /// Takes `q_proj`, `f_proj`, `i_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (keys, values) = (config.key_size(), config.value_size());
        Ok(Self {
            heads: config.num_attention_heads,
            query_act: config.linear_act,
            value_act: config.value_act,
            widths: [keys, values],
            maps: Maps::new(config, &[('q', keys), ('f', keys), ('i', values)], vb)?,
            norm: Output::new(config, vb)?,
            output: map(config, values, config.hidden_size, &vb.pp("o_proj"))?,
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
        let [keys, values] = self.widths;
        let gate = Part::Gate(keys, context.lower_bound);
        let wide = self.maps.forward(x, memory.as_deref_mut())?;
        let parts = split(
            &wide,
            &[self.query_act.part(keys), gate, self.value_act.part(values)],
        )?;
        let (q, v) = (
            self.query_act.finish(&parts[0])?,
            self.value_act.finish(&parts[3])?,
        );
        let [q, k, log, v] = [&q, &parts[1], &parts[2], &v].map(|part| heads(part, self.heads));
        let o = decayed(&q?, &k?, &v?, LogDecay::Channel(&log?), memory)?;
        self.output
            .forward(&self.norm.forward(&o.flatten_from(2)?, None)?)
    }
}
