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

/// Operations of a token forward and backward, in windows of `context` tokens. `shapes` are those of all parameters.
pub(in crate::train::tasks) fn per_token(
    config: &Config,
    shapes: &BTreeMap<String, Vec<usize>>,
    context: usize,
) -> f64 {
    let table = config.vocab_size as f64 * config.hidden_size as f64;
    let products = shapes.iter().filter(|(name, _)| name.contains("_proj."));
    let layers: f64 = products
        .filter(|(_, shape)| shape.len() == 2)
        .map(|(_, shape)| values_of(shape) as f64)
        .sum();
    let mixers: f64 = (0..config.num_hidden_layers)
        .map(|layer| mixer(config, layer, context))
        .sum();
    6.0 * (layers + table) + mixers
}

/// What the mixer of a layer does besides its maps.
fn mixer(config: &Config, layer: usize, context: usize) -> f64 {
    let seen = context as f64 + 1.0;
    if config.softmax_layer(layer).is_some() {
        // Heads share the width of the model.
        return 6.0 * config.hidden_size as f64 * seen;
    }
    let width = config.head_width() as f64;
    // Half of the channels turn, or all of them: one that turns is two.
    let turning = if config.half_lrpe { 1.5 } else { 2.0 };
    let channels = match config.architecture {
        Architecture::Llama => return 6.0 * config.key_size() as f64 * seen,
        Architecture::Tnl | Architecture::Transnormer if config.lrpe_layers.contains(&layer) => {
            turning * width
        }
        Architecture::Cosformer2 | Architecture::Lightnet if config.use_lrpe => turning * width,
        // Cosine and sine.
        Architecture::Eos if config.eos.turn != Turn::None => 2.0 * width,
        _ => width,
    };
    12.0 * channels * config.value_size() as f64
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
        per_token(&config, &params.shapes().into_iter().collect(), context)
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
