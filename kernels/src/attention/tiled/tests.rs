//! The tiles against loops, gradients against differences.

use super::super::reference::{Inputs, Results};
use super::super::{Options, Problem, attention, softmax};
use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
use candle_core::{DType, Device, Result, Tensor, Var};

/// B, N, L, H, G, D and E.
type Sizes = [usize; 7];

fn inputs([b, n, l, h, g, d, e]: Sizes) -> [Tensor; 3] {
    [
        normal(1, &[b, n, h, d]),
        normal(2, &[b, l, g, d]),
        normal(3, &[b, l, g, e]),
    ]
}

/// One key in four is padding, and more at the ends of later batches.
fn mask([b, _, l, ..]: Sizes) -> Tensor {
    let keep: Vec<u8> = (0..b * l)
        .map(|i| u8::from(i % 4 != 1 && i % l + i / l < l))
        .collect();
    Tensor::from_vec(keep, (b, l), &Device::Cpu).unwrap()
}

fn reference(t: &[Tensor; 3], options: &Options<'_>) -> Results {
    let problem = Problem::new(&t[0], &t[1], &t[2], options).unwrap();
    let [q, k, v] = [&t[0], &t[1], &t[2]].map(values);
    let mask = options.mask.map(values);
    let d_o = values(&normal(99, &[problem.b, problem.n, problem.h, problem.e]));
    let inputs = Inputs {
        problem: &problem,
        q: &q,
        k: &k,
        v: &v,
        mask: mask.as_deref(),
    };
    inputs.run(&d_o)
}

/// Output and adjoints of `sum(o * normal(99))`.
fn found(t: &[Tensor; 3], options: &Options<'_>) -> Result<[Vec<f64>; 4]> {
    let vars = [
        Var::from_tensor(&t[0])?,
        Var::from_tensor(&t[1])?,
        Var::from_tensor(&t[2])?,
    ];
    let o = softmax(&vars[0], &vars[1], &vars[2], options)?;
    let grads = (&o * normal(99, o.dims()).to_dtype(o.dtype())?)?
        .sum_all()?
        .backward()?;
    let [dq, dk, dv] = vars
        .each_ref()
        .map(|var| values(grads.get(var).expect("a gradient")));
    Ok([values(&o), dq, dk, dv])
}

fn check(sizes: Sizes, options: &Options<'_>) -> Result<()> {
    let t = inputs(sizes);
    let wanted = reference(&t, options);
    let wanted = [&wanted.o, &wanted.dq, &wanted.dk, &wanted.dv];
    for (name, (found, wanted)) in ["o", "dq", "dk", "dv"]
        .iter()
        .zip(found(&t, options)?.iter().zip(wanted))
    {
        let error = relative_rms(found, wanted);
        assert!(error < 1e-12, "{name} of {sizes:?}, {options:?}: {error:e}");
    }
    Ok(())
}

#[test]
fn agrees_with_the_definition() -> Result<()> {
    for sizes in [
        [2, 3, 4, 2, 2, 3, 5],
        [1, 64, 64, 1, 1, 16, 16],
        [2, 65, 130, 4, 2, 8, 7],
        [1, 131, 63, 6, 2, 5, 24],
        [1, 1, 150, 3, 1, 8, 8],
    ] {
        let mask = mask(sizes);
        for causal in [false, true] {
            for mask in [None, Some(&mask)] {
                for scale in [None, Some(1.3)] {
                    let options = Options {
                        causal,
                        scale,
                        mask,
                        sequences: None,
                    };
                    check(sizes, &options)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn packed_sequences() -> Result<()> {
    let sizes = [1, 200, 200, 4, 2, 8, 6];
    let mask = mask(sizes);
    for causal in [false, true] {
        for mask in [None, Some(&mask)] {
            let options = Options {
                causal,
                mask,
                sequences: Some(&[0, 1, 70, 70, 135, 200]),
                scale: None,
            };
            check(sizes, &options)?;
        }
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let causal = Options {
        causal: true,
        ..Default::default()
    };
    check_gradients(&inputs([2, 4, 5, 4, 2, 3, 2]), |t| {
        softmax(&t[0], &t[1], &t[2], &Options::default())
    })?;
    check_gradients(&inputs([1, 70, 67, 1, 1, 2, 1]), |t| {
        softmax(&t[0], &t[1], &t[2], &causal)
    })
}

#[test]
fn single_precision_and_threads() -> Result<()> {
    let options = Options {
        causal: true,
        ..Default::default()
    };
    let t = inputs([2, 150, 190, 4, 2, 16, 24]);
    check_precision(&t, |t| softmax(&t[0], &t[1], &t[2], &options), 1e-5)?;
    check_threads(&t, |t| softmax(&t[0], &t[1], &t[2], &options))
}

/// Operands that are slices of one projection, and scores far beyond what an exponential holds.
#[test]
fn strided_operands_and_large_scores() -> Result<()> {
    let joint = (normal(4, &[2, 70, 3, 24]) * 30.0)?;
    let part = |from: usize| joint.narrow(3, from, 8);
    let dense = [
        part(0)?.contiguous()?,
        part(8)?.contiguous()?,
        part(16)?.contiguous()?,
    ];
    let options = Options::default();
    let o = values(&softmax(&part(0)?, &part(8)?, &part(16)?, &options)?);
    let error = relative_rms(&o, &reference(&dense, &options).o);
    assert!(error < 1e-12, "{error:e}");
    let single = dense.each_ref().map(|t| t.to_dtype(DType::F32).unwrap());
    let o = values(&softmax(&single[0], &single[1], &single[2], &options)?);
    assert!(o.iter().all(|x| x.is_finite()));
    Ok(())
}

/// The composed form is another implementation of the same formula.
#[test]
fn agrees_with_the_composed_form() -> Result<()> {
    let sizes = [2, 66, 70, 2, 2, 8, 4];
    let (t, mask) = (inputs(sizes), mask(sizes));
    let options = Options {
        mask: Some(&mask),
        ..Default::default()
    };
    let tiled = values(&softmax(&t[0], &t[1], &t[2], &options)?);
    let composed = values(&attention(&t[0], &t[1], &t[2], Some(&mask))?);
    assert!(relative_rms(&tiled, &composed) < 1e-12);
    Ok(())
}

/// Queries before the first key, and a batch of nothing but padding.
#[test]
fn queries_without_keys_give_zeros() -> Result<()> {
    let sizes = [2, 80, 10, 2, 1, 4, 4];
    let t = inputs(sizes);
    let mut keep = vec![1f32; 20];
    keep[10..].fill(0.0);
    let mask = Tensor::from_vec(keep, (2, 10), &Device::Cpu)?;
    let options = Options {
        causal: true,
        mask: Some(&mask),
        ..Default::default()
    };
    let [o, dq, dk, dv] = found(&t, &options)?;
    let without = |values: &[f64], from: usize, to: usize| values[from..to].iter().all(|&x| x == 0.0);
    let row = 2 * 4;
    assert!(without(&o, 0, 70 * row) && !without(&o, 70 * row, 71 * row) && without(&o, 80 * row, 160 * row));
    assert!(without(&dq, 0, 70 * row) && without(&dq, 80 * row, 160 * row));
    assert!(without(&dk, 40, 80) && without(&dv, 40, 80) && !without(&dv, 0, 40));
    check(sizes, &options)
}

#[test]
fn refuses_what_does_not_fit() {
    let t = inputs([2, 3, 4, 4, 2, 3, 5]);
    let message =
        |t: [&Tensor; 3], options: Options<'_>| softmax(t[0], t[1], t[2], &options).unwrap_err().to_string();
    let all = [&t[0], &t[1], &t[2]];
    assert_eq!(
        message([&t[0], &normal(1, &[2, 4, 3, 3]), &t[2]], Options::default()),
        "attention::softmax: k has shape [2, 4, 3, 3], expected [2, L, G, 3] to go with q, where G divides 4"
    );
    assert_eq!(
        message([&t[0], &t[1], &t[0]], Options::default()),
        "attention::softmax: v has shape [2, 3, 4, 3], expected [2, 4, 2, E] to go with k"
    );
    let scale = Options {
        scale: Some(-1.0),
        ..Default::default()
    };
    assert_eq!(
        message(all, scale),
        "attention::softmax: scale is -1, expected a number above zero"
    );
    let sequences = Options {
        sequences: Some(&[0, 3]),
        ..Default::default()
    };
    assert_eq!(
        message(all, sequences),
        "attention::softmax: sequences is [0, 3], expected none, as there are 3 queries and 4 keys"
    );
    let short = normal(1, &[2, 3]);
    let masked = Options {
        mask: Some(&short),
        ..Default::default()
    };
    assert_eq!(
        message(all, masked),
        "attention::softmax: mask has shape [2, 3], expected [2, 4]"
    );
    let mixed = t[2].to_dtype(DType::F32).unwrap();
    assert!(message([&t[0], &t[1], &mixed], Options::default()).contains("v is F32, expected F64 like q"));
    let half = t.each_ref().map(|t| t.to_dtype(DType::BF16).unwrap());
    assert_eq!(
        message([&half[0], &half[1], &half[2]], Options::default()),
        "attention::softmax: q is BF16 on the CPU, supported: f32, f64"
    );
}
