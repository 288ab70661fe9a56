//! Where a token is in its clip: absolute coordinates as Fourier features.
//!
//! Relative encodings cannot tell left from right or start from end. Coordinates are fractions of each axis and, for
//! the first axis, seconds as well, so that any size and duration is a valid input.

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::position::{FRACTION_WIDTH, fractions, spread};

/// Periods in seconds, geometric from the shortest to the longest.
const PERIODS: usize = 16;
const SHORTEST_S: f64 = 0.2;
const LONGEST_S: f64 = 8.0;

/// Width of [`seconds`].
pub(super) const SECONDS_WIDTH: usize = 2 * PERIODS;

/// Sines and cosines of `n` moments `step_s` apart, `[n, 32]`; moment i is the middle of token i.
pub(super) fn seconds(n: usize, step_s: f64, device: &Device) -> Result<Tensor> {
    let mut values = Vec::with_capacity(n * SECONDS_WIDTH);
    for i in 0..n {
        let time = (i as f64 + 0.5) * step_s;
        for p in 0..PERIODS {
            let ratio = p as f64 / (PERIODS - 1) as f64;
            let (sin, cos) = (std::f64::consts::TAU * time
                / (SHORTEST_S * (LONGEST_S / SHORTEST_S).powf(ratio)))
            .sin_cos();
            values.extend([sin as f32, cos as f32]);
        }
    }
    Tensor::from_vec(values, (n, SECONDS_WIDTH), device)
}

/// Adds a learned map of absolute coordinates to the tokens of a grid.
#[derive(Clone, Debug)]
pub(super) struct AxisEmbedding {
    map: Linear,
}

impl AxisEmbedding {
    /// For `axes` axes, the first of which is time.
    pub(super) fn new(axes: usize, dim: usize, vb: &VarBuilder) -> Result<Self> {
        let width = SECONDS_WIDTH + axes * FRACTION_WIDTH;
        Ok(Self {
            map: Linear::new(width, dim, true, Start::FanIn, vb)?,
        })
    }

    /// Embedding `[N, d]` of all tokens of `axes`, `step_s` seconds a token of the first axis.
    pub(super) fn forward(&self, axes: &[usize], step_s: f64, device: &Device) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(2);
        if let Some(&n) = axes.first() {
            parts.push(spread(&seconds(n, step_s, device)?, axes, 0)?);
        }
        parts.push(fractions(axes, device)?);
        self.map.forward(&Tensor::cat(&parts, 1)?)
    }
}
