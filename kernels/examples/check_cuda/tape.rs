//! Layers of language models by a tape, which makes some results again, against candle's graph, which keeps all: the same bits.

use crate::training::Check;
use crate::{EPS, host, values};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use fulgur_kernels::lrpe::{Pairing, rotary_frequencies, rotate, token_phases};
use fulgur_kernels::split::{Part, split};
use fulgur_kernels::{additive, attention, decay, glu, linear, norm, tape};

const BATCH: usize = 2;
const TOKENS: usize = 130;
const HEADS: usize = 2;
const WIDTH: usize = 128;
const HIDDEN: usize = 176;
const RANK: usize = 64;

/// Which mixer the layer has.
#[derive(Clone, Copy)]
enum Mixer {
    Heads,
    Channels,
    Additive,
    Softmax,
}

/// Shapes of the weights; the last three are gains, before them a lower bound.
const SHAPES: [&[usize]; 13] = [
    &[WIDTH, WIDTH],
    &[WIDTH, WIDTH],
    &[WIDTH, WIDTH],
    &[RANK, WIDTH],
    &[WIDTH, RANK],
    &[WIDTH, WIDTH],
    &[HIDDEN, WIDTH],
    &[HIDDEN, WIDTH],
    &[WIDTH, HIDDEN],
    &[WIDTH],
    &[WIDTH],
    &[WIDTH],
    &[WIDTH],
];

fn mix(mixer: Mixer, normed: &Tensor, w: &[Tensor]) -> Result<Tensor> {
    let heads = |x: &Tensor| x.reshape((BATCH, TOKENS, HEADS, WIDTH / HEADS));
    let bound = (w[9].tanh()?.abs()? * 0.5)?;
    let (plain, silu) = (Part::Plain(WIDTH), Part::Silu(WIDTH));
    let parts = match mixer {
        Mixer::Heads => [silu, silu, silu],
        Mixer::Channels => [silu, Part::Gate(WIDTH, Some(&bound)), plain],
        Mixer::Additive => [silu, plain, plain],
        Mixer::Softmax => [plain, plain, plain],
    };
    let parts = split(&linear::joined(normed, &[&w[0], &w[1], &w[2]])?, &parts)?;
    let rows: Vec<Tensor> = parts.iter().map(heads).collect::<Result<_>>()?;
    let [q, k, v] = [&rows[0], &rows[1], &rows[rows.len() - 1]];
    let decayed = |decay| {
        let options = decay::Causal {
            decay,
            ..Default::default()
        };
        Ok::<_, Error>(decay::causal(q, k, v, &options)?.0)
    };
    let o = match mixer {
        Mixer::Heads => {
            let logs = Tensor::new(&[-0.5f32, -0.01], normed.device())?;
            decayed(decay::LogDecay::Head(&logs))?
        }
        Mixer::Channels => decayed(decay::LogDecay::Channel(&rows[2]))?,
        Mixer::Additive => additive::causal(q, k, v, &additive::Causal::default())?.0,
        Mixer::Softmax => {
            let theta = rotary_frequencies(WIDTH / HEADS, 1e4, normed.device())?.to_dtype(DType::F32)?;
            let phase = token_phases(&theta, TOKENS, 0)?;
            let [q, k] = [q, k].map(|x| rotate(x, &phase, Pairing::Halves));
            let options = attention::Options {
                causal: true,
                ..Default::default()
            };
            attention::softmax(&q?, &k?, v, &options)?
        }
    };
    let o = o.flatten_from(2)?;
    let o = match mixer {
        Mixer::Softmax => o,
        Mixer::Channels => norm::rms_norm_to(&o, Some(&w[10].to_dtype(DType::BF16)?), 1, EPS, DType::BF16)?,
        Mixer::Heads | Mixer::Additive => {
            let gate = linear::linear(&linear::linear(normed, &w[3], None)?, &w[4], None)?;
            norm::rms_norm_gated(&o, Some(&w[10]), &gate, norm::Gate::Sigmoid, 1, EPS)?
        }
    };
    linear::linear(&o, &w[5], None)
}

/// A number that depends on both results of a layer.
fn layer(mixer: Mixer, x: &Tensor, w: &[Tensor]) -> Result<Tensor> {
    let normed = norm::rms_norm_to(x, Some(&w[11]), 1, EPS, DType::BF16)?;
    let (x, normed) = norm::add_norm(x, &mix(mixer, &normed, w)?, Some(&w[12]), EPS)?;
    let hidden = glu::swiglu(&linear::joined(&normed, &[&w[6], &w[7]])?)?;
    let (x, normed) = norm::add_norm(&x, &linear::linear(&hidden, &w[8], None)?, None, EPS)?;
    x.sqr()?.mean_all()? + normed.to_dtype(DType::F32)?.sin()?.mean_all()?
}

/// The loss and all gradients, by a tape or by candle's graph.
fn derive(mixer: Mixer, device: &Device, on_tape: bool) -> Result<Vec<Vec<f64>>> {
    let draw = |seed: usize, shape: &[usize]| {
        let drawn = host(seed as u64, shape, DType::F32)?.to_dtype(DType::F32)?;
        let spread = if shape.len() == 2 { 0.1 } else { 1.0 };
        Var::from_tensor(&(drawn * spread)?.to_device(device)?)
    };
    let mut vars = vec![draw(50, &[BATCH, TOKENS, WIDTH])?];
    for (seed, shape) in SHAPES.iter().enumerate() {
        vars.push(draw(seed, shape)?);
    }
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let run = || layer(mixer, &tensors[0], &tensors[1..]);
    let (loss, gradients) = if on_tape {
        let (loss, tape) = tape::record(run);
        let loss = loss?;
        let gradients = tape.backward(&loss)?;
        (loss, gradients)
    } else {
        let loss = run()?;
        let gradients = loss.backward()?;
        (loss, gradients)
    };
    let mut all = vec![values(&loss)?];
    for var in &vars {
        // Not every mixer uses all weights.
        all.push(gradients.get(var).map_or_else(|| Ok(Vec::new()), values)?);
    }
    Ok(all)
}

fn same(mixer: Mixer, device: &Device) -> Result<String> {
    let (found, wanted) = (derive(mixer, device, true)?, derive(mixer, device, false)?);
    let gradients = wanted.iter().filter(|values| !values.is_empty()).count();
    if gradients < 11 || wanted.iter().flatten().any(|value| !value.is_finite()) {
        return Err(Error::Msg(format!(
            "{gradients} gradients, or some are not finite"
        )));
    }
    match found
        .iter()
        .zip(&wanted)
        .position(|(found, wanted)| found != wanted)
    {
        None => Ok("the same bits".to_owned()),
        Some(place) => Err(Error::Msg(format!(
            "operand {place} has another gradient on a tape"
        ))),
    }
}

pub(crate) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "tape, decay of heads",
            run: |device| same(Mixer::Heads, device),
        },
        Check {
            name: "tape, decay of channels",
            run: |device| same(Mixer::Channels, device),
        },
        Check {
            name: "tape, additive",
            run: |device| same(Mixer::Additive, device),
        },
        Check {
            name: "tape, softmax",
            run: |device| same(Mixer::Softmax, device),
        },
    ]
}
