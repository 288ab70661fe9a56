use super::*;
use crate::diffusion::Objective;
use crate::params::{Outline, Params};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;

fn small() -> DitConfig {
    DitConfig {
        image_size: [8, 8],
        num_channels: 3,
        patch_size: 2,
        hidden_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        intermediate_size: 32,
        labels: ["cat", "dog", "owl"].map(str::to_owned).to_vec(),
        text_dim: Some(10),
        ..DitConfig::of(DitSize::Small, Vec::new())
    }
}

fn draw(name: &str, shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product();
    Tensor::from_vec(Philox::named(3, name).normals(count), shape, &Device::Cpu)
}

/// A network whose zeros have been woken by noise of this size.
fn network(config: &DitConfig, wake: f64) -> Result<(Dit, Params)> {
    let params = Params::random(4, &Device::Cpu);
    let dit = Dit::new(config, DType::F32, &params.builder())?;
    for (name, var) in params.vars() {
        var.set(&(var.as_tensor() + (draw(&name, var.dims())? * wake)?)?)?;
    }
    Ok((dit, params))
}

struct Batch {
    x: Tensor,
    time: Tensor,
    classes: Ids,
    states: Tensor,
    mask: Tensor,
}

fn batch(height: usize, width: usize) -> Result<Batch> {
    Ok(Batch {
        x: draw("x", &[2, height, width, 3])?,
        time: Tensor::new(&[0.2f32, 0.9], &Device::Cpu)?,
        classes: Ids::new(&[2, 3], &[2], 4)?,
        states: draw("states", &[2, 5, 10])?,
        mask: Tensor::new(&[[1f32, 1.0, 1.0, 0.0, 0.0], [1.0; 5]], &Device::Cpu)?,
    })
}

impl Batch {
    fn wanted(&self) -> Wanted<'_> {
        Wanted {
            classes: Some(&self.classes),
            text: Some((&self.states, &self.mask)),
        }
    }
}

fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar::<f32>()
}

#[test]
fn a_fresh_network_predicts_nothing_and_any_size_goes_through() -> Result<()> {
    let (fresh, params) = network(&small(), 0.0)?;
    let (woken, _) = network(&small(), 0.1)?;
    for (height, width) in [(8, 8), (4, 12), (16, 2)] {
        let batch = batch(height, width)?;
        let nothing = fresh.forward(&batch.x, &batch.time, &batch.wanted())?;
        assert_eq!(nothing.dims(), [2, height, width, 3]);
        assert_eq!(nothing.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
        let something = woken.forward(&batch.x, &batch.time, &batch.wanted())?;
        let size = something.sqr()?.mean_all()?.to_scalar::<f32>()?;
        assert!(size > 1e-3 && size.is_finite(), "{size}");
    }
    assert!(params.vars().contains_key("blocks.2.text.query.weight"));
    assert!(!params.vars().contains_key("blocks.1.text.query.weight"));
    Ok(())
}

/// Every part of what is wanted counts, and pictures do not see each other.
#[test]
fn what_is_wanted_counts_and_pictures_are_on_their_own() -> Result<()> {
    let (dit, _) = network(&small(), 0.1)?;
    let all = batch(8, 8)?;
    let both = dit.forward(&all.x, &all.time, &all.wanted())?;
    let first = Batch {
        x: all.x.narrow(0, 0, 1)?,
        time: all.time.narrow(0, 0, 1)?,
        classes: Ids::new(&[2], &[1], 4)?,
        states: all.states.narrow(0, 0, 1)?,
        mask: all.mask.narrow(0, 0, 1)?,
    };
    let alone = dit.forward(&first.x, &first.time, &first.wanted())?;
    assert!(apart(&alone, &both.narrow(0, 0, 1)?)? < 1e-5);
    let other_class = Batch {
        classes: Ids::new(&[0], &[1], 4)?,
        ..batch(8, 8)?
    };
    let classes = Wanted {
        classes: Some(&other_class.classes),
        ..first.wanted()
    };
    assert!(apart(&dit.forward(&first.x, &first.time, &classes)?, &alone)? > 1e-3);
    let later = (&first.time + 0.3)?;
    assert!(apart(&dit.forward(&first.x, &later, &first.wanted())?, &alone)? > 1e-3);
    let said = (&first.states * 2.0)?;
    let said = Wanted {
        text: Some((&said, &first.mask)),
        ..first.wanted()
    };
    assert!(apart(&dit.forward(&first.x, &first.time, &said)?, &alone)? > 1e-3);
    // Words that are masked do not.
    let noise = draw("behind", &[1, 2, 10])?;
    let behind = Tensor::cat(&[&first.states.narrow(1, 0, 3)?, &noise], 1)?;
    let behind = Wanted {
        text: Some((&behind, &first.mask)),
        ..first.wanted()
    };
    assert!(apart(&dit.forward(&first.x, &first.time, &behind)?, &alone)? < 1e-5);
    Ok(())
}

/// Gradients on the tape against central differences along a random direction, of every tensor by itself.
#[test]
fn gradients_are_those_of_differences() -> Result<()> {
    let config = DitConfig {
        num_hidden_layers: 1,
        image_size: [4, 4],
        ..small()
    };
    let (dit, params) = network(&config, 0.1)?;
    let batch = batch(4, 4)?;
    let weights = draw("loss", &[2, 4, 4, 3])?;
    let loss = || -> Result<Tensor> {
        let found = dit.forward(&batch.x, &batch.time, &batch.wanted())?;
        (found * &weights)?.sum_all()
    };
    let (value, tape) = tape::record(loss);
    let gradients = tape.backward(&value?)?;
    for (name, var) in params.vars() {
        let direction = draw(&format!("direction/{name}"), var.dims())?;
        let Some(gradient) = gradients.get(&var) else {
            panic!("{name} has no gradient");
        };
        let slope = f64::from((gradient * &direction)?.sum_all()?.to_scalar::<f32>()?);
        let start = var.as_tensor().copy()?;
        let at = |step: f64| -> Result<f64> {
            var.set(&(&start + (&direction * step)?)?)?;
            Ok(f64::from(loss()?.detach().to_scalar::<f32>()?))
        };
        let step = 2e-3;
        let found = (at(step)? - at(-step)?) / (2.0 * step);
        var.set(&start)?;
        assert!(
            (found - slope).abs() < 0.02 * slope.abs().max(0.5),
            "{name}: {found} by differences, {slope} on the tape"
        );
    }
    Ok(())
}

/// One picture is learnt: the loss of the flow falls far below that of predicting nothing, and the sampler finds the picture again.
#[test]
fn one_picture_is_learnt_and_drawn() -> Result<()> {
    use crate::diffusion::Sampler;
    use candle_nn::{AdamW, Optimizer, ParamsAdamW};
    let config = DitConfig {
        num_channels: 1,
        labels: vec!["stripes".to_owned()],
        text_dim: None,
        ..small()
    };
    let (dit, params) = network(&config, 0.0)?;
    let stripes: Vec<f32> = (0..64).map(|i| if i / 8 % 4 < 2 { 1.0 } else { -1.0 }).collect();
    let picture = Tensor::from_vec(stripes, (1, 8, 8, 1), &Device::Cpu)?;
    let settings = ParamsAdamW {
        lr: 4e-3,
        ..ParamsAdamW::default()
    };
    let mut optimiser = AdamW::new(params.vars().into_values().collect(), settings)?;
    let clean = picture.repeat((8, 1, 1, 1))?;
    let classes = Ids::new(&[0; 8], &[8], 2)?;
    let wanted = Wanted {
        classes: Some(&classes),
        text: None,
    };
    for index in 0..150 {
        let mut noise = Philox::named(9, &format!("step/{index}"));
        let times: Vec<f32> = (0..8)
            .map(|_| Objective::Flow.time(0.0, noise.normal()))
            .collect();
        let e = Tensor::from_vec(noise.normals(8 * 64), (8, 8, 8, 1), &Device::Cpu)?;
        let mixture = Objective::Flow.mixture(&times, &Device::Cpu)?;
        let (x, target) = Objective::Flow.noisy(&clean, &e, &mixture)?;
        let time = Tensor::new(times, &Device::Cpu)?;
        let (loss, tape) = tape::record(|| (dit.forward(&x, &time, &wanted)? - &target)?.sqr()?.mean_all());
        let gradients = tape.backward(&loss?)?;
        optimiser.step(&gradients)?;
    }
    let sampler = Sampler {
        objective: Objective::Flow,
        steps: 12,
        shift: 1.0,
    };
    let one = Ids::new(&[0], &[1], 2)?;
    let wanted = Wanted {
        classes: Some(&one),
        text: None,
    };
    let noise = draw("start", &[1, 8, 8, 1])?;
    let predict =
        |x: &Tensor, time: f64| dit.forward(x, &Tensor::new(&[time as f32], &Device::Cpu)?, &wanted);
    let Some(drawn) = sampler.run(&noise, predict, |_| true)? else {
        bail!("cancelled")
    };
    let error = (drawn - &picture)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    assert!(error < 0.1, "mean square error {error}");
    Ok(())
}

/// The sizes of the paper have the weights that its formulas count: for each layer 4 d^2 of the mixer's maps, 2 d D of its gate and
/// 8 d^2 of the gated linear unit, what modulates them once for all layers (6 d^2), and the rest around them.
#[test]
fn sizes_have_the_weights_of_their_formulas() -> Result<()> {
    let sizes: [(DitSize, [usize; 3], f64); 4] = [
        (DitSize::Small, [12, 384, 6], 23.5),
        (DitSize::Base, [12, 768, 12], 92.8),
        (DitSize::Large, [24, 1024, 16], 317.0),
        (DitSize::ExtraLarge, [28, 1152, 16], 465.6),
    ];
    for (size, [layers, d, heads], millions) in sizes {
        let classes = 10;
        let config = DitConfig::of(size, (0..classes).map(|i| i.to_string()).collect());
        let params = Outline::new();
        Dit::new(&config, DType::F32, &params.builder())?;
        let head = d / heads;
        let mixer = 4 * d * d + 2 * d * head;
        let glu = 3 * d * (8 * d / 3);
        // Gains of the norm of the outputs, frequencies of two axes, table of the modulation, bias of the gated linear unit.
        let small = d + head.div_ceil(2) + 6 * d + d;
        let modulation = 6 * d * d + 6 * d;
        // Time through two maps, classes and none of them, patches of 2 x 2 x 4 values, coordinates.
        let values = 16;
        let into = (64 * d + d) + (d * d + d) + (classes + 1) * d + (values * d + d);
        let places = (2 * FRACTION_WIDTH * d + d) + 2 * (2 * heads + d + d * d);
        let out = (2 * d * d + 2 * d) + (d * values + values);
        let expected = layers * (mixer + glu + small) + modulation + into + places + out;
        assert_eq!(params.count(), expected as u64, "{size:?}");
        let found = params.count() as f64 / 1e6;
        assert!(
            (found - millions).abs() < 0.01 * millions,
            "{size:?}: {found} million"
        );
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_in_a_line() -> Result<()> {
    let line = |config: DitConfig| config.check().unwrap_err().to_string();
    let cases = [
        (
            line(DitConfig {
                patch_size: 3,
                ..small()
            }),
            "image_size is [8, 8], expected multiples of the patch_size 3",
        ),
        (
            line(DitConfig {
                num_attention_heads: 5,
                ..small()
            }),
            "hidden_size is 24, expected a multiple of twice",
        ),
        (
            line(DitConfig {
                num_hidden_layers: 1_000_000_000_000,
                ..small()
            }),
            "num_hidden_layers is 1000000000000, expected 1 to",
        ),
        (
            line(DitConfig {
                text_every: 0,
                ..small()
            }),
            "text_every is 0, expected 1 to",
        ),
        (
            line(DitConfig {
                codec_factor: Some(0),
                ..small()
            }),
            "codec_factor is 0, expected 1 to 64",
        ),
    ];
    for (found, words) in cases {
        assert!(found.starts_with(words), "{found}");
    }
    let (dit, _) = network(&small(), 0.1)?;
    let batch = batch(8, 8)?;
    let without = Wanted {
        classes: None,
        ..batch.wanted()
    };
    let message = dit
        .forward(&batch.x, &batch.time, &without)
        .unwrap_err()
        .to_string();
    assert!(message.contains("a class is expected"), "{message}");
    assert!(serde_json::from_str::<DitConfig>("{\"colour\": 3}").is_err());
    Ok(())
}
