use super::*;
use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
use candle_core::{Device, Var};

/// M, V and D, with one tile of the vocabulary and with many, of which the last is narrower.
const SIZES: [[usize; 3]; 4] = [[1, 1, 1], [7, 5, 9], [10, 37, 4], [6, 131, 1]];

fn inputs([rows, vocabulary, width]: [usize; 3]) -> [Tensor; 2] {
    [normal(1, &[rows, width]), normal(2, &[vocabulary, width])]
}

fn targets([rows, vocabulary, _]: [usize; 3]) -> Vec<u32> {
    (0..rows).map(|i| ((i * 31 + 3) % vocabulary) as u32).collect()
}

fn tensor(targets: &[u32]) -> Tensor {
    Tensor::new(targets, &Device::Cpu).unwrap()
}

/// Every term of the loss, and some of the targets ignored.
fn everything() -> Options<'static> {
    Options {
        ignore: Some(3),
        label_smoothing: 0.15,
        z_loss: 0.02,
        ..Default::default()
    }
}

/// Losses and gradients of their sum by the definition.
fn literal(x: &Tensor, weight: &Tensor, targets: &[u32], options: &Options) -> [Vec<f64>; 3] {
    let ((rows, width), vocabulary) = (x.dims2().unwrap(), weight.dims()[0]);
    let (x, w) = (values(x), values(weight));
    let (mut losses, mut dx, mut dw) = (vec![], vec![0.0; x.len()], vec![0.0; w.len()]);
    let (e, c) = (options.label_smoothing, options.z_loss);
    for row in 0..rows {
        if Some(targets[row]) == options.ignore {
            losses.push(0.0);
            continue;
        }
        let mut l = vec![0.0; vocabulary];
        for j in 0..vocabulary {
            for d in 0..width {
                l[j] += w[j * width + d] * x[row * width + d];
            }
        }
        let z = l.iter().map(|l| l.exp()).sum::<f64>().ln();
        let q = |j: usize| (1.0 - e) * f64::from(u8::from(j as u32 == targets[row])) + e / vocabulary as f64;
        losses.push((0..vocabulary).map(|j| q(j) * (z - l[j])).sum::<f64>() + c * z * z);
        for j in 0..vocabulary {
            let dl = (l[j] - z).exp() * (1.0 + 2.0 * c * z) - q(j);
            for d in 0..width {
                dx[row * width + d] += dl * w[j * width + d];
                dw[j * width + d] += dl * x[row * width + d];
            }
        }
    }
    [losses, dx, dw]
}

/// The loss, and the gradients of `weight * loss`.
fn derive(x: &Tensor, weight: &Tensor, targets: &[u32], options: &Options) -> Result<[Vec<f64>; 3]> {
    let (x, weight) = (Var::from_tensor(x)?, Var::from_tensor(weight)?);
    let loss = head(&x, &weight, &tensor(targets), options)?;
    assert_eq!(loss.rank(), 0);
    let grads = loss.backward()?;
    Ok([
        values(&loss),
        values(grads.get(&x).unwrap()),
        values(grads.get(&weight).unwrap()),
    ])
}

#[test]
fn agrees_with_loops_in_chunks_of_any_size() -> Result<()> {
    for sizes in SIZES {
        let ([x, weight], targets) = (inputs(sizes), targets(sizes));
        for options in [Options::default(), everything()] {
            let [losses, dx, dw] = literal(&x, &weight, &targets, &options);
            let counted = targets.iter().filter(|&&id| Some(id) != options.ignore).count();
            for reduction in [Reduction::Mean, Reduction::Sum] {
                let share = match reduction {
                    Reduction::Mean => 1.0 / counted.max(1) as f64,
                    Reduction::Sum => 1.0,
                };
                for chunk in [Some(1), Some(3), Some(sizes[0]), Some(1000), None] {
                    let options = Options {
                        chunk,
                        reduction,
                        ..options
                    };
                    let found = derive(&x, &weight, &targets, &options)?;
                    let loss = losses.iter().sum::<f64>() * share;
                    assert!((found[0][0] - loss).abs() < 1e-12, "{sizes:?} {chunk:?}");
                    for (found, wanted) in found[1..].iter().zip([&dx, &dw]) {
                        for (found, wanted) in found.iter().zip(wanted) {
                            assert!((found - wanted * share).abs() < 1e-12, "{sizes:?} {chunk:?}");
                        }
                    }
                    let each = head_losses(&x, &weight, &tensor(&targets), &options)?;
                    assert_eq!((each.dims(), each.dtype()), (&sizes[..1], DType::F64));
                    for (found, wanted) in values(&each).iter().zip(&losses) {
                        assert!((found - wanted).abs() < 1e-12, "{sizes:?} {chunk:?}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let sizes = [5, 23, 4];
    let ids = tensor(&targets(sizes));
    let options = Options {
        chunk: Some(2),
        ..everything()
    };
    check_gradients(&inputs(sizes), |t| head(&t[0], &t[1], &ids, &options))?;
    check_gradients(&inputs(sizes), |t| head(&t[0], &t[1], &ids, &Options::default()))?;
    // A weight that is an embedding as well, and a gradient on the way to other operators.
    check_gradients(&[normal(3, &[23, 4])], |t| {
        let x = t[0].narrow(0, 2, 5)?.sqr()?;
        head(&x, &t[0], &ids, &options)?.exp()
    })
}

#[test]
fn single_precision_and_threads() -> Result<()> {
    let sizes = [150, 1003, 17];
    let ids = tensor(&targets(sizes));
    let options = Options {
        chunk: Some(64),
        ..everything()
    };
    let small = |t: &[Tensor]| head(&t[0], &(&t[1] * 0.3)?, &ids, &options);
    check_precision(&inputs(sizes), small, 1e-5)?;
    check_threads(&inputs(sizes), small)?;
    let [x, weight] = inputs(sizes);
    let losses = head_losses(
        &x.to_dtype(DType::F32)?,
        &weight.to_dtype(DType::F32)?,
        &ids,
        &options,
    )?;
    assert_eq!(losses.dtype(), DType::F32);
    let wanted = head_losses(&x, &weight, &ids, &options)?;
    assert!(relative_rms(&values(&losses), &values(&wanted)) < 1e-6);
    Ok(())
}

#[test]
fn default_chunks_are_many_where_the_vocabulary_is_large() -> Result<()> {
    let (x, weight) = (normal(1, &[3, 1]), normal(2, &[5_000_000, 1]));
    let ids = [0, 4_999_999, 17];
    let wanted = Wanted {
        dx: false,
        dweight: false,
    };
    let head = Head::new(&x, &weight, &tensor(&ids), &Options::default(), wanted)?;
    assert_eq!(head.chunk, 1);
    let [losses, ..] = literal(&x, &weight, &ids, &Options::default());
    assert!(relative_rms(&values(&head.run()?.losses), &losses) < 1e-12);
    Ok(())
}

/// The ignored id need not be one of the vocabulary.
#[test]
fn ignored_tokens_count_for_nothing() -> Result<()> {
    let sizes = [5, 11, 3];
    let [x, weight] = inputs(sizes);
    let options = Options {
        ignore: Some(u32::MAX),
        ..Default::default()
    };
    let some = derive(&x, &weight, &[4, u32::MAX, 10, u32::MAX, 0], &options)?;
    let kept = Tensor::cat(&[x.narrow(0, 0, 1)?, x.narrow(0, 2, 1)?, x.narrow(0, 4, 1)?], 0)?;
    let alone = derive(&kept, &weight, &[4, 10, 0], &options)?;
    assert!(relative_rms(&some[0], &alone[0]) < 1e-14 && relative_rms(&some[2], &alone[2]) < 1e-14);
    assert!(some[1][3..6].iter().chain(&some[1][9..12]).all(|&dx| dx == 0.0));
    for reduction in [Reduction::Mean, Reduction::Sum] {
        let options = Options { reduction, ..options };
        let none = derive(&x, &weight, &[u32::MAX; 5], &options)?;
        assert!(none.iter().flatten().all(|&value| value == 0.0));
    }
    Ok(())
}

#[test]
fn large_logits_do_not_overflow() -> Result<()> {
    let x = Tensor::new(&[[1e4f32], [-1e4]], &Device::Cpu)?;
    let weight = Tensor::new(&[[1f32], [-1.0], [0.5], [1.0]], &Device::Cpu)?;
    // Row 0: logits 1e4, -1e4, 5e3, 1e4. Row 1: the negatives; the target is 2e4 below the largest.
    let each = head_losses(&x, &weight, &tensor(&[0, 0]), &Options::default())?;
    assert_eq!(each.to_vec1::<f32>()?, [std::f32::consts::LN_2, 2e4]);
    let [loss, dx, dw] = derive(&x, &weight, &[0, 0], &Options::default())?;
    assert!((loss[0] - 1e4).abs() < 1.0);
    assert_eq!(dx, [0.0, -1.0]);
    for (found, wanted) in dw.iter().zip([2500.0, -5000.0, 0.0, 2500.0]) {
        assert!((found - wanted).abs() < 1e-3, "{dw:?}");
    }
    Ok(())
}

#[test]
fn only_what_is_tracked_gets_a_gradient() -> Result<()> {
    let sizes = [4, 9, 3];
    let ([x, weight], ids) = (inputs(sizes), targets(sizes));
    let both = derive(&x, &weight, &ids, &everything())?;
    for tracked in [0, 1] {
        let vars = [Var::from_tensor(&x)?, Var::from_tensor(&weight)?];
        let operands: Vec<Tensor> = (0..2)
            .map(|i| {
                if i == tracked {
                    vars[i].as_tensor().clone()
                } else {
                    vars[i].detach()
                }
            })
            .collect();
        let grads = head(&operands[0], &operands[1], &tensor(&ids), &everything())?.backward()?;
        assert_eq!(values(grads.get(&vars[tracked]).unwrap()), both[1 + tracked]);
        assert!(grads.get(&operands[1 - tracked]).is_none());
    }
    Ok(())
}

#[test]
fn gradients_are_handed_out_once() -> Result<()> {
    let sizes = [2, 5, 3];
    let [x, weight] = inputs(sizes);
    let loss = head(
        Var::from_tensor(&x)?.as_tensor(),
        &weight,
        &tensor(&targets(sizes)),
        &Options::default(),
    )?;
    loss.backward()?;
    let message = loss.backward().unwrap_err().to_string();
    assert!(
        message.contains("cross_entropy: gradients were handed out by an earlier backward pass"),
        "{message}"
    );
    Ok(())
}

#[test]
fn refuses_what_does_not_fit() -> Result<()> {
    let sizes = [3, 5, 2];
    let ([x, weight], ids) = (inputs(sizes), tensor(&[0, 1, 4]));
    let message = |x: &Tensor, weight: &Tensor, ids: &Tensor, options: &Options| {
        let refused = head(x, weight, ids, options).unwrap_err().to_string();
        assert_eq!(
            refused,
            head_losses(x, weight, ids, options).unwrap_err().to_string()
        );
        refused
    };
    let plain = Options::default();
    assert_eq!(
        message(&x, &weight, &tensor(&[0, 7, 9]), &plain),
        "cross_entropy: targets[1] is 7, expected less than 5"
    );
    assert_eq!(
        message(&x, &weight, &tensor(&[0, 1]), &plain),
        "cross_entropy: targets has shape [2], expected [3]"
    );
    assert_eq!(
        message(&x, &normal(1, &[5, 3]), &ids, &plain),
        "cross_entropy: weight has shape [5, 3], expected [V, 2]"
    );
    assert_eq!(
        message(&x.unsqueeze(0)?, &weight, &ids, &plain),
        "cross_entropy: x has shape [1, 3, 2], expected [M, D]"
    );
    assert_eq!(
        message(&x, &weight, &ids.to_dtype(DType::I64)?, &plain),
        "cross_entropy: targets is I64 on the CPU, supported: u32"
    );
    assert_eq!(
        message(&x.to_dtype(DType::F32)?, &weight, &ids, &plain),
        "cross_entropy: weight is F64 on the CPU, supported: f32 and the type of x"
    );
    assert_eq!(
        message(&x.to_dtype(DType::BF16)?, &weight, &ids, &plain),
        "cross_entropy: x is BF16 on the CPU, supported: f32, f64"
    );
    let watch = TargetWatch::new(6, &Device::Cpu)?;
    let wrong = [
        (
            Options {
                label_smoothing: 1.0,
                ..plain
            },
            "label_smoothing is 1, expected 0 up to but not 1",
        ),
        (
            Options {
                z_loss: f64::NAN,
                ..plain
            },
            "z_loss is NaN, expected a number of at least 0",
        ),
        (
            Options {
                chunk: Some(0),
                ..plain
            },
            "chunk is 0, expected at least 1",
        ),
        (
            Options {
                watch: Some(&watch),
                ..plain
            },
            "vocabulary of the watch is 6, expected 5 like the weight",
        ),
    ];
    for (options, expected) in wrong {
        assert_eq!(
            message(&x, &weight, &ids, &options),
            format!("cross_entropy: {expected}")
        );
    }
    Ok(())
}
