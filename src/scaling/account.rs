//! Weights and floating-point operations as the study counts them (section 4.1): those of the layers, without embedding and
//! head, and causal mixers as if they saw every pair of a block.
//!
//! ```text
//! 6 N + 20 L d                    a token, forward and backward: products with weights, and work on elements
//! 12 L d n                        softmax over n tokens
//! 3 L H (2 C F + 2 C E + 4 F E)   lightning attention: pairs of a block of C = E tokens, and the state of F x E
//! ```
//!
//! With `N = 12 L d^2` and `x` as in the table this is `72 L d^2 (1 + x)`:
//!
//! | model | N | x |
//! |---|---|---|
//! | LLaMA | 12 L d^2 | n/(6 d) + 5/(18 d) |
//! | TNL | 12 L d^2 + 2 L d^2/H | 1/(2 H) + 5/(18 d) |
//! | HGRN2 | 12 L d^2 | 1/(3 H) + 5/(18 d) |
//! | cosFormer2 | 12 L d^2 + 2 L d^2/H | 3/(4 H) + 5/(18 d) |
//!
//! The first two are published; HGRN2, cosFormer2 (whose F = 2 D, as if LRPE turned all channels) and all others follow from
//! the same count.

use std::collections::BTreeMap;

use fulgur_lightnet::lm::{Architecture, Config, Turn};
use fulgur_lightnet::params::outline::values_of;
use serde::{Deserialize, Serialize};

/// What a model counts.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Account {
    /// Weights N of all products of the layers.
    pub weights: u64,
    /// All parameters.
    pub parameters: u64,
    /// Weights of the head: vocabulary times width, also where it is the embedding.
    pub head: u64,
    /// Operations of a token forward and backward, without the head's.
    pub flops: f64,
}

impl Account {
    /// Of a model with parameters of these shapes, in windows of `context` tokens.
    #[must_use]
    pub fn of(config: &Config, shapes: &BTreeMap<String, Vec<usize>>, context: usize) -> Self {
        let products = shapes
            .iter()
            .filter(|(name, shape)| is_product(name) && shape.len() == 2);
        let weights = products.map(|(_, shape)| values_of(shape)).sum::<u64>();
        let layers = config.num_hidden_layers;
        let mixers: f64 = (0..layers).map(|layer| mixer(config, layer, context)).sum();
        let elements = 20.0 * layers as f64 * config.hidden_size as f64;
        Self {
            weights,
            parameters: shapes.values().map(|shape| values_of(shape)).sum(),
            head: config.vocab_size as u64 * config.hidden_size as u64,
            flops: 6.0 * weights as f64 + elements + mixers,
        }
    }

    /// Operations of a token with the head's products.
    #[must_use]
    pub fn flops_with_head(&self) -> f64 {
        self.flops + 6.0 * self.head as f64
    }
}

/// Whether a parameter of this name, if it is a matrix, multiplies tokens in a layer; TransNormerLLM numbers the maps of its
/// gated linear units.
fn is_product(name: &str) -> bool {
    name.contains("_proj.") || name.contains(".channel_mixer.")
}

/// Operations of a token in a mixer besides its maps, forward and backward.
fn mixer(config: &Config, layer: usize, context: usize) -> f64 {
    let softmax = |width: usize| 12.0 * width as f64 * context as f64;
    if config.softmax_layer(layer).is_some() {
        return softmax(config.hidden_size);
    }
    let turns = match config.architecture {
        Architecture::Llama => return softmax(config.key_size()),
        Architecture::Tnl | Architecture::Transnormer => config.lrpe_layers.contains(&layer),
        Architecture::Cosformer2 | Architecture::Lightnet => config.use_lrpe,
        Architecture::Eos => config.eos.turn != Turn::None,
        Architecture::Hgrn1 | Architecture::Hgrn2 => false,
    };
    let heads = config.num_attention_heads as f64;
    let keys = config.head_width() as f64 * if turns { 2.0 } else { 1.0 };
    let values = config.value_size() as f64 / heads;
    // One scan in both directions has no blocks.
    let block = if config.bidirectional { 0.0 } else { values };
    3.0 * heads * (2.0 * block * keys + 2.0 * block * values + 4.0 * keys * values)
}

#[cfg(test)]
mod tests;
