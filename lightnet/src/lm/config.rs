//! The shape of a language model, as its `config.json` says.

mod check;
mod eos;
mod published;

use serde::{Deserialize, Serialize};

use super::rope::{Rotary, Scaling};
use crate::config::ConfigError;
pub use eos::{EosConfig, GateForm, Instance, Oscillation, Source, Turn};
use published::Published;

/// Which token mixer a model has.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// TransNormerLLM's successor (arXiv 2405.17381): constant decays, low-rank output gate.
    Tnl,
    /// TransNormerLLM (arXiv 2307.14995): constant decays, full-rank gate, norms without gains.
    Transnormer,
    /// The element-wise gated recurrence before HGRN2 (arXiv 2311.04823), as its baseline.
    Hgrn1,
    /// Data-dependent decays of channels tied to keys (arXiv 2404.07904).
    Hgrn2,
    /// Linear attention without decay, with positions in cosines (arXiv 2406.16690).
    Cosformer2,
    /// The additive recurrence in its causal form (arXiv 2405.21022), or without causality.
    Lightnet,
    /// Any expand, oscillation and shrink (arXiv 2405.17383).
    Eos,
    /// Softmax attention with rotary positions.
    Llama,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Tnl,
        Self::Transnormer,
        Self::Hgrn1,
        Self::Hgrn2,
        Self::Cosformer2,
        Self::Lightnet,
        Self::Eos,
        Self::Llama,
    ];

    /// Its `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tnl => "tnl",
            Self::Transnormer => "transnormer",
            Self::Hgrn1 => "hgrn1",
            Self::Hgrn2 => "hgrn2",
            Self::Cosformer2 => "cosformer2",
            Self::Lightnet => "lightnet",
            Self::Eos => "eos",
            Self::Llama => "llama",
        }
    }
}

/// What is done to queries, keys, values, or to the first half of a gated linear unit.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// Nothing.
    None,
    /// `x / (1 + e^-x)`.
    #[default]
    #[serde(alias = "swish")]
    Silu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `1 + elu(x)`: positive features.
    #[serde(rename = "1+elu")]
    OnePlusElu,
    /// `max(x, 0)`.
    Relu,
    /// x, or `e^x - 1` below zero.
    Elu,
    /// `max(x, 0)^2`.
    #[serde(rename = "relu2")]
    ReluSquared,
    /// `x^2`.
    Square,
    /// `e^x`, with x up to 20.
    Exp,
}

/// What is done to the gate of a mixer's output.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputGate {
    /// Nothing.
    None,
    /// `1 / (1 + e^-x)`.
    #[default]
    Sigmoid,
    /// `x / (1 + e^-x)`.
    Silu,
}

/// The norm of a mixer's output.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputNorm {
    /// `x / rms(x)`.
    #[default]
    Rms,
    /// Also without its mean.
    Layer,
}

/// How the constant decays of heads are chosen (section 1.3 of the TransNormerLLM paper and code).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DecaySchedule {
    /// The slopes of ALiBi, `2^(-8 (h + 1) / H)`, times `1 - l / (L - 1) + 1e-5`: the published code.
    #[default]
    Alibi,
    /// `8 h / H` times `1 - l / L`: the formula of the paper.
    Linear8,
    /// `1 / n_h` with n_h from 2 to 256 at equal ratios, times the factor of [`Self::Alibi`].
    Log,
    /// None: `lambda = 1`.
    None,
}

/// LightNet's decay.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// One for each key channel; its logits are the keys'.
    #[default]
    Vector,
    /// One for each head, from logits of its own; keys are `silu(x W_k)`.
    Scalar,
    /// The same, with keys times `1 - a_t`.
    Tied,
}

/// Layers of a hybrid that have softmax attention instead of the model's mixer, as flash-linear-attention's `attn` says.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct SoftmaxLayers {
    /// Their numbers, from 0 on.
    pub layers: Vec<usize>,
    /// Heads.
    pub num_heads: usize,
    /// Heads of keys and values; as many as heads if absent.
    #[serde(default)]
    pub num_kv_heads: Option<usize>,
    /// Whether the maps to queries, keys and values have biases.
    #[serde(default)]
    pub qkv_bias: bool,
    /// Not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_size: Option<usize>,
    /// Base of the frequencies of rotary positions.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
}

fn rope_theta() -> f64 {
    1e4
}

/// The shape of a model, read from and written to `config.json` in the names of Hugging Face (LLaMA), flash-linear-attention
/// (HGRN2, LightNet) and TransNormerLLM; what those files do not name keeps what their libraries do.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(try_from = "Published", into = "Published")]
pub struct Config {
    /// Which mixer.
    pub architecture: Architecture,
    /// Rows V of the embedding.
    pub vocab_size: usize,
    /// Model width d.
    pub hidden_size: usize,
    /// Hidden width of the gated linear units.
    pub intermediate_size: usize,
    /// Layers L.
    pub num_hidden_layers: usize,
    /// Heads H.
    pub num_attention_heads: usize,
    /// Heads G of keys and values, for softmax attention; H if absent.
    pub num_key_value_heads: Option<usize>,
    /// Key width D of a head; d / H if absent. Values of linear mixers are [`Self::value_size`] / H wide.
    pub head_dim: Option<usize>,
    /// Width of values and of the mixer's output over all heads, of TransNormerLLM; d if absent.
    pub value_dim: Option<usize>,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// The same in the norm of a mixer's output; [`Self::rms_norm_eps`] if absent.
    pub output_norm_eps: Option<f64>,
    /// The norm of a mixer's output.
    pub output_norm: OutputNorm,
    /// Whether it has a gain.
    pub elementwise_affine: bool,
    /// Whether each head has statistics of its own in it.
    pub norm_per_head: bool,
    /// Whether the gate of the output multiplies before the norm instead of after it.
    pub gate_first: bool,
    /// What is done to that gate.
    pub output_gate: OutputGate,
    /// Rank of that gate; D if absent.
    pub gate_low_rank_dim: Option<usize>,
    /// Whether queries are divided by sqrt(D), which the norm of the output all but undoes.
    pub scale_queries: bool,
    /// What is done in the gated linear units.
    pub hidden_act: Activation,
    /// What is done to queries, and where they are linear attention's, to keys.
    pub linear_act: Activation,
    /// What is done to values.
    pub value_act: Activation,
    /// Whether the maps of attention have biases.
    pub attention_bias: bool,
    /// Whether the maps of gated linear units have biases.
    pub mlp_bias: bool,
    /// Taps of the short convolutions behind the maps of a linear mixer; none if absent.
    pub conv_size: Option<usize>,
    /// Base of the frequencies of rotary positions.
    pub rope_theta: f64,
    /// How they are scaled.
    pub rope_scaling: Scaling,
    /// Constant decays of TNL and TransNormerLLM.
    pub decay_schedule: DecaySchedule,
    /// Layers with LRPE, of TNL and TransNormerLLM.
    pub lrpe_layers: Vec<usize>,
    /// Whether embeddings are multiplied by sqrt(d).
    pub scale_embedding: bool,
    /// Whether the gates of HGRN have lower bounds.
    pub use_lower_bound: bool,
    /// Whether a layer's bound leaves out its own share.
    pub exclusive_lower_bound: bool,
    /// LightNet's decay.
    pub decay: Decay,
    /// What the EOS layer is made of.
    pub eos: EosConfig,
    /// Whether LightNet's sums of weights start with a token of value and logit zero instead of nothing.
    pub seeded: bool,
    /// LRPE in every layer of LightNet, in cosFormer2's way.
    pub use_lrpe: bool,
    /// Whether only the higher half of the frequencies of LRPE turns, and the other channels do not.
    pub half_lrpe: bool,
    /// Whether the frequencies of LRPE are learnt, in cosFormer2 and LightNet.
    pub learn_theta: bool,
    /// Where given, frequencies of LRPE in cosFormer2 and LightNet fall from 2 rad a token to a quarter turn over so many tokens,
    /// instead of by `10000^(-2 j / D)` for channel j: more channels tell neighbours apart.
    pub lrpe_longest: Option<usize>,
    /// Whether half of the channels that mixers and gated linear units read are those of the neighbours, a quarter from either
    /// side: in models that are `bidirectional`.
    pub token_shift: bool,
    /// Whether TPE follows the embedding.
    pub use_tpe: bool,
    /// Whether TPE adds to the embedding instead of taking its place.
    pub tpe_residual: bool,
    /// Tokens see each other in both directions, and the head restores masked ones: LightNet and LLaMA only.
    pub bidirectional: bool,
    /// Layers with softmax attention.
    pub attn: Vec<SoftmaxLayers>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the weights that a model starts from.
    pub initializer_range: f64,
}

impl Config {
    /// A model of this kind with what its paper, or for LLaMA its library, does; sizes are those of a small one.
    pub fn of(architecture: Architecture) -> Self {
        use Architecture::{Cosformer2, Eos, Hgrn1, Hgrn2, Lightnet, Llama, Tnl, Transnormer};
        let plain_values = matches!(
            architecture,
            Transnormer | Cosformer2 | Lightnet | Eos | Llama | Hgrn1 | Hgrn2
        );
        Self {
            architecture,
            vocab_size: 256,
            hidden_size: 256,
            intermediate_size: 704,
            num_hidden_layers: 6,
            num_attention_heads: 4,
            num_key_value_heads: None,
            head_dim: None,
            value_dim: None,
            rms_norm_eps: 1e-6,
            output_norm_eps: None,
            output_norm: OutputNorm::Rms,
            elementwise_affine: architecture != Transnormer,
            norm_per_head: false,
            gate_first: false,
            output_gate: match architecture {
                Tnl | Cosformer2 | Lightnet => OutputGate::Sigmoid,
                _ => OutputGate::None,
            },
            gate_low_rank_dim: None,
            scale_queries: false,
            hidden_act: match architecture {
                Transnormer => Activation::None,
                _ => Activation::Silu,
            },
            linear_act: Activation::Silu,
            value_act: if plain_values {
                Activation::None
            } else {
                Activation::Silu
            },
            attention_bias: false,
            mlp_bias: false,
            conv_size: None,
            rope_theta: 1e4,
            rope_scaling: Scaling::None,
            decay_schedule: DecaySchedule::Alibi,
            lrpe_layers: if architecture == Transnormer {
                vec![0]
            } else {
                Vec::new()
            },
            scale_embedding: architecture == Transnormer,
            use_lower_bound: true,
            exclusive_lower_bound: false,
            decay: Decay::Vector,
            eos: EosConfig::default(),
            seeded: false,
            use_lrpe: architecture == Cosformer2,
            half_lrpe: architecture == Cosformer2,
            learn_theta: false,
            lrpe_longest: None,
            token_shift: false,
            use_tpe: architecture == Cosformer2,
            tpe_residual: false,
            bidirectional: false,
            attn: Vec::new(),
            tie_word_embeddings: false,
            initializer_range: 0.02,
        }
        .with_eos()
    }

    /// Key width D of a head.
    pub fn head_width(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Width of keys over all heads.
    pub fn key_size(&self) -> usize {
        self.num_attention_heads * self.head_width()
    }

    /// Width of values over all heads.
    pub fn value_size(&self) -> usize {
        self.value_dim.unwrap_or(self.hidden_size)
    }

    /// Rank of the gate of the output.
    pub fn gate_rank(&self) -> usize {
        self.gate_low_rank_dim.unwrap_or(self.head_width())
    }

    /// Added to the mean square in the norm of a mixer's output.
    pub fn output_eps(&self) -> f64 {
        self.output_norm_eps.unwrap_or(self.rms_norm_eps)
    }

    /// The same where queries are not divided by sqrt(D): a factor s of what is normed is 1 / s^2 of it.
    pub(crate) fn unscaled_output_eps(&self) -> f64 {
        let width = if self.scale_queries { self.head_width() } else { 1 };
        self.output_eps() * width as f64
    }

    /// Rotary positions of LLaMA.
    pub fn rotary(&self) -> Rotary {
        Rotary {
            width: self.head_width(),
            base: self.rope_theta,
            scaling: self.rope_scaling,
        }
    }

    /// Heads G of keys and values.
    pub fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Softmax attention that takes the place of the mixer of layer number `layer`.
    pub fn softmax_layer(&self, layer: usize) -> Option<&SoftmaxLayers> {
        self.attn.iter().find(|attn| attn.layers.contains(&layer))
    }

    /// Whether what a token does depends on how many were before it, apart from what the state holds: sequences of different
    /// lengths are in one batch otherwise only.
    pub fn sees_positions(&self) -> bool {
        let turns = match self.architecture {
            Architecture::Tnl | Architecture::Transnormer => !self.lrpe_layers.is_empty(),
            Architecture::Cosformer2 | Architecture::Lightnet => self.use_lrpe,
            Architecture::Eos => matches!(self.eos.turn, Turn::Shared | Turn::Rows),
            Architecture::Hgrn1 | Architecture::Hgrn2 => false,
            Architecture::Llama => true,
        };
        turns || !self.attn.is_empty()
    }

    /// Whether its gates have lower bounds.
    pub(crate) fn has_lower_bounds(&self) -> bool {
        use Architecture::{Eos, Hgrn1, Hgrn2};
        matches!(self.architecture, Hgrn1 | Hgrn2 | Eos) && self.use_lower_bound
    }

    /// Reads `config.json`; where it does not say its `model_type`, the model is of the `fallback` kind.
    ///
    /// # Errors
    /// The file is unreadable, names what is not supported, or describes a model that cannot be.
    pub fn read(path: &std::path::Path, fallback: Option<Architecture>) -> Result<Self, ConfigError> {
        let fail = |detail: String| ConfigError {
            path: path.to_owned(),
            detail,
        };
        let mut published: Published = crate::config::read(path)?;
        published.assume(fallback);
        let config = Self::try_from(published).map_err(fail)?;
        config.check().map_err(|e| {
            let words = e.to_string();
            fail(words.lines().next().unwrap_or_default().to_owned())
        })?;
        Ok(config)
    }
}
