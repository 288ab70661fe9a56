use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;

use super::{
    Activation, Architecture, Config, Decay, DecaySchedule, EosConfig, Instance, LanguageModel, Oscillation,
    OutputGate, OutputNorm, SoftmaxLayers, Turn,
};
use crate::params::{Params, file};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

fn shape(architecture: Architecture) -> Config {
    let elementwise = architecture == Architecture::Hgrn1;
    Config {
        vocab_size: 31,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 3,
        num_attention_heads: if elementwise { 24 } else { 2 },
        head_dim: elementwise.then_some(1),
        initializer_range: 0.3,
        ..Config::of(architecture)
    }
}

const ALL: [Architecture; 8] = Architecture::ALL;

fn draw(count: usize, rows: u64, name: &str) -> Vec<u32> {
    let mut noise = Philox::named(5, name);
    (0..count).map(|_| (noise.next_u64() % rows) as u32).collect()
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

fn square(t: &Tensor) -> Result<f32> {
    t.sqr()?.sum_all()?.to_scalar()
}

/// Logits of the libraries whose names we take (`tests/golden/*_logits.py`, `llama_variants.py`): a folder, the file and the
/// name of its logits, and another configuration, where there is one.
#[test]
fn logits_are_those_of_the_libraries() {
    let device = &Device::Cpu;
    let models = [
        ("llama_untied", "llama_logits", "untied", None),
        ("llama_tied", "llama_logits", "tied", None),
        (
            "llama_untied",
            "llama_logits",
            "theta_500000",
            Some("llama_theta_500000.json"),
        ),
        ("llama_scaled", "llama_variants", "llama3", None),
        (
            "llama_scaled",
            "llama_variants",
            "linear",
            Some("llama_linear.json"),
        ),
        ("hgrn2_bounded", "hgrn2_logits", "bounded", None),
        ("hgrn2_tied", "hgrn2_logits", "tied", None),
        ("hgrn2_plain", "hgrn2_logits", "plain", None),
        ("hgrn2_conv", "hgrn2_logits", "conv", None),
        ("hgrn2_hybrid", "hgrn2_logits", "hybrid", None),
        ("lightnet_hybrid", "lightnet_logits", "hybrid", None),
        ("lightnet_square", "lightnet_logits", "square", None),
        ("lightnet_narrow", "lightnet_logits", "narrow", None),
        ("lightnet_conv", "lightnet_logits", "conv", None),
        ("transnormer_mixed", "transnormer_logits", "mixed", None),
    ];
    for (folder, file, name, other) in models {
        let golden = Path::new(GOLDEN);
        let values = file::read(&golden.join(format!("{file}.safetensors")), device).unwrap();
        let mut dir = golden.join(folder);
        let copy = tempfile::tempdir().unwrap();
        if let Some(config) = other {
            for entry in std::fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
            }
            std::fs::copy(golden.join(config), copy.path().join("config.json")).unwrap();
            dir = copy.path().to_owned();
        }
        let model = LanguageModel::load(&dir, None, DType::F32, device).unwrap();
        let ids = values.tensors["input_ids"].to_dtype(DType::U32).unwrap();
        let ids = Ids::of(&ids, model.config().vocab_size).unwrap();
        let found = model.logits(&ids).unwrap();
        let wanted = &values.tensors[&format!("logits.{name}")];
        let error = (square(&(&found - wanted).unwrap()).unwrap() / square(wanted).unwrap()).sqrt();
        assert!(error < 4e-6, "{folder} {name}: {error:e}");
    }
}

/// Every architecture, and what configurations may change in it.
fn variants() -> Vec<(&'static str, Config)> {
    use Architecture::{Cosformer2, Hgrn1, Hgrn2, Lightnet, Llama, Tnl, Transnormer};
    type Change = fn(&mut Config);
    let changes: [(&'static str, Architecture, Change); 26] = [
        ("tnl", Tnl, |_| ()),
        ("tnl, norm a head, gate first", Tnl, |c| {
            (c.norm_per_head, c.gate_first) = (true, true);
        }),
        ("tnl, layer norm a head", Tnl, |c| {
            (c.norm_per_head, c.output_norm) = (true, OutputNorm::Layer);
        }),
        ("tnl, layer norm, 1 + elu", Tnl, |c| {
            (c.output_norm, c.linear_act) = (OutputNorm::Layer, Activation::OnePlusElu);
        }),
        ("tnl, lrpe and no decay", Tnl, |c| {
            (c.lrpe_layers, c.decay_schedule) = (vec![0, 2], DecaySchedule::None);
        }),
        ("tnl, short convolutions", Tnl, |c| c.conv_size = Some(4)),
        ("tnl, narrow keys, tied", Tnl, |c| {
            (c.head_dim, c.tie_word_embeddings) = (Some(5), true);
        }),
        ("tnl, hybrid", Tnl, |c| c.attn = hybrid()),
        ("transnormer", Transnormer, |_| ()),
        ("transnormer, biases, linear decays", Transnormer, |c| {
            (c.attention_bias, c.mlp_bias) = (true, true);
            c.decay_schedule = DecaySchedule::Linear8;
        }),
        ("hgrn1", Hgrn1, |_| ()),
        ("hgrn1, short convolutions, exclusive bounds", Hgrn1, |c| {
            (c.conv_size, c.exclusive_lower_bound) = (Some(3), true);
        }),
        ("hgrn2", Hgrn2, |_| ()),
        ("hgrn2, no bounds, convolutions", Hgrn2, |c| {
            (c.use_lower_bound, c.conv_size) = (false, Some(3));
        }),
        ("hgrn2, sigmoid, silu values", Hgrn2, |c| {
            (c.linear_act, c.value_act) = (Activation::Sigmoid, Activation::Silu);
        }),
        ("hgrn2, hybrid, no gain", Hgrn2, |c| {
            (c.attn, c.elementwise_affine, c.hidden_act) = (hybrid(), false, Activation::None);
        }),
        ("cosformer2", Cosformer2, |_| ()),
        ("cosformer2, learnt, all channels, no tpe", Cosformer2, |c| {
            (c.learn_theta, c.half_lrpe, c.use_tpe) = (true, false, false);
        }),
        ("lightnet", Lightnet, |_| ()),
        ("lightnet, seeded, convolutions, silu gate", Lightnet, |c| {
            (c.seeded, c.conv_size, c.output_gate) = (true, Some(2), OutputGate::Silu);
        }),
        ("lightnet, tpe and lrpe", Lightnet, |c| {
            (c.use_tpe, c.use_lrpe, c.learn_theta, c.tpe_residual) = (true, true, true, true);
        }),
        ("lightnet, half lrpe, seeded", Lightnet, |c| {
            (c.use_lrpe, c.half_lrpe, c.seeded) = (true, true, true);
        }),
        ("lightnet, scalar decay", Lightnet, |c| c.decay = Decay::Scalar),
        ("lightnet, tied scalar decay, lrpe, hybrid", Lightnet, |c| {
            (c.decay, c.use_lrpe, c.attn) = (Decay::Tied, true, hybrid());
        }),
        ("llama", Llama, |_| ()),
        ("llama, groups, biases, head_dim", Llama, |c| {
            (c.num_key_value_heads, c.head_dim) = (Some(1), Some(6));
            (c.attention_bias, c.mlp_bias) = (true, true);
        }),
    ];
    let of = |(name, architecture, change): (_, _, Change)| {
        let mut config = shape(architecture);
        change(&mut config);
        (name, config)
    };
    let mut all: Vec<_> = changes.into_iter().map(of).collect();
    let small = Config {
        head_dim: Some(3),
        ..shape(Architecture::Eos)
    };
    all.extend(Instance::ALL.map(|instance| {
        let mut config = instance.of(&small);
        // Differences across a bend are no slope.
        if config.linear_act == Activation::Relu {
            config.linear_act = Activation::Silu;
        }
        (instance.name(), config)
    }));
    let turned = |name, oscillation, fixed, turn| {
        let mut config = small.clone();
        config.eos = EosConfig {
            oscillation,
            fixed,
            turn,
            ..EosConfig::default()
        };
        (name, config)
    };
    all.extend([
        turned("eos, values, turning", Oscillation::Values, false, Turn::Rows),
        turned(
            "eos, fixed columns",
            Oscillation::ConstantValues,
            true,
            Turn::None,
        ),
        turned(
            "eos, rows by columns",
            Oscillation::KeysByConstantValues,
            false,
            Turn::Data,
        ),
        turned(
            "eos, cumulative keys",
            Oscillation::Cumulative,
            false,
            Turn::Shared,
        ),
        turned("eos, a head", Oscillation::Head, false, Turn::Rows),
    ]);
    all
}

/// The second of three layers is softmax attention.
fn hybrid() -> Vec<SoftmaxLayers> {
    vec![SoftmaxLayers {
        layers: vec![1],
        num_heads: 6,
        num_kv_heads: Some(2),
        qkv_bias: true,
        window_size: None,
        rope_theta: 100.0,
    }]
}

/// A prompt in pieces of any length, then token by token: the logits of all at once. With it the forms for decoding and for
/// training agree.
#[test]
fn prefill_and_steps_are_the_whole() -> Result<()> {
    const TOKENS: usize = 83;
    for (name, config) in variants() {
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let ids = draw(2 * TOKENS, 31, "ids");
        let whole = model.logits(&Ids::new(&ids, &[2, TOKENS], 31)?)?;
        let piece = |from: usize, count: usize| -> Vec<u32> {
            let row = |batch: usize| &ids[batch * TOKENS + from..][..count];
            [row(0), row(1)].concat()
        };
        for cuts in [vec![TOKENS - 9], vec![0], vec![64, 67, 68]] {
            let (mut state, mut found, mut from) = (model.start(), Vec::new(), 0);
            for cut in cuts.into_iter().filter(|&cut| cut > 0) {
                let part = Ids::new(&piece(from, cut - from), &[2, cut - from], 31)?;
                found.push(model.extend(&part, &mut state)?);
                from = cut;
            }
            // A fork goes its own way.
            let mut fork = state.clone();
            if from > 0 {
                model.step(&[1, 2], &mut fork)?;
            }
            for at in from..TOKENS {
                found.push(model.step(&piece(at, 1), &mut state)?.unsqueeze(1)?);
            }
            let found = Tensor::cat(&found, 1)?;
            let error = (square(&(&found - &whole)?)? / square(&whole)?).sqrt();
            assert!(error < 1e-5, "{name}, from {from}: {error:e}");
            assert_eq!(state.tokens(), TOKENS);
        }
    }
    Ok(())
}

/// A step that finds ids and position in tensors and writes states over those before it is the ordinary one, bit for bit.
#[test]
fn steps_that_read_their_tokens_late_are_steps() -> Result<()> {
    let cpu = &Device::Cpu;
    let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    };
    let (mut models, mut written_over) = (0, 0);
    for (name, config) in variants() {
        // Keys and values grow, so that no step of theirs is recorded.
        if config.growth(DType::F32) > 0 {
            continue;
        }
        let params = Params::random(3, cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?.rounded(DType::F32)?;
        let mut state = model.start();
        model.prefill(&Ids::new(&draw(14, 31, "prompt"), &[2, 7], 31)?, &mut state)?;
        let mut places = state.copied()?;
        for token in 0..4u32 {
            let chosen = [3 * token + 1, 30 - token];
            let wanted = model.step(&chosen, &mut state)?;
            let input = Tensor::new(&[chosen[0], chosen[1], 7 + token], cpu)?;
            // What the host counts is wrong, and must not be seen.
            let mut next = places.clone().at(1000).in_place();
            let found = model.step_at(&input.narrow(0, 0, 2)?, &input.narrow(0, 2, 1)?, &mut next)?;
            assert_eq!(bits(&found)?, bits(&wanted)?, "{name}");
            let (next, before) = (next.copied()?, places.tensors());
            for (tensor, wanted) in state.tensors() {
                let found = bits(&next.tensors()[&tensor])?;
                assert_eq!(found, bits(&wanted)?, "{name}: {tensor}");
                written_over += usize::from(bits(&before[&tensor])? == found);
            }
            places = next;
        }
        models += 1;
    }
    assert!(models > 15 && written_over > 100, "{models}, {written_over}");
    Ok(())
}

/// A model for decoding is the model: with weights of 32 bits, and with 16 one whose weights had been rounded before.
#[test]
fn rounded_models_are_the_models_of_rounded_weights() -> Result<()> {
    const TOKENS: usize = 40;
    let cpu = &Device::Cpu;
    for (name, config) in variants() {
        let params = Params::random(3, cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?;
        let rounded: HashMap<String, Tensor> = params
            .vars()
            .into_iter()
            .map(|(name, weight)| {
                // Maps and heads are the matrices, but for the embedding, the map of TPE behind it, and steps of state spaces.
                let is_exact = ["embed", "tpe.", "dt_proj."]
                    .iter()
                    .any(|part| name.contains(part));
                let is_map = weight.rank() == 2 && name.ends_with(".weight") && !is_exact;
                let exact = weight.as_detached_tensor();
                let weight = match is_map {
                    true => exact.to_dtype(DType::BF16)?.to_dtype(DType::F32)?,
                    false => exact,
                };
                Ok((name, weight))
            })
            .collect::<Result<_>>()?;
        // A head that is the embedding is rounded, and the embedding is not.
        let head = rounded.iter().find(|(name, _)| name.contains("embed"));
        let head = head.map(|(_, table)| table.to_dtype(DType::BF16)?.to_dtype(DType::F32));
        let mut rounded = rounded.clone();
        if let Some(head) = head.filter(|_| config.tie_word_embeddings) {
            rounded.insert("lm_head.weight".to_owned(), head?);
        }
        let untied = Config {
            tie_word_embeddings: false,
            ..config.clone()
        };
        let builder = VarBuilder::from_tensors(rounded, DType::F32, cpu);
        let wanted = [model.clone(), LanguageModel::new(&untied, DType::F32, &builder)?];
        let ids = draw(TOKENS, 31, "ids");
        for (weights, wanted) in [DType::F32, DType::BF16].into_iter().zip(wanted) {
            let whole = wanted.logits(&Ids::new(&ids, &[1, TOKENS], 31)?)?;
            let model = model.clone().rounded(weights)?;
            let mut state = model.start();
            let mut found = vec![model.extend(&Ids::new(&ids[..23], &[1, 23], 31)?, &mut state)?];
            for id in &ids[23..] {
                found.push(model.step(&[*id], &mut state)?.unsqueeze(1)?);
            }
            let found = Tensor::cat(&found, 1)?;
            let error = (square(&(&found - &whole)?)? / square(&whole)?).sqrt();
            assert!(error < 1e-5, "{name}, {weights:?}: {error:e}");
        }
    }
    Ok(())
}

/// Packed sequences have the losses of each by itself, or are refused.
#[test]
fn packed_sequences_are_separate() -> Result<()> {
    let borders = [0, 1, 8, 8, 21];
    let ids = draw(21, 31, "packed ids");
    let targets = draw(21, 31, "packed targets");
    let (mut alike, mut refused) = (0, 0);
    for (name, config) in variants() {
        let rows = config.vocab_size;
        let params = Params::random(3, &Device::Cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?;
        let whole = Ids::new(&ids, &[1, 21], rows)?;
        let all = Tensor::new(&targets[..], &Device::Cpu)?.reshape((1, 21))?;
        let found = match model.packed_losses(&whole, &all, &borders, &Options::default()) {
            Ok(found) => found,
            Err(error) => {
                let line = error.to_string();
                assert!(line.contains("packed sequences are not for"), "{name}: {line}");
                assert!(
                    config.conv_size.is_some()
                        || config.use_tpe
                        || matches!(config.architecture, Architecture::Lightnet | Architecture::Eos),
                    "{name}: {line}"
                );
                refused += 1;
                continue;
            }
        };
        let mut parts = Vec::new();
        for pair in borders.windows(2).filter(|pair| pair[0] < pair[1]) {
            let part = Ids::new(&ids[pair[0]..pair[1]], &[1, pair[1] - pair[0]], rows)?;
            let targets = all.narrow(1, pair[0], pair[1] - pair[0])?.contiguous()?;
            parts.push(model.losses(&part, &targets, &Options::default())?);
        }
        let expected = Tensor::cat(&parts, 0)?;
        // Losses of about 3.4 in f32, whose chunks begin elsewhere.
        assert!(
            far(&found, &expected)? < 3e-5,
            "{name}: {}",
            far(&found, &expected)?
        );
        let crossing = model.losses(&whole, &all, &Options::default())?;
        assert!(
            far(&crossing, &expected)? > 1e-4,
            "{name}: borders change nothing"
        );
        let again = model.clone().recomputed(true);
        let mean = again.packed_loss(&whole, &all, &borders, &Options::default())?;
        assert!(far(&mean, &expected.mean_all()?)? < 1e-5, "{name}");
        alike += 1;
    }
    assert!(alike >= 8 && refused >= 2, "{alike} alike, {refused} refused");
    Ok(())
}

#[test]
fn states_do_not_grow_but_for_softmax_attention() -> Result<()> {
    for (name, config) in variants() {
        let model = LanguageModel::new(&config, DType::F32, &Params::random(3, &Device::Cpu).builder())?;
        let mut state = model.start();
        let mut bytes = |tokens: usize| {
            model.prefill(&Ids::new(&draw(tokens, 31, "ids"), &[1, tokens], 31)?, &mut state)?;
            Ok::<_, candle_core::Error>(state.bytes())
        };
        let (first, second) = (bytes(5)?, bytes(11)?);
        let softmax = config.architecture == Architecture::Llama || !config.attn.is_empty();
        assert_eq!(second > first, softmax, "{name}: {first} {second}");
        assert_eq!(config.growth(DType::F32), (second - first) as u64 / 11, "{name}");
        assert!(first > 0, "{name}");
        let line = model.step(&[1, 2], &mut state).unwrap_err().to_string();
        assert!(line.starts_with("2 sequences, expected 1"), "{line}");
        assert!(model.step(&[31], &mut state).is_err());
        assert_eq!((state.tokens(), state.bytes()), (16, second));
    }
    Ok(())
}

/// For every parameter: how the loss moves along its gradient is the length of the gradient.
#[test]
fn gradients_are_those_of_the_loss() -> Result<()> {
    let mut both = variants();
    both.push(("lightnet in both directions", bidirectional()));
    for (name, config) in both {
        let params = Params::random(7, &Device::Cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?;
        let ids = Ids::new(&draw(26, 31, "ids"), &[2, 13], 31)?;
        let targets = Tensor::from_vec(draw(26, 31, "targets"), (2, 13), &Device::Cpu)?;
        let options = Options::default();
        let (loss, tape) = tape::record(|| model.loss(&ids, &targets, &options));
        let gradients = tape.backward(&loss?)?;
        for (parameter, var) in params.vars() {
            let Some(gradient) = gradients.get(&var) else {
                panic!("{name}: {parameter} has no gradient");
            };
            let length = square(gradient)?.sqrt();
            if length < 1e-4 {
                continue;
            }
            let start = var.as_detached_tensor().copy()?;
            // The change is about 1e-2 of a loss of 3: larger than its rounding, smaller than its curve.
            let step = f64::from((4e-3 / length).min(3e-2));
            let at = |steps: f64| {
                let moved = (&start + (gradient * (steps * step / f64::from(length)))?)?;
                var.set(&moved)?;
                let loss = model.loss(&ids, &targets, &options)?.to_scalar::<f32>()?;
                Ok::<_, candle_core::Error>(f64::from(loss))
            };
            // Two steps, so that the third derivative cancels.
            let [near, wide] = [at(0.5)? - at(-0.5)?, at(1.0)? - at(-1.0)?].map(|change| change / step);
            let slope = (8.0 * near - wide) / 6.0;
            var.set(&start)?;
            let error = (slope / f64::from(length) - 1.0).abs();
            assert!(
                error < 5e-3,
                "{name}: {parameter} has slope {slope:e}, its gradient {length:e}"
            );
        }
    }
    Ok(())
}

fn bidirectional() -> Config {
    Config {
        bidirectional: true,
        use_tpe: true,
        use_lrpe: true,
        half_lrpe: true,
        learn_theta: true,
        ..shape(Architecture::Lightnet)
    }
}

/// In both directions every token sees every other one, but for padding, and the order is seen by positions alone.
#[test]
fn both_directions_see_all_but_padding() -> Result<()> {
    let model = |config: Config| {
        let params = Params::random(3, &Device::Cpu);
        LanguageModel::new(&config, DType::F32, &params.builder())
    };
    let ids = draw(20, 31, "ids");
    let logits = |model: &LanguageModel, ids: &[u32]| model.logits(&Ids::new(ids, &[1, 20], 31)?);
    let whole = model(bidirectional())?;
    let before = logits(&whole, &ids)?;
    let mut other = ids.clone();
    other[19] = (other[19] + 1) % 31;
    assert!(
        far(
            &before.narrow(1, 0, 1)?,
            &logits(&whole, &other)?.narrow(1, 0, 1)?
        )? > 1e-3
    );

    let plain = model(Config {
        bidirectional: true,
        ..shape(Architecture::Lightnet)
    })?;
    let mask: Vec<u8> = (0..20).map(|at| u8::from(at < 15)).collect();
    let mask = Tensor::from_vec(mask, (1, 20), &Device::Cpu)?;
    let masked = |ids: &[u32]| {
        plain
            .masked_logits(&Ids::new(ids, &[1, 20], 31)?, &mask)?
            .narrow(1, 0, 15)
    };
    assert!(far(&masked(&ids)?, &masked(&other)?)? < 1e-6);
    let short = plain.logits(&Ids::new(&ids[..15], &[1, 15], 31)?)?;
    assert!(far(&masked(&ids)?, &short)? < 1e-4);
    // Softmax attention sees as much, and as little of padding.
    let softmax = model(Config {
        bidirectional: true,
        ..shape(Architecture::Llama)
    })?;
    let first = |ids: &[u32]| logits(&softmax, ids)?.narrow(1, 0, 1);
    assert!(far(&first(&ids)?, &first(&other)?)? > 1e-3);
    let kept = softmax.masked_logits(&Ids::new(&other, &[1, 20], 31)?, &mask)?;
    let short = softmax.logits(&Ids::new(&ids[..15], &[1, 15], 31)?)?;
    assert!(far(&kept.narrow(1, 0, 15)?, &short)? < 1e-4);
    // Without positions the tokens are a set.
    let mut swapped = ids.clone();
    swapped.reverse();
    let reversed = logits(&plain, &swapped)?;
    assert!(
        far(
            &logits(&plain, &ids)?.get_on_dim(1, 3)?,
            &reversed.get_on_dim(1, 16)?
        )? < 1e-4
    );
    assert!(
        plain
            .extend(&Ids::new(&ids, &[1, 20], 31)?, &mut plain.start())
            .is_err()
    );
    Ok(())
}

/// HGRN2 with heads of width 1 is HGRN1.
#[test]
fn heads_of_one_channel_are_the_element_wise_recurrence() -> Result<()> {
    let params = Params::random(3, &Device::Cpu);
    let one = LanguageModel::new(&shape(Architecture::Hgrn1), DType::F32, &params.builder())?;
    let config = Config {
        num_attention_heads: 24,
        head_dim: Some(1),
        ..shape(Architecture::Hgrn2)
    };
    let two = LanguageModel::new(&config, DType::F32, &params.builder())?;
    let ids = Ids::new(&draw(100, 31, "ids"), &[2, 50], 31)?;
    assert!(far(&one.logits(&ids)?, &two.logits(&ids)?)? < 1e-4);
    Ok(())
}

/// Without frequencies cosFormer2 is TNL without decay and with plain values; with them, offsets alone count.
#[test]
fn cosines_weigh_offsets() -> Result<()> {
    let without = Config {
        use_tpe: false,
        ..shape(Architecture::Cosformer2)
    };
    let params = Params::random(3, &Device::Cpu);
    let builder = params.builder();
    let still = Config {
        use_lrpe: false,
        ..without.clone()
    };
    let linear = Config {
        value_act: Activation::None,
        decay_schedule: DecaySchedule::None,
        ..shape(Architecture::Tnl)
    };
    let ids = draw(30, 31, "ids");
    let run = |config: &Config| {
        LanguageModel::new(config, DType::F32, &builder)?.logits(&Ids::new(&ids, &[1, 30], 31)?)
    };
    assert_eq!(far(&run(&still)?, &run(&linear)?)?, 0.0);
    let turned = run(&without)?;
    assert!(far(&turned, &run(&still)?)? > 1e-2);
    // A state that is empty but stands further on.
    let model = LanguageModel::new(&without, DType::F32, &builder)?;
    let mut later = model.start();
    later.advance(1, 1000)?;
    let shifted = model.extend(&Ids::new(&ids, &[1, 30], 31)?, &mut later)?;
    assert!(far(&turned, &shifted)? < 1e-3, "{}", far(&turned, &shifted)?);
    Ok(())
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
