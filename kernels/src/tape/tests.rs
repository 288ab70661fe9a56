//! Gradients by a tape against those of the graph, and what a tape keeps.

use std::rc::Rc;

use super::*;
use crate::glu::swiglu;
use crate::linear::{joined, linear};
use crate::norm::rms_norm;
use crate::residual::add_branch;
use crate::testing::{normal, relative_rms, values};
use crate::{additive, attention, decay, lrpe, norm, split};

/// Two residual branches with shared weights, views, a result that is used twice, and plain operations between.
fn network(x: &Tensor, weights: &[Tensor]) -> Result<Tensor> {
    let mut x = x.clone();
    for _ in 0..2 {
        let normed = rms_norm(&x, Some(&weights[2]), 1e-6)?;
        let folded = normed.reshape((2, 6, 8))?;
        let hidden = swiglu(&linear(&folded, &weights[0], None)?)?;
        let turned = hidden.transpose(0, 1)?.contiguous()?.tanh()?.transpose(0, 1)?;
        let branch = linear(&turned, &weights[1], Some(&weights[2]))?.reshape(x.shape())?;
        x = add_branch(&x, &(branch + &normed)?, None)?;
    }
    x.sqr()?.mean_all()
}

fn inputs() -> (Tensor, Vec<Var>) {
    let var = |seed: u64, shape: &[usize]| Var::from_tensor(&normal(seed, shape)).unwrap();
    (
        normal(1, &[3, 4, 8]),
        vec![var(2, &[10, 8]), var(3, &[8, 5]), var(4, &[8]), var(5, &[3, 3])],
    )
}

#[test]
fn a_given_adjoint_is_that_of_a_weighted_sum() -> Result<()> {
    let (x, vars) = inputs();
    let weights = normal(9, &[3, 4, 8]);
    for turned in [false, true] {
        // The result of an operator, and one that candle's graph lies behind.
        let run = || -> Result<Tensor> {
            let y = rms_norm(&x, Some(&vars[2]), 1e-6)?;
            if turned { y.neg() } else { Ok(y) }
        };
        let expected = (run()? * &weights)?.sum_all()?.backward()?;
        let (y, tape) = record(run);
        let y = y?;
        let found = tape.backward_from(&y, &weights)?;
        let [found, expected] = [&found, &expected].map(|store| values(store.get(&vars[2]).unwrap()));
        assert!(relative_rms(&found, &expected) < 1e-13);
        let (_, tape) = record(run);
        let refused = tape.backward_from(&y, &x.t()?).unwrap_err().to_string();
        assert!(refused.contains("expected [3, 4, 8]"), "{refused}");
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_the_graph() {
    let (x, vars) = inputs();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let expected = network(&x, &tensors).unwrap().backward().unwrap();
    let (loss, tape) = record(|| network(&x, &tensors));
    assert!(tape.entries.len() >= 10);
    let found = tape.backward(&loss.unwrap()).unwrap();
    for var in &vars[..3] {
        let (found, expected) = (
            values(found.get(var).unwrap()),
            values(expected.get(var).unwrap()),
        );
        assert!(relative_rms(&found, &expected) < 1e-14);
    }
    assert!(found.get(&vars[3]).is_none());
    // Nothing is left but the gradients of the weights.
    assert_eq!(found.get_ids().count(), 3);
}

/// A block of the network twice, as it is and forgotten; both of its results go on.
#[test]
fn what_is_recomputed_has_the_same_gradients() -> Result<()> {
    let (x, vars) = inputs();
    let weights: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let block = |x: &Tensor, scale: &Tensor, weights: &[Tensor]| -> Result<Vec<Tensor>> {
        let normed = rms_norm(x, Some(&weights[2]), 1e-6)?;
        let branch = linear(&swiglu(&linear(&normed, &weights[0], None)?)?, &weights[1], None)?;
        // One result of an operator, one of candle's graph, from a scale that lies outside.
        Ok(vec![add_branch(x, &branch, None)?, branch.broadcast_mul(scale)?])
    };
    let run = |forget: bool| -> Result<Vec<Vec<f64>>> {
        let (loss, tape) = record(|| -> Result<Tensor> {
            let mut x = linear(
                &x,
                &weights[3].repeat((3, 3))?.narrow(0, 0, 8)?.narrow(1, 0, 8)?,
                None,
            )?;
            let scale = weights[2].tanh()?;
            for _ in 0..2 {
                let (inner, outer) = ((x.clone(), scale.clone()), weights.clone());
                let results = if forget {
                    recompute(move || block(&inner.0, &inner.1, &outer))?
                } else {
                    block(&x, &scale, &weights)?
                };
                x = (&results[0] + &results[1])?;
            }
            x.sqr()?.mean_all()
        });
        if forget {
            assert_eq!(tape.entries.len(), 3);
        }
        let loss = loss?;
        let found = tape.backward(&loss)?;
        let gradients = vars.iter().map(|var| values(found.get(var).unwrap()));
        Ok([values(&loss)].into_iter().chain(gradients).collect())
    };
    for (forgotten, kept) in run(true)?.iter().zip(&run(false)?) {
        assert!(relative_rms(forgotten, kept) < 1e-14);
    }
    Ok(())
}

/// The token mixers of language models.
#[derive(Clone, Copy, Debug)]
enum Mixer {
    Heads,
    Channels,
    Additive,
    Softmax,
}

const MIXERS: [Mixer; 4] = [Mixer::Heads, Mixer::Channels, Mixer::Additive, Mixer::Softmax];
const WIDTH: usize = 8;
const HIDDEN: usize = 12;

/// Weights of a layer of a language model.
fn layer_weights() -> Vec<Var> {
    let shapes: [&[usize]; 11] = [
        &[WIDTH, WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH / 2, WIDTH],
        &[WIDTH, WIDTH / 2],
        &[WIDTH, WIDTH],
        &[HIDDEN, WIDTH],
        &[HIDDEN, WIDTH],
        &[WIDTH, HIDDEN],
        &[WIDTH],
        &[WIDTH],
    ];
    let draw = |(seed, shape): (usize, &&[usize])| Var::from_tensor(&single(seed as u64, shape));
    shapes
        .iter()
        .enumerate()
        .map(|made| draw(made).unwrap())
        .collect()
}

fn single(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

fn mix(mixer: Mixer, normed: &Tensor, w: &[Tensor]) -> Result<Tensor> {
    let (batch, tokens, width) = normed.dims3()?;
    let heads = |x: &Tensor| x.reshape((batch, tokens, 2, width / 2));
    let wide = joined(normed, &[&w[0], &w[1], &w[2]])?;
    let (plain, silu) = (split::Part::Plain(width), split::Part::Silu(width));
    let bound = w[9].narrow(0, 0, width)?.abs()?.affine(0.1, 0.0)?;
    let parts = match mixer {
        Mixer::Heads => [silu, silu, silu],
        Mixer::Channels => [silu, split::Part::Gate(width, Some(&bound)), plain],
        Mixer::Additive => [silu, plain, plain],
        Mixer::Softmax => [plain, plain, plain],
    };
    let parts = split::split(&wide, &parts)?;
    let rows: Vec<Tensor> = parts.iter().map(heads).collect::<Result<_>>()?;
    let [q, k, v] = [&rows[0], &rows[1], &rows[rows.len() - 1]];
    let logs = Tensor::new(&[-0.5f32, -0.1], &Device::Cpu)?;
    let decayed = |decay| {
        let options = decay::Causal {
            decay,
            ..Default::default()
        };
        Ok::<_, candle_core::Error>(decay::causal(q, k, v, &options)?.0)
    };
    let o = match mixer {
        Mixer::Heads => decayed(decay::LogDecay::Head(&logs))?,
        Mixer::Channels => decayed(decay::LogDecay::Channel(&rows[2]))?,
        Mixer::Additive => additive::causal(q, k, v, &additive::Causal::default())?.0,
        Mixer::Softmax => {
            let theta = lrpe::rotary_frequencies(width / 2, 1e4, &Device::Cpu)?.to_dtype(DType::F32)?;
            let phase = lrpe::token_phases(&theta, tokens, 0)?;
            let [q, k] = [q, k].map(|x| lrpe::rotate(x, &phase, lrpe::Pairing::Halves));
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
        Mixer::Channels => rms_norm(&o, Some(&w[9]), 1e-6)?,
        _ => {
            let gate = linear(&linear(normed, &w[3], None)?, &w[4], None)?;
            norm::rms_norm_gated(&o, Some(&w[9]), &gate, norm::Gate::Sigmoid, 1, 1e-6)?
        }
    };
    linear(&o, &w[5], None)
}

/// The stream and its norm behind a layer.
fn layer(mixer: Mixer, [x, normed]: [&Tensor; 2], w: &[Tensor]) -> Result<[Tensor; 2]> {
    let branch = mix(mixer, normed, w)?;
    let (x, normed) = norm::add_norm(x, &branch, Some(&w[10]), 1e-6)?;
    let hidden = swiglu(&joined(&normed, &[&w[6], &w[7]])?)?;
    let (x, normed) = norm::add_norm(&x, &linear(&hidden, &w[8], None)?, Some(&w[10]), 1e-6)?;
    Ok([x, normed])
}

/// Loss, gradients, and bytes on the tape of `layers` layers over `tokens` tokens.
fn train(mixer: Mixer, layers: usize, tokens: usize) -> Result<(Vec<Vec<f64>>, usize)> {
    let vars = layer_weights();
    let w: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let input = single(77, &[2, tokens, WIDTH]);
    let (loss, tape) = record(|| -> Result<Tensor> {
        let mut x = linear(&input, &w[0], None)?;
        let mut normed = rms_norm(&x, Some(&w[10]), 1e-6)?;
        for _ in 0..layers {
            [x, normed] = layer(mixer, [&x, &normed], &w)?;
        }
        normed.sqr()?.mean_all()
    });
    let (loss, kept) = (loss?, tape.kept_bytes());
    let gradients = tape.backward(&loss)?;
    let mut all = vec![values(&loss)];
    // Some mixers have no gate.
    all.extend(vars.iter().filter_map(|var| gradients.get(var)).map(values));
    Ok((all, kept))
}

#[test]
fn what_is_not_kept_changes_no_bit() -> Result<()> {
    for mixer in MIXERS {
        let (found, kept) = train(mixer, 3, 7)?;
        KEEP_EVERYTHING.set(true);
        let everything = train(mixer, 3, 7);
        KEEP_EVERYTHING.set(false);
        let (expected, all) = everything?;
        assert!(found.len() >= 9 && found.iter().flatten().all(|x| x.is_finite()));
        assert_eq!(found, expected, "{mixer:?}");
        assert!(kept * 10 < all * 8, "{mixer:?}: {kept} of {all} bytes");
    }
    Ok(())
}

/// Values that a layer keeps, in widths of a token: two sums, two norms, the wide projections of the unit, and what the mixer
/// keeps.
#[test]
fn a_layer_keeps_no_more_than_it_must() -> Result<()> {
    let (hidden, rank) = (HIDDEN as f64 / WIDTH as f64, 0.5);
    for (mixer, own) in [
        // The projection, the output before and behind its norm, the narrow side of the gate.
        (Mixer::Heads, 3.0 + 2.0 + rank),
        (Mixer::Channels, 3.0 + 2.0),
        // Queries and keys that turned, values, the output, a logarithm a head, and two phases for the two batches.
        (Mixer::Softmax, 3.0 + 1.0 + 3.0 / WIDTH as f64),
    ] {
        let kept = |layers, tokens| Ok::<_, candle_core::Error>(train(mixer, layers, tokens)?.1 as f64);
        let [few, more] =
            [3, 7].map(|tokens| Ok::<_, candle_core::Error>(kept(3, tokens)? - kept(2, tokens)?));
        let widths = (more? - few?) / ((7 - 3) * 2 * WIDTH * 4) as f64;
        assert_eq!(widths, 2.0 + 2.0 + 2.0 * hidden + own, "{mixer:?}");
    }
    Ok(())
}

#[test]
fn a_result_that_is_made_again_serves_all_who_read_it() -> Result<()> {
    let (x, vars) = inputs();
    let weights: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let run = |again: bool| -> Result<Vec<Vec<f64>>> {
        KEEP_EVERYTHING.set(!again);
        let (loss, tape) = record(|| -> Result<Tensor> {
            let hidden = swiglu(&linear(&x, &weights[0], None)?)?;
            // A map of another shape of it, another operator, and candle's graph.
            let mapped = linear(&hidden.reshape((2, 6, 5))?, &weights[1], None)?;
            let normed = rms_norm(&hidden, None, 1e-6)?;
            mapped.sqr()?.mean_all()? + (normed.mul(&hidden)?.sum_all()? + hidden.sum_all()?)?
        });
        KEEP_EVERYTHING.set(false);
        let gradients = tape.backward(&loss?)?;
        Ok(vars[..2]
            .iter()
            .map(|var| values(gradients.get(var).unwrap()))
            .collect())
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}

/// Says that it reads nothing, and reads its argument.
struct Liar;

impl crate::autograd::Gradient<1> for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some((x.detach() * grad)?)])
    }
}

#[test]
fn a_gradient_that_reads_what_it_did_not_name_is_not_a_number() -> Result<()> {
    let (x, vars) = inputs();
    let (loss, tape) = record(|| {
        let y = linear(&x, vars[0].as_tensor(), None)?;
        let value = crate::autograd::Value::Tensor(y.detach());
        crate::autograd::attach1(value, &y, Liar)?.sum_all()
    });
    let gradients = tape.backward(&loss?)?;
    let found = values(gradients.get(&vars[0]).unwrap());
    assert!(found.iter().all(|x| x.is_nan()));
    Ok(())
}

#[test]
fn records_nest_and_end_with_their_work() {
    let (x, vars) = inputs();
    let map = |x: &Tensor| linear(x, vars[0].as_tensor(), None);
    let (inner, outer) = record(|| {
        map(&x).unwrap();
        record(|| map(&x).unwrap()).1
    });
    assert_eq!((inner.entries.len(), outer.entries.len()), (1, 1));
    let caught = std::panic::catch_unwind(|| record(|| panic!("on purpose")));
    assert!(caught.is_err() && !is_recording());
    // Without gradients there is nothing to note down.
    let weight = vars[0].as_detached_tensor();
    let (y, tape) = record(|| linear(&x, &weight, None).unwrap());
    assert!(tape.entries.is_empty() && !y.track_op());
}

/// Marks come by in the reverse order, between the operators before and behind them, and find the gradients so far.
#[test]
fn marks_are_passed_on_the_way_back() -> Result<()> {
    let (x, vars) = inputs();
    let weights: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let expected = network(&x, &weights)?.backward()?;
    let passed = Rc::new(RefCell::new(Vec::new()));
    let taken = Rc::new(RefCell::new(None));
    let (loss, tape) = record(|| -> Result<Tensor> {
        for place in 0..2 {
            let (passed, taken, weight) = (passed.clone(), taken.clone(), weights[1].clone());
            on_the_way_back(move |gradients| {
                passed.borrow_mut().push(place);
                if place == 0 {
                    *taken.borrow_mut() = gradients.take(&weight);
                }
                Ok(())
            })?;
        }
        let loss = network(&x, &weights)?;
        let passed = passed.clone();
        on_the_way_back(move |_| {
            passed.borrow_mut().push(2);
            Ok(())
        })?;
        Ok(loss)
    });
    let found = tape.backward(&loss?)?;
    assert_eq!(*passed.borrow(), [2, 1, 0]);
    assert!(found.get(&vars[1]).is_none());
    let taken = taken.borrow_mut().take().unwrap();
    for (found, var) in [(&taken, &vars[1]), (found.get(&vars[0]).unwrap(), &vars[0])] {
        assert!(relative_rms(&values(found), &values(expected.get(var).unwrap())) < 1e-13);
    }
    on_the_way_back(|_| candle_core::bail!("there is no way back"))
}
