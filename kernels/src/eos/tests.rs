//! The scan against literal loops, gradients against differences, parts and steps against the whole.

use super::{Options, scan, step};
use crate::decay::{Causal, LogDecay, causal};
use crate::testing::{
    PACKED, PARTS, check_gradients, check_parts, check_precision, check_threads, normal, own_borders,
    relative_rms, values,
};
use candle_core::{IndexOp, Result, Tensor, Var};

/// Loops in f64 over the full gates: outputs and final memories.
fn literal(t: &[Tensor], borders: &[usize]) -> [Vec<f64>; 2] {
    let &[b, n, h, k] = t[0].dims() else {
        panic!("four axes")
    };
    let d = t[1].dims()[3];
    let gates = values(&t[2].broadcast_as((b, n, h, k, d)).unwrap().contiguous().unwrap());
    let [e, i, s] = [&t[0], &t[1], &t[3]].map(values);
    let initial = t.get(4).map(values);
    let (mut y, mut last) = (vec![0.0; b * n * h * d], Vec::new());
    for batch in 0..b {
        for (index, pair) in borders.windows(2).enumerate() {
            for head in 0..h {
                let line = (batch * (borders.len() - 1) + index) * h + head;
                let mut m = initial
                    .as_ref()
                    .map_or_else(|| vec![0.0; k * d], |m| m[line * k * d..][..k * d].to_vec());
                for t in pair[0]..pair[1] {
                    let row = (batch * n + t) * h + head;
                    for a in 0..k {
                        for c in 0..d {
                            let m = &mut m[a * d + c];
                            *m = gates[(row * k + a) * d + c].exp() * *m + e[row * k + a] * i[row * d + c];
                            y[row * d + c] += s[row * k + a] * *m;
                        }
                    }
                }
                last.extend(m);
            }
        }
    }
    [y, last]
}

fn log(seed: u64, shape: &[usize]) -> Tensor {
    (normal(seed, shape).sqr().unwrap() * -0.3).unwrap()
}

/// Operands and an initial memory, with gates that are alike along the axes of length 1 in `gates`.
fn inputs(n: usize, d: usize, gates: [bool; 5]) -> Vec<Tensor> {
    let (b, h, k) = (2, 2, 3);
    let shape: Vec<usize> = [b, n, h, k, d]
        .iter()
        .zip(gates)
        .map(|(&full, own)| if own { full } else { 1 })
        .collect();
    vec![
        normal(1, &[b, n, h, k]),
        normal(2, &[b, n, h, d]),
        log(3, &shape),
        normal(4, &[b, n, h, k]),
        normal(5, &[b, h, k, d]),
    ]
}

const GATES: [[bool; 5]; 6] = [
    [true; 5],
    [true, true, true, true, false],
    [true, true, true, false, true],
    [false, false, true, true, true],
    [false, true, false, false, false],
    [false; 5],
];

fn run(t: &[Tensor]) -> Result<Tensor> {
    let options = Options {
        initial: t.get(4),
        ..Default::default()
    };
    let (y, last) = scan(&t[0], &t[1], &t[2], &t[3], &options)?;
    Tensor::cat(&[y.flatten_all()?, last.flatten_all()?], 0)
}

#[test]
fn it_is_the_literal_form() -> Result<()> {
    for gates in GATES {
        for (n, d) in [(1, 4), (33, 70), (65, 1)] {
            let t = inputs(n, d, gates);
            for t in [&t[..4], &t] {
                let error = relative_rms(&values(&run(t)?), &literal(t, &[0, n]).concat());
                assert!(error < 1e-12, "{n} tokens, width {d}, gates {gates:?}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_differences() -> Result<()> {
    for gates in GATES {
        check_gradients(&inputs(4, 2, gates), run)?;
        check_gradients(&inputs(3, 1, gates)[..4], run)?;
    }
    Ok(())
}

/// Over the borders of chunks and of blocks of columns, f64 gradients against those of decays where both exist.
#[test]
fn gates_of_rows_are_decays_of_channels() -> Result<()> {
    let t = inputs(70, 66, [true, true, true, true, false]);
    let weights = normal(9, &[2, 70, 2, 66]);
    let gradients = |decay: bool| -> Result<Vec<Vec<f64>>> {
        let vars: Vec<Var> = t.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let (y, last) = if decay {
            let log = vars[2].squeeze(4)?;
            let options = Causal {
                decay: LogDecay::Channel(&log),
                initial: Some(&vars[4]),
                ..Default::default()
            };
            causal(&vars[3], &vars[0], &vars[1], &options)?
        } else {
            let options = Options {
                initial: Some(&vars[4]),
                ..Default::default()
            };
            scan(&vars[0], &vars[1], &vars[2], &vars[3], &options)?
        };
        let loss = ((&y * &weights)?.sum_all()? + last.sqr()?.sum_all()?)?;
        let grads = loss.backward()?;
        let mut all = vec![values(&y), values(&last)];
        all.extend(vars.iter().map(|var| values(grads.get(var).expect("a gradient"))));
        Ok(all)
    };
    for (found, expected) in gradients(false)?.iter().zip(&gradients(true)?) {
        assert!(relative_rms(found, expected) < 1e-10);
    }
    Ok(())
}

#[test]
fn single_precision_is_close_and_threads_do_not_change_bits() -> Result<()> {
    check_precision(&inputs(100, 70, [true; 5]), run, 1e-5)?;
    check_threads(&inputs(40, 70, [false, true, true, true, true]), run)
}

/// Gates of zero forget, gates of one keep.
#[test]
fn gates_of_zero_and_one() -> Result<()> {
    let mut t = inputs(5, 3, [false; 5]);
    t[2] = Tensor::full(f64::NEG_INFINITY, (1, 1, 1, 1, 1), t[0].device())?;
    let (y, last) = scan(&t[0], &t[1], &t[2], &t[3], &Options::default())?;
    let score = (&t[0] * &t[3])?.sum_keepdim(3)?;
    assert!(relative_rms(&values(&y), &values(&score.broadcast_mul(&t[1])?)) < 1e-13);
    assert!(values(&last).iter().all(|m| m.is_finite()));
    Ok(())
}

#[test]
fn steps_and_packed_sequences_are_the_whole() -> Result<()> {
    let t = inputs(6, 3, [true; 5]);
    let [y, last] = literal(&t, &[0, 6]);
    let mut memory = t[4].clone();
    let mut rows = Vec::new();
    for i in 0..6 {
        let at = |t: &Tensor| t.i((.., i));
        let (row, after) = step(&at(&t[0])?, &at(&t[1])?, &at(&t[2])?, &at(&t[3])?, &memory)?;
        rows.push(row);
        memory = after;
    }
    assert!(relative_rms(&values(&Tensor::stack(&rows, 1)?), &y) < 1e-13);
    assert!(relative_rms(&values(&memory), &last) < 1e-13);

    let borders = [0, 2, 2, 6];
    let packed: Vec<Tensor> = t[..4]
        .iter()
        .map(|t| t.narrow(0, 0, 1))
        .chain([Ok(normal(7, &[3, 2, 3, 3]))])
        .collect::<Result<_>>()?;
    let run = |t: &[Tensor]| -> Result<Tensor> {
        let options = Options {
            initial: Some(&t[4]),
            sequences: Some(&borders),
            ..Default::default()
        };
        let (y, last) = scan(&t[0], &t[1], &t[2], &t[3], &options)?;
        Tensor::cat(&[y.flatten_all()?, last.flatten_all()?], 0)
    };
    assert!(relative_rms(&values(&run(&packed)?), &literal(&packed, &borders).concat()) < 1e-13);
    check_gradients(&packed, run)
}

/// Three parts that exchange memories are the whole, gradients included.
#[test]
fn parts_are_the_whole() -> Result<()> {
    check_parts(&inputs(12, 3, [true; 5])[..4], &[5, 1, 6], |t, exchange| {
        let options = Options {
            exchange,
            ..Default::default()
        };
        Ok(scan(&t[0], &t[1], &t[2], &t[3], &options)?.0)
    })
}

/// Packed sequences in parts are those in one.
#[test]
fn packed_sequences_may_be_in_parts() -> Result<()> {
    let t: Vec<Tensor> = inputs(12, 3, [true; 5])[..4]
        .iter()
        .map(|t| t.narrow(0, 0, 1))
        .collect::<Result<_>>()?;
    for borders in PACKED {
        check_parts(&t, &PARTS, |t, exchange| {
            let own = own_borders(borders, t[0].dim(1)?, exchange.as_ref());
            let options = Options {
                exchange,
                sequences: Some(&own),
                ..Default::default()
            };
            Ok(scan(&t[0], &t[1], &t[2], &t[3], &options)?.0)
        })?;
    }
    Ok(())
}

#[test]
fn wrong_inputs_are_refused() {
    let t = inputs(4, 3, [true; 5]);
    let message = |t: [&Tensor; 4], options: &Options<'_>| {
        scan(t[0], t[1], t[2], t[3], options).unwrap_err().to_string()
    };
    let plain = Options::default();
    let wrong = normal(1, &[2, 4, 2, 3, 2]);
    let text = message([&t[0], &t[1], &wrong, &t[3]], &plain);
    assert!(text.contains("or 1 along some axes"), "{text}");
    assert!(message([&t[0], &t[1], &t[2], &t[1].narrow(3, 0, 2).unwrap()], &plain).contains("like expand"));
    let initial = normal(1, &[2, 2, 3]);
    let options = Options {
        initial: Some(&initial),
        ..Default::default()
    };
    assert!(message([&t[0], &t[1], &t[2], &t[3]], &options).contains("expected [2, 2, 3, 3]"));
    let options = Options {
        sequences: Some(&[0, 5]),
        ..Default::default()
    };
    assert!(message([&t[0], &t[1], &t[2], &t[3]], &options).contains("never falls"));
}
