//! Diffusion time and pooled text become the vector that modulates every block (adaLN-Zero).

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};

use crate::denoiser::TextCondition;

/// Frequencies of the time features, geometric from 1 to 1,000 rad a unit of diffusion time.
const FREQUENCIES: usize = 32;
const HIGHEST: f64 = 1000.0;

#[derive(Clone, Debug)]
pub(super) struct Condition {
    time_input: Linear,
    time_output: Linear,
    text: Linear,
}

impl Condition {
    pub(super) fn new(text_dim: usize, dim: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            time_input: Linear::new(2 * FREQUENCIES, dim, true, Start::FanIn, &vb.pp("time_input"))?,
            time_output: Linear::new(dim, dim, true, Start::FanIn, &vb.pp("time_output"))?,
            text: Linear::new(text_dim, dim, true, Start::FanIn, &vb.pp("text"))?,
        })
    }

    /// `time` `[B]` and the text to `[B, dim]`, after a SiLU.
    pub(super) fn forward(&self, time: &Tensor, text: &TextCondition) -> Result<Tensor> {
        let frequencies: Vec<f32> = (0..FREQUENCIES)
            .map(|i| HIGHEST.powf(i as f64 / (FREQUENCIES - 1) as f64) as f32)
            .collect();
        let frequencies = Tensor::from_vec(frequencies, (1, FREQUENCIES), time.device())?;
        let angles = time.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        let features = Tensor::cat(&[&angles.sin()?, &angles.cos()?], D::Minus1)?;
        let time = self
            .time_output
            .forward(&self.time_input.forward(&features)?.silu()?)?;
        (time + self.text.forward(&mean_of_words(text)?)?)?.silu()
    }
}

/// Mean of the valid token states, `[B, c]`.
fn mean_of_words(text: &TextCondition) -> Result<Tensor> {
    let mask = text.mask.to_dtype(text.states.dtype())?.unsqueeze(2)?;
    let count = (mask.sum(1)? + 1e-6)?;
    text.states.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&count)
}
