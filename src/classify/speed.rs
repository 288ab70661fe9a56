//! How fast a classifier of pictures trains and answers, and with how much memory, by the size of the pictures.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;
use fulgur_lightnet::params::Params;
use fulgur_lightnet::vision::{Classifier, Config, soft_cross_entropy};
use serde::Serialize;

use crate::report::picture::{Framed, picture};
use crate::report::svg::{Line, Plot, Scale};
use crate::timing::{Spread, Watch};
use crate::train::{Optimiser, OptimiserConfig};

/// Steps that are waited for together, so that a GPU has the next one while it works.
const TOGETHER: usize = 4;
/// Steps before any is timed.
const WARM: usize = 3;
/// Stream of the pictures.
const STREAM: u64 = 0x9c1c;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// A batch has as many pictures as have about so many patches, and one at least.
    pub tokens: usize,
    /// Steps that are timed.
    pub steps: usize,
    /// Whether steps of training are timed too.
    pub train: bool,
    /// Seed of weights and pictures.
    pub seed: u64,
}

/// One way of using a classifier.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Use {
    /// Milliseconds of a batch.
    pub ms: Spread,
    /// Pictures a second.
    pub images_per_s: f64,
    /// The most bytes that tensors took up on the GPU, weights included.
    pub device_bytes: Option<u64>,
    /// The same without weights, moments and pictures, for each picture of the batch.
    pub bytes_per_image: Option<u64>,
    /// The most memory of the process, in bytes, on a CPU.
    pub resident_bytes: Option<u64>,
}

/// A classifier with pictures of one size.
#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    /// Side of the pictures in pixels.
    pub side: usize,
    /// Patches of a picture.
    pub tokens: usize,
    /// Pictures of a batch.
    pub batch: usize,
    /// Loss, gradients, the limit of their norm, and AdamW.
    pub train: Option<Use>,
    /// Logits alone.
    pub answer: Use,
}

/// Measures a classifier of the shape of `config`, with random weights and pictures of `side`, on `device`. `told` hears of every
/// group of steps, and ends it by `false`; there is no measure then.
///
/// # Errors
/// A shape that is none, a side that is not whole patches, or a failing operation.
pub fn measure(
    config: &Config,
    side: usize,
    plan: &Plan,
    compute: DType,
    device: &Device,
    mut told: impl FnMut() -> bool,
) -> anyhow::Result<Option<Measure>> {
    let tokens = (side / config.patch_size.max(1)).pow(2);
    let batch = (plan.tokens / tokens.max(1)).max(1);
    let params = Params::random(plan.seed, device);
    let model = Classifier::new(config, compute, &params.builder())?;
    let pixels = pictures(config.num_channels, batch, side, plan.seed)?.to_device(device)?;
    let targets = targets(config.classes(), batch, plan.seed)?.to_device(device)?;

    let mut train = None;
    if plan.train {
        let settings = OptimiserConfig {
            clip: 1.0,
            ..OptimiserConfig::default()
        };
        let lr = settings.lr;
        let mut optimiser = Optimiser::new(&params, settings)?;
        let mut step = || {
            let (loss, tape) = tape::record(|| soft_cross_entropy(&model.logits(&pixels, None)?, &targets));
            let gradients = optimiser.gradients(tape.backward(&loss?)?);
            optimiser.update(&gradients, lr)?;
            Ok(())
        };
        train = timed(batch, plan.steps, device, &mut told, &mut step)?;
        if train.is_none() {
            return Ok(None);
        }
    }
    // Weights that nobody trains: nothing is kept for gradients.
    let weights = params.vars().into_iter();
    let weights = weights.map(|(name, weight)| (name, weight.as_detached_tensor()));
    let builder = VarBuilder::from_tensors(weights.collect(), DType::F32, device);
    let model = Classifier::new(config, compute, &builder)?;
    let mut step = || model.logits(&pixels, None).map(drop).map_err(anyhow::Error::from);
    let answer = timed(batch, plan.steps, device, &mut told, &mut step)?;
    Ok(answer.map(|answer| Measure {
        side,
        tokens,
        batch,
        train,
        answer,
    }))
}

/// Times `step` in groups; none where `told` ended it.
fn timed(
    batch: usize,
    steps: usize,
    device: &Device,
    told: &mut impl FnMut() -> bool,
    step: &mut impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Option<Use>> {
    let together = if device.is_cpu() { 1 } else { TOGETHER };
    let watch = Watch::start(device)?;
    // A CPU has nothing to load, and its steps are long.
    let warm = if device.is_cpu() { 1 } else { WARM };
    for _ in 0..warm {
        step()?;
    }
    let mut times = Vec::new();
    while times.len() * together < steps {
        if !told() {
            return Ok(None);
        }
        device.synchronize()?;
        let began = Instant::now();
        for _ in 0..together {
            step()?;
        }
        device.synchronize()?;
        times.push(1e3 * began.elapsed().as_secs_f64() / together as f64);
    }
    let peak = watch.peak(device)?;
    let ms = Spread::of(times);
    Ok(Some(Use {
        ms,
        images_per_s: 1e3 * batch as f64 / ms.median,
        device_bytes: peak.device,
        bytes_per_image: peak.grown.map(|bytes| bytes / batch as u64),
        resident_bytes: peak.resident,
    }))
}

/// Noise `[B, C, side, side]`.
fn pictures(channels: usize, batch: usize, side: usize, seed: u64) -> anyhow::Result<Tensor> {
    let mut noise = Philox::new(seed, STREAM);
    let values: Vec<f32> = (0..channels * batch * side * side)
        .map(|_| 2.0 * noise.uniform() - 1.0)
        .collect();
    Ok(Tensor::from_vec(
        values,
        (batch, channels, side, side),
        &Device::Cpu,
    )?)
}

/// A class of each picture, `[B, classes]`.
fn targets(classes: usize, batch: usize, seed: u64) -> anyhow::Result<Tensor> {
    let mut noise = Philox::new(seed, STREAM + 1);
    let mut shares = vec![0f32; batch * classes];
    for row in shares.chunks_mut(classes) {
        row[noise.below(classes)] = 1.0;
    }
    Ok(Tensor::from_vec(shares, (batch, classes), &Device::Cpu)?)
}

/// Time and memory of a picture against its pixels, a line for each name, as an SVG file. Memory is missing where none was measured.
#[must_use]
pub fn plots(models: &[(String, Vec<Measure>)]) -> String {
    let lines = |of: &dyn Fn(&Measure) -> Option<f64>| -> Vec<Line> {
        let line = |(colour, (name, measures)): (usize, &(String, Vec<Measure>))| Line {
            name: name.clone(),
            colour,
            points: (measures.iter())
                .filter_map(|measure| Some((1e-6 * (measure.side * measure.side) as f64, of(measure)?)))
                .collect(),
            ..Line::default()
        };
        models.iter().enumerate().map(line).collect()
    };
    let plot = |title: &str, lines: Vec<Line>| Plot {
        title: title.to_owned(),
        logarithmic: true,
        steps: Scale::Logarithmic,
        lines,
        ..Plot::default()
    };
    let used = |measure: &Measure| measure.train.unwrap_or(measure.answer);
    let times = plot(
        "Time of a picture",
        lines(&|measure| Some(1e3 / used(measure).images_per_s)),
    );
    let memory = plot(
        "Memory of a picture",
        lines(&|measure| Some(1e-6 * used(measure).bytes_per_image? as f64)),
    );
    let frame = |plot, values| Framed {
        plot,
        steps: "megapixels",
        values,
    };
    let mut plots = vec![frame(&times, "ms")];
    if memory.lines.iter().any(|line| !line.points.is_empty()) {
        plots.push(frame(&memory, "MB"));
    }
    picture(&plots)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::vision::Size;

    fn small() -> Config {
        Config {
            hidden_size: 32,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            intermediate_size: 48,
            ..Config::of(Size::Tiny, vec!["a".into(), "b".into()])
        }
    }

    #[test]
    fn batches_have_as_many_patches_as_asked() -> anyhow::Result<()> {
        let plan = Plan {
            tokens: 24,
            steps: 2,
            train: true,
            seed: 1,
        };
        let mut groups = 0;
        let mut found = Vec::new();
        for side in [32, 48, 96] {
            let told = || {
                groups += 1;
                true
            };
            let measured = measure(&small(), side, &plan, DType::F32, &Device::Cpu, told)?;
            found.push(measured.expect("nobody ended it"));
        }
        let shape: Vec<_> = found.iter().map(|m| (m.side, m.tokens, m.batch)).collect();
        assert_eq!(shape, [(32, 4, 6), (48, 9, 2), (96, 36, 1)]);
        // Two steps of training and two of answering.
        assert_eq!(groups, 12);
        for measure in &found {
            for used in [measure.train.expect("asked for"), measure.answer] {
                assert!(used.ms.low > 0.0 && used.ms.low <= used.ms.median && used.ms.median <= used.ms.high);
                let pictures = used.images_per_s * used.ms.median / 1e3;
                assert!((pictures - measure.batch as f64).abs() < 1e-9);
            }
        }
        let svg = plots(&[("lightnet".to_owned(), found)]);
        assert!(svg.contains("Time of a picture") && !svg.contains("Memory"));
        Ok(())
    }

    #[test]
    fn what_is_ended_is_no_measure() -> anyhow::Result<()> {
        let plan = Plan {
            tokens: 4,
            steps: 2,
            train: false,
            seed: 1,
        };
        let ended = measure(&small(), 32, &plan, DType::F32, &Device::Cpu, || false)?;
        assert!(ended.is_none());
        assert!(measure(&small(), 40, &plan, DType::F32, &Device::Cpu, || true).is_err());
        Ok(())
    }
}
