//! Causal token mixers of language models: one file a mixer.
//!
//! Each takes the normed stream `[B, N, d]` in the type of computation and gives a branch of the same shape. Their input maps
//! have tensors of their own, as checkpoints do, and run as one product.

mod attention;
mod hgrn2;
mod lightnet;
mod tnl;

pub use attention::Attention;
pub use hgrn2::Hgrn2;
pub use lightnet::CausalLightNet;
pub use tnl::Tnl;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::linear::{Linear, Start};
use crate::lm::Config;

/// What a mixer is told beside its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct CausalContext<'a> {
    /// Rotary phases `[N, D / 2]`, of softmax attention.
    pub phase: Option<&'a Tensor>,
    /// Lower bound `[d]` of the gates of HGRN2.
    pub lower_bound: Option<&'a Tensor>,
}

/// A map without bias, from one of the model's weights on.
fn map(config: &Config, input: usize, output: usize, vb: &VarBuilder) -> Result<Linear> {
    Linear::new(input, output, false, Start::Normal(config.initializer_range), vb)
}

/// `[B, N, H D]` as `[B, N, H, D]`.
fn heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    x.reshape((batch, tokens, heads, width / heads))
}

/// The low-rank output gate `x W_1 W_2`, d -> D -> d.
#[derive(Clone, Debug)]
struct OutputGate {
    down: Linear,
    up: Linear,
}

impl OutputGate {
    fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (width, rank) = (config.hidden_size, config.head_width());
        Ok(Self {
            down: map(config, width, rank, &vb.pp("0"))?,
            up: map(config, rank, width, &vb.pp("1"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.up.forward(&self.down.forward(x)?)
    }
}
