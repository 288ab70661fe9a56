//! Causal token mixers of language models: one file a mixer.
//!
//! Each takes the normed stream `[B, N, d]` in the type of computation and gives a branch of the same shape. Their input maps
//! have tensors of their own, as checkpoints do, and run as one product. With a [`Memory`] they go on behind the tokens that it
//! has seen: prompts in the form for training, single tokens in the form for decoding.

mod attention;
mod bidirectional;
mod cosformer2;
mod eos;
mod form;
mod hgrn1;
mod hgrn2;
mod in_parts;
mod lightnet;
mod memory;
mod parts;
mod paths;
mod projections;
mod tnl;
mod transnormer;

pub use attention::{Attention, AttentionShape};
pub use bidirectional::BidirectionalLightNet;
pub use cosformer2::CosFormer2;
pub use eos::Eos;
pub use form::Form;
pub use hgrn1::Hgrn1;
pub use hgrn2::Hgrn2;
pub use lightnet::CausalLightNet;
pub use memory::Memory;
pub use paths::{Paths, Way};
pub use tnl::Tnl;
pub use transnormer::TransNormer;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::linear::{Linear, Start};
use crate::lm::Config;

/// What a mixer is told beside its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct CausalContext<'a> {
    /// Rotary phases `[N, D / 2]`, of softmax attention.
    pub phase: Option<&'a Tensor>,
    /// Lower bound `[d]` of the gates of HGRN.
    pub lower_bound: Option<&'a Tensor>,
    /// Tokens before the first.
    pub position: usize,
    /// `[1]` of type u32 where the device knows them instead, so that a step can be recorded.
    pub clock: Option<&'a Tensor>,
    /// Phases `[N, D]` of MD-LRPE, by which HGRN2 and TNL turn queries and keys.
    pub turn: Option<&'a Tensor>,
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
