//! The layer written again from its formulas, in plain f64 and number by number: nothing here is what the layer is made of.
//!
//! ```text
//! m_t = o_t exp(i theta_t) (*) m_{t-1} + e_t i_t^T      y_t = Re(m_t)^T s_t
//! o    0  gate(C)           1  gate(u) gate(w)     2  gate(w)          3  gate(u)         4  gate(C)      5  gate(C)
//!      6  gate(u C)         7  gate(w C)           8  gate(w C)        9  gate(u C)       10 1
//!     11  1, turning        12 exp(z_{t-1} - z_t), z the log of the sum of exp(u)
//! gate(a) = sigmoid(a)^(1 / tau), or exp(-sigmoid(a) slope)
//! ```
//!
//! u is a map of the token to k rows, w one to d columns, C a constant.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor};

use super::{Weights, apart, builder, normal, weights};
use crate::lm::{
    Activation, Architecture, Config, DecaySchedule, EosConfig, GateForm, Instance, Oscillation, OutputGate,
    OutputNorm, Source, Turn,
};
use crate::mixer::causal::CausalContext;
use crate::mixer::causal::eos::Eos;

/// Powers of two, for whose numbers of slopes ALiBi has a formula.
const WIDTH: usize = 16;
const HEADS: usize = 2;
const ROWS: usize = 4;
/// More than a chunk of the recurrences.
const TOKENS: usize = 70;
/// The layer, and of how many.
const LAYER: usize = 1;
const LAYERS: usize = 3;

fn sizes() -> Config {
    Config {
        hidden_size: WIDTH,
        num_attention_heads: HEADS,
        head_dim: Some(ROWS),
        num_hidden_layers: LAYERS,
        ..Config::of(Architecture::Eos)
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn elu(x: f64) -> f64 {
    if x > 0.0 { x } else { x.exp() - 1.0 }
}

fn activated(act: Activation, x: f64) -> f64 {
    match act {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Sigmoid => sigmoid(x),
        Activation::OnePlusElu => 1.0 + elu(x),
        Activation::Silu => x * sigmoid(x),
        Activation::Elu => elu(x),
        Activation::ReluSquared => x.max(0.0) * x.max(0.0),
        Activation::Square => x * x,
        Activation::Exp => x.min(20.0).exp(),
    }
}

/// Slope number `at` of `count`, from 0 on.
fn slope(at: usize, count: usize) -> f64 {
    assert!(count.is_power_of_two());
    2f64.powf(-8.0 * (at + 1) as f64 / count as f64)
}

/// A tensor as numbers.
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Array {
    fn of(tensor: &Tensor) -> Self {
        Self {
            shape: tensor.dims().to_vec(),
            values: tensor.flatten_all().unwrap().to_vec1().unwrap(),
        }
    }

    /// A matrix `[out, in]` times a vector.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let row = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum();
        self.values.chunks(x.len()).map(row).collect()
    }

    /// Of three axes, some of which may be 1.
    fn at(&self, place: [usize; 3]) -> f64 {
        let mut index = 0;
        for (place, &size) in place.into_iter().zip(&self.shape) {
            index = index * size + if size == 1 { 0 } else { place };
        }
        self.values[index]
    }
}

/// The layer, as numbers.
struct Formulas<'a> {
    config: &'a Config,
    arrays: BTreeMap<String, Array>,
    /// Lower bounds of gates.
    bound: Option<&'a [f64]>,
    rows: usize,
    columns: usize,
}

/// What the maps give for a token: empty where there is no map.
struct Given {
    shrink: Vec<f64>,
    expand: Vec<f64>,
    input: Vec<f64>,
    by_row: Vec<f64>,
    by_column: Vec<f64>,
    angles: Vec<f64>,
    /// Of a state space model.
    steps: Vec<f64>,
    /// `exp(z_{t-1} - z_t)` of rows, where gates are cumulative.
    passed: Vec<f64>,
}

impl<'a> Formulas<'a> {
    fn new(config: &'a Config, weights: &Weights, bound: Option<&'a [f64]>) -> Self {
        let heads = config.num_attention_heads;
        Self {
            config,
            arrays: weights
                .iter()
                .map(|(name, weight)| (name.clone(), Array::of(weight)))
                .collect(),
            bound,
            rows: config.head_dim.unwrap_or(WIDTH / heads),
            columns: WIDTH / heads,
        }
    }

    fn map(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.arrays.get(&format!("{name}.weight"));
        weight.map_or(Vec::new(), |weight| weight.times(x))
    }

    /// The answers to one sequence of tokens.
    fn answers(&self, x: &[f64]) -> Vec<f64> {
        let (heads, rows, columns) = (self.config.num_attention_heads, self.rows, self.columns);
        let mut memory = vec![(0.0, 0.0); heads * rows * columns];
        // Of exponentials of logits.
        let mut sums = vec![0.0; heads * rows];
        let mut answers = Vec::new();
        for token in x.chunks(WIDTH) {
            let given = self.given(token, &mut sums);
            let mut y = vec![0.0; WIDTH];
            for (element, m) in memory.iter_mut().enumerate() {
                let place = [
                    element / columns / rows,
                    element / columns % rows,
                    element % columns,
                ];
                let column = place[0] * columns + place[2];
                let o = self.oscillation(place, &given);
                let (sin, cos) = self.angle(place, &given).sin_cos();
                *m = (
                    o * (m.0 * cos - m.1 * sin) + self.expand(place, &given, o) * given.input[column],
                    o * (m.0 * sin + m.1 * cos),
                );
                y[column] += self.shrink(place, &given) * m.0;
            }
            answers.extend(self.map("o_proj", &self.normed(&y, token)));
        }
        answers
    }

    fn given(&self, token: &[f64], sums: &mut [f64]) -> Given {
        let Config { eos, value_act, .. } = *self.config;
        let by_row = self.map("f_proj", token);
        let mut input = self.map("v_proj", token);
        for value in &mut input {
            *value = activated(value_act, *value);
        }
        let steps: Vec<f64> = self
            .map("dt_proj.1", &self.map("dt_proj.0", token))
            .iter()
            .map(|x| (1.0 + x.exp()).ln())
            .collect();
        for (value, step) in input.iter_mut().zip(&steps) {
            *value *= step;
        }
        let mut passed = Vec::new();
        if eos.oscillation == Oscillation::Cumulative {
            for (sum, &logit) in sums.iter_mut().zip(&by_row) {
                let before = *sum;
                // What weighs keys of its own has logits within bounds.
                let bounded = eos.expand == Source::Data;
                *sum += if bounded { logit.clamp(-10.0, 10.0) } else { logit }.exp();
                passed.push(before / *sum);
            }
        }
        Given {
            shrink: self.map("q_proj", token),
            expand: self.map("k_proj", token),
            input,
            by_row,
            by_column: self.map("w_proj", token),
            angles: self.map("p_proj", token),
            steps,
            passed,
        }
    }

    fn oscillation(&self, place: [usize; 3], given: &Given) -> f64 {
        use Oscillation as O;
        let [head, row, column] = place;
        let eos = self.config.eos;
        let [of_head, of_row, of_column] = [
            slope(head, self.config.num_attention_heads),
            slope(row, self.rows),
            slope(column, self.columns),
        ];
        let gate = |a: f64, slope: f64| match eos.gate {
            GateForm::Root => sigmoid(a).powf(1.0 / eos.tau),
            GateForm::Slope => (-sigmoid(a) * slope).exp(),
        };
        let row = head * self.rows + row;
        let column = head * self.columns + column;
        let (u, w) = (|| given.by_row[row], || given.by_column[column]);
        let learnt = || self.arrays["gates"].at(place);
        match eos.oscillation {
            O::Head if eos.fixed => {
                let factor = match self.config.decay_schedule {
                    DecaySchedule::Alibi => 1.0 - LAYER as f64 / (LAYERS - 1) as f64 + 1e-5,
                    other => panic!("{other:?}"),
                };
                (-of_head * factor).exp()
            }
            O::Constant | O::ConstantKeys if eos.fixed => (-of_row).exp(),
            O::ConstantValues if eos.fixed => (-of_column).exp(),
            O::Constant | O::ConstantKeys => gate(learnt(), of_row),
            O::ConstantValues => gate(learnt(), of_column),
            O::Head => gate(learnt(), of_head),
            O::Outer => gate(u(), of_row) * gate(w(), of_column),
            O::Values => gate(w(), of_column),
            O::Keys => match self.bound {
                Some(bound) => bound[row] + (1.0 - bound[row]) * sigmoid(u()),
                None => gate(u(), of_row),
            },
            O::KeysByConstant | O::KeysByConstantValues => gate(u() * learnt(), of_row),
            O::ValuesByConstant | O::ValuesByConstantKeys => gate(w() * learnt(), of_row),
            O::None => 1.0,
            O::Cumulative => given.passed[row],
            O::StateSpace => (-given.steps[column] * learnt().exp()).exp(),
        }
    }

    fn expand(&self, place: [usize; 3], given: &Given, o: f64) -> f64 {
        let Config { eos, linear_act, .. } = *self.config;
        let of_data = || {
            let x = given.expand[place[0] * self.rows + place[1]];
            activated(eos.expand_act.unwrap_or(linear_act), x)
        };
        match eos.expand {
            Source::Constant => self.arrays["expand"].at(place),
            Source::Tied => 1.0 - o,
            Source::Data if eos.oscillation == Oscillation::Cumulative => (1.0 - o) * of_data(),
            Source::Data => of_data(),
        }
    }

    fn shrink(&self, place: [usize; 3], given: &Given) -> f64 {
        match self.config.eos.shrink {
            Source::Constant => self.arrays["shrink"].at(place),
            _ => activated(
                self.config.linear_act,
                given.shrink[place[0] * self.rows + place[1]],
            ),
        }
    }

    fn angle(&self, [head, row, _]: [usize; 3], given: &Given) -> f64 {
        let learnt = |at: usize| self.arrays["lrpe.theta"].values[at];
        match self.config.eos.turn {
            Turn::None => 0.0,
            Turn::Data => given.angles[head * self.rows + row],
            Turn::Shared => learnt(0),
            Turn::Rows if self.config.learn_theta => learnt(row),
            Turn::Rows => 1e4f64.powf(-2.0 * row as f64 / self.rows as f64),
        }
    }

    /// The norm of the memory's answer, with its gate.
    fn normed(&self, y: &[f64], token: &[f64]) -> Vec<f64> {
        let mean = match self.config.output_norm {
            OutputNorm::Layer => y.iter().sum::<f64>() / WIDTH as f64,
            OutputNorm::Rms => 0.0,
        };
        let square = y.iter().map(|y| (y - mean) * (y - mean)).sum::<f64>() / WIDTH as f64;
        let deviation = (square + self.config.rms_norm_eps).sqrt();
        let gates = self.map("g_proj.1", &self.map("g_proj.0", token));
        (0..WIDTH)
            .map(|at| {
                let gate = match self.config.output_gate {
                    OutputGate::None => 1.0,
                    OutputGate::Sigmoid => sigmoid(gates[at]),
                    OutputGate::Silu => gates[at] * sigmoid(gates[at]),
                };
                (y[at] - mean) / deviation * self.arrays["g_norm.weight"].values[at] * gate
            })
            .collect()
    }
}

/// How far the layer is from its formulas, as a part of what they give.
fn error(config: &Config, bound: Option<&[f64]>) -> Result<f64> {
    config.check()?;
    let weights = weights(|vb| Eos::new(config, LAYER, vb));
    let x = normal("formulas", &[2, TOKENS, WIDTH]);
    let bound_tensor = bound.map(|bound| Tensor::new(bound, &Device::Cpu)).transpose()?;
    let context = CausalContext {
        lower_bound: bound_tensor.as_ref(),
        ..Default::default()
    };
    let found = Eos::new(config, LAYER, &builder(&weights))?.forward(&x, &context, None)?;
    let formulas = Formulas::new(config, &weights, bound);
    let mut expected = Vec::new();
    for sequence in 0..2 {
        let x: Vec<f64> = x.get(sequence)?.flatten_all()?.to_vec1()?;
        expected.extend(formulas.answers(&x));
    }
    let expected = Tensor::from_vec(expected, (2, TOKENS, WIDTH), &Device::Cpu)?;
    Ok(apart(&found, &expected))
}

/// Frequencies and decays that are not learnt are f32, whatever the weights are.
fn most(config: &Config) -> f64 {
    let rounded = (config.eos.turn == Turn::Rows && !config.learn_theta)
        || (config.eos.oscillation == Oscillation::Head && config.eos.fixed);
    if rounded { 1e-5 } else { 1e-11 }
}

/// Every type of expand, oscillation and shrink, real and turning, in both forms of gates, learnt and fixed.
#[test]
fn every_type_is_its_formula() -> Result<()> {
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
    let mut checked = 0;
    for oscillation in kinds {
        for (expand, shrink) in [
            (Source::Data, Source::Data),
            (Source::Constant, Source::Data),
            (Source::Data, Source::Constant),
            (Source::Constant, Source::Constant),
            (Source::Tied, Source::Data),
            (Source::Tied, Source::Constant),
        ] {
            for turn in [Turn::None, Turn::Shared, Turn::Rows, Turn::Data] {
                for (gate, tau) in [
                    (GateForm::Root, 16.0),
                    (GateForm::Root, 1.0),
                    (GateForm::Slope, 16.0),
                ] {
                    for fixed in [false, true] {
                        let config = Config {
                            eos: EosConfig {
                                expand,
                                shrink,
                                oscillation,
                                fixed,
                                gate,
                                tau,
                                turn,
                                expand_act: None,
                            },
                            learn_theta: turn == Turn::Shared || tau == 1.0,
                            ..sizes()
                        };
                        // What cannot be, as gates from data that are fixed.
                        if config.check().is_err() {
                            continue;
                        }
                        let error = error(&config, None)?;
                        assert!(error < most(&config), "{:?}: {error:e}", config.eos);
                        checked += 1;
                    }
                }
            }
        }
    }
    assert!(checked > 600, "{checked} checked");
    Ok(())
}

/// All activations, of both sides, of expand alone and of the input.
#[test]
fn every_activation_is_its_formula() -> Result<()> {
    let acts = [
        Activation::None,
        Activation::Relu,
        Activation::Sigmoid,
        Activation::OnePlusElu,
        Activation::Silu,
        Activation::Elu,
        Activation::ReluSquared,
        Activation::Square,
        Activation::Exp,
    ];
    for act in acts {
        for oscillation in [Oscillation::Keys, Oscillation::Outer, Oscillation::Cumulative] {
            let eos = EosConfig {
                oscillation,
                ..EosConfig::default()
            };
            let sides = Config {
                linear_act: act,
                eos,
                ..sizes()
            };
            let expand = Config {
                eos: EosConfig {
                    expand_act: Some(act),
                    ..eos
                },
                ..sizes()
            };
            let input = Config {
                value_act: act,
                eos,
                ..sizes()
            };
            for (what, config) in [("both sides", sides), ("expand", expand), ("input", input)] {
                let error = error(&config, None)?;
                assert!(error < 1e-11, "{act:?} of {what}, {oscillation:?}: {error:e}");
            }
        }
    }
    Ok(())
}

/// Every model of the paper's table, gates of the output, the other norm, and lower bounds.
#[test]
fn every_instance_is_its_formula() -> Result<()> {
    let bound: Vec<f64> = (0..WIDTH).map(|at| 0.05 * at as f64).collect();
    for instance in Instance::ALL {
        for (output_norm, output_gate) in [
            (OutputNorm::Layer, OutputGate::None),
            (OutputNorm::Rms, OutputGate::Sigmoid),
            (OutputNorm::Layer, OutputGate::Silu),
        ] {
            let mut config = Config {
                output_norm,
                output_gate,
                ..instance.of(&sizes())
            };
            // The one angle of cosFormer is a number of its own.
            config.learn_theta |= config.eos.turn == Turn::Shared;
            let name = instance.name();
            let found = error(&config, None)?;
            assert!(found < most(&config), "{name}: {found:e}");
            if matches!(instance, Instance::Hgrn | Instance::Hgrn2) {
                config.use_lower_bound = true;
                if instance == Instance::Hgrn2 {
                    config.head_dim = None;
                }
                let found = error(&config, Some(&bound))?;
                assert!(found < 1e-11, "{name} with bounds: {found:e}");
            }
        }
    }
    Ok(())
}
