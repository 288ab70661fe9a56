//! What lies between the products of a language model: gated norms, norms with the residual, rotations, embeddings.

use crate::timings::time;
use crate::{BOTH, Case, EPS, master};
use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::embedding::{Ids, lookup};
use fulgur_kernels::lrpe::{Pairing, copy, double, rotary_frequencies, rotate, token_phases};
use fulgur_kernels::norm::{Gate, add_norm, layer_norm, layer_norm_to, rms_norm_gated};
use fulgur_kernels::short_conv::{Padding, short_conv};

/// The norm of the first operand times the second one's gate, and an f32 master as the gain if there is a third.
fn gated(t: &[Tensor], activation: Gate, heads: usize) -> Result<Tensor> {
    let gain = t.get(2).map(master).transpose()?;
    rms_norm_gated(&t[0], gain.as_ref(), &t[1], activation, heads, EPS)
}

/// [`gated`] of two neighbouring parts of one wide projection, which start `before` columns behind its first.
fn gated_columns(t: &[Tensor], width: usize, before: usize) -> Result<Tensor> {
    let part = |start: usize| t[0].narrow(2, start, width);
    rms_norm_gated(
        &part(before)?,
        Some(&master(&t[1])?),
        &part(before + width)?,
        Gate::Silu,
        2,
        EPS,
    )
}

fn gated_norms() -> Vec<Case> {
    let shapes = |sizes: &[[usize; 3]], gain: bool| -> Vec<Vec<Vec<usize>>> {
        sizes
            .iter()
            .map(|&[b, n, d]| {
                let mut shapes = vec![vec![b, n, d]; 2];
                shapes.extend(gain.then(|| vec![d]));
                shapes
            })
            .collect()
    };
    // Rows of one thread, of part of a warp, of warps, of a block, and beyond what a block keeps.
    let whole = [
        [1, 1, 3],
        [2, 3, 5],
        [3, 63, 60],
        [2, 500, 384],
        [5, 129, 513],
        [2, 37, 2048],
        [1, 3, 4096],
        [2, 21, 10_000],
        [1, 9, 4099],
    ];
    // Four heads.
    let heads = [
        [1, 1, 16],
        [2, 65, 20],
        [3, 700, 256],
        [2, 129, 512],
        [1, 40, 2048],
    ];
    vec![
        Case {
            name: "norm, silu gate",
            entry: |t| gated(t, Gate::Silu, 1),
            dtypes: BOTH,
            shapes: shapes(&whole, true),
        },
        Case {
            name: "norm, sigmoid gate",
            entry: |t| gated(t, Gate::Sigmoid, 4),
            dtypes: BOTH,
            shapes: shapes(&heads, true),
        },
        Case {
            name: "norm, plain gate",
            entry: |t| gated(t, Gate::Identity, 4),
            dtypes: BOTH,
            shapes: shapes(&heads, false),
        },
        Case {
            name: "norm, gate, no gain",
            entry: |t| gated(t, Gate::Silu, 1),
            dtypes: BOTH,
            shapes: shapes(&whole, false),
        },
        Case {
            name: "norm, gate in columns",
            entry: |t| gated_columns(t, 128, 64),
            dtypes: BOTH,
            shapes: [[1, 1], [2, 65], [3, 500]]
                .map(|[b, n]| vec![vec![b, n, 384], vec![128]])
                .to_vec(),
        },
        Case {
            // Columns that start off the grid of vectors must not be read as vectors.
            name: "norm, gate off grid",
            entry: |t| gated_columns(t, 128, 3),
            dtypes: BOTH,
            shapes: [[1, 1], [2, 65]]
                .map(|[b, n]| vec![vec![b, n, 264], vec![128]])
                .to_vec(),
        },
    ]
}

/// Both results of a branch that joins an f32 stream, or one of its own type, in a row.
fn joined(t: &[Tensor], mixed: bool) -> Result<Tensor> {
    let stream = if mixed { master(&t[0])? } else { t[0].clone() };
    let gain = t.get(2).map(master).transpose()?;
    let (sum, normed) = add_norm(&stream, &t[1], gain.as_ref(), EPS)?;
    Tensor::cat(&[&sum.to_dtype(normed.dtype())?, &normed], 0)
}

fn other_norms() -> Vec<Case> {
    let sizes = [
        [1, 1, 3],
        [2, 3, 5],
        [3, 63, 60],
        [2, 500, 384],
        [5, 129, 513],
        [2, 37, 2048],
        [3, 1100, 64],
        [2, 21, 10_000],
        [1, 9, 4099],
    ];
    let list = |make: fn([usize; 3]) -> Vec<Vec<usize>>| -> Vec<Vec<Vec<usize>>> {
        sizes.iter().map(|&size| make(size)).collect()
    };
    vec![
        Case {
            name: "layer_norm",
            entry: |t| layer_norm(&t[0], Some(&master(&t[1])?), Some(&master(&t[2])?), EPS),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![d], vec![d]]),
        },
        Case {
            name: "layer_norm, bare",
            entry: |t| layer_norm(&t[0], None, None, EPS),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d]]),
        },
        Case {
            name: "layer_norm, bias",
            entry: |t| layer_norm(&t[0], None, Some(&t[1]), EPS),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![d]]),
        },
        Case {
            name: "layer_norm f32 to bf16",
            entry: |t| {
                let [x, gain, bias] = [master(&t[0])?, master(&t[1])?, master(&t[2])?];
                layer_norm_to(&x, Some(&gain), Some(&bias), EPS, t[0].dtype())
            },
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![d], vec![d]]),
        },
        Case {
            name: "layer_norm of columns",
            entry: |t| layer_norm(&t[0].narrow(2, 8, 128)?, Some(&master(&t[1])?), None, EPS),
            dtypes: BOTH,
            shapes: vec![
                vec![vec![2, 65, 160], vec![128]],
                vec![vec![2, 65, 161], vec![128]],
            ],
        },
        Case {
            name: "add_norm",
            entry: |t| joined(t, false),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![b, n, d], vec![d]]),
        },
        Case {
            name: "add_norm f32 + bf16",
            entry: |t| joined(t, true),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d], vec![b, n, d], vec![d]]),
        },
        Case {
            name: "add_norm, norm only",
            entry: |t| Ok(add_norm(&master(&t[0])?, &t[1], None, EPS)?.1),
            dtypes: BOTH,
            shapes: list(|[b, n, d]| vec![vec![b, n, d]; 2]),
        },
        Case {
            name: "add_norm, sum only",
            entry: |t| add_norm(&t[0], &t[1], Some(&master(&t[2])?), EPS).map(|(sum, _)| sum),
            dtypes: BOTH,
            shapes: vec![vec![vec![2, 7, 64], vec![2, 7, 64], vec![64]]],
        },
    ]
}

/// Rotary positions with learnt frequencies, of tokens that follow after others.
fn rotary(t: &[Tensor], pairing: Pairing) -> Result<Tensor> {
    let phase = token_phases(&master(&t[1])?, t[0].dim(1)?, 5)?;
    rotate(&t[0], &phase, pairing)
}

/// [`rotary`] of the middle heads of three times as many, with fixed frequencies.
fn rotary_columns(t: &[Tensor], pairing: Pairing) -> Result<Tensor> {
    let (tokens, heads, width) = (t[0].dim(1)?, t[0].dim(2)? / 3, t[0].dim(3)?);
    let wide = match t[0].dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    // Rounded alike for both sides: far away the frequencies' last bits count.
    let theta = rotary_frequencies(width, 1e4, &Device::Cpu)?
        .to_dtype(DType::F32)?
        .to_dtype(wide)?
        .to_device(t[0].device())?;
    let phase = token_phases(&theta, tokens, 100_000)?;
    rotate(&t[0].narrow(2, heads, heads)?, &phase, pairing)
}

fn rotations() -> Vec<Case> {
    // Batch, tokens, heads, phases of a row.
    let sizes = [
        [1, 1, 1, 1],
        [2, 7, 3, 5],
        [2, 65, 4, 32],
        [3, 500, 2, 64],
        [1, 1, 16, 64],
        [70, 3, 33, 8],
    ];
    let list = |make: fn([usize; 4]) -> Vec<Vec<usize>>| -> Vec<Vec<Vec<usize>>> {
        sizes.iter().map(|&size| make(size)).collect()
    };
    vec![
        Case {
            name: "rotary, halves",
            entry: |t| rotary(t, Pairing::Halves),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, 2 * p], vec![p]]),
        },
        Case {
            name: "rotary, neighbours",
            entry: |t| rotary(t, Pairing::Neighbours),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, 2 * p], vec![p]]),
        },
        Case {
            name: "rotary by head",
            entry: |t| rotary(t, Pairing::Halves),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, 2 * p], vec![h, p]]),
        },
        Case {
            name: "rotary of columns",
            entry: |t| rotary_columns(t, Pairing::Neighbours),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, 3 * h, 2 * p]]),
        },
        Case {
            name: "lrpe",
            entry: |t| double(&t[0], &master(&t[1])?),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, p], vec![n, p]]),
        },
        Case {
            name: "lrpe by head",
            entry: |t| double(&t[0], &master(&t[1])?),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, p], vec![n, h, p]]),
        },
        Case {
            name: "lrpe of a half",
            entry: |t| double(&t[0], &master(&t[1])?),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, 2 * p], vec![n, p]]),
        },
        Case {
            name: "lrpe of a half by head",
            entry: |t| double(&t[0], &master(&t[1])?),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, 2 * p], vec![n, h, p]]),
        },
        Case {
            name: "copied channels",
            entry: |t| copy(&t[0], t[0].dim(3)?),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, p]]),
        },
        Case {
            name: "copied channels, a half",
            entry: |t| copy(&t[0], t[0].dim(3)? / 2),
            dtypes: BOTH,
            shapes: list(|[b, n, h, p]| vec![vec![b, n, h, 2 * p]]),
        },
    ]
}

/// Tokens `[B, N, C]` with kernels `[C, W]` of the masters' type.
fn convolved(t: &[Tensor], padding: fn(usize) -> Padding) -> Result<Tensor> {
    short_conv(&t[0], &master(&t[1])?, padding(t[1].dim(1)?))
}

fn convolutions() -> Vec<Case> {
    // Batch, tokens, channels, taps.
    let sizes = [
        [1, 1, 1, 1],
        [2, 37, 7, 3],
        [3, 130, 64, 4],
        [2, 1000, 24, 5],
        [70, 9, 40, 8],
        [2, 50, 16, 11],
        [600, 4, 8, 4],
    ];
    let shapes = || sizes.map(|[b, n, c, w]| vec![vec![b, n, c], vec![c, w]]).to_vec();
    let long = sizes.iter().filter(|[_, n, _, w]| n >= w);
    vec![
        Case {
            name: "short convolution, causal",
            entry: |t| convolved(t, Padding::causal),
            dtypes: BOTH,
            shapes: shapes(),
        },
        Case {
            name: "short convolution, centred",
            entry: |t| convolved(t, Padding::centred),
            dtypes: BOTH,
            shapes: shapes(),
        },
        Case {
            name: "short convolution behind a history",
            entry: |t| convolved(t, |_| Padding::NONE),
            dtypes: BOTH,
            shapes: long
                .map(|&[b, n, c, w]| vec![vec![b, n, c], vec![c, w]])
                .collect(),
        },
    ]
}

/// Rows of a table by ids of which every other one is the same, and some do not occur.
fn embedded(table: &Tensor, count: usize, dtype: DType) -> Result<Tensor> {
    let rows = table.dim(0)?;
    let ids: Vec<u32> = (0..count)
        .map(|i| if i % 2 == 0 { rows / 2 } else { i * i * 7 % rows } as u32)
        .collect();
    lookup(table, &Ids::new(&ids, &[1, count], rows)?, dtype)
}

fn embeddings() -> Vec<Case> {
    let tables = [[1, 1], [5, 3], [70, 64], [300, 33], [1000, 384], [3, 2048]];
    let shapes = || tables.map(|[rows, width]| vec![vec![rows, width]]).to_vec();
    vec![
        Case {
            name: "embedding of a master",
            entry: |t| embedded(&master(&t[0])?, 1111, t[0].dtype()),
            dtypes: BOTH,
            shapes: shapes(),
        },
        Case {
            name: "embedding",
            entry: |t| embedded(&t[0], 1111, t[0].dtype()),
            dtypes: BOTH,
            shapes: shapes(),
        },
        Case {
            name: "embedding, few",
            entry: |t| embedded(&t[0], 7, t[0].dtype()),
            dtypes: BOTH,
            shapes: shapes(),
        },
    ]
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = gated_norms();
    cases.extend(other_norms());
    cases.extend(rotations());
    cases.extend(convolutions());
    cases.extend(embeddings());
    cases
}

/// Times the operators on [32768 x 512], the rotation on heads of 64.
pub(crate) fn timings(dtype: DType, device: &Device) -> Result<()> {
    let (x, gain): (&[usize], &[usize]) = (&[32, 1024, 512], &[512]);
    let heads: &[usize] = &[32, 1024, 8, 64];
    time(
        "norm, silu gate",
        |t| gated(t, Gate::Silu, 8),
        &[x, x, gain],
        [3.0, 5.0],
        dtype,
        device,
    )?;
    time(
        "layer_norm",
        |t| layer_norm(&t[0], Some(&master(&t[1])?), Some(&master(&t[2])?), EPS),
        &[x, gain, gain],
        [2.0, 3.0],
        dtype,
        device,
    )?;
    // Without a sum whose adjoint would be counted with it.
    time(
        "add_norm, norm only",
        |t| Ok(add_norm(&t[0], &t[1], Some(&master(&t[2])?), EPS)?.1),
        &[x, x, gain],
        [4.0, 3.0],
        dtype,
        device,
    )?;
    time(
        "rotary, halves",
        |t| rotary(t, Pairing::Halves),
        &[heads, &[32]],
        [2.0, 3.0],
        dtype,
        device,
    )?;
    time(
        "embedding",
        |t| embedded(&t[0], 32_768, t[0].dtype()),
        &[&[8192, 512]],
        [2.0, 1.0],
        dtype,
        device,
    )
}
