//! LightNet without causality, for models that restore masked tokens: the names of the causal form, and the recurrence of
//! [`crate::mixer::lightnet`].
//!
//! ```text
//! K = softmax over tokens of x W_k      S = LRPE(K)^T V      O = LRPE(silu(x W_q)) S
//! y = (norm(O) * sigmoid(x W_1 W_2)) W_o
//! ```

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::additive::{NonCausal, noncausal, projected};

use super::cosformer2::shared_theta;
use super::parts::{LowRankGate, Maps, Output, Theta};
use super::{CausalContext, heads, map};
use crate::linear::Linear;
use crate::lm::{Activation, Config};

/// The mixer.
#[derive(Clone, Debug)]
pub struct BidirectionalLightNet {
    heads: usize,
    width: usize,
    query_act: Activation,
    value_act: Activation,
    widths: [usize; 3],
    maps: Maps,
    theta: Option<Theta>,
    gate: LowRankGate,
    norm: Output,
    output: Linear,
}

impl BidirectionalLightNet {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (keys, values) = (config.key_size(), config.value_size());
        let maps = [('q', keys), ('k', keys), ('v', values)];
        Ok(Self {
            heads: config.num_attention_heads,
            width: config.head_width(),
            query_act: config.linear_act,
            value_act: config.value_act,
            widths: maps.map(|(_, width)| width),
            maps: Maps::new(config, &maps, vb)?,
            theta: shared_theta(config, vb)?,
            gate: LowRankGate::new(config, &vb.pp("g_proj"))?,
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
        self.gate.round(dtype)?;
        self.norm.round(dtype)?;
        self.output.round(dtype)
    }

    /// Mixes `x` `[B, N, d]`; tokens where `mask` `[B, N]` is zero enter nothing.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let wide = self.maps.forward(x, None)?;
        let phase = self.phases(x.dim(1)?)?;
        let options = NonCausal {
            phase: phase.as_ref(),
            mask,
            exchange: None,
        };
        let o = if (self.query_act, self.value_act) == (Activation::Silu, Activation::None) {
            projected(&wide, self.heads, self.width, &options)?
        } else {
            let acts = [self.query_act, Activation::None, self.value_act];
            let runs = [0, 1, 2].map(|part| acts[part].part(self.widths[part]));
            let parts = fulgur_kernels::split::split(&wide, &runs)?;
            let [q, k, v] = [0, 1, 2].map(|part| heads(&acts[part].finish(&parts[part])?, self.heads));
            noncausal(&q?, &k?, &v?, &options)?.0.flatten_from(2)?
        };
        let gate = self.gate.forward(x, &[])?;
        self.output.forward(&self.norm.forward(&o, Some(&gate))?)
    }

    /// Phases of all channels, zero for those that do not turn.
    fn phases(&self, tokens: usize) -> Result<Option<Tensor>> {
        let Some(theta) = &self.theta else {
            return Ok(None);
        };
        let phase = theta.phases(tokens, &CausalContext::default())?;
        let still = self.width - phase.dim(D::Minus1)?;
        phase.pad_with_zeros(D::Minus1, 0, still).map(Some)
    }
}
