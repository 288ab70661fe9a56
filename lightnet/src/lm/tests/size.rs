//! How large models and their tapes are, and which shapes cannot be.

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::tape;

use super::{draw, shape};
use crate::lm::{Architecture, Config, LanguageModel};
use crate::params::Params;

/// Those whose memory is counted.
const COUNTED: [Architecture; 4] = [
    Architecture::Tnl,
    Architecture::Hgrn2,
    Architecture::Lightnet,
    Architecture::Llama,
];

/// What a tape holds is what is predicted; on the CPU LightNet is composed of other operators.
#[test]
fn steps_keep_what_is_predicted() -> Result<()> {
    for architecture in COUNTED {
        let config = shape(architecture);
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let kept = |tokens: usize| -> Result<f64> {
            let ids = Ids::new(&draw(2 * tokens, 31, "ids"), &[2, tokens], 31)?;
            let targets = Tensor::from_vec(draw(2 * tokens, 31, "targets"), (2, tokens), &Device::Cpu)?;
            let (loss, tape) = tape::record(|| model.loss(&ids, &targets, &Options::default()));
            loss?;
            Ok(tape.kept_bytes() as f64)
        };
        let found = kept(60)? - kept(20)?;
        let predicted = config.kept_bytes(2 * 40, DType::F32, false).unwrap() as f64;
        let ratio = found / predicted;
        // Phases, and gains that are cast.
        let most = if architecture == Architecture::Lightnet {
            2.0
        } else {
            1.01
        };
        assert!((1.0..most).contains(&ratio), "{architecture:?}: {ratio}");
    }
    Ok(())
}

/// GiB that a layer keeps at the shape of the benchmark, 16 windows of 2048 tokens.
#[test]
fn layers_of_the_benchmark_keep_about_a_gibibyte() {
    for (architecture, expected) in COUNTED.into_iter().zip([1.039, 1.031, 1.039, 0.970]) {
        let config = Config {
            hidden_size: 1024,
            intermediate_size: 2816,
            num_attention_heads: 8,
            num_hidden_layers: 24,
            ..shape(architecture)
        };
        let layers = |count| {
            let config = Config {
                num_hidden_layers: count,
                ..config.clone()
            };
            config.kept_bytes(16 * 2048, DType::BF16, false).unwrap()
        };
        let gibibytes = (layers(24) - layers(23)) as f64 / (1u64 << 30) as f64;
        assert!(
            (gibibytes - expected).abs() < 5e-4,
            "{architecture:?}: {gibibytes}"
        );
        let recomputed = config.kept_bytes(16 * 2048, DType::BF16, true).unwrap();
        assert!(recomputed * 4 < layers(24) * 2);
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    let refused = |change: fn(&mut Config)| {
        let mut config = shape(Architecture::Llama);
        change(&mut config);
        let error = config.check().unwrap_err().to_string();
        error.lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(
        refused(|c| c.num_attention_heads = 5),
        "hidden_size is 24, expected a multiple of num_attention_heads, 5"
    );
    assert!(refused(|c| c.num_key_value_heads = Some(3)).contains("a divisor of num_attention_heads, 2"));
    assert!(refused(|c| c.num_hidden_layers = 1_000_000_000_000).contains("expected 1 to 4096"));
    assert!(refused(|c| c.vocab_size = 0).starts_with("vocab_size is 0"));
    assert!(refused(|c| c.rms_norm_eps = f64::NAN).contains("a positive number"));
    assert!(refused(|c| c.hidden_size = 6).contains("an even width"));
}
