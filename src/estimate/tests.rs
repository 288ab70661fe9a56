//! Numbers that are counted twice: by the estimate, and on the things themselves.

use std::collections::BTreeMap;
use std::fs;

use candle_core::{DType, Device, Tensor};
use candle_nn::Init;
use fulgur_lightnet::params::{Params, Precision, file};
use fulgur_tavdiffusion::codec::{Vocoder, VocoderConfig};

use super::*;
use crate::train::Optimiser;

fn recipe(text: &str) -> Recipe {
    Recipe::check(text.parse().unwrap(), "test.toml".into(), Path::new("runs/test")).unwrap()
}

const H100: Gpu = Gpu {
    peak: 989e12,
    bandwidth: 3.35e12,
};

/// A small vocoder: 64 bands, 16 channels, one block, no pool.
const VOCODER: &str = "task = 'vocoder'\n[vocoder]\nbatch = 3\n[vocoder.model]\nstack = [16, 1]\n";

fn stage(estimate: &Estimate, name: &str) -> Option<u64> {
    let found = estimate.stages.iter().find(|stage| stage.name == name);
    found.map(|stage| stage.bytes)
}

#[test]
fn memory_follows_the_settings_of_the_run() {
    let of = |train: &str| {
        Estimate::of_recipe(
            &recipe(&format!("{VOCODER}[train]\nmax_steps = 1\n{train}")),
            H100,
        )
        .unwrap()
    };
    let plain = of("");
    let n = plain.parameters;
    assert!(n > 10_000);
    for (name, bytes) in [
        ("weights", Some(4 * n)),
        ("gradients", Some(4 * n)),
        ("moments", Some(8 * n)),
        ("averages", Some(4 * n)),
        // Vocoders compute in f32, keep no pool, and this one uses no codec.
        ("rounded", None),
        ("pool", None),
        ("frozen", None),
        ("batch", Some(3 * 64_000 * 4)),
    ] {
        assert_eq!(stage(&plain, name), bytes, "{name}");
    }
    assert_eq!(plain.memory_bytes, 20 * n + 768_000);
    assert_eq!((plain.checkpoint_bytes, plain.disk_bytes), (Some(16 * n), 32 * n));
    assert_eq!(plain.kind, "task vocoder");
    let names: Vec<&str> = plain.parts.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(names, ["input", "output", "stack"]);
    assert_eq!(plain.parts.iter().map(|part| part.parameters).sum::<u64>(), n);

    let small = of("ema = 0.0\naccumulate = 4\ncompact = true\nkeep = 1\n[optimiser]\nmuon = ['output']");
    // The matrices of the output are 16 wide: too narrow for Muon.
    assert_eq!(stage(&small, "moments"), Some(8 * n));
    assert_eq!(
        (stage(&small, "averages"), stage(&small, "gradients")),
        (None, Some(8 * n))
    );
    assert_eq!(small.checkpoint_bytes, Some(4 * n + 4 * n));
}

#[test]
fn moments_are_those_that_the_optimiser_keeps() {
    let text = VOCODER.replace("[16, 1]", "[32, 1]");
    let recipe = recipe(&format!(
        "{text}[train]\nmax_steps = 1\n[optimiser]\nmuon = ['output']"
    ));
    let estimate = Estimate::of_recipe(&recipe, H100).unwrap();
    let params = Params::random(1, &Device::Cpu);
    let config = VocoderConfig {
        stack: [32, 1],
        ..VocoderConfig::default()
    };
    Vocoder::new(&config, &params.builder()).unwrap();
    let optimiser = Optimiser::new(&params, recipe.optimiser.clone()).unwrap();
    let kept: usize = optimiser.moments().values().map(Tensor::elem_count).sum();
    assert!((params.count()..2 * params.count()).contains(&kept));
    assert_eq!(stage(&estimate, "moments"), Some(4 * kept as u64));
}

#[test]
fn rounded_copies_are_those_of_matrices() {
    let text = "task = 'mel-codec'\n[train]\nmax_steps = 1\n[mel-codec.model]\nlatent_channels = 4\nencoder = [16, 1]\n\
                decoder = [16, 1]\n";
    let recipe = recipe(text);
    let estimate = Estimate::of_recipe(&recipe, H100).unwrap();
    let shapes = outline::needs(&recipe).unwrap().params.shapes();
    let matrices: usize = shapes
        .values()
        .filter(|shape| shape.len() == 2)
        .map(|shape| shape[0] * shape[1])
        .sum();
    assert_eq!(stage(&estimate, "rounded"), Some(2 * matrices as u64));
}

#[test]
fn steps_of_language_models_are_counted() {
    let of = |more: &str| {
        let text = format!(
            "task = 'lm'\n[lm]\nbatch = 16\ncontext = 2048\n{more}[lm.model]\narchitecture = 'tnl'\nlayers = 24\n\
             width = 1024\nhidden = 2816\nheads = 8\nvocabulary = 50304\n[train]\nmax_steps = 1\n"
        );
        Estimate::of_recipe(&recipe(&text), H100).unwrap()
    };
    let plain = of("");
    // A token and layer: two sums of 1024 in f32; of bf16 two norms, 2 x 2816, five widths of the mixer and a gate of 128.
    let layer = 4 * 2 * 1024 + 2 * (2 * 1024 + 2 * 2816 + 5 * 1024 + 128);
    let ends = 6 * 1024;
    assert_eq!(stage(&plain, "kept"), Some(16 * 2048 * (24 * layer + ends)));
    assert_eq!(plain.unknown, ["the work space of its operators"]);
    assert!(stage(&of("recompute = true\n"), "kept").unwrap() * 3 < stage(&plain, "kept").unwrap());
}

/// Milliseconds and GiB of docs/benchmarks-training.md, commit 22523e3, one H100.
#[test]
fn steps_of_language_models_take_what_was_measured() {
    for (architecture, batch, context, more, measured_ms, measured_gib) in [
        ("tnl", 16, 2048, "", 186.1, 32.1),
        ("hgrn2", 16, 2048, "", 202.0, 32.3),
        ("lightnet", 16, 2048, "", 215.6, 32.6),
        ("llama", 16, 2048, "", 210.1, 30.5),
        ("tnl", 1, 32768, "", 190.5, 32.5),
        ("tnl", 1, 131_072, "recompute = true\n", 917.4, 33.8),
    ] {
        let text = format!(
            "task = 'lm'\n[lm]\nbatch = {batch}\ncontext = {context}\n{more}[lm.model]\narchitecture = '{architecture}'\n\
             layers = 24\nwidth = 1024\nhidden = 2816\nheads = 8\nvocabulary = 50304\ntied = true\n\
             [train]\nmax_steps = 1\nema = 0.0\n"
        );
        let estimate = Estimate::of_recipe(&recipe(&text), H100).unwrap();
        let time = 1e3 * estimate.step_s.unwrap() / measured_ms;
        let memory = estimate.memory_bytes as f64 / f64::from(1u32 << 30) / measured_gib;
        assert!(
            (0.85..1.15).contains(&time),
            "{architecture} x {context}: time {time}"
        );
        assert!(
            (0.85..1.15).contains(&memory),
            "{architecture} x {context}: memory {memory}"
        );
    }
}

fn model(dir: &Path, names: &[(&str, (usize, usize))], precision: Precision) -> u64 {
    fs::create_dir_all(dir).unwrap();
    let params = Params::random(1, &Device::Cpu);
    let randn = Init::Randn {
        mean: 0.0,
        stdev: 1.0,
    };
    for (name, shape) in names {
        params.builder().get_with_hints(*shape, name, randn).unwrap();
    }
    let path = dir.join("model.safetensors");
    params.save(&path, &BTreeMap::new(), precision).unwrap();
    params.count() as u64
}

#[test]
fn a_model_is_counted_by_its_headers() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let names = [
        ("model.encoder.a", (40, 100)),
        ("model.encoder.b", (2, 3)),
        ("model.head", (8, 5)),
    ];
    for (precision, encoder) in [
        (Precision::F32, 4 * 4006),
        (Precision::F16, 2 * 4006),
        // 100 columns are two groups, each with a scale of two bytes.
        (Precision::EightBit, 4000 + 40 * 2 * 2 + 4 * 6),
        (Precision::SixBit, 3000 + 40 * 2 * 2 + 4 * 6),
    ] {
        let n = model(dir, &names, precision);
        let estimate = Estimate::of_model(dir).unwrap();
        assert_eq!((estimate.parameters, n), (4046, 4046));
        assert_eq!(estimate.memory_bytes, 4 * n, "{precision:?}");
        let found: Vec<_> = estimate
            .parts
            .iter()
            .map(|part| (part.name.as_str(), part.parameters, part.bytes))
            .collect();
        let head = if precision == Precision::F16 { 80 } else { 160 };
        assert_eq!(
            found,
            [("model.encoder", 4006, encoder), ("model.head", 40, head)],
            "{precision:?}"
        );
        let size = fs::metadata(dir.join("model.safetensors")).unwrap().len();
        assert_eq!((estimate.disk_bytes, estimate.checkpoint_bytes), (size, None));
    }
}

#[test]
fn folders_of_a_generator_are_its_parts_and_integers_are_no_parameters() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vocoder", "denoiser"] {
        model(
            &folder.path().join(name),
            &[("w", (4, 8)), ("v", (1, 3))],
            Precision::F16,
        );
    }
    fs::write(folder.path().join("model_index.json"), "{}").unwrap();
    let ids = Tensor::zeros(6, DType::I64, &Device::Cpu).unwrap();
    let ids = BTreeMap::from([("position_ids".to_owned(), ids)]);
    let path = folder.path().join("vocoder/extra.safetensors");
    file::write(&path, &ids, &BTreeMap::new(), Precision::F32).unwrap();
    let estimate = Estimate::of_model(folder.path()).unwrap();
    let found: Vec<_> = estimate
        .parts
        .iter()
        .map(|part| (part.name.as_str(), part.parameters, part.bytes))
        .collect();
    assert_eq!(found, [("denoiser", 35, 70), ("vocoder", 35, 70 + 48)]);
    assert_eq!(estimate.memory_bytes, 2 * 35 * 4 + 48);
}

#[test]
fn frozen_networks_are_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let codec = folder.path().join("codec");
    let text =
        format!("{VOCODER}[train]\nmax_steps = 1\n").replace("batch = 3", &format!("mel_codec = {codec:?}"));
    let estimate = Estimate::of_recipe(&recipe(&text), H100).unwrap();
    assert_eq!(stage(&estimate, "frozen"), None);
    assert!(
        estimate.unknown[0].contains("codec, which is not there yet"),
        "{:?}",
        estimate.unknown
    );
    model(&codec, &[("w", (10, 10))], Precision::F16);
    let estimate = Estimate::of_recipe(&recipe(&text), H100).unwrap();
    assert_eq!(stage(&estimate, "frozen"), Some(400));
    fs::write(codec.join("model.safetensors"), "broken").unwrap();
    let message = Estimate::of_recipe(&recipe(&text), H100).unwrap_err().to_string();
    assert!(message.contains("6 bytes are no safetensors file"), "{message}");
}

#[test]
fn damaged_and_absent_weights_are_one_line_errors() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let message = || {
        let message = Estimate::of_model(dir).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    };
    assert!(message().contains("no .safetensors file in it"));
    model(dir, &[("w", (10, 10))], Precision::F32);
    let path = dir.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(message().contains("model.safetensors"));
    }
    let cut = &whole[..whole.len() - 7];
    fs::write(&path, cut).unwrap();
    let words = format!("{} bytes, expected {}", cut.len(), whole.len());
    assert!(message().contains(&words));
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    fs::write(&path, huge).unwrap();
    assert!(message().contains("a header of 18446744073709551615 bytes"));
    assert!(Estimate::of_model(&dir.join("absent")).is_err());
}

/// Terabytes are estimated in a blink, and what no number holds stays at the largest one.
#[test]
fn sizes_beyond_all_memory_are_counted() {
    let text = VOCODER.replace("[16, 1]", "[1048576, 4]");
    let estimate = Estimate::of_recipe(&recipe(&format!("{text}[train]\nmax_steps = 1\n")), H100).unwrap();
    assert!(estimate.parameters > 24 << 40 && estimate.memory_bytes > 20 * estimate.parameters);
}

/// What each recipe of the repository asks for exists: an optional field was refused once.
#[test]
fn every_recipe_of_the_repository_is_understood() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut seen = 0;
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        // Studies lie there too.
        if crate::scaling::Study::load(&path).is_ok() {
            continue;
        }
        let recipe = Recipe::load(&path, &[]).unwrap();
        match Estimate::of_recipe(&recipe, H100) {
            Ok(estimate) => assert!(estimate.parameters > 100_000, "{}", recipe.task),
            // The judges' network depends on data that need not be here; not every task can be outlined.
            Err(error) => {
                let words = error.to_string();
                let known = words.contains("fulgur data fetch") || words.contains("are not known");
                assert!(known, "{words}");
            }
        }
        seen += 1;
    }
    assert!(seen >= 7, "{seen}");
}
