//! The element-wise scan of expand, oscillate, shrink.

use crate::{BOTH, Case, master};
use candle_core::{DType, Result, Tensor};
use fulgur_kernels::eos::{Options, scan, step};
use fulgur_kernels::exchange::StateExchange;
use std::sync::Arc;

/// Logarithms of gates: negative magnitudes by a power of two, exact in bf16. Below an eighth they are all alike: gates near 1
/// that never change add up the rounding of a float hundreds of times.
fn logs(t: &Tensor, scale: f64) -> Result<Tensor> {
    t.abs()?.maximum(0.125)? * -scale
}

/// The scan on expand, input, shrink, logarithms of gates and, perhaps, an initial memory; output and final memory in a row.
fn scanned(rows: [&Tensor; 3], log: &Tensor, options: &Options<'_>) -> Result<Tensor> {
    let (y, last) = scan(rows[0], rows[1], log, rows[2], options)?;
    let last = last.to_dtype(y.dtype())?;
    Tensor::cat(&[y.flatten_all()?, last.flatten_all()?], 0)
}

/// [`scanned`] with the logarithms of `t[3]` and the initial memory `t[4]`.
fn run(
    t: &[Tensor],
    sequences: Option<&[usize]>,
    exchange: Option<Arc<dyn StateExchange>>,
) -> Result<Tensor> {
    let options = Options {
        initial: t.get(4),
        exchange,
        sequences,
    };
    scanned([&t[0], &t[1], &t[2]], &logs(&t[3], 0.25)?, &options)
}

/// A part among others that add to its memory, and to its adjoint, something of both tensors they are given.
#[derive(Debug)]
struct Others;

impl StateExchange for Others {
    fn parts(&self) -> usize {
        2
    }

    fn prefix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        (state * 0.5)? + (log_decay * 0.01)?.exp()?
    }

    fn suffix(&self, state: &Tensor, log_decay: &Tensor) -> Result<Tensor> {
        (state * -0.25)? + (log_decay * 0.02)?.exp()?
    }
}

/// As [`run`], rows and gates taken out of wider tensors, so that they start anywhere and have gaps.
fn views(t: &[Tensor]) -> Result<Tensor> {
    let part = |t: &Tensor| t.narrow(3, 1, t.dim(3)? - 1);
    let rows = [part(&t[0])?, part(&t[1])?, part(&t[2])?];
    let log = part(&logs(&t[3], 0.25)?)?.transpose(3, 4)?;
    scanned(rows.each_ref(), &log, &Options::default())
}

/// Three tokens one after the other, each from the memory after the one before; gates are alike along D. Beside them stands
/// the scan, since steps have no gradients.
fn steps(t: &[Tensor]) -> Result<Tensor> {
    let whole = run(t, None, None)?;
    let mut memory = t[4].to_dtype(if t[4].dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    })?;
    let mut rows = vec![whole];
    for token in 0..3 {
        let at = |t: &Tensor| t.narrow(1, token, 1)?.squeeze(1);
        let log = logs(&at(&t[3])?, 0.25)?;
        let (y, after) = step(&at(&t[0])?, &at(&t[1])?, &log, &at(&t[2])?, &memory)?;
        rows.push(y.flatten_all()?);
        memory = after;
    }
    rows.push(memory.to_dtype(t[0].dtype())?.flatten_all()?);
    Tensor::cat(&rows, 0)
}

/// Shapes of the operands for sizes `[B, N, H, K, D]`, with gates of length 1 along the axes that `alike` names, and of an
/// initial memory for each of `sequences`.
fn shapes(sizes: [usize; 5], alike: &str, sequences: usize) -> Vec<Vec<usize>> {
    let [b, n, h, k, d] = sizes;
    let gates = "BNHKD"
        .chars()
        .zip(sizes)
        .map(|(axis, size)| if alike.contains(axis) { 1 } else { size });
    vec![
        vec![b, n, h, k],
        vec![b, n, h, d],
        vec![b, n, h, k],
        gates.collect(),
        vec![sequences, h, k, d],
    ]
}

/// Lengths around those of chunks, and widths of one row, of few, of several tiles, aligned and odd.
fn grid(alike: &str) -> Vec<Vec<Vec<usize>>> {
    [
        [2, 1, 3, 16, 32],
        [1, 15, 2, 24, 40],
        [2, 63, 2, 8, 7],
        [1, 257, 2, 1, 64],
        [1, 65, 3, 4, 33],
        [2, 33, 1, 64, 1],
        [1, 500, 2, 61, 96],
        [1, 40, 2, 100, 20],
        [1, 35, 1, 256, 12],
    ]
    .map(|sizes| shapes(sizes, alike, sizes[0]))
    .to_vec()
}

/// Full and shared gates, packed sequences, segments, other element types, views, parts and steps.
pub(crate) fn cases() -> Vec<Case> {
    let plain = |name: &'static str, alike: &str| Case {
        name,
        entry: |t| run(t, None, None),
        dtypes: BOTH,
        shapes: grid(alike),
    };
    let packed = |name: &'static str, alike: &str| Case {
        name,
        entry: |t| run(t, Some(&[0, 1, 1, 65, 257]), None),
        dtypes: BOTH,
        shapes: [[1, 257, 2, 32, 64], [1, 257, 3, 12, 9]]
            .map(|sizes| shapes(sizes, alike, 4))
            .to_vec(),
    };
    let long = [[1, 2100, 1, 64, 64], [2, 2000, 1, 3, 20]];
    let segments = |name: &'static str, alike: &str| Case {
        name,
        entry: |t| run(t, None, None),
        dtypes: BOTH,
        shapes: long.map(|sizes| shapes(sizes, alike, sizes[0])).to_vec(),
    };
    vec![
        plain("eos full", ""),
        plain("eos alike D", "D"),
        plain("eos alike K", "K"),
        plain("eos alike KD", "KD"),
        plain("eos alike H", "H"),
        plain("eos alike BN", "BN"),
        plain("eos alike BND", "BND"),
        Case {
            name: "eos no initial",
            entry: |t| run(t, None, None),
            dtypes: BOTH,
            shapes: grid("").into_iter().map(|shapes| shapes[..4].to_vec()).collect(),
        },
        packed("eos packed", ""),
        packed("eos packed N", "N"),
        segments("eos segments", ""),
        segments("eos segments D", "D"),
        segments("eos segments BN", "BN"),
        Case {
            // What enters a segment outlives it.
            name: "eos segments, slow",
            entry: |t| {
                let options = Options {
                    initial: Some(&t[4]),
                    ..Default::default()
                };
                scanned([&t[0], &t[1], &t[2]], &logs(&t[3], 1.0 / 64.0)?, &options)
            },
            dtypes: BOTH,
            shapes: long.map(|sizes| shapes(sizes, "", sizes[0])).to_vec(),
        },
        Case {
            name: "eos f32 gates",
            entry: |t| {
                let log = master(&t[3])?;
                run(
                    &[t[0].clone(), t[1].clone(), t[2].clone(), log, t[4].clone()],
                    None,
                    None,
                )
            },
            dtypes: &[DType::BF16],
            shapes: grid(""),
        },
        Case {
            name: "eos bf16 gates",
            entry: |t| {
                let [e, i, s] = [master(&t[0])?, master(&t[1])?, master(&t[2])?];
                run(&[e, i, s, t[3].clone(), t[4].clone()], None, None)?.to_dtype(t[0].dtype())
            },
            dtypes: &[DType::BF16],
            shapes: grid(""),
        },
        Case {
            name: "eos views",
            entry: views,
            dtypes: BOTH,
            shapes: [[2, 35, 2, 17, 34], [1, 20, 1, 9, 41]]
                .map(|[b, n, h, k, d]| {
                    let rows = |width| vec![b, n, h, width];
                    vec![rows(k), rows(d), rows(k), vec![b, n, h, d, k - 1]]
                })
                .to_vec(),
        },
        Case {
            name: "eos parts",
            entry: |t| run(t, None, Some(Arc::new(Others))),
            dtypes: BOTH,
            shapes: [[2, 63, 2, 16, 40], [1, 2000, 1, 8, 32]]
                .map(|sizes| shapes(sizes, "", sizes[0]))
                .to_vec(),
        },
        Case {
            name: "eos steps",
            entry: steps,
            dtypes: BOTH,
            shapes: [[2, 3, 3, 16, 40], [1, 3, 2, 3, 5]]
                .map(|sizes| shapes(sizes, "D", sizes[0]))
                .to_vec(),
        },
    ]
}
