//! Softmax attention in tiles: widths of all kernels, and every option.

use crate::{BOTH, Case};
use candle_core::{Result, Tensor};
use fulgur_kernels::attention::{Options, softmax};

/// B, N, L, H, G, D and E.
type Sizes = [usize; 7];

fn shapes(sizes: &[Sizes]) -> Vec<Vec<Vec<usize>>> {
    sizes
        .iter()
        .map(|&[b, n, l, h, g, d, e]| vec![vec![b, n, h, d], vec![b, l, g, d], vec![b, l, g, e]])
        .collect()
}

/// Tiles of all kernels and more, with odd rests. A row that meets one key has no gradient but rounding: hence no single keys.
const LENGTHS: [Sizes; 10] = [
    [2, 3, 4, 2, 2, 8, 8],
    [2, 63, 65, 3, 1, 64, 64],
    [1, 64, 64, 1, 1, 32, 32],
    [1, 129, 131, 4, 2, 80, 80],
    [2, 130, 257, 4, 2, 128, 128],
    [2, 257, 250, 6, 3, 96, 88],
    [1, 2, 300, 8, 2, 128, 128],
    [1, 500, 500, 2, 1, 24, 112],
    [2, 90, 100, 2, 1, 60, 33],
    [1, 70, 40, 2, 2, 200, 256],
];

/// All options: `masked` drops one key in four, and all keys of the second batch's start.
fn run(t: &[Tensor], causal: bool, masked: bool, sequences: Option<&[usize]>) -> Result<Tensor> {
    let (b, l) = (t[1].dim(0)?, t[1].dim(1)?);
    let keep: Vec<f32> = (0..b * l)
        .map(|i| f32::from(u8::from(i % 4 != 1 && i % l >= i / l * 20)))
        .collect();
    let mask = Tensor::from_vec(keep, (b, l), t[0].device())?;
    let options = Options {
        causal,
        scale: None,
        sequences,
        mask: masked.then_some(&mask),
    };
    softmax(&t[0], &t[1], &t[2], &options)
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "attention in tiles",
            entry: |t| run(t, false, false, None),
            dtypes: BOTH,
            shapes: shapes(&LENGTHS),
        },
        Case {
            name: "attention in tiles, causal",
            entry: |t| run(t, true, false, None),
            dtypes: BOTH,
            shapes: shapes(&LENGTHS),
        },
        Case {
            name: "attention in tiles, masked",
            entry: |t| run(t, false, true, None),
            dtypes: BOTH,
            shapes: shapes(&[
                [2, 70, 90, 2, 1, 64, 64],
                [2, 131, 200, 4, 2, 128, 128],
                [2, 40, 333, 2, 2, 40, 96],
            ]),
        },
        Case {
            name: "attention in tiles, causal, masked",
            entry: |t| run(t, true, true, None),
            dtypes: BOTH,
            shapes: shapes(&[
                [2, 70, 90, 2, 1, 64, 64],
                [2, 200, 131, 4, 2, 128, 128],
                [2, 400, 400, 2, 2, 32, 32],
            ]),
        },
        Case {
            name: "attention in tiles, packed",
            entry: |t| run(t, true, true, Some(&[0, 4, 4, 133, 200, 457, 500])),
            dtypes: BOTH,
            shapes: shapes(&[
                [1, 500, 500, 2, 1, 64, 64],
                [1, 500, 500, 4, 2, 128, 128],
                [1, 500, 500, 2, 2, 88, 96],
            ]),
        },
        Case {
            name: "attention in tiles, packed, both ways",
            entry: |t| run(t, false, false, Some(&[0, 3, 300, 300])),
            dtypes: BOTH,
            shapes: shapes(&[[1, 300, 300, 2, 1, 64, 64], [1, 300, 300, 2, 2, 128, 128]]),
        },
        Case {
            // Rows that start off the grid of vectors are copied, rows with gaps are not.
            name: "attention in tiles, views",
            entry: |t| {
                let part = |from| t[0].narrow(3, from, 64);
                softmax(&part(0)?, &part(64)?, &part(129)?, &Options::default())
            },
            dtypes: BOTH,
            shapes: vec![vec![vec![2, 100, 3, 200]]],
        },
    ]
}
