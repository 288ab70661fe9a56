//! What steers a denoiser: diffusion time, and a text as one vector.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

use crate::linear::{Linear, Start};

/// Frequencies of the time features, geometric from 1 to 1,000 rad a unit of diffusion time.
const FREQUENCIES: usize = 32;
const HIGHEST: f64 = 1000.0;

/// Diffusion time as a vector: sines and cosines through two maps.
#[derive(Clone, Debug)]
pub struct TimeEmbedding {
    input: Linear,
    output: Linear,
}

impl TimeEmbedding {
    /// Takes `time_input` and `time_output`, of width `dim`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(dim: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            input: Linear::new(2 * FREQUENCIES, dim, true, Start::FanIn, &vb.pp("time_input"))?,
            output: Linear::new(dim, dim, true, Start::FanIn, &vb.pp("time_output"))?,
        })
    }

    /// `time` `[B]` in [0, 1] to `[B, dim]`.
    ///
    /// # Errors
    /// A failing operation.
    pub fn forward(&self, time: &Tensor) -> Result<Tensor> {
        let frequencies: Vec<f32> = (0..FREQUENCIES)
            .map(|i| HIGHEST.powf(i as f64 / (FREQUENCIES - 1) as f64) as f32)
            .collect();
        let frequencies = Tensor::from_vec(frequencies, (1, FREQUENCIES), time.device())?;
        let angles = time.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        let features = Tensor::cat(&[&angles.sin()?, &angles.cos()?], D::Minus1)?;
        self.output.forward(&self.input.forward(&features)?.silu()?)
    }
}

/// Mean `[B, c]` of the token states `[B, L, c]` that are valid, 1 in `mask` `[B, L]`; zero where none is.
///
/// # Errors
/// The shapes do not fit.
pub fn mean_of_words(states: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.to_dtype(states.dtype())?.unsqueeze(2)?;
    let count = (mask.sum(1)? + 1e-6)?;
    states.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&count)
}
