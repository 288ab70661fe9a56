//! Every form against the convolution, gradients against differences, parts against the whole.

use super::reference::convolution;
use super::{Form, Options, rate_of, run, scan, scan_with_rate};
use crate::exchange::threads;
use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
use candle_core::{DType, Device, Result, Tensor, Var};

const RATES: [f64; 5] = [0.0, 1e-5, 1.0 / 256.0, 1.0, 8.0];

fn rates(heads: usize) -> Tensor {
    Tensor::from_vec(RATES[..heads].to_vec(), heads, &Device::Cpu).unwrap()
}

#[test]
fn both_forms_equal_the_convolution() -> Result<()> {
    for n in [1, 2, 15, 16, 17, 63, 64, 65, 128, 257] {
        let dims = [2, n, 5, 3];
        let (x, rate, weight) = (normal(1, &dims), rates(5), normal(2, &[5]));
        let initial = normal(3, &[2, 5, 3]);
        let inputs = [&x, &rate, &weight, &initial].map(values);
        for (two_sided, initial) in [(false, None), (true, None), (false, Some(&initial))] {
            let state = initial.map(|_| inputs[3].as_slice());
            let expected = convolution(&inputs[0], dims, &inputs[1], &inputs[2], state, two_sided);
            let options = Options {
                two_sided,
                initial,
                ..Default::default()
            };
            for form in [Form::Chunked, Form::Composed] {
                let (u, last) = run(&x, &rate, &weight, &options, form)?;
                assert!(
                    relative_rms(&values(&u), &expected) < 1e-10,
                    "n {n} {form:?} two-sided {two_sided}"
                );
                if !two_sided {
                    assert_eq!(values(&last), values(&u.narrow(1, n - 1, 1)?));
                }
                let f32_of = |t: &Tensor| t.to_dtype(DType::F32);
                let initial = initial.map(f32_of).transpose()?;
                let options = Options {
                    two_sided,
                    initial: initial.as_ref(),
                    ..Default::default()
                };
                let (u, _) = run(&f32_of(&x)?, &f32_of(&rate)?, &f32_of(&weight)?, &options, form)?;
                assert!(
                    relative_rms(&values(&u), &expected) < 1e-5,
                    "n {n} {form:?} in f32"
                );
            }
        }
    }
    Ok(())
}

/// 5.8.8: 4,096 tokens, computed directly.
#[test]
fn long_scan_equals_the_convolution() -> Result<()> {
    let dims = [1, 4096, 5, 2];
    let (x, rate, weight) = (normal(1, &dims), rates(5), normal(2, &[5]));
    let expected = convolution(&values(&x), dims, &values(&rate), &values(&weight), None, false);
    for form in [Form::Chunked, Form::Composed] {
        let (u, _) = run(&x, &rate, &weight, &Options::default(), form)?;
        assert!(relative_rms(&values(&u), &expected) < 1e-10, "{form:?}");
        let [x, rate, weight] = [&x, &rate, &weight].map(|t| t.to_dtype(DType::F32));
        let (u, _) = run(&x?, &rate?, &weight?, &Options::default(), form)?;
        assert!(relative_rms(&values(&u), &expected) < 1e-5, "{form:?} in f32");
    }
    Ok(())
}

#[test]
fn gradients_equal_central_differences() -> Result<()> {
    let rate = Tensor::new(&[0.05f64, 1.3], &Device::Cpu)?;
    let inputs = [
        normal(1, &[2, 4, 2, 2]),
        rate,
        normal(2, &[2]),
        normal(3, &[2, 2, 2]),
    ];
    for form in [Form::Chunked, Form::Composed] {
        for two_sided in [false, true] {
            let options = Options {
                two_sided,
                ..Default::default()
            };
            check_gradients(&inputs[..3], |t| Ok(run(&t[0], &t[1], &t[2], &options, form)?.0))?;
        }
        check_gradients(&inputs, |t| {
            let options = Options {
                initial: Some(&t[3]),
                ..Default::default()
            };
            let (u, state) = run(&t[0], &t[1], &t[2], &options, form)?;
            u.broadcast_add(&state.unsqueeze(1)?)
        })?;
    }
    let gamma = Tensor::new(&[-1.5f64, 0.0, 4.0], &Device::Cpu)?;
    check_gradients(&[gamma], |t| rate_of(&t[0]))
}

/// Several blocks and several chunks: the two forms take different ways to the same gradients.
#[test]
fn long_gradients_agree_between_forms() -> Result<()> {
    for n in [65, 200, 300] {
        let grads = |form: Form| -> Result<Vec<Vec<f64>>> {
            let vars = [normal(1, &[2, n, 5, 3]), rates(5), normal(2, &[5])];
            let vars = vars.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
            let options = Options {
                two_sided: n == 200,
                ..Default::default()
            };
            let (u, state) = run(&vars[0], &vars[1], &vars[2], &options, form)?;
            let loss = ((u * normal(4, &[2, n, 5, 3]))?.sum_all()? + state.sqr()?.sum_all()?)?;
            let grads = loss.backward()?;
            Ok(vars
                .iter()
                .map(|var| values(grads.get(var).expect("a gradient")))
                .collect())
        };
        for (chunked, composed) in grads(Form::Chunked)?.iter().zip(grads(Form::Composed)?) {
            assert!(relative_rms(chunked, &composed) < 1e-10, "n {n}");
        }
    }
    Ok(())
}

#[test]
fn f32_is_precise_and_independent_of_threads() -> Result<()> {
    let inputs = [normal(1, &[3, 200, 5, 4]), rates(5), normal(2, &[5])];
    for two_sided in [false, true] {
        let options = Options {
            two_sided,
            ..Default::default()
        };
        let f = |t: &[Tensor]| Ok(scan_with_rate(&t[0], &t[1], &t[2], &options)?.0);
        check_precision(&inputs, f, 1e-5)?;
        check_threads(&inputs, f)?;
    }
    Ok(())
}

/// Any axis equals moving it to the front of heads and channels.
#[test]
fn inner_and_outer_axes() -> Result<()> {
    let x = normal(1, &[2, 3, 70, 5, 2, 3]);
    let (rate, weight) = (rates(2), normal(2, &[2]));
    for axis in 0..4 {
        let options = Options {
            axis,
            ..Default::default()
        };
        let (u, state) = scan_with_rate(&x, &rate, &weight, &options)?;
        let moved = x.transpose(axis, 3)?.contiguous()?;
        let (expected, expected_state) = scan_with_rate(
            &moved,
            &rate,
            &weight,
            &Options {
                axis: 3,
                ..Default::default()
            },
        )?;
        assert!(
            relative_rms(&values(&u), &values(&expected.transpose(axis, 3)?)) < 1e-13,
            "axis {axis}"
        );
        let state = state.unsqueeze(axis)?.transpose(axis, 3)?;
        assert!(
            relative_rms(&values(&state), &values(&expected_state)) < 1e-13,
            "axis {axis}"
        );
        let (composed, _) = run(&x, &rate, &weight, &options, Form::Composed)?;
        assert!(
            relative_rms(&values(&composed), &values(&u)) < 1e-12,
            "axis {axis}"
        );
    }
    Ok(())
}

#[test]
fn gamma_is_the_logit_of_the_decay() -> Result<()> {
    let gamma = Tensor::new(&[0f64, 2.0, -3.0, 12.0], &Device::Cpu)?;
    let expected: Vec<f64> = values(&gamma).iter().map(|g| (1.0 + (-g).exp()).ln()).collect();
    assert!(relative_rms(&values(&rate_of(&gamma)?), &expected) < 1e-14);
    let x = normal(1, &[1, 2, 4, 1]);
    let u = values(&scan(&x, &gamma, &gamma.ones_like()?, &Options::default())?);
    let x = values(&x);
    for (h, gamma) in values(&gamma).iter().enumerate() {
        let lambda = 1.0 / (1.0 + (-gamma).exp());
        assert!((u[4 + h] - (lambda * x[h] + x[4 + h])).abs() < 1e-14);
    }
    Ok(())
}

/// Three parts on three threads are the whole, forward and backward, in both directions.
#[test]
fn parts_with_an_exchange_are_the_whole() -> Result<()> {
    let (lengths, n) = ([70, 1, 9], 80);
    let (x, weight, d_u) = (
        normal(1, &[2, n, 3, 2]),
        normal(2, &[3]),
        normal(3, &[2, n, 3, 2]),
    );
    let rate = Tensor::new(&[0.0f64, 0.02, 0.7], &Device::Cpu)?;
    for two_sided in [false, true] {
        let part = |exchange: Option<_>, start: usize, len: usize| -> Result<[Tensor; 4]> {
            let cut = |t: &Tensor| t.narrow(1, start, len)?.contiguous();
            let vars = [
                Var::from_tensor(&cut(&x)?)?,
                Var::from_tensor(&rate)?,
                Var::from_tensor(&weight)?,
            ];
            let options = Options {
                two_sided,
                exchange,
                ..Default::default()
            };
            let (u, _) = scan_with_rate(&vars[0], &vars[1], &vars[2], &options)?;
            let grads = (&u * cut(&d_u)?)?.sum_all()?.backward()?;
            let [dx, drate, dweight] = vars.map(|var| grads.get(&var).expect("a gradient").clone());
            Ok([u.detach(), dx, drate, dweight])
        };
        let whole = part(None, 0, n)?;
        let parts: Vec<[Tensor; 4]> = std::thread::scope(|scope| {
            let running: Vec<_> = threads(&lengths)
                .into_iter()
                .zip(lengths)
                .map(|(exchange, len)| {
                    let part = &part;
                    scope.spawn(move || part(Some(exchange.clone()), exchange.position_offset(), len))
                })
                .collect();
            running
                .into_iter()
                .map(|part| part.join().expect("no panic"))
                .collect::<Result<_>>()
        })?;
        for (i, whole) in whole.iter().enumerate() {
            let found: Vec<&Tensor> = parts.iter().map(|part| &part[i]).collect();
            let joined = match i {
                0 | 1 => Tensor::cat(&found, 1)?,
                _ => Tensor::stack(&found, 0)?.sum(0)?,
            };
            assert!(
                relative_rms(&values(&joined), &values(whole)) < 1e-10,
                "result {i}, two-sided {two_sided}"
            );
        }
    }
    Ok(())
}

/// Slow and fast decays over 65,536 tokens stay finite and below the sum of what entered.
#[test]
fn long_runs_stay_bounded() -> Result<()> {
    let n = 65_536;
    let x = normal(1, &[1, n, 5, 1]).to_dtype(DType::F32)?;
    let rate = rates(5).to_dtype(DType::F32)?;
    let (u, _) = scan_with_rate(&x, &rate, &rate.ones_like()?, &Options::default())?;
    let mut bound = [0f64; 5];
    for (i, (u, x)) in values(&u).into_iter().zip(values(&x)).enumerate() {
        let bound = &mut bound[i % 5];
        *bound = *bound * (-RATES[i % 5]).exp() + x.abs();
        assert!(
            u.abs() <= *bound * (1.0 + 1e-5),
            "token {} head {}: {u} above {bound}",
            i / 5,
            i % 5
        );
    }
    Ok(())
}

#[test]
fn sixteen_bit_values_are_scanned_in_f32() -> Result<()> {
    let (x, rate, weight) = (
        normal(1, &[2, 90, 5, 3]).to_dtype(DType::BF16)?,
        rates(5),
        normal(2, &[5]),
    );
    let (expected, _) = scan_with_rate(&x.to_dtype(DType::F32)?, &rate, &weight, &Options::default())?;
    for form in [Form::Chunked, Form::Composed] {
        let (u, state) = run(&x, &rate, &weight, &Options::default(), form)?;
        assert_eq!((u.dtype(), state.dtype()), (DType::BF16, DType::F32));
        assert!(relative_rms(&values(&u), &values(&expected)) < 4e-3);
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let x = normal(1, &[2, 4, 3, 5]);
    let (three, two) = (normal(1, &[3]), normal(1, &[2]));
    let message = |rate: &Tensor, options: Options<'_>| {
        scan_with_rate(&x, rate, &three, &options)
            .unwrap_err()
            .to_string()
    };
    assert!(message(&two, Options::default()).contains("has shape [2], expected [3]"));
    assert!(
        message(
            &three,
            Options {
                axis: 2,
                ..Default::default()
            }
        )
        .contains("axis 2")
    );
    let text = message(
        &three,
        Options {
            initial: Some(&two),
            ..Default::default()
        },
    );
    assert!(
        text.contains("initial has shape [2], expected [2, 3, 5]"),
        "{text}"
    );
    let state = normal(1, &[2, 3, 5]);
    let text = message(
        &three,
        Options {
            initial: Some(&state),
            two_sided: true,
            ..Default::default()
        },
    );
    assert!(text.contains("two-sided"), "{text}");
}
