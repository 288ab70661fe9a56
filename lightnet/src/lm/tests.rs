use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;

use super::{Architecture, Config, LanguageModel};
use crate::config;
use crate::params::{Frozen, Params, file};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

fn shape(architecture: Architecture) -> Config {
    Config {
        architecture,
        vocab_size: 31,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        num_key_value_heads: None,
        head_dim: None,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_parameters: None,
        tie_word_embeddings: false,
        initializer_range: 0.3,
    }
}

const ALL: [Architecture; 4] = [
    Architecture::Tnl,
    Architecture::Hgrn2,
    Architecture::Lightnet,
    Architecture::Llama,
];

fn draw(count: usize, rows: u64, name: &str) -> Vec<u32> {
    let mut noise = Philox::named(5, name);
    (0..count).map(|_| (noise.next_u64() % rows) as u32).collect()
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

/// Logits of Hugging Face's LLaMA (`tests/golden/llama_logits.py`): grouped queries, tied, another base, both forms of config.
#[test]
fn logits_are_those_of_transformers() {
    let device = &Device::Cpu;
    let golden = file::read(Path::new(&format!("{GOLDEN}/llama_logits.safetensors")), device).unwrap();
    let ids = golden.tensors["input_ids"].to_dtype(DType::U32).unwrap();
    let models = [
        ("untied", "llama_untied", "llama_untied/config.json"),
        ("tied", "llama_tied", "llama_tied/config.json"),
        ("theta_500000", "llama_untied", "llama_theta_500000.json"),
    ];
    for (name, folder, shape) in models {
        let config: Config = config::read(Path::new(&format!("{GOLDEN}/{shape}"))).unwrap();
        let weights = format!("{GOLDEN}/{folder}/model.safetensors");
        let frozen = Frozen::open(Path::new(&weights), device).unwrap();
        let model = LanguageModel::new(&config, DType::F32, &frozen.builder()).unwrap();
        frozen.all_used().unwrap();
        let ids = Ids::of(&ids, config.vocab_size).unwrap();
        let found = model.logits(&ids).unwrap();
        let wanted = &golden.tensors[&format!("logits.{name}")];
        let square = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let error = (square(&(&found - wanted).unwrap()) / square(wanted)).sqrt();
        assert!(error < 2e-6, "{name}: {error:e}");
    }
}

#[test]
fn later_tokens_change_nothing_before_them() -> Result<()> {
    for architecture in ALL {
        let config = shape(architecture);
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let mut ids = draw(2 * 20, 31, "ids");
        let before = model.logits(&Ids::new(&ids, &[2, 20], 31)?)?;
        for at in [13, 33] {
            ids[at] = (ids[at] + 1) % 31;
        }
        let after = model.logits(&Ids::new(&ids, &[2, 20], 31)?)?;
        let part = |t: &Tensor, from, count| t.narrow(1, from, count);
        assert!(far(&part(&before, 0, 13)?, &part(&after, 0, 13)?)? < 1e-6);
        assert!(
            far(&part(&before, 13, 7)?, &part(&after, 13, 7)?)? > 1e-2,
            "{architecture:?}"
        );
    }
    Ok(())
}

/// The loss without logits is that of the logits, and recomputed layers have the same gradients.
#[test]
fn losses_and_gradients_do_not_depend_on_how_they_are_made() -> Result<()> {
    for architecture in ALL {
        let config = shape(architecture);
        let params = Params::random(3, &Device::Cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?;
        let ids = Ids::new(&draw(40, 31, "ids"), &[2, 20], 31)?;
        let targets = Tensor::from_vec(draw(40, 31, "targets"), (2, 20), &Device::Cpu)?;
        let run = |model: &LanguageModel| {
            let (loss, tape) = tape::record(|| model.loss(&ids, &targets, &Options::default()));
            let loss = loss?;
            Ok::<_, candle_core::Error>((loss.to_scalar::<f32>()?, tape.backward(&loss)?))
        };
        let (loss, kept) = run(&model)?;
        let logits = model.logits(&ids)?.reshape((40, 31))?;
        let direct = candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?.to_scalar::<f32>()?;
        assert!((loss - direct).abs() < 1e-5, "{architecture:?}: {loss} {direct}");
        let (again, recomputed) = run(&model.recomputed(true))?;
        assert_eq!(loss, again);
        for (name, var) in params.vars() {
            let (Some(kept), Some(recomputed)) = (kept.get(&var), recomputed.get(&var)) else {
                panic!("{architecture:?}: {name} has no gradient");
            };
            assert!(
                far(kept, recomputed)? <= 1e-6 * (1.0 + kept.abs()?.max_all()?.to_scalar::<f32>()?),
                "{name}"
            );
        }
    }
    Ok(())
}

/// What a tape holds is what is predicted; on the CPU LightNet is composed of other operators.
#[test]
fn steps_keep_what_is_predicted() -> Result<()> {
    for architecture in ALL {
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
        let predicted = config.kept_bytes(2 * 40, DType::F32, false) as f64;
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
    for (architecture, expected) in ALL.into_iter().zip([1.039, 1.031, 1.039, 0.970]) {
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
            config.kept_bytes(16 * 2048, DType::BF16, false)
        };
        let gibibytes = (layers(24) - layers(23)) as f64 / (1u64 << 30) as f64;
        assert!(
            (gibibytes - expected).abs() < 5e-4,
            "{architecture:?}: {gibibytes}"
        );
        let recomputed = config.kept_bytes(16 * 2048, DType::BF16, true);
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
