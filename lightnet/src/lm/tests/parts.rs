//! Models of parts of sequences beside the model of the whole.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::exchange::{StateExchange, part_borders, threads};
use fulgur_kernels::tape;

use super::{Turn, bidirectional, draw, hybrid, shape, variants};
use crate::lm::{Architecture, Config, LanguageModel};
use crate::params::Params;

const BATCH: usize = 2;
const TOKENS: usize = 40;

/// A model of its own, of the same weights each time, and its variables.
pub(super) fn model(config: &Config, dtype: DType) -> Result<(LanguageModel, BTreeMap<String, Var>)> {
    let params = Params::random(3, &Device::Cpu);
    LanguageModel::new(config, DType::F32, &params.builder())?;
    let vars: BTreeMap<String, Var> = params
        .vars()
        .into_iter()
        .map(|(name, var)| {
            Ok((
                name,
                Var::from_tensor(&var.as_detached_tensor().to_dtype(dtype)?)?,
            ))
        })
        .collect::<Result<_>>()?;
    let tensors: HashMap<String, Tensor> = vars
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let vb = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
    Ok((LanguageModel::new(config, dtype, &vb)?, vars))
}

/// Losses of the tokens `[B, N]`, and the gradients of their sum weighed by `1 / all`.
struct Found {
    losses: Tensor,
    gradients: BTreeMap<String, Tensor>,
}

/// What is asked of a part: its columns of all ids, and borders where sequences are packed.
struct Part<'a> {
    config: &'a Config,
    dtype: DType,
    recompute: bool,
    exchange: Option<Arc<dyn StateExchange>>,
    columns: std::ops::Range<usize>,
    batch: usize,
    borders: Option<Vec<usize>>,
}

impl Part<'_> {
    fn run(&self, ids: &Tensor, targets: &Tensor) -> Result<Found> {
        let (model, vars) = model(self.config, self.dtype)?;
        let mut model = model.recomputed(self.recompute);
        if let Some(exchange) = &self.exchange {
            model = model.in_parts(exchange.clone());
        }
        let own = |x: &Tensor| x.narrow(1, self.columns.start, self.columns.len())?.contiguous();
        let ids = Ids::of(&own(ids)?, self.config.vocab_size)?;
        let targets = own(targets)?;
        let options = Options::default();
        let (losses, tape) = tape::record(|| match &self.borders {
            None => model.loss(&ids, &targets, &options),
            Some(borders) => model.packed_loss(&ids, &targets, borders, &options),
        });
        let loss = losses?;
        let share = (self.batch * self.columns.len()) as f64;
        let gradients = tape.backward(&(&loss * share)?)?;
        let losses = match &self.borders {
            None => model.losses(&ids, &targets, &options)?,
            Some(borders) => model.packed_losses(&ids, &targets, borders, &options)?,
        };
        Ok(Found {
            losses: losses.reshape((self.batch, ()))?,
            gradients: vars
                .iter()
                .map(|(name, var)| {
                    let gradient = match gradients.get(var) {
                        Some(gradient) => gradient.to_dtype(DType::F64)?,
                        None => var.as_detached_tensor().zeros_like()?.to_dtype(DType::F64)?,
                    };
                    Ok((name.clone(), gradient))
                })
                .collect::<Result<_>>()?,
        })
    }
}

fn apart(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let length = |x: &Tensor| {
        let sum: f64 = x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?;
        Ok::<_, candle_core::Error>(sum.sqrt())
    };
    Ok(length(&(found - expected)?)? / length(expected)?.max(1e-30))
}

/// Losses and all gradients of `parts` parts, added up, are `most` at most away from those of the whole.
fn check(
    name: &str,
    config: &Config,
    dtype: DType,
    parts: usize,
    borders: Option<&[usize]>,
    most: f64,
) -> Result<()> {
    let batch = if borders.is_some() { 1 } else { BATCH };
    let ids = Tensor::from_vec(draw(batch * TOKENS, 31, "ids"), (batch, TOKENS), &Device::Cpu)?;
    let targets = Tensor::from_vec(draw(batch * TOKENS, 31, "targets"), (batch, TOKENS), &Device::Cpu)?;
    let part = |exchange: Option<Arc<dyn StateExchange>>, columns: std::ops::Range<usize>, recompute| Part {
        config,
        dtype,
        recompute,
        batch,
        borders: borders.map(|borders| match &exchange {
            Some(_) => part_borders(borders, &columns),
            None => borders.to_vec(),
        }),
        exchange,
        columns,
    };
    let whole = part(None, 0..TOKENS, false).run(&ids, &targets)?;
    for recompute in [false, true] {
        let each = TOKENS / parts;
        let found: Vec<Found> = std::thread::scope(|scope| {
            let handles: Vec<_> = threads(&vec![each; parts])
                .into_iter()
                .enumerate()
                .map(|(index, exchange)| {
                    let (ids, targets, part) = (&ids, &targets, &part);
                    scope.spawn(move || {
                        part(Some(exchange), index * each..(index + 1) * each, recompute).run(ids, targets)
                    })
                })
                .collect();
            handles
                .into_iter()
                .map(|handle| handle.join().expect("no panic"))
                .collect::<Result<_>>()
        })?;
        let losses: Vec<&Tensor> = found.iter().map(|found| &found.losses).collect();
        let error = apart(&Tensor::cat(&losses, 1)?, &whole.losses)?;
        assert!(error < most, "{name}, {parts} parts: losses are {error:e} off");
        let square = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
        let mut all = 0.0;
        for expected in whole.gradients.values() {
            all += square(expected)?;
        }
        let mut off = 0.0;
        for (parameter, expected) in &whole.gradients {
            let mut sum = found[0].gradients[parameter].clone();
            for other in &found[1..] {
                sum = (sum + &other.gradients[parameter])?;
            }
            let (wrong, length) = (square(&(&sum - expected)?)?, square(expected)?);
            // What a norm makes of no matter has a gradient that is all rounding.
            assert!(
                wrong.sqrt() <= 10.0 * most * length.sqrt() + most * all.sqrt(),
                "{name}, {parts} parts: {parameter} is {:e} off of {:e}",
                wrong.sqrt(),
                length.sqrt()
            );
            off += wrong;
        }
        let error = (off / all).sqrt();
        assert!(error < most, "{name}, {parts} parts: gradients are {error:e} off");
    }
    Ok(())
}

fn all() -> Vec<(&'static str, Config)> {
    let mut all = variants();
    let both = bidirectional();
    all.extend([
        ("lightnet in both directions", both.clone()),
        (
            "lightnet in both directions, shifted, convolutions",
            Config {
                token_shift: true,
                conv_size: Some(4),
                ..both
            },
        ),
        (
            "llama in both directions",
            Config {
                bidirectional: true,
                ..shape(Architecture::Llama)
            },
        ),
    ]);
    all
}

/// Every mixer in 2, 4 and 8 parts, with recomputed layers too, in f64.
#[test]
fn parts_of_sequences_are_the_whole() -> Result<()> {
    for (name, config) in all() {
        for parts in [2, 4, 8] {
            check(name, &config, DType::F64, parts, None, 1e-12)?;
        }
    }
    Ok(())
}

#[test]
fn parts_of_sequences_are_the_whole_in_f32() -> Result<()> {
    for (name, config) in all() {
        // A norm a head makes much of heads that have given little, and of their rounding; so do angles that data sum up.
        let turns = config.architecture == Architecture::Eos && config.eos.turn == Turn::Data;
        let most = if config.norm_per_head || turns { 5e-5 } else { 1e-5 };
        check(name, &config, DType::F32, 4, None, most)?;
    }
    Ok(())
}

/// Documents that begin within parts, between them, and in one part after the other.
#[test]
fn packed_documents_may_be_in_parts() -> Result<()> {
    let mut packable = 0;
    for (name, config) in all() {
        let (model, _) = model(&config, DType::F64)?;
        let ids = Ids::new(&[0, 0], &[1, 2], config.vocab_size)?;
        let targets = Tensor::zeros((1, 2), DType::U32, &Device::Cpu)?;
        if model
            .packed_losses(&ids, &targets, &[0, 1, 2], &Options::default())
            .is_err()
        {
            continue;
        }
        packable += 1;
        for borders in [
            &[0, 3, 7, 10, 25, 40][..],
            &[0, 1, 20, 40],
            &[0, 10, 12, 13, 40],
            &[0, 40],
        ] {
            for parts in [2, 4] {
                check(name, &config, DType::F64, parts, Some(borders), 1e-12)?;
            }
        }
    }
    assert!(packable >= 12, "{packable}");
    Ok(())
}

#[test]
fn a_model_of_parts_keeps_no_state() -> Result<()> {
    let config = Config {
        attn: hybrid(),
        ..shape(Architecture::Tnl)
    };
    let (model, _) = model(&config, DType::F32)?;
    let Some(exchange) = threads(&[4, 4]).pop() else {
        panic!("two parts");
    };
    let model = model.in_parts(exchange);
    let ids = Ids::new(&[1, 2, 3, 4], &[1, 4], config.vocab_size)?;
    let line = model.extend(&ids, &mut model.start()).unwrap_err().to_string();
    assert!(line.contains("keeps no state"), "{line}");
    Ok(())
}
