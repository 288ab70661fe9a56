//! Several sequences in one.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::tape;

use super::{draw, far, variants};
use crate::lm::{Architecture, LanguageModel};
use crate::params::Params;

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

type Gradients = BTreeMap<String, Tensor>;

fn gradients(params: &Params, loss: impl FnOnce() -> Result<Tensor>) -> Result<Gradients> {
    let (loss, tape) = tape::record(loss);
    let found = tape.backward(&loss?)?;
    params
        .vars()
        .into_iter()
        .filter_map(|(name, var)| found.get(&var).map(|gradient| (name, gradient.clone())))
        .map(|(name, gradient)| Ok((name, gradient.to_dtype(DType::F64)?)))
        .collect()
}

/// The gradients of a packed loss are those of its documents' own losses, each weighed by its share of the tokens.
#[test]
fn packed_gradients_are_the_sums_of_separate_ones() -> Result<()> {
    const BORDERS: [usize; 6] = [0, 1, 8, 8, 75, 90];
    const TOKENS: usize = 90;
    let (ids, targets) = (draw(TOKENS, 31, "packed ids"), draw(TOKENS, 31, "packed targets"));
    let options = Options::default();
    let mut packable = Vec::new();
    for (name, config) in variants() {
        let params = Params::random(3, &Device::Cpu);
        let model = LanguageModel::new(&config, DType::F32, &params.builder())?;
        let part = |from: usize, to: usize| {
            let ids = Ids::new(&ids[from..to], &[1, to - from], config.vocab_size)?;
            let targets = Tensor::from_slice(&targets[from..to], (1, to - from), &Device::Cpu)?;
            Ok::<_, candle_core::Error>((ids, targets))
        };
        let (whole, all) = part(0, TOKENS)?;
        let Ok(packed) = gradients(&params, || model.packed_loss(&whole, &all, &BORDERS, &options)) else {
            continue;
        };
        let mut sums = Gradients::new();
        for pair in BORDERS.windows(2).filter(|pair| pair[0] < pair[1]) {
            let (ids, targets) = part(pair[0], pair[1])?;
            let share = (pair[1] - pair[0]) as f64 / TOKENS as f64;
            for (parameter, gradient) in gradients(&params, || model.loss(&ids, &targets, &options))? {
                let weighed = (gradient * share)?;
                let sum = match sums.get(&parameter) {
                    Some(sum) => (sum + weighed)?,
                    None => weighed,
                };
                sums.insert(parameter, sum);
            }
        }
        let length = |gradient: &Tensor| {
            Ok::<_, candle_core::Error>(gradient.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
        };
        let error = |found: &Gradients, parameter: &str| {
            let sum = &sums[parameter];
            Ok::<_, candle_core::Error>(length(&(&found[parameter] - sum)?)? / length(sum)?)
        };
        let again = model.clone().recomputed(true);
        let recomputed = gradients(&params, || again.packed_loss(&whole, &all, &BORDERS, &options))?;
        let crossing = gradients(&params, || model.loss(&whole, &all, &options))?;
        // A norm a head makes much of heads that have given little, and of their rounding.
        let most = if config.norm_per_head { 5e-5 } else { 1e-5 };
        for found in [&packed, &recomputed] {
            let (mut off, mut all) = (0.0, 0.0);
            for (parameter, _) in params.vars() {
                let sum = length(&sums[&parameter])?;
                let error = error(found, &parameter)?;
                assert!(error < 2.0 * most, "{name}: {parameter} is {error:e} off");
                (off, all) = (off + (error * sum).powi(2), all + sum * sum);
            }
            let error = (off / all).sqrt();
            assert!(error < most, "{name}: all gradients are {error:e} off");
        }
        let mut farthest = 0f64;
        for (parameter, _) in params.vars() {
            farthest = farthest.max(error(&crossing, &parameter)?);
        }
        assert!(farthest > 1e-2, "{name}: borders change nothing, {farthest:e}");
        packable.push(config.architecture);
    }
    for architecture in Architecture::ALL {
        // What has TPE behind the embedding, as cosFormer2 by default, is packed without it.
        assert!(
            packable.contains(&architecture),
            "{architecture:?} was not packed"
        );
    }
    Ok(())
}
