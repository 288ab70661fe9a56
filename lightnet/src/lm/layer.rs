//! One layer of a language model: its mixer, its gated linear unit, and what checkpoints call them.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::{VarBuilder, ops::softmax};
use fulgur_kernels::exchange::{Direction, StateExchange, halo};
use fulgur_kernels::shift::token_shift;

use super::config::{Architecture, Config};
use super::glu::Glu;
use super::rope::Rotary;
use crate::mixer::causal::{
    Attention, AttentionShape, BidirectionalLightNet, CausalContext, CausalLightNet, CosFormer2, Eos, Hgrn1,
    Hgrn2, Memory, Tnl, TransNormer,
};

/// The layer; its norms are applied by the model, together with the residual sums before them.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    mixer: Mixer,
    glu: Glu,
    token_shift: bool,
}

#[derive(Clone, Debug)]
enum Mixer {
    Tnl(Tnl),
    TransNormer(TransNormer),
    Hgrn1(Hgrn1),
    Hgrn2(Hgrn2),
    CosFormer2(CosFormer2),
    LightNet(CausalLightNet),
    Bidirectional(BidirectionalLightNet),
    Eos(Box<Eos>),
    Attention(Attention),
}

impl Mixer {
    fn new(config: &Config, index: usize, vb: &VarBuilder) -> Result<Self> {
        if let Some(softmax) = config.softmax_layer(index) {
            return Attention::new(&AttentionShape::of_layer(config, softmax), vb).map(Self::Attention);
        }
        Ok(match config.architecture {
            Architecture::Tnl => Self::Tnl(Tnl::new(config, index, vb)?),
            Architecture::Transnormer => Self::TransNormer(TransNormer::new(config, index, vb)?),
            Architecture::Hgrn1 => Self::Hgrn1(Hgrn1::new(config, vb)?),
            Architecture::Hgrn2 => Self::Hgrn2(Hgrn2::new(config, vb)?),
            Architecture::Cosformer2 => Self::CosFormer2(CosFormer2::new(config, vb)?),
            Architecture::Lightnet if config.bidirectional => {
                Self::Bidirectional(BidirectionalLightNet::new(config, vb)?)
            }
            Architecture::Lightnet => Self::LightNet(CausalLightNet::new(config, vb)?),
            Architecture::Eos => Self::Eos(Box::new(Eos::new(config, index, vb)?)),
            Architecture::Llama => Self::Attention(Attention::new(&AttentionShape::of(config), vb)?),
        })
    }
}

impl Layer {
    /// Layer number `index`; `vb` stands at its tensors.
    pub(super) fn new(config: &Config, index: usize, vb: &VarBuilder) -> Result<Self> {
        let names = Names::of(config.architecture);
        Ok(Self {
            mixer: Mixer::new(config, index, &vb.pp(names.mixer))?,
            glu: Glu::new(config, &vb.pp(names.glu))?,
            token_shift: config.token_shift,
        })
    }

    /// What one of `ranks` has of layer number `index` of a model of this `config`; `vb` stands at its own tensors.
    pub(super) fn in_tensor_part(
        config: &Config,
        index: usize,
        vb: &VarBuilder,
        ranks: &Arc<dyn StateExchange>,
    ) -> Result<Self> {
        let own = config.of_tensor_part(ranks.parts());
        let Self {
            mixer,
            mut glu,
            token_shift,
        } = Self::new(&own, index, vb)?;
        glu.over(ranks);
        Ok(Self {
            mixer: match mixer {
                Mixer::Tnl(mixer) => Mixer::Tnl(mixer.over(config, index, ranks)?),
                Mixer::TransNormer(mixer) => Mixer::TransNormer(mixer.over(config, index, ranks)?),
                _ => bail!("layers of {} do not split over ranks", config.architecture.name()),
            },
            glu,
            token_shift,
        })
    }

    /// As [`crate::linear::Linear::round`], of all maps.
    pub(super) fn round(&mut self, dtype: DType) -> Result<()> {
        match &mut self.mixer {
            Mixer::Tnl(mixer) => mixer.round(dtype),
            Mixer::TransNormer(mixer) => mixer.round(dtype),
            Mixer::Hgrn1(mixer) => mixer.round(dtype),
            Mixer::Hgrn2(mixer) => mixer.round(dtype),
            Mixer::CosFormer2(mixer) => mixer.round(dtype),
            Mixer::LightNet(mixer) => mixer.round(dtype),
            Mixer::Eos(mixer) => mixer.round(dtype),
            Mixer::Attention(mixer) => mixer.round(dtype),
            Mixer::Bidirectional(mixer) => mixer.round(dtype),
        }?;
        self.glu.round(dtype)
    }

    /// The rotary positions whose phases its mixer needs.
    pub(super) fn rotary(&self) -> Option<&Rotary> {
        match &self.mixer {
            Mixer::Attention(mixer) => Some(mixer.rotary()),
            _ => None,
        }
    }

    /// The branch of the mixer, behind what `memory` holds; `mask` `[B, N]` is for mixers in both directions.
    pub(super) fn mix(
        &self,
        normed: &Tensor,
        context: &CausalContext<'_>,
        mask: Option<&Tensor>,
        memory: Option<&mut Memory>,
    ) -> Result<Tensor> {
        let exchange = Memory::exchange(memory.as_deref());
        let normed = &self.shifted(normed, mask, exchange.as_ref())?;
        match &self.mixer {
            Mixer::Tnl(mixer) => mixer.forward(normed, context, memory),
            Mixer::TransNormer(mixer) => mixer.forward(normed, context, memory),
            Mixer::Hgrn1(mixer) => mixer.forward(normed, context, memory),
            Mixer::Hgrn2(mixer) => mixer.forward(normed, context, memory),
            Mixer::CosFormer2(mixer) => mixer.forward(normed, context, memory),
            Mixer::LightNet(mixer) => mixer.forward(normed, context, memory),
            Mixer::Eos(mixer) => mixer.forward(normed, context, memory),
            Mixer::Attention(mixer) => mixer.forward(normed, context, mask, memory),
            Mixer::Bidirectional(mixer) => mixer.forward(normed, context, mask, memory),
        }
    }

    /// The branch of the gated linear unit; `mask` as in [`Self::mix`], `exchange` where sequences are split.
    pub(super) fn expand(
        &self,
        normed: &Tensor,
        mask: Option<&Tensor>,
        exchange: Option<&Arc<dyn StateExchange>>,
    ) -> Result<Tensor> {
        self.glu.forward(&self.shifted(normed, mask, exchange)?)
    }

    /// What the branches read: with token shift half of the channels are those of neighbours, among which padding is none.
    fn shifted(
        &self,
        normed: &Tensor,
        mask: Option<&Tensor>,
        exchange: Option<&Arc<dyn StateExchange>>,
    ) -> Result<Tensor> {
        if !self.token_shift {
            return Ok(normed.clone());
        }
        let seen = match mask {
            None => normed.clone(),
            Some(mask) => normed.broadcast_mul(&mask.to_dtype(normed.dtype())?.unsqueeze(D::Minus1)?)?,
        };
        let Some(exchange) = exchange else {
            return token_shift(&seen);
        };
        let before = halo(exchange, &seen, 1, Direction::Forward)?;
        let behind = halo(exchange, &seen, 1, Direction::Backward)?;
        token_shift(&Tensor::cat(&[&before, &seen, &behind], 1)?)?.narrow(1, 1, seen.dim(1)?)
    }
}

/// HGRN's lower bounds of gates, one vector a layer, from their `table` `[L, d]`: sums of the softmax over layers, from the second on
/// (section 3.2), or from the first on without the layer's own. Empty without a table.
pub(crate) fn lower_bounds(config: &Config, table: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let Some(table) = table else {
        return Ok(Vec::new());
    };
    let shares = softmax(table, 0)?;
    let mut sum = shares.get(0)?.zeros_like()?;
    let mut all = vec![sum.clone()];
    for layer in 1..config.num_hidden_layers {
        let added = if config.exclusive_lower_bound {
            layer - 1
        } else {
            layer
        };
        sum = (sum + shares.get(added)?)?;
        all.push(sum.clone());
    }
    Ok(all)
}

/// What checkpoints call the parts of a model that all of them have.
pub(super) struct Names {
    pub(super) embedding: &'static str,
    pub(super) mixer: &'static str,
    pub(super) glu: &'static str,
    /// Norms before the mixer, before the gated linear unit, and at the end; without gains where there are none.
    pub(super) norms: Option<[&'static str; 3]>,
}

impl Names {
    /// Those of Hugging Face for LLaMA, of TransNormerLLM's code, and of flash-linear-attention for the others.
    pub(super) fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama => Self {
                embedding: "embed_tokens",
                mixer: "self_attn",
                glu: "mlp",
                norms: Some(["input_layernorm", "post_attention_layernorm", "norm"]),
            },
            Architecture::Transnormer => Self {
                embedding: "embed_tokens",
                mixer: "token_mixer",
                glu: "channel_mixer",
                norms: None,
            },
            _ => Self {
                embedding: "embeddings",
                mixer: "attn",
                glu: "mlp",
                norms: Some(["attn_norm", "mlp_norm", "norm"]),
            },
        }
    }
}
