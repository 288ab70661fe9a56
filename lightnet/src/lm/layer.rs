//! One layer of a language model: its mixer, its gated linear unit, and the norms before them.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::glu::swiglu;
use fulgur_kernels::linear::joined;

use super::config::{Architecture, Config};
use crate::linear::{Linear, Start};
use crate::mixer::causal::{Attention, CausalContext, CausalLightNet, Hgrn2, Tnl};

/// The layer; its norms are applied by the model, together with the residual sums before them.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    mixer: Mixer,
    glu: Glu,
}

#[derive(Clone, Debug)]
enum Mixer {
    Tnl(Tnl),
    Hgrn2(Hgrn2),
    LightNet(CausalLightNet),
    Attention(Attention),
}

impl Layer {
    /// Layer number `index`; `vb` stands at its tensors.
    pub(super) fn new(config: &Config, index: usize, vb: &VarBuilder) -> Result<Self> {
        let attention = vb.pp(Names::of(config.architecture).mixer);
        let mixer = match config.architecture {
            Architecture::Tnl => Mixer::Tnl(Tnl::new(config, index, &attention)?),
            Architecture::Hgrn2 => Mixer::Hgrn2(Hgrn2::new(config, &attention)?),
            Architecture::Lightnet => Mixer::LightNet(CausalLightNet::new(config, &attention)?),
            Architecture::Llama => Mixer::Attention(Attention::new(config, &attention)?),
        };
        Ok(Self {
            mixer,
            glu: Glu::new(config, &vb.pp("mlp"))?,
        })
    }

    /// The branch of the mixer.
    pub(super) fn mix(&self, normed: &Tensor, context: &CausalContext<'_>) -> Result<Tensor> {
        match &self.mixer {
            Mixer::Tnl(mixer) => mixer.forward(normed, context),
            Mixer::Hgrn2(mixer) => mixer.forward(normed, context),
            Mixer::LightNet(mixer) => mixer.forward(normed, context),
            Mixer::Attention(mixer) => mixer.forward(normed, context),
        }
    }

    /// The branch of the gated linear unit.
    pub(super) fn expand(&self, normed: &Tensor) -> Result<Tensor> {
        self.glu.forward(normed)
    }
}

/// What checkpoints call the parts of a model that all of them have.
pub(super) struct Names {
    pub(super) embedding: &'static str,
    pub(super) mixer: &'static str,
    pub(super) mixer_norm: &'static str,
    pub(super) glu_norm: &'static str,
}

impl Names {
    /// Those of Hugging Face for LLaMA, of flash-linear-attention for the others.
    pub(super) fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama => Self {
                embedding: "embed_tokens",
                mixer: "self_attn",
                mixer_norm: "input_layernorm",
                glu_norm: "post_attention_layernorm",
            },
            _ => Self {
                embedding: "embeddings",
                mixer: "attn",
                mixer_norm: "attn_norm",
                glu_norm: "mlp_norm",
            },
        }
    }
}

/// `(silu(x W_gate) * x W_up) W_down`.
#[derive(Clone, Debug)]
struct Glu {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Glu {
    fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (width, hidden) = (config.hidden_size, config.intermediate_size);
        let map = |input, output, name| {
            let start = Start::Normal(config.initializer_range);
            Linear::new(input, output, false, start, &vb.pp(name))
        };
        Ok(Self {
            gate: map(width, hidden, "gate_proj")?,
            up: map(width, hidden, "up_proj")?,
            down: map(hidden, width, "down_proj")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = joined(x, &[self.gate.weight(), self.up.weight()])?;
        self.down.forward(&swiglu(&wide)?)
    }
}
