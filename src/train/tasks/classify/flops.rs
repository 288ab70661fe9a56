//! Floating-point operations of a classifier of pictures.
//!
//! ```text
//! a picture     6 P_h + N (6 (P + (stages - 1) P_m) + sum over layers of the mixer)
//! the mixer     12 ways H D E     a recurrence, D doubled by MD-LRPE
//!               12 N H D          softmax attention
//! ```
//!
//! N tokens go through P weights of products, of which P_m are those of mixers; the head has P_h. A product takes two operations a
//! weight and token forward and four backward.

use std::collections::BTreeMap;

use fulgur_lightnet::mixer::causal::Form;
use fulgur_lightnet::params::outline::values_of;
use fulgur_lightnet::vision::{Config, Mixer};

/// Forward and backward, of one picture of the size that the model is made for. `shapes` are those of all parameters.
pub(in crate::train::tasks) fn per_picture(config: &Config, shapes: &BTreeMap<String, Vec<usize>>) -> f64 {
    let [height, width] = config.image_size.map(|side| (side / config.patch_size) as f64);
    let tokens = height * width;
    let products = |wanted: &dyn Fn(&str) -> bool| -> f64 {
        let maps = shapes
            .iter()
            .filter(|(name, shape)| shape.len() == 2 && name.ends_with(".weight") && wanted(name));
        maps.map(|(_, shape)| values_of(shape) as f64).sum()
    };
    let head = products(&|name| name.starts_with("head."));
    let all = products(&|_| true) - head;
    let mixers = products(&|name| name.contains(".mixer."));
    let (stages, ways) = match config.form {
        Form::Whole | Form::Causal => (1.0, 1.0),
        Form::Parallel => (1.0, 2.0),
        Form::Series => (2.0, 2.0),
        Form::Parallel2d => (1.0, 4.0),
        Form::Series2d => (2.0, 4.0),
    };
    let (model, head_width) = (config.hidden_size as f64, config.head_width() as f64);
    let recurrence = match config.mixer {
        Mixer::Softmax => 12.0 * tokens * model,
        _ => 12.0 * ways * model * head_width * if config.lrpe { 2.0 } else { 1.0 },
    };
    let layers = config.num_hidden_layers as f64;
    6.0 * head + tokens * (6.0 * (all + (stages - 1.0) * mixers) + layers * recurrence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use fulgur_lightnet::params::Outline;
    use fulgur_lightnet::vision::{Classifier, Size, Tpe};

    #[test]
    fn equals_a_count_by_hand() {
        let labels = vec!["a".to_owned(), "b".to_owned()];
        let base = Config {
            image_size: [8, 12],
            num_channels: 1,
            patch_size: 4,
            image_mean: vec![0.5],
            image_std: vec![0.5],
            hidden_size: 16,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            intermediate_size: 20,
            ..Config::of(Size::Tiny, labels)
        };
        let (square, tokens) = (256.0, 6.0);
        let around = 16.0 * 16.0 + 2.0 * square + 3.0 * 3.0 * 16.0 * 20.0;
        for (mixer, form, maps, stages, recurrence) in [
            (
                Mixer::LightNet,
                Form::Whole,
                4.0 * square + 256.0,
                1.0,
                24.0 * 128.0,
            ),
            (Mixer::Softmax, Form::Whole, 4.0 * square, 1.0, 12.0 * 6.0 * 16.0),
            (
                Mixer::Hgrn2,
                Form::Parallel2d,
                4.0 * square,
                1.0,
                4.0 * 24.0 * 128.0,
            ),
            (
                Mixer::Tnl,
                Form::Series,
                4.0 * square + 256.0,
                2.0,
                2.0 * 24.0 * 128.0,
            ),
        ] {
            for tpe in [Tpe::TwoSided, Tpe::None] {
                let config = Config {
                    mixer,
                    form,
                    tpe,
                    ..base.clone()
                };
                let outline = Outline::new();
                Classifier::new(&config, DType::F32, &outline.builder()).unwrap();
                let once = if tpe == Tpe::None {
                    around - 2.0 * square
                } else {
                    around
                };
                let products = 6.0 * (once + stages * 3.0 * maps);
                let expected = 6.0 * 32.0 + tokens * (products + 3.0 * recurrence);
                let shapes = outline.shapes();
                assert_eq!(per_picture(&config, &shapes), expected, "{mixer:?} {tpe:?}");
            }
        }
    }
}
