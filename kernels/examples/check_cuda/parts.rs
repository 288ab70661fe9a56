//! Sequences in two parts, a thread for each, against the whole on the processor.

use crate::{host, relative_rms, values};
use candle_core::{DType, Device, Result, Tensor, Var};
use fulgur_kernels::additive::{self, NonCausal};
use fulgur_kernels::decay::{Causal, LogDecay, causal};
use fulgur_kernels::exchange::{StateExchange, threads};
use std::sync::Arc;

/// Operands of a part to its output, joined to the other parts or whole.
type Entry = fn(&[Tensor], Option<Arc<dyn StateExchange>>) -> Result<Tensor>;

struct Case {
    name: &'static str,
    entry: Entry,
    /// All `[B, N, ..]`.
    shapes: Vec<Vec<usize>>,
}

fn decay(t: &[Tensor], exchange: Option<Arc<dyn StateExchange>>, log: LogDecay<'_>) -> Result<Tensor> {
    let options = Causal {
        decay: log,
        exchange,
        ..Default::default()
    };
    causal(&t[0], &t[1], &t[2], &options).map(|(o, _)| o)
}

/// Negative squares of f32 copies.
fn log(t: &Tensor) -> Result<Tensor> {
    let dtype = if t.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    t.to_dtype(dtype)?.sqr()? * -0.2
}

fn cases() -> Vec<Case> {
    let rows = |d: usize, e: usize| vec![vec![2, 90, 2, d], vec![2, 90, 2, d], vec![2, 90, 2, e]];
    let mut all = vec![];
    for (d, e) in [(64, 64), (64, 128), (128, 64), (128, 128), (24, 40)] {
        all.push(Case {
            name: "parts, decay of heads",
            entry: |t, exchange| {
                let log = Tensor::new(&[-0.05f32, -0.4], t[0].device())?.to_dtype(log(&t[0])?.dtype())?;
                decay(t, exchange, LogDecay::Head(&log))
            },
            shapes: rows(d, e),
        });
        all.push(Case {
            name: "parts, decay of channels",
            entry: |t, exchange| decay(t, exchange, LogDecay::Channel(&log(&t[3])?)),
            shapes: [rows(d, e), vec![vec![2, 90, 2, d]]].concat(),
        });
        all.push(Case {
            name: "parts, decay of tokens",
            entry: |t, exchange| decay(t, exchange, LogDecay::Token(&log(&t[3])?)),
            shapes: [rows(d, e), vec![vec![2, 90, 2]]].concat(),
        });
        all.push(Case {
            name: "parts, additive",
            entry: |t, exchange| {
                let options = additive::Causal {
                    exchange,
                    ..Default::default()
                };
                additive::causal(&t[0], &t[1], &t[2], &options).map(|(o, _)| o)
            },
            shapes: rows(d, e),
        });
    }
    all.push(Case {
        name: "parts, non-causal",
        entry: |t, exchange| {
            let options = NonCausal {
                exchange,
                ..Default::default()
            };
            additive::projected(&t[0], 2, 64, &options)
        },
        shapes: vec![vec![2, 90, 2 * 3 * 64]],
    });
    all
}

/// Tokens of the two parts.
const TOKENS: [usize; 2] = [37, 53];

/// The output and the adjoints of the operands of one part, or of the whole.
fn evaluate(
    entry: Entry,
    operands: &[Tensor],
    weights: &Tensor,
    exchange: Option<Arc<dyn StateExchange>>,
) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> = operands.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = entry(&tensors, exchange)?;
    let grads = (&y * weights.reshape(y.shape())?)?.sum_all()?.backward()?;
    let mut results = vec![y.detach()];
    for tensor in &tensors {
        let grad = grads.get(tensor);
        results.push(
            grad.cloned()
                .ok_or_else(|| candle_core::Error::Msg("no gradient".into()))?,
        );
    }
    Ok(results)
}

/// Errors of the output and of all gradients.
fn run(case: &Case, dtype: DType, device: &Device) -> Result<Vec<f64>> {
    let operands: Vec<Tensor> = case
        .shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| host(i as u64, shape, dtype))
        .collect::<Result<_>>()?;
    let shape = (case.entry)(&operands, None)?.shape().clone();
    let weights = host(99, shape.dims(), DType::BF16)?;
    let wanted = evaluate(case.entry, &operands, &weights, None)?;
    let exchanges = threads(&TOKENS);
    let parts: Vec<Result<Vec<Tensor>>> = std::thread::scope(|scope| {
        let started: Vec<_> = exchanges
            .into_iter()
            .enumerate()
            .map(|(part, exchange)| {
                let (operands, weights) = (&operands, &weights);
                scope.spawn(move || {
                    let own = |t: &Tensor| {
                        let first = TOKENS[..part].iter().sum();
                        t.narrow(1, first, TOKENS[part])?
                            .contiguous()?
                            .to_dtype(dtype)?
                            .to_device(device)
                    };
                    let operands: Vec<Tensor> = operands.iter().map(own).collect::<Result<_>>()?;
                    evaluate(case.entry, &operands, &own(weights)?, Some(exchange))
                })
            })
            .collect();
        let joined = started.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.unwrap_or_else(|_| Err(candle_core::Error::Msg("a part panicked".into()))))
            .collect()
    });
    let parts: Vec<Vec<Tensor>> = parts.into_iter().collect::<Result<_>>()?;
    wanted
        .iter()
        .enumerate()
        .map(|(i, wanted)| {
            let found: Vec<&Tensor> = parts.iter().map(|part| &part[i]).collect();
            Ok(relative_rms(&values(&Tensor::cat(&found, 1)?)?, &values(wanted)?))
        })
        .collect()
}

/// A verdict and a row for each case; `small` leaves out what takes a sanitizer long.
pub(crate) fn check(device: &Device, small: bool) -> Vec<(bool, String)> {
    let mut rows = vec![];
    for case in cases() {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1.5e-2)] {
            if small && dtype == DType::F32 {
                continue;
            }
            let (passed, detail) = match run(&case, dtype, device) {
                Ok(errors) => (
                    errors.iter().all(|&error| error < tolerance),
                    errors.iter().map(|error| format!("{error:.1e} ")).collect(),
                ),
                Err(error) => (false, error.to_string()),
            };
            let verdict = if passed { "ok  " } else { "FAIL" };
            let shape = format!("{:?}", case.shapes[0]);
            rows.push((
                passed,
                format!("{verdict} {:<20} {dtype:<5?} {shape:<22} {detail}", case.name),
            ));
        }
    }
    rows
}
