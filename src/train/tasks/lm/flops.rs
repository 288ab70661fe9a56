//! Floating-point operations of a language model.
//!
//! ```text
//! 6 P + the sum over layers of 12 H D E       a token, with a recurrent mixer
//!                              6 H D (N + 1)  a token, with softmax attention
//! ```
//!
//! P counts the weights of all products: those of the layers, and the head, also where it is the embedding; the lookup of the
//! embedding is no product. A product takes two operations a weight and token forward and four backward. A recurrent mixer
//! with H heads updates a state of D x E each, D key channels with their LRPE, and reads it: four operations an entry, and
//! twice as many backward; chunks and recomputation do more, which is not counted, nor are short convolutions. Attention of N
//! tokens that see the past makes two products with (N + 1) / 2 keys and values on average.

use std::collections::BTreeMap;

use fulgur_lightnet::lm::{Architecture, Config, Turn};
use fulgur_lightnet::params::outline::values_of;

/// Operations of a token forward and backward.
#[derive(Clone, Copy, Debug)]
pub(in crate::train::tasks) struct Operations {
    /// Of products with weights.
    pub(in crate::train::tasks) products: f64,
    /// Of the mixers besides.
    pub(in crate::train::tasks) mixers: f64,
    /// As many as the mixers take the time of, on a device that does nothing slower than its peak.
    pub(in crate::train::tasks) paced: f64,
}

impl Operations {
    /// Of both kinds.
    pub(in crate::train::tasks) fn all(self) -> f64 {
        self.products + self.mixers
    }
}

/// Of a model in windows of `context` tokens. `shapes` are those of all parameters.
pub(in crate::train::tasks) fn per_token(
    config: &Config,
    shapes: &BTreeMap<String, Vec<usize>>,
    context: usize,
) -> Operations {
    let table = config.vocab_size as f64 * config.hidden_size as f64;
    // TransNormerLLM calls the maps of its gated linear units `channel_mixer.l1` to `l3`.
    let is_map = |name: &str| name.contains("_proj.") || name.contains("channel_mixer.l");
    let products = shapes.iter().filter(|(name, _)| is_map(name));
    let layers: f64 = products
        .filter(|(_, shape)| shape.len() == 2)
        .map(|(_, shape)| values_of(shape) as f64)
        .sum();
    let mut operations = Operations {
        products: 6.0 * (layers + table),
        mixers: 0.0,
        paced: 0.0,
    };
    for layer in 0..config.num_hidden_layers {
        let (mixer, share) = mixer(config, layer, context);
        operations.mixers += mixer;
        operations.paced += mixer / share;
    }
    operations
}

/// What the mixer of a layer does besides its maps, and the share of a GPU's peak that it reaches: forward and backward on an
/// H100, heads of 128 channels, as docs/benchmarks.md and docs/log.md have it.
fn mixer(config: &Config, layer: usize, context: usize) -> (f64, f64) {
    const SOFTMAX: f64 = 0.23;
    const UNIFORM: f64 = 0.092;
    const CHANNELS: f64 = 0.040;
    const ADDITIVE: f64 = 0.030;
    // In both directions a token sees all others: twice as many as on average those before it.
    let seen = match config.bidirectional {
        true => 2.0 * context as f64,
        false => context as f64 + 1.0,
    };
    if config.softmax_layer(layer).is_some() {
        // Heads share the width of the model.
        return (6.0 * config.hidden_size as f64 * seen, SOFTMAX);
    }
    let width = config.head_width() as f64;
    // Half of the channels turn, or all of them: one that turns is two.
    let turning = if config.half_lrpe { 1.5 } else { 2.0 };
    let (turns, share) = match config.architecture {
        Architecture::Llama => return (6.0 * config.key_size() as f64 * seen, SOFTMAX),
        Architecture::Tnl | Architecture::Transnormer => (config.lrpe_layers.contains(&layer), UNIFORM),
        Architecture::Cosformer2 => (config.use_lrpe, UNIFORM),
        Architecture::Lightnet => (config.use_lrpe, ADDITIVE),
        Architecture::Hgrn1 | Architecture::Hgrn2 => (false, CHANNELS),
        Architecture::Eos => (config.eos.turn != Turn::None, CHANNELS),
    };
    let channels = if turns { turning * width } else { width };
    (12.0 * channels * config.value_size() as f64, share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use fulgur_lightnet::lm::LanguageModel;
    use fulgur_lightnet::params::Outline;

    fn operations(architecture: Architecture, tied: bool, context: usize) -> f64 {
        let config = Config {
            vocab_size: 97,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: (architecture == Architecture::Llama).then_some(2),
            tie_word_embeddings: tied,
            ..Config::of(architecture)
        };
        let params = Outline::new();
        LanguageModel::new(&config, DType::F32, &params.builder()).unwrap();
        per_token(&config, &params.shapes().into_iter().collect(), context).all()
    }

    /// Products counted by hand: a layer's maps, its gated linear unit, the head.
    #[test]
    fn equals_a_count_by_hand() {
        let (glu, head) = (3.0 * 24.0 * 40.0, 97.0 * 24.0);
        let square = 24.0 * 24.0;
        let low_rank = 2.0 * 24.0 * 6.0;
        for tied in [false, true] {
            // Queries and outputs, keys and values of half as many heads; on average 8 of 15 tokens are seen.
            let maps = 2.0 * square + 2.0 * 24.0 * 12.0;
            let scores = 3.0 * 2.0 * 2.0 * 8.0 * 4.0 * 6.0;
            let llama = 6.0 * (3.0 * (maps + glu) + head) + 3.0 * scores;
            assert_eq!(operations(Architecture::Llama, tied, 15), llama);
            let state = 3.0 * 2.0 * 2.0 * 4.0 * 6.0 * 6.0;
            // Keys of the first layer turn, and are twice as many.
            let transnormer = 6.0 * (3.0 * (5.0 * square + glu) + head) + 4.0 * state;
            assert_eq!(operations(Architecture::Transnormer, tied, 15), transnormer);
            for (architecture, maps) in [
                (Architecture::Tnl, 4.0 * square + low_rank),
                (Architecture::Hgrn2, 4.0 * square),
                (Architecture::Lightnet, 4.0 * square + low_rank),
            ] {
                let all = 6.0 * (3.0 * (maps + glu) + head) + 3.0 * state;
                assert_eq!(operations(architecture, tied, 15), all);
                assert_eq!(operations(architecture, tied, 1500), all);
            }
        }
    }
}
