//! The layer against the mixers that are instances of it, in f64, and against the literal recurrence.

mod formulas;

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use candle_nn::VarBuilder;
use fulgur_kernels::eos;
use fulgur_kernels::philox::Philox;

use super::Eos;
use crate::lm::{
    Activation, Architecture, Config, Decay, DecaySchedule, EosConfig, GateForm, Instance, Oscillation,
    OutputGate, Source, Turn,
};
use crate::mixer::causal::{CausalContext, CausalLightNet, CosFormer2, Hgrn1, Hgrn2, Tnl};
use crate::params::Outline;

const WIDTH: usize = 12;
const HEADS: usize = 2;
const TOKENS: usize = 21;

type Weights = HashMap<String, Tensor>;

fn normal(name: &str, shape: &[usize]) -> Tensor {
    let mut noise = Philox::named(11, name);
    let count = shape.iter().product();
    let values: Vec<f64> = (0..count).map(|_| 0.5 * f64::from(noise.normal())).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn sized(architecture: Architecture) -> Config {
    Config {
        hidden_size: WIDTH,
        num_attention_heads: HEADS,
        head_dim: None,
        num_hidden_layers: 3,
        initializer_range: 0.3,
        ..Config::of(architecture)
    }
}

/// The EOS layer with the sizes, activations, norm and gate of another mixer.
fn like(config: &Config, eos: EosConfig) -> Config {
    Config {
        architecture: Architecture::Eos,
        use_lower_bound: config.use_lower_bound
            && matches!(config.architecture, Architecture::Hgrn1 | Architecture::Hgrn2),
        eos,
        ..config.clone()
    }
}

/// Random weights in f64 for all that `build` asks for.
fn weights<T>(build: impl Fn(&VarBuilder) -> Result<T>) -> Weights {
    let outline = Outline::new();
    build(&outline.builder()).unwrap();
    let shapes = outline.shapes().into_iter();
    shapes
        .map(|(name, shape)| (name.clone(), normal(&name, &shape)))
        .collect()
}

fn builder(weights: &Weights) -> VarBuilder<'static> {
    VarBuilder::from_tensors(weights.clone(), DType::F64, &Device::Cpu)
}

/// The same weights under other names: pairs of letters of maps.
fn renamed(weights: &Weights, pairs: &[(char, char)]) -> Weights {
    let name = |name: &String| {
        let mut parts = name.splitn(2, '_');
        let first = parts.next().unwrap_or_default();
        match pairs.iter().find(|(from, _)| first == from.to_string()) {
            Some((_, to)) => format!("{to}_{}", parts.next().unwrap_or_default()),
            None => name.clone(),
        }
    };
    weights
        .iter()
        .map(|(key, value)| (name(key), value.clone()))
        .collect()
}

fn stream() -> Tensor {
    normal("x", &[2, TOKENS, WIDTH])
}

fn layer(config: &Config, weights: &Weights, context: &CausalContext<'_>) -> Result<Tensor> {
    config.check()?;
    Eos::new(config, 1, &builder(weights))?.forward(&stream(), context, None)
}

fn plain(config: &Config, weights: &Weights) -> Tensor {
    layer(config, weights, &CausalContext::default()).unwrap()
}

fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let square = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    (square((a - b).unwrap()) / square(b.clone())).sqrt()
}

fn assert_same(a: &Tensor, b: &Tensor, what: &str) {
    let error = apart(a, b);
    assert!(error < 1e-12, "{what}: {error:e}");
    assert!(
        b.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() > 1e-2,
        "{what}"
    );
}

fn of(oscillation: Oscillation) -> EosConfig {
    EosConfig {
        oscillation,
        ..EosConfig::default()
    }
}

#[test]
fn linear_attention_and_tnl_are_instances() -> Result<()> {
    for schedule in [DecaySchedule::None, DecaySchedule::Alibi, DecaySchedule::Log] {
        let config = Config {
            decay_schedule: schedule,
            ..sized(Architecture::Tnl)
        };
        let build = |vb: &VarBuilder| Tnl::new(&config, 1, vb);
        let weights = weights(build);
        let expected = build(&builder(&weights))?.forward(&stream(), &CausalContext::default(), None)?;
        let kinds = match schedule {
            DecaySchedule::None => vec![Instance::LinearAttention, Instance::Tnl],
            _ => vec![Instance::Tnl, Instance::Retnet],
        };
        for instance in kinds {
            let eos = instance.of(&sized(Architecture::Eos)).eos;
            assert_same(&plain(&like(&config, eos), &weights), &expected, instance.name());
        }
        if schedule == DecaySchedule::None {
            continue;
        }
        // One constant gate for all rows of a head, found through the sigmoid.
        let logs = super::super::tnl::log_decays(&config, 1, &Device::Cpu)?.unwrap();
        let inverse = |log: f32| {
            let gate = f64::from(log).exp();
            (gate / (1.0 - gate)).ln()
        };
        let u: Vec<f64> = logs.to_vec1::<f32>()?.into_iter().map(inverse).collect();
        let u = Tensor::new(u, &Device::Cpu)?.reshape((HEADS, 1, 1))?;
        for (kind, rows, columns) in [
            (Oscillation::Head, 1, 1),
            (Oscillation::ConstantKeys, 6, 1),
            (Oscillation::ConstantValues, 1, 6),
            (Oscillation::Constant, 6, 6),
        ] {
            let eos = EosConfig { tau: 1.0, ..of(kind) };
            let mut weights = weights.clone();
            weights.insert("gates".into(), u.repeat((1, rows, columns))?);
            assert_same(
                &plain(&like(&config, eos), &weights),
                &expected,
                &format!("{kind:?}"),
            );
        }
    }
    Ok(())
}

#[test]
fn hgrn_and_hgrn2_are_instances() -> Result<()> {
    let bound = (normal("bound", &[WIDTH]).abs()? * 0.3)?;
    for bounded in [false, true] {
        let context = CausalContext {
            lower_bound: bounded.then_some(&bound),
            ..Default::default()
        };
        let config = Config {
            use_lower_bound: bounded,
            ..sized(Architecture::Hgrn2)
        };
        let build = |vb: &VarBuilder| Hgrn2::new(&config, vb);
        let weights2 = weights(build);
        let expected = build(&builder(&weights2))?.forward(&stream(), &context, None)?;
        let eos = Instance::Hgrn2.of(&sized(Architecture::Eos)).eos;
        let found = layer(&like(&config, eos), &renamed(&weights2, &[('i', 'v')]), &context)?;
        assert_same(&found, &expected, "hgrn2");

        let sizes = Config {
            use_lower_bound: bounded,
            ..sized(Architecture::Hgrn1)
        };
        let eos = Instance::Hgrn.of(&sizes);
        let build = |vb: &VarBuilder| Hgrn1::new(&sizes, vb);
        let weights1 = weights(build);
        let expected = build(&builder(&weights1))?.forward(&stream(), &context, None)?;
        let config = Config {
            num_attention_heads: WIDTH,
            head_dim: Some(1),
            ..like(&sizes, eos.eos)
        };
        let found = layer(&config, &renamed(&weights1, &[('i', 'v')]), &context)?;
        assert_same(&found, &expected, "hgrn");
    }
    Ok(())
}

#[test]
fn lightnet_is_an_instance() -> Result<()> {
    let config = Config {
        decay: Decay::Vector,
        ..sized(Architecture::Lightnet)
    };
    let build = |vb: &VarBuilder| CausalLightNet::new(&config, vb);
    let weights = weights(build);
    let expected = build(&builder(&weights))?.forward(&stream(), &CausalContext::default(), None)?;
    let eos = Instance::Lightnet.of(&sized(Architecture::Eos)).eos;
    let found = plain(&like(&config, eos), &renamed(&weights, &[('k', 'f')]));
    assert_same(&found, &expected, "lightnet");
    Ok(())
}

#[test]
fn lrpe_and_cosformer_turn_rows() -> Result<()> {
    let config = Config {
        half_lrpe: false,
        learn_theta: true,
        ..sized(Architecture::Cosformer2)
    };
    let build = |vb: &VarBuilder| CosFormer2::new(&config, vb);
    let weights = weights(build);
    let run = |weights: &Weights| {
        CosFormer2::new(&config, &builder(weights))?.forward(&stream(), &CausalContext::default(), None)
    };
    let rows = Instance::Lrpe.of(&sized(Architecture::Eos)).eos;
    let expected = run(&weights)?;
    assert_same(&plain(&like(&config, rows), &weights), &expected, "lrpe");
    // One angle for all rows.
    let mut shared = weights.clone();
    shared.insert("lrpe.theta".into(), Tensor::new(&[0.3f64; 6], &Device::Cpu)?);
    let expected = run(&shared)?;
    let eos = EosConfig {
        turn: Turn::Shared,
        ..rows
    };
    shared.insert("lrpe.theta".into(), Tensor::new(&[0.3f64], &Device::Cpu)?);
    assert_same(&plain(&like(&config, eos), &shared), &expected, "cosformer");
    // Type 11 at an angle of zero is type 10.
    let still = EosConfig {
        turn: Turn::None,
        ..rows
    };
    shared.insert("lrpe.theta".into(), Tensor::new(&[0f64], &Device::Cpu)?);
    assert_same(
        &plain(&like(&config, eos), &shared),
        &plain(&like(&config, still), &weights),
        "angle of zero",
    );
    Ok(())
}

/// Angles from data that are alike for all tokens are those of LRPE, but for where they begin.
#[test]
fn angles_from_data_sum_up() -> Result<()> {
    let base = sized(Architecture::Eos);
    let constant = Config {
        eos: EosConfig {
            turn: Turn::Rows,
            ..of(Oscillation::Keys)
        },
        learn_theta: true,
        ..base.clone()
    };
    let mut weights = weights(|vb| Eos::new(&constant, 1, vb));
    // The first channel of the stream is one.
    let rest = stream().narrow(2, 1, WIDTH - 1)?;
    let x = Tensor::cat(
        &[&Tensor::ones((2, TOKENS, 1), DType::F64, &Device::Cpu)?, &rest],
        2,
    )?;
    let theta = weights["lrpe.theta"].clone();
    let zeros = Tensor::zeros((6, WIDTH - 1), DType::F64, &Device::Cpu)?;
    let row = Tensor::cat(&[&theta.reshape((6, 1))?, &zeros], 1)?;
    weights.insert("p_proj.weight".into(), row.repeat((HEADS, 1))?);
    let data = Config {
        eos: EosConfig {
            turn: Turn::Data,
            ..constant.eos
        },
        ..base
    };
    let run = |config: &Config| {
        Eos::new(config, 1, &builder(&weights))?.forward(&x, &CausalContext::default(), None)
    };
    assert_same(&run(&data)?, &run(&constant)?, "data");
    Ok(())
}

/// Type 1 with one factor that is always one.
#[test]
fn outer_gates_with_one_side_are_that_side() -> Result<()> {
    let x = Tensor::cat(
        &[
            &Tensor::ones((2, TOKENS, 1), DType::F64, &Device::Cpu)?,
            &stream().narrow(2, 1, WIDTH - 1)?,
        ],
        2,
    )?;
    for form in [GateForm::Root, GateForm::Slope] {
        let config = |oscillation| Config {
            eos: EosConfig {
                gate: form,
                ..of(oscillation)
            },
            ..sized(Architecture::Eos)
        };
        let weights = weights(|vb| Eos::new(&config(Oscillation::Outer), 1, vb));
        let run = |oscillation, weights: &Weights| {
            Eos::new(&config(oscillation), 1, &builder(weights))?.forward(&x, &CausalContext::default(), None)
        };
        let off = match form {
            GateForm::Root => 1e3,
            GateForm::Slope => -1e3,
        };
        let zeros = Tensor::zeros((WIDTH, WIDTH - 1), DType::F64, &Device::Cpu)?;
        let always = Tensor::cat(&[&Tensor::full(off, (WIDTH, 1), &Device::Cpu)?, &zeros], 1)?;
        for (side, name) in [
            (Oscillation::Keys, "w_proj.weight"),
            (Oscillation::Values, "f_proj.weight"),
        ] {
            let mut weights = weights.clone();
            weights.insert(name.into(), always.clone());
            let (found, expected) = (run(Oscillation::Outer, &weights)?, run(side, &weights)?);
            assert_same(&found, &expected, name);
        }
    }
    Ok(())
}

/// Everything that a layer may be made of.
fn settings() -> Vec<Config> {
    use Oscillation as O;
    let kinds = [
        O::Constant,
        O::Outer,
        O::Values,
        O::Keys,
        O::ConstantKeys,
        O::ConstantValues,
        O::KeysByConstant,
        O::ValuesByConstant,
        O::ValuesByConstantKeys,
        O::KeysByConstantValues,
        O::None,
        O::Cumulative,
        O::Head,
        O::StateSpace,
    ];
    let mut all = Vec::new();
    for oscillation in kinds {
        for (expand, shrink) in [
            (Source::Data, Source::Data),
            (Source::Constant, Source::Data),
            (Source::Data, Source::Constant),
            (Source::Constant, Source::Constant),
            (Source::Tied, Source::Data),
        ] {
            for (turn, gate, fixed) in [
                (Turn::None, GateForm::Root, false),
                (Turn::Rows, GateForm::Slope, true),
                (Turn::Data, GateForm::Root, false),
            ] {
                let constant = matches!(
                    oscillation,
                    O::Constant | O::ConstantKeys | O::ConstantValues | O::Head
                );
                let config = Config {
                    head_dim: Some(3),
                    eos: EosConfig {
                        expand,
                        shrink,
                        turn,
                        gate,
                        fixed: fixed && constant,
                        ..of(oscillation)
                    },
                    ..sized(Architecture::Eos)
                };
                if config.check().is_ok() {
                    all.push(config);
                }
            }
        }
    }
    all
}

/// A complex memory with diagonal transitions, token by token, gives what the three forms do. Frequencies are f32.
#[test]
fn it_is_the_literal_recurrence() -> Result<()> {
    for config in settings() {
        let weights = weights(|vb| Eos::new(&config, 1, vb));
        let layer = Eos::new(&config, 1, &builder(&weights))?;
        let found = layer.forward(&stream(), &CausalContext::default(), None)?;
        let expected = literal(&layer, &config, &weights)?;
        let error = apart(&found, &expected);
        assert!(error < 1e-6, "{:?}: {error:e}", config.eos);
    }
    Ok(())
}

/// Loops over tokens with complex memories. Maps and gates are those of the layer; forms, turns and sums are not.
fn literal(layer: &Eos, config: &Config, weights: &Weights) -> Result<Tensor> {
    let x = stream();
    let (rows, columns) = (3, WIDTH / HEADS);
    let mut parts = layer.parts(&x, &CausalContext::default(), None)?;
    let (log, forgotten) = layer.oscillation(&x, &mut parts, None)?;
    let full = |t: Tensor| -> Result<Vec<f64>> {
        t.to_dtype(DType::F64)?
            .broadcast_as((2, TOKENS, HEADS, rows, columns))?
            .flatten_all()?
            .to_vec1()
    };
    let log = match log {
        Some(log) => full(log)?,
        None => vec![0.0; 2 * TOKENS * HEADS * rows * columns],
    };
    let constant = |name: &str| weights[name].unsqueeze(0)?.unsqueeze(0);
    let e = match config.eos.expand {
        Source::Constant => constant("expand")?,
        Source::Tied => forgotten.unwrap().unsqueeze(4)?,
        Source::Data => match (&parts.expand, forgotten) {
            (Some(e), Some(share)) => (e * share)?.unsqueeze(4)?,
            (Some(e), None) => e.unsqueeze(4)?,
            (None, _) => panic!("no expand"),
        },
    };
    let s = match &parts.shrink {
        Some(s) => s.unsqueeze(4)?,
        None => constant("shrink")?,
    };
    let i = parts.input.as_ref().unwrap().unsqueeze(3)?;
    let (e, s, i) = (full(e)?, full(s)?, full(i)?);
    // Angles that the memory turns by at each token.
    let angle: Vec<f64> = match (&parts.angle, config.eos.turn) {
        (Some(angle), _) => full(angle.unsqueeze(4)?)?,
        (None, Turn::Rows) => {
            let one = |at: usize| 1e4f64.powf(-2.0 * (at / columns % rows) as f64 / rows as f64);
            (0..log.len()).map(one).collect()
        }
        _ => vec![0.0; log.len()],
    };
    let mut y = vec![0.0; 2 * TOKENS * WIDTH];
    for b in 0..2 {
        let mut m = vec![(0.0, 0.0); HEADS * rows * columns];
        for t in 0..TOKENS {
            for (element, m) in m.iter_mut().enumerate() {
                let at = (b * TOKENS + t) * HEADS * rows * columns + element;
                let (gate, (sin, cos)) = (log[at].exp(), angle[at].sin_cos());
                *m = (
                    gate * (cos * m.0 - sin * m.1) + e[at] * i[at],
                    gate * (sin * m.0 + cos * m.1),
                );
                let (head, column) = (element / columns / rows, element % columns);
                y[(b * TOKENS + t) * WIDTH + head * columns + column] += s[at] * m.0;
            }
        }
    }
    let y = Tensor::from_vec(y, (2, TOKENS, WIDTH), &Device::Cpu)?;
    layer.output.forward(&layer.norm.forward(&y, None)?)
}

/// Where there was no memory, its gate does not matter.
#[test]
fn the_first_gate_has_no_gradient() -> Result<()> {
    let t = |name, shape: &[usize]| Var::from_tensor(&normal(name, shape));
    let (e, s) = (t("e", &[1, 4, 1, 3])?, t("s", &[1, 4, 1, 3])?);
    let (i, log) = (t("i", &[1, 4, 1, 5])?, t("log", &[1, 4, 1, 3, 5])?);
    let gates = log.sqr()?.neg()?;
    let (y, _) = eos::scan(&e, &i, &gates, &s, &eos::Options::default())?;
    let grads = y.sqr()?.sum_all()?.backward()?;
    let gradient = grads.get(&log).unwrap().abs()?;
    let sum = |token| gradient.i((0, token))?.sum_all()?.to_scalar::<f64>();
    assert_eq!(sum(0)?, 0.0);
    for token in 1..4 {
        assert!(sum(token)? > 1e-3);
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |change: fn(&mut Config)| {
        let mut config = sized(Architecture::Eos);
        change(&mut config);
        let error = config.check().unwrap_err().to_string();
        error.lines().next().unwrap_or_default().to_owned()
    };
    assert!(refused(|c| c.eos.shrink = Source::Tied).starts_with("eos.shrink is \"tied\""));
    let words = refused(|c| (c.eos.expand, c.eos.oscillation) = (Source::Tied, Oscillation::Values));
    assert!(words.contains("\"keys\" or \"cumulative\""), "{words}");
    assert!(refused(|c| c.eos.tau = 0.0).contains("eos.tau is 0"));
    assert!(refused(|c| c.eos.fixed = true).contains("only constant gates"));
    assert!(refused(|c| c.use_lower_bound = true).contains("eos.tau 1"));
    let gated = Config {
        output_gate: OutputGate::Silu,
        linear_act: Activation::ReluSquared,
        ..sized(Architecture::Eos)
    };
    assert!(gated.check().is_ok());
}
