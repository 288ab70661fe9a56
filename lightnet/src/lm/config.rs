//! The shape of a language model, as its `config.json` says.

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

/// Most layers that are built.
const MOST_LAYERS: usize = 4096;
/// Widest model and vocabulary.
const WIDEST: usize = 1 << 24;

/// Which token mixer a model has.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// TransNormerLLM's successor (arXiv 2405.17381): constant decays, low-rank output gate.
    Tnl,
    /// Data-dependent decays of channels tied to keys (arXiv 2404.07904).
    Hgrn2,
    /// The additive recurrence in its causal form (arXiv 2405.21022).
    Lightnet,
    /// Softmax attention with rotary positions.
    Llama,
}

/// The shape of a model. Names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Config {
    /// Which mixer.
    #[serde(rename = "model_type")]
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
    #[serde(alias = "num_heads")]
    pub num_attention_heads: usize,
    /// Heads G of keys and values, for softmax attention; H if absent.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Width D of a head; d / H if absent.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Added to the mean square in norms.
    #[serde(default = "norm_eps", alias = "norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the frequencies of rotary positions, where [`Self::rope_parameters`] names none.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    /// What newer files say of rotary positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of the weights that a model starts from.
    #[serde(default = "initializer_range")]
    pub initializer_range: f64,
}

/// Rotary positions as newer versions of transformers write them.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// Only `default`, without scaling, is known.
    #[serde(default = "plain")]
    pub rope_type: String,
}

fn plain() -> String {
    "default".into()
}

fn norm_eps() -> f64 {
    1e-6
}

fn rope_theta() -> f64 {
    1e4
}

fn initializer_range() -> f64 {
    0.02
}

impl Config {
    /// Width D of a head.
    pub fn head_width(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Base of the frequencies of rotary positions.
    pub fn theta(&self) -> f64 {
        self.rope_parameters
            .as_ref()
            .map_or(self.rope_theta, |rope| rope.rope_theta)
    }

    /// Heads G of keys and values.
    pub fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Refuses shapes that no model can have.
    ///
    /// # Errors
    /// A size is zero or beyond all reason, or heads do not divide what they share.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, WIDEST),
            ("hidden_size", self.hidden_size, WIDEST),
            ("intermediate_size", self.intermediate_size, WIDEST),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, WIDEST),
            ("head_dim", self.head_width(), WIDEST),
            ("num_key_value_heads", self.key_value_heads(), WIDEST),
        ];
        for (name, size, most) in sizes {
            if size == 0 || size > most {
                bail!("{name} is {size}, expected 1 to {most}");
            }
        }
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        if self.head_dim.is_none() && !width.is_multiple_of(heads) {
            bail!("hidden_size is {width}, expected a multiple of num_attention_heads, {heads}");
        }
        let groups = self.key_value_heads();
        if !heads.is_multiple_of(groups) {
            bail!("num_key_value_heads is {groups}, expected a divisor of num_attention_heads, {heads}");
        }
        if self.architecture == Architecture::Llama && !self.head_width().is_multiple_of(2) {
            bail!(
                "head_dim is {}, expected an even width for rotary positions",
                self.head_width()
            );
        }
        if self.architecture != Architecture::Llama && heads * self.head_width() != width {
            bail!(
                "head_dim is {}, expected hidden_size / num_attention_heads",
                self.head_width()
            );
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        for (name, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
        ] {
            if !positive(value) {
                bail!("{name} is {value}, expected a positive number");
            }
        }
        Ok(())
    }
}
