//! LightNet in its causal form (arXiv 2405.21022, section 3): the state is a running mean of values, weighted by the exponentials
//! of logits.
//!
//! ```text
//! q = silu(x W_q)   g = x W_k   v = x W_v       z_t = log sum_{s <= t} exp(g_s)
//! S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(g_t - z_t) v_t^T      o_t = S_t^T q_t
//! y = (norm(o) * sigmoid(x W_1 W_2)) W_o
//! ```

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::additive::{Causal, causal};
use fulgur_kernels::linear::joined;
use fulgur_kernels::norm::{Gate, rms_norm_gated};
use fulgur_kernels::split::{Part, split};

use super::{CausalContext, OutputGate, heads, map};
use crate::linear::Linear;
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct CausalLightNet {
    heads: usize,
    eps: f64,
    query: Linear,
    key: Linear,
    value: Linear,
    gate: OutputGate,
    gain: Tensor,
    output: Linear,
}

impl CausalLightNet {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let linear = |name: &str| map(config, width, width, &vb.pp(name));
        Ok(Self {
            heads: config.num_attention_heads,
            eps: config.rms_norm_eps,
            query: linear("q_proj")?,
            key: linear("k_proj")?,
            value: linear("v_proj")?,
            gate: OutputGate::new(config, &vb.pp("g_proj"))?,
            gain: vb
                .pp("g_norm")
                .get_with_hints(width, "weight", Init::Const(1.0))?,
            output: linear("o_proj")?,
        })
    }

    /// Mixes `x` `[B, N, d]`.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(&self, x: &Tensor, _: &CausalContext<'_>) -> Result<Tensor> {
        let weights = [&self.query, &self.key, &self.value].map(Linear::weight);
        let width = x.dim(2)?;
        let plain = Part::Plain(width);
        let parts = split(&joined(x, &weights)?, &[Part::Silu(width), plain, plain])?;
        let [q, logits, v] = [0, 1, 2].map(|part| heads(&parts[part], self.heads));
        let (o, _) = causal(&q?, &logits?, &v?, &Causal::default())?;
        let o = o.reshape(x.shape())?;
        let gate = self.gate.forward(x)?;
        let o = rms_norm_gated(&o, Some(&self.gain), &gate, Gate::Sigmoid, 1, self.eps)?;
        self.output.forward(&o)
    }
}
