//! Models whose layers lie on several ranks beside the model that is whole.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use fulgur_kernels::cross_entropy::Options;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::exchange::{StateExchange, threads};
use fulgur_kernels::tape;

use super::parts::model;
use crate::lm::{Activation, Architecture, Config, DecaySchedule, LanguageModel, OutputGate};

const TOKENS: usize = 37;

fn shape(architecture: Architecture) -> Config {
    Config {
        vocab_size: 23,
        hidden_size: 32,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        ..Config::of(architecture)
    }
}

fn cases() -> Vec<(&'static str, Config)> {
    let (tnl, transnormer) = (shape(Architecture::Tnl), shape(Architecture::Transnormer));
    vec![
        ("tnl", tnl.clone()),
        (
            "tnl with LRPE, short convolutions and heads normed one by one",
            Config {
                lrpe_layers: vec![0, 1],
                conv_size: Some(3),
                norm_per_head: true,
                decay_schedule: DecaySchedule::Log,
                ..tnl.clone()
            },
        ),
        (
            "tnl with the gate first",
            Config {
                gate_first: true,
                output_gate: OutputGate::Silu,
                gate_low_rank_dim: Some(5),
                ..tnl
            },
        ),
        ("transnormer", transnormer.clone()),
        (
            "transnormer with wide values",
            Config {
                hidden_act: Activation::Sigmoid,
                elementwise_affine: true,
                decay_schedule: DecaySchedule::Linear8,
                ..transnormer
            },
        ),
    ]
}

/// Losses of the tokens, and gradients by name.
type Found = (Vec<f64>, BTreeMap<String, Tensor>);

fn run(model: &LanguageModel, vars: &BTreeMap<String, Var>) -> Result<Found> {
    let vocab = model.config().vocab_size;
    let draw = |step: usize| -> Vec<u32> {
        (0..2 * TOKENS)
            .map(|i| ((i * i + step * i + 7 * step) % vocab) as u32)
            .collect()
    };
    let ids = Ids::new(&draw(3), &[2, TOKENS], vocab)?;
    let targets = Tensor::from_vec(draw(5), (2, TOKENS), &Device::Cpu)?;
    let options = Options::default();
    let (loss, tape) = tape::record(|| model.loss(&ids, &targets, &options));
    let found = tape.backward(&loss?)?;
    let losses = model.losses(&ids, &targets, &options)?;
    let gradients = vars
        .iter()
        .filter_map(|(name, var)| Some((name.clone(), found.get(var)?.clone())));
    Ok((losses.to_vec1::<f64>()?, gradients.collect()))
}

/// As one rank, with its cuts of the whole model's tensors.
fn run_part(config: &Config, ranks: &Arc<dyn StateExchange>, recompute: bool) -> Result<Found> {
    let (_, whole) = model(config, DType::F64)?;
    let mut vars = BTreeMap::new();
    for (name, var) in &whole {
        let own = config
            .cut_of(name)
            .part(&var.as_detached_tensor(), 0, ranks.part(), ranks.parts())?;
        vars.insert(name.clone(), Var::from_tensor(&own)?);
    }
    let tensors: HashMap<String, Tensor> = vars
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
    let model = LanguageModel::in_tensor_part(config, DType::F64, &vb, ranks)?.recomputed(recompute);
    run(&model, &vars)
}

fn apart<'a>(pairs: impl Iterator<Item = (&'a Tensor, &'a Tensor)>) -> Result<f64> {
    let (mut off, mut all) = (0.0, 0.0);
    for (found, expected) in pairs {
        off += (found - expected)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        all += expected.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok((off / all).sqrt())
}

/// Degrees 1, 2 and 4 have the losses and gradients of the whole, whether layers run again or not; what all ranks have, they have
/// with the same bits.
#[test]
fn degrees_are_the_whole() -> Result<()> {
    for (name, config) in cases() {
        let (whole, vars) = model(&config, DType::F64)?;
        let (losses, expected) = run(&whole, &vars)?;
        for (degree, recompute) in [(1, false), (2, false), (2, true), (4, false)] {
            let exchanges = threads(&vec![1; degree]);
            let found: Vec<Found> = std::thread::scope(|scope| {
                let handles: Vec<_> = exchanges
                    .iter()
                    .map(|ranks| scope.spawn(|| run_part(&config, ranks, recompute)))
                    .collect();
                handles
                    .into_iter()
                    .map(|handle| handle.join().unwrap())
                    .collect::<Result<_>>()
            })?;
            for (own, _) in &found {
                for (own, expected) in own.iter().zip(&losses) {
                    assert!(
                        (own - expected).abs() < 1e-12,
                        "{name}, {degree}: {own} {expected}"
                    );
                }
            }
            let mut joined = BTreeMap::new();
            for name in expected.keys() {
                let parts: Vec<Tensor> = found.iter().map(|(_, own)| own[name].clone()).collect();
                let cut = config.cut_of(name);
                if cut == crate::lm::Cut::Whole {
                    let bits = |x: &Tensor| x.flatten_all()?.to_vec1::<f64>();
                    for part in &parts {
                        assert_eq!(bits(part)?, bits(&parts[0])?, "{name}");
                    }
                }
                joined.insert(name.clone(), cut.whole(&parts, 0)?);
            }
            let error = apart(expected.iter().map(|(name, expected)| (&joined[name], expected)))?;
            assert!(error < 1e-12, "{name}, {degree} ranks: gradients {error:e}");
        }
    }
    Ok(())
}

/// Without the sum over ranks the norm is another one: what the test above would see.
#[test]
fn a_norm_of_some_heads_is_not_that_of_all() -> Result<()> {
    let config = shape(Architecture::Tnl);
    let per_head = Config {
        norm_per_head: true,
        ..config.clone()
    };
    let (one, vars) = model(&config, DType::F64)?;
    let (other, other_vars) = model(&per_head, DType::F64)?;
    let [one, other] = [run(&one, &vars)?.0, run(&other, &other_vars)?.0];
    assert!(
        one.iter()
            .zip(&other)
            .any(|(one, other)| (one - other).abs() > 1e-6)
    );
    Ok(())
}

#[test]
fn models_that_do_not_split_are_refused() {
    let tnl = shape(Architecture::Tnl);
    for (config, ranks, words) in [
        (
            shape(Architecture::Hgrn2),
            2,
            "architecture is hgrn2, expected tnl or transnormer",
        ),
        (
            tnl.clone(),
            3,
            "num_attention_heads is 4, expected a multiple of the ranks",
        ),
        (
            Config {
                intermediate_size: 26,
                ..tnl.clone()
            },
            4,
            "intermediate_size is 26",
        ),
        (
            Config {
                attention_bias: true,
                ..tnl.clone()
            },
            2,
            "maps have biases, expected none",
        ),
        (
            Config {
                output_norm: crate::lm::OutputNorm::Layer,
                ..tnl
            },
            2,
            "output_norm is layer",
        ),
    ] {
        let line = config.check_tensor(ranks).unwrap_err();
        assert!(
            line.contains(words) && line.ends_with(&format!("distributed.tensor = {ranks}")),
            "{line}"
        );
    }
}
