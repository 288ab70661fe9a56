//! TNL: linear attention with one constant decay a head (arXiv 2405.17381, and the scaling-law study's variant of it).
//!
//! ```text
//! q = silu(x W_q)   k = silu(x W_k)   v = silu(x W_v)
//! S_t = lambda S_{t-1} + k_t v_t^T    o_t = S_t^T q_t
//! y = (norm(o) * sigmoid(x W_1 W_2)) W_o
//! ```
//!
//! Decays are fixed: the slopes of ALiBi, slower from layer to layer.

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::decay::{Causal, LogDecay, causal};
use fulgur_kernels::linear::joined;
use fulgur_kernels::norm::{Gate, rms_norm_gated};
use fulgur_kernels::split::{Part, split};

use super::{CausalContext, OutputGate, heads, map};
use crate::linear::Linear;
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct Tnl {
    heads: usize,
    eps: f64,
    query: Linear,
    key: Linear,
    value: Linear,
    gate: OutputGate,
    gain: Tensor,
    output: Linear,
    log_decay: Tensor,
}

impl Tnl {
    /// The mixer of layer number `layer`; takes `q_proj`, `k_proj`, `v_proj`, `g_proj`, `g_norm` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let linear = |name: &str| map(config, width, width, &vb.pp(name));
        let rates = decay_rates(config.num_attention_heads, layer, config.num_hidden_layers);
        let logs: Vec<f32> = rates.iter().map(|rate| -rate as f32).collect();
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
            log_decay: Tensor::new(logs, vb.device())?,
        })
    }

    /// Mixes `x` `[B, N, d]`.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(&self, x: &Tensor, _: &CausalContext<'_>) -> Result<Tensor> {
        let weights = [&self.query, &self.key, &self.value].map(Linear::weight);
        let width = x.dim(2)?;
        let parts = split(&joined(x, &weights)?, &[Part::Silu(width); 3])?;
        let options = Causal {
            decay: LogDecay::Head(&self.log_decay),
            ..Default::default()
        };
        let [q, k, v] = [&parts[0], &parts[1], &parts[2]].map(|part| heads(part, self.heads));
        let (o, _) = causal(&q?, &k?, &v?, &options)?;
        let o = o.reshape(x.shape())?;
        let gate = self.gate.forward(x)?;
        let o = rms_norm_gated(&o, Some(&self.gain), &gate, Gate::Sigmoid, 1, self.eps)?;
        self.output.forward(&o)
    }
}

/// Rates of decay, `-log lambda`, of the heads of a layer: slopes times a factor that falls from 1 in the first layer to 1e-5 in
/// the last (formula 1.7 of the specification).
fn decay_rates(heads: usize, layer: usize, layers: usize) -> Vec<f64> {
    let factor = if layers > 1 {
        1.0 - layer as f64 / (layers - 1) as f64 + 1e-5
    } else {
        1.0
    };
    slopes(heads).into_iter().map(|slope| slope * factor).collect()
}

/// The slopes of ALiBi: `2^(-8 (h + 1) / H)` for a power of two; otherwise those of the power below, and every other one of
/// twice as many heads.
fn slopes(heads: usize) -> Vec<f64> {
    let of = |count: usize| (1..=count).map(move |h| (-8.0 * h as f64 / count as f64).exp2());
    let below = 1 << heads.max(1).ilog2();
    of(below).chain(of(2 * below).step_by(2)).take(heads).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_alibi() {
        let expected: Vec<f64> = (1..=8).map(|h| 0.5f64.powi(h)).collect();
        assert_eq!(slopes(8), expected);
        let twelve = slopes(12);
        assert_eq!(twelve[..8], expected);
        let sixteen = slopes(16);
        assert_eq!(twelve[8..], [sixteen[0], sixteen[2], sixteen[4], sixteen[6]]);
        assert_eq!(slopes(1), [2f64.powi(-8)]);
    }

    #[test]
    fn later_layers_forget_more_slowly() {
        let rates: Vec<f64> = (0..4).map(|layer| decay_rates(4, layer, 4)[0]).collect();
        assert!(rates.is_sorted_by(|a, b| a > b));
        assert!((rates[3] / rates[0] - 1e-5 / (1.0 + 1e-5)).abs() < 1e-12);
        assert_eq!(decay_rates(4, 0, 1), slopes(4));
    }
}
