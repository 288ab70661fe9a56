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
use fulgur_kernels::split::split;

use super::memory::decayed;
use super::parts::{LowRankGate, Maps, Output, Theta, cosine_frequencies, turned};
use super::{CausalContext, Memory, heads, map};
use crate::linear::Linear;
use crate::lm::{Activation, Config};

/// The mixer.
#[derive(Clone, Debug)]
pub struct CosFormer2 {
    heads: usize,
    acts: [Activation; 3],
    widths: [usize; 3],
    maps: Maps,
    theta: Option<Theta>,
    gate: LowRankGate,
    norm: Output,
    output: Linear,
}

impl CosFormer2 {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`, and `lrpe.theta` where it is learnt.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (keys, values) = (config.key_size(), config.value_size());
        let widths = [('q', keys), ('k', keys), ('v', values)];
        Ok(Self {
            heads: config.num_attention_heads,
            acts: [config.linear_act, config.linear_act, config.value_act],
            widths: widths.map(|(_, width)| width),
            maps: Maps::new(config, &widths, vb)?,
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
        self.maps.round(dtype, Some(&mut self.gate))?;
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
        let runs = [0, 1, 2].map(|part| self.acts[part].part(self.widths[part]));
        let runs: Vec<_> = runs.into_iter().chain(self.gate.part()).collect();
        let parts = split(&wide, &runs)?;
        let [q, k, v] = [0, 1, 2].map(|part| heads(&self.acts[part].finish(&parts[part])?, self.heads));
        let (mut q, mut k, v) = (q?, k?, v?);
        if let Some(theta) = &self.theta {
            let phase = theta.phases(x.dim(1)?, context)?;
            (q, k) = (turned(&q, &phase)?, turned(&k, &phase)?);
        }
        let o = decayed(&q, &k, &v, LogDecay::None, memory)?.flatten_from(2)?;
        let gate = self.gate.forward(x, &parts)?;
        self.output.forward(&self.norm.forward(&o, Some(&gate))?)
    }
}

/// Frequencies that all heads share: of all channels of a head, or of the half that turns fastest.
pub(super) fn shared_theta(config: &Config, vb: &VarBuilder) -> Result<Option<Theta>> {
    if !config.use_lrpe {
        return Ok(None);
    }
    let width = config.head_width();
    let turning = if config.half_lrpe {
        width.div_ceil(2)
    } else {
        width
    };
    let start = cosine_frequencies(width, turning);
    Theta::new(&start, &[turning], config.learn_theta, vb).map(Some)
}
