//! The causal recurrences: with decays, and the additive one.

use crate::{BOTH, Case, HALF, host, master, values};
use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::additive::{self, CausalState};
use fulgur_kernels::decay::{Causal, LogDecay, causal};
use fulgur_kernels::split::{Part, split};

/// How [`decay`] runs the recurrence.
#[derive(Clone, Copy, PartialEq)]
enum Decays {
    None,
    Head,
    Token,
    Channel,
}

/// The causal recurrence on q, k, v, the initial state and, where they are learnt, square roots of negative log-decays;
/// output and final state in a row. Fixed decays go to other kernels than learnt ones, and some of them are zero.
fn decay(t: &[Tensor], decays: Decays, sequences: Option<&[usize]>) -> Result<Tensor> {
    let log = match t.get(4) {
        Some(log) => Some((master(log)?.sqr()? * -0.2)?),
        None => fixed(&t[0], decays)?,
    };
    let options = Causal {
        decay: match (decays, &log) {
            (Decays::Head, Some(log)) => LogDecay::Head(log),
            (Decays::Token, Some(log)) => LogDecay::Token(log),
            (Decays::Channel, Some(log)) => LogDecay::Channel(log),
            _ => LogDecay::None,
        },
        initial: Some(&t[3]),
        sequences,
        ..Default::default()
    };
    let (o, state) = causal(&t[0], &t[1], &t[2], &options)?;
    let state = state.to_dtype(o.dtype())?;
    Tensor::cat(&[o.flatten_all()?, state.flatten_all()?], 0)
}

/// Log-decays for queries `q`, one in fifteen of them negative infinity.
fn fixed(q: &Tensor, decays: Decays) -> Result<Option<Tensor>> {
    let Some(shape) = decay_shapes(&[q.dims(), &[1]].concat(), decays).pop_if(|_| decays != Decays::None)
    else {
        return Ok(None);
    };
    let log = |x: &f64| if *x > 1.5 { f64::NEG_INFINITY } else { -0.2 * x * x };
    let logs: Vec<f64> = values(&host(77, &shape, DType::BF16)?)?.iter().map(log).collect();
    let dtype = if q.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    Tensor::from_vec(logs, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(q.device())
        .map(Some)
}

/// The causal additive recurrence on q, logits, v and, perhaps, an initial state and log-sum; all results in a row.
fn additive_causal(t: &[Tensor], sequences: Option<&[usize]>) -> Result<Tensor> {
    let initial = match t {
        [_, _, _, state, log_sum] => Some(CausalState {
            state: state.clone(),
            log_sum: log_sum.clone(),
        }),
        _ => None,
    };
    let options = additive::Causal {
        initial: initial.as_ref(),
        sequences,
        ..Default::default()
    };
    let (o, last) = additive::causal(&t[0], &t[1], &t[2], &options)?;
    let rows = [
        o.flatten_all()?,
        last.state.to_dtype(o.dtype())?.flatten_all()?,
        last.log_sum.to_dtype(o.dtype())?.flatten_all()?,
    ];
    Tensor::cat(&rows, 0)
}

/// All elements of several tensors.
fn row_of(parts: &[Tensor], dtype: DType) -> Result<Tensor> {
    let rows: Vec<Tensor> = parts
        .iter()
        .map(|part| part.to_dtype(dtype)?.flatten_all())
        .collect::<Result<_>>()?;
    Tensor::cat(&rows, 0)
}

/// Sizes B, N, H, D of views into one tensor.
const FUSED: [[usize; 4]; 2] = [[2, 40, 2, 64], [1, 257, 3, 128]];
/// Sizes B, N, H, D, E over which errors would add up.
const LONG: [usize; 5] = [1, 65_536, 1, 64, 64];

/// A tensor that holds q, k, v of each token side by side with a few elements before them, and the initial state.
fn fused_shapes(&[b, n, h, d]: &[usize; 4]) -> Vec<Vec<usize>> {
    vec![vec![b, n, 3 * h * d + 8], vec![b, h, d, d]]
}

/// Runs `entry` on views of such a tensor whose rows begin at element `offset`.
fn strided(t: &[Tensor], offset: usize, entry: fn(&[Tensor]) -> Result<Tensor>) -> Result<Tensor> {
    let (b, n, _) = t[0].dims3()?;
    let (_, h, d, _) = t[1].dims4()?;
    let rows = |part: usize| {
        t[0].narrow(2, offset + part * h * d, h * d)?
            .reshape((b, n, h, d))
    };
    entry(&[&[rows(0)?, rows(1)?, rows(2)?], &t[1..]].concat())
}

/// Shapes of q, k, v, the initial state and the logarithms.
fn decay_shapes(sizes: &[usize], decays: Decays) -> Vec<Vec<usize>> {
    let [b, n, h, d, e] = [0, 1, 2, 3, 4].map(|i| sizes[i]);
    let mut shapes = vec![
        vec![b, n, h, d],
        vec![b, n, h, d],
        vec![b, n, h, e],
        vec![b, h, d, e],
    ];
    match decays {
        Decays::None => {}
        Decays::Head => shapes.push(vec![h]),
        Decays::Token => shapes.push(vec![b, n, h]),
        Decays::Channel => shapes.push(vec![b, n, h, d]),
    }
    shapes
}

/// Lengths around those of chunks and tiles, one that is cut into segments, and widths of all kernels.
fn recurrences(decays: Decays) -> Vec<Vec<Vec<usize>>> {
    [
        [2, 1, 3, 128, 128],
        [1, 15, 2, 16, 80],
        [1, 63, 2, 96, 64],
        [2, 64, 2, 64, 64],
        [1, 65, 3, 64, 128],
        [1, 257, 2, 60, 24],
        [1, 500, 1, 192, 256],
        [1, 1100, 2, 128, 128],
    ]
    .iter()
    .map(|sizes| decay_shapes(sizes, decays))
    .collect()
}

/// All kinds of decays, fixed and learnt, and packed sequences.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "decay none",
            entry: |t| decay(t, Decays::None, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::None),
        },
        Case {
            name: "decay head, fixed",
            entry: |t| decay(t, Decays::Head, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::None),
        },
        Case {
            name: "decay token, fixed",
            entry: |t| decay(t, Decays::Token, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::None),
        },
        Case {
            name: "decay channel, fixed",
            entry: |t| decay(t, Decays::Channel, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::None),
        },
        Case {
            name: "decay head, learnt",
            entry: |t| decay(t, Decays::Head, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::Head),
        },
        Case {
            name: "decay token, learnt",
            entry: |t| decay(t, Decays::Token, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::Token),
        },
        Case {
            name: "decay channel, learnt",
            entry: |t| decay(t, Decays::Channel, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::Channel),
        },
        Case {
            name: "decay token, packed",
            entry: |t| decay(t, Decays::Token, Some(&[0, 1, 1, 65, 257])),
            dtypes: BOTH,
            shapes: [[4, 2, 64, 64], [4, 3, 24, 40]]
                .map(|[s, h, d, e]| {
                    let rows = vec![1, 257, h, d];
                    vec![
                        rows.clone(),
                        rows,
                        vec![1, 257, h, e],
                        vec![s, h, d, e],
                        vec![1, 257, h],
                    ]
                })
                .to_vec(),
        },
        Case {
            name: "decay head, long",
            entry: |t| decay(t, Decays::Head, None),
            dtypes: HALF,
            shapes: vec![decay_shapes(&LONG, Decays::None)],
        },
        Case {
            name: "decay token, long",
            entry: |t| decay(t, Decays::Token, None),
            dtypes: HALF,
            shapes: vec![decay_shapes(&LONG, Decays::None)],
        },
        Case {
            name: "decay channel, long",
            entry: |t| decay(t, Decays::Channel, None),
            dtypes: HALF,
            shapes: vec![decay_shapes(&LONG, Decays::Channel)],
        },
        Case {
            name: "additive causal, long",
            entry: |t| additive_causal(t, None),
            dtypes: HALF,
            shapes: vec![decay_shapes(&LONG, Decays::None)[..3].to_vec()],
        },
        Case {
            name: "decay, fused rows",
            entry: |t| strided(t, 0, |t| decay(t, Decays::Channel, None)),
            dtypes: BOTH,
            shapes: FUSED.iter().map(fused_shapes).collect(),
        },
        Case {
            name: "decay, rows off the grid",
            entry: |t| strided(t, 1, |t| decay(t, Decays::Head, None)),
            dtypes: BOTH,
            shapes: FUSED.iter().map(fused_shapes).collect(),
        },
        Case {
            name: "additive, fused rows",
            entry: |t| strided(t, 0, |t| additive_causal(t, None)),
            dtypes: BOTH,
            shapes: FUSED
                .iter()
                .map(|sizes| {
                    let mut shapes = fused_shapes(sizes);
                    shapes.push(shapes[1][..3].to_vec());
                    shapes
                })
                .collect(),
        },
        Case {
            name: "split, silu and plain",
            entry: |t| {
                let third = t[0].dim(2)? / 3;
                let parts = [Part::Silu(third), Part::Plain(third), Part::Silu(third)];
                row_of(&split(&t[0], &parts)?, t[0].dtype())
            },
            dtypes: BOTH,
            shapes: [[1, 1, 3], [2, 31, 1536], [3, 63, 192], [2, 500, 15]]
                .map(|[b, n, d]| vec![vec![b, n, d]])
                .to_vec(),
        },
        Case {
            name: "split, gates",
            entry: |t| {
                let width = t[1].dim(0)?;
                let bound = ((master(&t[1])?.tanh()? + 1.0)? * 0.45)?;
                let parts = [
                    Part::Silu(width),
                    Part::Gate(width, Some(&bound)),
                    Part::Plain(width),
                ];
                row_of(&split(&t[0], &parts)?, t[0].dtype())
            },
            dtypes: BOTH,
            shapes: [[1, 2, 1], [2, 32, 300], [3, 63, 64], [2, 500, 384], [2, 257, 5]]
                .map(|[b, n, d]| vec![vec![b, n, 3 * d], vec![d]])
                .to_vec(),
        },
        Case {
            name: "additive causal",
            entry: |t| additive_causal(t, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::None)
                .into_iter()
                .map(|shapes| shapes[..3].to_vec())
                .collect(),
        },
        Case {
            name: "additive, goes on",
            entry: |t| additive_causal(t, None),
            dtypes: BOTH,
            shapes: recurrences(Decays::None)
                .into_iter()
                .map(|mut shapes| {
                    shapes.push(shapes[3][..3].to_vec());
                    shapes
                })
                .collect(),
        },
        Case {
            name: "additive, packed",
            entry: |t| additive_causal(t, Some(&[0, 1, 1, 65, 257])),
            dtypes: BOTH,
            shapes: [[2, 64, 64], [3, 24, 40]]
                .map(|[h, d, e]| {
                    let rows = vec![1, 257, h, d];
                    vec![
                        rows.clone(),
                        rows,
                        vec![1, 257, h, e],
                        vec![4, h, d, e],
                        vec![4, h, d],
                    ]
                })
                .to_vec(),
        },
    ]
}
