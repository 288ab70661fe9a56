//! Losses and their gradients.

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::tape;

use super::{ALL, bidirectional, draw, far, shape, square, variants};
use crate::lm::{Config, LanguageModel};
use crate::params::Params;

/// For every parameter: how the loss moves along its gradient is the length of the gradient.
#[test]
fn gradients_are_those_of_the_loss() -> Result<()> {
    let mut both = variants();
    both.push(("lightnet in both directions", bidirectional()));
    both.push((
        "lightnet in both directions, shifted",
        Config {
            token_shift: true,
            ..bidirectional()
        },
    ));
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
