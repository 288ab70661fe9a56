//! TransNormerLLM's token mixer (arXiv 2307.14995): linear attention with one constant decay a head, and a full-rank gate.
//!
//! ```text
//! [q k v u] = x W      q = silu(q)   k = silu(k)      in layers with LRPE: q, k = [x cos t theta, x sin t theta]
//! S_t = lambda S_{t-1} + k_t v_t^T                    o_t = S_t^T q_t
//! y = (norm(o) * u) W_o                               norm without a gain, over all heads together
//! ```
//!
//! Names and the order of the fused map are those of the published checkpoints (`modeling_transnormer.py`): `qkvu_proj`,
//! `out_proj`, `lrpe.theta` `[H, 1, D]`.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::decay::LogDecay;
use fulgur_kernels::exchange::{StateExchange, shared, summed};
use fulgur_kernels::split::split;

use super::memory::decayed;
use super::parts::{Output, Theta};
use super::tnl::{log_decays, of_heads, theta};
use super::{CausalContext, Memory, heads};
use crate::linear::{Linear, Start};
use crate::lm::{Activation, Config};

/// The mixer.
#[derive(Clone, Debug)]
pub struct TransNormer {
    heads: usize,
    width: usize,
    acts: [Activation; 4],
    input: Linear,
    norm: Output,
    output: Linear,
    log_decay: Option<Tensor>,
    theta: Option<Theta>,
    /// Ranks that have the other heads.
    ranks: Option<Arc<dyn StateExchange>>,
}

impl TransNormer {
    /// The mixer of layer number `layer`; takes `qkvu_proj` and `out_proj`, with biases where attention has them, and
    /// `lrpe.theta` where the layer has LRPE.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Self> {
        let (width, inner, bias) = (config.hidden_size, config.value_size(), config.attention_bias);
        let start = Start::Normal(config.initializer_range);
        Ok(Self {
            heads: config.num_attention_heads,
            width: inner,
            acts: [
                config.linear_act,
                config.linear_act,
                config.value_act,
                Activation::None,
            ],
            input: Linear::new(width, 4 * inner, bias, start, &vb.pp("qkvu_proj"))?,
            norm: Output::new(config, vb)?,
            output: Linear::new(inner, width, bias, start, &vb.pp("out_proj"))?,
            log_decay: log_decays(config, layer, vb.device())?,
            theta: theta(config, layer, vb)?,
            ranks: None,
        })
    }

    /// The mixer of some heads of the layer of `whole`; `ranks` have the others.
    ///
    /// # Errors
    /// A failing operation.
    pub(crate) fn over(
        mut self,
        whole: &Config,
        layer: usize,
        ranks: &Arc<dyn StateExchange>,
    ) -> Result<Self> {
        self.log_decay = of_heads(log_decays(whole, layer, self.input.weight().device())?, &**ranks)?;
        self.norm.over(ranks);
        self.ranks = Some(ranks.clone());
        Ok(self)
    }

    /// As [`Linear::round`], of all its maps.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.input.round(dtype)?;
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
        memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let wide = match &self.ranks {
            Some(ranks) => self.input.forward(&shared(ranks, x)?)?,
            None => self.input.forward(x)?,
        };
        let parts = split(&wide, &self.acts.map(|act| act.part(self.width)))?;
        let [q, k, v] = [0, 1, 2].map(|part| heads(&self.acts[part].finish(&parts[part])?, self.heads));
        let [q, k] = Theta::turn(self.theta.as_ref(), [q?, k?], context)?;
        let decay = self.log_decay.as_ref().map_or(LogDecay::None, LogDecay::Head);
        let o = decayed(&q, &k, &v?, decay, memory)?.flatten_from(2)?;
        let branch = self.output.forward(&self.norm.forward(&o, Some(&parts[3]))?)?;
        match &self.ranks {
            Some(ranks) => summed(ranks, &branch),
            None => Ok(branch),
        }
    }
}
