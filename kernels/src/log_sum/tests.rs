//! The scans against loops, gradients against differences.

use super::{NOTHING, log_sum};
use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
use candle_core::{DType, Device, Result, Tensor};

/// Loops over tokens, in f64.
fn literal(g: &Tensor, before: Option<&Tensor>, borders: &[usize]) -> Vec<f64> {
    let &[b, n, h, d] = g.dims() else {
        panic!("four axes")
    };
    let (g, before) = (values(g), before.map(values));
    let mut z = vec![0.0; g.len()];
    for batch in 0..b {
        for c in 0..h * d {
            for (index, pair) in borders.windows(2).enumerate() {
                let sequence = batch * (borders.len() - 1) + index;
                let mut sum = before
                    .as_ref()
                    .map_or(0.0, |before| before[sequence * h * d + c].exp());
                for t in pair[0]..pair[1] {
                    let at = (batch * n + t) * h * d + c;
                    sum += g[at].exp();
                    z[at] = sum.ln();
                }
            }
        }
    }
    z
}

#[test]
fn sums_are_those_of_a_loop() -> Result<()> {
    for n in [1, 2, 17, 65] {
        let (g, before) = (normal(1, &[2, n, 3, 5]), normal(2, &[2, 3, 5]));
        for before in [None, Some(&before)] {
            let found = values(&log_sum(&g, before, None)?);
            assert!(relative_rms(&found, &literal(&g, before, &[0, n])) < 1e-13);
        }
    }
    let (g, before) = (normal(1, &[1, 70, 2, 37]), normal(2, &[3, 2, 37]));
    let borders = [0, 4, 4, 70];
    let found = values(&log_sum(&g, Some(&before), Some(&borders))?);
    assert!(relative_rms(&found, &literal(&g, Some(&before), &borders)) < 1e-13);
    Ok(())
}

#[test]
fn single_precision_is_close() -> Result<()> {
    let inputs = [normal(1, &[2, 300, 2, 9]), normal(2, &[2, 2, 9])];
    check_precision(&inputs, |t| log_sum(&t[0], Some(&t[1]), None), 1e-5)
}

#[test]
fn threads_do_not_change_bits() -> Result<()> {
    check_threads(&[normal(1, &[2, 40, 3, 50])], |t| log_sum(&t[0], None, None))
}

#[test]
fn gradients_are_those_of_differences() -> Result<()> {
    check_gradients(&[normal(1, &[2, 5, 2, 3]), normal(2, &[2, 2, 3])], |t| {
        log_sum(&t[0], Some(&t[1]), None)
    })?;
    check_gradients(&[normal(1, &[1, 7, 1, 3])], |t| {
        log_sum(&t[0], None, Some(&[0, 3, 7]))
    })
}

/// Tokens without weight leave what was before them, and large logits do not overflow.
#[test]
fn masked_and_large_logits() -> Result<()> {
    let g = Tensor::new(&[f32::NEG_INFINITY, 1e4, f32::NEG_INFINITY, 1e4], &Device::Cpu)?;
    let z = log_sum(&g.reshape((1, 4, 1, 1))?, None, None)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    assert!(z[0] <= 0.9 * NOTHING as f32);
    assert_eq!(z[1..3], [1e4, 1e4]);
    assert!((z[3] - 1e4 - std::f32::consts::LN_2).abs() < 1e-3);
    Ok(())
}

#[test]
fn wrong_shapes_are_refused() {
    let g = normal(1, &[2, 3, 4, 5]);
    let message = |before: &Tensor| log_sum(&g, Some(before), None).unwrap_err().to_string();
    assert!(message(&normal(1, &[2, 4])).contains("expected [2, 4, 5]"));
    let whole = g.to_dtype(DType::U32).unwrap();
    assert!(
        log_sum(&whole, None, None)
            .unwrap_err()
            .to_string()
            .contains("U32")
    );
}
