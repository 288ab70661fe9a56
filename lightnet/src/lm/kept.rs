//! What a forward pass leaves for the backward pass, by token: the largest part of the memory of a training run.
//!
//! ```text
//! every layer   2 sums of the stream in f32, 2 norms, the wide projection of the gated linear unit
//! TNL           the projection, the output, its gated norm, the narrow side of the gate
//! HGRN2         the projection, the output, its norm
//! LightNet      as TNL
//! LLaMA         turned queries and keys, values, the output, a logarithm a head
//! ```
//!
//! Everything else is not read on the way back, or made again there: see [`fulgur_kernels::tape`].

use candle_core::DType;

use super::config::{Architecture, Config};

/// Bytes of an f32 value.
const WIDE: u64 = 4;

impl Config {
    /// Bytes that a step keeps for its way back, of `tokens` tokens in all and branches that compute in `compute`, besides what
    /// does not grow with tokens; with layers that are run again where `recompute` says so.
    ///
    /// On the CPU LightNet keeps more: its recurrence is composed of others there. None of a variant that was not counted.
    pub fn kept_bytes(&self, tokens: u64, compute: DType, recompute: bool) -> Option<u64> {
        if !self.is_plain() {
            return None;
        }
        let narrow = compute.size_in_bytes() as u64;
        let (width, hidden) = (self.hidden_size as u64, self.intermediate_size as u64);
        let head = self.head_width() as u64;
        let (heads, groups) = (self.num_attention_heads as u64, self.key_value_heads() as u64);
        let (mixer, logarithms) = match self.architecture {
            Architecture::Tnl | Architecture::Lightnet => (5 * width + head, 0),
            Architecture::Hgrn2 => (5 * width, 0),
            Architecture::Llama => ((2 * heads + 2 * groups) * head, heads),
            Architecture::Transnormer
            | Architecture::Hgrn1
            | Architecture::Cosformer2
            | Architecture::Eos => return None,
        };
        let layer = WIDE * (2 * width + logarithms) + narrow * (2 * width + 2 * hidden + mixer);
        let layers = self.num_hidden_layers as u64;
        let all = match recompute {
            // What enters each layer, and one that is run again.
            true => layers * (WIDE + narrow) * width + layer,
            false => layers * layer,
        };
        // The embedded tokens, and the adjoint that the loss leaves at the end.
        let ends = (WIDE + narrow) * width;
        Some(tokens.saturating_mul(all.saturating_add(ends)))
    }

    /// Bytes that a state of one sequence grows by with each token, of branches that compute in `compute`: keys and values of softmax
    /// attention, else nothing.
    pub fn growth(&self, compute: DType) -> u64 {
        let layer = |index| match self.softmax_layer(index) {
            Some(softmax) => {
                let heads = softmax.num_heads.max(1);
                softmax.num_kv_heads.unwrap_or(heads) * (self.hidden_size / heads)
            }
            None if self.architecture == Architecture::Llama => self.key_value_heads() * self.head_width(),
            None => 0,
        };
        let values: usize = (0..self.num_hidden_layers).map(layer).sum();
        (2 * values * compute.size_in_bytes()) as u64
    }

    /// Whether it differs from [`Config::of`] in sizes and numbers alone.
    fn is_plain(&self) -> bool {
        let plain = Self {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rms_norm_eps: self.rms_norm_eps,
            output_norm_eps: self.output_norm_eps,
            rope_theta: self.rope_theta,
            tie_word_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
            ..Self::of(self.architecture)
        };
        *self == plain
    }
}
