//! The mixers of a classifier of pictures behind one face.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::attention::SelfAttention;
use super::config::{Config, Mixer};
use crate::linear::Start;
use crate::mixer::causal::{CausalContext, Hgrn2, Memory, Paths, Tnl};
use crate::mixer::{LightNet, LightNetConfig, MixerContext};
use crate::position::{Grid, MdLrpe};

/// What a mixer is told beside its tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told<'a> {
    /// Where they are.
    pub(super) grid: &'a Grid,
    /// The ways through them.
    pub(super) paths: &'a Arc<Paths>,
    /// Lower bound `[d]` of the gates of HGRN2.
    pub(super) lower_bound: Option<&'a Tensor>,
}

/// The mixer of a layer.
#[derive(Clone, Debug)]
pub(super) enum TokenMixer {
    LightNet(LightNet),
    Hgrn2(Hgrn2, Option<MdLrpe>),
    Tnl(Tnl, Option<MdLrpe>),
    Softmax(SelfAttention),
}

impl TokenMixer {
    /// That of layer number `layer`.
    pub(super) fn new(config: &Config, layer: usize, vb: &VarBuilder) -> Result<Self> {
        let (width, longest) = (config.head_width(), config.longest());
        let lrpe = || {
            config
                .lrpe
                .then(|| MdLrpe::new(width, 2, longest, &vb.pp("lrpe")))
                .transpose()
        };
        let layers = config.mixer.scans().map(|scan| config.layers(scan));
        Ok(match (config.mixer, layers) {
            (Mixer::Hgrn2, Some(layers)) => Self::Hgrn2(Hgrn2::new(&layers, vb)?, lrpe()?),
            (Mixer::Tnl, Some(layers)) => Self::Tnl(Tnl::new(&layers, layer, vb)?, lrpe()?),
            (Mixer::Softmax, _) => Self::Softmax(SelfAttention::new(config, vb)?),
            _ => {
                let shape = LightNetConfig {
                    dim: config.hidden_size,
                    heads: config.num_attention_heads,
                    head_dim: width,
                    lrpe: config.lrpe.then_some((2, longest)),
                    start: Start::FanIn,
                };
                Self::LightNet(LightNet::new(shape, vb)?)
            }
        })
    }

    /// Mixes `x` `[B, N, d]`.
    pub(super) fn forward(&self, x: &Tensor, told: &Told<'_>) -> Result<Tensor> {
        let turned = |lrpe: &Option<MdLrpe>| lrpe.as_ref().map(|lrpe| lrpe.phases(told.grid)).transpose();
        let mut memory = Memory::along(Arc::clone(told.paths));
        match self {
            Self::LightNet(mixer) => {
                let context = MixerContext {
                    grid: Some(told.grid),
                    ..MixerContext::default()
                };
                mixer.forward(x, &context)
            }
            Self::Softmax(mixer) => mixer.forward(x, told.grid),
            Self::Hgrn2(mixer, lrpe) => {
                let phase = turned(lrpe)?;
                let context = CausalContext {
                    lower_bound: told.lower_bound,
                    turn: phase.as_ref(),
                    ..CausalContext::default()
                };
                mixer.forward(x, &context, Some(&mut memory))
            }
            Self::Tnl(mixer, lrpe) => {
                let phase = turned(lrpe)?;
                let context = CausalContext {
                    turn: phase.as_ref(),
                    ..CausalContext::default()
                };
                mixer.forward(x, &context, Some(&mut memory))
            }
        }
    }
}
