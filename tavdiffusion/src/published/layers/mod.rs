//! What the published networks are made of.

mod attention;
mod conv;
mod group_norm;
mod resample;
mod resnet;
mod time;
mod transformer;

pub(crate) use attention::{Attention, AttentionShape, attend};
pub(crate) use conv::{Conv1d, Conv2d, ConvTranspose1d, Padding};
pub(crate) use group_norm::GroupNorm;
pub(crate) use resample::{Downsample, Upsample};
pub(crate) use resnet::{Resnet, ResnetShape};
pub(crate) use time::{TimeEmbedding, TimeShape};
pub(crate) use transformer::{FeedForward, Transformer, TransformerShape};

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::norm::layer_norm;
use serde::Deserialize;

/// Added to the variance by layer norms.
const LAYER_EPS: f64 = 1e-5;

/// A vector of parameters, always f32: norms and biases are as exact as there is room for.
fn vector(size: usize, name: &str, start: f64, vb: &VarBuilder) -> Result<Tensor> {
    vb.to_dtype(DType::F32)
        .get_with_hints(size, name, Init::Const(start))
}

/// A layer norm over channels.
#[derive(Clone, Debug)]
pub(crate) struct LayerNorm {
    gain: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// Takes `weight` and `bias` `[channels]`.
    pub(crate) fn new(channels: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            gain: vector(channels, "weight", 1.0, vb)?,
            bias: vector(channels, "bias", 0.0, vb)?,
        })
    }

    /// Normalises `x` `[.., C]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, Some(&self.gain), Some(&self.bias), LAYER_EPS)
    }
}

/// The activation of residual blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Activation {
    /// `x / (1 + exp(-x))`.
    #[default]
    #[serde(alias = "swish")]
    Silu,
    /// With the error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Element by element.
    pub(crate) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::Relu => x.relu(),
        }
    }
}
