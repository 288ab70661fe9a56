use super::*;
use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
use candle_core::Device;

/// All parts of a call in a row, with a learnt lower bound: inputs are x and a vector that becomes the bound.
fn hgrn2(t: &[Tensor]) -> Result<Tensor> {
    let bound = ((t[1].tanh()? + 1.0)? * 0.45)?;
    let width = bound.elem_count();
    let rest = t[0].dims()[2] - width;
    let parts = split(
        &t[0],
        &[
            Part::Silu(1),
            Part::Gate(width, Some(&bound)),
            Part::Plain(rest - 1),
        ],
    )?;
    Tensor::cat(
        &parts
            .iter()
            .map(|part| part.flatten_all())
            .collect::<Result<Vec<_>>>()?,
        0,
    )
}

fn inputs(b: usize, n: usize, rest: usize, width: usize) -> [Tensor; 2] {
    [normal(1, &[b, n, rest + width]), normal(2, &[width])]
}

#[test]
fn gradients_are_those_of_differences() -> Result<()> {
    for [b, n, rest, width] in [[1, 1, 2, 1], [2, 7, 5, 3]] {
        check_gradients(&inputs(b, n, rest, width), hgrn2)?;
        check_gradients(&inputs(b, n, rest, width)[..1], |t| {
            let parts = split(&t[0], &[Part::Plain(rest), Part::Gate(width, None)])?;
            // Only one of two results of the gate, and none of the plain part.
            Ok(parts[2].clone())
        })?;
    }
    Ok(())
}

#[test]
fn precision_and_threads() -> Result<()> {
    for [b, n, rest, width] in [[2, 257, 33, 17], [1, 500, 64, 64]] {
        check_precision(&inputs(b, n, rest, width), hgrn2, 1e-6)?;
        check_threads(&inputs(b, n, rest, width), hgrn2)?;
    }
    Ok(())
}

/// Gates of every size in f32, against f64: neither keys nor logarithms cancel.
#[test]
fn gates_keep_their_digits() -> Result<()> {
    let x: Vec<f64> = (-400..=400).map(|i| f64::from(i) * 0.25).collect();
    let count = x.len();
    let x = Tensor::from_vec(x, (1, count), &Device::Cpu)?;
    for bound in [None, Some(0.0), Some(0.0009765625), Some(0.3125), Some(0.984375)] {
        let run = |dtype: DType| -> Result<Vec<Vec<f64>>> {
            let bound = bound.map(|b| Tensor::full(b, count, &Device::Cpu)?.to_dtype(dtype));
            let bound = bound.transpose()?;
            let parts = split(&x.to_dtype(dtype)?, &[Part::Gate(count, bound.as_ref())])?;
            Ok(parts.iter().map(values).collect())
        };
        let (found, wanted) = (run(DType::F32)?, run(DType::F64)?);
        for ((key, exact), (log, exact_log)) in found[0]
            .iter()
            .zip(&wanted[0])
            .zip(found[1].iter().zip(&wanted[1]))
        {
            // The fast exponential saturates at e^-87.
            assert!((key - exact).abs() <= 2e-6 * exact + 1e-37, "{key} {exact}");
            assert!(
                (log - exact_log).abs() <= 2e-6 * exact_log.abs() + 1e-37,
                "{log} {exact_log}"
            );
            assert!((-60.0..=0.0).contains(log));
        }
        let direct: Vec<f64> = values(&x)
            .iter()
            .map(|x| 1.0 - (bound.unwrap_or(0.0) + (1.0 - bound.unwrap_or(0.0)) / (1.0 + (-x).exp())))
            .collect();
        assert!(relative_rms(&wanted[0], &direct) < 1e-13);
    }
    Ok(())
}

#[test]
fn refuses_what_does_not_fit() {
    let x = normal(1, &[2, 3, 6]);
    let message = |parts: &[Part<'_>]| split(&x, parts).unwrap_err().to_string();
    assert_eq!(
        message(&[Part::Plain(2), Part::Silu(3)]),
        "split: parts is [2, 3], expected widths above 0 that add up to 6, of one gate at most"
    );
    assert!(message(&[Part::Plain(6), Part::Silu(0)]).contains("[6, 0]"));
    assert!(message(&[Part::Gate(3, None), Part::Gate(3, None)]).contains("one gate at most"));
    let bound = normal(1, &[4]);
    assert_eq!(
        message(&[Part::Gate(6, Some(&bound))]),
        "split: lower bound has shape [4], expected [6]"
    );
    let bound = normal(1, &[6]).to_dtype(DType::F32).unwrap();
    assert!(message(&[Part::Gate(6, Some(&bound))]).contains("expected F64"));
}
