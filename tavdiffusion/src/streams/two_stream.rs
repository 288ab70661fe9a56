//! The two streams.
//!
//! ```text
//! video latents [B,F/4,h,w,C] -> 2x2 patches -> linear + coordinates -> MD-TPE -> blocks --+-- blocks -> velocity
//! audio latents [B,T/4,b,C]   ->                linear + coordinates -> MD-TPE -> blocks --+-- blocks -> velocity
//!                                                             cross-attention both ways ---^  at a few depths
//! ```
//! Blocks are non-causal LightNet with MD-LRPE, cross-attention to the text and token shifts before the gated linear
//! unit, modulated by diffusion time and text. Cost grows linearly with duration and area, the cross-attention between
//! the streams apart.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::norm::rms_norm_modulated;
use fulgur_kernels::residual::add_branch;
use fulgur_kernels::rows::add_row;
use fulgur_lightnet::block::{Block, BlockConfig, BlockContext, MODULATIONS};
use fulgur_lightnet::linear::{Linear, Start};
use fulgur_lightnet::norm::EPS;
use fulgur_lightnet::patches::{from_patches, to_patches};
use fulgur_lightnet::position::{Grid, MdTpe, TpeConfig};
use serde::{Deserialize, Serialize};

use super::condition::Condition;
use super::embed::{AxisEmbedding, seconds};
use super::fusion::Fusion;
use crate::denoiser::{Denoiser, Latents, TextCondition};
use crate::diffusion::Objective;
use crate::error::Error;
use crate::folder;

/// Shape of one stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamConfig {
    /// Channels of a latent.
    pub channels: usize,
    /// Latents in a token, one number an axis.
    pub patch: Vec<usize>,
    /// Model width.
    pub dim: usize,
    /// Heads of the mixers.
    pub heads: usize,
    /// Key width of a head.
    pub head_dim: usize,
    /// Hidden width of the gated linear units.
    pub hidden: usize,
    /// Seconds between latents along the first axis.
    pub step_s: f64,
    /// Longest axis in tokens at the default size: sets the slowest MD-LRPE frequency.
    pub longest: usize,
}

/// Shape of a [`TwoStream`] (`config.json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TwoStreamConfig {
    /// Picture.
    pub video: StreamConfig,
    /// Sound.
    pub audio: StreamConfig,
    /// Blocks of each stream.
    pub depth: usize,
    /// Every so many blocks, from the first, one reads the text.
    pub text_every: usize,
    /// Depths after which the streams read each other.
    pub fusion: Vec<usize>,
    /// Heads of the cross-attention between the streams.
    pub fusion_heads: usize,
    /// Width of the text states.
    pub text_dim: usize,
    /// Width of the features that the contrastive loss compares.
    pub contrast_dim: usize,
    /// What the network predicts.
    pub objective: Objective,
}

impl Default for TwoStreamConfig {
    fn default() -> Self {
        let video = StreamConfig {
            channels: 20,
            patch: vec![1, 2, 2],
            dim: 320,
            heads: 5,
            head_dim: 64,
            hidden: 432,
            step_s: 1.0 / 3.0,
            longest: 12,
        };
        let audio = StreamConfig {
            channels: 8,
            patch: vec![1, 1],
            dim: 160,
            heads: 5,
            head_dim: 64,
            hidden: 240,
            step_s: 0.04,
            longest: 100,
        };
        Self {
            video,
            audio,
            depth: 8,
            text_every: 2,
            fusion: vec![1, 4, 7],
            fusion_heads: 5,
            text_dim: 256,
            contrast_dim: 128,
            objective: Objective::Flow,
        }
    }
}

impl TwoStreamConfig {
    /// Whether the block at `depth` reads the text.
    fn reads_text(&self, depth: usize) -> bool {
        depth.is_multiple_of(self.text_every.max(1))
    }
}

/// The denoiser of the builtin generator.
#[derive(Clone, Debug)]
pub struct TwoStream {
    config: TwoStreamConfig,
    device: Device,
    compute: DType,
    condition: Condition,
    video: Stream,
    audio: Stream,
    fusion: Vec<(usize, Fusion)>,
    contrast: Option<(Linear, Linear)>,
}

#[derive(Clone, Debug)]
struct Stream {
    config: StreamConfig,
    input: Linear,
    coordinates: AxisEmbedding,
    tpe: MdTpe,
    modulation: Linear,
    blocks: Vec<Block>,
    head_modulation: Linear,
    head: Linear,
}

/// Tokens of one stream on their way, with what every block needs.
struct Tokens {
    x: Tensor,
    grid: Grid,
    modulation: Tensor,
    moments: Tensor,
}

impl TwoStream {
    /// Takes `condition`, `video`, `audio`, `fusion.{i}` and, for training, `contrast`.
    ///
    /// `compute` is the dtype of the blocks' products (`BF16` on a GPU, `F32` on the CPU); the residual streams stay
    /// in `F32`.
    pub fn new(config: &TwoStreamConfig, training: bool, compute: DType, vb: &VarBuilder) -> Result<Self> {
        if let Some(depth) = config.fusion.iter().find(|&&d| d >= config.depth) {
            candle_core::bail!(
                "two streams: fusion after block {depth}, expected one of 0..{}",
                config.depth
            );
        }
        let (video, audio) = (&config.video, &config.audio);
        let fusion = |&depth: &usize| {
            let vb = vb.pp("fusion").pp(depth);
            Ok((
                depth,
                Fusion::new(video.dim, audio.dim, config.fusion_heads, &vb)?,
            ))
        };
        let contrast = if training {
            let vb = vb.pp("contrast");
            let map = |dim: usize, name: &str| {
                Linear::new(dim, config.contrast_dim, false, Start::FanIn, &vb.pp(name))
            };
            Some((map(video.dim, "video")?, map(audio.dim, "audio")?))
        } else {
            None
        };
        Ok(Self {
            config: config.clone(),
            device: vb.device().clone(),
            compute,
            condition: Condition::new(config.text_dim, video.dim, &vb.pp("condition"))?,
            video: Stream::new(config, video, &vb.pp("video"))?,
            audio: Stream::new(config, audio, &vb.pp("audio"))?,
            fusion: config.fusion.iter().map(fusion).collect::<Result<_>>()?,
            contrast,
        })
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`, for use or, where the file has the tensors of
    /// `contrast`, as it was trained; `compute` as in [`TwoStream::new`].
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, Error> {
        folder::load(dir, device, |config, weights| {
            Self::new(
                config,
                weights.has_below("contrast."),
                compute,
                &weights.builder(),
            )
        })
    }

    /// Shape of the network.
    pub fn config(&self) -> &TwoStreamConfig {
        &self.config
    }

    /// Prediction, and for a network made for training the pooled features `[B, c]` of picture and sound half way.
    pub fn forward(
        &self,
        latents: &Latents,
        time: &Tensor,
        text: &TextCondition,
    ) -> Result<(Latents, Option<(Tensor, Tensor)>)> {
        let condition = self.condition.forward(time, text)?;
        let text_states = text.states.to_dtype(self.compute)?;
        let text = (&text_states, &text.mask);
        let mut video = self.video.start(&latents.video, &condition, self.compute)?;
        let mut audio = self.audio.start(&latents.audio, &condition, self.compute)?;
        let mut features = None;
        for depth in 0..self.config.depth {
            video.x = self.video.block(depth, &video, text, self.compute)?;
            audio.x = self.audio.block(depth, &audio, text, self.compute)?;
            if let Some((_, fusion)) = self.fusion.iter().find(|(at, _)| *at == depth) {
                let (to_video, to_audio) = fusion.forward(
                    (&video.x, &video.moments),
                    (&audio.x, &audio.moments),
                    self.compute,
                )?;
                video.x = add_branch(&video.x, &to_video, None)?;
                audio.x = add_branch(&audio.x, &to_audio, None)?;
            }
            if depth == self.config.depth / 2 {
                features = self.features(&video, &audio)?;
            }
        }
        let latents = Latents {
            video: self.video.finish(&video, &condition)?,
            audio: self.audio.finish(&audio, &condition)?,
        };
        Ok((latents, features))
    }

    fn features(&self, video: &Tokens, audio: &Tokens) -> Result<Option<(Tensor, Tensor)>> {
        let Some((seen, heard)) = &self.contrast else {
            return Ok(None);
        };
        Ok(Some((
            seen.forward(&video.x.mean(1)?)?,
            heard.forward(&audio.x.mean(1)?)?,
        )))
    }
}

impl Denoiser for TwoStream {
    fn predict(&self, latents: &Latents, time: &Tensor, text: &TextCondition) -> Result<Latents> {
        Ok(self.forward(latents, time, text)?.0)
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

impl Stream {
    fn new(shared: &TwoStreamConfig, config: &StreamConfig, vb: &VarBuilder) -> Result<Self> {
        let StreamConfig {
            dim,
            heads,
            head_dim,
            hidden,
            ..
        } = *config;
        let axes = config.patch.len();
        let values = config.channels * config.patch.iter().product::<usize>();
        let block = BlockConfig {
            dim,
            heads,
            head_dim,
            hidden,
            lrpe: Some((axes, config.longest)),
            token_shift: true,
            context: None,
            modulated: true,
        };
        let tpe = TpeConfig {
            dim,
            heads,
            axes,
            two_sided: true,
            residual: true,
        };
        let condition = shared.video.dim;
        let zero = |width: usize, name: &str| Linear::new(condition, width, true, Start::Zero, &vb.pp(name));
        Ok(Self {
            config: config.clone(),
            input: Linear::new(values, dim, true, Start::FanIn, &vb.pp("input"))?,
            coordinates: AxisEmbedding::new(axes, dim, &vb.pp("coordinates"))?,
            tpe: MdTpe::new(tpe, &vb.pp("tpe"))?,
            modulation: zero(MODULATIONS * dim, "modulation")?,
            blocks: (0..shared.depth)
                .map(|i| {
                    let context = shared.reads_text(i).then_some(shared.text_dim);
                    Block::new(BlockConfig { context, ..block }, &vb.pp("blocks").pp(i))
                })
                .collect::<Result<_>>()?,
            head_modulation: zero(2 * dim, "head_modulation")?,
            head: Linear::new(dim, values, true, Start::Zero, &vb.pp("head"))?,
        })
    }

    fn start(&self, latents: &Tensor, condition: &Tensor, compute: DType) -> Result<Tokens> {
        let patches = to_patches(latents, &self.config.patch)?;
        let axes = patches.dims()[1..patches.rank() - 1].to_vec();
        let grid = Grid::new(&axes);
        let (batch, device) = (latents.dim(0)?, latents.device());
        let tokens = self
            .input
            .forward(&patches.reshape((batch, grid.tokens(), ()))?.to_dtype(compute)?)?;
        let step_s = self.config.step_s * self.config.patch[0] as f64;
        let tokens = add_row(&tokens, &self.coordinates.forward(&axes, step_s, device)?)?;
        let inner: usize = axes[1..].iter().product();
        let moments = seconds(axes[0], step_s, device)?;
        let width = moments.dim(1)?;
        let moments = moments
            .unsqueeze(1)?
            .broadcast_as((axes[0], inner, width))?
            .contiguous()?
            .reshape((grid.tokens(), width))?;
        Ok(Tokens {
            x: self.tpe.forward(&tokens, &grid, None)?.to_dtype(DType::F32)?,
            modulation: self
                .modulation
                .forward(condition)?
                .reshape((batch, MODULATIONS, self.config.dim))?,
            grid,
            moments,
        })
    }

    fn block(
        &self,
        depth: usize,
        tokens: &Tokens,
        text: (&Tensor, &Tensor),
        compute: DType,
    ) -> Result<Tensor> {
        let context = BlockContext {
            modulation: Some(&tokens.modulation),
            text: Some(text),
            compute: Some(compute),
            ..BlockContext::on(&tokens.grid)
        };
        self.blocks[depth].forward(&tokens.x, &context)
    }

    fn finish(&self, tokens: &Tokens, condition: &Tensor) -> Result<Tensor> {
        let dim = self.config.dim;
        let modulation = self.head_modulation.forward(condition)?;
        let (shift, scale) = (modulation.narrow(1, 0, dim)?, modulation.narrow(1, dim, dim)?);
        let x = rms_norm_modulated(&tokens.x, &scale.contiguous()?, &shift.contiguous()?, EPS)?;
        let values = self.head.forward(&x)?;
        let (batch, width) = (values.dim(0)?, values.dim(2)?);
        from_patches(
            &values.reshape([&[batch], tokens.grid.axes.as_slice(), &[width]].concat())?,
            &self.config.patch,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::denoiser::{LatentShape, noise};
    use crate::testing::{apart, normal, perturb};
    use fulgur_lightnet::params::Params;

    /// Size of the noise that wakes what starts at zero.
    const WAKE: f64 = 0.1;

    fn small() -> TwoStreamConfig {
        let stream = |channels: usize, patch: &[usize], step_s: f64, longest: usize| StreamConfig {
            channels,
            patch: patch.to_vec(),
            dim: 24,
            heads: 2,
            head_dim: 6,
            hidden: 24,
            step_s,
            longest,
        };
        TwoStreamConfig {
            video: stream(3, &[1, 2, 2], 1.0 / 3.0, 3),
            audio: stream(2, &[1, 1], 0.04, 8),
            depth: 2,
            text_every: 2,
            fusion: vec![0],
            fusion_heads: 2,
            text_dim: 16,
            contrast_dim: 8,
            objective: Objective::Flow,
        }
    }

    fn network(training: bool, wake: f64) -> Result<TwoStream> {
        let params = Params::random(6, &Device::Cpu);
        let network = TwoStream::new(&small(), training, DType::F32, &params.builder())?;
        perturb(&params, wake)?;
        Ok(network)
    }

    fn latents(seeds: &[u64]) -> Result<Latents> {
        let shape = LatentShape {
            video: [2, 4, 4, 3],
            audio: [7, 4, 2],
        };
        noise(&shape, seeds, &Device::Cpu)
    }

    fn text(name: &str, batch: usize, words: usize) -> Result<TextCondition> {
        Ok(TextCondition {
            states: normal(name, &[batch, words, 16])?,
            mask: Tensor::ones((batch, words), DType::F32, &Device::Cpu)?,
        })
    }

    fn times(batch: usize, time: f32) -> Result<Tensor> {
        Tensor::full(time, batch, &Device::Cpu)
    }

    /// How far two predictions are apart, picture and sound.
    fn differ(a: &Latents, b: &Latents) -> Result<[f32; 2]> {
        Ok([apart(&a.video, &b.video)?, apart(&a.audio, &b.audio)?])
    }

    #[test]
    fn a_fresh_network_predicts_zeros() -> Result<()> {
        let made = network(false, 0.0)?.predict(&latents(&[1, 2])?, &times(2, 0.5)?, &text("a", 2, 3)?)?;
        let zeros = made.map(Tensor::zeros_like)?;
        assert_eq!(differ(&made, &zeros)?, [0.0; 2]);
        Ok(())
    }

    #[test]
    fn any_whole_size_and_duration_is_an_input() -> Result<()> {
        let network = network(false, WAKE)?;
        for (video, audio) in [
            ([1, 2, 2, 3], [1, 4, 2]),
            ([5, 4, 8, 3], [21, 4, 2]),
            ([3, 6, 2, 3], [40, 2, 2]),
        ] {
            let latents = noise(&LatentShape { video, audio }, &[3], &Device::Cpu)?;
            let made = network.predict(&latents, &times(1, 0.3)?, &text("a", 1, 5)?)?;
            assert_eq!(made.video.dims(), latents.video.dims());
            assert_eq!(made.audio.dims(), latents.audio.dims());
            let sum = (made.video.sum_all()? + made.audio.sum_all()?)?.to_scalar::<f32>()?;
            assert!(sum.is_finite(), "{video:?}: {sum}");
        }
        Ok(())
    }

    #[test]
    fn latents_that_are_no_whole_patches_are_refused() -> Result<()> {
        let shape = LatentShape {
            video: [2, 3, 4, 3],
            audio: [7, 4, 2],
        };
        let odd = noise(&shape, &[1], &Device::Cpu)?;
        let message = network(false, 0.0)?
            .predict(&odd, &times(1, 0.5)?, &text("a", 1, 3)?)
            .unwrap_err();
        assert!(message.to_string().contains("[1, 2, 3, 4, 3]"), "{message}");
        Ok(())
    }

    #[test]
    fn text_time_and_the_other_stream_change_both_predictions() -> Result<()> {
        let network = network(false, WAKE)?;
        let (latents, text_a) = (latents(&[1])?, text("a", 1, 3)?);
        let base = network.predict(&latents, &times(1, 0.5)?, &text_a)?;
        let moved = |made: &Latents| Ok::<_, candle_core::Error>(differ(&base, made)?.map(|d| d > 1e-4));
        let other_text = network.predict(&latents, &times(1, 0.5)?, &text("b", 1, 3)?)?;
        assert_eq!(moved(&other_text)?, [true; 2], "text");
        let other_time = network.predict(&latents, &times(1, 0.9)?, &text_a)?;
        assert_eq!(moved(&other_time)?, [true; 2], "time");
        let other_sound = Latents {
            video: latents.video.clone(),
            audio: (&latents.audio + 1.0)?,
        };
        let made = network.predict(&other_sound, &times(1, 0.5)?, &text_a)?;
        assert_eq!(moved(&made)?, [true; 2], "sound");
        let other_picture = Latents {
            video: (&latents.video + 1.0)?,
            audio: latents.audio.clone(),
        };
        let made = network.predict(&other_picture, &times(1, 0.5)?, &text_a)?;
        assert_eq!(moved(&made)?, [true; 2], "picture");
        Ok(())
    }

    #[test]
    fn padding_of_the_text_is_not_read() -> Result<()> {
        let network = network(false, WAKE)?;
        let latents = latents(&[1])?;
        let short = text("a", 1, 3)?;
        let rest = text("anything", 1, 2)?;
        let padded = TextCondition {
            states: Tensor::cat(&[&short.states, &rest.states], 1)?,
            mask: Tensor::cat(&[&short.mask, &rest.mask.zeros_like()?], 1)?,
        };
        let a = network.predict(&latents, &times(1, 0.5)?, &short)?;
        let b = network.predict(&latents, &times(1, 0.5)?, &padded)?;
        assert!(differ(&a, &b)?.iter().all(|&d| d < 1e-5), "{:?}", differ(&a, &b)?);
        Ok(())
    }

    #[test]
    fn a_clip_is_predicted_alike_alone_and_in_a_batch() -> Result<()> {
        let network = network(false, WAKE)?;
        let (all, texts) = (latents(&[1, 2, 3])?, text("a", 3, 4)?);
        let time = Tensor::new(&[0.2f32, 0.5, 0.9], &Device::Cpu)?;
        let together = network.predict(&all, &time, &texts)?.narrow(1, 1)?;
        let one_text = TextCondition {
            states: texts.states.narrow(0, 1, 1)?,
            mask: texts.mask.narrow(0, 1, 1)?,
        };
        let alone = network.predict(&all.narrow(1, 1)?, &time.narrow(0, 1, 1)?, &one_text)?;
        let apart = differ(&together, &alone)?;
        assert!(apart.iter().all(|&d| d < 1e-5), "{apart:?}");
        Ok(())
    }

    #[test]
    fn features_to_compare_exist_in_training_alone() -> Result<()> {
        let forward = |training: bool| {
            network(training, 0.0)?.forward(&latents(&[1, 2])?, &times(2, 0.5)?, &text("a", 2, 3)?)
        };
        assert!(forward(false)?.1.is_none());
        let features = forward(true)?.1;
        let shapes = features.map(|(seen, heard)| (seen.dims().to_vec(), heard.dims().to_vec()));
        assert_eq!(shapes, Some((vec![2, 8], vec![2, 8])));
        Ok(())
    }

    #[test]
    fn fusion_beyond_the_last_block_is_refused() {
        let config = TwoStreamConfig {
            fusion: vec![0, 2],
            ..small()
        };
        let params = Params::random(6, &Device::Cpu);
        let message = TwoStream::new(&config, false, DType::F32, &params.builder()).unwrap_err();
        assert!(
            message
                .to_string()
                .contains("after block 2, expected one of 0..2"),
            "{message}"
        );
    }

    #[test]
    fn gradients_of_a_tape_are_those_of_the_graph() -> Result<()> {
        let params = Params::random(6, &Device::Cpu);
        let network = TwoStream::new(&small(), true, DType::F32, &params.builder())?;
        perturb(&params, WAKE)?;
        let loss = || {
            let (made, features) = network.forward(&latents(&[1, 2])?, &times(2, 0.4)?, &text("a", 2, 3)?)?;
            let mut loss = (made.video.sqr()?.mean_all()? + made.audio.sqr()?.mean_all()?)?;
            if let Some((seen, heard)) = features {
                loss = (loss + crate::contrast::pooled(&seen, &heard)?)?;
            }
            Ok::<_, candle_core::Error>(loss)
        };
        let expected = loss()?.backward()?;
        let (recorded, tape) = fulgur_kernels::tape::record(loss);
        let found = tape.backward(&recorded?)?;
        let mut compared = 0;
        for (name, var) in params.vars() {
            let (Some(found), Some(expected)) = (found.get(&var), expected.get(&var)) else {
                assert!(
                    found.get(&var).is_none() && expected.get(&var).is_none(),
                    "{name}"
                );
                continue;
            };
            let size = expected.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(apart(found, expected)? <= 1e-5 * size.max(1e-3), "{name}");
            compared += 1;
        }
        assert!(compared > 100, "{compared}");
        Ok(())
    }
}
