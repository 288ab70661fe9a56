//! Softmax attention with rotary positions and grouped queries, as in LLaMA: the baseline. Causal, or of all tokens with each other
//! in a model that restores masked ones.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::lrpe::{Pairing, rotate};
use fulgur_kernels::split::{Part, split};

use super::in_parts::attended_whole;
use super::memory::attended;
use super::{CausalContext, Memory, heads};
use crate::linear::{Joined, Linear, Start};
use crate::lm::{Config, Rotary, Scaling, SoftmaxLayers};

/// Shape of an [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Model width d.
    pub width: usize,
    /// Heads H.
    pub heads: usize,
    /// Heads G of keys and values.
    pub groups: usize,
    /// Rotary positions, and with them the width of a head.
    pub rotary: Rotary,
    /// Whether the maps to queries, keys and values have biases.
    pub input_bias: bool,
    /// Whether the map to the output has one.
    pub output_bias: bool,
    /// Standard deviation of the weights at first.
    pub start: f64,
    /// Whether tokens see those before them only.
    pub causal: bool,
}

impl AttentionShape {
    /// That of a whole model of softmax attention.
    pub fn of(config: &Config) -> Self {
        Self {
            width: config.hidden_size,
            heads: config.num_attention_heads,
            groups: config.key_value_heads(),
            rotary: config.rotary(),
            input_bias: config.attention_bias,
            output_bias: config.attention_bias,
            start: config.initializer_range,
            causal: !config.bidirectional,
        }
    }

    /// That of a layer of a hybrid.
    pub fn of_layer(config: &Config, layer: &SoftmaxLayers) -> Self {
        Self {
            width: config.hidden_size,
            heads: layer.num_heads,
            groups: layer.num_kv_heads.unwrap_or(layer.num_heads),
            rotary: Rotary {
                width: config.hidden_size / layer.num_heads.max(1),
                base: layer.rope_theta,
                scaling: Scaling::None,
            },
            input_bias: layer.qkv_bias,
            output_bias: false,
            start: config.initializer_range,
            causal: true,
        }
    }
}

/// The mixer.
#[derive(Clone, Debug)]
pub struct Attention {
    heads: usize,
    groups: usize,
    rotary: Rotary,
    causal: bool,
    /// To queries, keys and values.
    input: Joined,
    output: Linear,
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj` and `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(shape: &AttentionShape, vb: &VarBuilder) -> Result<Self> {
        let AttentionShape {
            width,
            heads,
            groups,
            rotary,
            causal,
            ..
        } = *shape;
        let map = |input, output, bias, name: &str| {
            Linear::new(input, output, bias, Start::Normal(shape.start), &vb.pp(name))
        };
        let (bias, head) = (shape.input_bias, rotary.width);
        Ok(Self {
            heads,
            groups,
            rotary,
            causal,
            input: Joined::new(vec![
                map(width, heads * head, bias, "q_proj")?,
                map(width, groups * head, bias, "k_proj")?,
                map(width, groups * head, bias, "v_proj")?,
            ])?,
            output: map(heads * head, width, shape.output_bias, "o_proj")?,
        })
    }

    /// Its rotary positions: what the phases are made of that it needs.
    pub fn rotary(&self) -> &Rotary {
        &self.rotary
    }

    /// As [`Linear::round`], of all its maps.
    ///
    /// # Errors
    /// A failing operation.
    pub fn round(&mut self, dtype: DType) -> Result<()> {
        self.input.round(dtype)?;
        self.output.round(dtype)
    }

    /// Mixes `x` `[B, N, d]`; needs the phases. Where it is not causal, nobody sees tokens at which `mask` `[B, N]` is zero.
    ///
    /// # Errors
    /// Phases are missing, or a failing operation.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &CausalContext<'_>,
        mask: Option<&Tensor>,
        memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let Some(phase) = context.phase else {
            bail!("attention: rotary phases are expected, none were given")
        };
        let maps = self.input.maps().iter();
        let widths: Vec<Part<'_>> = maps.map(|map| Part::Plain(map.output())).collect();
        let parts = split(&self.input.forward(x)?, &widths)?;
        let q = rotate(&heads(&parts[0], self.heads)?, phase, Pairing::Halves)?;
        let k = rotate(&heads(&parts[1], self.groups)?, phase, Pairing::Halves)?;
        let v = heads(&parts[2], self.groups)?;
        let o = if self.causal {
            attended(&q, &k, &v, memory)?
        } else if let Some(exchange) = Memory::exchange(memory.as_deref()) {
            attended_whole(&q, &k, &v, &exchange, mask)?
        } else {
            let options = Options {
                mask,
                ..Default::default()
            };
            softmax(&q, &k, &v, &options)?
        };
        self.output.forward(&o.flatten_from(2)?)
    }
}
