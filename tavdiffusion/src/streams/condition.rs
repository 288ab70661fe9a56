//! Diffusion time and pooled text become the vector that modulates every block (adaLN-Zero).

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::diffusion::{TimeEmbedding, mean_of_words};
use fulgur_lightnet::linear::{Linear, Start};

use crate::denoiser::TextCondition;

#[derive(Clone, Debug)]
pub(super) struct Condition {
    time: TimeEmbedding,
    text: Linear,
}

impl Condition {
    pub(super) fn new(text_dim: usize, dim: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            time: TimeEmbedding::new(dim, vb)?,
            text: Linear::new(text_dim, dim, true, Start::FanIn, &vb.pp("text"))?,
        })
    }

    /// `time` `[B]` and the text to `[B, dim]`, after a SiLU.
    pub(super) fn forward(&self, time: &Tensor, text: &TextCondition) -> Result<Tensor> {
        let words = mean_of_words(&text.states, &text.mask)?;
        (self.time.forward(time)? + self.text.forward(&words)?)?.silu()
    }
}
