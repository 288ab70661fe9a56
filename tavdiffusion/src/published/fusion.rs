//! How the streams of TAVDiffusion meet at their narrowest places: attention of one to the other, and what aligns them in training.
//!
//! ```text
//! x <- x + W_o softmax((W_q x)(W_k y)^T / sqrt(d / H)) (W_v y)
//!
//! S[i, j] = (sum_m wa[i, m] max_n <a[i, m], v[j, n]> + sum_n wv[j, n] max_m <a[i, m], v[j, n]>) / 2
//! loss = (CE(S / tau, diagonal) + CE(S^T / tau, diagonal)) / 2
//! ```
//!
//! The heads of the alignment lie in the authors' checkpoint, though sampling never calls them; how they are joined follows the weighted
//! interaction of tokens known from retrieval of videos by text. Each of the C channels is a token there, of as many values as the heads
//! have. They fix the number of places of both streams.

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::ops::softmax;
use fulgur_lightnet::linear::{Linear, Start};
use serde::Deserialize;

use super::layers::attend;
use super::limits::{MOST_CHANNELS, within};
use crate::contrast::TEMPERATURE;

/// Heads of the attention between streams.
const HEADS: usize = 8;

/// Attention of one stream to the other, added to it.
#[derive(Clone, Debug)]
pub struct Fusion {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl Fusion {
    /// Takes `query`, `key`, `value` and `output`: a stream of width `reader` reads one of width `read`. A fresh one changes nothing.
    ///
    /// # Errors
    /// A width that does not split into heads; a tensor that is missing or has another shape.
    pub fn new(reader: usize, read: usize, vb: &VarBuilder) -> Result<Self> {
        if !reader.is_multiple_of(HEADS) {
            bail!("fusion: width {reader} does not split into {HEADS} heads");
        }
        let map = |input: usize, start, name: &str| Linear::new(input, reader, true, start, &vb.pp(name));
        Ok(Self {
            query: map(reader, Start::FanIn, "query")?,
            key: map(read, Start::FanIn, "key")?,
            value: map(read, Start::FanIn, "value")?,
            output: map(reader, Start::Zero, "output")?,
        })
    }

    /// Places `x` `[B, .., reader]` after they have read `source` `[B, .., read]`.
    ///
    /// # Errors
    /// Widths or batches that do not fit.
    pub fn forward(&self, x: &Tensor, source: &Tensor, clips: usize) -> Result<Tensor> {
        let heads = |y: Tensor| {
            let width = y.dim(D::Minus1)?;
            y.reshape((clips, (), HEADS, width / HEADS))
        };
        let (q, k, v) = (
            heads(self.query.forward(x)?)?,
            heads(self.key.forward(source)?)?,
            heads(self.value.forward(source)?)?,
        );
        let read = self.output.forward(&attend(&q, &k, &v, false)?)?;
        x + read.reshape(x.shape())?
    }
}

/// Sizes of the heads of an alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Aligned {
    /// Places of the sound at its narrowest.
    pub audio: usize,
    /// Places of the clip at its narrowest.
    pub video: usize,
    /// Values of a token.
    pub width: usize,
}

impl Aligned {
    /// Those of the authors' checkpoint: 5.12 s of sound, 20 frames of 256 x 320.
    pub const AUTHORS: Self = Self {
        audio: 32,
        video: 400,
        width: 32,
    };
}

/// A map of places, and the weight of each token.
#[derive(Clone, Debug)]
struct Head {
    map: Linear,
    weigh: [Linear; 2],
}

impl Head {
    fn new(places: usize, width: usize, map: &VarBuilder, weights: &VarBuilder) -> Result<Self> {
        let linear = |input, output, vb: &VarBuilder| Linear::new(input, output, true, Start::FanIn, vb);
        Ok(Self {
            map: linear(places, width, map)?,
            weigh: [
                linear(width, width, &weights.pp(0))?,
                linear(width, 1, &weights.pp(2))?,
            ],
        })
    }

    /// Unit tokens `[B, C, width]` and their weights `[B, C]`, of places `[B, N, C]`.
    fn forward(&self, places: &Tensor) -> Result<(Tensor, Tensor)> {
        let places = places.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous()?;
        let tokens = self.map.forward(&places)?;
        let [first, second] = &self.weigh;
        let scores = second.forward(&first.forward(&tokens)?.relu()?)?.squeeze(2)?;
        let length = (tokens.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
        Ok((tokens.broadcast_div(&length)?, softmax(&scores, D::Minus1)?))
    }
}

/// What says in training whether sound and clip belong together.
#[derive(Clone, Debug)]
pub struct Alignment {
    audio: Head,
    video: Head,
}

impl Alignment {
    /// Takes `linear_a`, `linear_b`, `audio_fine_weight` and `video_fine_weight`.
    ///
    /// # Errors
    /// Sizes beyond all reason; a tensor that is missing or has another shape.
    pub fn new(sizes: Aligned, vb: &VarBuilder) -> Result<Self> {
        let Aligned { audio, video, width } = sizes;
        within("alignment.audio", audio, MOST_CHANNELS)?;
        within("alignment.video", video, MOST_CHANNELS)?;
        within("alignment.width", width, MOST_CHANNELS)?;
        Ok(Self {
            audio: Head::new(audio, width, &vb.pp("linear_a"), &vb.pp("audio_fine_weight"))?,
            video: Head::new(video, width, &vb.pp("linear_b"), &vb.pp("video_fine_weight"))?,
        })
    }

    /// How well each sound `[A, N, C]` goes with each clip `[V, M, C]`: `[A, V]`. One pair at a time: the products of all tokens are large.
    ///
    /// # Errors
    /// Other numbers of places than the heads have.
    pub fn scores(&self, audio: &Tensor, video: &Tensor) -> Result<Tensor> {
        let (a, wa) = self.audio.forward(audio)?;
        let (v, wv) = self.video.forward(video)?;
        let mut scores = Vec::new();
        for i in 0..a.dim(0)? {
            for j in 0..v.dim(0)? {
                let products = a.get(i)?.matmul(&v.get(j)?.t()?)?;
                let from_audio = (products.max(1)? * wa.get(i)?)?.sum_all()?;
                let from_video = (products.max(0)? * wv.get(j)?)?.sum_all()?;
                scores.push(((from_audio + from_video)? * 0.5)?);
            }
        }
        Tensor::stack(&scores, 0)?.reshape((a.dim(0)?, v.dim(0)?))
    }

    /// The loss of a batch of sounds and clips of which those of one number belong together.
    ///
    /// # Errors
    /// As [`Self::scores`], or batches of different sizes.
    pub fn loss(&self, audio: &Tensor, video: &Tensor) -> Result<Tensor> {
        let scores = (self.scores(audio, video)? / TEMPERATURE)?;
        let (sounds, clips) = scores.dims2()?;
        if sounds != clips {
            bail!("alignment: {sounds} sounds and {clips} clips, expected pairs");
        }
        let pairs = (0..clips)
            .map(|pair| scores.narrow(0, pair, 1)?.narrow(1, pair, 1)?.reshape(1))
            .collect::<Result<Vec<_>>>()?;
        let both = (scores.log_sum_exp(1)? + scores.log_sum_exp(0)?)?;
        ((both * 0.5)? - Tensor::cat(&pairs, 0)?)?.mean_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use candle_core::Device;
    use fulgur_lightnet::params::Params;

    #[test]
    fn a_fresh_fusion_changes_nothing_and_a_trained_one_reads() -> Result<()> {
        let params = Params::random(8, &Device::Cpu);
        let fusion = Fusion::new(16, 8, &params.builder())?;
        let (x, source) = (normal("x", &[2, 5, 16])?, normal("source", &[2, 3, 8])?);
        assert_eq!(apart(&fusion.forward(&x, &source, 2)?, &x)?, 0.0);
        perturb(&params, 0.3)?;
        assert!(apart(&fusion.forward(&x, &source, 2)?, &x)? > 1e-2);
        // Pictures of a clip are one list of places.
        let pictures = x.reshape((2, 1, 5, 16))?;
        let far = apart(
            &fusion.forward(&pictures, &source, 2)?.reshape(x.shape())?,
            &fusion.forward(&x, &source, 2)?,
        )?;
        assert_eq!(far, 0.0);
        assert!(Fusion::new(12, 8, &params.builder().pp("other")).is_err());
        Ok(())
    }

    /// The definition, token by token in f64.
    #[test]
    fn scores_are_weighted_interactions_of_tokens() -> Result<()> {
        let params = Params::random(9, &Device::Cpu);
        let sizes = Aligned {
            audio: 4,
            video: 6,
            width: 3,
        };
        let alignment = Alignment::new(sizes, &params.builder())?;
        perturb(&params, 0.4)?;
        let (audio, video) = (normal("audio", &[2, 4, 5])?, normal("video", &[3, 6, 5])?);
        let found = alignment.scores(&audio, &video)?.to_vec2::<f32>()?;
        type Parts = (Vec<Vec<Vec<f32>>>, Vec<Vec<f32>>);
        let parts = |head: &Head, x: &Tensor| -> Result<Parts> {
            let (tokens, weights) = head.forward(x)?;
            Ok((tokens.to_vec3()?, weights.to_vec2()?))
        };
        let ((a, wa), (v, wv)) = (parts(&alignment.audio, &audio)?, parts(&alignment.video, &video)?);
        let dot = |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum() };
        for i in 0..2 {
            for j in 0..3 {
                let one = |tokens: &[Vec<f32>], weights: &[f32], others: &[Vec<f32>]| -> f64 {
                    let best = |t: &Vec<f32>| others.iter().map(|o| dot(t, o)).fold(f64::MIN, f64::max);
                    tokens
                        .iter()
                        .zip(weights)
                        .map(|(t, &w)| f64::from(w) * best(t))
                        .sum()
                };
                let expected = 0.5 * (one(&a[i], &wa[i], &v[j]) + one(&v[j], &wv[j], &a[i]));
                assert!((f64::from(found[i][j]) - expected).abs() < 1e-5);
            }
        }
        let loss = alignment
            .loss(&audio, &video.narrow(0, 0, 2)?)?
            .to_scalar::<f32>()?;
        assert!(loss > 0.0 && loss.is_finite());
        assert!(alignment.loss(&audio, &video).is_err());
        Ok(())
    }
}
