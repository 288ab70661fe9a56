//! Where a token is in its clip: absolute coordinates as Fourier features.
//!
//! Relative encodings cannot tell left from right or start from end. Coordinates are fractions of each axis and, for
//! the first axis, seconds as well, so that any size and duration is a valid input.

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};

/// Octaves of an axis' fraction.
const OCTAVES: usize = 5;
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
        let width = SECONDS_WIDTH + axes * 2 * OCTAVES;
        Ok(Self {
            map: Linear::new(width, dim, true, Start::FanIn, vb)?,
        })
    }

    /// Embedding `[N, d]` of all tokens of `axes`, `step_s` seconds a token of the first axis.
    pub(super) fn forward(&self, axes: &[usize], step_s: f64, device: &Device) -> Result<Tensor> {
        let tokens: usize = axes.iter().product();
        let mut parts = Vec::with_capacity(axes.len() + 1);
        let spread = |features: &Tensor, axis: usize| {
            let outer: usize = axes[..axis].iter().product();
            let inner: usize = axes[axis + 1..].iter().product();
            let width = features.dim(1)?;
            features
                .reshape((1, axes[axis], 1, width))?
                .broadcast_as((outer, axes[axis], inner, width))?
                .contiguous()?
                .reshape((tokens, width))
        };
        if let Some(&n) = axes.first() {
            parts.push(spread(&seconds(n, step_s, device)?, 0)?);
        }
        for (axis, &n) in axes.iter().enumerate() {
            parts.push(spread(&fractions(n, device)?, axis)?);
        }
        self.map.forward(&Tensor::cat(&parts, 1)?)
    }
}

fn fractions(n: usize, device: &Device) -> Result<Tensor> {
    let mut values = Vec::with_capacity(n * 2 * OCTAVES);
    for i in 0..n {
        let fraction = (i as f64 + 0.5) / n as f64;
        for octave in 0..OCTAVES {
            let (sin, cos) = (std::f64::consts::PI * fraction * f64::from(1u32 << octave)).sin_cos();
            values.extend([sin as f32, cos as f32]);
        }
    }
    Tensor::from_vec(values, (n, 2 * OCTAVES), device)
}
