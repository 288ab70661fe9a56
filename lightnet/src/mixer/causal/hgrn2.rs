//! HGRN2: a gated recurrence whose keys are what its gates forget (arXiv 2404.07904, section 3).
//!
//! ```text
//! q = silu(x W_q)   i = x W_i   f = b + (1 - b) sigmoid(x W_f)      b: lower bound of the layer
//! S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T                         o_t = S_t^T q_t
//! y = norm(o) W_o
//! ```

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::decay::{Causal, LogDecay, causal};
use fulgur_kernels::linear::joined;
use fulgur_kernels::norm::rms_norm_to;
use fulgur_kernels::split::{Part, split};

use super::{CausalContext, heads, map};
use crate::linear::Linear;
use crate::lm::Config;

/// The mixer.
#[derive(Clone, Debug)]
pub struct Hgrn2 {
    heads: usize,
    eps: f64,
    query: Linear,
    forget: Linear,
    input: Linear,
    gain: Tensor,
    output: Linear,
}

impl Hgrn2 {
    /// Takes `q_proj`, `f_proj`, `i_proj`, `g_norm` and `o_proj`.
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
            forget: linear("f_proj")?,
            input: linear("i_proj")?,
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
    pub fn forward(&self, x: &Tensor, context: &CausalContext<'_>) -> Result<Tensor> {
        let weights = [&self.query, &self.forget, &self.input].map(Linear::weight);
        let width = x.dim(2)?;
        let gate = Part::Gate(width, context.lower_bound);
        let parts = split(
            &joined(x, &weights)?,
            &[Part::Silu(width), gate, Part::Plain(width)],
        )?;
        let [q, k, log, v] = [0, 1, 2, 3].map(|part| heads(&parts[part], self.heads));
        let log = log?;
        let options = Causal {
            decay: LogDecay::Channel(&log),
            ..Default::default()
        };
        let (o, _) = causal(&q?, &k?, &v?, &options)?;
        let gain = self.gain.to_dtype(x.dtype())?;
        let o = rms_norm_to(&o.reshape(x.shape())?, Some(&gain), 1, self.eps, x.dtype())?;
        self.output.forward(&o)
    }
}
