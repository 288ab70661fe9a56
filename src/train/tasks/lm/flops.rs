//! Floating-point operations of a language model.
//!
//! ```text
//! 6 P + 12 L H D^2       a token, with a recurrent mixer
//! 6 P + 6 L H D (N + 1)  a token, with softmax attention
//! ```
//!
//! P counts the weights of all products: those of the layers, and the head, also where it is the embedding; the lookup of the
//! embedding is no product. A product takes two operations a weight and token forward and four backward. A recurrent mixer
//! with L layers and H heads of width D updates a state of D x D and reads it: four operations an entry, and twice as many
//! backward; chunks and recomputation do more, which is not counted. Attention of N tokens that see the past makes two products
//! with (N + 1) / 2 keys and values on average.

use std::collections::BTreeMap;

use fulgur_lightnet::lm::{Architecture, Config};
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
    let (heads, width) = (config.num_attention_heads as f64, config.head_width() as f64);
    let mixer = match config.architecture {
        Architecture::Llama => 6.0 * width * (context as f64 + 1.0),
        Architecture::Tnl | Architecture::Hgrn2 | Architecture::Lightnet => 12.0 * width * width,
    };
    6.0 * (layers + table) + mixer * heads * config.num_hidden_layers as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use fulgur_lightnet::lm::LanguageModel;
    use fulgur_lightnet::params::Outline;

    fn operations(architecture: Architecture, tied: bool, context: usize) -> f64 {
        let config = Config {
            architecture,
            vocab_size: 97,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: (architecture == Architecture::Llama).then_some(2),
            head_dim: None,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_parameters: None,
            tie_word_embeddings: tied,
            initializer_range: 0.02,
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
