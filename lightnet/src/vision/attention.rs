//! Softmax attention of all tokens of a picture: the baseline. With MD-LRPE pairs of channels turn by the place along one axis, so
//! that scores depend on offsets alone.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::attention::{Options, softmax};
use fulgur_kernels::lrpe::{Pairing, rotate};
use fulgur_kernels::split::{Part, split};

use super::config::Config;
use crate::linear::{Linear, Start};
use crate::position::{Grid, MdLrpe};

/// The mixer.
#[derive(Clone, Debug)]
pub(super) struct SelfAttention {
    heads: usize,
    /// To queries, keys and values.
    input: Linear,
    lrpe: Option<MdLrpe>,
    output: Linear,
}

impl SelfAttention {
    /// Takes `input` `[3 d, d]`, `output` `[d, d]` and `lrpe`.
    pub(super) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let lrpe = config
            .lrpe
            .then(|| MdLrpe::new(config.head_width() / 2, 2, config.longest(), &vb.pp("lrpe")))
            .transpose()?;
        Ok(Self {
            heads: config.num_attention_heads,
            input: Linear::new(width, 3 * width, false, Start::FanIn, &vb.pp("input"))?,
            lrpe,
            output: Linear::new(width, width, false, Start::FanIn, &vb.pp("output"))?,
        })
    }

    /// Mixes `x` `[B, N, d]` on `grid`.
    pub(super) fn forward(&self, x: &Tensor, grid: &Grid) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let parts = split(&self.input.forward(x)?, &[Part::Plain(width); 3])?;
        let heads = |part: &Tensor| part.reshape((batch, tokens, self.heads, width / self.heads));
        let (mut q, mut k, v) = (heads(&parts[0])?, heads(&parts[1])?, heads(&parts[2])?);
        if let Some(lrpe) = &self.lrpe {
            let phase = lrpe.phases(grid)?;
            q = rotate(&q, &phase, Pairing::Halves)?;
            k = rotate(&k, &phase, Pairing::Halves)?;
        }
        let o = softmax(&q, &k, &v, &Options::default())?;
        self.output.forward(&o.reshape((batch, tokens, width))?)
    }
}
