//! Picture and sound read each other: softmax cross-attention in both directions, with moments in seconds on both sides
//! so that what happens together finds itself.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::rows::add_row;
use fulgur_lightnet::attention::CrossAttention;
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::norm::RmsNorm;

use super::embed::SECONDS_WIDTH;

#[derive(Clone, Debug)]
pub(super) struct Fusion {
    video: Side,
    audio: Side,
}

#[derive(Clone, Debug)]
struct Side {
    norm: RmsNorm,
    time: Linear,
    read: CrossAttention,
}

impl Fusion {
    /// Between streams of `video` and `audio` width; the attention is as wide as the narrower one.
    pub(super) fn new(video: usize, audio: usize, heads: usize, vb: &VarBuilder) -> Result<Self> {
        let inner = video.min(audio);
        let side = |name: &str, dim: usize, other: usize| {
            let vb = vb.pp(name);
            Ok::<_, candle_core::Error>(Side {
                norm: RmsNorm::new(dim, &vb.pp("norm"))?,
                time: Linear::new(SECONDS_WIDTH, dim, false, Start::FanIn, &vb.pp("time"))?,
                read: CrossAttention::new(dim, other, inner, heads, Start::Zero, &vb.pp("read"))?,
            })
        };
        Ok(Self {
            video: side("video", video, audio)?,
            audio: side("audio", audio, video)?,
        })
    }

    /// What the streams `[B, N, d]`, given with the moments of their tokens `[N, 32]`, take from each other; the caller
    /// adds it to them. Products are in `dtype`.
    pub(super) fn forward(
        &self,
        (video, video_times): (&Tensor, &Tensor),
        (audio, audio_times): (&Tensor, &Tensor),
        dtype: DType,
    ) -> Result<(Tensor, Tensor)> {
        let seen = self.video.prepared(video, video_times, dtype)?;
        let heard = self.audio.prepared(audio, audio_times, dtype)?;
        Ok((
            self.video.read.forward(&seen, &heard, None)?,
            self.audio.read.forward(&heard, &seen, None)?,
        ))
    }
}

impl Side {
    fn prepared(&self, x: &Tensor, times: &Tensor, dtype: DType) -> Result<Tensor> {
        add_row(&self.norm.forward_to(x, dtype)?, &self.time.forward(times)?)
    }
}
