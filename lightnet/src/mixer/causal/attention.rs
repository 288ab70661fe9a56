//! Causal softmax attention with rotary positions and grouped queries, as in LLaMA: the baseline.

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::linear::joined;
use fulgur_kernels::lrpe::{Pairing, rotate};
use fulgur_kernels::split::{Part, split};

use super::{CausalContext, heads, map};
use crate::linear::Linear;
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct Attention {
    heads: usize,
    groups: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (width, head) = (config.hidden_size, config.head_width());
        let (heads, groups) = (config.num_attention_heads, config.key_value_heads());
        Ok(Self {
            heads,
            groups,
            query: map(config, width, heads * head, &vb.pp("q_proj"))?,
            key: map(config, width, groups * head, &vb.pp("k_proj"))?,
            value: map(config, width, groups * head, &vb.pp("v_proj"))?,
            output: map(config, heads * head, width, &vb.pp("o_proj"))?,
        })
    }

    /// Mixes `x` `[B, N, d]`; needs the phases.
    ///
    /// # Errors
    /// Phases are missing, or a failing operation.
    pub fn forward(&self, x: &Tensor, context: &CausalContext<'_>) -> Result<Tensor> {
        let Some(phase) = context.phase else {
            bail!("attention: rotary phases are expected, none were given")
        };
        let maps = [&self.query, &self.key, &self.value];
        let widths = maps.map(|map| Part::Plain(map.output()));
        let parts = split(&joined(x, &maps.map(Linear::weight))?, &widths)?;
        let q = rotate(&heads(&parts[0], self.heads)?, phase, Pairing::Halves)?;
        let k = rotate(&heads(&parts[1], self.groups)?, phase, Pairing::Halves)?;
        let v = heads(&parts[2], self.groups)?;
        let options = Options {
            causal: true,
            ..Default::default()
        };
        let o = softmax(&q, &k, &v, &options)?;
        self.output.forward(&o.flatten_from(2)?)
    }
}
