use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;

use super::*;
use crate::lm;
use crate::mixer::causal::{CausalContext, Form, Hgrn2, Tnl};
use crate::params::{Outline, Params};

const CPU: &Device = &Device::Cpu;

fn config(mixer: Mixer, form: Form) -> Config {
    Config {
        image_size: [8, 8],
        num_channels: 1,
        patch_size: 2,
        image_mean: vec![0.5],
        image_std: vec![0.5],
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 20,
        mixer,
        form,
        ..Config::of(Size::Tiny, ["a", "b", "c"].map(str::to_owned).to_vec())
    }
}

/// Every mixer, the scanning ones in every form.
fn all() -> Vec<Config> {
    let scans = Form::ALL.into_iter().filter(|&form| form != Form::Whole);
    let scanning: Vec<Config> = scans
        .flat_map(|form| [config(Mixer::Hgrn2, form), config(Mixer::Tnl, form)])
        .collect();
    let whole = [Mixer::LightNet, Mixer::Softmax].map(|mixer| config(mixer, Form::Whole));
    [whole.to_vec(), scanning].concat()
}

fn name(config: &Config) -> String {
    format!("{} {}", config.mixer.name(), config.form.name())
}

fn model(config: &Config) -> Result<(Params, Classifier)> {
    let params = Params::random(3, CPU);
    let model = Classifier::new(config, DType::F32, &params.builder())?;
    Ok((params, model))
}

fn random(shape: &[usize], name: &str) -> Result<Tensor> {
    let values = Philox::named(1, name).normals(shape.iter().product());
    Tensor::from_vec(values, shape, CPU)
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

fn flip(x: &Tensor, axis: usize) -> Result<Tensor> {
    let ids: Vec<u32> = (0..x.dim(axis)? as u32).rev().collect();
    x.contiguous()?.index_select(&Tensor::new(ids, CPU)?, axis)
}

/// For every parameter: how the loss moves along its gradient is the length of the gradient.
#[test]
fn gradients_are_those_of_the_loss() -> Result<()> {
    for mut config in all() {
        config.layer_scale = Some(0.7);
        config.token_shift = true;
        let (params, model) = model(&config)?;
        let pixels = random(&[3, 1, 6, 8], "pixels")?;
        let kept = Tensor::new(
            &[
                [1.25f32, 0.0, 1.25],
                [0.0, 1.25, 1.25],
                [1.25; 3],
                [1.0, 2.0, 0.5],
            ],
            CPU,
        )?;
        let targets = Tensor::new(&[[0.9f32, 0.1, 0.0], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6]], CPU)?;
        let loss = || soft_cross_entropy(&model.logits(&pixels, Some(&kept))?, &targets);
        // The head of a fresh model hides what is before it.
        let head = &params.vars()["head.weight"];
        head.set(&(head.as_tensor() * 50.0)?)?;
        let (value, tape) = tape::record(loss);
        let gradients = tape.backward(&value?)?;
        let name = name(&config);
        let mut seen = 0;
        for (parameter, var) in params.vars() {
            let Some(gradient) = gradients.get(&var) else {
                panic!("{name}: {parameter} has no gradient");
            };
            let length = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
            if length < 1e-3 {
                continue;
            }
            seen += 1;
            let start = var.as_detached_tensor().copy()?;
            let step = f64::from((4e-3 / length).min(3e-2));
            let at = |steps: f64| {
                let moved = (&start + (gradient * (steps * step / f64::from(length)))?)?;
                var.set(&moved)?;
                Ok::<_, candle_core::Error>(f64::from(loss()?.to_scalar::<f32>()?))
            };
            // Two steps, so that the third derivative cancels.
            let [near, wide] = [at(0.5)? - at(-0.5)?, at(1.0)? - at(-1.0)?].map(|change| change / step);
            let slope = (8.0 * near - wide) / 6.0;
            var.set(&start)?;
            let error = (slope / f64::from(length) - 1.0).abs();
            assert!(
                error < 1e-2,
                "{name}: {parameter} has slope {slope:e}, its gradient {length:e}"
            );
        }
        assert!(
            2 * seen > params.vars().len(),
            "{name}: {seen} of {}",
            params.vars().len()
        );
    }
    Ok(())
}

/// Logits of a picture do not depend on the others of its batch, and pictures of other sizes than the model's go through.
#[test]
fn pictures_of_any_size_have_logits_of_their_own() -> Result<()> {
    for config in all() {
        let (_, model) = model(&config)?;
        for sides in [[8, 8], [4, 10], [24, 20]] {
            let pixels = random(&[3, 1, sides[0], sides[1]], "pixels")?;
            let together = model.logits(&pixels, None)?;
            assert_eq!(together.dims(), [3, 3]);
            for at in 0..3 {
                let alone = model.logits(&pixels.narrow(0, at, 1)?.contiguous()?, None)?;
                let gap = far(&alone.squeeze(0)?, &together.get(at)?)?;
                assert!(gap < 1e-6, "{}: {sides:?}: {gap}", name(&config));
            }
            let apart = far(&together.get(0)?, &together.get(1)?)?;
            assert!(apart > 1e-4, "{}: {apart}", name(&config));
        }
    }
    Ok(())
}

/// Where mixers and MD-TPE prefer no direction, a mirrored picture of pixels as patches has the same logits; one that does, tells.
#[test]
fn mirrors_are_seen_by_what_has_a_direction() -> Result<()> {
    let whole = |mixer, lrpe| Config {
        lrpe,
        ..config(mixer, Form::Whole)
    };
    let scan = |mixer, form| config(mixer, form);
    // Cosines do not tell left from right; pairs that turn do.
    let blind = [
        (whole(Mixer::LightNet, true), &[3][..]),
        (whole(Mixer::LightNet, false), &[2, 3]),
        (whole(Mixer::Softmax, false), &[3]),
        (scan(Mixer::Hgrn2, Form::Parallel2d), &[3]),
        (scan(Mixer::Hgrn2, Form::Series2d), &[2]),
        (scan(Mixer::Tnl, Form::Parallel2d), &[3]),
        (scan(Mixer::Tnl, Form::Parallel), &[2, 3]),
    ];
    let seeing = [
        (whole(Mixer::Softmax, true), &[3][..]),
        (scan(Mixer::Tnl, Form::Causal), &[3]),
        (scan(Mixer::Tnl, Form::Parallel), &[3]),
        (
            Config {
                tpe: Tpe::OneSided,
                ..whole(Mixer::LightNet, false)
            },
            &[3],
        ),
    ];
    for (cases, same) in [(&blind[..], true), (&seeing[..], false)] {
        for (config, axes) in cases {
            let config = Config {
                patch_size: 1,
                ..config.clone()
            };
            let (_, model) = model(&config)?;
            let pixels = random(&[1, 1, 5, 7], "pixels")?;
            let mut mirrored = pixels.clone();
            for &axis in *axes {
                mirrored = flip(&mirrored, axis)?;
            }
            let gap = far(&model.logits(&pixels, None)?, &model.logits(&mirrored, None)?)?;
            assert_eq!(gap < 2e-6, same, "{} {:?}: {gap}", name(&config), config.tpe);
            assert!(same || gap > 1e-4, "{}: {gap}", name(&config));
        }
    }
    Ok(())
}

/// MD-LRPE of scans is relative: turning all tokens by the same angle changes nothing, turning them apart does.
#[test]
fn turned_scans_see_offsets_alone() -> Result<()> {
    let x = random(&[2, 9, 16], "x")?;
    let phase = random(&[9, 8], "phase")?;
    let further = phase.broadcast_add(&random(&[1, 8], "offset")?)?;
    let mix = |mixer: Mixer, turn: Option<&Tensor>| -> Result<Tensor> {
        let layers = lm::Config {
            hidden_size: 16,
            num_attention_heads: 2,
            num_hidden_layers: 2,
            initializer_range: 0.25,
            ..lm::Config::of(mixer.scans().expect("a scan"))
        };
        let params = Params::random(3, CPU);
        let context = CausalContext {
            turn,
            ..CausalContext::default()
        };
        match mixer {
            Mixer::Hgrn2 => Hgrn2::new(&layers, &params.builder())?.forward(&x, &context, None),
            _ => Tnl::new(&layers, 0, &params.builder())?.forward(&x, &context, None),
        }
    };
    for mixer in [Mixer::Hgrn2, Mixer::Tnl] {
        let turned = mix(mixer, Some(&phase))?;
        let same = far(&turned, &mix(mixer, Some(&further))?)?;
        let moved = far(&turned, &mix(mixer, None)?)?;
        assert!(same < 2e-5 && moved > 1e-2, "{}: {same} {moved}", mixer.name());
    }
    Ok(())
}

/// What is dropped is not there, and what is kept is as if there was no stochastic depth.
#[test]
fn stochastic_depth_keeps_branches_or_drops_them() -> Result<()> {
    for layer_scale in [None, Some(0.3)] {
        let config = Config {
            layer_scale,
            ..config(Mixer::LightNet, Form::Whole)
        };
        let (params, model) = model(&config)?;
        let pixels = random(&[2, 1, 8, 8], "pixels")?;
        let plain = model.logits(&pixels, None)?;
        let ones = Tensor::ones((4, 2), DType::F32, CPU)?;
        assert!(far(&plain, &model.logits(&pixels, Some(&ones))?)? < 1e-6);
        // The second picture keeps its branches, the first has none.
        let kept = Tensor::new(&[[0f32, 1.0]; 4], CPU)?;
        let mixed = model.logits(&pixels, Some(&kept))?;
        assert!(far(&plain.get(1)?, &mixed.get(1)?)? < 1e-6);
        let vars = params.vars();
        for (name, var) in &vars {
            if name.contains(".glu.output.") || name.contains(".mixer.output.") {
                var.set(&var.zeros_like()?)?;
            }
        }
        let silent = model.logits(&pixels, None)?;
        assert!(far(&silent.get(0)?, &mixed.get(0)?)? < 1e-6);
        assert!(far(&silent.get(1)?, &mixed.get(1)?)? > 1e-4);
        let wrong = model.logits(&pixels, Some(&kept.narrow(0, 0, 3)?)).unwrap_err();
        assert!(
            wrong
                .to_string()
                .contains("kept has shape [3, 2], expected [4, 2]")
        );
    }
    Ok(())
}

/// Weights as plain lists.
struct Plain(std::collections::BTreeMap<String, Vec<f64>>);

impl Plain {
    fn of(params: &Params) -> Result<Self> {
        let list = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let vars = params.vars().into_iter();
        Ok(Self(
            vars.map(|(name, var)| Ok((name, list(var.as_tensor())?)))
                .collect::<Result<_>>()?,
        ))
    }

    /// `W x`.
    fn map(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let rows = self.0[&format!("{name}.weight")].chunks(x.len());
        let mut y: Vec<f64> = rows
            .map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
            .collect();
        if let Some(bias) = self.0.get(&format!("{name}.bias")) {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        y
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let gain = &self.0[&format!("{name}.weight")];
        x.iter()
            .zip(gain)
            .map(|(x, g)| x * g / (square + 1e-6).sqrt())
            .collect()
    }
}

/// The whole softmax model with MD-LRPE and layer scale beside loops over tokens in f64.
#[test]
fn the_softmax_model_is_its_formulas() -> Result<()> {
    let config = Config {
        tpe: Tpe::None,
        layer_scale: Some(0.4),
        ..config(Mixer::Softmax, Form::Whole)
    };
    let (params, model) = model(&config)?;
    let (rows, columns, width, head) = (3, 5, 16, 8);
    let pixels = random(&[1, 1, 2 * rows, 2 * columns], "pixels")?;
    let found = model.logits(&pixels, None)?.squeeze(0)?.to_vec1::<f32>()?;

    let plain = Plain::of(&params)?;
    let grey = pixels
        .to_dtype(DType::F64)?
        .squeeze(0)?
        .squeeze(0)?
        .to_vec2::<f64>()?;
    let places: Vec<[usize; 2]> = (0..rows)
        .flat_map(|r| (0..columns).map(move |c| [r, c]))
        .collect();
    let mut x: Vec<Vec<f64>> = places
        .iter()
        .map(|&[r, c]| {
            let patch: Vec<f64> = [[0, 0], [0, 1], [1, 0], [1, 1]]
                .map(|[dr, dc]| grey[2 * r + dr][2 * c + dc])
                .to_vec();
            plain.map("embed", &patch)
        })
        .collect();
    // Two pairs of a head turn with the row and two with the column: 2 rad a step, and a quarter turn over the four tokens of a side.
    let theta = [2.0, std::f64::consts::FRAC_PI_2 / 4.0];
    let turn = |v: &mut [f64], [r, c]: [usize; 2]| {
        for pair in 0..4 {
            let place = if pair < 2 { r } else { c };
            let (sin, cos) = (place as f64 * theta[pair % 2]).sin_cos();
            let (a, b) = (v[pair], v[pair + 4]);
            v[pair] = a * cos - b * sin;
            v[pair + 4] = a * sin + b * cos;
        }
    };
    let add = |x: &mut Vec<f64>, scale: &[f64], branch: &[f64]| {
        let branch = branch.iter().zip(scale);
        x.iter_mut().zip(branch).for_each(|(x, (y, s))| *x += s * y);
    };
    for layer in 0..2 {
        let at = |name: &str| format!("layers.{layer}.{name}");
        let scales = [&plain.0[&at("scale_mixer")], &plain.0[&at("scale_glu")]];
        let mut qkv: Vec<Vec<f64>> = x
            .iter()
            .map(|x| plain.map(&at("mixer.input"), &plain.norm(&at("norm_mixer"), x)))
            .collect();
        for (token, &place) in qkv.iter_mut().zip(&places) {
            for part in token[..2 * width].chunks_mut(head) {
                turn(part, place);
            }
        }
        for (token, x) in x.iter_mut().enumerate() {
            let mut o = vec![0.0; width];
            for first in [0, head] {
                let q = &qkv[token][first..first + head];
                let weights: Vec<f64> = qkv
                    .iter()
                    .map(|other| {
                        let k = &other[width + first..width + first + head];
                        let score: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        (score / (head as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for (other, weight) in qkv.iter().zip(&weights) {
                    let values = &other[2 * width + first..][..head];
                    let o = o[first..first + head].iter_mut().zip(values);
                    o.for_each(|(o, value)| *o += weight / total * value);
                }
            }
            let branch = plain.map(&at("mixer.output"), &o);
            add(x, scales[0], &branch);
        }
        for x in &mut x {
            let wide = plain.map(&at("glu.input"), &plain.norm(&at("norm_glu"), x));
            let (gate, up) = wide.split_at(wide.len() / 2);
            let hidden: Vec<f64> = gate
                .iter()
                .zip(up)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            let branch = plain.map(&at("glu.output"), &hidden);
            add(x, scales[1], &branch);
        }
    }
    let mean: Vec<f64> = (0..width)
        .map(|c| x.iter().map(|x| x[c]).sum::<f64>() / x.len() as f64)
        .collect();
    let expected = plain.map("head", &plain.norm("norm", &mean));
    for (found, expected) in found.iter().zip(&expected) {
        assert!(
            (f64::from(*found) - expected).abs() < 1e-5,
            "{found}, expected {expected}"
        );
    }
    Ok(())
}

/// Against shares by hand, and with one class alone against its own logarithm.
#[test]
fn soft_cross_entropy_is_its_formula() -> Result<()> {
    let logits = Tensor::new(&[[1f32, 2.0, 0.5], [0.0, 0.0, 0.0]], CPU)?;
    let targets = Tensor::new(&[[0.0f32, 1.0, 0.0], [0.2, 0.3, 0.5]], CPU)?;
    let z = (1f64.exp() + 2f64.exp() + 0.5f64.exp()).ln();
    let expected = f64::midpoint(z - 2.0, 3f64.ln());
    let found = soft_cross_entropy(&logits, &targets)?.to_scalar::<f32>()?;
    assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
    assert!(soft_cross_entropy(&logits, &targets.narrow(0, 0, 1)?).is_err());
    Ok(())
}

/// Sizes are those of the papers: about as many weights as DeiT's.
#[test]
fn sizes_have_the_weights_of_their_names() -> Result<()> {
    for (size, width, millions) in [
        (Size::Tiny, 192, 5.0..7.0),
        (Size::Small, 384, 21.0..24.0),
        (Size::Base, 768, 84.0..92.0),
    ] {
        for mixer in Mixer::ALL {
            let labels = (0..1000).map(|class| class.to_string()).collect();
            let config = Config {
                mixer,
                form: mixer.form(),
                ..Config::of(size, labels)
            };
            let outline = Outline::new();
            Classifier::new(&config, DType::F32, &outline.builder())?;
            let count = outline.count() as f64 / 1e6;
            assert_eq!((config.hidden_size, config.head_width()), (width, 64));
            assert!(millions.contains(&count), "{size:?} {}: {count}", mixer.name());
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let whole = serde_json::to_value(config(Mixer::LightNet, Form::Whole)).unwrap();
    for (key, value, words) in [
        (
            "hidden_size",
            serde_json::json!(15),
            "expected a multiple of num_attention_heads 2",
        ),
        ("hidden_size", serde_json::json!(1u64 << 40), "hidden_size is"),
        (
            "num_hidden_layers",
            serde_json::json!(0),
            "num_hidden_layers is 0",
        ),
        (
            "num_channels",
            serde_json::json!(4),
            "num_channels is 4, expected 1 or 3",
        ),
        (
            "image_std",
            serde_json::json!([0.0]),
            "expected 1 numbers above 0",
        ),
        ("image_mean", serde_json::json!([0.5, 0.5]), "image_mean"),
        (
            "image_size",
            serde_json::json!([8, 9]),
            "multiples of the patch_size 2",
        ),
        ("patch_size", serde_json::json!(0), "patch_size is 0"),
        ("labels", serde_json::json!(["one"]), "labels are 1"),
        ("labels", serde_json::json!(["one", ""]), "labels[1] has 0 bytes"),
        (
            "form",
            serde_json::json!("parallel"),
            "expected whole with mixer \"lightnet\"",
        ),
        (
            "mixer",
            serde_json::json!("hgrn2"),
            "expected causal, parallel, series, parallel-2d, series-2d with",
        ),
        ("mixer", serde_json::json!("mamba"), "unknown variant"),
        ("layer_scale", serde_json::json!(0.0), "layer_scale is 0"),
        ("colour", serde_json::json!(1), "unknown field `colour`"),
        ("model_type", serde_json::json!("vit"), "unknown variant `vit`"),
    ] {
        let mut changed = whole.clone();
        changed[key] = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        let line = Config::read(&path).unwrap_err().to_string();
        assert!(line.contains(words) && !line.contains('\n'), "{key}: {line}");
        assert!(line.contains("config.json"), "{line}");
    }
    let odd = Config {
        num_attention_heads: 16,
        ..config(Mixer::Softmax, Form::Whole)
    };
    assert!(odd.check().unwrap_err().to_string().contains("even number"));
    std::fs::write(&path, whole.to_string()).unwrap();
    assert_eq!(Config::read(&path).unwrap(), config(Mixer::LightNet, Form::Whole));
}
